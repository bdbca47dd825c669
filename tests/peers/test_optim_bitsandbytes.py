"""8-bit AdamW steps as bitsandbytes' does on a processor: its tables, its blocks, its weights.

Its CPU kernel looks codes up coarsely and so misses the nearest one now and then (by more than that among the small
values of v); its GPU kernel, its generic code and ours do not. So one step is compared as it is, and fifty both with
the nearest code put in its place, and as they are, by distance. A code of zero for a v above zero, which ours avoids,
does not come up with gradients of comparable sizes.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankfold import Adam8bit
from rankfold.core.eightbit import codes
from tests.methods.support import draw

bitsandbytes = pytest.importorskip("bitsandbytes")
kernels = pytest.importorskip("bitsandbytes.backends.cpu.ops")
SHAPE = (96, 50)  # 4800 numbers: the last block is not full
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


def nearest(x: Tensor, code: Tensor, largest: Tensor, out: Tensor, block: int) -> None:
    for i, part in enumerate(x.flatten().split(block)):
        largest[i] = part.abs().max()
        above = torch.searchsorted(code, part / largest[i]).clamp(max=255)
        below = (above - 1).clamp(min=0)
        is_below = (part / largest[i] - code[below]).abs() < (part / largest[i] - code[above]).abs()
        out.view(-1)[i * block :][: len(part)] = torch.where(is_below, below, above)


def walk(optimizer: Any, p: nn.Parameter) -> Iterator[None]:
    for step in range(50):
        G = draw(*SHAPE, seed=step, dtype=torch.float32)
        p.grad = G.sign() * (0.2 + G.abs()) * (1 + torch.arange(SHAPE[0]).unsqueeze(1) / 50)
        optimizer.step()
        yield


def both() -> tuple[Tensor, tuple[nn.Parameter, Any], tuple[nn.Parameter, Any]]:
    start = draw(*SHAPE, seed=99, dtype=torch.float32)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    theirs = bitsandbytes.optim.AdamW8bit([p], lr=1e-2, weight_decay=0.1, **OPTIONS)
    return start, (p, theirs), (q, Adam8bit(**OPTIONS).optimizer([{"params": [q]}], 1e-2, 0.1))


def test_the_same_step_and_tables() -> None:
    _, (p, theirs), (q, ours) = both()
    next(walk(theirs, p))
    next(walk(ours, q))
    torch.testing.assert_close(p, q, atol=2e-7, rtol=0)
    state, other = theirs.state[p], ours.state[q]
    for name, place in (("m", "1"), ("v", "2")):
        table = codes(name == "m", torch.float32, torch.device("cpu"))
        assert torch.equal(state[f"qmap{place}"], table)
        torch.testing.assert_close(state[f"absmax{place}"], other[f"{name}.largest"], atol=0, rtol=1e-6)
        assert state[f"state{place}"].nbytes == other[f"{name}.code"].nbytes


def test_fifty_steps_with_the_nearest_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_quant_blockwise_fp32_direct", nearest)
    start, (p, theirs), (q, ours) = both()
    for _ in zip(walk(theirs, p), walk(ours, q), strict=True):
        pass
    # But for the few numbers that once were midway between two codes, to the last digit.
    assert ((p - q).abs() > 1e-6).float().mean() < 0.002
    assert (p - q).norm() < 1e-3 * (q - start).norm()
    for name, place in (("m", "1"), ("v", "2")):
        same = theirs.state[p][f"state{place}"].flatten() == ours.state[q][f"{name}.code"]
        assert same.float().mean() > 0.998


def test_fifty_steps_as_they_are() -> None:
    start, (p, theirs), (q, ours) = both()
    exact = nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.1, **OPTIONS)
    for _ in zip(walk(theirs, p), walk(ours, q), walk(adamw, exact), strict=True):
        pass
    way, apart = (exact - start).norm(), (p - q).norm()
    assert 0 < apart < 0.01 * way
    assert (q - exact).norm() < 1.05 * (p - exact).norm()  # no further from AdamW than theirs
