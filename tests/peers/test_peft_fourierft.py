"""FourierFT, numerically as PEFT, which makes its ΔW in float32 whatever the model's type."""

import pytest
import torch
from peft import FourierFTConfig
from torch import nn

from rankfold import FourierFT
from tests.peers.pairs import pair, same_layout, same_training


def names(layer: nn.Module) -> dict:
    return {"c": (layer.fourierft_spectrum["default"], same_layout)}


@pytest.mark.parametrize(("n", "seed"), [(5, 777), (40, 777), (72, 3)])
def test_outputs_gradients_and_one_step(n: int, seed: int):
    targets = ["up", "down"]
    config = FourierFTConfig(n_frequency=n, scaling=20.0, random_loc_seed=seed, target_modules=targets)
    method = FourierFT(n=n, alpha=20.0, entry_seed=seed)
    same_training(*pair(config, method, targets), names, atol=3e-6)


def test_the_same_places():
    config = FourierFTConfig(n_frequency=30, target_modules=["up"])
    theirs, _, adapter = pair(config, FourierFT(n=30), ["up"])
    row, column = theirs.base_model.model.up.indices["default"]
    assert torch.equal(row * 12 + column, adapter.deltas["up"].places)
