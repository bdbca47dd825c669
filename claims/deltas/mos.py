"""MoS at the budget of LoRA r = 1."""

from claims.harness import Expect, Side, run

run(
    claim="At the budget of LoRA r = 1, MoS with r = 4 has at most LoRA's loss, and pure sharing is worse than MoS.",
    source="arXiv 2410.00938",
    task="digits",
    sides={
        "mos": Side({"name": "mos", "rank": 4, "budget": 1, "shards": 2}, lr=4e-3),
        "pure sharing": Side({"name": "mos", "rank": 4, "budget": 1, "shards": 1, "private": 0}, lr=4e-3),
        "lora": Side({"name": "lora", "rank": 1}, lr=4e-3),
    },
    expects=[
        Expect("mos", "lora"),
        Expect("mos", "pure sharing"),
    ],
)
