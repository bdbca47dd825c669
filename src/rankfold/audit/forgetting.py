"""What an adapter made a model forget: the loss on text that has nothing to do with its task.

`F = CE_adapted - CE_base` in nats a token over fixed blocks of text; the drift `E_t KL(p_base ‖ p_adapted)`, for which
no token has to be the right one; and how often both put the same token first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rankfold
from rankfold.core.routing import unwrapped
from rankfold.errors import RankfoldError

_HIDDEN = 0.15  # share of the tokens that a masked language model is asked for


@dataclass(frozen=True)
class Forgetting:
    """`loss` F with the interval that holds it in 95 of 100 draws of the blocks; `base` is the base model's loss."""

    loss: float
    low: float
    high: float
    base: float
    drift: float
    agreement: float
    tokens: int

    @property
    def perplexity_ratio(self) -> float:
        return float(np.exp(self.loss))


@torch.no_grad()
def forgetting(
    model: nn.Module,
    name: str,
    blocks: Sequence[Tensor],
    *,
    mask: int | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Forgetting:
    """Under adapter `name`, on blocks of token ids (L,) each, for a causal language model.

    For a masked one `mask` is the id of its mask token: the loss is then the pseudo-loss on 15 % of each block's
    tokens, drawn from the seed, which are hidden, the same with and without the adapter. The interval is a paired
    bootstrap over the blocks. Raises RankfoldError for fewer than two blocks, and for another kind of model.
    """
    if len(blocks) < 2:
        raise RankfoldError(f"forgetting is measured on two blocks of text at least, not {len(blocks)}")
    if mask is None and type(unwrapped(model)).__name__.endswith("ForMaskedLM"):
        raise RankfoldError("a masked language model is asked for hidden tokens: give `mask`, the id of its mask token")
    device, rng = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    was_training, rows = model.training, []
    model.eval()
    try:
        for block in blocks:
            ids = block.to(device)[None]
            at: slice | Tensor = slice(-1)
            labels = ids[0, 1:, None]
            if mask is not None:
                at = torch.randperm(len(block), generator=rng)[: max(1, round(_HIDDEN * len(block)))].to(device)
                labels = ids[0, at, None]
                ids = ids.index_fill(1, at, mask)
            with rankfold.using(model, None):
                base = _log_probabilities(model, ids, at)
            with rankfold.using(model, name):
                adapted = _log_probabilities(model, ids, at)
            rows.append(
                [
                    float(-base.gather(-1, labels).sum()),
                    float(-adapted.gather(-1, labels).sum()),
                    float((base.exp() * (base - adapted)).sum()),
                    float((base.argmax(-1) == adapted.argmax(-1)).sum()),
                    len(labels),
                ]
            )
    finally:
        model.train(was_training)
    table = np.array(rows)
    before, after, drift, same, count = table.sum(0)
    picks = np.random.default_rng(seed).integers(0, len(rows), (draws, len(rows)))
    drawn = table[picks].sum(1)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / drawn[:, 4], [0.025, 0.975])
    return Forgetting(
        loss=float((after - before) / count),
        low=float(low),
        high=float(high),
        base=float(before / count),
        drift=float(drift / count),
        agreement=float(same / count),
        tokens=int(count),
    )


def _log_probabilities(model: Any, ids: Tensor, at: slice | Tensor) -> Tensor:
    """What the model says at the places `at` (n, vocabulary), in float32 at least."""
    logits = getattr(model(input_ids=ids), "logits", ids)
    if logits.shape[:-1] != ids.shape:
        raise RankfoldError(f"{type(model).__name__} is no language model: it gives no token a probability")
    logits = logits[0, at]
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
