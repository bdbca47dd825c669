"""Modules of ours that need a compiler which is not always there."""

import functools
import importlib
import importlib.util
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
