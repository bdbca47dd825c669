"""Requests of any adapters in one batch, one forward a step.

Continuous batching over paged keys and values (arXiv 2309.06180) and paged adapters (S-LoRA, arXiv 2311.03285).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.serve.library import Library
from rankfold.serve.pool import BLOCK, Pool, PoolFullError, Table
from rankfold.serve.request import OverloadedError, Request, Sampling
from rankfold.serve.runner import Runner
from rankfold.serve.schedule import in_turn, peak, too_late
from rankfold.serve.slack import Slack

if TYPE_CHECKING:
    from rankfold.serve.finetune import Job
    from rankfold.serve.guest import Window

T = TypeVar("T")


class ClosedError(RankfoldError):
    """The engine takes no more requests."""


class AdapterInUseError(RankfoldError):
    """Requests that were accepted still need the adapter as it was."""


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What an engine takes on at once.

    Args:
        batch: requests that run together.
        step_tokens: rows of one forward; prompts are read in parts where they are longer.
        waiting: requests that may wait; further ones are refused (`OverloadedError`).
        distinct: adapters in a batch from which on requests of those go first.
        patience: seconds after which nobody overtakes a waiting request.
        first_token: seconds within which a request's first token shall come. One that waits longer is refused
            (`OverloadedError`), and for so long after that those that came last go first. None: all wait.
        latency: seconds that a step shall take at most; what its requests leave of them is a fine-tuning job's.
    """

    batch: int = 64
    step_tokens: int = 512
    waiting: int = 1024
    distinct: int = 32
    patience: float = 5.0
    first_token: float | None = None
    latency: float = 0.25


class Engine:
    """Serves a causal language model of Transformers and the adapters of a folder.

    A request's tokens do not depend on the requests it runs beside, up to rounding. Use it in one of two ways: call
    `step()` yourself (or just ask a request for its result, which does), or `start()` a thread that does. While an
    engine is open the model is its own.

    Args:
        model: without adapters of its own; its weights stay where they are.
        adapters: a folder whose subfolders are adapters, by their names; None to serve the base alone.
        max_memory: bytes of the pool for keys, values and adapters.
        host_memory: bytes of adapters kept in host memory beside it.
        limits: see `Limits`.

    Raises:
        UnsupportedError: the model attends in a way that pages cannot serve; that is tried out on a few tokens.
        RankfoldError: the pool cannot hold a page, or `adapters` is no folder.
    """

    def __init__(
        self,
        model: Any,
        adapters: str | Path | None = None,
        *,
        max_memory: int = 1 << 30,
        host_memory: int = 1 << 30,
        limits: Limits = Limits(),
        block: int = BLOCK,
    ):
        folder = None if adapters is None else Path(adapters)
        if folder is not None and not folder.is_dir():
            raise RankfoldError(f"{folder} is no folder: give the one whose subfolders are adapters")
        self.model, self.limits, self.ends = model, limits, _ends(model)
        self.runner = Runner(model, folder, max_memory, host_memory, block)
        self.pool: Pool = self.runner.pool
        self.library: Library = self.runner.library
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._errands: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._mutex, self._stepping = threading.Lock(), threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closing = False
        kinds = ("steps", "rows", "tokens", "finished", "failed", "cancelled", "preempted", "trained", "trained_beside")
        self.counts = dict.fromkeys(kinds, 0)
        self.per_request = 1.0  # seconds that one takes, of late
        self._overloaded = float("-inf")  # when a request was last refused for coming too late
        self.clock = time.perf_counter  # what a step takes is counted by
        # Of a step's forward, and of the training behind it.
        self.slack, self.slack_behind = (Slack(limits.latency, limits.step_tokens) for _ in range(2))
        self.jobs: list[Job] = []

    # ---- asking

    def submit(
        self,
        prompt: Sequence[int],
        adapter: str | None = None,
        max_new_tokens: int = 16,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        ends: Iterable[int] | None = None,
        logprobs: int | None = None,
        listener: Callable[[Request, int | None], None] | None = None,
    ) -> Request:
        """Ask for tokens behind a prompt of token ids.

        Args:
            adapter: a name of the library, or None for the base.
            max_new_tokens: at most so many.
            temperature: 0 takes the likeliest token.
            top_p: draw among the likeliest tokens of that probability together.
            seed: of the draws; the same seed gives the same tokens in any batch.
            ends: ids that end the answer; default: those of the model.
            logprobs: note log-probabilities, and those of so many of the likeliest tokens.
            listener: called by the engine's thread as `listener(request, token)`, with None at the end.

        Raises:
            UnknownAdapterError: there is none of that name.
            RankfoldError: the prompt is empty, too long or not of the model's ids, or an option is out of its range.
            OverloadedError: too many requests wait.
        """
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not prompt:
            raise RankfoldError("the prompt is empty: give at least one token")
        if max_new_tokens < 1:
            raise RankfoldError(f"max_new_tokens is {max_new_tokens}: ask for at least one")
        if not all(0 <= token < vocabulary for token in prompt):
            raise RankfoldError(f"the prompt has token ids outside of 0 to {vocabulary - 1}")
        total = len(prompt) + max_new_tokens
        if context is not None and total > context:
            raise RankfoldError(
                f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones are more than the model's {context}"
            )
        if peak([(0, total - 1)], self.pool.block) > len(self.pool):
            raise RankfoldError(
                f"{total} tokens need more than the whole pool of {len(self.pool)} pages: ask for fewer, or raise "
                "max_memory"
            )
        if adapter is not None:
            self.library.check(adapter)
        sampling = Sampling(temperature, top_p, seed)
        request = Request(
            prompt,
            adapter,
            max_new_tokens,
            sampling,
            self.ends if ends is None else frozenset(ends),
            logprobs,
            listener,
        )
        with self._mutex:
            if self._closing:
                raise ClosedError("the engine is closed")
            if len(self._waiting) >= self.limits.waiting:
                raise self._overload(f"{len(self._waiting)} requests wait already")
            if self._thread is None:
                request._drive = self.step
            self._waiting.append(request)
        self._wake.set()
        return request

    def _overload(self, why: str) -> OverloadedError:
        wait = max(1.0, len(self._waiting) * self.per_request / self.limits.batch)
        return OverloadedError(f"{why}: try again later", wait)

    def unload(self, adapter: str) -> None:
        """Take an adapter out of service, until `restore`. What was accepted is answered, then its memory is free."""
        self.library.withdraw(adapter)
        self.between(lambda: self._drop_withdrawn(adapter))

    def restore(self, adapter: str) -> None:
        """Serve an adapter again that was unloaded; its files are read anew. To be called between two steps."""
        self._drop_withdrawn(adapter)
        if adapter in self.library.withdrawn and self.library.entry(adapter) is not None:
            raise AdapterInUseError(f"requests for {adapter!r} as it was are still being answered: try again later")
        self.library.withdrawn.discard(adapter)

    def _drop_withdrawn(self, adapter: str | None) -> None:
        with self._mutex:
            used = any(r.adapter == adapter for r in (*self._waiting, *self._running))
        if adapter in self.library.withdrawn and not used:
            self.library.drop(adapter)

    # ---- running

    @property
    def alive(self) -> bool:
        """Whether a thread steps."""
        return self._thread is not None and self._thread.is_alive()

    def between(self, errand: Callable[[], T]) -> "Future[T]":
        """Have `errand` called between two steps, by whoever steps, where nothing else uses model, pool or library."""
        future: Future[T] = Future()
        self._errands.append((future, errand))
        self._wake.set()
        if not self.alive:
            with self._stepping:
                self._run_errands()
        return future

    def _run_errands(self) -> None:
        while self._errands:
            future, errand = self._errands.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(errand())
                except BaseException as error:
                    future.set_exception(error)

    def step(self) -> bool:
        """One forward for all that run, and what fits beside it of a fine-tuning job; False if there is nothing."""
        with self._stepping:
            self._run_errands()
            self._drop_cancelled()
            self._admit()
            if self._work_off(self._batch()):
                return True
            with self._mutex:
                waits = bool(self._waiting)
            if waits:
                self.library.wait(0.05)
            return waits

    def train(self, job: "Job") -> "Future[None]":
        """Train a job beside the requests, in the time that they leave of each step (FlexLLM, arXiv 2402.18789)."""
        return self.between(lambda: self.jobs.append(job))

    def _work_off(self, batch: list[tuple[Request, int]]) -> int:
        """A step of these requests' next tokens, and of the first job that can go on; returns how many tokens it had.

        A step has no more than one forward but for training that has to go by itself.
        """
        rows, began = sum(n for _, n in batch), self.clock()
        job = next((job for job in self.jobs if not job.ended and job.ready), None)
        room = self.slack.room(rows) if job is not None and batch else 0
        window = job.window(room) if job is not None and room else None
        beside = self._advance(batch, window) if batch else 0
        behind, inferred = 0, self.clock()
        if batch:
            self.slack.observe(rows + beside, inferred - began)
        if job is not None and window is None and (room or not batch):
            room = self.slack_behind.room(rows, room, inferred - began)
            behind = job.advance(room) if room else 0
            if behind:
                self.slack_behind.observe(behind, self.clock() - inferred)
        self.counts["trained"] += beside + behind
        self.counts["trained_beside"] += beside
        return rows + beside + behind

    def start(self) -> "Engine":
        """Step in a thread of its own, until `close`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="rankfold-engine", daemon=True)
            self._thread.start()
        return self

    def _loop(self) -> None:
        while not self._closing or self._running or self._waiting:
            try:
                busy = self.step()
            except Exception as error:  # nobody shall wait for ever
                _log.exception("a step failed, and all requests with it")
                busy = False
                with self._mutex:
                    gone = [*self._running, *self._waiting]
                    self._waiting.clear()
                for request in gone:
                    self._finish(request, None, error)
            if not busy:
                self._wake.wait(0.1)
                self._wake.clear()
        with self._stepping:
            self._run_errands()

    def close(self, drain: bool = True) -> None:
        """Finish what was accepted, or with `drain=False` cancel it; the model is as it was found, then."""
        with self._mutex:
            self._closing = True
            if not drain:
                for request in (*self._waiting, *self._running):
                    request.cancel()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        else:
            while self._running or self._waiting:
                self.step()
        for job in self.jobs:
            job.close()
        self.runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(drain=kind is None)

    # ---- one step

    def _drop_cancelled(self) -> None:
        with self._mutex:
            gone = [r for r in self._waiting if r.cancelled]
            self._waiting = deque(r for r in self._waiting if not r.cancelled)
        for request in [*gone, *(r for r in self._running if r.cancelled)]:
            self._finish(request, "cancelled")

    def _finish(self, request: Request, finish: Any, error: Exception | None = None) -> None:
        if request in self._running:
            self._running.remove(request)
            self.counts["failed" if error else "cancelled" if finish == "cancelled" else "finished"] += 1
        if request.table is not None:
            request.table.free()
        if not request.done:
            request.end(finish, error)
        if request.adapter in self.library.withdrawn:
            self._drop_withdrawn(request.adapter)
        if error is None and finish != "cancelled":
            self.per_request += 0.1 * (time.monotonic() - request.submitted - self.per_request)

    def _present(self) -> set[str]:
        return {r.adapter for r in self._running if r.adapter is not None}

    def _admit(self) -> None:
        """Let waiting requests join while all of them, to their ends, fit into the pool."""
        with self._mutex:
            waiting = list(self._waiting)
        if not waiting:
            return
        joined, limits, now = list[Request](), self.limits, time.monotonic()
        if limits.first_token is not None:
            for request in too_late(waiting, limits.first_token, now):
                self._overloaded = now
                waiting.remove(request)
                joined.append(request)
                self._finish(request, None, self._overload(f"no first token within {limits.first_token} s"))
        hurried = limits.first_token is not None and now - self._overloaded < limits.first_token
        for request in in_turn(waiting, self._present(), limits.distinct, limits.patience, now, hurried):
            if len(self._running) >= self.limits.batch:
                break
            twin = self._twin(request)
            if twin is not None and twin.read < len(twin.prompt):
                continue  # its prompt is being read, and need not be read twice
            try:
                fits = self._fits(request)
            except Exception as error:  # the adapter cannot be read: its own requests fail, and no others
                joined.append(request)
                self._finish(request, None, error)
                self.counts["failed"] += 1
                continue
            if fits is None:  # its adapter is being read: later ones need not wait for that
                continue
            if not fits:
                break
            known = 0 if twin is None else len(twin.prompt) - 1
            request.table, request.read = Table(self.pool) if twin is None else twin.table.fork(known), known
            if request.adapter is not None and request.first_token is None:
                self.library.used(request.adapter)
            self._running.append(request)
            joined.append(request)
        with self._mutex:
            for request in joined:
                self._waiting.remove(request)
        later = dict.fromkeys(r.adapter for r in waiting if r.adapter is not None and r not in joined)
        self.library.read_ahead(islice(later, limits.distinct))

    def _twin(self, request: Request) -> Request | None:
        """Who runs with the same prompt under the same adapter, where that is more than a page."""
        if len(request.prompt) <= self.pool.block:
            return None
        same = (r for r in self._running if r.adapter == request.adapter and r.prompt == request.prompt)
        return next(same, None)

    def _fits(self, request: Request) -> bool | None:
        """Whether it can run to its end beside all that run, its adapter brought into the pool; None: not yet read."""
        present, own = self._present(), 0
        entry = None
        if request.adapter is not None:
            entry = self.library.ready(request.adapter)
            if entry is None:
                return None
            own = 0 if request.adapter in present else entry.size
        charged = sum(e.size for e in self.library.in_pool if e.name in present) + own
        loads = [r.load for r in (*self._running, request)]
        if peak(loads, self.pool.block) + charged > len(self.pool):
            if not self._running:
                raise RankfoldError(
                    f"the request and its adapter {request.adapter!r} need more than all {len(self.pool)} pages of "
                    "memory: ask for fewer tokens, or raise max_memory"
                )
            return False
        if entry is None or entry.in_pool:
            return True
        self.library.make_room(entry.size, present.__contains__)
        try:
            self.library.place(entry)
        except PoolFullError:  # large tensors need pages side by side
            self.library.make_room(len(self.pool), present.__contains__)
            try:
                self.library.place(entry)
            except PoolFullError:
                if not self._running:
                    raise
                return False
        return True

    def _batch(self) -> list[tuple[Request, int]]:
        """Who has how many rows in the next forward: who writes has one, what is yet to be read shares what is left."""
        left = self.limits.step_tokens
        rows: dict[Request, int] = {}
        for request in sorted(self._running, key=lambda r: r.unread > 1):
            if left:
                rows[request] = min(request.unread, left)
                left -= rows[request]
        while not self._room(rows):
            # The last that came starts again later: what it wrote is kept, and read like a prompt.
            last = self._running.pop()
            rows.pop(last, None)
            last.table.free()
            last.read = 0
            self.counts["preempted"] += 1
            with self._mutex:
                self._waiting.appendleft(last)
        return sorted(rows.items(), key=lambda item: (item[0].adapter or "", item[0].number))

    def _room(self, rows: Mapping[Request, int]) -> bool:
        """Whether the pool has pages for these rows, after adapters that nobody uses have left it."""
        needed = sum(r.table.needs(n) for r, n in rows.items())
        return self.library.make_room(needed, self._present().__contains__)

    def _advance(self, batch: list[tuple[Request, int]], window: "Window | None") -> int:
        """One forward; returns how many of the window's training tokens went through the model with it."""
        for request, n in batch:
            request.table.extend(n)
        done = 0 if window is None else window.run.done
        try:
            logits = self.runner.forward(batch, window)
        except Exception as error:
            if len(batch) == 1 and window is None:
                self._finish(batch[0][0], None, error)
                return 0
            logits = self._apart(batch)
        self.counts["steps"] += 1
        self.counts["rows"] += sum(n for _, n in batch)
        at = 0
        for request, n in batch:
            if request.done:
                continue
            request.read += n
            if request.unread:
                continue
            try:
                request.take(logits[at])
                self.counts["tokens"] += 1
            except Exception as error:
                self._finish(request, None, error)
            at += 1
            if request.finish is not None:
                self._finish(request, request.finish)
        return 0 if window is None else window.run.done - done

    def _apart(self, batch: list[tuple[Request, int]]) -> Tensor:
        """Each request in a forward of its own, after one of all failed; those that fail again are ended."""
        logits = []
        for request, n in batch:
            try:
                logits.append(self.runner.forward([(request, n)]))
            except Exception as error:
                self._finish(request, None, error)
        return torch.cat(logits) if logits else torch.empty(0)

    # ---- what it is doing

    def stats(self) -> dict[str, Any]:
        """Numbers for monitoring: what was done, who runs and waits, and whose the pages are."""
        with self._mutex:
            waiting = len(self._waiting)
        adapters = self.library.in_pool
        held = sum(len(e.pages) for e in adapters)
        return {
            **self.counts,
            **{f"adapters_{name}": count for name, count in self.library.counts.items()},
            "running": len(self._running),
            "waiting": waiting,
            "pages": len(self.pool),
            "pages_used": self.pool.used,
            "pages_adapters": held,
            "pages_tokens": self.pool.used - held,
            "adapters_in_pool": len(adapters),
        }


def _ends(model: Any) -> frozenset[int]:
    """The ids that end an answer, by the model's generation settings."""
    settings = getattr(model, "generation_config", None) or model.config
    ends = getattr(settings, "eos_token_id", None)
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
