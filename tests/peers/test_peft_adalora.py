"""AdaLoRA's parameterisation, numerically as PEFT; its scale is α / (r + 1e-5)."""

from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig
from torch import Tensor, nn

import rankfold
from rankfold import AdaLoRASVD, Orthogonality
from tests.peers.pairs import DOUBLE, pair, same_layout, same_training


def names(layer: nn.Module) -> dict:
    E = layer.lora_E["default"]

    def as_E(mine: Tensor) -> Tensor:
        return mine.view(E.shape)

    return {
        "A": (layer.lora_A["default"], same_layout),
        "B": (layer.lora_B["default"], same_layout),
        "lam": (E, as_E),
    }


def both(targets: list[str], r: int = 3, alpha: int = 7) -> tuple:
    config = AdaLoraConfig(init_r=r, lora_alpha=alpha, target_modules=targets, total_step=100)
    theirs, ours, adapter = pair(config, AdaLoRASVD(rank=r, alpha=alpha * r / (r + 1e-5)), targets)
    for name, parameter in theirs.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False)  # as PEFT makes it, before it turns on every parameter of the adapter
    return theirs, ours, adapter


@pytest.mark.parametrize("targets", [["up", "down"], ["conv"]])
def test_outputs_gradients_and_one_step(targets: list[str]):
    same_training(*both(targets), names)


def test_the_same_regulariser():
    theirs, ours, adapter = both(["up", "down"])
    with torch.no_grad():
        for site, delta in adapter.deltas.items():
            layer = theirs.get_submodule(f"base_model.model.{site}")
            layer.lora_A["default"].copy_(delta.A)
            layer.lora_B["default"].copy_(delta.B)
    theirs.base_model.model.forward = lambda: SimpleNamespace(loss=torch.zeros((), dtype=DOUBLE))
    callback = Orthogonality(weight=theirs.peft_config["default"].orth_reg_weight)
    callback.on_attach(rankfold.adapters(ours)["default"], ours)
    assert callback.penalty() > 0.1
    torch.testing.assert_close(callback.penalty(), theirs.base_model().loss, atol=1e-12, rtol=0)
