"""CBQ: windows of two blocks against one block at a time, and against rounding to nearest."""

from claims.harness import Expect, run
from claims.quantizers._packed import KL, packed, run_packed

run(
    claim="With weights in 2 bits, rounding that is learnt in windows of two blocks brings the model nearer to the "
    "float one than block by block, and that nearer than rounding to nearest.",
    source="arXiv 2312.07950",
    task="from code",
    sides={
        "2 bits": packed("int2"),
        "2 bits, gptq": packed("int2", "gptq", blocks=16),
        "2 bits, cbq": packed("int2", "cbq", blocks=16),
        "2 bits, cbq, each block alone": packed("int2", {"name": "cbq", "blocks": 1}, blocks=16),
    },
    expects=[
        Expect("2 bits, cbq", "2 bits, cbq, each block alone", KL),
        Expect("2 bits, cbq, each block alone", "2 bits", KL),
        Expect("2 bits, cbq", "2 bits, gptq", KL),
    ],
    how=run_packed,
    note="Weights only: the paper's 4-bit activations are not tried. 3 epochs over 16 blocks of 8 x 64 bytes of code, "
    "which the seed chooses.",
)
