"""Products of many adapters in one batch: each way of taking them gives what dense matrices give."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.serve import segments
from rankfold.serve.pool import Pool
from rankfold.serve.segments import LONG, Placed, Segment, Table, add_each, add_products, as_product

RANKS = (1, 5, 16, 40)
ROWS = (1, 3, 0, LONG + 7)  # of the third adapter no row is there
WIDE, NARROW = 150, 70


def batch(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Table, Tensor]:
    """y, x, the table and what y becomes, for adapters that lie in several pages each, with rows of none between."""
    torch.manual_seed(0)
    pool = Pool(1, 60, 2**20, dtype, device)  # 1,920 numbers a page: eight components of the layer at most
    model = nn.ModuleDict({"a": nn.Linear(WIDE, NARROW, bias=False)})
    placed, dense = list[Placed](), list[Tensor]()
    pool.take(3)
    for i, rank in enumerate(RANKS):
        adapter = rankfold.attach(model, rankfold.LoRA(rank=rank, alpha=2.0 * rank), ["a"], name=f"a{i}")
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.2)
        product = as_product(adapter, pool)
        assert product is not None
        assert len(product.pages) == -(-rank // 8)
        B, A = adapter.deltas["a"].pair()
        dense.append((2 * B @ A).detach().to(device, dtype))
        placed.append(Placed(product, pool, pool.take(len(product.pages))[::-1]))
    rankfold.detach(model)
    rows = list[Segment]()
    at = 2
    for one, n in zip(placed, ROWS, strict=True):
        rows += [Segment(one, at, at + n)] * bool(n)
        at += n
    x, y = (
        torch.randn(at + 1, WIDE, device=device, dtype=dtype),
        torch.randn(at + 1, NARROW, device=device, dtype=dtype),
    )
    expected = y.clone()
    for segment in rows:
        own = slice(segment.start, segment.stop)
        expected[own] += x[own] @ dense[placed.index(segment.placed)].mT
    table = Table.of(rows, "a")
    assert table is not None
    assert Table.of(rows, "b") is None
    return y, x, table, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_get_their_own_adapters_product(dtype: torch.dtype) -> None:
    y, x, table, expected = batch(dtype)
    each = y.clone()
    add_each(each, x, table.numbers, table.pieces.tolist())
    add_products(y, x, table)
    close: dict[str, Any] = {"rtol": 0.05, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(each, expected, **close)
    torch.testing.assert_close(y, expected, **close)


def test_a_processor_loops_over_all_pieces_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = pytest.importorskip("rankfold.serve.segments_cpu", exc_type=ImportError)
    y, x, table, expected = batch()
    apart = list[Any]()
    monkeypatch.setattr(loops, "add_each", lambda y, x, numbers, pieces: apart.extend(pieces))
    add_products(y, x, table)
    assert {tuple(piece[:2]) for piece in apart} == {(6, 6 + LONG + 7)}  # the long segment's alone
    torch.testing.assert_close(y[:6], expected[:6], rtol=1e-5, atol=2e-5)


def test_threads_get_whole_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = pytest.importorskip("rankfold.serve.segments_cpu", exc_type=ImportError)
    y, x, table, expected = batch()
    assert table.components == sum(n * rank for n, rank in zip(ROWS[:3], RANKS[:3], strict=True))
    seen, plain = list[list[int]](), loops.in_parts
    monkeypatch.setattr(loops, "in_parts", lambda run, args, ends: seen.append(ends) or plain(run, args, ends))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    add_products(y.clone(), x, table)
    monkeypatch.setattr(loops, "_SHARE", 500)
    add_products(y, x, table)
    ends = table.ends.tolist()
    assert seen == [[0, ends[-1]], [0, ends[1], ends[-1]]]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5)


def test_a_table_is_kept_while_segments_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[str]()
    monkeypatch.setattr(segments, "Table", type("Noted", (), {"of": staticmethod(lambda _, path: made.append(path))}))
    products, placed = segments.Products(nn.Linear(1, 1)), object()
    for stop in (2, 2, 3):
        products.segments = [Segment(placed, 0, stop)]  # type: ignore[arg-type]
        products._table("a"), products._table("a")
        products.segments = ()
    assert made == ["a", "a"]


def check(device: str) -> None:
    from rankfold.serve import segments_cuda

    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if device == "cuda" else [])):
        y, x, table, expected = batch(dtype, device)
        segments_cuda.add_products(y, x, table)
        rtol, atol = {torch.float32: (1e-5, 2e-5), torch.float16: (0.01, 0.03)}.get(dtype, (0.05, 0.2))
        torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_in_tritons_interpreter() -> None:
    code = "from tests.serve.test_segments import check; check('cpu')"
    root, env = Path(__file__).parents[2], {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=env, timeout=300)


@pytest.mark.gpu
def test_the_kernels_on_cuda() -> None:
    pytest.importorskip("triton")
    check("cuda")
