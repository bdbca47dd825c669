"""Which waiting requests join a running batch. S-LoRA: Sheng et al. 2023, arXiv 2311.03285."""

from collections.abc import Collection, Iterable, Iterator, Sequence

from rankfold.serve.request import Request


def peak(loads: Iterable[tuple[int, int]], block: int = 1) -> int:
    """The most pages that requests will hold at once, each (used, left): tokens it has and may still get.

    With the requests by falling left_i, the ones still there when i ends hold together `Σ_{j ≤ i} ⌈(used_j + left_i) /
    block⌉`; the peak is the largest of these. For a block of one token that is S-LoRA's `max_i (left_i i + Σ_{j ≤ i}
    used_j)`.
    """
    largest, before = 0, list[int]()
    for used, left in sorted(loads, key=lambda load: -load[1]):
        before.append(used)
        largest = max(largest, sum(-(-(one + left) // block) for one in before))
    return largest


def too_late(waiting: Iterable[Request], within: float, now: float) -> list[Request]:
    """Requests that have waited longer than their first token may take (early abort)."""
    return [r for r in waiting if r.first_token is None and now - r.submitted > within]


def in_turn(
    waiting: Sequence[Request],
    present: Collection[str | None],
    distinct: int,
    patience: float,
    now: float,
    newest_first: bool = False,
) -> Iterator[Request]:
    """Waiting requests in the order in which they are tried: first come, first served.

    Once a batch holds as many as `distinct` adapters, requests of those in it go first (adapter clustering), but none
    overtakes a request that waits longer than `patience` seconds. `newest_first` is for when more come than can be
    served in time: then those that came last go first, behind what has begun.
    """
    if newest_first:
        waiting = sorted(waiting, key=lambda r: (r.first_token is None, -r.submitted))  # what began comes first
    if len(present) < distinct:
        yield from waiting
        return
    yield from (r for r in waiting if now - r.submitted > patience)
    rest = [r for r in waiting if now - r.submitted <= patience]
    yield from (r for r in rest if r.adapter in present)
    yield from (r for r in rest if r.adapter not in present)
