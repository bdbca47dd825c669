"""What a comparison found, as `comparison.json` holds it. Light: no torch, so that a report can be made anywhere.

Times are in seconds, sizes in bytes; None is what could not be measured, and `RunResult.missing` says why.
"""

import statistics
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Point(Part):
    """A measurement on held-out rows after `step` optimiser steps; `seconds` of training had gone by then."""

    step: int
    seconds: float
    loss: float
    accuracy: float | None = None


class Layer(Part):
    """The change ΔW of one weight W: its `rank`, `norm` ‖ΔW‖_F, `relative_norm` ‖ΔW‖_F / ‖W‖_F, and how many directions
    it really takes (`stable_rank` Σσ² / σ₁², `effective_rank` exp of the entropy of σ)."""

    site: str
    rank: int
    norm: float
    relative_norm: float
    stable_rank: float
    effective_rank: float


class Forgetting(Part):
    """The rise of the loss on general text, in nats a token, with the interval that holds it in 95 of 100 draws of the
    text's blocks; `base` is the loss before the training."""

    loss: float
    low: float
    high: float
    base: float


class Inference(Part):
    """The median seconds of one forward pass over the same batch: plain base, with the adapter beside it, with the
    adapter merged. None where it cannot be merged."""

    base: float
    unmerged: float
    merged: float | None

    @property
    def unmerged_ratio(self) -> float:
        return self.unmerged / self.base

    @property
    def merged_ratio(self) -> float | None:
        return None if self.merged is None else self.merged / self.base


class RunResult(Part):
    """One finished run. `before` and `after` are the held-out scores of the base and of the trained model (loss, count,
    and accuracy or perplexity); `quality` is the one of them that is compared. `curve` has the held-out measurements
    from step 0 on, `training` the loss of single steps, as (step, loss)."""

    seed: int
    lr: float
    quality: float
    before: dict[str, float]
    after: dict[str, float]
    curve: tuple[Point, ...]
    training: tuple[tuple[int, float], ...]
    steps: int
    seconds: float
    step_seconds: float | None  # median
    parameters: int
    file_bytes: int
    peak_memory: int
    micro_batch: int
    forgetting: Forgetting | None
    inference: Inference | None
    layers: tuple[Layer, ...]
    missing: dict[str, str]
    finished: str


class Trial(Part):
    """One learning rate that the search tried; `curve` and the final `loss` are on the validation rows."""

    number: int
    lr: float
    state: Literal["complete", "pruned", "failed"]
    loss: float | None
    curve: tuple[Point, ...]
    reason: str | None = None


class Failure(Part):
    """A run that did not finish; `reason` are the last lines it said."""

    seed: int | None  # None: before any judged run, in the search or the fitting of the budget
    reason: str


class Size(Part):
    """The hyperparameter that was solved for a budget of parameters: `field` = `value` gives `parameters`, at most
    `budget`. Without a field the method has one size only."""

    field: str | None
    value: float | None
    parameters: int
    budget: int


class Contender(Part):
    """`axis` is the folder of its technique, `changes` what it puts in the place of the base recipe's keys, `lr` the
    learning rate that its runs had. `failures` are runs that did not finish; with no run at all it has failed."""

    name: str
    axis: str
    changes: dict[str, Any]
    size: Size | None
    lr: float | None
    trials: tuple[Trial, ...]
    runs: tuple[RunResult, ...]
    failures: tuple[Failure, ...]

    @property
    def failed(self) -> bool:
        return not self.runs

    def values(self, figure: "Figure") -> list[float]:
        """The figure of each run that has it."""
        return [value for run in self.runs if (value := figure.of(run)) is not None]

    def summary(self, figure: "Figure") -> tuple[float, float] | None:
        """Mean and standard deviation over the seeds (0 for a single one), or None where no run has it."""
        values = self.values(figure)
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


class Comparison(Part):
    """`recipe` is the base recipe with all defaults, `search` how learning rates were chosen, `definitions` say what
    each figure means, `threads` are those of each run's process, of which `jobs` ran at once."""

    title: str
    command: str
    model: str
    data: str
    task: str
    metric: str
    higher_is_better: bool
    recipe: dict[str, Any]
    budget: dict[str, float]
    seeds: tuple[int, ...]
    search: dict[str, Any]
    rows: dict[str, int]  # train, validation, test
    threads: int
    jobs: int
    device: str
    versions: dict[str, str]
    started: str
    finished: str
    contenders: tuple[Contender, ...]
    definitions: dict[str, str]

    def ranked(self) -> list[Contender]:
        """The contenders, best mean quality first, failed ones last."""
        quality = FIGURES["quality"]

        def place(contender: Contender) -> tuple[bool, float]:
            found = contender.summary(quality)
            return (True, 0.0) if found is None else (False, -found[0] if self.higher_is_better else found[0])

        return sorted(self.contenders, key=place)


class Figure(NamedTuple):
    """One column: what it is called, how a run has it, how a person reads it. Less is better, but for the quality, of
    which `Comparison.higher_is_better` says."""

    title: str
    of: Callable[[RunResult], float | None]
    show: Callable[[float], str]
    definition: str


def show_bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def show_seconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def show_count(count: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:.4g}"


FIGURES: dict[str, Figure] = {
    "quality": Figure(
        "quality",
        lambda run: run.quality,
        lambda value: f"{value:.4f}",
        "accuracy for classes, else the mean loss in nats a token, on rows that no run and no search has seen",
    ),
    "parameters": Figure(
        "parameters", lambda run: run.parameters, show_count, "numbers that are trained, a new head's included"
    ),
    "file": Figure("file", lambda run: run.file_bytes, show_bytes, "all files of the saved adapter (or model)"),
    "memory": Figure(
        "memory",
        lambda run: run.peak_memory,
        show_bytes,
        "the most memory of the run's own process from the start of its calibration to the end of its training, less "
        "what it held with model and data loaded: resident memory, or allocated memory of an accelerator where it has "
        "one",
    ),
    "step": Figure(
        "step",
        lambda run: run.step_seconds,
        show_seconds,
        "median time of an optimiser step with all its forward and backward passes, without measurements",
    ),
    "forgetting": Figure(
        "forgetting",
        lambda run: None if run.forgetting is None else run.forgetting.loss,
        lambda value: f"{value:+.4f}",
        "rise of the loss on general text by the training, in nats a token",
    ),
    "unmerged": Figure(
        "unmerged cost",
        lambda run: None if run.inference is None else run.inference.unmerged_ratio,
        lambda value: f"{value:.2f}×",
        "time of a forward pass with the adapter beside the base, over the plain base's",
    ),
    "merged": Figure(
        "merged cost",
        lambda run: None if run.inference is None else run.inference.merged_ratio,
        lambda value: f"{value:.2f}×",
        "time of a forward pass with the adapter merged into the base, over the plain base's",
    ),
}
