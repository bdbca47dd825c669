"""HALO's levels where a few features are far larger than the others."""

import time
from contextlib import nullcontext
from typing import Any

import torch

import rankfold
from claims.harness import Expect, Measure, Side, build, fit, outcome, run
from claims.tasks import Loaded

LARGER = 30.0


def rounded(loaded: Loaded, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """Train a LoRA under HALO as `merge` says (or not), and measure without: the adapter is an ordinary one."""
    loaded.in_full, started = (), time.perf_counter()
    torch.manual_seed(seed)
    loaded.fresh(seed)
    _outliers(loaded.model)
    adapter = rankfold.attach(loaded.model, build(side.method or {}), seed=seed)
    with nullcontext() if side.merge is None else build({"name": "halo", **side.merge}).training(loaded.model):
        fitted = fit(loaded, adapter, side, loaded.batches(seed))
    return outcome(loaded, adapter, seed, fitted, started, measure)


@torch.no_grad()
def _outliers(model: Any) -> None:
    """Make two features of every block's inputs larger, and the weights that meet them as much smaller."""
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, layers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[3:5] *= LARGER
            for layer in layers:
                layer.weight[:, 3:5] /= LARGER


def side(**halo: Any) -> Side:
    return Side({"name": "lora", "rank": 8}, lr=1e-2, steps=60, merge=halo or None)


run(
    claim="With outliers in the features, training with products of 4 bits loses least at level 2, then 1, then "
    "0; with 8 bits level 2 is that of floats.",
    source="arXiv 2501.02625",
    task="from code",
    sides={
        "floats": side(),
        "8 bits, level 2": side(level=2, format="int8"),
        **{f"4 bits, level {level}": side(level=level, format="int4") for level in (0, 1, 2)},
    },
    expects=[
        Expect("4 bits, level 2", "4 bits, level 1"),
        Expect("4 bits, level 1", "4 bits, level 0"),
        Expect("8 bits, level 2", "floats", by=0.02),
    ],
    how=rounded,
    note=f"Two features of each block are made {LARGER:g} times as large, and the weights that meet them as much "
    "smaller, which changes nothing in floats. The loss is measured in floats.",
)
