"""What the process of one run does."""

import json
import math
import os
import shutil
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback, TrainerControl
from transformers.utils import logging

from rankfold.compare.job import JOB, LOG, OUTCOME, RUN, SEEN, Job, Outcome
from rankfold.compare.memory import Gauge
from rankfold.compare.result import Point, Trial
from rankfold.compare.search import is_hopeless
from rankfold.core.files import write_whole
from rankfold.errors import RankfoldError
from rankfold.train.display import Display
from rankfold.train.errors import TrainingInterruptedError, TrainingStoppedError
from rankfold.train.recipe import Recipe
from rankfold.train.run import train
from rankfold.train.schedule import Progress
from rankfold.train.watch import read_metrics


def work(folder: Path) -> None:
    """Do the job in the folder, and write its outcome there; what there is to say goes to its log."""
    with (folder / LOG).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    warnings.simplefilter("ignore")
    try:
        _train(folder)
    except TrainingStoppedError as error:
        write_whole(folder / OUTCOME, Outcome(failure=str(error)).model_dump_json())
    except (RankfoldError, TrainingInterruptedError) as error:
        print(error, flush=True)
    except Exception:
        traceback.print_exc()


def _train(folder: Path) -> None:
    """A run that was begun goes on from its checkpoint."""
    job = Job.model_validate_json((folder / JOB).read_bytes())
    torch.set_num_threads(job.threads)
    logging.disable_progress_bar()
    recipe = Recipe.model_validate(job.recipe)
    watch = Watch(job, folder / SEEN)
    report = train(recipe, folder / RUN, resume=(folder / RUN).exists(), display=watch)
    if not watch.steps and not watch.remember():  # it was killed just before what it had seen was written
        shutil.rmtree(folder / RUN)
        return _train(folder)
    curve = curve_of(folder / RUN)
    if not all(math.isfinite(point.loss) for point in curve):
        raise TrainingStoppedError("the held-out loss is not finite: the learning rate is too high for this")
    outcome = Outcome(peak_memory=watch.peak)
    if job.kind == "trial":
        trial = Trial(
            number=job.number,
            lr=recipe.optimizer.lr,
            state="pruned" if watch.pruned else "complete",
            loss=curve[-1].loss,
            curve=curve,
        )
        outcome = Outcome(peak_memory=watch.peak, trial=trial)
    elif job.kind == "run":
        from rankfold.compare.measure import measure

        outcome = Outcome(peak_memory=watch.peak, run=measure(job, folder / RUN, report, curve, watch))
    write_whole(folder / OUTCOME, outcome.model_dump_json(indent=1))
    clear(folder, job)


def clear(folder: Path, job: Job) -> None:
    """Drop what only a run that goes on needs, and of a trial or probe also what it trained."""
    for name in ("checkpoints",) if job.kind == "run" else ("checkpoints", "adapter", "model"):
        shutil.rmtree(folder / RUN / name, ignore_errors=True)


def curve_of(run: Path) -> tuple[Point, ...]:
    """The held-out measurements that a run has logged."""
    return tuple(
        Point(
            step=line["step"],
            seconds=line["seconds"],
            loss=line["held_out_loss"],
            accuracy=line.get("held_out_accuracy"),
        )
        for line in read_metrics(run / "metrics.jsonl")
        if "held_out_loss" in line
    )


class Watch(Display):
    """Follows a training: its memory from the calibration on, the time of its steps, and whether it is worth going on.

    Nothing is shown: a log of phases is all that a person sees of a process among many.
    """

    def __init__(self, job: Job, file: Path):
        self.job, self.file, self.gauge, self.peak = job, file, Gauge(), 0
        self.steps: list[float] = []
        self.pruned = False

    def remember(self) -> bool:
        """Take back what was seen of a training that ended in another process, if that came to write it."""
        if self.file.exists():
            self.peak, self.pruned, self.steps = json.loads(self.file.read_text(encoding="utf-8"))
        return self.file.exists()

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        print(what, flush=True)
        yield
        if what == "encoding the data":  # model and data are there, nothing of the method is
            self.gauge.start()

    @contextmanager
    def training(self) -> Iterator[None]:
        yield
        self.peak = self.gauge.peak()
        write_whole(self.file, json.dumps([self.peak, self.pruned, self.steps]))

    def watchers(self, progress: Progress) -> Sequence[TrainerCallback]:
        return [_Steps(self.steps), *([_Pruner(self, progress)] if self.job.kind == "trial" else [])]


class _Steps(TrainerCallback):
    def __init__(self, seconds: list[float]):
        self.seconds, self.began = seconds, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(perf_counter() - self.began)


class _Pruner(TrainerCallback):
    """Ends a trial that is hopeless by the earlier ones."""

    def __init__(self, watch: Watch, progress: Progress):
        self.watch, self.progress = watch, progress
        self.seen: list[Point] = []

    def on_evaluate(
        self, args: Any, state: Any, control: TrainerControl, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step and state.global_step < state.max_steps:
            loss = (metrics or {})["eval_loss"]
            self.seen.append(Point(step=state.global_step, seconds=self.progress.seconds, loss=loss))
            if is_hopeless(self.watch.job.earlier, self.seen):
                self.watch.pruned = control.should_training_stop = True
        return control
