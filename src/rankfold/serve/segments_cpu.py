"""Products of many adapters in one batch on a processor, in one loop that Numba compiles.

S-LoRA: Sheng et al. 2023, arXiv 2311.03285. A factor is read once, from where it lies, however many rows it is for.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from rankfold.core.compiled import in_parts
from rankfold.serve.segments import LONG, Table, add_each

numba: Any = importlib.import_module("numba")
_SHARE = 2**24  # numbers below which a second thread, which torch's own keep waiting while they spin, gains nothing
_compiled: Any = functools.partial(numba.njit, cache=True, nogil=True, error_model="numpy", fastmath=True)


@_compiled()
def _add(y: Any, x: Any, numbers: Any, pieces: Any, first: int, last: int) -> None:
    """Pieces first to last."""
    n, m = x.shape[1], y.shape[1]
    for p in range(first, last):
        start, stop, a, b, k, _ = pieces[p]
        if stop - start > LONG:
            continue
        for i in range(k):
            A, B = numbers[a + i * n : a + (i + 1) * n], numbers[b + i * m : b + (i + 1) * m]
            for row in range(start, stop):
                own, into, t = x[row], y[row], A.dtype.type(0)
                for j in range(n):
                    t += own[j] * A[j]
                for j in range(m):
                    into[j] += t * B[j]


def add_products(y: Tensor, x: Tensor, table: Table) -> None:
    """As `segments.add_products`; x and y are contiguous."""
    arguments, segments = (y.numpy(), x.numpy(), table.numbers.numpy(), table.pieces.numpy()), len(table.ends) - 1
    parts = max(1, min(torch.get_num_threads(), segments, table.components * (x.shape[1] + y.shape[1]) // _SHARE))
    ends = [int(table.ends[segments * part // parts]) for part in range(parts + 1)]  # a row is one thread's alone
    in_parts(_add, arguments, ends)
    add_each(y, x, table.numbers, table.long)
