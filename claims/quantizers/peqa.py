"""PEQA against the same base untuned, and against LoRA that is rounded afterwards."""

from claims.harness import Expect, run
from claims.quantizers._tuned import side, tuned

LORA = {"name": "lora", "rank": 8}
RATES = (3e-3, 1e-2, 3e-2)

run(
    claim="Of a 3-bit model, scales tuned are below scales as they were, and below a LoRA that is merged in float and "
    "rounded to 3 bits; LoRA and then 4 bits is near.",
    source="arXiv 2305.14152",
    task="from code",
    sides={
        "peqa, 3 bits": side({"name": "peqa"}, (1e-3, 3e-3, 1e-2), "before"),
        "untuned, 3 bits": side({"name": "peqa"}, 0.0, "before", steps=1),
        "lora, then 3 bits": side(LORA, RATES, "after"),
        "lora, then 4 bits": side(LORA, RATES, "after", bits=4),
    },
    expects=[
        Expect("peqa, 3 bits", "untuned, 3 bits"),
        Expect("peqa, 3 bits", "lora, then 3 bits"),
        Expect("peqa, 3 bits", "lora, then 4 bits", by=0.1),
    ],
    how=tuned,
    note="Rounded to nearest, a scale for each output. In groups of 16, tried first with one seed, PEQA came "
    "out behind a LoRA that is rounded to 3 bits.",
)
