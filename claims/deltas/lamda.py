"""LaMDA at LoRA's rank with far fewer trained numbers at the end."""

from claims.harness import Expect, Side, run

run(
    claim="At equal rank LaMDA's loss is within 0.05 of LoRA's.",
    source="arXiv 2406.12832",
    task="digits",
    sides={
        "lamda": Side({"name": "lamda", "rank": 8}, lr=(1e-3, 4e-3, 1e-2), callbacks=({"name": "lamda-freezing"},)),
        "lora": Side({"name": "lora", "rank": 8}, lr=(1e-3, 4e-3, 1e-2)),
    },
    expects=[
        Expect("lamda", "lora", by=0.05),
    ],
)
