"""OFT, numerically as PEFT: the exact rotation, and the Neumann series, which PEFT takes of the opposite one."""

import pytest
from peft import OFTConfig
from torch import Tensor, nn

from rankfold import OFT
from tests.peers.pairs import pair, same_layout, same_training


def names(layer: nn.Module) -> dict:
    module = layer.oft_R["default"]

    def negative(mine: Tensor) -> Tensor:
        return -mine

    return {"q": (module.weight, negative if module.use_cayley_neumann else same_layout)}


@pytest.mark.parametrize("block_size", [2, 3, 12])
def test_outputs_gradients_and_one_step(block_size: int):
    targets = ["up", "down"]
    config = OFTConfig(r=0, oft_block_size=block_size, use_cayley_neumann=False, target_modules=targets)
    same_training(*pair(config, OFT(block_size=block_size), targets), names)


@pytest.mark.parametrize("terms", [4, 5, 8])
def test_neumann_series(terms: int):
    targets = ["up", "down"]
    config = OFTConfig(r=0, oft_block_size=4, num_cayley_neumann_terms=terms, target_modules=targets)
    same_training(*pair(config, OFT(block_size=4, neumann=terms), targets), names)
