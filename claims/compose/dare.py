"""DARE: dropping entries of one adapter's change, with and without rescaling."""

from claims.compose._adapters import ALONE, LOST, merging, several
from claims.harness import Expect, run

run(
    claim="With half of its entries dropped and the rest rescaled an adapter keeps more than 95 % of what it had "
    "gained, and more than without rescaling.",
    source="arXiv 2311.03099",
    task="from code",
    sides={
        "as it was": ALONE,
        "half dropped": merging("dare", drop=0.5, to=64),
        "half dropped, not rescaled": merging("dare", drop=0.5, to=64, rescale=False),
    },
    expects=[
        Expect("half dropped", "as it was", LOST, by=0.05),
        Expect("half dropped", "half dropped, not rescaled", LOST),
    ],
    how=several,
    note="The model is 64 wide, so that an output sums few entries: what dropping adds to it averages out less than "
    "in a large one.",
)
