"""Bi-LoRA: the card's numbers, the gradient of its quantiser, and factors of few levels."""

from pathlib import Path

import pytest
import torch

import rankfold
from rankfold import BiLoRA, LoRA
from rankfold.core.levels import levels, quantise
from tests.methods.support import DOUBLE, attached, change, close, draw, linear, perturb, put

W = draw(6, 5, seed=9)


def test_worked_numbers() -> None:
    """w = (1, 2, 3, 4), b = 1: μ = 2.5, σ = 1.29099, so (1.6292, 1.6292, 3.3708, 3.3708)."""
    w = torch.tensor([1.0, 2, 3, 4])
    torch.testing.assert_close(quantise(w, 1), torch.tensor([1.6292, 1.6292, 3.3708, 3.3708]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_scale_and_shift_go_through(bits: int) -> None:
    """Q of c w + d is c w_q + d for c > 0, and for c < 0 too where no number is on a boundary."""
    w = draw(8, 7, seed=bits)
    for c, d in ((3.0, 0.0), (0.2, -5.0), (-2.0, 1.0)):
        close(quantise(c * w + d, bits), c * quantise(w, bits) + d, atol=1e-4 * abs(c))  # σ + 1e-5 is no exact scale


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_no_more_values_than_levels_and_the_nearest(bits: int) -> None:
    w = draw(30, 20)
    found = quantise(w, bits)
    values = w.std() * torch.tensor(levels(bits), dtype=DOUBLE) + w.mean()
    assert len(found.unique()) == 2**bits
    nearest = values[(w[..., None] - values).abs().argmin(-1)]
    assert float((found - nearest).abs().gt(1e-12).double().mean()) < 0.001  # 1e-5 moves what is between two


def test_each_expert_has_a_mean_of_its_own() -> None:
    w = draw(3, 8, 6) * torch.tensor([1.0, 10, 100], dtype=DOUBLE)[:, None, None]
    close(quantise(w, 1), torch.stack([quantise(matrix, 1) for matrix in w]), atol=1e-9)


def test_the_gradient_is_straight_through_q_alone() -> None:
    """By hand: with Q's slope taken for 1, `w_q = σ ŵ + μ + σ (Q − ŵ)` with the last bracket a constant."""
    w, g = draw(4, 3, seed=1).requires_grad_(), draw(4, 3, seed=2)
    (ours,) = torch.autograd.grad(quantise(w, 1), w, g)
    mean, std = w.mean(), w.std()
    scaled = (w - mean) / (std + 1e-5)
    constant = quantise(w.detach(), 1).sub(w.detach().mean()).div(w.detach().std()) - scaled.detach()
    (by_hand,) = torch.autograd.grad(std * (scaled + constant) + mean, w, g)
    close(ours, by_hand)
    (without,) = torch.autograd.grad(std.detach() * (w - mean.detach()) / (std.detach() + 1e-5), w, g)
    assert (ours - without).abs().max() > 1e-2, "μ and σ had no gradient"


def test_equal_numbers_have_a_finite_gradient() -> None:
    for w in (torch.zeros(3, 3), torch.full((2, 2), 5.0), torch.ones(1)):
        w.requires_grad_()
        quantise(w, 1).sum().backward()
        torch.testing.assert_close(quantise(w, 1), w)
        assert bool(torch.isfinite(w.grad).all())  # type: ignore[arg-type]


def test_the_change_is_the_product_of_the_quantised_factors() -> None:
    """B = (1, 2, 3, 4)ᵀ, A = (1, −1): a 1-bit A is ±0.6745 √2, an α of 2 at rank 1 doubles."""
    model, delta = attached(linear(torch.zeros(4, 2)), BiLoRA(rank=1, alpha=2))
    put(delta, B=[[1.0], [2], [3], [4]], A=[[1.0, -1]])
    a = 0.67449 * 2**0.5
    b = torch.tensor([1.6292, 1.6292, 3.3708, 3.3708], dtype=DOUBLE)
    close(change(delta), 2 * torch.outer(b, torch.tensor([a, -a], dtype=DOUBLE)), atol=5e-4)
    x = draw(3, 2)
    close(model(x), x @ change(delta).T)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_factors_have_few_values_and_train_between_them(bits: int) -> None:
    """A step smaller than the way to the next level moves μ and σ, and some codes; the latent numbers add up."""
    model, delta = attached(linear(W), BiLoRA(rank=3, bits=bits))
    x, target = draw(50, 5, seed=3), draw(50, 6, seed=4)
    optimizer = torch.optim.Adam(delta.parameters(), 3e-2)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.97 * losses[0]
    B, A = delta.factors()
    assert max(len(B.unique()), len(A.unique())) <= 2**bits
    assert len(delta.B.unique()) == 18


def test_the_start_is_small_and_never_nothing() -> None:
    _, delta = attached(linear(draw(64, 48)), BiLoRA(rank=8))
    assert float(delta.B.detach().abs().max()) <= 2e-3
    assert float(delta.B.detach().std()) == pytest.approx(0.88e-3, rel=0.1)  # a normal of 1e-3, cut at two deviations
    assert float(delta.A.detach().abs().max()) <= 48**-0.5
    assert 0 < float(change(delta).abs().max()) < 1e-3


@pytest.mark.parametrize("init", ["pissa", "olora", "milora"])
def test_a_start_out_of_the_weight_is_taken_out_as_quantised(init: str) -> None:
    _, delta = attached(linear(W), BiLoRA(rank=2, bits=2), init=rankfold.build(init))
    close(change(delta), torch.zeros(6, 5))
    perturb(delta)
    assert change(delta).abs().max() > 1e-2


def test_a_factor_of_zeros_stays_the_small_random_one() -> None:
    """Of an init that starts at B = 0: all levels would be one, with no slope to leave it."""
    _, delta = attached(linear(W), BiLoRA(rank=2))
    own = delta.B.detach().clone()
    delta.set_start(torch.zeros(6, 2), draw(2, 5))
    assert torch.equal(delta.B, own)
    close(delta.A, draw(2, 5))


def test_saved_as_it_trains_and_compressed_as_it_computes(tmp_path: Path) -> None:
    """`save` keeps the latent numbers; the codes are those of the forward, under a LoRA, to the last bit."""
    from rankfold.compose.compress import compress

    model, delta = attached(linear(W).float(), BiLoRA(rank=3, bits=2, alpha=6, dropout=0.1))
    perturb(delta)
    model.eval()
    x = draw(4, 5).float()
    expected = model(x)
    rankfold.save(model, tmp_path / "whole")
    for source in (rankfold.adapters(model)["default"], tmp_path / "whole"):
        path, report = compress(source, "onebit", tmp_path / "small")
        other = torch.nn.Sequential(linear(W).float())
        loaded = rankfold.load(other, path)
        assert loaded.method == LoRA(rank=3, alpha=6, dropout=0.1)
        assert torch.equal(other.eval()(x), expected)
        assert report.code == 1 + sum(8 + (2 * n + 7) // 8 for n in (18, 15))
        assert all(layer.error < 1e-7 for layer in report.layers.values())
    again = torch.nn.Sequential(linear(W).float())
    kept = rankfold.load(again, tmp_path / "whole").state_dict()
    assert all(torch.equal(tensor, kept[f"deltas.0.{name}"]) for name, tensor in delta.named_parameters())


def test_bits_that_it_was_not_trained_with_are_refused() -> None:
    from rankfold.compose.compress import compress

    model, _ = attached(linear(W), BiLoRA(rank=2, bits=2))
    adapter = rankfold.adapters(model)["default"]
    compress(adapter, rankfold.OneBit(bits=2), "two")
    for how, words in (
        (rankfold.OneBit(bits=1), "trained with 2 bits, not 1"),
        (rankfold.OneBit(from_start=True), "not from its start"),
        (rankfold.ComPEFT(), "how='onebit'"),
    ):
        with pytest.raises(rankfold.RankfoldError, match=words):
            compress(adapter, how)
