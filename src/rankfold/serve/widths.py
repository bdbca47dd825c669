"""A bit width for each expert, by what it costs. EdgeMoE's expert-wise bitwidth, Yi et al. 2023, arXiv 2308.14352."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankfold.core.packed import Scheme, dequantise
from rankfold.errors import RankfoldError
from rankfold.quantizers.rtn import RTN
from rankfold.serve.expert_files import Expert, at_width, count, expert_layers, matrices, packed_bytes


@dataclass(frozen=True)
class Profile:
    """Of each expert at each width: how much the loss grows when it alone is rounded, and the bytes that it takes."""

    loss: Mapping[Expert, Mapping[int, float]]
    bytes: Mapping[Expert, Mapping[int, int]]

    def choose(self, *, budget: int | None = None, quality: float | None = None) -> dict[Expert, int]:
        """A width for each expert: all have the widest, then one after the other gets the next narrower one.

        The step that comes first is the one that costs the least loss for each byte that it frees. The paper says "the
        least sensitive first"; here it also counts how much a step frees. Effects of several experts are taken to add
        up.

        Args:
            budget: bytes of all experts together; the steps end as soon as these are enough.
            quality: how much the loss may grow in all; a step that takes more is left out.

        Raises:
            RankfoldError: the budget cannot be met, or not exactly one of the two is given.
        """
        if (budget is None) == (quality is None):
            raise RankfoldError("choose: give the bytes (budget=) or the loss (quality=) that the experts may take")
        chosen = {expert: max(widths) for expert, widths in self.bytes.items()}
        total, spent = sum(self.bytes[expert][bits] for expert, bits in chosen.items()), 0.0
        steps = [step for expert, bits in chosen.items() for step in self._steps(expert, bits)]
        heapq.heapify(steps)
        while steps and (budget is None or total > budget):
            _, cost, expert, bits = heapq.heappop(steps)
            if quality is not None and spent + cost > quality:
                continue
            total -= self.bytes[expert][chosen[expert]] - self.bytes[expert][bits]
            spent += cost
            chosen[expert] = bits
            for step in self._steps(expert, bits):
                heapq.heappush(steps, step)
        if budget is not None and total > budget:
            raise RankfoldError(f"the experts take {total:,} bytes at the narrowest widths: {budget:,} are too few")
        return chosen

    def _steps(self, expert: Expert, bits: int) -> list[tuple[float, float, Expert, int]]:
        """The next narrower width, behind what it costs for each byte and in all; none after the narrowest."""
        narrower = [b for b in self.bytes[expert] if b < bits]
        if not narrower:
            return []
        # Rounding one expert may also lower the loss of a few batches, which is luck: it counts as none.
        now, then = (max(0.0, self.loss[expert][b]) for b in (bits, max(narrower)))
        freed = self.bytes[expert][bits] - self.bytes[expert][max(narrower)]
        return [((then - now) / freed, then - now, expert, max(narrower))]


@torch.no_grad()
def profile(
    model: nn.Module, batches: Iterable[Any], widths: Sequence[int] = (8, 4, 2), scheme: Scheme | None = None
) -> Profile:
    """Round each expert alone to each width, to nearest, and see how the mean loss of the batches changes.

    One pass over the batches for each expert and width. The model is as before then.

    Args:
        model: a Transformers model with experts, in float.
        batches: model inputs with labels: what it is to be good at.
        widths: candidates.
        scheme: as for `pack_experts`.
    """
    batches, training = list(batches), model.training
    if not batches:
        raise RankfoldError("profile: no batches were given")
    found: dict[Expert, dict[int, float]] = {}
    sizes: dict[Expert, dict[int, int]] = {}
    model.eval()
    try:
        plain = _loss(model, batches)
        for number, (path, module) in enumerate(expert_layers(model).items()):
            for expert in range(count(module)):
                weights = matrices(module, expert)
                before = {name: W.clone() for name, W in weights.items()}
                found[number, expert], sizes[number, expert] = {}, {}
                for bits in widths:
                    own = at_width(bits, scheme)
                    try:
                        for name, W in weights.items():
                            packed = RTN().quantise(before[name].float(), own, None, path)
                            W.copy_(dequantise(packed, (W.shape[0], W.shape[1]), own, W.dtype))
                        found[number, expert][bits] = _loss(model, batches) - plain
                    finally:
                        for name, W in weights.items():
                            W.copy_(before[name])
                    sizes[number, expert][bits] = packed_bytes([tuple(W.shape) for W in weights.values()], own)
        return Profile(found, sizes)
    finally:
        model.train(training)


def _loss(model: Any, batches: Sequence[Any]) -> float:
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)
