"""The adapters of a folder: on disk, in host memory, in the pool. S-LoRA: Sheng et al. 2023, arXiv 2311.03285."""

import contextlib
import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.adapter import Adapter
from rankfold.core.checkpoint import load
from rankfold.core.control import detach
from rankfold.core.document import TENSORS
from rankfold.core.peft import import_peft
from rankfold.core.routing import NAME
from rankfold.errors import AdapterFileError, RankfoldError
from rankfold.serve.paging import Residency
from rankfold.serve.pool import Pool
from rankfold.serve.segments import Placed, Product, Products, as_product

_PEFT = "adapter_model.safetensors"
_ALIGN = 64  # bytes, so that a tensor of any dtype can lie there


class UnknownAdapterError(RankfoldError):
    """There is no adapter of that name."""


@dataclass(frozen=True)
class _Other:
    """An adapter that is more than products: its tensors' bytes and where they go, as (page or pages, offset)."""

    sizes: tuple[int, ...]
    page_bytes: int

    @property
    def places(self) -> tuple[int, list[tuple[int, int]], list[int]]:
        """Pages for small tensors, (page, byte) of each of these, and how many pages each larger one needs in a run."""
        at, places, runs = 0, list[tuple[int, int]](), list[int]()
        for size in self.sizes:
            if size > self.page_bytes:
                runs.append(math.ceil(size / self.page_bytes))
                continue
            if at % self.page_bytes + size > self.page_bytes:
                at += self.page_bytes - at % self.page_bytes
            places.append((at // self.page_bytes, at % self.page_bytes))
            at += -(-size // _ALIGN) * _ALIGN
        return math.ceil(at / self.page_bytes), places, runs


@dataclass(eq=False)
class Entry:
    """An adapter that was asked for: what it is once read, and its pages while it is in the pool."""

    name: str
    path: Path
    reading: "Future[Product | _Other] | None" = None
    read: Product | _Other | None = None
    pages: list[int] = field(default_factory=list)
    placed: Placed | None = None
    turn: int = 0

    @property
    def in_pool(self) -> bool:
        return bool(self.pages)

    @property
    def size(self) -> int:
        """Pages that it takes; known once it was read."""
        if isinstance(self.read, Product):
            return len(self.read.pages)
        assert self.read is not None
        small, _, runs = self.read.places
        return small + sum(runs)


class Library:
    """Adapters by name: the folders in `folder` that hold one, of Rankfold or of PEFT.

    `ready` has a thread read and check an adapter into host memory (at most `host_memory` bytes of what is not in
    use), against a skeleton that shares the model's weights; `read_ahead` does so for those of waiting requests.
    `place` brings it into pages of the pool. Products of linear layers become pages as they are, whatever their ranks.
    All others are attached to the model, their tensors in pages too. `make_room` lets go of those that are used least
    often (`paging.Residency`).
    """

    def __init__(self, model: nn.Module, folder: Path | None, pool: Pool, products: Products, host_memory: int):
        self._model, self.folder, self._pool, self._products = model, folder, pool, products
        self._host_memory = host_memory
        memo: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
        self._skeleton = copy.deepcopy(model, memo)
        self._reader = ThreadPoolExecutor(1, "rankfold-adapters")
        self._entries: dict[str, Entry] = {}
        self._turns = itertools.count(1)
        self._residents: Residency[str] = Residency(len(pool))
        self.withdrawn: set[str] = set()  # out of service; what was accepted before may still use them
        self.counts = {"reads": 0, "placed": 0, "evicted": 0}

    # ---- what there is

    def names(self) -> list[str]:
        """All adapters on disk but for those that were unloaded."""
        if self.folder is None:
            return []
        found = {p.name for p in self.folder.iterdir() if NAME.fullmatch(p.name) and self._holds(p)}
        return sorted(found - self.withdrawn)

    def path(self, name: str) -> Path:
        """The folder of an adapter. Raises UnknownAdapterError; no name leads out of the library's folder."""
        if self.folder is None or not NAME.fullmatch(name) or not self._holds(self.folder / name):
            raise UnknownAdapterError(f"there is no adapter called {name[:128]!r}")
        return (self.folder / name).resolve()

    def _holds(self, path: Path) -> bool:
        """Whether an adapter is there, and is no link that leads out of the folder."""
        assert self.folder is not None
        outside = path.is_symlink() and not path.resolve().is_relative_to(self.folder.resolve())
        return _holds_adapter(path) and not outside

    def check(self, name: str) -> None:
        """Raises UnknownAdapterError where requests for it are not to be accepted."""
        if name in self.withdrawn:
            raise UnknownAdapterError(f"the adapter {name!r} was unloaded")
        self.path(name)

    def withdraw(self, name: str) -> None:
        """Take it out of service. Raises UnknownAdapterError where it is none of the folder's, or out already."""
        self.check(name)
        self.path(name)
        self.withdrawn.add(name)

    # ---- into host memory

    def ready(self, name: str) -> Entry | None:
        """The adapter once it is in host memory; None while it is being read. Raises what is wrong with it."""
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = Entry(name, self.path(name))
        entry.turn = next(self._turns)
        if entry.read is None:
            if entry.reading is None:
                entry.reading = self._reader.submit(self._read, entry.path)
            if not entry.reading.done():
                return None
            try:
                entry.read = entry.reading.result()
            except BaseException:
                del self._entries[name]
                raise
            finally:
                entry.reading = None
            self.counts["reads"] += 1
            self._forget(entry)
        return entry

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have adapters read that will be needed in this order, one at a time, as far as host memory has room for them.

        What is wrong with one is told when it is `ready`.
        """
        total = sum(e.read.bytes for e in self.in_pool if isinstance(e.read, Product))
        for name in names:
            entry = self._entries.get(name)
            if entry is not None and (entry.in_pool or _failed(entry)):
                continue
            with contextlib.suppress(RankfoldError):
                entry = self.ready(name) if total < self._host_memory else None
                if entry is None:
                    return
                total += entry.read.bytes if isinstance(entry.read, Product) else 0

    def wait(self, timeout: float) -> None:
        """Until one of the adapters that are being read is there."""
        for entry in list(self._entries.values()):
            if entry.reading is not None:
                with contextlib.suppress(TimeoutError):
                    entry.reading.exception(timeout)
                return

    def _read(self, path: Path) -> Product | _Other:
        adapter = _load(self._skeleton, path, "read")
        try:
            product = as_product(adapter, self._pool)
            if product is not None:
                return product
            return _Other(tuple(t.nbytes for t in _tensors(adapter)), self._pool.page_bytes)
        finally:
            detach(self._skeleton, "read")

    def _forget(self, keep: Entry) -> None:
        """Let go of what was longest unused, until the rest fits into host memory."""
        held = [e for e in self._entries.values() if isinstance(e.read, Product)]
        total = sum(e.read.bytes for e in held if isinstance(e.read, Product))
        for entry in sorted(held, key=lambda e: e.turn):
            if total <= self._host_memory:
                break
            if entry is not keep and not entry.in_pool:
                assert isinstance(entry.read, Product)
                total -= entry.read.bytes
                del self._entries[entry.name]

    # ---- into the pool

    def place(self, entry: Entry) -> None:
        """Bring it into the pool. Raises PoolFullError, and changes nothing, where its pages are not free."""
        if entry.in_pool:
            return
        pool = self._pool
        if isinstance(entry.read, Product):
            entry.pages = pool.take(entry.size)
            entry.placed = Placed(entry.read, pool, entry.pages)
            self._products.watch(list(entry.read.pieces))
        elif isinstance(entry.read, _Other):
            small, places, runs = entry.read.places
            taken: list[int] = []
            try:
                starts = []
                for count in runs:  # these first, while free pages still lie side by side
                    run = pool.take_run(count)
                    starts.append((run[0], 0))
                    taken += run
                own = pool.take(small)
                taken += own
                adapter = _load(self._model, entry.path, entry.name)
            except BaseException:
                pool.release(taken)
                raise
            with torch.no_grad():
                self._move(adapter, iter([(own[page], at) for page, at in places]), iter(starts))
            entry.pages = taken or pool.take(1)
        self._residents.need(entry.name, len(entry.pages))
        self.counts["placed"] += 1

    def _move(self, adapter: Adapter, small: Iterator[tuple[int, int]], large: Iterator[tuple[int, int]]) -> None:
        memory, size = self._pool.pages.view(torch.uint8).flatten(), self._pool.page_bytes
        for tensor in _tensors(adapter):
            page, at = next(large if tensor.nbytes > size else small)
            begin = page * size + at
            there = memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            there.copy_(tensor)
            tensor.data = there

    def evict(self, entry: Entry) -> None:
        """Free its pages. It stays in host memory where it is kept there at all."""
        if not entry.in_pool:
            return
        if entry.placed is None:
            detach(self._model, entry.name)
        self._pool.release(entry.pages)
        entry.pages, entry.placed = [], None
        self._residents.remove(entry.name)
        self.counts["evicted"] += 1

    def used(self, name: str) -> None:
        """Count one more request under the adapter."""
        self._residents.touch(name)

    def make_room(self, pages: int, in_use: Callable[[str], bool]) -> bool:
        """Evict adapters that nothing uses, the rarest first, until so many pages are free; False if never."""
        for name in self._residents.order():
            if self._pool.free >= pages:
                break
            if not in_use(name):
                self.evict(self._entries[name])
        return self._pool.free >= pages

    def drop(self, name: str) -> None:
        """Forget an adapter, so that it is read anew when it is asked for again; nothing may use it."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            self.evict(entry)

    def entry(self, name: str) -> Entry | None:
        return self._entries.get(name)

    @property
    def in_pool(self) -> list[Entry]:
        return [e for e in list(self._entries.values()) if e.in_pool]  # other threads may ask

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        for name in list(self._entries):
            self.drop(name)


def _failed(entry: Entry) -> bool:
    return entry.reading is not None and entry.reading.done() and entry.reading.exception() is not None


def _holds_adapter(path: Path) -> bool:
    return (path / TENSORS).is_file() or (path / _PEFT).is_file()


def _load(model: nn.Module, path: Path, name: str) -> Adapter:
    """Raises RankfoldError, whatever is wrong with the files; where they lie is nobody's affair who asks for them."""
    read = load if (path / TENSORS).is_file() else import_peft
    try:
        adapter = read(model, path, name, active=False)
    except Exception as error:
        kind = type(error) if isinstance(error, RankfoldError) else AdapterFileError
        raise kind(str(error).replace(f"{path.parent}{os.sep}", "")) from error
    return adapter.train(False).requires_grad_(False)


def _tensors(adapter: Adapter) -> Iterator[Tensor]:
    for _, tensor in adapter.named_tensors():
        yield tensor
