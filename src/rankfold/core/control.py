"""Choose, rename and take off the adapters of a model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn

from rankfold.core.adapter import Adapter
from rankfold.core.layers import home, restore_layer
from rankfold.core.merging import unmerge
from rankfold.core.routing import check_new_name, find_state, state_of


def using(model: nn.Module, adapter: str | Sequence[str | None] | None) -> AbstractContextManager[None]:
    """Run the model, inside a `with` block, under one adapter, under none (`None`), or under one name for each row.

    Other threads' forwards of the model wait until the block ends. With gradient checkpointing call `backward` inside
    the block too, since it runs forwards again.
    """
    return state_of(model).using(adapter)


def set_active(model: nn.Module, name: str | None) -> None:
    """Make an adapter the one that plain forwards use, or none (`None`). Allocates nothing."""
    state_of(model).activate(name)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off the model (unmerging it first), or all; the last one leaves the model as it was found."""
    state = state_of(model)
    names = list(state.adapters) if name is None else [state.check(name)]
    with state.lock:
        for one in names:
            if one in state.merged:
                unmerge(model, one)
            adapter = state.adapters.pop(one)
            state.last = None  # it may hold the adapter's factors
            layers = {id(delta.layer): delta.layer for delta in adapter.deltas.values()}
            for delta in adapter.deltas.values():
                del home(delta.site)[one]
            for path in adapter.modules:
                module = state.model.get_submodule(path)
                del module._modules["deltas"]._modules[one]  # type: ignore[union-attr]
                layers[id(module)] = module
            for layer in layers.values():
                restore_layer(layer)
            if state.active == one:
                state.activate(None)
        if not state.adapters:
            state.close()
            del state.model.__dict__["_rankfold_state"]
            for path, parameter in state.model.named_parameters():
                parameter.requires_grad_(path in state.trainable)


def rename(model: nn.Module, old: str, new: str) -> None:
    """Give an attached adapter another name."""
    state = state_of(model)
    state.check(old)
    check_new_name(new, state)
    with state.lock:
        adapter = state.adapters.pop(old)
        state.adapters[new] = adapter
        adapter.name = new
        state.merged = tuple(new if name == old else name for name in state.merged)
        homes = [home(delta.site) for delta in adapter.deltas.values()]
        homes += [state.model.get_submodule(path)._modules["deltas"]._modules for path in adapter.modules]  # type: ignore[union-attr]
        for deltas in homes:
            deltas[new] = deltas.pop(old)
        if state.active == old:
            state.active = new
        if state.route == old:
            state.route = new


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters attached to the model, by name (empty if none was ever attached)."""
    state = find_state(model)
    return {} if state is None else dict(state.adapters)
