"""Artificial entanglement: the valley of LoRA's ΔW at the cut between rows and columns, and attention's own curves."""

import functools
import statistics
from typing import Any

import torch

from claims.audit._tuned import TASK, Tuned, held_out, losses, tuned
from claims.harness import Expect, Measure, Side, run
from rankfold.audit.entanglement import curve, profile

TARGET = 2.4
RATES = {None: 1e-3, 4: 1e-2}


def valley(of: Tuned) -> float:
    """The mean over the updates of queries and values."""
    changes = [of.change(path) for path in of.before if path.rpartition(".")[2] in ("q_proj", "v_proj")]
    return statistics.fmean(profile(change, torch.eye(change.shape[1])).valley for change in changes)


@functools.cache
def external(rank: int | None, seed: int) -> torch.Tensor:
    """S(l) of the attention of every layer (layers, 2t - 1), the mean over heads and four held-out texts."""
    model = tuned(rank, RATES[rank], TARGET, seed).model
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=held_out()[:4], output_attentions=True)
    return torch.stack([curve(layer).mean((0, 1)) for layer in out.attentions])


def compared(loaded: Any, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    assert side.method is not None
    rank = side.method["rank"]
    if side.method["name"] == "none":
        return {"held-out loss": 0.0, "valley": 0.0, "distance of attention's curves": 0.0}
    of = tuned(rank, RATES[rank], TARGET, seed)
    # Low rank from full; and full from full, of another order of the data.
    other = external(None, seed) if rank else external(None, seed + 10)
    found = {
        "held-out loss": losses(of.model)[0],
        "valley": valley(of),
        "distance of attention's curves": float((external(rank, seed) - other).abs().mean()),
        "steps": float(of.steps),
    }
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def side(name: str, rank: int | None = None) -> Side:
    return Side({"name": name, "rank": rank}, lr=RATES[rank])


run(
    claim="At the same loss the entropy of LoRA's updates of queries and values has a valley between rows and columns, "
    "that of tuning in full has none; attention's own curves differ less than between two seeds.",
    source="arXiv 2601.06788",
    task=TASK,
    sides={"lora, rank 4": side("lora", 4), "in full": side("full"), "no valley": side("none")},
    expects=[
        Expect("no valley", "lora, rank 4", "valley"),
        Expect("in full", "lora, rank 4", "valley"),
        Expect("in full", "no valley", "valley", by=0.1),
        Expect("lora, rank 4", "in full", "distance of attention's curves"),
    ],
    how=compared,
    note="Only the matrices of the four layers are tuned, until the held-out loss on the new text is 2.4. The distance "
    "is that of LoRA from tuning in full with the same seed, and of tuning in full from itself with another order of "
    "the data.",
)
