"""Block scheduling: of the layers of a model, or of an adapter, some are awake and trained, the others asleep."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import nn

from rankfold.core import Callback
from rankfold.core.targets import layer_of
from rankfold.errors import RankfoldError


def blocks_of(named: Iterable[tuple[str, nn.Parameter]]) -> tuple[dict[str, list[nn.Parameter]], list[nn.Parameter]]:
    """Parameters by the layer they are in, `model.layers.0`, in order; and those outside of any layer.

    A layer is a path's beginning up to the first number in it. An adapter's parameters go to the layers they sit on.
    """
    blocks: dict[str, list[nn.Parameter]] = {}
    outside = []
    for name, parameter in named:
        layer = layer_of(name)
        (outside if layer is None else blocks.setdefault(layer, [])).append(parameter)
    return blocks, outside


class BlockSchedule(Callback):
    """Wakes other layers every `every` steps; a subclass says which in `chosen`.

    A layer asleep needs no gradient, and has none: the optimiser does not touch it. The optimiser is built first, over
    all parameters. `on_attach(None, model)` schedules the layers of a model that is trained in full.
    """

    without_adapter: ClassVar[bool] = True
    restart: ClassVar[bool] = False  # what is woken starts without moments, also where it was awake before

    every: Annotated[int, Field(ge=1, description="steps K between choices")] = 20
    on_switch: Annotated[Literal["drop", "keep"], Field(description="the optimiser's state of layers asleep")] = "drop"
    seed: Annotated[int, Field(ge=0)] = 0
    _blocks: dict[str, list[nn.Parameter]] = PrivateAttr(default_factory=dict)
    _outside: list[nn.Parameter] = PrivateAttr(default_factory=list)
    _optimizer: Any = PrivateAttr(None)
    _next: int = PrivateAttr(0)

    def chosen(self, interval: int, count: int) -> Sequence[int]:
        """Which of `count` layers are awake in the interval, the first being 0: it depends on nothing else."""
        raise NotImplementedError

    def trains_outside(self) -> bool:
        """Whether what is in no layer (embeddings, the head, the last norm) is trained all the time."""
        return True

    @property
    def awake(self) -> list[str]:
        """The layers that the next step trains."""
        names = list(self._blocks)
        return [names[i] for i in sorted(self.chosen(self._next // self.every, len(names)))]

    def on_attach(self, adapter: Any, model: nn.Module) -> None:
        named = (model if adapter is None else adapter).named_parameters()
        self._blocks, self._outside = blocks_of((n, p) for n, p in named if p.requires_grad)
        if not self._blocks:
            raise RankfoldError(f"{self.slug} wakes layers in turn, and no trained parameter is in a numbered layer")
        if not self.awake and not (self._outside and self.trains_outside()):
            raise RankfoldError(f"{self.slug}: no layer is awake, and nothing outside of the layers is trained")

    def on_start(self, optimizer: torch.optim.Optimizer, steps: int | None) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise RankfoldError(f"{self.slug} changes which parameters need gradients, which DDP and FSDP forbid")
        self._optimizer = optimizer
        self._wake()

    def after_step(self, step: int) -> None:
        self._next = step + 1
        if self._next % self.every == 0:
            if self.restart and self.on_switch == "drop":
                self._forget(p for block in self._blocks.values() for p in block)
            self._wake()

    def _wake(self) -> None:
        awake = set(self.awake)
        asleep = [p for name, block in self._blocks.items() if name not in awake for p in block]
        asleep += [] if self.trains_outside() else self._outside
        for name in awake:
            for p in self._blocks[name]:
                p.requires_grad_(True)
        for p in asleep:
            p.requires_grad_(False)
            p.grad = None  # or the optimiser would go on stepping it
        if self.on_switch == "drop":
            self._forget(asleep)

    def _forget(self, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            self._optimizer.state.pop(p, None)

    def on_save(self) -> dict[str, Any]:
        return {"next": self._next}

    def on_load(self, state: Mapping[str, Any]) -> None:
        self._next = int(state["next"])

    def rng(self, draw: int) -> torch.Generator:
        """A generator for one draw, the same whenever it is asked for."""
        digest = hashlib.sha256(f"{self.seed}/{draw}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
