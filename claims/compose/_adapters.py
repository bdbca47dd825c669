"""Several adapters on one pretrained model, each trained on a text of its own, and one adapter out of them.

For claims about merging: a side names the rule in `merge`, and `several` is the `how` of the claim.
"""

import functools
import json
import statistics
from dataclasses import replace
from typing import Any

import torch

import rankfold
from claims.harness import Measure, Run, Side, build, fit
from claims.tasks import FromScratch, Loaded, Scratch

LOST, WORST = "share of the gain that is lost", "share of the gain that is lost on the worst text"


def merging(name: str, *, rank: int = 8, lr: float = 1e-2, steps: int = 120, **rule: Any) -> Side:
    """Adapters of that rank, merged by the rule; `weight` is that of each, `to` the rank of the result."""
    return Side({"name": "lora", "rank": rank}, lr=lr, steps=steps, merge={"name": name, **rule})


def several(loaded: Loaded, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """Train an adapter on each text, merge them, and measure what is left of what each had gained on its text.

    The gain is how far an adapter alone brings the loss on its text below the base's. The held-out loss is the mean
    over the texts.
    """
    assert side.merge is not None
    task: Scratch = loaded.task
    model, losses = trained(task, json.dumps(side.method), side.lr, side.steps, seed)
    rule = dict(side.merge)
    weight, to = rule.pop("weight", None), rule.pop("to", None)
    parts = texts(task)
    adapters = [rankfold.adapters(model)[f"text{i}"] for i in range(len(parts))]
    weights = None if weight is None else [weight] * len(parts)
    made, report = rankfold.combine(adapters, build(rule), weights, "merged", rank=to, seed=seed)
    try:
        rankfold.set_active(model, made.name)
        found = [loss_on(part, model) for part in parts]
        lost = [(after - best) / (base - best) for after, (base, best) in zip(found, losses, strict=True)]
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
    parts[0].fresh(seed)
    model, losses = parts[0].model, list[tuple[float, float]]()
    side = Side(json.loads(method), lr=lr, steps=steps)
    for i, part in enumerate(parts):
        part.model, start = model, 10 * seed + i
        torch.manual_seed(start)
        before = loss_on(part, model)
        adapter = rankfold.attach(model, build(json.loads(method)), task.targets, f"text{i}", seed=start)
        fit(part, adapter, side, part.batches(start))
        losses.append((before, loss_on(part, model)))
        rankfold.set_active(model, None)
    return model, losses


def texts(task: Scratch) -> list[FromScratch]:
    """The task once for each of its texts."""
    return [_text(replace(task, texts=kind)) for kind in task.texts.split("+")]


@functools.cache
def _text(task: Scratch) -> FromScratch:
    return FromScratch(task)


def loss_on(part: FromScratch, model: Any) -> float:
    """The held-out loss of the model as it stands."""
    part.model = model
    return part.evaluate()["held-out loss"]
