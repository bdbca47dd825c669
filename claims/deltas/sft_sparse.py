"""Sparse fine-tuning that regrows, against a fixed random pattern and LoRA."""

from claims.harness import Expect, Side, run

run(
    claim="At equal counts growing has at most the loss of fixed random indices, and at most LoRA's.",
    source="arXiv 2401.16405",
    task="digits",
    sides={
        "growing": Side(
            {"name": "sft-sparse", "total": 368_640},
            lr=(3e-5, 1e-4, 3e-4),
            callbacks=({"name": "sft-regrow", "period": 10, "window": 3},),
        ),
        "fixed": Side({"name": "sft-sparse", "total": 368_640}, lr=(1e-3, 4e-3, 1e-2)),
        "lora": Side({"name": "lora", "rank": 8}, lr=(1e-3, 4e-3, 1e-2)),
    },
    expects=[
        Expect("growing", "fixed"),
        Expect("growing", "lora"),
    ],
)
