"""LoKr, numerically as PEFT: both matrices whole, D through r, both through r, and other factors of the sides."""

from typing import Any

import pytest
from peft import LoKrConfig
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from rankfold import LoKr
from rankfold.deltas.lokr import split
from tests.peers.pairs import pair, same_training

THEIRS = {
    "C": "lokr_w1",
    "C_b": "lokr_w1_a",
    "C_a": "lokr_w1_b",
    "D": "lokr_w2",
    "D_b": "lokr_w2_a",
    "D_a": "lokr_w2_b",
}


def names(layer: nn.Module) -> dict:
    found = {}
    for name, attribute in THEIRS.items():
        if "default" in (tensors := getattr(layer, attribute)):
            their = tensors["default"]

            def layout(mine: Tensor, shape: Any = their.shape) -> Tensor:
                return mine.view(shape)  # of a convolution, D with the kernel's shape

            found[name] = (their, layout)
    return found


@pytest.mark.parametrize(
    ("rank", "factor", "both", "trained"),
    [(8, -1, False, "C D"), (1, -1, False, "C D_b D_a"), (1, -1, True, "C_b C_a D_b D_a"), (2, 2, False, "C D_b D_a")],
)
def test_outputs_gradients_and_one_step(rank: int, factor: int, both: bool, trained: str):
    targets = ["up", "conv", "down"]
    config = LoKrConfig(r=rank, alpha=3, decompose_factor=factor, decompose_both=both, target_modules=targets)
    method = LoKr(rank=rank, alpha=3, factor=None if factor == -1 else factor, decompose_both=both)
    theirs, ours, adapter = pair(config, method, targets)
    assert list(adapter.deltas["up"]._parameters) == trained.split()
    same_training(theirs, ours, adapter, names)


@pytest.mark.parametrize("factor", [None, 1, 2, 4, 5, 8, 16, 20])
def test_the_same_factors_of_a_side(factor: int | None):
    for size in [*range(1, 200), 576, 768, 1152, 4096, 11008]:
        assert split(size, factor) == factorization(size, -1 if factor is None else factor), size
