"""PiSSA's card: worked numbers, optimality, identity, and the factors PEFT computes from the same weight."""

import pytest
import torch
from torch import nn

import rankfold
from rankfold.core import Site
from rankfold.errors import RankfoldError
from rankfold.inits.pissa import PiSSA
from tests.methods.inits.tiny import tiny_llama, tokens


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def factors(W, rank, scale=1.0, **options):
    W = torch.as_tensor(W)
    site = Site("layer", "linear", tuple(W.shape), False, W.dtype)
    B, A, _, offset = PiSSA(**options).factors(site, W, rank, scale, None, rng())
    assert offset
    return B, A


@pytest.mark.parametrize("scale", [1.0, 0.25, 4.0])
def test_worked_numbers(scale):
    B, A = factors(torch.diag(torch.tensor([3.0, 2, 1])), 1, scale)
    torch.testing.assert_close(scale * B @ A, torch.diag(torch.tensor([3.0, 0, 0])))
    torch.testing.assert_close(B.T @ B, torch.tensor([[3 / scale]]))
    torch.testing.assert_close(A @ A.T, torch.tensor([[3 / scale]]))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 6, 5)])
def test_what_is_left_is_the_tail_of_the_spectrum(shape):
    W, scale = torch.randn(*shape, generator=rng(), dtype=torch.float64), 0.5
    B, A = factors(W, 2, scale)
    sigma = torch.linalg.svdvals(W)
    residual = (W - scale * B @ A).square().sum((-2, -1))
    torch.testing.assert_close(residual, sigma[..., 2:].square().sum(-1))
    for gram in (B.mT @ B, A @ A.mT):
        torch.testing.assert_close(gram, torch.diag_embed(sigma[..., :2] / scale))


def test_the_fast_variant_is_close_on_a_flat_spectrum():
    W = torch.randn(200, 150, generator=rng(), dtype=torch.float64)
    (B, A), (Bf, Af) = factors(W, 8), factors(W, 8, iterations=16)
    best, fast = (W - B @ A).norm(), (W - Bf @ Af).norm()
    assert best < fast < best * 1.001
    assert all(torch.equal(a, b) for a, b in zip((Bf, Af), factors(W, 8, iterations=16), strict=True))


@pytest.mark.parametrize("alpha", [4, 16])
def test_the_factors_and_the_residual_are_pefts(alpha):
    peft = pytest.importorskip("peft")
    W = torch.randn(12, 10, generator=rng())
    peer = nn.Sequential(nn.Linear(10, 12))
    peer[0].weight.data = W.clone()
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights="pissa")
    layer = peft.get_peft_model(peer, config).base_model.model[0]
    B, A = factors(W, 4, alpha / 4)
    theirs_B, theirs_A = layer.lora_B["default"].weight.data, layer.lora_A["default"].weight.data
    sign = (A * theirs_A).sum(1).sign()
    torch.testing.assert_close(A, sign.unsqueeze(1) * theirs_A, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(B, sign * theirs_B, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(W - alpha / 4 * B @ A, layer.base_layer.weight.data, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("init", [PiSSA(), PiSSA(iterations=2)])
def test_a_model_starts_where_it_was_and_is_given_back_to_the_bit(init, fold):
    model, batch = tiny_llama(), tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(**batch).logits
        adapter = rankfold.attach(model, rankfold.LoRA(rank=4, alpha=8), init=init, fold=fold)
        torch.testing.assert_close(model(**batch).logits, plain, atol=1e-5, rtol=1e-5)
    delta = next(iter(adapter.deltas.values()))
    assert delta.is_folded == fold
    assert delta.B.any()
    assert delta.A.any()
    rankfold.detach(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_folded_and_unfolded_give_the_same_output_and_gradients():
    results = []
    for fold in (False, True):
        model = tiny_llama()
        adapter = rankfold.attach(model, rankfold.LoRA(rank=4, alpha=8), init=PiSSA(), fold=fold)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(1.1)  # away from the start, where the change is zero
        output = model(**tokens())
        output.loss.backward()
        results.append([output.logits.detach(), *(parameter.grad for parameter in adapter.parameters())])
    for unfolded, folded in zip(*results, strict=True):
        assert unfolded.any()
        torch.testing.assert_close(unfolded, folded, atol=1e-5, rtol=1e-4)


def test_other_layers_start_the_same_way():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 8, 3)

        def forward(self, ids):
            return self.conv(self.emb(ids).mT)

    torch.manual_seed(0)
    model, ids = Mixed(), torch.arange(10).reshape(2, 5)
    plain = model(ids)
    adapter = rankfold.attach(model, rankfold.LoRA(rank=3), targets=["emb", "conv"], init=PiSSA())
    torch.testing.assert_close(model(ids), plain, atol=1e-5, rtol=1e-5)
    assert [tuple(delta.A.shape) for delta in adapter.deltas.values()] == [(3, 11), (3, 18)]
    assert all(delta.B.any() for delta in adapter.deltas.values())


def test_what_cannot_be():
    with pytest.raises(RankfoldError, match="divides the singular values by the scale"):
        factors(torch.eye(3), 1, scale=0.0)
    bad = torch.eye(3)
    bad[0, 0] = float("nan")
    with pytest.raises(RankfoldError, match="NaN or infinity"):
        factors(bad, 1)
    with pytest.raises(RankfoldError, match="iterations"):
        rankfold.build("pissa", iterations=-1)
    assert rankfold.build("pissa", iterations=16).describe() == {"name": "pissa", "iterations": 16}
    with pytest.raises(RankfoldError, match="needs no statistics"):
        rankfold.attach(tiny_llama(), rankfold.LoRA(rank=2), init=PiSSA(), calibration=[tokens()])
