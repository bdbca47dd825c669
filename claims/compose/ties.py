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
        "ties, λ = 0.5": merging("ties", to=64, scale=0.5),
        "ties, nothing trimmed": merging("ties", to=64, density=1.0),
        "ties of rank 8": merging("ties"),
    },
    expects=[Expect("ties", "average", LOST), Expect("ties, λ = 0.5", "average", LOST)],
    how=several,
    note="Rank 64 is that of the layers, so that what TIES makes is not cut, as in the paper, whose λ is 1 where it is "
    "not tuned. The texts share one model of bytes, so what one adapter learns is in the way of another.",
)
