"""L4Q against LoRA on a rounded base, merged and rounded again."""

from claims.harness import Expect, run
from claims.quantizers._tuned import ADDED, side, tuned

run(
    claim="At 3 bits L4Q is below LoRA on a rounded base that is merged and rounded again; packing what was trained "
    "changes nothing.",
    source="arXiv 2402.04902",
    task="from code",
    sides={
        "l4q": side({"name": "l4q", "rank": 8, "bits": 3, "group": "channel"}, (3e-3, 1e-2)),
        "lora, rounded again": side({"name": "lora", "rank": 8}, 3e-2, "before", "after"),
        "lora, then 3 bits": side({"name": "lora", "rank": 8}, 3e-2, "after"),
    },
    expects=[
        Expect("l4q", "lora, rounded again"),
        Expect("l4q", "lora, then 3 bits"),
        Expect("l4q", "lora, rounded again", ADDED),
    ],
    how=tuned,
    note="A scale for each output. The rate of LoRA was the best of three, for one that is rounded once, in the end.",
)
