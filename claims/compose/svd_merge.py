"""SVD merge against the sum of factors, at one rank."""

from claims.compose._adapters import LOST, merging, several
from claims.harness import Expect, run

run(
    claim="At the rank of one adapter the sum of two, cut by SVD, keeps more of what both had gained than the sum of "
    "their factors.",
    source="PEFT",
    task="two from code",
    sides={
        "svd": merging("svd-merge", weight=1.0),
        "factors": merging("task-arithmetic", weight=1.0, space="factors"),
        "svd, mean": merging("svd-merge"),
        "factors, mean": merging("task-arithmetic", space="factors"),
    },
    expects=[Expect("svd", "factors", LOST), Expect("svd, mean", "factors, mean", LOST)],
    how=several,
)
