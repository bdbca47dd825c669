"""TIES against plain averaging."""

from claims.compose._adapters import LOST, merging, several
from claims.harness import Expect, run

run(
    claim="Of four adapters TIES keeps more of what they had gained, on the mean, than plain averaging.",
    source="arXiv 2306.01708",
    task="four from code",
    sides={
        "ties": merging("ties", to=64),
        "average": merging("task-arithmetic"),
        "ties, nothing trimmed": merging("ties", to=64, density=1.0),
        "ties of rank 8": merging("ties"),
        "average of rank 8": merging("svd-merge"),
    },
    expects=[Expect("ties", "average", LOST), Expect("ties of rank 8", "average of rank 8", LOST)],
    how=several,
    note="Rank 64 is that of the layers, so that what TIES makes is not cut, as in the paper.",
)
