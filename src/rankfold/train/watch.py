"""What a run does beside the steps: write metrics, end with the budget, and stop in good order on Ctrl-C."""

import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from rankfold.core.files import write_whole
from rankfold.train.schedule import Progress

# Trainer's names for what it logs, and ours.
_NAMES = {"learning_rate": "lr", "num_input_tokens_seen": "tokens"}


class Metrics(TrainerCallback):
    """Appends what is logged to a file of JSON lines: `step` and `seconds`, and `loss`, `lr`, `grad_norm` of training
    or `held_out_loss` and the like of a measurement."""

    def __init__(self, path: Path, progress: Progress):
        self.path, self.progress = path, progress

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        # Names that begin with train_ are Trainer's averages over the whole run.
        logs = {key: value for key, value in (logs or {}).items() if not key.startswith("train_")}
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & logs.keys():
            return
        values = {_NAMES.get(key, key.replace("eval_", "held_out_")): value for key, value in logs.items()}
        line = json.dumps({"step": state.global_step, "seconds": round(self.progress.seconds, 3), **values})
        # One write to a file opened for appending: a kill leaves whole lines, but for the very last one at worst.
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, f"{line}\n".encode())
        finally:
            os.close(handle)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def rewind_metrics(path: Path, step: int) -> None:
    """Forget what was logged after `step`, since a resumed run logs those steps again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_whole(path, "".join(f"{json.dumps(line)}\n" for line in kept))


class BudgetWatch(TrainerCallback):
    """Tells the progress how far training is, and ends it (measured and saved) when the budget is used up."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.step = state.global_step + 1
        self.progress.tokens = int(state.num_input_tokens_seen)
        # The learning rate and the end of the run may depend on the clock, and no two processes have the same.
        self.progress.elapsed = _largest(self.progress.seconds, args)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self.progress.share >= 1:
            control.should_training_stop = control.should_evaluate = control.should_save = True
        return control


class Interrupt(TrainerCallback):
    """Turns Ctrl-C (or SIGTERM) into a checkpoint after the step and an orderly stop; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator["Interrupt"]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: Any) -> None:
            self.signal = number
            for again, handler in before.items():
                signal.signal(again, handler)

        try:
            for number in before:
                signal.signal(number, stop)
        except ValueError:  # signals belong to the main thread; elsewhere the caller has to stop the run
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        self.signal = int(_largest(self.signal or 0, args)) or None
        if self.signal is not None:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        return control


def _largest(value: float, args: Any) -> float:
    """The largest of all processes' values, so that they act alike: one that stops alone leaves the others waiting."""
    if args.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=args.device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return tensor.item()


def default_interval(steps: int | None) -> int:
    """Steps between measurements or checkpoints where the recipe gives none: a tenth of the run."""
    return 50 if steps is None else max(1, math.ceil(steps / 10))
