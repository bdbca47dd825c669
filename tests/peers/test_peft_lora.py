"""LoRA and rsLoRA, numerically as PEFT: linear, convolution, embedding."""

import pytest
from peft import LoraConfig
from torch import Tensor, nn

from rankfold import LoRA
from tests.peers.pairs import pair, same_layout, same_training


def names(layer: nn.Module) -> dict:
    if isinstance(layer.get_base_layer(), nn.Embedding):
        return {
            "A": (layer.lora_embedding_A["default"], same_layout),
            "B": (layer.lora_embedding_B["default"], same_layout),
        }
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def as_A(mine: Tensor) -> Tensor:
        return mine.view(A.shape)

    def as_B(mine: Tensor) -> Tensor:
        return mine.view(B.shape)

    return {"A": (A, as_A), "B": (B, as_B)}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [["up", "down"], ["conv"], ["emb"], ["emb", "up", "conv", "down"]])
def test_outputs_gradients_and_one_step(targets: list[str], rslora: bool):
    config = LoraConfig(r=3, lora_alpha=7, use_rslora=rslora, target_modules=targets)
    same_training(*pair(config, LoRA(rank=3, alpha=7, rslora=rslora), targets), names)
