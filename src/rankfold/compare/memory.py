"""The most memory that a part of a process's work takes."""

import contextlib
import ctypes
import gc
from pathlib import Path

import psutil
import torch

from rankfold.train.report import peak_memory


class Gauge:
    """`start()` where the part begins, then `peak()`: the bytes beyond what the process held at the start.

    Resident memory, or an accelerator's allocated memory where there is one. The operating system keeps the highest
    mark: Linux lets a process set its own back; elsewhere a higher peak before the start counts as well.
    """

    def __init__(self) -> None:
        self.held = 0

    def start(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
            return
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # what was freed goes back, else it would be used unseen
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.held = psutil.Process().memory_info().rss

    def peak(self) -> int:
        return max(0, _highest() - self.held)


def _highest() -> int:
    status = Path("/proc/self/status")
    if torch.cuda.is_available() or not status.exists():
        found = peak_memory()
        return found.get("accelerator", found["process"])
    # getrusage's mark, which `peak_memory` reads, is not set back with this one.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
