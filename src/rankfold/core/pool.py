"""Trained factors that several layers share: what MoS's pools and S2-LoRA's pairs have in common."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from rankfold.core.delta import Site


class Pool(nn.Module):
    """A trained A and B for each group of layers, by the group's name. A checkpoint holds each once."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()

    def put(self, group: str, A: Tensor, B: Tensor) -> None:
        self.A[group], self.B[group] = nn.Parameter(A), nn.Parameter(B)


def grouped(sites: Sequence[Site], key: Callable[[Site], str]) -> dict[str, list[Site]]:
    """The sites by the group that `key` names, each group in the order of its sites' names. No dots in a group's name.

    The generator of a group is its first site's, `members[0].rng(seed)`: other groups do not change what it draws.
    """
    groups: dict[str, list[Site]] = {}
    for site in sorted(sites, key=lambda site: site.name):
        groups.setdefault(key(site), []).append(site)
    return groups


def shape_of(site: Site) -> str:
    """`768x3072` for a W (768, 3072), also where the site holds several."""
    return f"{site.out}x{site.in_}"
