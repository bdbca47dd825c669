"""MoS at the budget of a LoRA of rank 2."""

from claims.harness import Expect, Side, run

run(
    claim="At the budget of LoRA r = 2, MoS with r = 4 has at most LoRA's loss, and pure sharing is worse than MoS.",
    source="arXiv 2410.00938",
    task="digits",
    sides={
        "mos": Side(
            {"name": "mos", "rank": 4, "budget": 2, "private": 1, "shards": 4, "alpha": 4}, lr=(1e-3, 4e-3, 1e-2)
        ),
        "pure sharing": Side(
            {"name": "mos", "rank": 4, "budget": 2, "private": 0, "shards": 1, "alpha": 4}, lr=(1e-3, 4e-3, 1e-2)
        ),
        "lora": Side({"name": "lora", "rank": 2}, lr=(1e-3, 4e-3, 1e-2)),
    },
    expects=[Expect("mos", "lora"), Expect("mos", "pure sharing")],
)
