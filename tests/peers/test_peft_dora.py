"""DoRA, numerically as PEFT: linear, convolution, embedding."""

import pytest
from peft import LoraConfig
from torch import Tensor, nn

from rankfold import DoRA
from tests.peers import test_peft_lora
from tests.peers.pairs import pair, same_training


def names(layer: nn.Module) -> dict:
    m = layer.lora_magnitude_vector["default"].weight

    def as_m(mine: Tensor) -> Tensor:
        return mine.view(m.shape)

    return {**test_peft_lora.names(layer), "m": (m, as_m)}


@pytest.mark.parametrize("targets", [["up", "down"], ["conv"], ["emb"], ["emb", "up", "conv", "down"]])
def test_outputs_gradients_and_one_step(targets: list[str]):
    config = LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=targets)
    same_training(*pair(config, DoRA(rank=3, alpha=7), targets), names)


def test_the_same_magnitude_at_start():
    config = LoraConfig(r=3, use_dora=True, target_modules=["up", "conv"])
    theirs, _, adapter = pair(config, DoRA(rank=3), ["up", "conv"])
    for site, delta in adapter.deltas.items():
        m = theirs.get_submodule(f"base_model.model.{site}").lora_magnitude_vector["default"].weight
        assert (m.flatten() - delta.m).abs().max() < 1e-6
