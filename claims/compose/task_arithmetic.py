"""Task arithmetic: sums of products against sums of factors."""

from claims.compose._adapters import ALONE, LOST, merging, several
from claims.harness import Expect, run

run(
    claim="The sum of two adapters as products keeps more than 90 % of what both had gained, and more than their sum "
    "as factors.",
    source="arXiv 2212.04089",
    task="two from code",
    sides={
        "each alone": ALONE,
        "products": merging("task-arithmetic", weight=1.0),
        "factors": merging("task-arithmetic", weight=1.0, space="factors"),
        "mean of products": merging("task-arithmetic"),
        "mean of factors": merging("task-arithmetic", space="factors"),
    },
    expects=[
        Expect("products", "each alone", LOST, by=0.1),
        Expect("products", "factors", LOST),
        Expect("mean of products", "mean of factors", LOST),
    ],
    how=several,
    note="The two texts share one model of bytes: unlike disjoint tasks, one adapter is in the way of the other.",
)
