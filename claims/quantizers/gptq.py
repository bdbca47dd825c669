"""GPTQ against rounding to nearest."""

from claims.harness import Expect, run
from claims.quantizers._packed import KL, packed, run_packed

run(
    claim="GPTQ brings the packed model nearer to the float one than rounding to nearest, more so at fewer bits.",
    source="arXiv 2210.17323",
    task="from code",
    sides={
        "2 bits": packed("int2"),
        "2 bits, gptq": packed("int2", "gptq", blocks=16),
        "3 bits": packed("int3"),
        "3 bits, gptq": packed("int3", "gptq", blocks=16),
        "4 bits": packed("int4"),
        "4 bits, gptq": packed("int4", "gptq", blocks=16),
        "2 bits, gptq, act_order": packed("int2", {"name": "gptq", "act_order": True}, blocks=16),
    },
    expects=[
        Expect("2 bits, gptq", "2 bits", KL),
        Expect("3 bits, gptq", "3 bits", KL),
        Expect("4 bits, gptq", "4 bits", KL),
        Expect("2 bits, gptq", "2 bits"),
        Expect("2 bits, gptq, act_order", "2 bits, gptq", KL),
    ],
    how=run_packed,
    note="16 blocks of 8 x 64 bytes of code, which the seed chooses.",
)
