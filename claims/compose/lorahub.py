"""LoraHub: adapters of which one is the task's own, weighed by five examples of the task."""

import json
import statistics
from typing import Any

import rankfold
from claims.compose._adapters import loss_on, merging, texts, trained
from claims.harness import Expect, Measure, Side, run
from claims.tasks import Loaded
from rankfold.compose.lorahub import lorahub

OTHER = "share of texts where another adapter weighs as much"
SHOTS = 5


def weighed(loaded: Loaded, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """For each text in turn: mix the adapters of all texts by a few of its blocks, and measure the mixture on it."""
    model, _ = trained(loaded.task, json.dumps(side.method), side.lr, side.steps, seed)
    parts, adapters = texts(loaded.task), list(rankfold.adapters(model).values())
    how = dict(side.merge or {})
    found, others = [], []
    for i, part in enumerate(parts):
        weights = [1 / len(parts)] * len(parts) if how["name"] == "mean" else [0.0] * len(parts)
        if how["name"] == "search":
            blocks: Any = next(part.batches(5000 + seed))
            examples = [{name: tensor[:SHOTS] for name, tensor in blocks.items()}]
            made, search = lorahub(adapters, examples, "mixed", budget=how["budget"], seed=seed)
            weights = search.best.weights
        else:
            made, _ = rankfold.combine(adapters, "lorahub", weights, "mixed")
        rankfold.set_active(model, made.name)
        found.append(loss_on(part, model))
        others.append(sum(abs(w) >= abs(weights[i]) for w in weights) > 1)
        rankfold.detach(model, made.name)
    outcome = {"held-out loss": statistics.fmean(found), OTHER: statistics.fmean(others)}
    return {name: float(f"{value:.6g}") for name, value in outcome.items()}


run(
    claim="Given five examples of a task that one of four adapters was trained on, the search gives that one the "
    "largest weight within 100 evaluations, and its mixture is below the base and below the mean of all adapters.",
    source="arXiv 2307.13269",
    task="four from code",
    sides={
        "40 trials": merging("search", budget=40),
        "100 trials": merging("search", budget=100),
        "mean": merging("mean"),
        "base": merging("base"),
    },
    expects=[
        Expect("40 trials", "base"),
        Expect("40 trials", "mean"),
        Expect("100 trials", "mean"),
        Expect("100 trials", "mean", OTHER, by=-0.9),
    ],
    how=weighed,
    note="Means over the four texts, each in turn the new task; an example is 64 bytes of it.",
)
