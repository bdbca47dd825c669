"""Several adapters on one pretrained model, each trained on a text of its own, and one adapter out of them.

For claims about merging: a side names the rule in `merge`, and `several` is the `how` of the claim.
"""

import functools
import hashlib
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import rankfold
from claims.harness import Measure, Run, Side, build, fit
from claims.tasks import TASKS, FromScratch, Loaded, Scratch
from rankfold.core.files import write_whole
from rankfold.train.places import cache_dir

ALONE = Side({"name": "lora", "rank": 8}, lr=1e-2, steps=60, merge={"name": "none"})  # each on its own text
LOST, WORST = "share of the gain that is lost", "share of the gain that is lost on the worst text"


def merging(name: str, *, rank: int = 8, lr: float = 1e-2, steps: int = 60, **rule: Any) -> Side:
    """Adapters of that rank, merged by the rule; `weight` is that of each, `to` the rank of the result."""
    return Side({"name": "lora", "rank": rank}, lr=lr, steps=steps, merge={"name": name, **rule})


def several(loaded: Loaded, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """Train an adapter on each text, merge them, and measure what is left of what each had gained on its text.

    The gain is how far an adapter alone brings the loss on its text below the base's. The held-out loss is the mean
    over the texts.
    """
    assert side.merge is not None
    parts = texts(loaded.task)
    model, losses = trained(loaded.task, json.dumps(side.method), side.lr, side.steps, seed)
    if side.merge["name"] == "none":
        return {"held-out loss": statistics.fmean(after for _, after in losses), LOST: 0.0, WORST: 0.0}
    adapters = [rankfold.adapters(model)[f"text{i}"] for i in range(len(parts))]
    rule = dict(side.merge)
    weight, to = rule.pop("weight", None), rule.pop("to", None)
    weights = None if weight is None else [weight] * len(parts)
    made, report = rankfold.combine(adapters, build(rule), weights, "merged", rank=to, seed=seed)
    try:
        rankfold.set_active(model, made.name)
        found = [loss_on(part, model) for part in parts]
        lost = [(after - best) / (before - best) for after, (before, best) in zip(found, losses, strict=True)]
        outcome = {
            "held-out loss": statistics.fmean(found),
            LOST: statistics.fmean(lost),
            WORST: max(lost),
            "rank": statistics.fmean(layer.rank for layer in report.values()),
            "cut": statistics.fmean(layer.cut for layer in report.values()),
        }
        if measure is not None:
            outcome |= measure(Run(loaded, made, seed, found, outcome))
    finally:
        rankfold.detach(model, made.name)
    return {name: float(f"{value:.6g}") for name, value in outcome.items()}


@functools.cache
def trained(task: Scratch, method: str, lr: float, steps: int, seed: int) -> tuple[Any, list[tuple[float, float]]]:
    """The model with an adapter `text0`, `text1`, ... for each text, each from a start of its own, and the losses on
    the text without and with it."""
    parts = texts(task)
    alone = [on_one_text(part, method, lr, steps, 10 * seed + i) for i, part in enumerate(parts)]
    parts[0].fresh(seed)
    for i, (folder, _) in enumerate(alone):
        rankfold.load(parts[0].model, folder, f"text{i}", active=False)
    return parts[0].model, [losses for _, losses in alone]


@functools.cache
def on_one_text(part: FromScratch, method: str, lr: float, steps: int, seed: int) -> tuple[Path, tuple[float, float]]:
    """Where the adapter for one text lies, and the losses; both are kept for the next process."""
    described = json.dumps([part.task.texts, method, lr, steps, seed])
    kept = cache_dir() / "claims" / hashlib.sha256(described.encode()).hexdigest()[:16]
    if (kept / "losses.json").exists():
        before, after = json.loads((kept / "losses.json").read_text())
        return kept, (before, after)
    part.fresh(seed)
    before = loss_on(part, part.model)
    adapter = rankfold.attach(part.model, build(json.loads(method)), part.task.targets, seed=seed)
    fit(part, adapter, Side(json.loads(method), lr=lr, steps=steps), part.batches(seed))
    rankfold.save(part.model, kept)
    after = loss_on(part, part.model)
    write_whole(kept / "losses.json", json.dumps([before, after]))
    return kept, (before, after)


def texts(task: Scratch) -> list[FromScratch]:
    """The task for each of its texts, all on the one pretrained model of "from code"."""
    return [_text(kind) for kind in task.texts.split("+")]


@functools.cache
def _text(kind: str) -> FromScratch:
    return FromScratch(replace(TASKS["from code"], texts=kind))  # type: ignore[arg-type,type-var]


def loss_on(part: FromScratch, model: Any) -> float:
    """The held-out loss of the model as it stands."""
    part.model = model
    return part.evaluate()["held-out loss"]
