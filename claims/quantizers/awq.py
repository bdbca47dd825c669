"""AWQ against rounding to nearest, and what its two parts do."""

from claims.harness import Expect, run
from claims.quantizers._packed import KL, packed, run_packed

run(
    claim="AWQ's scales bring the packed model nearer to the float one than rounding to nearest, and its clipped "
    "ranges nearer still.",
    source="arXiv 2306.00978",
    task="from code",
    sides={
        "2 bits": packed("int2"),
        "2 bits, awq": packed("int2", "awq", blocks=16),
        "2 bits, awq without clipping": packed("int2", {"name": "awq", "clips": 1}, blocks=16),
        "3 bits": packed("int3"),
        "3 bits, awq": packed("int3", "awq", blocks=16),
        "3 bits, awq without clipping": packed("int3", {"name": "awq", "clips": 1}, blocks=16),
    },
    expects=[
        Expect("2 bits, awq", "2 bits", KL),
        Expect("2 bits, awq", "2 bits, awq without clipping", KL),
        Expect("2 bits, awq without clipping", "2 bits", KL),
        Expect("3 bits, awq", "3 bits", KL),
        Expect("3 bits, awq", "3 bits, awq without clipping", KL),
        Expect("3 bits, awq without clipping", "3 bits", KL),
    ],
    how=run_packed,
    note="16 blocks of 8 x 64 bytes of code, which the seed chooses. Layers are 64 wide, in groups of 32.",
)
