"""A job in a thread of its own that runs only in its turns, each of so many tokens."""

import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch


class StoppedError(Exception):
    """The job was told to give up, while it waited for its turn."""


class Turns:
    """Hands control between a host and a job: at any time one of them runs, and the other waits.

    The job is a function that was not written to be left halfway (a trainer's loop); it asks `take()` how many tokens
    it may go on for and says with `use()` how many it took. Random numbers that it draws are its own: those of the
    process are put back after each turn, so that neither sees how often the other was at work.
    """

    def __init__(self, job: Callable[["Turns"], None], around: Callable[[], AbstractContextManager[Any]]):
        """`around` is entered by the host around each turn."""
        self._job, self._around = job, around
        self._to_host, self._to_job = threading.Semaphore(0), threading.Semaphore(0)
        self._left, self._used, self._stopping, self._drawn = 0, 0, False, _drawn()
        self.waiting = False  # for a turn
        self.offer: Any = None  # while it waits: what the host may do for it meanwhile
        self.done = False
        self._thread = threading.Thread(target=self._run, name="rankfold-finetune", daemon=True)

    # ---- the host's side

    def start(self) -> None:
        """Let the job begin with what needs no turn."""
        self._thread.start()

    def give(self, tokens: int) -> int:
        """Let the job have one window of so many tokens, at most what it has at hand; returns how many it used.

        What it takes over that (some windows cannot be divided) is taken off its next turns. There is no second window
        for what is left: it would cost as much as a step of its own, and how long a turn takes could not be told.
        """
        if self.done or not self.waiting:
            return 0
        self._left, self._used = min(self._left, 0) + tokens, 0
        if self._left > 0:
            self._turn()
        return self._used

    def stop(self) -> None:
        """Let the job give up at the place where it is."""
        self._stopping = True
        if self.alive:
            self._to_job.release()
            self._thread.join()

    def _turn(self) -> None:
        outer = _drawn()
        _draw_on(self._drawn)
        try:
            with self._around():
                self.waiting = False
                self._to_job.release()
                self._to_host.acquire()
        finally:
            self._drawn = _drawn()
            _draw_on(outer)

    @property
    def alive(self) -> bool:
        """Whether the job has begun and is not through."""
        return self._thread.ident is not None and not self.done

    # ---- the job's side

    def take(self, offer: Any = None) -> int:
        """How many tokens may be used now: at least one. Waits for the next turn where this one is used up.

        The host may make use of `offer` while it waits.
        """
        if self._left <= 0:
            self.waiting, self.offer = True, offer
            self._to_host.release()
            self._park()
            self.offer = None
        return self._left

    def use(self, tokens: int) -> None:
        """Say what the window took."""
        self._used += tokens
        self._left = min(self._left - tokens, 0)

    def begin(self) -> None:
        """Wait for the first turn, before anything is done that must not run beside the host."""
        self.waiting = True
        self._park()

    def _park(self) -> None:
        self._to_job.acquire()
        if self._stopping:
            raise StoppedError

    def _run(self) -> None:
        try:
            self._job(self)
        finally:
            self.done = True
            self._to_host.release()


def _drawn() -> tuple[Any, ...]:
    """The states of the process's generators of random numbers."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _draw_on(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
