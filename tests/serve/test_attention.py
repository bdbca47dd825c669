"""Paged attention: each way of taking it gives what a request's own keys and values give."""

import importlib.util

import pytest
import torch
from torch import Tensor

from rankfold.serve import attention
from rankfold.serve.attention import Step
from rankfold.serve.pool import Pool, Table

LAYERS, HEADS, KEY_HEADS, D, DV = 2, 6, 2, 8, 4
SIZES = ((9, 1), (1, 1), (5, 5), (18, 1), (5, 5), (11, 3), (40, 1))  # a request's tokens, and how many of them are new


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q (n, H, D) of the last of k and v (T, H_kv, ·), one token and one head after the other."""
    y = q.new_zeros(*q.shape[:2], v.shape[-1])
    for i in range(len(q)):
        end = len(k) - len(q) + i + 1
        begin = 0 if window is None else max(0, end - window)
        for h in range(HEADS):
            own = h // (HEADS // KEY_HEADS)
            y[i, h] = (k[begin:end, own] @ q[i, h] * scale).softmax(0) @ v[begin:end, own]
    return y


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "window"), [(None, None), (0.7, None), (None, 4)])
def test_each_row_attends_to_its_own_request(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, dtype: torch.dtype, scale: float | None, window: int | None
):
    if not compiled:
        monkeypatch.setattr(attention, "compiled", lambda library, module: None)
    elif importlib.util.find_spec("numba") is None:
        pytest.skip("Numba is not installed")
    torch.manual_seed(0)
    pool = Pool(LAYERS, KEY_HEADS * D, 2**16, dtype, block=4)
    pool.pages.fill_(float("nan"))  # what nobody wrote shall not be read
    texts = [[torch.randn(total, h, c, dtype=dtype) for h, c in ((HEADS, D), (KEY_HEADS, D), (KEY_HEADS, DV))]
             for total, _ in SIZES]  # fmt: skip
    tables = [Table(pool) for _ in SIZES]
    before = {i: total - new for i, (total, new) in enumerate(SIZES) if total > new}
    for counts in (before, {i: new for i, (_, new) in enumerate(SIZES)}):
        for i, n in counts.items():
            tables[i].extend(n)
        step = Step(pool, [tables[i] for i in counts], list(counts.values()))
        ends = {i: tables[i].length for i in counts}
        q, k, v = (torch.cat([texts[i][which][ends[i] - n : ends[i]] for i, n in counts.items()]) for which in range(3))
        for layer in range(LAYERS):
            y = step.attend(layer, q, k, v, scale, window).split(list(counts.values()))
            for (i, n), got in zip(counts.items(), y, strict=True):
                own_q, own_k, own_v = (t[: ends[i]] for t in texts[i])
                torch.testing.assert_close(got, dense(own_q[-n:], own_k, own_v, scale or D**-0.5, window))
