import pytest
import torch
from torch import nn

import rankfold
from rankfold import KaSA
from tests.methods.support import attached, change, close, draw, linear, perturb, put


def test_worked_numbers():
    model, delta = attached(linear(torch.diag(torch.tensor([3.0, 2, 1]))), KaSA(rank=1, alpha=5))
    close(delta.adapted_weight(delta.W), torch.diag(torch.tensor([3.0, 2, 0])))
    close(model(torch.eye(3, dtype=torch.float64)), torch.diag(torch.tensor([3.0, 2, 0])))
    put(delta, B=[[0], [0], [1]], lam=[2], A=[[1, 0, 0]])
    close(delta.adapted_weight(delta.W), [[3, 0, 0], [0, 2, 0], [10, 0, 0]])


@pytest.mark.parametrize("alpha", [None, 1.0, 9.0])
@pytest.mark.parametrize("shape", [(6, 15), (15, 6), (7, 7)])
def test_cuts_the_r_smallest_components_for_every_shape_and_scale(shape: tuple[int, int], alpha: float | None):
    """Also where in ≥ out + r, where the authors' code cuts nothing."""
    W = draw(*shape)
    _, delta = attached(linear(W), KaSA(rank=2, alpha=alpha))
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    cut = delta.adapted_weight(W).detach()
    close(cut, U[:, :-2] * S[:-2] @ Vt[:-2], 1e-12)
    close((W - cut).square().sum(), S[-2:].square().sum(), 1e-12)
    assert torch.linalg.matrix_rank(cut, atol=1e-9) == len(S) - 2


def test_start_and_first_gradients():
    model, delta = attached(linear(draw(6, 5)), KaSA(rank=2, alpha=6))
    B, A = delta.factors()
    assert not (B @ A).any()
    x, up = draw(4, 5, seed=1), draw(4, 6, seed=2)
    model(x).backward(up)
    assert not delta.A.grad.any()
    assert not delta.lam.grad.any()
    close(delta.B.grad, 3 * (up.T @ x) @ delta.A.detach().T * delta.lam.detach(), 1e-11)


def test_what_is_drawn_comes_from_the_seed():
    def start(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(120, 110))
        return rankfold.attach(model, KaSA(rank=100), targets=["0"], seed=seed).deltas["0"].lam

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))
    assert start(3).std().item() == pytest.approx(1, rel=0.15)


def test_the_base_stays_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8))
    before, x = model[0].weight.clone(), torch.randn(4, 9)
    plain = model(x)
    rankfold.attach(model, KaSA(rank=2), targets=["0"])
    assert (model(x) - plain).abs().max() > 1e-3
    with rankfold.using(model, None):
        assert torch.equal(model(x), plain)
    with rankfold.using(model, [None, "default", None, "default"]):
        assert torch.equal(model(x)[::2], plain[::2])
    rankfold.merge(model)
    rankfold.unmerge(model)
    rankfold.detach(model)
    assert torch.equal(model[0].weight, before)


def test_saves_the_cut(tmp_path):
    torch.manual_seed(0)
    model, delta = attached(nn.Linear(9, 8), KaSA(rank=2))
    perturb(delta)
    x = torch.randn(4, 9)
    expected = model(x)
    rankfold.save(model, tmp_path / "a")
    rankfold.detach(model)
    rankfold.load(model, tmp_path / "a")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("fold", [False, True])
def test_dropout_keeps_the_cut_in_the_mean_and_folded_exactly(fold: bool):
    model, _ = attached(linear(draw(6, 5)), KaSA(rank=2, dropout=0.5), fold=fold)
    x = draw(2, 5, seed=1)
    expected = model.eval()(x)
    model.train()
    torch.manual_seed(0)
    samples = torch.stack([model(x) for _ in range(400)])
    spread = samples.std(0).max()
    assert (spread < 1e-12) == fold
    close(samples.mean(0), expected.detach(), 0.25)


def test_exports_whole_and_counts():
    model, delta = attached(linear(draw(9, 8)), KaSA(rank=2))
    perturb(delta)
    lora, report = rankfold.as_lora(model)
    B, A = lora.deltas["0"].factors()
    assert report["0"] < 1e-7
    close(B @ A, change(delta), 1e-10)
    adapter = rankfold.attach(nn.Sequential(nn.Linear(10, 7)), KaSA(rank=3), targets=["0"])
    assert adapter.num_parameters() == 3 * (10 + 7 + 1)
    with pytest.raises(rankfold.UnsupportedError, match="leaves none"):
        attached(nn.Linear(10, 7), KaSA(rank=7))
