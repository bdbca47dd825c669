"""Modules of ours that need a compiler which is not always there, and the threads that run what Numba compiles."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


@functools.cache
def compiled(library: str, module: str) -> Any:
    """`module`, where `library` (numba, triton) is installed and works; else None."""
    if importlib.util.find_spec(library) is None:
        return None
    try:
        return importlib.import_module(module)
    except RuntimeError:  # Numba finds no folder where it may keep what it compiles
        return None


def in_parts(run: Callable[..., None], arguments: Sequence[Any], ends: Sequence[int]) -> None:
    """`run(*arguments, first, last)` for each two of `ends` that follow each other, in a thread each.

    `run` is a loop that lets go of the interpreter's lock; the first part is this thread's own.
    """
    others = [
        _threads(len(ends) - 1).submit(run, *arguments, *ends[part : part + 2]) for part in range(1, len(ends) - 1)
    ]
    run(*arguments, *ends[:2])
    for other in others:
        other.result()


@functools.lru_cache(maxsize=4)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "rankfold-compiled")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not come along
