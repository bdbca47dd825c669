"""AdaLoRA against its delta with the same rank everywhere, and against LoRA."""

from claims.harness import Expect, run
from claims.ranks._sides import alone, side

run(
    claim="AdaLoRA, which starts at rank 6 and ends at 4 on average, is below the same product of rank 4 in every "
    "layer, and below LoRA of rank 4.",
    source="arXiv 2303.10512",
    task="from code",
    sides={
        "adalora": side("adalora-svd", 6, {"name": "adalora"}, {"name": "orthogonality", "weight": 0.1}),
        "even": side("adalora-svd", 4, {"name": "orthogonality", "weight": 0.1}),
        "lora": side("lora", 4),
    },
    expects=[
        Expect("adalora", "even"),
        Expect("adalora", "lora"),
    ],
    how=alone,
    note="Only the adapter is trained.",
)
