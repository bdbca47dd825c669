"""RandLoRA, numerically as PEFT, once PEFT's bases are put in the order in which it pairs them with the gains.

PEFT flattens B as (base, rank) but the gained A as (rank, base), so that B's column at place i·n + j meets the gains of
base j. Handing PEFT our column (j, i) at that place undoes it. Layers with another n would need another order.
"""

import pytest
import torch
from peft import RandLoraConfig
from torch import Tensor, nn

from rankfold import RandLoRA
from tests.peers.pairs import pair, same_layout, same_training


def names(layer: nn.Module) -> dict:
    def transposed(mine: Tensor) -> Tensor:
        return mine.T

    return {
        "Lambda": (layer.randlora_lambda["default"], transposed),
        "Gamma": (layer.randlora_gamma["default"], same_layout),
    }


@pytest.mark.parametrize("targets", [["up"], ["down"]])
@pytest.mark.parametrize("rank", [2, 5])
def test_outputs_gradients_and_one_step(targets: list[str], rank: int):
    config = RandLoraConfig(r=rank, randlora_alpha=4, target_modules=targets)
    theirs, ours, adapter = pair(config, RandLoRA(rank=rank, alpha=4, scaling="rank"), targets)
    A, B = theirs.base_model.randlora_A["default"], theirs.base_model.randlora_B["default"]
    assert adapter.shared.A.shape == A.squeeze(1).shape
    n = B.shape[1]
    assert adapter.shared.B.shape == (B.shape[0], n * rank)
    A.copy_(adapter.shared.A[:, None])
    B.copy_(adapter.shared.B.view(-1, n, rank).mT.reshape(-1, n, rank))
    same_training(theirs, ours, adapter, names)


def test_the_same_start():
    config = RandLoraConfig(r=4, target_modules=["up"])
    theirs, _, adapter = pair(config, RandLoRA(rank=4, scaling="rank"), ["up"])
    layer, delta = theirs.base_model.model.up, adapter.deltas["up"]
    torch.testing.assert_close(layer.randlora_gamma["default"], delta.Gamma, atol=1e-8, rtol=0)
    assert torch.equal(layer.randlora_lambda["default"].T, delta.Lambda)
