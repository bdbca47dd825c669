"""Rounding to nearest: fewer bits and wider groups cost more."""

from claims.harness import Expect, run
from claims.quantizers._packed import KL, packed, run_packed

run(
    claim="Rounded to nearest a model is further from the float one with each bit less, and in wider groups.",
    source="AWQ's pseudo_quantize_tensor, with GPTQ's range",
    task="from code",
    sides={
        "8 bits": packed("int8"),
        "4 bits": packed("int4"),
        "3 bits": packed("int3"),
        "2 bits": packed("int2"),
        "2 bits, a row a group": packed("int2", group="channel"),
        "2 bits, one group": packed("int2", group="tensor"),
    },
    expects=[
        Expect("8 bits", "4 bits", KL),
        Expect("4 bits", "3 bits", KL),
        Expect("3 bits", "2 bits", KL),
        Expect("2 bits", "2 bits, a row a group", KL),
        Expect("2 bits, a row a group", "2 bits, one group", KL),
    ],
    how=run_packed,
    note="Nothing here depends on the seed.",
)
