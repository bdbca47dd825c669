"""A request for tokens, and what becomes of it."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rankfold.errors import RankfoldError

Finish = Literal["stop", "length", "cancelled"]
_numbers = itertools.count()


class OverloadedError(RankfoldError):
    """More requests wait than are accepted; `retry_after` seconds from now there may be room."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the most probable one at temperature 0, else drawn from softmax(logits / temperature),
    cut to the smallest set of tokens whose probabilities sum to `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise RankfoldError(f"temperature is {self.temperature}: give a number from 0 to 100")
        if not 0 < self.top_p <= 1:
            raise RankfoldError(f"top_p is {self.top_p}: give a number over 0 and up to 1")

    def generator(self) -> torch.Generator:
        generator = torch.Generator()
        generator.seed() if self.seed is None else generator.manual_seed(self.seed & (1 << 63) - 1)
        return generator

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token for logits (V,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        p = torch.softmax(logits.float().cpu() / self.temperature, 0)
        if self.top_p < 1:
            p, order = p.sort(descending=True, stable=True)
            p[p.cumsum(0) - p >= self.top_p] = 0
            return int(order[torch.multinomial(p, 1, generator=generator)])
        return int(torch.multinomial(p, 1, generator=generator))


class Request:
    """Tokens asked of an engine. Iterate it for the tokens as they come, or wait for `result()`.

    Attributes:
        prompt: the token ids given.
        adapter: the adapter's name, or None for the base.
        tokens: the ids made so far, an end-of-text token left out.
        logprobs: where asked for, the log-probability of each, and of the `top` likeliest as (id, log-probability).
        finish: "stop" after an end-of-text token, "length" or "cancelled"; None until then.
        error: what went wrong, if it did.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        adapter: str | None,
        max_new_tokens: int,
        sampling: Sampling,
        ends: frozenset[int],
        top: int | None,
        listener: Callable[["Request", int | None], None] | None,
    ):
        self.number = next(_numbers)
        self.prompt, self.adapter, self.max_new_tokens = list(prompt), adapter, max_new_tokens
        self.sampling, self.ends, self.top = sampling, ends, top
        self.tokens: list[int] = []
        self.logprobs: list[tuple[float, list[tuple[int, float]]]] = []
        self.finish: Finish | None = None
        self.error: Exception | None = None
        self.submitted = time.monotonic()
        self.first_token: float | None = None
        self.cancelled = False
        self._listener = listener
        self._generator = sampling.generator()
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._drive: Callable[[], bool] | None = None
        # The engine's own
        self.table: Any = None
        self.read = 0  # tokens of prompt and answer whose keys and values are in the pool

    @property
    def done(self) -> bool:
        return self._done.is_set()

    @property
    def unread(self) -> int:
        """Tokens of prompt and answer that the model has yet to read; 1 for a request that is writing."""
        return len(self.prompt) + len(self.tokens) - self.read

    @property
    def load(self) -> tuple[int, int]:
        """Tokens whose keys and values it has or is about to have, and how many more it may come to."""
        return len(self.prompt) + len(self.tokens), self.max_new_tokens - len(self.tokens) - 1

    def cancel(self) -> None:
        """Give it up; its pages are free after the step that is under way."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> list[int]:
        """All tokens, when they are there. Raises what went wrong, or TimeoutError."""
        while self._drive is not None and not self.done and self._drive():
            pass
        if not self._done.wait(timeout):
            raise TimeoutError(f"request {self.number} has no answer after {timeout} s")
        if self.error is not None:
            raise self.error
        return self.tokens

    def __iter__(self) -> Iterator[int]:
        while True:
            while self._drive is not None and self._queue.empty() and not self.done and self._drive():
                pass
            token = self._queue.get()
            if token is None:
                if self.error is not None:
                    raise self.error
                return
            yield token

    # ---- the engine's side

    def next(self, count: int) -> list[int]:
        """So many of the tokens that are to be read next."""
        begin, prompt = self.read, self.prompt
        if begin + count <= len(prompt):
            return prompt[begin : begin + count]
        begin -= len(prompt)
        return (prompt[begin:] if begin < 0 else []) + self.tokens[max(begin, 0) : begin + count]

    def take(self, logits: Tensor) -> None:
        """The next token from its logits (V,); `finish` says so where that is the last one. Raises for NaN."""
        if not bool(logits.max().isfinite()):
            raise RankfoldError("the logits hold NaN or infinity: the model, or its adapter, overflows on this text")
        token = self.sampling.choose(logits, self._generator)
        if self.first_token is None:
            self.first_token = time.monotonic()
        if token in self.ends:
            self.finish = "stop"
            return
        if self.top is not None:
            p = torch.log_softmax(logits.float(), 0)
            likeliest = p.topk(min(self.top, len(p)))
            pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            self.logprobs.append((float(p[token]), list(pairs)))
        self.tokens.append(token)
        self._queue.put(token)
        if self._listener is not None:
            self._listener(self, token)
        if len(self.tokens) == self.max_new_tokens:
            self.finish = "length"

    def end(self, finish: Finish | None, error: Exception | None = None) -> None:
        """Tell who asked that nothing more comes; its memory is free by then."""
        self.finish, self.error = finish, error
        self._done.set()
        self._queue.put(None)
        if self._listener is not None:
            self._listener(self, None)
