"""How many tokens of training fit beside a step's inference. FlexLLM: Oliaro et al. 2024, arXiv 2402.18789."""

from collections import deque
from statistics import median


class Slack:
    """The largest n_ft with `latency(n_inf + n_ft) ≤ SLO` and `n_inf + n_ft ≤ T`, of a latency that steps have shown.

    `latency(n) = a + b n` goes through the last `keep` steps by medians, so that one that had to wait for something
    else moves it little: steps are put together by size (within powers of two), each size has the medians of its
    steps, b is the median of the slopes between two sizes and a that of what is left. Steps of one size differ by what
    their tokens are (of prompts, of answers, on their way back), so room is left for twice the median of
    |latency - line|: of normally distributed steps one in eleven takes longer. A step has at most twice the tokens of
    the largest of them.

    The paper has the latencies profiled before, for every number of tokens; here they are those of the running server.
    """

    def __init__(self, slo: float, most: int, keep: int = 128):
        """`slo` is the latency that a step may take, in seconds, `most` the T tokens of a step."""
        self.slo, self.most = slo, most
        self._seen = deque[tuple[int, float]](maxlen=keep)
        self._line: tuple[float, float] | None = None
        self._none = 0  # how often in turn there was no room

    def observe(self, n: int, seconds: float) -> None:
        """A step with n tokens took so long."""
        self._seen.append((n, seconds))
        self._line = None

    @property
    def line(self) -> tuple[float, float]:
        """a and b; with steps of one size, all is put down to their tokens."""
        if self._line is None:
            sizes: dict[int, list[tuple[int, float]]] = {}
            for n, seconds in self._seen:
                sizes.setdefault(n.bit_length(), []).append((n, seconds))
            points = [(median(n for n, _ in seen), median(s for _, s in seen)) for seen in sizes.values()]
            pairs = [(p, q) for p in points for q in points if q[0] > p[0]]
            slopes = [(q[1] - p[1]) / (q[0] - p[0]) for p, q in pairs] or [s / n for n, s in points]
            b = max(median(slopes), 0.0)
            self._line = max(median(s - b * n for n, s in points), 0.0), b
        return self._line

    def latency(self, n: int) -> float:
        """Seconds that a step with n tokens takes."""
        a, b = self.line
        return a + b * n

    @property
    def spread(self) -> float:
        """Seconds by which steps usually miss the line."""
        return median(abs(seconds - self.latency(n)) for n, seconds in self._seen)

    def room(self, n_inf: int, untried: int = 0, spent: float | None = None) -> int:
        """n_ft for a step with n_inf tokens of inference; 0 where they alone take the latency up.

        Where there is no inference it is at least 1: no one waits for that step, and it shows the latency anew. It is
        `untried` where none was seen, and again after it was 0 for `keep` times: steps may have become faster. Tokens
        that come after the inference have what it has left of the SLO in `spent` seconds; their time alone is observed.
        """
        least = 1 if n_inf == 0 else 0
        if not self._seen:
            return max(least, untried)
        fits = self._fitting(self.slo) - n_inf if spent is None else self._fitting(self.slo - spent)
        found = max(least, min(fits, self.most - n_inf))
        self._none = 0 if found else self._none + 1
        if self._none == self._seen.maxlen:
            self._seen.clear()
            self._none = 0
        return found

    def _fitting(self, seconds: float) -> int:
        largest = max(n for n, _ in self._seen)
        a, b = self.line
        left = seconds - a - 2 * self.spread
        fits = int(left / b + 1e-9) if b > 0 else self.most if left >= 0 else 0
        return min(fits, self.most, 2 * largest)
