"""Tensors stored as codes: exact round trips, sizes, and whatever a stranger may write in their place."""

import json
import math
import struct
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankfold
from rankfold.compose.compress import compress
from rankfold.core import checkpoint
from rankfold.core.codecs import Levels, Ternary, write_levels, write_ternary
from rankfold.core.document import _embedded, deflated
from rankfold.core.levels import levels, quantise
from rankfold.core.tensorfile import Entry
from rankfold.errors import AdapterFileError
from tests.core.test_hostile_files import join, split


def entry(tensor: Tensor) -> Entry:
    return Entry(tensor.dtype, tuple(tensor.shape), 0, 0)


def raw(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def entropy(k: float) -> float:
    return -sum(p * math.log2(p) for p in (k, 1 - k) if p)


def drawn(d: int, k: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(d) < k, rng.integers(0, 2, d) * 2 - 1, 0).astype(np.int8)


# ---- ternary


@pytest.mark.parametrize("k", [0, 0.001, 0.05, 0.3, 0.5, 0.7, 1])
@pytest.mark.parametrize("d", [1, 2, 9, 1000])
def test_ternary_gives_back_what_it_got(d: int, k: float) -> None:
    signs = drawn(d, k, seed=d)
    shapes = [(d - d // 3,), (d // 3,)] if d > 2 else [(d,)]
    read = Ternary(raw(write_ternary(signs, 0.3)), [Entry(torch.float32, shape, 0, 0) for shape in shapes])
    whole = torch.cat([read.tensor(i) for i in range(len(shapes))])
    assert torch.equal(whole, torch.from_numpy(signs).float() * torch.tensor(0.3))


@pytest.mark.parametrize("k", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8])
def test_ternary_takes_what_the_formula_says(k: float) -> None:
    """d (H(k) + k) + 16 bits, within 3 %."""
    signs = drawn(200_000, k)
    k = float((signs != 0).mean())
    formula = len(signs) * (entropy(k) + k) + 16
    assert formula <= 8 * len(write_ternary(signs, 1.0)) <= 1.03 * formula


def test_the_formula_itself() -> None:
    """The card's figures: 0.3364 bits an entry at k = 5 %, 47.6 times below 16; 0.9219 and 17.4 at 20 %."""
    assert entropy(0.05) + 0.05 == pytest.approx(0.3364, abs=5e-5)
    assert 16 / (entropy(0.05) + 0.05) == pytest.approx(47.6, abs=0.05)
    assert entropy(0.2) + 0.2 == pytest.approx(0.9219, abs=5e-5)
    assert 16 / (entropy(0.2) + 0.2) == pytest.approx(17.4, abs=0.05)


def test_ternary_is_quick() -> None:
    """Two million numbers, both ways, in well under a second: nothing loops over them."""
    import time

    signs, began = drawn(2_000_000, 0.2), time.perf_counter()
    Ternary(raw(write_ternary(signs, 1.0)), [Entry(torch.float32, signs.shape, 0, 0)])
    assert time.perf_counter() - began < 2


# ---- levels


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_medians_between_midpoints(bits: int) -> None:
    """The fixed point of the iteration for the absolute error under N(0, 1); ±0.6745 for 1 bit."""
    normal, values = NormalDist(), levels(bits)
    assert len(values) == 2**bits
    assert list(values) == [-value for value in reversed(values)]
    masses = [0.0, *(normal.cdf((low + high) / 2) for low, high in pairwise(values)), 1.0]
    assert [normal.inv_cdf((low + high) / 2) for low, high in pairwise(masses)] == pytest.approx(values, abs=2e-6)


def test_levels_of_the_card() -> None:
    assert levels(1)[1] == pytest.approx(0.6745, abs=5e-5)
    assert levels(2)[2:] == pytest.approx((0.3778, 1.2657), abs=5e-5)
    assert sum(levels(2)[2:]) / 2 == pytest.approx(0.8217, abs=5e-5)  # the boundary


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_of_levels_give_what_the_quantiser_gave(bits: int, dtype: torch.dtype) -> None:
    """Matrices, a stack of them with a μ and σ each, a vector, one number, and a constant."""
    torch.manual_seed(0)
    tensors = [torch.randn(*shape).to(dtype) for shape in ((7, 5), (3, 4, 5), (9,), (1,))] + [
        torch.ones(2, 3).to(dtype)
    ]
    data = write_levels(tensors, bits)
    read = Levels(raw(data), [entry(tensor) for tensor in tensors])
    for i, tensor in enumerate(tensors):
        assert torch.equal(read.tensor(i), quantise(tensor, bits))
    number = 8 if dtype == torch.float64 else 4
    assert len(data) == 1 + sum(2 * number * n for n in (1, 3, 1, 1, 1)) + sum(
        (n * bits + 7) // 8 for n in (35, 60, 9, 1, 6)
    )


def test_the_size_of_a_pair() -> None:
    """768×32 and back at one bit: 2 · 24576 + 128 bits, 6.2 kB, and a byte that says the bits."""
    assert len(write_levels([torch.randn(32, 768), torch.randn(768, 32)], 1)) == (2 * 24576 + 128) // 8 + 1


# ---- the file


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(4, 6), "head": nn.Linear(4, 2)})


@pytest.fixture(scope="module", params=["compeft", "onebit", "from start"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The one file of a compressed adapter."""
    model = net()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=2), ["a", "b"], modules_to_save=["head"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    how = rankfold.ComPEFT(from_start=True, density=0.4) if request.param == "from start" else request.param
    path, _ = compress(adapter, how, tmp_path_factory.mktemp("good"))
    assert [file.name for file in path.iterdir()] == ["adapter.safetensors"]
    return (path / "adapter.safetensors").read_bytes()


def place(folder: Path, data: bytes) -> Path:
    (folder / "adapter.safetensors").write_bytes(data)
    return folder


def document(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The header, the document in it, and the data."""
    header, rest = split(data)
    return header, json.loads(_embedded(header["__metadata__"]["rankfold"], "")), rest


def changed(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    header, said, rest = document(data)
    change(said)
    header["__metadata__"]["rankfold"] = deflated(json.dumps(said))
    return join(header, rest)


def refused(folder: Path, data: bytes, words: str) -> None:
    place(folder, data)
    model = net()
    for read in (lambda: rankfold.load(model, folder), lambda: checkpoint.SavedDeltas(folder).whole()):
        with pytest.raises(AdapterFileError, match=words) as caught:
            read()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1500
    assert not rankfold.adapters(model)


def first(said: dict[str, Any]) -> dict[str, Any]:
    return said["encoding"]["codes"][0]


def tensor(said: dict[str, Any]) -> dict[str, Any]:
    return first(said)["tensors"]["deltas.a.A"]


def test_the_good_file_loads(tmp_path: Path, good: bytes) -> None:
    rankfold.load(net(), place(tmp_path, good))
    rankfold.load(net(), place(tmp_path, changed(good, lambda said: None)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda said: first(said).update(codec="zip"), "coded by 'zip'.*upgrade"),
        (lambda said: first(said).update(bytes=7), "no tensor 'coded' of 7 bytes"),
        (lambda said: first(said).update(bytes=-7), "greater than or equal to 0"),
        (lambda said: said["encoding"].update(codes=[]), "no tensor 'coded' of 0 bytes"),
        (lambda said: said["encoding"]["codes"].append(first(said)), "no tensor 'coded'"),
        (lambda said: said["encoding"]["codes"].append({**first(said), "bytes": 0}), "there twice"),
        (lambda said: first(said)["tensors"].update({"modules.head.weight": tensor(said)}), "there twice"),
        (lambda said: first(said)["tensors"].update({"a\nb": tensor(said)}), "has no name"),
        (lambda said: first(said)["tensors"].pop("deltas.a.A"), "numbers and the file holds|lacks deltas.a.A"),
        (lambda said: tensor(said).update(shape=[2, 7]), r"shape \(2, 7\), expected|code of"),
        (lambda said: tensor(said).update(shape=[1 << 40, 6]), "bytes are to be .* numbers"),
        (lambda said: tensor(said).update(shape=[1 << 50, 6]), "less than 281474976710656"),
        (lambda said: tensor(said).update(shape=[-2, -6]), "greater than or equal to 0"),
        (lambda said: tensor(said).update(shape=[]), "at least 1 item"),
        (lambda said: tensor(said).update(dtype="int64"), "'float64', 'float32'"),
        (lambda said: said.update(encoding=None), "numbers and the file holds|lacks"),
        (lambda said: said["encoding"].update(from_start=1), "boolean"),
        (lambda said: said["method"].update(rank=10**9), "numbers"),
    ],
)
def test_documents_that_lie(change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path, good: bytes) -> None:
    refused(tmp_path, changed(good, change), words)


def test_a_document_that_cannot_be_inflated(tmp_path: Path, good: bytes) -> None:
    import base64
    import zlib

    header, said, rest = document(good)

    def put(text: str) -> bytes:
        return join({**header, "__metadata__": {"rankfold": text}}, rest)

    whole = deflated(json.dumps(said))
    refused(tmp_path, put("deflate:é"), "cannot be inflated")
    refused(tmp_path, put("deflate:abc\x00"), "cannot be inflated")
    refused(tmp_path, put(whole[:-30]), "cannot be inflated|cut short")
    bomb = base64.b85encode(zlib.compress(b" " * (33 << 20), 9)).decode()
    tracemalloc.start()
    refused(tmp_path, put("deflate:" + bomb), "larger than")
    assert tracemalloc.get_traced_memory()[1] < 150 << 20
    tracemalloc.stop()


def test_a_small_file_cannot_ask_for_much(tmp_path: Path) -> None:
    """Zeros take no bits: a file of a few bytes that is to be a hundred million of them is refused unread."""
    model = nn.ModuleDict({"a": nn.Linear(1, 1)})
    path, _ = compress(rankfold.attach(model, rankfold.LoRA(rank=1), ["a"]), "compeft", tmp_path / "x")
    data = (path / "adapter.safetensors").read_bytes()

    def change(said: dict[str, Any]) -> None:
        said["sites"]["a"]["shape"] = [10**8, 1]
        said["encoding"]["codes"][0]["tensors"]["deltas.a.B"]["shape"] = [10**8, 1]

    tracemalloc.start()
    with pytest.raises(AdapterFileError, match="it is hostile"):
        checkpoint.SavedDeltas(place(tmp_path, changed(data, change)))
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_a_start_that_needs_the_base(tmp_path: Path, good: bytes) -> None:
    """A method whose start reads the weights, under codes that are differences to the start."""

    def change(said: dict[str, Any]) -> None:
        said["encoding"]["from_start"] = True
        said["method"] = {"name": "lora-xs", "rank": 2}

    refused(tmp_path, changed(good, change), "cannot be made|lacks|numbers")


def test_ternary_refuses_what_no_writer_made() -> None:
    data, shape = write_ternary(drawn(100, 0.1), 1.0), [Entry(torch.float32, (100,), 0, 0)]
    count = int((drawn(100, 0.1) != 0).sum())

    def head(scale: float = 1.0, low: int = 3, sparse: int = 1, count: int = count) -> bytes:
        return struct.pack("<dBBQ", scale, low, sparse, count) + data[18:]

    Ternary(raw(head(low=data[8])), shape)
    for bad, words in (
        (data[:10], "cut short"),
        (head(low=21), "do not fit"),
        (head(low=255), "do not fit"),
        (head(sparse=2), "do not fit"),
        (head(count=101), "do not fit"),
        (head(count=2**64 - 1), "do not fit"),
        (head(sparse=0), "do not fit"),
        (data[:-2], "gaps are listed|do not fit"),
        (data + b"\0", "stand behind"),
        (data + b"\1", "gaps are listed"),
    ):
        with pytest.raises(ValueError, match=words):
            Ternary(raw(bad), shape)
    with pytest.raises(ValueError, match=r"number \d+ of 50 is listed"):
        Ternary(raw(data), [Entry(torch.float32, (50,), 0, 0)])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_at_random_are_read_or_refused(tmp_path: Path, good: bytes, data: st.DataObject) -> None:
    """Somewhere in the codes, with the digest made to fit, so that it is the readers who have to see it."""
    header, said, rest = document(good)
    begin, end = header["coded"]["data_offsets"]
    changed_bytes = bytearray(rest)
    for _ in range(data.draw(st.integers(1, 4))):
        changed_bytes[data.draw(st.integers(begin, end - 1))] = data.draw(st.integers(0, 255))
    tensors = {
        name: torch.frombuffer(changed_bytes[e["data_offsets"][0] : e["data_offsets"][1]], dtype=kind).view(e["shape"])
        for name, e in header.items()
        if name != "__metadata__"
        for kind in [torch.uint8 if e["dtype"] == "U8" else torch.float32]
    }
    said["sha256"] = checkpoint.digest(tensors)
    header["__metadata__"]["rankfold"] = deflated(json.dumps(said))
    place(tmp_path, join(header, bytes(changed_bytes)))
    try:
        adapter = checkpoint.SavedDeltas(tmp_path).whole()
    except AdapterFileError:
        return
    assert all(bool(torch.isfinite(tensor).all()) for tensor in adapter.state_dict().values())


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_files_damaged_anywhere_are_refused(tmp_path: Path, good: bytes, data: st.DataObject) -> None:
    damaged = bytearray(good)
    at = data.draw(st.integers(0, len(good) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(good) - 1)) if data.draw(st.booleans()) else len(good)
    try:
        rankfold.load(net(), place(tmp_path, bytes(damaged[:cut])))
    except AdapterFileError:
        return
    assert document(bytes(damaged))[1] == document(good)[1], "changed where it is checked, and not refused"
