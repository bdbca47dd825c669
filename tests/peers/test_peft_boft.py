"""BOFT, numerically as PEFT. PEFT computes more than one butterfly factor with its CUDA kernel only: here with a copy
of what the kernel does, blocks (m, k, b, b) on the diagonals of (m, k·b, k·b)."""

import peft.tuners.boft.layer as theirs_boft
import pytest
import torch
from peft import BOFTConfig
from torch import Tensor, nn

from rankfold import BOFT
from tests.peers.pairs import pair, same_training


class BlockDiagonal:
    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs_boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(theirs_boft, "FastBlockDiag", BlockDiagonal)


def names(layer: nn.Module) -> dict:
    gain = layer.boft_s["default"]

    def column(mine: Tensor) -> Tensor:
        return mine.view(gain.shape)

    def same(mine: Tensor) -> Tensor:
        return mine

    return {"R": (layer.boft_R["default"], same), "s": (gain, column)}


@pytest.mark.parametrize(("block_size", "m"), [(3, 1), (4, 1), (2, 2), (6, 2)])
def test_outputs_gradients_and_one_step(block_size: int, m: int):
    targets = ["up", "down"]
    config = BOFTConfig(boft_block_size=block_size, boft_n_butterfly_factor=m, target_modules=targets)
    same_training(*pair(config, BOFT(block_size=block_size, m=m), targets), names)


@pytest.mark.parametrize(("block_size", "m"), [(2, 4), (4, 3), (8, 2)])
def test_longer_butterflies(block_size: int, m: int):
    """Their butterfly on 16 inputs, as a matrix."""
    import rankfold

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 5).double())
    ours = nn.Sequential(nn.Linear(16, 5).double())
    ours.load_state_dict(base.state_dict())
    delta = rankfold.attach(ours, BOFT(block_size=block_size, m=m), targets=["0"]).deltas["0"]
    config = BOFTConfig(boft_block_size=block_size, boft_n_butterfly_factor=m, target_modules=["0"])
    theirs = theirs_boft.Linear(base[0], "default", config).double()
    with torch.no_grad():
        delta.R.copy_(torch.randn_like(delta.R))
        theirs.boft_R["default"].copy_(delta.R)
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-12, rtol=0)
    theirs.merge()
    torch.testing.assert_close(delta.adapted_weight(delta.W), base[0].weight, atol=1e-12, rtol=0)
