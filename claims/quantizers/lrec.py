"""LREC of INT2.1: a LoRA over a 2-bit model that learns to say what the float one said."""

from claims.harness import Expect, run
from claims.quantizers._packed import KL, packed, run_packed

LREC = {"name": "lrec", "rank": 8, "lr": 1e-2, "epochs": 2}

run(
    claim="In 2 bits, a LoRA of rank 8 distilled from the float model brings it far nearer to that than products for "
    "the error of weights or outputs do, and near the 3-bit model.",
    source="arXiv 2306.08162",
    task="from code",
    sides={
        "2 bits": packed("int2"),
        "2 bits, lorc": packed("int2", compensate={"name": "lorc", "rank": 8}),
        "2 bits, eora": packed("int2", compensate={"name": "eora", "rank": 8}, blocks=100),
        "2 bits, lrec": packed("int2", compensate=LREC, blocks=100),
        "2 bits, lrec from lorc": packed("int2", compensate={**LREC, "start": "lorc"}, blocks=100),
        "3 bits": packed("int3"),
    },
    expects=[
        Expect("2 bits, lrec", "2 bits", KL),
        Expect("2 bits, lrec", "2 bits"),
        Expect("2 bits, lrec", "2 bits, lorc", KL),
        Expect("2 bits, lrec", "2 bits, eora", KL),
        Expect("2 bits, lrec from lorc", "2 bits, lrec", KL),
        Expect("2 bits, lrec", "3 bits", by=0.1),
    ],
    how=run_packed,
    note="Rank 8 of layers 64 wide is a larger share than 16 of 4096. Rounded to nearest in groups of 32.",
)
