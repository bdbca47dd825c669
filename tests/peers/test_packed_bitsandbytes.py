"""NF4 beside bitsandbytes' own: the same values, bit for bit."""

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
