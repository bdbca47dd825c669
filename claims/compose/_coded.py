"""Sides whose adapter is trained as ever and then compressed: what they say as a callback is how."""

from dataclasses import replace
from itertools import islice
from typing import Any

import torch

import rankfold
from claims.harness import Measure, Run, Side, train
from claims.tasks import FromScratch, Loaded
from rankfold.compose.compeft import ALPHAS, grid, largest
from rankfold.compose.compress import compress


def then_compressed(loaded: Loaded, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """Train the adapter alone, compress it, and judge what is left; ComPEFT's α is chosen on 64 rows.

    "share of the gain lost" is of what training took off the held-out loss of the model without the adapter.
    """

    def judged(run: Run) -> dict[str, float]:
        model, adapter = run.loaded.model, run.adapter
        assert adapter is not None
        with rankfold.using(model, None):
            base = loaded.evaluate()["held-out loss"]
        for how in side.callbacks:
            _apply(loaded, adapter, dict(how))
        left = loaded.evaluate()["held-out loss"]
        whole = run.found["held-out loss"]
        return {
            "loss before": whole,
            "held-out loss": left,
            "share of the gain lost": (left - whole) / (base - whole),
            **(measure(run) if measure is not None else {}),
        }

    if isinstance(loaded, FromScratch):  # a pretrained model has a new head to train
        loaded.in_full = ()
    return train(loaded, replace(side, callbacks=()), seed, judged)


def _apply(loaded: Loaded, adapter: rankfold.Adapter, how: dict[str, Any]) -> None:
    """Put a compressed adapter in the place of the trained one."""
    if how["name"] == "pruning only":
        tau = {name: p.detach() for name, p in sorted(adapter.named_parameters())}
        flat = torch.cat([p.reshape(-1) for p in tau.values()])
        kept = torch.zeros_like(flat)
        kept[largest(flat, how["density"])] = 1
        parts = (flat * kept).split([p.numel() for p in tau.values()])
        adapter.load_state_dict({name: part.view_as(tau[name]) for name, part in zip(tau, parts, strict=True)})
        return
    built = rankfold.build(how.pop("name"), **how)
    if isinstance(built, rankfold.ComPEFT) and built.scale == "std":
        rows = list(islice(loaded.batches(3000, size=32), 2))

        def loss() -> float:
            with torch.no_grad():
                return sum(float(loaded.model(**batch).loss) for batch in rows)

        loaded.model.eval()
        built, _ = grid(adapter, loss, (built.density,), ALPHAS, built)
    small, _ = compress(adapter, built, "small")
    rankfold.set_active(adapter.model, small.name)
