"""An adapter: a named set of deltas over a model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.delta import Delta, Site
from rankfold.core.layers import FullCopy
from rankfold.core.method import Init, Method
from rankfold.core.targets import Targets
from rankfold.core.tensorfile import all_finite
from rankfold.errors import RankfoldError


class Adapter:
    """A named set of deltas over a model, plus the modules it trains in full.

    `deltas` maps site names to deltas, `modules` paths to full copies; `methods` gives each site's own
    hyperparameters where they differ from `method`. `nested` is the lowest rank that its products can be cut to, for an
    adapter that was trained to be (DyLoRA). `forced` says what spoke against making it, where somebody did anyhow.
    """

    def __init__(
        self, name: str, model: nn.Module, method: Method, init: Init | None, seed: int, targets: Targets | None
    ):
        self.name, self.model, self.method, self.init, self.seed = name, model, method, init, seed
        self.targets = targets if isinstance(targets, str) else list(targets) if isinstance(targets, Sequence) else None
        self.deltas: dict[str, Delta] = {}
        self.methods: dict[str, Method] = {}
        self.modules: dict[str, FullCopy] = {}
        self.shared: nn.Module | None = None
        self.nested: int | None = None
        self.forced: str | None = None
        self.ported: list[Any] = []  # the `document.Base` of each model that it was on before, if it was ported

    @property
    def sites(self) -> list[Site]:
        return [delta.site for delta in self.deltas.values()]

    def named_tensors(self, buffers: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the adapter, once: `deltas.<site>.A`, `shared.<name>`, `modules.<path>.weight`."""
        parts: list[tuple[str, nn.Module]] = [(f"deltas.{name}", delta) for name, delta in self.deltas.items()]
        if self.shared is not None:
            parts.append(("shared", self.shared))
        parts += [(f"modules.{path}", copied.module) for path, copied in self.modules.items()]
        for prefix, module in parts:
            inside: set[Any] = set() if module is self.shared else {self.shared}
            for path, child in module.named_modules(memo=inside):
                at = f"{prefix}.{path}." if path else f"{prefix}."
                for name, tensor in child._parameters.items():
                    if tensor is not None:
                        yield at + name, tensor
                for name, tensor in child._buffers.items() if buffers else ():
                    if tensor is not None and name not in child._non_persistent_buffers_set:
                        yield at + name, tensor

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.named_tensors(buffers=False)  # type: ignore[misc]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters the adapter trains, each once; hand them to an optimiser."""
        yield from dict.fromkeys(parameter for _, parameter in self.named_parameters())

    def num_parameters(self) -> int:
        """How many numbers the adapter trains."""
        return sum(parameter.numel() for parameter in self.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the adapter by name, detached: trained ones and the frozen ones that no seed gives back.

        Tensors that FSDP sharded are put together, which every process has to take part in.
        """
        return {name: _whole(tensor.detach()) for name, tensor in self.named_tensors()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in tensors of the same names and shapes; nothing is changed if any does not fit."""
        what, before = (
            f"adapter {self.name!r}",
            [(d, dict(d._buffers), dict(d._modules), _data(d)) for d in self.deltas.values()],
        )
        try:
            self.make_room(state)
            own = dict(self.named_tensors())
            check_tensors(own, state, what)
            self.check_fit(state, what)
        except RankfoldError:
            for delta, buffers, modules, data in before:
                delta._buffers.clear()
                delta._buffers.update(buffers)
                delta._modules.clear()
                delta._modules.update(modules)
                for name, tensor in data.items():
                    delta._parameters[name].data = tensor  # type: ignore[union-attr]
            raise
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def make_room(self, described: Mapping[str, Any]) -> None:
        """Let deltas take the sizes of these tensors, or descriptions of tensors, where hyperparameters fix none."""
        for site, own in self._by_delta(described):
            self.deltas[site].make_room({name: tuple(tensor.shape) for name, tensor in own.items()})

    def check_fit(self, tensors: Mapping[str, Tensor], what: str, error: type[RankfoldError] = RankfoldError) -> None:
        """Refuse tensors of the right shapes whose numbers a delta cannot use."""
        for site, own in self._by_delta(tensors):
            if trouble := self.deltas[site].wrong(own):
                raise error(f"{what}: {site}: {trouble}: it is damaged or hostile")

    def _by_delta(self, tensors: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each delta's own of the tensors, by their names in it."""
        planned = [name for name in tensors if ".plan." in name]
        for site, delta in self.deltas.items():
            names = {f"deltas.{site}.{name}": name for name in (*delta._parameters, *delta._buffers, "B0", "A0")}
            at = f"deltas.{site}."
            names |= {name: name[len(at) :] for name in planned if name.startswith(f"{at}plan.")}
            yield site, {name: tensors[full] for full, name in names.items() if full in tensors}

    def train(self, mode: bool = True) -> "Adapter":
        """Switch the deltas' dropout (and the copies' own modes) on or off; the base model keeps its mode."""
        for part in (*self.deltas.values(), *self.modules.values()):
            part.train(mode)
        return self

    def requires_grad_(self, flag: bool = True) -> "Adapter":
        for parameter in self.parameters():
            parameter.requires_grad_(flag)
        return self

    def __repr__(self) -> str:
        extra = f" and {', '.join(self.modules)} in full" if self.modules else ""
        size = f"{len(self.deltas)} sites{extra}, {self.num_parameters():,} parameters"
        return f"Adapter({self.name!r}, {self.method!r}, {size})"


def _data(delta: Delta) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in delta._parameters.items() if parameter is not None}


def _whole(tensor: Any) -> Tensor:
    """The tensor, put together again where FSDP sharded it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_tensors(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str, error: type[RankfoldError] = RankfoldError
) -> None:
    """Refuse tensors whose names or shapes are not the expected ones, or that hold NaN or infinity."""
    check_layout(own, given, what, error)
    check_finite(given, what, error)


def check_layout(
    own: Mapping[str, Tensor], given: Mapping[str, Any], what: str, error: type[RankfoldError] = RankfoldError
) -> None:
    """Refuse tensors, or descriptions of tensors, whose names, shapes or sorts of number are not the expected ones."""
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"holds unknown {_some(extra)}"] * bool(extra)
        raise error(f"{what}: the state {' and '.join(parts)}")
    for name, tensor in own.items():
        if given[name].shape != tensor.shape:
            raise error(f"{what}: {name} has shape {tuple(given[name].shape)}, expected {tuple(tensor.shape)}")
        exact = not (tensor.is_floating_point() and given[name].is_floating_point())
        if exact and given[name].dtype != tensor.dtype:
            raise error(f"{what}: {name} has dtype {given[name].dtype}, expected {tensor.dtype}")


def check_finite(given: Mapping[str, Tensor], what: str, error: type[RankfoldError] = RankfoldError) -> None:
    """Refuse tensors that hold NaN or infinity."""
    for name, tensor in given.items():
        if not all_finite(tensor):
            raise error(f"{what}: {name} holds NaN or infinity")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
