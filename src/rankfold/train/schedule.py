"""Budgets and learning-rate schedules: how far a run has come, and the rate that belongs there."""

import math
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
import transformers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rankfold.errors import RankfoldError
from rankfold.train.recipe import Budget, Schedule


@dataclass
class Progress:
    """How much of a budget is used. `steps` is the number of optimiser steps after which it ends at the latest,
    or None where only time or tokens end it."""

    budget: Budget
    steps: int | None
    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0  # seconds of training at the last step, the same in all processes
    _before: float = 0.0  # seconds of training up to the last stop
    _started: float | None = None

    def start(self) -> None:
        """Start the clock."""
        self._started = monotonic()

    def stop(self) -> None:
        """Stop the clock."""
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """Wall-clock time in training so far, up to the last stop and since."""
        return self._before + (0.0 if self._started is None else monotonic() - self._started)

    @property
    def share(self) -> float:
        """The used share of whatever part of the budget is nearest its end, from 0 to 1."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(self.step / self.steps)
        if self.budget.tokens is not None:
            shares.append(self.tokens / self.budget.tokens)
        if self.budget.minutes is not None:
            shares.append(self.elapsed / (60 * self.budget.minutes))
        return min(1.0, max(shares))

    def state(self) -> dict[str, float]:
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}

    def resume(self, state: dict[str, float]) -> None:
        self.step, self.tokens = int(state["step"]), int(state["tokens"])
        self._before = self.elapsed = float(state["seconds"])


def total_steps(budget: Budget, steps_per_epoch: int) -> int | None:
    """Optimiser steps that `budget.steps` and `budget.epochs` allow; None where neither is given."""
    limits = [] if budget.steps is None else [budget.steps]
    if budget.epochs is not None:
        limits.append(max(1, math.ceil(budget.epochs * steps_per_epoch)))
    return min(limits, default=None)


def make_schedule(schedule: Schedule, optimizer: Optimizer, progress: Progress) -> LambdaLR:
    """The schedule of transformers called `schedule.name`, run over the budget.

    Where steps alone end the run the rate is a function of the step, as always. Where time or tokens may end it
    first, the schedule is walked by the used share of the budget, so that a decay still reaches its end.
    """
    steps = progress.steps if progress.budget.minutes is None and progress.budget.tokens is None else None
    total = steps or 10_000
    if steps is None and schedule.warmup >= 1:
        raise RankfoldError("schedule.warmup: steps need a budget in steps or epochs alone; give a share below 1")
    warmup = round(schedule.warmup * total if schedule.warmup < 1 else schedule.warmup)
    try:
        made = transformers.get_scheduler(schedule.name, optimizer, warmup, total)
    except (ValueError, TypeError):  # no such name, or one that needs further arguments
        made = None
    if not isinstance(made, LambdaLR):  # reduce_lr_on_plateau and the like follow a metric, not the budget
        raise RankfoldError(
            f"schedule.name: there is no {schedule.name!r} to run over a budget; take linear, cosine, "
            "cosine_with_restarts, polynomial, constant, constant_with_warmup or inverse_sqrt"
        )
    if steps is not None:
        return made
    shapes: list[Any] = made.lr_lambdas
    return LambdaLR(optimizer, [lambda _, shape=shape: shape(int(progress.share * total)) for shape in shapes])


def check_schedule(schedule: Schedule, budget: Budget) -> None:
    """Raise the RankfoldError that `make_schedule` would, before there is anything to train."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make_schedule(schedule, optimizer, Progress(budget, total_steps(budget, steps_per_epoch=100)))
