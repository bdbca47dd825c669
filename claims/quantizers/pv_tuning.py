"""PV-tuning against tuning tables alone, and against straight-through steps of all codes."""

from typing import Any

from claims.harness import Expect, Side, run
from claims.quantizers._packed import KL, in_codebooks, run_packed

ONE_BIT = {"books": 1, "bits": 4, "width": 4}


def side(epochs: int = 2, **rule: Any) -> Side:
    return in_codebooks(80, ONE_BIT, epochs=epochs, lr=3e-3, **rule)


run(
    claim="Of a model in codes of one bit a number, tables and codes tuned by PV come nearer to the float model than "
    "straight-through steps of all codes, and these than tables alone.",
    source="arXiv 2405.14852",
    task="from code",
    sides={
        "k-means": side(epochs=0),
        "tables alone": side(code_lr=0.0),
        "straight-through": side(rho=1.0, tau=1e9),
        "pv": side(),
        "pv without memory": side(delta_decay=1.0),
    },
    expects=[
        Expect("tables alone", "k-means", KL),
        Expect("straight-through", "tables alone", KL),
        Expect("pv", "straight-through", KL),
        Expect("pv", "tables alone", KL),
        Expect("pv", "pv without memory", KL),
    ],
    how=run_packed,
    note="160 steps of 512 bytes each; the paper takes some hundred times as many tokens a step.",
)
