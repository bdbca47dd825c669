"""A model from random weights: in floats, with ternary weights, and with a gated path beside these."""

from claims.harness import Expect, Side, run

run(
    claim="At equal steps the loss is lowest in floats, then with the gated path, then with ternary weights alone.",
    source="arXiv 2602.05269",
    task="code",
    sides={
        "floats": Side(None, lr=(3e-3, 1e-2), steps=100),
        "hgf": Side({"name": "hgf", "rank": 8}, lr=(3e-3, 1e-2), steps=100),
        "ternary": Side({"name": "hgf", "rank": 1, "gate_init": 0.0}, lr=(3e-3, 1e-2), steps=100),
    },
    expects=[
        Expect("floats", "hgf"),
        Expect("hgf", "ternary"),
    ],
    note="Ternary alone is HGF with a gate and a path that start at 0, and stay there.",
)
