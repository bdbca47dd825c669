"""L4Q against LoRA on a rounded base, merged and rounded again."""

from claims.harness import Expect, run
from claims.quantizers._tuned import ADDED, side, tuned

RATES = (3e-3, 1e-2, 3e-2)

run(
    claim="At 3 bits L4Q is below LoRA on a rounded base that is merged and rounded again; packing what was trained "
    "changes nothing.",
    source="arXiv 2402.04902",
    task="from code",
    sides={
        "l4q": side({"name": "l4q", "rank": 8, "bits": 3, "group": "channel"}, RATES),
        "lora, rounded again": side({"name": "lora", "rank": 8}, RATES, "before", "after"),
        "lora, then 3 bits": side({"name": "lora", "rank": 8}, RATES, "after"),
    },
    expects=[
        Expect("l4q", "lora, rounded again"),
        Expect("l4q", "lora, then 3 bits"),
        Expect("l4q", "lora, rounded again", ADDED),
    ],
    how=tuned,
    note="A scale for each output.",
)
