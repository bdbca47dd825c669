"""LoRC of ZeroQuant-V2 over rounded and over GPTQ's weights, at several widths."""

from claims.harness import Expect, run
from claims.quantizers._packed import GAIN, packed, run_packed

LORC = {"name": "lorc", "rank": 8}
COARSE = {"group": "channel"}

run(
    claim="A product of rank 8 for the error of the weights brings the packed model nearer to the float one, more so "
    "at fewer bits and in coarser groups, and less so over GPTQ's weights.",
    source="arXiv 2303.08302",
    task="from code",
    sides={
        "float": packed(None),
        "2 bits": packed("int2"),
        "2 bits, lorc": packed("int2", compensate=LORC),
        "2 bits, a row a group": packed("int2", **COARSE),
        "2 bits, a row a group, lorc": packed("int2", compensate=LORC, **COARSE),
        "3 bits, lorc": packed("int3", compensate=LORC),
        "4 bits": packed("int4"),
        "4 bits, lorc": packed("int4", compensate=LORC),
        "2 bits, gptq": packed("int2", "gptq", blocks=16),
        "2 bits, gptq, lorc": packed("int2", "gptq", LORC, blocks=16),
    },
    expects=[
        Expect("2 bits, lorc", "2 bits"),
        Expect("4 bits, lorc", "4 bits"),
        Expect("float", "4 bits, lorc"),
        Expect("3 bits, lorc", "2 bits, lorc", GAIN),
        Expect("4 bits, lorc", "3 bits, lorc", GAIN),
        Expect("2 bits, lorc", "2 bits, a row a group, lorc", GAIN),
        Expect("2 bits, gptq, lorc", "2 bits, lorc", GAIN),
    ],
    how=run_packed,
    note="Seeds choose GPTQ's text; the others read no data, and are the same for each. Held-out code.",
)
