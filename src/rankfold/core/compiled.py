"""Modules of ours that need a compiler which is not always there, and the threads that run what Numba compiles."""

import functools
import importlib
import importlib.util
import os
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


@functools.lru_cache(maxsize=4)
def threads(count: int) -> ThreadPoolExecutor:
    """Threads for loops that let go of the interpreter's lock."""
    return ThreadPoolExecutor(count, "rankfold-compiled")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=threads.cache_clear)  # threads do not come along
