"""Around a calibration: the model put at rest and given back as it was, and the progress bar."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from rankfold.core.quantized import repack_again, without_repacking
from rankfold.core.routing import find_state


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The plain base, in eval mode, with nothing that requires a gradient; afterwards all as it was."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    repacking = without_repacking(model)
    state = find_state(model)
    with contextlib.nullcontext() if state is None else state.using(None):
        try:
            model.eval().requires_grad_(False)
            yield
        finally:
            repack_again(repacking)
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


class Bar:
    """A progress bar that appears after a second. Rich is imported only then."""

    def __init__(self, batches: Iterable[Any], max_batches: int | None, wanted: bool):
        length = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
        self.length = min((n for n in (length, max_batches) if n is not None), default=None)
        self.total: int | None = None
        self.wanted, self.begin, self.done = wanted, time.monotonic(), 0
        self.bar: Any = None

    def __enter__(self) -> "Bar":
        return self

    def expect(self, passes: int) -> None:
        """So many passes over the batches are to come."""
        self.total = None if self.length is None else self.done + passes * self.length

    def step(self) -> None:
        self.done += 1
        if not self.wanted or time.monotonic() - self.begin < 1:
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.bar.start()
            self.bar.add_task("Calibrating", total=self.total)
        self.bar.update(0, completed=self.done, total=self.total)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
