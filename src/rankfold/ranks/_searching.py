"""What plans that search for layers share: weights of whole changes, learned on validation batches; a fresh start."""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from rankfold.core.sparse import forget
from rankfold.core.targets import layer_of
from rankfold.errors import RankfoldError
from rankfold.ranks._plan import RankPlan, part


class Searching(RankPlan):
    """Weighs the change of each site by a learned number, for a part of the run; then a choice, and all starts afresh.

    In the search the optimiser steps the adapter as always, with the weights held; behind each such step an Adam of the
    callback's own steps the numbers h with their gradient on validation batches, the adapter held (first order: what a
    step on h would do to the next ones of the adapter is left out). Then `settle` says what stays, and everything the
    adapter trains goes back to where it started, with an optimiser that has forgotten it. The learning rate goes on as
    planned for the run.
    """

    any_delta: ClassVar[bool] = True
    reads: ClassVar[Literal["training", "validation"] | None] = "validation"

    search: Annotated[float, Field(gt=0, description="steps of the search, or below 1 a share of the run")] = 0.25
    lr: Annotated[float, Field(gt=0, description="learning rate of the weights' own Adam")] = 0.01
    batches: Annotated[int, Field(ge=1, description="validation batches for a step of the weights")] = 8

    _model: Any = PrivateAttr(None)
    _batch_at: Callable[[int], Mapping[str, Any]] | None = PrivateAttr(None)
    _h: nn.Parameter = PrivateAttr(default_factory=lambda: nn.Parameter(torch.zeros(0)))
    _adam: Any = PrivateAttr(None)
    _now: Tensor = PrivateAttr(default_factory=lambda: torch.zeros(0))  # the weights, one for each h
    _start: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _until: int = PrivateAttr(0)
    _settled: bool = PrivateAttr(False)

    def weights(self, h: Tensor) -> Tensor:
        """The factor of a change, for each h."""
        raise NotImplementedError

    def places(self) -> dict[str, int]:
        """Which of the h is a site's, by site."""
        raise NotImplementedError

    def settle(self) -> None:
        """Keep what the h choose."""
        raise NotImplementedError

    def layers(self) -> dict[str, list[str]]:
        """The sites of each layer. A site outside of any numbered layer is one of its own."""
        found: dict[str, list[str]] = {}
        for site in self._deltas:
            found.setdefault(layer_of(f"{site}.") or site, []).append(site)
        return found

    def on_attach(self, adapter: Any, model: nn.Module) -> None:
        super().on_attach(adapter, model)
        self._model = model
        self._h = nn.Parameter(torch.zeros(1 + max(self.places().values())))
        self._adam = torch.optim.Adam([self._h], lr=self.lr)
        self._start = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}

    def on_data(self, batch_at: Callable[[int], Mapping[str, Any]]) -> None:
        self._batch_at = batch_at

    def on_start(self, optimizer: torch.optim.Optimizer, steps: int | None) -> None:
        T = self.planned(steps)
        self._until = max(1, part(self.search, T))
        if self._until >= T:
            raise RankfoldError(
                f"{self.slug}: a search of {self._until} steps leaves none of {T} to train what it finds"
            )
        if self._batch_at is None:
            raise RankfoldError(
                f"{self.slug} learns on validation batches, and got none: call on_data(batch_at) before on_start"
            )
        super().on_start(optimizer, steps)
        if not self._settled:
            self._now = self.weights(self._h.detach())
            for site, place in self.places().items():
                self._deltas[site].strength = functools.partial(self._weight, place)

    def _weight(self, place: int) -> Tensor:
        return self._now[place]

    def after_step(self, step: int) -> None:
        if not self._settled:
            self._learn(step * self.batches)
            if step + 1 >= self._until:
                self._restart()
                self.settle()
        super().after_step(step)

    def _learn(self, first: int) -> None:
        """A step of the h, on the validation batches from the first on."""
        assert self._batch_at is not None
        gradient = torch.zeros_like(self._h)
        with _held(self._model, self._adapter), torch.enable_grad():
            for i in range(first, first + self.batches):
                self._now = self.weights(self._h)
                (g,) = torch.autograd.grad(self._model(**self._batch_at(i)).loss, self._h)
                gradient += g / self.batches
        self._h.grad = gradient
        self._adam.step()
        self._now = self.weights(self._h.detach())

    @torch.no_grad()
    def _restart(self) -> None:
        self._settled = True
        for delta in self._deltas.values():
            delta.strength = None
        for name, parameter in self._adapter.named_parameters():
            parameter.copy_(self._start[name])
        self._start = {}
        forget(self._optimizer, list(self._adapter.parameters()))

    def on_end(self) -> None:
        if not self._settled:
            warnings.warn(f"{self.slug}: the training ended in the search; all layers stay", stacklevel=2)
            for delta in self._deltas.values():
                delta.strength = None
        super().on_end()

    def on_save(self) -> dict[str, Any]:
        own = {"h": self._h.detach().clone(), "settled": self._settled}
        if not self._settled:
            own |= {"adam": copy.deepcopy(self._adam.state_dict()), "start": dict(self._start)}
        return {**super().on_save(), **own}

    def on_load(self, state: Mapping[str, Any]) -> None:
        super().on_load(state)
        self._settled = state["settled"]
        self._h.data = state["h"].clone()
        if not self._settled:
            self._adam.load_state_dict(copy.deepcopy(state["adam"]))
        devices = {name: parameter.device for name, parameter in self._adapter.named_parameters()}
        self._start = {name: tensor.to(devices[name]) for name, tensor in state.get("start", {}).items()}


@contextlib.contextmanager
def _held(model: nn.Module, adapter: Any) -> Iterator[None]:
    """The model without dropout, and without gradients of the adapter's parameters."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)
