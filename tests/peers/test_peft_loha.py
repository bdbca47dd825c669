"""LoHa, numerically as PEFT: as a Hadamard product and, where r² is small, as the product of two factors."""

import pytest
import torch
from peft import LoHaConfig
from torch import nn

from rankfold import LoHa
from tests.peers.pairs import pair, same_layout, same_training


def names(layer: nn.Module) -> dict:
    theirs = {"B1": layer.hada_w1_a, "A1": layer.hada_w1_b, "B2": layer.hada_w2_a, "A2": layer.hada_w2_b}
    return {name: (tensors["default"], same_layout) for name, tensors in theirs.items()}


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1), (2, 5), (4, 2)])
def test_outputs_gradients_and_one_step(rank: int, alpha: int):
    targets = ["up", "conv", "down"]
    config = LoHaConfig(r=rank, alpha=alpha, target_modules=targets)
    theirs, ours, adapter = pair(config, LoHa(rank=rank, alpha=alpha), targets)
    forms = {1: {"factors"}, 2: {"factors", "update"}, 4: {"update"}}
    assert {delta.form for delta in adapter.deltas.values()} == forms[rank]
    same_training(theirs, ours, adapter, names)


def test_the_same_start():
    theirs, _, adapter = pair(LoHaConfig(r=4, target_modules=["up"]), LoHa(rank=4), ["up"])
    for name, (their, _) in names(theirs.base_model.model.up).items():
        mine = adapter.deltas["up"].get_parameter(name)
        bound = 0 if name == "A2" else mine.shape[-1] ** -0.5
        for tensor in (mine, their):
            assert tensor.abs().max() <= bound
            assert torch.all(tensor == 0) if bound == 0 else tensor.abs().max() > 0.9 * bound
