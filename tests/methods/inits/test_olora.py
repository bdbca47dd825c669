"""OLoRA's card: orthonormal columns, a trapezoid, identity, and what PEFT computes from the same weight."""

import pytest
import torch
from torch import nn

from rankfold import LoRA, OLoRA
from rankfold.core import Site
from rankfold.errors import RankfoldError
from tests.methods.support import attached, close, draw, linear


def start(W, rank, scale=1.0):
    site = Site("layer", "linear", tuple(W.shape), False, W.dtype)
    return OLoRA().factors(site, W, rank, scale, None, torch.Generator())


def test_worked_numbers():
    """W = [[3, 1], [4, 7]]: q₁ = (3, 4)/5, r₁₁ = 5, r₁₂ = q₁ · (1, 7) = 31/5."""
    W = torch.tensor([[3.0, 1], [4, 7]], dtype=torch.float64)
    B, A, M, offset = start(W, 1)
    close(B, [[0.6], [0.8]])
    close(A, [[5, 6.2]])
    close(W - B @ A, [[0, 1 - 0.6 * 6.2], [0, 7 - 0.8 * 6.2]])
    assert M is None
    assert offset


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 6, 5)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_orthonormal_trapezoidal_and_the_first_columns_are_taken_out(shape, rank):
    W = draw(*shape)
    B, A, _, _ = start(W, rank)
    close(B.mT @ B, torch.eye(rank).expand(*shape[:-2], rank, rank), 1e-12)
    assert torch.equal(A, A.triu())
    assert (A.diagonal(dim1=-2, dim2=-1) > 0).all()
    left = W - B @ A
    close(left[..., :rank], torch.zeros_like(left[..., :rank]), 1e-12)
    assert (left.abs() > 1e-3).any() or rank == shape[-1]


@pytest.mark.parametrize("alpha", [2.0, 6.0])
def test_a_layer_starts_where_it_was_and_the_share_taken_out_grows_with_the_scale(alpha):
    W = draw(9, 8)
    model, delta = attached(linear(W), LoRA(rank=2, alpha=alpha), init=OLoRA())
    x = draw(4, 8, seed=1)
    close(model(x), x @ W.T)
    left = W - delta.scale * (delta.B0 @ delta.A0)
    close(left[:, :2], (1 - alpha / 2) * W[:, :2], 1e-12)


@pytest.mark.parametrize("alpha", [4, 16])
@pytest.mark.parametrize("shape", [(12, 10), (10, 12)])
def test_the_factors_and_the_residual_are_pefts(alpha, shape):
    peft = pytest.importorskip("peft")
    W = draw(*shape, dtype=torch.float32)
    peer = nn.Sequential(nn.Linear(shape[1], shape[0]))
    peer[0].weight.data = W.clone()
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights="olora")
    layer = peft.get_peft_model(peer, config).base_model.model[0]
    B, A, _, _ = start(W, 4, alpha / 4)
    theirs_B, theirs_A = layer.lora_B["default"].weight.data, layer.lora_A["default"].weight.data
    sign = theirs_A.diagonal().sign()
    close(A, sign.unsqueeze(1) * theirs_A, 1e-5)
    close(B, sign * theirs_B, 1e-5)
    close(W - alpha / 4 * B @ A, layer.base_layer.weight.data, 1e-5)


def test_a_16_bit_weight_is_decomposed_in_float32():
    torch.manual_seed(0)
    _, delta = attached(nn.Linear(20, 30).bfloat16(), LoRA(rank=4), init=OLoRA())
    close(delta.B.T @ delta.B, torch.eye(4), 1e-5)


def test_what_cannot_be():
    bad = torch.eye(3)
    bad[0, 0] = float("nan")
    with pytest.raises(RankfoldError, match="NaN or infinity"):
        start(bad, 1)
    with pytest.raises(RankfoldError, match="needs no statistics"):
        attached(nn.Linear(3, 3), LoRA(rank=1), init=OLoRA(), calibration=[{}])
