"""Bi-LoRA at one bit against a thinner LoRA of as many bytes, and against quantising after training."""

from claims.compose._coded import then_compressed
from claims.harness import Expect, Side, run

QV = ("q_proj", "v_proj")


def lora(rank: int, *how: dict) -> Side:
    return Side({"name": "lora", "rank": rank}, lr=(2e-3, 8e-3), targets=QV, callbacks=how)


run(
    claim="A LoRA of rank 32 in one bit a number is better than one of rank 1 in 32 bits, of as many bytes; and it "
    "is better to train with the quantiser than to quantise afterwards.",
    source="arXiv 2307.16867",
    task="digits",
    sides={
        "bi-lora, rank 32": Side(
            {"name": "bi-lora", "rank": 32}, lr=(2e-3, 8e-3), targets=QV, callbacks=({"name": "onebit"},)
        ),
        "lora, rank 1": lora(1),
        "lora, rank 32, one bit afterwards": lora(32, {"name": "onebit"}),
    },
    expects=[
        Expect("bi-lora, rank 32", "lora, rank 1"),
        Expect("bi-lora, rank 32", "lora, rank 32, one bit afterwards"),
    ],
    how=then_compressed,
)
