"""EoRA against LoRC, which is the same without the inputs."""

from claims.harness import Expect, run
from claims.quantizers._packed import KL, packed, run_packed

EORA, LORC = {"name": "eora", "rank": 8}, {"name": "lorc", "rank": 8}

run(
    claim="At equal rank a product for the error of the outputs brings the packed model nearer to the float one than "
    "one for the error of the weights, and this nearer than none; also over GPTQ's weights.",
    source="arXiv 2410.21271",
    task="from code",
    sides={
        "2 bits": packed("int2"),
        "2 bits, lorc": packed("int2", compensate=LORC),
        "2 bits, eora": packed("int2", compensate=EORA, blocks=16),
        "3 bits, lorc": packed("int3", compensate=LORC),
        "3 bits, eora": packed("int3", compensate=EORA, blocks=16),
        "2 bits, gptq": packed("int2", "gptq", blocks=16),
        "2 bits, gptq, lorc": packed("int2", "gptq", LORC, blocks=16),
        "2 bits, gptq, eora": packed("int2", "gptq", EORA, blocks=16),
    },
    expects=[
        Expect("2 bits, eora", "2 bits, lorc", KL),
        Expect("2 bits, lorc", "2 bits", KL),
        Expect("3 bits, eora", "3 bits, lorc", KL),
        Expect("2 bits, gptq, eora", "2 bits, gptq, lorc", KL),
        Expect("2 bits, gptq, lorc", "2 bits, gptq", KL),
    ],
    how=run_packed,
    note="16 blocks of 8 x 64 bytes of code, which the seed chooses. Rank 8 of layers 64 wide is an eighth; the paper "
    "has 128 of 4096.",
)
