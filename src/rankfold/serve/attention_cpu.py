"""Attention of requests that add one token each, on a processor, in one loop that Numba compiles.

Paged attention: Kwon et al. 2023, arXiv 2309.06180. Keys and values are read once, from where they lie.
"""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from rankfold.core.compiled import in_parts

numba: Any = importlib.import_module("numba")
np: Any = importlib.import_module("numpy")
_SHARE = 1 << 20  # numbers read below which a second thread gains nothing


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=True)
def _attend(
    out: Any, q: Any, keys: Any, values: Any, rows: Any, begins: Any, lengths: Any, heads: int, scale: float,
    first: int, last: int,
) -> None:  # fmt: skip
    """Requests first to last. Four tokens are taken at a time: a loop over the numbers of one is too short."""
    group, d, dv = q.shape[1] // heads, q.shape[2], out.shape[2]
    weights = np.empty((group, rows.shape[1] + 3), q.dtype)
    for i in range(first, last):
        begin, end, own = begins[i], lengths[i], rows[i]
        for h in range(heads):
            for t in range(begin, end, 4):
                a, b = keys[own[t], h * d :], keys[own[min(t + 1, end - 1)], h * d :]
                c, e = keys[own[min(t + 2, end - 1)], h * d :], keys[own[min(t + 3, end - 1)], h * d :]
                for g in range(group):
                    asked = q[i, h * group + g]
                    s0 = s1 = s2 = s3 = q.dtype.type(0)
                    for j in range(d):
                        s0 += asked[j] * a[j]
                        s1 += asked[j] * b[j]
                        s2 += asked[j] * c[j]
                        s3 += asked[j] * e[j]
                    weights[g, t], weights[g, t + 1] = s0 * scale, s1 * scale
                    weights[g, t + 2], weights[g, t + 3] = s2 * scale, s3 * scale
            for g in range(group):
                most, total = weights[g, begin], q.dtype.type(0)
                for t in range(begin, end):
                    most = max(most, weights[g, t])
                for t in range(begin, end):
                    weights[g, t] = math.exp(weights[g, t] - most)
                    total += weights[g, t]
                for t in range(begin, end):
                    weights[g, t] /= total
                weights[g, end : end + 3] = 0
                out[i, h * group + g] = 0
            for t in range(begin, end, 4):
                a, b = values[own[t], h * dv :], values[own[min(t + 1, end - 1)], h * dv :]
                c, e = values[own[min(t + 2, end - 1)], h * dv :], values[own[min(t + 3, end - 1)], h * dv :]
                for g in range(group):
                    into, p = out[i, h * group + g], weights[g, t : t + 4]
                    p0, p1, p2, p3 = p[0], p[1], p[2], p[3]
                    for j in range(dv):
                        into[j] += p0 * a[j] + p1 * b[j] + p2 * c[j] + p3 * e[j]


def attend(
    q: Tensor, keys: Any, values: Any, rows: Tensor, lengths: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """(n, H, D_v) of what q (n, H, D) reads: request i attends to the last `window` (None: all) of its rows.

    These are rows[i, :lengths[i]] of the keys and values (`attention._Kept`).
    """
    out = q.new_empty(*q.shape[:2], values.d)
    begins = torch.zeros_like(lengths) if window is None else (lengths - window).clamp(min=0)
    arguments = [t.numpy() for t in (out, q.contiguous(), keys.rows, values.rows, rows, begins, lengths)]
    scale = arguments[1].dtype.type(1 / math.sqrt(keys.d) if scale is None else scale)
    n, read = len(q), int((lengths - begins).sum()) * keys.heads * (keys.d + values.d)
    parts = max(1, min(torch.get_num_threads(), n, read // _SHARE))
    in_parts(_attend, (*arguments, keys.heads, scale), [n * part // parts for part in range(parts + 1)])
    return out
