"""MiSS, numerically as PEFT's."""

import pytest
from peft import MissConfig
from torch import nn

from rankfold import MiSS
from tests.peers.pairs import pair, same_layout, same_training


def names(layer: nn.Module) -> dict:
    return {"D": (layer.miss_block["default"], same_layout)}


@pytest.mark.parametrize(("rank", "mini"), [(3, None), (5, None), (3, 2), (5, 6)])
def test_outputs_gradients_and_one_step(rank: int, mini: int | None):
    targets = ["up", "down"]
    form = {"init_weights": True} if mini is None else {"init_weights": "mini", "mini_r": mini}
    config = MissConfig(r=rank, target_modules=targets, **form)
    same_training(*pair(config, MiSS(rank=rank, mini=mini), targets), names)
