"""Many adapters served on one base: `Engine` batches requests of any of them, `rankfold serve` speaks HTTP."""

from rankfold.serve.engine import Engine
from rankfold.serve.request import OverloadedError, Request

__all__ = ["Engine", "OverloadedError", "Request"]
