"""Runs a claim: every side with every seed, in turn; keeps each finished run; judges; writes the result.

A script under `claims/` calls `run` once. A run that was finished before, with the same settings, is not repeated.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankfold
from claims.tasks import TASKS, Change, Loaded, load, same
from rankfold.core.files import write_whole
from rankfold.optim.mezo import ZerothOrder
from rankfold.train.places import cache_dir
from rankfold.train.trainer import parameter_groups

RESULTS = Path(__file__).parent / "results"
Components = Sequence[Mapping[str, Any]]
TUNING = 100  # the seed on which a side's learning rate is chosen


@dataclass(frozen=True)
class Side:
    """One way to train the model, in a recipe's words. None leaves the task's own choice."""

    method: Mapping[str, Any] | None  # None: the model itself, in full; for models that start from random weights
    lr: float | tuple[float, ...]  # several: the one that is best on a seed that is not judged
    init: Mapping[str, Any] | None = None
    optimizer: Mapping[str, Any] | None = None  # None: torch's AdamW
    callbacks: Components = ()
    targets: Sequence[str] | str | None = None
    steps: int | None = None
    weight_decay: float = 0.0
    calibration: int = 0  # batches that the init sees
    of_old: bool = False  # these are texts of what the model knew before, not of the task
    merge: Mapping[str, Any] | None = None  # the rule that makes one adapter of several (claims/compose)


@dataclass(frozen=True)
class Expect:
    """`smaller` is below `larger` in `measure`; `by` allows `smaller` to be above by so much (a claim of "within")."""

    smaller: str
    larger: str
    measure: str = "held-out loss"
    by: float = 0.0


@dataclass
class Fitted:
    """How a training went."""

    losses: list[float] = field(default_factory=list)  # of each step
    state_bytes: int = 0  # the most that the optimiser kept between two steps


@dataclass
class Run:
    """What a measure of a claim's own gets to see after the training. A model trained in full has no adapter."""

    loaded: Loaded
    adapter: rankfold.Adapter | None
    seed: int
    losses: list[float]
    found: dict[str, float] = field(default_factory=dict)


Measure = Callable[[Run], Mapping[str, float]]
How = Callable[[Loaded, Side, int, Measure | None], dict[str, float]]


def forgetting(run: Run) -> dict[str, float]:
    """Loss, after the training, on texts of another source."""
    return {"loss on other texts": run.loaded.old_loss()}


def run(
    claim: str,
    task: str,
    sides: Mapping[str, Side],
    expects: Sequence[Expect],
    *,
    source: str,
    seeds: Sequence[int] = (0, 1, 2),
    measure: Measure | None = None,
    how: How | None = None,
    note: str = "",
) -> None:
    """Try `claim` and write `claims/results/<slug>.json`, where slug is the name of the calling script.

    Every expectation is judged over the seeds by the paired differences: it holds if their mean is on its side by more
    than its standard error, does not hold if it is on the other side by more than that, and is inconclusive between.
    """
    how = how or train
    script = Path(sys.argv[0]).resolve()
    argparse.ArgumentParser(description=claim).parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    slug, axis = script.stem.replace("_", "-"), script.parent.name
    kept = cache_dir() / "claims.json"  # shared, so that a side which several claims have is run once
    wanted = {"held-out loss", *(expect.measure for expect in expects)}

    def finished() -> dict[str, dict[str, float]]:
        return json.loads(kept.read_text()) if kept.exists() else {}

    def one(name: str, side: Side, seed: int) -> dict[str, float]:
        key = _key(TASKS[task], side, seed, measure, how)
        found = finished().get(key, {})
        if not wanted <= found.keys():
            found = how(load(task), side, seed, measure)
            write_whole(kept, json.dumps({**finished(), key: found}, indent=1))  # another claim may have run meanwhile
        print(f"{slug} seed {seed} {name} at {side.lr:g}: {_line(found)}", flush=True)
        return found

    tried: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        if isinstance(side.lr, tuple):
            rates = {lr: one(name, replace(side, lr=lr), TUNING)["held-out loss"] for lr in side.lr}
            tried[name] = {f"{lr:g}": loss for lr, loss in rates.items()}
            sides = {**sides, name: replace(side, lr=min(rates, key=lambda lr: rates[lr]))}
    numbers = {name: [one(name, side, seed) for seed in seeds] for name, side in sides.items()}
    verdicts = [_judge(numbers, expect) for expect in expects]
    result = {
        "slug": slug,
        "axis": axis,
        "source": source,
        "claim": claim,
        "command": f"python -m claims.{axis}.{script.stem}",
        "model": TASKS[task].model,
        "data": TASKS[task].data,
        "seeds": list(seeds),
        "sides": {
            name: {**_settings(side), "held-out loss by rate": tried.get(name), "runs": numbers[name]}
            for name, side in sides.items()
        },
        "expectations": verdicts,
        "verdict": _together([verdict["verdict"] for verdict in verdicts]),
        "note": note,
    }
    write_whole(RESULTS / f"{slug}.json", json.dumps(result, indent=1) + "\n")
    print(f"{slug}: {result['verdict']}")


def train(loaded: Loaded, side: Side, seed: int, measure: Measure | None = None) -> dict[str, float]:
    """One run: attach, train, evaluate, detach. A pretrained model is left as it was."""
    torch.manual_seed(seed)
    loaded.fresh(seed)
    # Only a side that learns on validation rows pays for them.
    apart = any(build(one).reads == "validation" for one in side.callbacks)
    batches, started = loaded.batches(seed, validation=False if apart else None), time.perf_counter()
    if side.method is None:
        return outcome(loaded, None, seed, fit(loaded, None, side, batches), started, measure)
    model, task = loaded.model, loaded.task
    init = None if side.init is None else build(side.init)
    # From another part of the order: a start must not see the very batches that the first steps train on.
    fresh = loaded.old_batches(side.calibration) if side.of_old else loaded.batches(1000 + seed)
    calibration = list(islice(fresh, side.calibration)) or None
    targets = side.targets or task.targets
    adapter = rankfold.attach(
        model,
        build(side.method),
        targets=targets if isinstance(targets, str) else list(targets),
        init=init,
        seed=seed,
        modules_to_save=loaded.in_full,
        calibration=calibration,
    )
    try:
        fitted = fit(loaded, adapter, side, batches)
        return outcome(loaded, adapter, seed, fitted, started, measure)
    finally:
        rankfold.detach(model)
        model.eval()


def fit(
    loaded: Loaded, adapter: rankfold.Adapter | None, side: Side, batches: Iterator[dict[str, torch.Tensor]]
) -> Fitted:
    """Train the adapter, or without one the model, on the batches, as the side and the task say."""
    model, task = loaded.model, loaded.task
    trained: Any = model if adapter is None else adapter
    callbacks = [build(one) for one in side.callbacks]
    for callback in callbacks:
        callback.on_attach(adapter, model)
        if callback.reads is not None:
            callback.on_data(loaded.stream(2000, callback.reads == "validation"))
    rule = None if side.optimizer is None else build(side.optimizer)
    asked = callbacks if rule is None else [rule, *callbacks]
    groups, heads = [], {id(p) for p in _heads(loaded, adapter)}
    # Embeddings are stepped by AdamW, as the papers that project or quantise do.
    own = {"lr": side.lr if task.head_lr is None else task.head_lr, "project": False, "quantise": False}
    for group in parameter_groups(trained, asked, side.lr, side.weight_decay):
        inside = [p for p in group["params"] if id(p) not in heads]
        outside = [p for p in group["params"] if id(p) in heads]
        groups += [{**group, "params": inside}] if inside or not outside else []  # what grows comes into empty groups
        groups += [{**group, "params": outside, **own}] if outside else []
    optimizer = torch.optim.AdamW(groups) if rule is None else rule.optimizer(groups, side.lr, side.weight_decay)
    steps = side.steps or task.steps
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min(1.0, (t + 1) / warm_up) * (1 + math.cos(math.pi * t / steps)) / 2,
    )
    for callback in callbacks:
        callback.on_start(optimizer, steps)
    fitted = Fitted()
    model.train()
    for step, batch in enumerate(islice(batches, steps)):
        if isinstance(optimizer, ZerothOrder):
            loss = optimizer.step(lambda batch=batch: model(**batch).loss)
        else:
            loss = model(**batch).loss
            penalties = [p for callback in callbacks if (p := callback.penalty()) is not None]
            torch.stack([loss, *penalties]).sum().backward()
            torch.nn.utils.clip_grad_norm_(list(trained.parameters()), 1.0)
            for callback in callbacks:
                callback.before_step(step)
            optimizer.step()
            for callback in callbacks:
                callback.after_step(step)
        fitted.losses.append(loss.item())
        fitted.state_bytes = max(fitted.state_bytes, _state_bytes(optimizer))
        schedule.step()
        optimizer.zero_grad()
    for callback in callbacks:
        callback.on_end()
    return fitted


def outcome(
    loaded: Loaded,
    adapter: rankfold.Adapter | None,
    seed: int,
    fitted: Fitted,
    started: float,
    measure: Measure | None = None,
    change: Change = same,
) -> dict[str, float]:
    """What is known of a finished run; `change` is applied to the held-out batches."""
    trained: Any = loaded.model if adapter is None else adapter
    found = {
        **loaded.evaluate(change),
        "training loss": statistics.fmean(fitted.losses[-5:]),
        "parameters": float(_count(trained.parameters()) - _count(_heads(loaded, adapter))),
        "optimiser state bytes": float(fitted.state_bytes),
        "seconds": time.perf_counter() - started,
    }
    if measure is not None:
        found |= measure(Run(loaded, adapter, seed, fitted.losses, found))
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def _heads(loaded: Loaded, adapter: rankfold.Adapter | None) -> list[nn.Parameter]:
    """The parameters of modules that are trained in full beside the adapter, or would be if there were one."""
    if adapter is not None:
        return [p for copied in adapter.modules.values() for p in copied.parameters()]
    named = loaded.model.named_modules()
    return [p for path, module in named if path.split(".")[-1] in loaded.in_full for p in module.parameters()]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    kept = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))


def build(described: Mapping[str, Any]) -> Any:
    hyperparameters = dict(described)
    return rankfold.build(hyperparameters.pop("name"), **hyperparameters)


def _settings(side: Side) -> dict[str, Any]:
    return {key: value for key, value in vars(side).items() if key == "lr" or value not in (None, (), 0)}


def _key(task: Any, side: Side, seed: int, measure: Measure | None, how: How) -> str:
    """Changes with whatever the run depends on: the task, the side's settings, what is measured and how it is run."""
    code = None if measure is None else measure.__code__.co_code.hex()
    own = [] if how is train else [how.__code__.co_code.hex()]
    described = json.dumps([vars(task), _settings(side), seed, code, *own], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _judge(numbers: Mapping[str, Sequence[Mapping[str, float]]], expect: Expect) -> dict[str, Any]:
    small, large = ([one[expect.measure] for one in numbers[side]] for side in (expect.smaller, expect.larger))
    differences = [b - a + expect.by for a, b in zip(small, large, strict=True)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    verdict = "holds" if mean > error else "does not hold" if mean < -error else "inconclusive"
    within = f" (at most {expect.by:g} above)" if expect.by else ""
    return {
        "expectation": f"{expect.measure}: {expect.smaller} below {expect.larger}{within}",
        "means": {expect.smaller: statistics.fmean(small), expect.larger: statistics.fmean(large)},
        "difference": mean,
        "standard error": error,
        "verdict": verdict,
    }


def _together(verdicts: Sequence[str]) -> str:
    for worst in ("does not hold", "inconclusive"):
        if worst in verdicts:
            return worst
    return "holds"


def _line(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())
