"""KaSA against LoRA at equal rank."""

from claims.harness import Expect, Side, run

run(
    claim="At equal rank KaSA's loss on a task after pretraining is at most LoRA's.",
    source="arXiv 2412.06771",
    task="digits",
    sides={
        "kasa": Side({"name": "kasa", "rank": 8}, lr=(1e-3, 4e-3, 1e-2), callbacks=({"name": "kasa-penalty"},)),
        "lora": Side({"name": "lora", "rank": 8}, lr=(1e-3, 4e-3, 1e-2)),
    },
    expects=[
        Expect("kasa", "lora"),
    ],
)
