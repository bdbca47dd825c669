"""What a person sees of a run: phases, a progress bar, the losses as they come. Silent unless given a console."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers.trainer_callback import TrainerCallback

from rankfold.train.schedule import Progress


class Display:
    """Shows nothing, as a library should."""

    def phase(self, what: str) -> AbstractContextManager[Any]:
        """Around a part of the work that takes a while."""
        return nullcontext()

    def bar(self, what: str, total: int) -> AbstractContextManager[Callable[[], Any]]:
        """Around a part of `total` equal pieces; gives what to call after each."""
        return nullcontext(lambda: None)

    def calibrating(self) -> AbstractContextManager[bool]:
        """Around a calibration; tells whether that shall show a bar of its own."""
        return nullcontext(False)

    def training(self) -> AbstractContextManager[Any]:
        """Around the training itself."""
        return nullcontext()

    def watchers(self, progress: Progress) -> Sequence[TrainerCallback]:
        """Trainer callbacks that follow the training."""
        return ()


class ConsoleDisplay(Display):
    """A spinner, then a progress bar; where the console is no terminal, a plain line for each phase and measurement."""

    def __init__(self, console: Console):
        self.console = console
        self.run = Bar(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}", style="cyan"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        if not self.console.is_terminal:
            self.console.print(what)
            yield
            return
        with self.console.status(what):
            yield

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[], Any]]:
        if not self.console.is_terminal:
            self.console.print(what)
            yield lambda: None
            return
        with Bar(console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    def calibrating(self) -> AbstractContextManager[bool]:
        if not self.console.is_terminal:
            self.console.print("calibrating")
        return nullcontext(self.console.is_terminal)

    def training(self) -> AbstractContextManager[Any]:
        return self.run

    def watchers(self, progress: Progress) -> Sequence[TrainerCallback]:
        return (_BarWatcher(self.console, self.run, progress),)


class _BarWatcher(TrainerCallback):
    def __init__(self, console: Console, bar: Bar, progress: Progress):
        self.console, self.bar, self.progress = console, bar, progress
        self.task: TaskID | None = None
        self.figures: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.task = self.bar.add_task("training", total=1.0, figures="")
            self._show(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        self.figures |= {name: logs[key] for key, name in (("loss", "loss"), ("eval_loss", "held out")) if key in logs}
        if self.task is not None and "eval_loss" in logs:
            accuracy = f", accuracy {logs['eval_accuracy']:.1%}" if "eval_accuracy" in logs else ""
            self.console.print(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}{accuracy}")
        self._show(state)

    def _show(self, state: Any) -> None:
        if self.task is not None:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in self.figures.items())
            self.bar.update(self.task, completed=self.progress.share, figures=f"step {state.global_step}  {shown}")
