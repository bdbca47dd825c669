"""The search of a contender's learning rate: the same number of trials for each, sampled and pruned by Optuna.

A study is made anew, in memory, from the trials that have finished: nothing but their results is kept, so a comparison
goes on after a kill with the rates that it would have tried.
"""

import math
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from rankfold.compare.plan import Search
from rankfold.compare.result import Point, Trial

_WHOLE = 2  # trials that are never pruned: the median of fewer says little
_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


def study_of(earlier: Sequence[Trial], low: float, high: float, seed: int = 0) -> Any:
    """The study after the `earlier` trials of rates from `low` to `high`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed + len(earlier), n_startup_trials=_WHOLE + 1),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_WHOLE),
    )
    span = optuna.distributions.FloatDistribution(low, high, log=True)
    for trial in earlier:
        study.add_trial(
            optuna.trial.create_trial(
                state=_STATES[trial.state],
                value=trial.loss,
                params={"lr": trial.lr},
                distributions={"lr": span},
                intermediate_values={point.step: point.loss for point in trial.curve if point.step},
            )
        )
    return study


def next_rate(earlier: Sequence[Trial], lr: float, search: Search) -> float:
    """The rate of the next trial: `lr` itself, then log-uniform around it, later where the best ones were."""
    if not earlier:
        return lr
    low, high = lr / search.spread, lr * search.spread
    study = study_of(earlier, low, high, search.seed)
    return study.ask().suggest_float("lr", low, high, log=True)


def is_hopeless(earlier: Sequence[Trial], curve: Sequence[Point]) -> bool:
    """Whether a trial with these measurements is pruned: its best one is worse than the median, at the same step, of
    the earlier trials' best ones by then."""
    trial = study_of(earlier, 1e-12, 1e12).ask()
    for point in curve:
        trial.report(point.loss, point.step)
    return bool(trial.should_prune())


def best(trials: Sequence[Trial]) -> Trial | None:
    """The one whose loss ended lowest, of those that were not pruned."""
    ended = [t for t in trials if t.state == "complete" and t.loss is not None and math.isfinite(t.loss)]
    return min(ended, key=lambda trial: trial.loss or 0.0, default=None)
