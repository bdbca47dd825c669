"""Blocks of a model in turn, alone on what they are called with: where a change of one changes what the next ones see.

`by_block` goes through them; each step is a `Window` of one block or of several in a row. It knows the layers in it,
collects statistics of them, runs, and shows what any module in it is called with.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankfold.core.calibration import calibrate
from rankfold.core.calibration.answers import Calibration
from rankfold.core.calibration.layers import forward, to_device
from rankfold.core.calibration.statistics import Statistic
from rankfold.core.calibration.surroundings import at_rest
from rankfold.core.targets import layer_of
from rankfold.errors import RankfoldError


class Seen(NamedTuple):
    """One call of a module: its arguments, and the tensor it gave; the first of several, where not `alone`."""

    args: tuple[Any, ...]
    named: dict[str, Any]
    y: Tensor
    alone: bool

    def again(self, module: nn.Module) -> Tensor:
        return _tensor(module(*self.args, **self.named))


@dataclass
class Call:
    """What a batch calls blocks in a row with: hidden states for the first one, and for each its other arguments.

    `x` are the hidden states that the model gives by now, `exact` those of the model as it was before any change. Both
    are None where the block is the whole model, all of whose arguments are others.
    """

    x: Tensor | None
    exact: Tensor | None
    others: list[tuple[tuple[Any, ...], dict[str, Any]]]
    masks: dict[str, Any]


@dataclass
class Window:
    """Blocks in a row, with those of their `layers` that were asked for, by path.

    Those in `due` are in no later window. In `carried` tensors go on to the next window. Without batches there are no
    blocks.
    """

    model: nn.Module
    layers: dict[str, Any]
    due: list[str]
    blocks: list[nn.Module] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    statistics: Calibration | None = None
    carried: dict[str, Tensor] = field(default_factory=dict)

    def run(self, call: Call, x: Tensor | None = None, blocks: int | None = None) -> Tensor:
        """What the blocks, or the first few, give for that call, on x if given and else on `call.x`."""
        x = call.x if x is None else x
        for block, (args, named) in zip(self.blocks[:blocks], call.others, strict=False):
            x = _tensor(block(*args, **named) if x is None else block(x, *args, **named))
        assert x is not None
        return x

    def at_rest(self) -> Any:
        """A context for `run`: eval mode, without a cache of keys and values, which a second run would make longer."""
        return _at_rest(self.model)

    def collect(self, statistics: Sequence[Statistic[Any]]) -> Calibration:
        """Statistics of the window's layers, as its blocks are now."""
        given = [{**call.masks, "call": call} for call in self.calls]
        return calibrate(self.model, given, statistics, list(self.layers), loss=lambda _, one: self.run(one["call"]))

    def enclosing(self, path: str) -> nn.Module:
        """The module that a layer is a part of: attention, feed-forward, or the block itself."""
        return self.model.get_submodule(path.rpartition(".")[0])

    def seen(self, module: nn.Module) -> list[Seen]:
        """All calls of a module within, as the window is now."""
        found: list[Seen] = []
        with self.at_rest():
            for i, call in enumerate(self.calls):
                with _recorded([module]) as (calls,):
                    self.run(call)
                if not all(bool(one.y.isfinite().all()) for one in calls):
                    raise RankfoldError(
                        f"what a {type(module).__name__} gives holds NaN or infinity in calibration batch {i}"
                    )
                found += calls
        return found


@contextmanager
def standing(weights: Mapping[nn.Linear, Tensor]) -> Iterator[None]:
    """With these in the place of the layers' weights; gradients reach them."""
    own = {layer: dict(layer._parameters) for layer in weights}
    try:
        for layer, W in weights.items():
            given = layer._parameters.pop("weight")
            layer.__dict__["weight"] = W.to(given.dtype)  # type: ignore[union-attr]
        yield
    finally:
        for layer, parameters in own.items():
            layer.__dict__.pop("weight", None)
            layer._parameters.clear()
            layer._parameters.update(parameters)


def by_block(
    model: nn.Module,
    batches: Iterable[Any],
    paths: Sequence[str],
    size: int = 1,
    overlap: int = 0,
    *,
    exact: bool = False,
) -> Iterator[Window]:
    """The blocks that hold these layers, in windows of `size` that share `overlap` blocks with the next one.

    A block sees what the blocks before it give by now: change one before asking for the next. Layers in no block come
    first, with the model itself as the block. Where each block's input is not the output of the one before, windows
    are of one block, for which the model runs each time. With `exact` what the unchanged blocks give goes along.
    """
    batches, blocks = list(batches), blocks_of(paths)
    if not batches:
        raise RankfoldError("the calibration batches are empty (is the iterator used up?)")
    if outside := blocks.pop("", []):
        layers = {path: model.get_submodule(path) for path in outside}
        yield Window(model, layers, outside, [model], [_whole(model, batch) for batch in batches])
    stacks: dict[str, list[str]] = {}
    for block in blocks:
        stacks.setdefault(block.rpartition(".")[0], []).append(block)
    for stack in stacks.values():
        calls: list[Call] = []
        carried: dict[str, Tensor] = {}
        while stack:
            if not calls or not calls[0].others:
                calls = _calls(model, [model.get_submodule(block) for block in stack], batches)
            here = stack[: min(size, len(calls[0].others))]
            leaving = len(here) if len(here) in (len(stack), len(calls[0].others)) else max(1, len(here) - overlap)
            layers = {path: model.get_submodule(path) for block in here for path in blocks[block]}
            due = [path for block in here[:leaving] for path in blocks[block]]
            modules = [model.get_submodule(block) for block in here]
            window = Window(model, layers, due, modules, calls, carried=carried)
            going_on = leaving < len(calls[0].others)
            if exact and going_on:
                with window.at_rest():
                    exacts = [window.run(call, call.exact, leaving) for call in calls]
            yield window
            carried = window.carried
            if going_on:
                with window.at_rest():
                    for i, call in enumerate(calls):
                        call.x = window.run(call, blocks=leaving)
                        call.exact = exacts[i] if exact else call.x
            for call in calls:
                del call.others[:leaving]
            stack = stack[leaving:]


def blocks_of(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths of layers by the repeated block that they are in, "" for those in none."""
    blocks: dict[str, list[str]] = {}
    for path in paths:
        block = layer_of(f"{path}.")
        blocks.setdefault("" if block is None or block == path else block, []).append(path)
    return blocks


def _whole(model: nn.Module, given: Any) -> Call:
    """The batch as a call of the model."""
    batch = to_device(given, next(model.parameters()).device)
    if isinstance(batch, Mapping):
        return Call(None, None, [((), dict(batch))], _masks(batch))
    return Call(None, None, [(tuple(batch) if isinstance(batch, list) else (batch,), {})], {})


class _EnoughError(Exception):
    """The last block has been called."""


def _calls(model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Any]) -> list[Call]:
    """Each batch's call of the blocks in a row; of the first block alone where the next ones do not see its output."""
    calls: list[Call] = []
    alone: list[Call] = []
    chained, passed, device = True, False, next(model.parameters()).device
    for given in batches:
        batch = to_device(given, device)
        masks = _masks(batch)
        with _at_rest(model), _recorded(blocks) as seen, _passed(blocks if passed else ()):
            forward(model, batch)
        split = [[_split(one) for one in block] for block in seen]
        chained &= all(len(block) == 1 for block in seen)
        chained = chained and all(later[0][0] is block[0].y for block, later in zip(seen, split[1:], strict=False))
        passed = chained and all(block[0].alone for block in seen)
        alone += [Call(x, x, [others], masks) for x, others in split[0]]
        if chained:
            x = split[0][0][0]
            calls.append(Call(x, x, [block[0][1] for block in split], masks))
    return calls if chained else alone


@contextmanager
def _passed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Meanwhile these give back what they are given, and the last one ends the model's forward.

    For blocks in a chain that give hidden states alone, on which the other arguments of the next ones cannot depend.
    """

    def given(*args: Any, **named: Any) -> Tensor:
        return args[0] if args else named["hidden_states"]

    def enough(*_: Any) -> None:
        raise _EnoughError

    own = [block.__dict__.get("forward") for block in blocks]
    hook = blocks[-1].register_forward_hook(enough) if blocks else None
    try:
        for block in blocks:
            block.forward = given
        with suppress(_EnoughError):
            yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
        if hook is not None:
            hook.remove()


def _split(seen: Seen) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The hidden states, and the other arguments."""
    if seen.args:
        return seen.args[0], (seen.args[1:], seen.named)
    return seen.named["hidden_states"], ((), {k: v for k, v in seen.named.items() if k != "hidden_states"})


def _masks(batch: Any) -> dict[str, Any]:
    told = batch if isinstance(batch, Mapping) else {}
    return {key: value for key, value in told.items() if key == "labels" or key.endswith("attention_mask")}


def _tensor(y: Any) -> Tensor:
    if isinstance(y, Tensor):
        return y
    return next(iter(y.values())) if isinstance(y, Mapping) else y[0]


@contextmanager
def _recorded(modules: Sequence[nn.Module]) -> Iterator[list[list[Seen]]]:
    """What each module is called with and gives, meanwhile."""
    seen: list[list[Seen]] = [[] for _ in modules]
    hooks = [
        module.register_forward_hook(
            lambda _, args, named, y, there=there: there.append(Seen(args, named, _tensor(y), y is _tensor(y))),
            with_kwargs=True,
        )
        for module, there in zip(modules, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _at_rest(model: Any) -> Iterator[None]:
    """In eval mode, and without a cache of keys and values, which a second run of a block would make longer."""
    # A decoder has its own copy of an encoder-decoder's configuration.
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "use_cache", False)}
    with torch.no_grad(), at_rest(model):
        for config in configs.values():
            config.use_cache = False
        try:
            yield
        finally:
            for config in configs.values():
                config.use_cache = True
