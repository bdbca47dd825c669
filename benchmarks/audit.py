"""Seconds that an audit takes: a LoRA on all linears of SmolLM2-135M, every measure of every layer, and the probes.

The other side is what a dense way would do first, the exact SVD of each W and of each W + ΔW.
"""

import time
from pathlib import Path

import harness
import torch

import rankfold
from rankfold.audit.probing import ask
from rankfold.audit.report import audit

RECIPE = Path(__file__).parents[1] / "examples/recipes/gsm8k.yaml"
TARGET = 60.0


def main() -> None:
    from rankfold.train.display import Display
    from rankfold.train.inputs import load_inputs
    from rankfold.train.recipe_file import read_recipe

    given = harness.arguments(__doc__, rank=64)
    torch.set_num_threads(given.threads)
    inputs = load_inputs(read_recipe(RECIPE, ["data.limit=20", "data.held_out.limit=2"]), Display())
    model = inputs.model
    adapter = rankfold.attach(model, rankfold.LoRA(rank=given.rank))
    for delta in adapter.deltas.values():
        torch.nn.init.normal_(delta.B, std=0.02)

    def dense() -> None:
        for delta in adapter.deltas.values():
            W = delta.W.float()
            torch.linalg.svd(W, full_matrices=False)
            torch.linalg.svd(delta.adapted_weight(W).detach(), full_matrices=False)

    rows = []
    sides = {
        "weights": lambda: audit(model),
        "probes": lambda: ask(model, inputs.processor, adapter.name),
        "dense SVDs": dense,
    }
    for name, run in sides.items():
        start = time.perf_counter()
        run()
        rows.append({"side": name, "layers": len(adapter.deltas), "seconds": time.perf_counter() - start})
    rows[0]["target"] = TARGET  # of both together
    rows[0]["over dense"] = rows[0]["seconds"] / rows[2]["seconds"]
    harness.report(given, "audit", rows)


if __name__ == "__main__":
    main()
