"""(IA)³, numerically as PEFT: gains on outputs and on inputs of linear layers and convolutions."""

import pytest
from peft import IA3Config
from torch import Tensor, nn

from rankfold import IA3
from tests.peers.pairs import pair, same_training


def names(layer: nn.Module) -> dict:
    gain = layer.ia3_l["default"]

    def as_gain(mine: Tensor) -> Tensor:
        return mine.view(gain.shape)

    return {"l": (gain, as_gain)}


@pytest.mark.parametrize("feedforward", [[], ["down"], ["up", "conv"]])
def test_outputs_gradients_and_one_step(feedforward: list[str]):
    targets = ["up", "conv", "down"]
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    same_training(*pair(config, IA3(feedforward=feedforward), targets), names)
