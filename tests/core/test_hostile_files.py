"""Adapter files from strangers: whatever stands in them, they load what was saved or raise AdapterFileError."""

import json
import os
import pickle
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import rankfold
from rankfold.core import checkpoint
from rankfold.core.control import adapters
from rankfold.errors import AdapterFileError, RankfoldError

TENSORS, DOCUMENT = "adapter.safetensors", "adapter.json"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(4, 6), "head": nn.Linear(4, 2)})


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The two files of a good adapter."""
    model = net()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=2), targets=["a", "b"], modules_to_save=["head"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.5)
    folder = rankfold.save(model, tmp_path_factory.mktemp("good"))
    return (folder / TENSORS).read_bytes(), (folder / DOCUMENT).read_bytes()


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(folder: Path, words: str = "", **kwargs: Any) -> str:
    """Loading must fail with AdapterFileError that names the file, and leave the model as it was."""
    model = net()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(AdapterFileError, match=words) as caught:
        rankfold.load(model, folder, **kwargs)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert adapters(model) == {}
    assert not model._forward_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())
    message = str(caught.value)
    assert str(folder) in message
    assert message.isprintable(), message
    assert len(message) < 1500
    return message


def place(folder: Path, tensors: bytes, document: bytes | None = None) -> Path:
    (folder / TENSORS).write_bytes(tensors)
    (folder / DOCUMENT).unlink(missing_ok=True)
    if document is not None:
        (folder / DOCUMENT).write_bytes(document)
    return folder


def test_the_good_file_loads(tmp_path: Path, good: tuple[bytes, bytes]) -> None:
    """What the tests below damage is otherwise accepted, also when it is taken apart and put together as they do."""
    rankfold.load(net(), place(tmp_path, *good))
    rankfold.load(net(), place(tmp_path, good[0]))
    rankfold.load(net(), place(tmp_path, join(*split(good[0]))))


# ---- the header of the tensor file


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def damaged(tensors: bytes) -> bytes:
        header, data = split(tensors)
        return join(change(header) or header, data)

    return damaged


def entry(**changes: Any) -> Callable[[bytes], bytes]:
    return with_header(lambda header: header["deltas.a.A"].update(changes))


def added(name: str, **changes: Any) -> Callable[[bytes], bytes]:
    """One more tensor, of no elements unless told otherwise, where the data ends."""

    def change(header: dict[str, Any]) -> None:
        end = max(e["data_offsets"][1] for key, e in header.items() if key != "__metadata__")
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end], **changes}

    return with_header(change)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: b"", "cut short at 0 bytes"),
        (lambda t: t[:5], "cut short at 5 bytes"),
        (lambda t: t[:200], "claims a header"),
        (lambda t: t[:-1], "is cut short"),
        (lambda t: t + b"x", "bytes behind its last tensor"),
        (lambda t: struct.pack("<Q", 1 << 62) + t[8:], "claims a header of 4,611,686"),
        (lambda t: struct.pack("<Q", len(t)) + t[8:], "claims a header"),
        (lambda t: pickle.dumps({"a": 1}), "pickle"),
        (lambda t: b"PK\x03\x04" + bytes(100), "pickle"),
        (lambda t: join(b"\xff\xfe", b""), "not UTF-8"),
        (lambda t: join(b"no json", b""), "not valid JSON"),
        (lambda t: join(b"[]", b""), "no JSON object"),
        (lambda t: join(b"{}", b""), "holds no document"),
        (lambda t: join(b"[" * 100_000, b""), "nested too deeply"),
        (lambda t: join(b'{"a":' * 50_000, b""), "nested too deeply"),
        (lambda t: join(split(t)[0] | {"x": float("nan")}, b""), "NaN is not a number"),
        (lambda t: join(b'{"x": 1e999}', b""), "too large"),
        (lambda t: join(b'{"x": ' + b"9" * 5000 + b"}", b""), "not valid JSON"),
        (lambda t: join(b'{"x": 1, "x": 2}', b""), "'x' stands there twice"),
        (with_header(lambda h: h.update(__metadata__=[1])), "metadata"),
        (with_header(lambda h: h.update(__metadata__={"rankfold": 7})), "metadata"),
        (with_header(lambda h: h["__metadata__"].pop("rankfold") and None), "holds no document"),
        (with_header(lambda h: h.update({"deltas.a.A": 3})), "must be described by"),
        (entry(extra=1), "must be described by"),
        (entry(dtype="F33"), "dtype 'F33'"),
        (entry(dtype=["F32"]), "dtype"),
        (entry(dtype="I32"), "torch.int32, expected torch.float32"),
        (entry(shape="6"), "no list"),
        (entry(shape=[2.0, 6]), "no list"),
        (entry(shape=[True, 12]), "no list"),
        (entry(shape=[-2, -6]), "no list"),
        (entry(shape=[1] * 9), "no list"),
        (entry(shape=[10**6, 10**6]), "needs 4,000,000,000,000 bytes"),
        (entry(shape=[1 << 62, 1 << 62]), "needs"),
        (entry(shape=[6, 2]), r"shape \(6, 2\), expected \(2, 6\)"),
        (entry(shape=[12]), r"shape \(12,\), expected \(2, 6\)"),
        (entry(data_offsets=[0]), "no pair"),
        (entry(data_offsets="ab"), "no pair"),
        (entry(data_offsets=[48, 0]), "needs 48 bytes"),
        (entry(data_offsets=[1 << 40, (1 << 40) + 48]), "leaves a gap|overlaps"),
        (added("x", shape=[3], data_offsets=[0, 12]), "overlaps"),
        (added("x", shape=[1 << 40, 0]), "holds unknown x"),
        (added("deltas.a.C"), r"holds unknown deltas\.a\.C"),
        (added("deltas.a.A0"), r"holds unknown deltas\.a\.A0"),
        (added("../../etc/passwd"), "holds unknown ../../etc/passwd"),
        (added(""), "unprintable name"),
        (added("a\x00b"), "unprintable name"),
        (added("a\nb\x1b[31m"), "unprintable name"),
        (added("\ud800"), "unprintable name"),
        (added("x" * 5000), "overlong"),
        (
            with_header(lambda h: {k: v for k, v in h.items() if k == "__metadata__"}),
            "bytes behind|needs|lacks|the file holds",
        ),
    ],
)
def test_damaged_tensor_files(
    tmp_path: Path, good: tuple[bytes, bytes], damage: Callable[[bytes], bytes], words: str
) -> None:
    refused(place(tmp_path, damage(good[0])), words)


def test_a_header_longer_than_any_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: tuple[bytes, bytes]
) -> None:
    monkeypatch.setattr("rankfold.core.tensorfile.MAX_JSON", 64)
    refused(place(tmp_path, good[0]), "more than an adapter's")


def test_overlapping_tensors(tmp_path: Path, good: tuple[bytes, bytes]) -> None:
    """Two tensors over the same bytes, the sizes still adding up."""
    header, data = split(good[0])
    header["deltas.b.B"]["data_offsets"] = header["deltas.a.A"]["data_offsets"]
    refused(place(tmp_path, join(header, data)), "overlaps|leaves a gap")


def test_missing_tensor(tmp_path: Path, good: tuple[bytes, bytes]) -> None:
    header, data = split(good[0])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][0])
    begin = header.pop(last)["data_offsets"][0]
    refused(place(tmp_path, join(header, data[:begin])), "lacks|no such tensor|the file holds")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(tmp_path: Path, good: tuple[bytes, bytes], value: float) -> None:
    header, data = split(good[0])
    begin = header["deltas.b.A"]["data_offsets"][0]
    data = data[:begin] + struct.pack("<f", value) + data[begin + 4 :]
    refused(place(tmp_path, join(header, data)), r"deltas\.b\.A holds NaN or infinity")


def test_a_changed_number(tmp_path: Path, good: tuple[bytes, bytes]) -> None:
    refused(place(tmp_path, good[0][:-4] + struct.pack("<f", 1.25)), "sha256")


def test_tensors_of_another_adapter(tmp_path: Path, good: tuple[bytes, bytes]) -> None:
    """The same shapes with other numbers, under this adapter's document."""
    header, data = split(good[0])
    refused(place(tmp_path, join(header, bytes(len(data)))), "sha256")


# ---- the document


def documented(good: tuple[bytes, bytes], change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The tensor file with a changed document in it."""
    header, data = split(good[0])
    document = json.loads(header["__metadata__"]["rankfold"])
    result = change(document)
    header["__metadata__"]["rankfold"] = result if isinstance(result, str) else json.dumps(result or document)
    return join(header, data)


def put(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: document.update(changes)


def site(name: str = "a", **changes: Any) -> Callable[[dict[str, Any]], Any]:
    def change(document: dict[str, Any]) -> None:
        record = {**document["sites"]["a"], **changes}
        if name != "a":
            document["sites"] |= {name: record}
        else:
            document["sites"]["a"] = record

    return change


def hyper(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: document["method"].update(changes)


def base(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: document["base"].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: "", "not valid JSON"),
        (lambda d: "[1]", "no JSON object"),
        (lambda d: '{"format": 1, "format": 1}', "twice"),
        (lambda d: '{"a":' * 100_000, "nested too deeply"),
        (lambda d: json.dumps({**d, "seed": float("inf")}), "Infinity is not a number"),
        (put(format=2, rankfold="9.9"), r"format 2, written by Rankfold '9\.9'.*upgrade"),
        (put(format=0), "format 0.*damaged"),
        (put(format="1"), "'format'"),
        (put(format=True), "'format'"),
        (put(format=None), "'format'"),
        (lambda d: d.pop("sites") and None, "'sites'.*required"),
        (put(sites=[]), "'sites'"),
        (put(sites={"a": 3}), "'sites.a'"),
        (put(name="../x"), "'name'"),
        (put(name="a\n"), "'name'"),
        (put(name=""), "'name'"),
        (put(name=5), "'name'"),
        (put(id="x"), "'id'"),
        (put(seed="0"), "'seed'"),
        (put(seed=1 << 70), "'seed'"),
        (put(seed=True), "'seed'"),
        (put(method="lora"), "'method'"),
        (put(method={}), "has no name"),
        (put(method={"name": ["lora"]}), "has no name"),
        (put(method={"name": "lroa"}), r"'lroa'.*did you mean 'lora'.*There are: .*lora.*import the file"),
        (put(init={"name": "lora"}), "axis 'deltas'"),
        (put(init={"name": "no-such-start"}), "no component is called 'no-such-start'"),
        (put(init=[]), "'init'"),
        (put(fold=1), "'fold'"),
        (put(fold=True), "folded"),
        (put(targets=5), "'targets"),
        (put(targets=[5]), "'targets"),
        (put(modules="head"), "'modules'"),
        (put(modules=[""]), "no path of a layer"),
        (put(modules=["head", "head"]), "twice"),
        (put(modules=["head", "a"]), "also"),
        (put(modules=["__class__"]), "none there"),
        (put(modules=[]), "holds unknown modules"),
        (put(base=None), "'base'"),
        (base(sample={"a": ["x"]}), "'base.sample"),
        (base(sample={"a": [1.0] * 100}), "'base.sample"),
        (base(sample={"c": [1.0]}), "none of the sites"),
        (base(parameters="many"), "'base.parameters'"),
        (base(**{"class": None}), "'base.class'"),
        (hyper(rank=0), "rank.*greater than or equal to 1"),
        (hyper(rank="many"), "rank"),
        (hyper(rank=None), "rank"),
        (hyper(rank=[[[[1]]]]), "rank"),
        (hyper(rank=3), "needs 60 numbers"),
        (hyper(rank=1), r"shape \(2, 6\), expected \(1, 6\)"),
        (hyper(rank=10**12), "numbers and the file holds"),
        (hyper(rank=10**300), "rank|numbers and the file holds"),
        (hyper(dropout=1.5), "dropout"),
        (hyper(colour="red"), "colour.*hyperparameters of lora"),
        (hyper(**{"\x1b[31m": 1}), "no hyperparameter"),
        (hyper(**{"x" * 5000: 1}), "no hyperparameter"),
        (put(method={"name": "x" * 5000}), "has no name"),
        (put(method={"name": "\x1b[31m"}), "no component is called"),
        (site(method={"rank": 10**10}), "numbers and the file holds"),
        (site(method={"colour": 1}), "colour"),
        (site(method={"name": "nothing"}), "no component is called 'nothing'"),
        (site(kind="experts"), "has no such layer|has no such weight|which no delta"),
        (site(kind="conv1d"), "'conv1d' of 4×6.*'linear' of 4×6"),
        (site(kind=7), "sites.a.kind"),
        (site(shape=[4]), "sites.a.shape"),
        (site(shape=[4, -6]), "sites.a.shape"),
        (site(shape=[4, 1 << 60]), "sites.a.shape"),
        (site(shape=[6, 4]), "'linear' of 6×4.*'linear' of 4×6"),
        (site(shape=[4.0, 6.0]), "sites.a.shape"),
        (site(dtype="int8"), "sites.a.dtype"),
        (site("../a"), "no path of a layer"),
        (site("__class__"), "has no such layer"),
        (site("a.__dict__"), "has no such layer"),
        (site("a.weight"), "has no such layer"),
        (site(""), "no path of a layer"),
        (site("."), "no path of a layer"),
        (site("a\x1b[2J"), "no path of a layer"),
        (site("a.deltas.x"), "no path of a layer"),
        (site("c"), "has no such layer"),
        (site("head"), "also"),
        (site("x" * 5000), "no path of a layer"),
        (site("b" + "\u202e"), "no path of a layer"),
        (put(sha256="0" * 64), "sha256"),
    ],
)
def test_damaged_documents(
    tmp_path: Path, good: tuple[bytes, bytes], change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    refused(place(tmp_path, documented(good, change)), words)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b"", "not valid JSON"),
        (b"\x80\x04", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format": 7}', "format 7"),
        (b'{"format": 1}', "required"),
    ],
)
def test_a_damaged_document_beside(tmp_path: Path, good: tuple[bytes, bytes], document: bytes, words: str) -> None:
    refused(place(tmp_path, good[0], document), words)


def test_a_huge_document_is_not_read(tmp_path: Path, good: tuple[bytes, bytes]) -> None:
    place(tmp_path, good[0])
    with (tmp_path / DOCUMENT).open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no space on the disk
    refused(tmp_path, "larger than")


def test_a_document_that_was_edited(tmp_path: Path, good: tuple[bytes, bytes]) -> None:
    document = json.loads(good[1])
    document["method"]["alpha"] = 64.0
    refused(
        place(tmp_path, good[0], json.dumps(document).encode()),
        "changed after it was saved.*method.*Delete adapter.json",
    )
    reformatted = json.dumps(json.loads(good[1]), indent=4).encode()
    rankfold.load(net(), place(tmp_path, good[0], reformatted))


def test_memory_stays_bounded(tmp_path: Path, good: tuple[bytes, bytes]) -> None:
    """A rank of a million on a layer that admits it must be refused before its factors are made."""
    place(tmp_path, documented(good, hyper(rank=10**9)))
    tracemalloc.start()
    refused(tmp_path, "numbers and the file holds")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


# ---- things in the place of files


def test_symbolic_links(tmp_path: Path, good: tuple[bytes, bytes]) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    place(outside, *good)
    for name in (TENSORS, DOCUMENT):
        place(inside, *good)
        (inside / name).unlink()
        (inside / name).symlink_to(outside / name)
        refused(inside, f"{name} is a symbolic link that leads out of its folder")
        (inside / name).unlink()
        (inside / name).symlink_to("nothing")
        refused(inside, f"{name} is a symbolic link to nothing")
        (inside / name).unlink()
        (inside / name).symlink_to(name)
        refused(inside, "cannot be opened|symbolic link")
        (inside / name).unlink()
        (inside / "real").write_bytes((outside / name).read_bytes())
        (inside / name).symlink_to("real")
        rankfold.load(net(), inside)
        (inside / name).unlink()
    link = tmp_path / "link"  # a link to the whole folder is the reader's own choice
    link.symlink_to(outside)
    rankfold.load(net(), link)


@pytest.mark.parametrize("name", [TENSORS, DOCUMENT])
def test_no_regular_file(tmp_path: Path, good: tuple[bytes, bytes], name: str) -> None:
    place(tmp_path, *good)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refused(tmp_path, "not a regular file but a pipe")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused(tmp_path, "not a regular file but a directory")
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to("/dev/zero")
    refused(tmp_path, "leads out of its folder")


def test_a_file_that_takes_the_place_of_the_one_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: tuple[bytes, bytes]
) -> None:
    """Between the look and the opening somebody puts a link, or a pipe, there."""
    place(tmp_path, *good)
    real = os.open

    def link(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        (tmp_path / TENSORS).unlink(missing_ok=True)
        (tmp_path / TENSORS).symlink_to("/etc/hostname")
        return real(path, flags, *args, **kwargs)

    def pipe(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        (tmp_path / TENSORS).unlink(missing_ok=True)
        os.mkfifo(tmp_path / TENSORS)
        return real(path, flags, *args, **kwargs)

    for trick, words in ((link, "cannot be opened"), (pipe, "replaced while")):
        monkeypatch.setattr(os, "open", trick)
        with pytest.raises(AdapterFileError, match=words):
            checkpoint.read(tmp_path)
        monkeypatch.undo()
        (tmp_path / TENSORS).unlink()
        (tmp_path / TENSORS).write_bytes(good[0])


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: tuple[bytes, bytes]
) -> None:
    from rankfold.core import tensorfile

    real = tensorfile.read_exactly
    for change, words in ((good[0] + b"more", "changed while"), (good[0][:300], "became shorter")):
        place(tmp_path, *good)
        calls = []

        def read(handle: Any, length: int, what: str, change: bytes = change, calls: list[int] = calls) -> bytearray:
            calls.append(length)
            if len(calls) == 2:  # the header was read, the data comes now
                (tmp_path / TENSORS).write_bytes(change)
            return real(handle, length, what)

        monkeypatch.setattr(tensorfile, "read_exactly", read)
        refused(tmp_path, words)
        monkeypatch.undo()


def test_no_adapter_at_all(tmp_path: Path, good: tuple[bytes, bytes]) -> None:
    refused(tmp_path, "holds no adapter.safetensors: give the folder")
    (tmp_path / DOCUMENT).write_bytes(good[1])
    refused(tmp_path, "holds no adapter.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    refused(tmp_path, "a pickle")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "import_peft")
    refused(tmp_path / DOCUMENT, "is a file: give the folder")
    for path in ("a\x00b", "x" * 10_000, ""):
        with pytest.raises(AdapterFileError):
            rankfold.load(net(), path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path, good: tuple[bytes, bytes]) -> None:
    place(tmp_path, *good)
    (tmp_path / TENSORS).chmod(0)
    refused(tmp_path, "cannot be opened: Permission denied")


def test_the_callers_mistakes_are_the_callers(tmp_path: Path, good: tuple[bytes, bytes]) -> None:
    place(tmp_path, *good)
    with pytest.raises(RankfoldError, match="adapter name 'a/b'") as caught:
        rankfold.load(net(), tmp_path, "a/b")
    assert not isinstance(caught.value, AdapterFileError)


# ---- chance


def outcome(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # a sample of the base that moved a little is worth a warning only
            loaded = rankfold.load(net(), folder).state_dict()
    except AdapterFileError:
        return
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory, good: tuple[bytes, bytes]) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = place(tmp_path_factory.mktemp("arena"), *good)
    return folder, rankfold.load(net(), folder).state_dict()


fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.data())
def test_random_damage_loads_the_same_or_is_refused(arena: Any, good: tuple[bytes, bytes], data: st.DataObject) -> None:
    folder, expected = arena
    which = data.draw(st.integers(0, 2))  # the tensor file alone, with its document, or the document
    damaged = bytearray(good[1] if which == 2 else good[0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        action = data.draw(st.sampled_from(["flip", "byte", "cut", "insert", "delete"]))
        if action == "flip":
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        elif action == "byte":
            damaged[at] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del damaged[max(at, 1) :]
        elif action == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif len(damaged) > 1:
            del damaged[at]
    if which == 2:
        place(folder, good[0], bytes(damaged))
    else:
        place(folder, bytes(damaged), good[1] if which else None)
    outcome(folder, expected)


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [deeper for key, child in inner for deeper in places(child, (*at, key))]


@fuzz
@given(st.data())
def test_any_value_anywhere_in_the_document(arena: Any, good: tuple[bytes, bytes], data: st.DataObject) -> None:
    folder, expected = arena
    document = json.loads(good[1])
    *path, last = data.draw(st.sampled_from(places(document)))
    target = document
    for key in path:
        target = target[key]
    if data.draw(st.booleans()):
        target[last] = data.draw(any_json)
    else:
        del target[last]
    outcome(place(folder, documented(good, lambda _: json.dumps(document))), expected)


@fuzz
@given(st.data())
def test_any_value_anywhere_in_the_header(arena: Any, good: tuple[bytes, bytes], data: st.DataObject) -> None:
    folder, expected = arena
    header, rest = split(good[0])
    *path, last = data.draw(st.sampled_from(places(header)))
    target = header
    for key in path:
        target = target[key]
    target[last] = data.draw(any_json)
    outcome(place(folder, join(header, rest)), expected)
