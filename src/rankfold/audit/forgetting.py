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
from rankfold.errors import RankfoldError


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
    model: nn.Module, name: str, blocks: Sequence[Tensor], *, draws: int = 2000, seed: int = 0
) -> Forgetting:
    """Under adapter `name`, on blocks of token ids (L,) each, for a causal language model.

    The interval is a paired bootstrap over the blocks. Raises RankfoldError for fewer than two blocks, and for another
    kind of model.
    """
    if len(blocks) < 2:
        raise RankfoldError(f"forgetting is measured on two blocks of text at least, not {len(blocks)}")
    device = next(model.parameters()).device
    was_training, rows = model.training, []
    model.eval()
    try:
        for block in blocks:
            ids = block.to(device)[None]
            with rankfold.using(model, None):
                base = _log_probabilities(model, ids)
            with rankfold.using(model, name):
                adapted = _log_probabilities(model, ids)
            labels = ids[0, 1:, None]
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


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Of the tokens at 1, 2, ... (L - 1, vocabulary), in float32 at least."""
    logits = getattr(model(input_ids=ids), "logits", ids)
    if logits.shape[:-1] != ids.shape:
        raise RankfoldError(f"{type(model).__name__} is no causal language model: it gives no token a probability")
    logits = logits[0, :-1]
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
