"""One pool of memory pages for keys and values of requests and for adapters.

Paged attention: Kwon et al. 2023, arXiv 2309.06180. Unified paging: S-LoRA, Sheng et al. 2023, arXiv 2311.03285.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from rankfold.errors import RankfoldError

BLOCK = 16  # tokens whose keys and values lie in a page


class PoolFullError(RankfoldError):
    """There are fewer free pages than asked for."""


class Pool:
    """Pages of equal size in one tensor, that is never larger than `max_memory` bytes.

    A page holds the keys and values of `block` consecutive tokens of one request in every layer, seen through `rows`
    (a row is one token's keys, or its values, in one layer), or whatever numbers an adapter has: S-LoRA's cells are
    rows, which fit adapters of square layers only. Any pages do; no page is moved. A page that several owners share has
    a count of them, and is free when the last one lets it go.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        max_memory: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        block: int = BLOCK,
    ):
        self.layers, self.width, self.block = layers, width, block
        self.numel = layers * 2 * block * width  # numbers of a page
        self.page_bytes = self.numel * dtype.itemsize
        count = max_memory // self.page_bytes
        if count < 1:
            raise RankfoldError(
                f"max_memory is {max_memory:,} bytes; one page of this model, {block} tokens in {layers} layers, takes "
                f"{self.page_bytes:,}: give it more"
            )
        self.pages = torch.empty(count, self.numel, dtype=dtype, device=device)
        self.rows = self.pages.view(-1, width)
        self._free = list(range(count))  # a heap: the lowest free page is taken first
        self._owners = [0] * count

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self) - self.free

    def owners(self, page: int) -> int:
        return self._owners[page]

    def take(self, count: int) -> list[int]:
        """The lowest free pages. Raises PoolFullError, and takes none, if there are too few."""
        if count > self.free:
            raise PoolFullError(f"{count} pages were asked for and {self.free} of {len(self)} are free")
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def take_run(self, count: int) -> list[int]:
        """Free pages one behind the other, for a tensor larger than a page. Raises PoolFullError without one."""
        free = sorted(self._free)
        for i in range(len(free) - count + 1):
            if free[i + count - 1] - free[i] == count - 1:
                taken = free[i : i + count]
                self._free = free[:i] + free[i + count :]  # sorted, so a heap
                for page in taken:
                    self._owners[page] = 1
                return taken
        raise PoolFullError(f"no {count} free pages lie one behind the other")

    def share(self, pages: Sequence[int]) -> None:
        """Count one more owner of each."""
        for page in pages:
            self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Count one owner less of each; a page without any is free."""
        for page in pages:
            if not self._owners[page]:
                raise RuntimeError(f"page {page} is free already")
            self._owners[page] -= 1
            if not self._owners[page]:
                heapq.heappush(self._free, page)

    def row(self, page: Tensor, slot: Tensor) -> Tensor:
        """Where the keys of a page's token lie in `rows`, in layer 0; `layer_step` further for each next layer."""
        return page * (self.layers * 2 * self.block) + slot

    @property
    def layer_step(self) -> int:
        return 2 * self.block

    @property
    def value_step(self) -> int:
        """How many rows behind its keys the values of a token lie."""
        return self.block


class Table:
    """The pages of one request in the order of its tokens: token t is in page t // block, at slot t mod block."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self.pages: list[int] = []
        self.length = 0

    @property
    def _shared(self) -> bool:
        """Whether the next token would be written to a page that others read too."""
        return self.length % self.pool.block > 0 and self.pool.owners(self.pages[-1]) > 1

    def needs(self, tokens: int) -> int:
        """Pages that `extend` would take."""
        return -(-(self.length + tokens) // self.pool.block) - len(self.pages) + self._shared

    def extend(self, tokens: int) -> None:
        """Make room for that many more tokens. A page that others read too is copied before it is written to."""
        pool, shared, fresh = self.pool, self._shared, self.pool.take(self.needs(tokens))
        if shared:
            (old,), copied = self.pages[-1:], fresh.pop(0)
            pool.pages[copied] = pool.pages[old]
            pool.release([old])
            self.pages[-1] = copied
        self.pages += fresh
        self.length += tokens

    def fork(self, length: int) -> "Table":
        """A table of its first tokens, so many, on the same pages."""
        other = Table(self.pool)
        other.pages, other.length = self.pages[: -(-length // self.pool.block)], length
        self.pool.share(other.pages)
        return other

    def free(self) -> None:
        self.pool.release(self.pages)
        self.pages, self.length = [], 0
