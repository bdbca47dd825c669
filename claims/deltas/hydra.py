"""Hydra's two branches at the budget of one."""

from claims.harness import Expect, Side, run

run(
    claim="At equal parameter budgets Hydra's loss is at most that of the parallel branch alone (LoRA).",
    source="arXiv 2309.06922",
    task="digits",
    sides={
        "hydra": Side({"name": "hydra", "rank": 2, "sequential_rank": 2}, lr=(1e-3, 4e-3, 1e-2)),
        "lora": Side({"name": "lora", "rank": 4}, lr=(1e-3, 4e-3, 1e-2)),
    },
    expects=[
        Expect("hydra", "lora"),
    ],
)
