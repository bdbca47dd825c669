"""ZeroQuant-FP: what scales that are powers of two apart cost, and FP8 inputs beside INT8 ones."""

from typing import Any

from claims.harness import Expect, Side, run
from claims.quantizers._packed import packed, run_packed


def side(powers: str, compensate: Any = None, activations: str = "fp8") -> Side:
    how = {"name": "zeroquant-fp", "powers": powers}
    return packed("fp4", how, compensate, blocks=16, activations=activations)


run(
    claim="With FP4 weights and FP8 inputs free scales are below M2's, and these below M1's; LoRC narrows the gap.",
    source="arXiv 2307.09782",
    task="from code",
    sides={
        "free scales": side("none"),
        "m2, exponent down": side("m2-floor"),
        "m2 as written": side("m2"),
        "m1": side("m1"),
        "m2, exponent down, lorc": side("m2-floor", {"name": "lorc", "rank": 8}),
        "whole numbers of 4 bits": packed("int4", "gptq", blocks=16, activations="int8"),
    },
    expects=[
        Expect("free scales", "m2, exponent down"),
        Expect("m2, exponent down", "m1"),
        Expect("m2 as written", "m1"),
        Expect("m2, exponent down, lorc", "m2, exponent down"),
        Expect("free scales", "whole numbers of 4 bits"),
    ],
    how=run_packed,
    note="GPTQ rounds. M2 as it is written rounds its exponent up, so that the largest weights of most groups "
    "saturate; rounded down nothing does. Asymmetric whole numbers of 4 bits have a zero point besides.",
)
