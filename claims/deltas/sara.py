"""SaRA: training the smallest weights."""

from claims.harness import Expect, Side, forgetting, run

run(
    claim=(
        "At equal counts, training the smallest weights changes the loss on other texts less than LoRA, "
        "at similar target loss."
    ),
    source="arXiv 2409.06633",
    task="maths",
    sides={
        "sara": Side({"name": "sara", "density": 0.0347}, lr=1e-3),
        "lora": Side({"name": "lora", "rank": 8}, lr=1e-3),
    },
    expects=[
        Expect("sara", "lora", "loss on other texts"),
        Expect("sara", "lora", by=0.05),
    ],
    measure=forgetting,
)
