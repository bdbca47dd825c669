"""NF4 beside bitsandbytes' own: the same values, bit for bit."""

from typing import Any

import pytest
import torch
from torch import nn

import rankfold
from rankfold.core.packed import NF4
from tests.quantizers import linear_4bit

functional = pytest.importorskip("bitsandbytes.functional")


def test_the_table() -> None:
    theirs = functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(torch.tensor(NF4), theirs)


@pytest.mark.parametrize("shape", [(64, 128), (96, 64)])
def test_the_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(shape[1], shape[0], bias=False)
    theirs = linear_4bit(plain, "nf4")
    model = nn.Sequential(plain)
    rankfold.quantize(model, rankfold.Scheme(format="nf4", group=64, scales="float32"), targets=["0"])
    weight = theirs.weight
    expected = functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[union-attr]
    assert torch.equal(model[0].dequantise(), expected.view(shape))  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(64, 128), (250, 128), (300, 192)])
def test_double_quantisation(shape: tuple[int, int]) -> None:
    """Its kernel for processors looks the codes of scales up coarsely and misses the nearest one now and then; with
    the nearest in its place, as its other kernels choose, its values are ours."""
    torch.manual_seed(0)
    plain = nn.Linear(shape[1], shape[0], bias=False)
    theirs = linear_4bit(plain, "nf4", double=True)
    model = nn.Sequential(plain)
    rankfold.quantize(model, rankfold.Scheme(format="nf4", group=64, double=True), targets=["0"])
    layer: Any = model[0]
    state: Any = theirs.weight.quant_state  # type: ignore[union-attr]
    assert torch.equal(layer.packed.codes.flatten(), swapped(theirs.weight.data))  # type: ignore[arg-type]
    assert layer.blocks[0] == state.offset
    assert torch.equal(layer.blocks[1:], state.state2.absmax)
    missed = layer.scales.flatten().int() - state.absmax.int()
    assert missed.abs().max() <= 1
    assert (missed != 0).float().mean() < 0.01
    state.absmax = layer.scales.flatten()
    assert torch.equal(layer.dequantise(), functional.dequantize_4bit(theirs.weight.data, state).view(shape))


def swapped(data: torch.Tensor) -> torch.Tensor:
    """Bytes whose two codes change places: bitsandbytes puts the first one in the upper bits."""
    return (data >> 4 | data << 4).flatten()
