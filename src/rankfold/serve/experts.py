"""Mixture-of-experts models whose experts lie on disk. EdgeMoE, Yi et al. 2023, arXiv 2308.14352.

`rankfold.serve.widths` chooses how many bits each expert gets, `pack_experts` writes them, and `PagedExperts` lets a
model read those that it uses; `rankfold.serve.paged_models` saves and loads whole models that way.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.layers import Adapted
from rankfold.core.packed import Packed, dequantise
from rankfold.core.routing import unwrapped
from rankfold.core.targets import submodule
from rankfold.errors import AdapterFileError
from rankfold.serve.expert_files import Expert, ExpertFile, ExpertLayer, count, let_go, linears_of
from rankfold.serve.paging import Policy, Residency, Transitions


@dataclass
class Stats:
    """Uses of experts that were in memory or on their way (hits) or not (misses), and what was read."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


class PagedExperts:
    """Lets a model's experts be read from a file when they are used, with `cache` of them in memory, packed.

    When layer l has chosen its experts, those that are missing are read, and after them, by a thread of their own while
    l computes, the likeliest of the layer that ran after l last time: as many as l uses, by `Σ_i P(j | i)` (see
    `Transitions`), counted over all that has run. An expert is one use in a forward of its layer, however many tokens
    it gets. What is chosen to be read and to leave does not depend on how fast the disk is, and what the model gives
    depends on neither: only on the widths.

    The model's own forward runs over its experts one at a time (Transformers' "eager" way), and reads each weight from
    here. The weights that the model had are let go. Forwards one at a time; gradients reach inputs only.

    Args:
        model: a Transformers model that `pack_experts` packed, or that was loaded without its experts.
        file: what `pack_experts` wrote.
        cache: how many experts are in memory at most.
        policy: which leaves first, see `Residency`.
        prefetch: whether to read ahead.

    Raises:
        AdapterFileError: the file is missing, damaged, or of another model.
    """

    def __init__(
        self, model: Any, file: str | Path, cache: int, *, policy: Policy = "frequency", prefetch: bool = True
    ):
        self.file, self.prefetch, self.stats = ExpertFile(file), prefetch, Stats()
        self._resident: Residency[Expert] = Residency(cache, policy, self._turns)
        self._held: dict[Expert, Future[dict[str, Packed]]] = {}
        self._after = [Transitions[int]() for _ in self.file.layers]
        self._next = {layer: (layer + 1) % len(self.file.layers) for layer in range(len(self.file.layers))}
        self._now, self._chosen = 0, torch.empty(0, 0, dtype=torch.long)  # the layer that runs, its experts (rows, k)
        self._uses = 1  # how many distinct ones these are
        self._ahead: list[Expert] = []  # read for the next layer, and pinned until it runs
        self._waiting: set[Expert] = set()  # chosen in this layer, in memory, pinned, and not used yet
        self._fresh: set[Expert] = set()  # of these, what had to be read
        self._using: Expert | None = None
        self._hooks: list[Any] = []
        root: Any = unwrapped(model)
        modules = [self._place(root, layer) for layer in self.file.layers]
        self._device = next(p.device for p in root.parameters() if not p.is_meta)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="experts")
        for number, (layer, module) in enumerate(zip(self.file.layers, modules, strict=True)):
            self._install(number, layer, module)
        if any(layer.fused for layer in self.file.layers):
            root.set_experts_implementation("eager")

    def close(self) -> None:
        """Stop reading. The model has no experts then."""
        for hook in self._hooks:
            hook.remove()
        self._reader.shutdown()
        self.file.close()

    def __enter__(self) -> "PagedExperts":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ---- in the model

    def _place(self, root: nn.Module, layer: ExpertLayer) -> Any:
        module: Any = submodule(root, layer.path)
        fits = module is not None and not isinstance(module, Adapted) and hasattr(module, "num_experts")
        found = (count(module), isinstance(module, nn.ModuleDict)) if fits else None  # type: ignore[arg-type]
        if found != (len(layer.schemes), not layer.fused):
            self.file.close()
            raise AdapterFileError(
                f"{self.file.what} holds {len(layer.schemes)} experts of {layer.path}, and {type(root).__name__} has "
                "none, others, or adapted ones there: page the model that was packed"
            )
        return module

    def _install(self, number: int, layer: ExpertLayer, module: Any) -> None:
        let_go(module)
        if layer.fused:
            for name in layer.shapes:
                setattr(module, name, _Weights(self, number, name, module.is_transposed))
        else:
            for expert in range(len(layer.schemes)):
                linears = {f"{path}.weight": linear for path, linear in linears_of(module, expert).items()}
                give = _Give(self, (number, expert), linears)
                self._hooks.append(module[f"expert_{expert}"].register_forward_pre_hook(give.before))
                self._hooks.append(module[f"expert_{expert}"].register_forward_hook(give.after, always_call=True))

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            chosen, experts = [*args, *kwargs.values()][1].detach(), count(module)  # (rows, k)
            if chosen.dim() == 3:  # one-hot; no expert has room for the rows without a one
                chosen = torch.where(chosen.any(-1), chosen.argmax(-1), experts)
            self._begin(number, chosen.cpu(), experts)

        def end(*_: Any) -> None:
            self._end()

        self._hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(end, always_call=True))

    # ---- a layer's forward

    def _begin(self, layer: int, chosen: Tensor, experts: int) -> None:
        self._learn(layer, chosen, experts)
        for key in self._ahead:
            self._resident.unpin(key)
        self._ahead.clear()
        needed = [(layer, e) for e in chosen.unique().tolist() if e < experts]
        self._uses = max(1, len(needed))
        for key in needed:
            self._resident.touch(key)
            if key in self._resident:
                self._wait_for(key)
        for key in needed:
            if key not in self._resident and self._load(key):
                self._fresh.add(key)
                self._wait_for(key)
        if self.prefetch:
            self._read_ahead([e for _, e in needed])

    def _end(self) -> None:
        """The layer is done, or has failed: nothing stays pinned for it."""
        for key in self._waiting:
            self._resident.unpin(key)
        self._waiting.clear()
        self._fresh.clear()
        self._release()

    def weights(self, key: Expert) -> dict[str, Packed]:
        """The expert's packed matrices, which stay until the next is asked for."""
        if key != self._using:
            self._release()
            if key in self._waiting:
                self._waiting.remove(key)
                self._resident.unpin(key)
            if key in self._resident and key not in self._fresh:
                self.stats.hits += 1
            else:
                self.stats.misses += 1
            if key not in self._resident and not self._load(key):
                self._make_way()
                self._load(key)
            self._resident.pin(key)
            self._using = key
        try:
            return self._held[key].result()
        except BaseException:  # others that were on their way may have failed too: the cache starts anew
            self._release()
            self._make_way()
            for held in self._held:
                self._resident.remove(held)
            self._held.clear()
            raise

    def _release(self) -> None:
        if self._using is not None:
            self._resident.unpin(self._using)
        self._using = None

    def _make_way(self) -> None:
        """The cache is too small for what is pinned: experts of this layer that are used later, or ahead of time."""
        for key in (*self._ahead, *self._waiting):
            self._resident.unpin(key)
        self._ahead.clear()
        self._waiting.clear()

    def _wait_for(self, key: Expert) -> None:
        self._resident.pin(key)
        self._waiting.add(key)

    def _load(self, key: Expert) -> bool:
        """Have the expert read, if there is room beside what is pinned."""
        leaving = self._resident.need(key)
        if leaving is None:
            return False
        for old in leaving:
            del self._held[old]
        self._held[key] = self._reader.submit(self.file.read, key, self._device)
        self.stats.loads += 1
        self.stats.bytes_read += self.file.layers[key[0]].bytes(key[1])
        return True

    # ---- what comes next

    def _turns(self, key: Expert) -> tuple[float, float]:
        """A lap goes through all layers, and each uses as many experts as the one that runs now."""
        layers = len(self.file.layers)
        return ((key[0] - self._now - 1) % layers + 1) * self._uses, layers * self._uses

    def _learn(self, layer: int, chosen: Tensor, experts: int) -> None:
        """Count which experts came after which, for each row of a batch; after another batch, for the last row.

        Numbers from `experts` on are none.
        """
        before = self._chosen
        if before.numel():
            self._next[self._now] = layer
            if len(before) != len(chosen):
                before = before[-1:].expand(len(chosen), -1)
            pairs = torch.stack(torch.broadcast_tensors(before[:, :, None], chosen[:, None]))
            found, times = pairs.flatten(1).unique(dim=1, return_counts=True)
            for i, j, n in zip(*found.tolist(), times.tolist(), strict=True):
                if j < experts:
                    self._after[layer].observe(i, j, n)
        self._now, self._chosen = layer, chosen

    def _read_ahead(self, now: list[int]) -> None:
        layer = self._next[self._now]
        for expert in self._after[layer].predict(now, len(now)):
            key = (layer, expert)
            if key in self._resident or self._load(key):
                self._resident.pin(key)
                self._ahead.append(key)


class _Weights:
    """Stands where a fused weight (E, out, in) was: `weights[e]` is expert e's."""

    def __init__(self, pages: PagedExperts, layer: int, name: str, transposed: bool):
        self._pages, self._layer, self._name, self._transposed = pages, layer, name, transposed

    def __getitem__(self, index: Any) -> Tensor:
        W = _weight(self._pages, (self._layer, int(index)), self._name)
        return W.mT.contiguous() if self._transposed else W


class _Give:
    """Gives the linear layers of one expert their weights for the length of a forward."""

    def __init__(self, pages: PagedExperts, key: Expert, linears: Mapping[str, Any]):
        self._pages, self._key, self._linears = pages, key, linears

    def before(self, *_: Any) -> None:
        for name, linear in self._linears.items():
            linear.__dict__["weight"] = _weight(self._pages, self._key, name)

    def after(self, *_: Any) -> None:
        for linear in self._linears.values():
            linear.__dict__["weight"] = torch.empty(0)


def _weight(pages: PagedExperts, key: Expert, name: str) -> Tensor:
    layer = pages.file.layers[key[0]]
    packed = pages.weights(key)[name]
    return dequantise(packed, layer.shapes[name], layer.schemes[key[1]], getattr(torch, layer.dtype))
