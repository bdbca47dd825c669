"""KaSA, numerically as PEFT: the cut, the product, the penalty (which PEFT sums over layers)."""

import pytest
import torch
from peft import KasaConfig, LoraConfig
from torch import nn

import rankfold
from rankfold import KaSA, KaSAPenalty
from tests.peers import test_peft_lora
from tests.peers.pairs import pair, same_layout, same_training


def names(layer: nn.Module) -> dict:
    return {**test_peft_lora.names(layer), "lam": (layer.lora_diag["default"], same_layout)}


def both(alpha: int = 7) -> tuple:
    targets = ["up", "down"]
    config = LoraConfig(r=3, lora_alpha=alpha, target_modules=targets, kasa_config=KasaConfig(beta=0.5, gamma=0.25))
    theirs, ours, adapter = pair(config, KaSA(rank=3, alpha=alpha), targets)
    with torch.no_grad():
        for site, delta in adapter.deltas.items():
            layer = theirs.get_submodule(f"base_model.model.{site}")
            cut = delta.adapted_weight(delta.W)
            assert (delta.W - cut).abs().max() > 1e-3
            # PEFT decomposes in float32 whatever the weight is
            torch.testing.assert_close(layer.base_layer.weight, cut, atol=1e-6, rtol=0)
            layer.base_layer.weight.copy_(cut)
            layer.lora_diag["default"].copy_(delta.lam)
    return theirs, ours, adapter


@pytest.mark.parametrize("alpha", [3, 7])
def test_outputs_gradients_and_one_step(alpha: int):
    same_training(*both(alpha), names)


def test_the_same_penalty_but_for_the_mean():
    theirs, ours, adapter = both()
    with torch.no_grad():
        for site, delta in adapter.deltas.items():
            for mine, (their, layout) in names(theirs.get_submodule(f"base_model.model.{site}")).items():
                their.copy_(layout(delta.get_parameter(mine)))
    callback = KaSAPenalty(beta=0.5, gamma=0.25)
    callback.on_attach(rankfold.adapters(ours)["default"], ours)
    summed = theirs.base_model._get_kasa_loss()
    assert summed > 1
    torch.testing.assert_close(2 * callback.penalty(), summed.double(), atol=1e-5, rtol=0)
