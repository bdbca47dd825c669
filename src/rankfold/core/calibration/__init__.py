"""Calibration: statistics of a model's inputs and gradients, streamed from a few batches and shared by all who ask.

An init, a quantiser or a pruner states what it reads as values (`InputCovariance()`, `InputPCA(16)`); `calibrate` runs
the batches through the model once, collects all of it, and `Calibration.get(statistic, site)` hands it out. Sites that
see the very same input (q, k, v; gate, up) share one accumulator. A new statistic is one subclass of `Statistic`.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core import targets as target_module
from rankfold.core.calibration.accumulators import Accumulator
from rankfold.core.calibration.answers import Calibration
from rankfold.core.calibration.passes import Pass, accumulator_bytes
from rankfold.core.calibration.statistics import (
    PCA,
    STATISTICS,
    InputCovariance,
    InputMagnitude,
    InputPCA,
    InputSecondMoment,
    MeanGradient,
    SampleCovariance,
    SquaredGradient,
    Statistic,
)
from rankfold.core.calibration.surroundings import Bar, at_rest
from rankfold.core.targets import Target, Targets
from rankfold.errors import RankfoldError, UnsupportedError

__all__ = [
    "PCA",
    "Accumulator",
    "Calibration",
    "InputCovariance",
    "InputMagnitude",
    "InputPCA",
    "InputSecondMoment",
    "MeanGradient",
    "SampleCovariance",
    "SquaredGradient",
    "Statistic",
    "calibrate",
]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    statistics: Sequence[Statistic[Any]],
    targets: Targets = "all-linear",
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    memory_limit: int | None = None,
    max_batches: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Run the batches through the plain base model in eval mode and collect `statistics` at every target.

    The model is left as it was found: modes, `requires_grad`, gradients, hooks, active adapter.

    Args:
        model: any model; adapters attached to it are switched off meanwhile (merged ones are part of the base).
        batches: mappings (`model(**batch)`), tuples (`model(*batch)`) or tensors. Tokens with `attention_mask` 0 or
            with label -100 do not count in statistics of inputs.
        statistics: such as `[InputPCA(16), MeanGradient()]`.
        targets: what `attach` takes, or a list of full site names.
        loss: `loss(model, batch) -> scalar`, for statistics of gradients; default `model(**batch).loss`. Where given,
            it is how a batch is run.
        memory_limit: bytes of accumulators held at once. What does not fit is collected in further passes over the
            batches, and the results go to temporary files; a one-shot iterator is then kept in a list.
        max_batches: read no more than these.
        progress: show a bar when it takes over a second.

    Raises:
        RankfoldError: no batches, a statistic that a target cannot have, an accumulator over the limit, non-finite
            inputs or gradients, a loss that is missing.
    """
    found = _find(model, targets)
    wanted = _checked(found, statistics, memory_limit)
    if memory_limit is not None and iter(batches) is batches:
        batches = list(islice(batches, max_batches))
    spill: tempfile.TemporaryDirectory[str] | None = None
    where: dict[str, dict[Statistic[Any], tuple[int, str]]] = {name: {} for name in wanted}
    parts: list[dict[str, Tensor] | Path] = []
    with torch.inference_mode(False), at_rest(model), Bar(batches, max_batches, progress) as bar:
        while wanted:
            bar.expect(_passes(found, wanted, memory_limit))
            one = Pass(found, wanted, memory_limit)
            one.run(model, islice(batches, max_batches), loss, bar)
            tensors = one.results(where, len(parts))
            wanted = one.deferred
            if wanted and spill is None:
                spill = tempfile.TemporaryDirectory(prefix="rankfold-calibration-")
            parts.append(tensors if spill is None else _spill(tensors, Path(spill.name) / f"{len(parts)}.safetensors"))
    return Calibration({name: there for name, there in where.items() if there}, parts, spill)


def _find(model: nn.Module, targets: Targets) -> dict[str, Target]:
    if not isinstance(targets, str) and not callable(targets):
        names = set(targets)
        exact = {t.site.name: t for t in target_module.find(model, lambda name, module: True)}
        if names and names <= exact.keys():  # full names mean these sites and no others that end alike
            return {name: target for name, target in exact.items() if name in names}
    return {target.site.name: target for target in target_module.find(model, targets)}


def _checked(
    found: dict[str, Target], statistics: Sequence[Statistic[Any]], memory_limit: int | None
) -> dict[str, list[Statistic[Any]]]:
    """What each site shall have, once all of it is known to be possible."""
    if not statistics or not all(isinstance(statistic, Statistic) for statistic in statistics):
        raise RankfoldError(f"statistics={statistics!r}: give at least one of {', '.join(STATISTICS)}")
    distinct = list(dict.fromkeys(statistics))
    for name, target in found.items():
        for statistic in distinct:
            if refusal := statistic.refuses(target.site):
                raise UnsupportedError(f"{statistic!r} cannot be collected at {name} ({target.site.kind}): {refusal}")
            size = accumulator_bytes(statistic, target.site)
            if memory_limit is not None and size > memory_limit:
                raise RankfoldError(f"{statistic!r} at {name} takes {size:,} bytes, over memory_limit={memory_limit:,}")
    return {name: list(distinct) for name in found}


def _passes(found: dict[str, Target], wanted: dict[str, list[Statistic[Any]]], limit: int | None) -> int:
    """How many more passes there will be, or fewer where sites share their inputs."""
    if limit is None:
        return 1
    size = sum(accumulator_bytes(statistic, found[name].site) for name, there in wanted.items() for statistic in there)
    return -(-size // limit)


def _spill(tensors: dict[str, Tensor], path: Path) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, path)
    return path
