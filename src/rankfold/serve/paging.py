"""What stays in memory and what comes next: residency and prediction of EdgeMoE, Yi et al. 2023, arXiv 2308.14352.

A key is an expert (layer, number) or an adapter's name; both are paged by the same two classes.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, Literal, TypeVar

from rankfold.errors import RankfoldError

Key = TypeVar("Key", bound=Hashable)
Policy = Literal["frequency", "lru", "fifo"]


class Residency(Generic[Key]):
    """Which keys are in memory, of sizes that together never exceed a capacity (bytes, pages, or a number of experts).

    Out goes first, of the keys that are not pinned, by `policy`:

    - "frequency": the one whose next use is expected latest. Time counts uses of any key. A key has its turn every L
      uses, the next one after d; with a share p of all uses it is used in `f = p L` of its turns, so its next use is
      expected after `d + L (1/f − 1)`. Of two in one layer the rarer goes, and of two that are as frequent the one in
      the layer that ran last, since decoding comes back to it last;
    - "lru": the least recently used; "fifo": the one that came first.

    The paper names frequency and layer order and no formula; this one is our reading. Of equals the older goes.

    Args:
        capacity: in the unit of the keys' sizes.
        policy: as above.
        turns: `(d, L)` of a key; None where any key may come any time: (1, 1).
        half_life: after so many uses of any key a use counts half, so that what was popular long ago can go.
    """

    def __init__(
        self,
        capacity: int,
        policy: Policy = "frequency",
        turns: Callable[[Key], tuple[float, float]] | None = None,
        half_life: float = 10_000,
    ):
        if policy not in ("frequency", "lru", "fifo"):
            raise RankfoldError(f"policy {policy!r}: one of frequency, lru, fifo")
        if capacity < 1 or not half_life > 0:
            raise RankfoldError(f"capacity and half_life must be above 0: {capacity}, {half_life}")
        self.capacity, self.policy = capacity, policy
        self._turns = turns or (lambda key: (1, 1))
        self._decay = 0.5 ** (1 / half_life)
        self._sizes: dict[Key, int] = {}  # of what is in memory, in the order that it came
        self._pins: Counter[Key] = Counter()
        self._uses: dict[Key, tuple[float, int]] = {}  # decayed count and time of the last use, also of what is out
        self._time, self.used = 0, 0

    def __contains__(self, key: Key) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def touch(self, key: Key) -> None:
        """The key is used now, whether it is in memory or not."""
        self._time += 1
        self._uses[key] = self._count(key) + 1, self._time

    def frequency(self, key: Key) -> float:
        """Its share of the recent uses."""
        total = (1 - self._decay**self._time) / (1 - self._decay)
        return self._count(key) / total if self._time else 0.0

    def need(self, key: Key, size: int = 1) -> list[Key] | None:
        """Make room for the key and take it in: what has to leave for it, which is out from now on.

        None, and nothing happens, if it cannot fit beside what is pinned. What is in stays, whatever `size` says.
        """
        if key in self._sizes:
            return []
        missing = self.used + size - self.capacity
        leaving: list[Key] = []
        if missing > 0:
            free = self.order()
            if sum(self._sizes[other] for other in free) < missing:
                return None
            for other in free:
                if missing <= 0:
                    break
                leaving.append(other)
                missing -= self._sizes[other]
        for other in leaving:
            self.remove(other)
        self._sizes[key] = size
        self.used += size
        return leaving

    def order(self) -> list[Key]:
        """What is in memory and not pinned, in the order in which it would leave."""
        return sorted((key for key in self._sizes if not self._pins[key]), key=self._stay)

    def remove(self, key: Key) -> None:
        """The key is out; nothing happens if it was not in. Its uses are remembered."""
        if self._pins[key]:
            raise RankfoldError(f"{key!r} is pinned: unpin it before it leaves")
        self.used -= self._sizes.pop(key, 0)

    def pin(self, key: Key) -> None:
        """Keep a key that is in memory there, until as many `unpin`."""
        if key not in self._sizes:
            raise RankfoldError(f"{key!r} is not in memory: only what is there can be pinned")
        self._pins[key] += 1

    def unpin(self, key: Key) -> None:
        if not self._pins[key]:
            raise RankfoldError(f"{key!r} is not pinned")
        self._pins[key] -= 1

    def _count(self, key: Key) -> float:
        count, when = self._uses.get(key, (0.0, self._time))
        return count * self._decay ** (self._time - when)

    def _stay(self, key: Key) -> tuple[float, ...]:
        """What goes first is smallest; in a tie, what came first (sorting is stable)."""
        if self.policy == "fifo":
            return ()
        last = self._uses.get(key, (0.0, 0))[1]
        if self.policy == "lru":
            return (last,)
        d, L = self._turns(key)
        f = min(1.0, self.frequency(key) * L)
        return (-(d + L * (1 / f - 1)) if f > 0 else -float("inf"), last)


class Transitions(Generic[Key]):
    """What comes after what: `P(j | i) = (n_ij + κ p_j) / (n_i + κ)`, from counted pairs (i now, j next).

    n_i counts the pairs that begin with i, and `p_j = n_j / n` the share of all that end with j: what i has not told
    yet is taken from the whole, so that rows sum to 1 (once anything was counted), and an unknown i gives p. The paper
    conditions on the experts chosen so far; of these only the last layer's count here.
    """

    def __init__(self, prior: float = 1.0):
        if not prior > 0:
            raise RankfoldError(f"prior must be above 0, not {prior}")
        self.prior = prior
        self._rows: dict[Key, Counter[Key]] = {}
        self._ends: Counter[Key] = Counter()

    def observe(self, now: Key, next: Key, times: int = 1) -> None:
        """`next` came after `now`, so many times."""
        self._rows.setdefault(now, Counter())[next] += times
        self._ends[next] += times

    def probability(self, next: Key, now: Key) -> float:
        """P(next | now); 0 before anything was counted."""
        if not self._ends:
            return 0.0
        row, p = self._rows.get(now, Counter()), self._ends[next] / self._ends.total()
        return (row[next] + self.prior * p) / (row.total() + self.prior)

    def row(self, now: Key) -> dict[Key, float]:
        """P(j | now) for every j that ever came next."""
        return {j: self.probability(j, now) for j in self._ends}

    def predict(self, now: Iterable[Key], count: int) -> list[Key]:
        """The `count` keys of the largest `Σ_i P(j | i)` over all i in `now`, the likeliest first."""
        rows = [self._rows.get(i, Counter()) for i in now]
        weights = [1 / (row.total() + self.prior) for row in rows]
        share = self.prior * sum(weights) / max(1, self._ends.total())
        scores = {j: share * n for j, n in self._ends.items()}
        for row, weight in zip(rows, weights, strict=True):
            for j, n in row.items():
                scores[j] += n * weight
        return heapq.nlargest(count, scores, key=scores.__getitem__) if rows else []
