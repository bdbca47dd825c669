"""LoRA-LEGO against averaging the factors and against TIES."""

import json
import statistics
from typing import Any

import torch

import rankfold
from claims.compose._adapters import LOST, loss_on, merging, on_one_text, texts
from claims.harness import Expect, Measure, Side, build, run
from claims.tasks import Loaded

AVERAGE = "lorahub"  # without a search: the mean of the factors


def arranged(loaded: Loaded, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """Merge an adapter of each text: all from one start, or each from its own; with their units in another order."""
    merge = dict(side.merge or {})
    one_start, shuffle, to = merge.pop("one_start", False), merge.pop("shuffled", False), merge.pop("to", None)
    parts = texts(loaded.task)
    parts[0].fresh(seed)
    model, losses = parts[0].model, []
    for i, part in enumerate(parts):
        start = 10 * seed + (0 if one_start else i)
        folder, both = on_one_text(part, json.dumps(side.method), side.lr, side.steps or 0, start)
        rankfold.load(model, folder, f"text{i}", active=False)
        losses.append(both)
    if shuffle:
        shuffled(model, seed)
    adapters = list(rankfold.adapters(model).values())
    made, _ = rankfold.combine(adapters, build(merge), to="merged", rank=to, seed=seed)
    rankfold.set_active(model, made.name)
    found = [loss_on(part, model) for part in parts]
    lost = [(after - best) / (before - best) for after, (before, best) in zip(found, losses, strict=True)]
    outcome = {"held-out loss": statistics.fmean(found), LOST: statistics.fmean(lost)}
    return {name: float(f"{value:.6g}") for name, value in outcome.items()}


def shuffled(model: Any, seed: int) -> None:
    """Put the units of each layer of each adapter into another order."""
    rng = torch.Generator().manual_seed(seed)
    for adapter in rankfold.adapters(model).values():
        for delta in adapter.deltas.values():
            order = torch.randperm(delta.A.shape[-2], generator=rng)
            delta.set_start(delta.B[:, order], delta.A[order])


run(
    claim="Of adapters from different starts LoRA-LEGO keeps more than an average of their factors, and no less than "
    "TIES. Of adapters from one start the average keeps more, but not in another order of their units, which changes "
    "nothing for LoRA-LEGO.",
    source="arXiv 2409.16167",
    task="four from code",
    sides={
        "lego": merging("lora-lego"),
        "lego of rank 32": merging("lora-lego", to=32),
        "ties": merging("ties"),
        "factors": merging(AVERAGE),
        "factors, matched": merging("weight-matching"),
        "lego, one start": merging("lora-lego", one_start=True),
        "lego, one start, shuffled": merging("lora-lego", one_start=True, shuffled=True),
        "factors, one start": merging(AVERAGE, one_start=True),
        "factors, one start, shuffled": merging(AVERAGE, one_start=True, shuffled=True),
        "factors, one start, shuffled, matched": merging("weight-matching", one_start=True, shuffled=True),
    },
    expects=[
        Expect("lego", "factors", LOST),
        Expect("lego", "ties", LOST),
        Expect("lego, one start, shuffled", "lego, one start", LOST, by=1e-3),
        Expect("factors, one start", "factors, one start, shuffled", LOST),
        Expect("factors, one start, shuffled, matched", "factors, one start, shuffled", LOST),
        Expect("lego, one start, shuffled", "factors, one start, shuffled", LOST),
    ],
    how=arranged,
    note="Rank 8 each, 32 units in all. Rank 32 has a group for every unit: the sum of all adapters, times ½.",
)
