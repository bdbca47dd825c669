"""Bat and Bone, numerically as PEFT, where they live under the name MiSS."""

import pytest
from peft import MissConfig
from torch import nn

from rankfold import Bone
from tests.peers.pairs import pair, same_layout, same_training


def names(layer: nn.Module) -> dict:
    return {"D": (layer.miss_block["default"], same_layout)}


@pytest.mark.parametrize(("variant", "init", "rank"), [("bat", "bat", 3), ("bone", True, 3), ("bone", True, 5)])
def test_outputs_gradients_and_one_step(variant: str, init: bool | str, rank: int):
    targets = ["up", "down"]
    config = MissConfig(r=rank, target_modules=targets, init_weights=init)
    same_training(*pair(config, Bone(rank=rank, variant=variant), targets), names)
