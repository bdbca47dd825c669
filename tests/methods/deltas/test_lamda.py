import pytest
import torch
from torch import nn

import rankfold
from rankfold import LaMDA
from rankfold.deltas.lamda import spectral_ranks
from tests.methods.support import DOUBLE, attached, change, close, draw, linear, perturb


def diagonal(*sigma: float) -> nn.Linear:
    return linear(torch.diag(torch.tensor(sigma, dtype=DOUBLE)))


@pytest.mark.parametrize("start", ["svd", "zero"])
@pytest.mark.parametrize("alpha", [None, 1.0, 16.0])
def test_starts_as_the_base(start: str, alpha: float | None):
    W, x = draw(6, 8), draw(3, 8, seed=1)
    model, _ = attached(linear(W), LaMDA(rank=4, alpha=alpha, start=start))
    close(model(x), x @ W.T, 1e-12)


def test_svd_start_holds_the_leading_part_of_the_weight():
    W = draw(6, 8)
    _, delta = attached(linear(W), LaMDA(rank=3, alpha=12))
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    close(4 * delta.B @ delta.S @ delta.A, U[:, :3] @ torch.diag(sigma[:3]) @ Vt[:3])
    close(delta.S, torch.diag(sigma[:3]) / 4)
    close(delta.B.T @ delta.B, torch.eye(3), 1e-12)
    close(delta.scale * delta.B0 @ delta.A0, U[:, :3] @ torch.diag(sigma[:3]) @ Vt[:3])


def test_zero_start_as_in_the_code():
    _, delta = attached(nn.Linear(400, 300), LaMDA(rank=100, start="zero"))
    assert not delta.B.any()
    assert 0.98 / 20 < delta.A.abs().max() <= 1 / 20
    assert 0.98 / 10 < delta.S.abs().max() <= 1 / 10
    assert "A0" not in delta._buffers


@pytest.mark.parametrize("start", ["svd", "zero"])
def test_A_is_frozen_and_B_and_S_train(start: str):
    model, delta = attached(linear(draw(6, 8)), LaMDA(rank=3, start=start))
    before = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(draw(5, 8)).square().sum().backward()
        optimizer.step()
    moved = {name for name, tensor in delta.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"B", "S"}


def test_rank_of_the_change():
    """At most 2r, the card says; since A is the offset's too, it is even r as long as the start is LaMDA's own."""
    _, delta = attached(linear(draw(12, 10)), LaMDA(rank=3))
    perturb(delta)
    assert torch.linalg.matrix_rank(change(delta)) == 3
    close(change(delta), delta.B @ delta.S @ delta.A - delta.B0 @ delta.A0)
    assert [factor.shape for factor in delta.pair()] == [(12, 6), (6, 10)]


def test_count():
    _, delta = attached(nn.Linear(8, 6), LaMDA(rank=3))
    assert sum(p.numel() for p in delta.parameters()) == 3 * 3 + 3 * 6 == LaMDA(rank=3).count(delta.site)


def test_folded_is_the_same_function():
    W, x = draw(6, 8), draw(3, 8, seed=1)
    one, plain = attached(linear(W), LaMDA(rank=3, alpha=12))
    two, folded = attached(linear(W), LaMDA(rank=3, alpha=12), fold=True)
    perturb(plain), perturb(folded)
    close(one(x), two(x), 1e-12)


def test_an_init_takes_the_place_of_the_start():
    W, x = draw(6, 8), draw(3, 8, seed=1)
    model, delta = attached(linear(W), LaMDA(rank=2, alpha=4), init=rankfold.PiSSA())
    close(model(x), x @ W.T, 1e-12)
    assert delta.A0.shape == (2, 8)
    close(delta.S, torch.eye(2))


def test_a_file_brings_it_back(tmp_path):
    model, delta = attached(linear(draw(6, 8)), LaMDA(rank=3))
    perturb(delta)
    rankfold.save(model, tmp_path)
    again = nn.Sequential(linear(draw(6, 8)))
    rankfold.load(again, tmp_path)
    assert torch.equal(again(draw(2, 8)), model(draw(2, 8)))


def test_spectral_ranks_worked_numbers():
    """Energies (9, 1, 0, 0), (4, 4, 4, 4) and (2, 1, 1, 0), of 10, 16 and 4."""
    model = nn.Sequential(diagonal(3, 1, 0, 0), diagonal(2, 2, 2, 2), diagonal(2**0.5, 1, 1, 0))
    sites = [delta.site for delta in rankfold.attach(model, LaMDA(rank=1), targets=["0", "1", "2"]).deltas.values()]
    # Shares after one rank each: 0.9, 0.25, 0.5. The flattest goes first, to 0.5, then (by name) to 0.75; ...
    assert spectral_ranks(sites, 3) == {"0": 1, "1": 1, "2": 1}
    assert spectral_ranks(sites, 4) == {"0": 1, "1": 2, "2": 1}
    assert spectral_ranks(sites, 6) == {"0": 1, "1": 3, "2": 2}
    assert spectral_ranks(sites, 8) == {"0": 1, "1": 4, "2": 3}
    assert spectral_ranks(sites, 99) == {"0": 4, "1": 4, "2": 4}


def test_lamda_plus_plus_keeps_the_budget_and_the_scale(tmp_path):
    torch.manual_seed(0)
    spectra = (0.3, 0.9, 1.0)
    model = nn.Sequential(*(diagonal(*(decay**k for k in range(12))) for decay in spectra))
    x = draw(3, 12)
    before = model(x)
    adapter = rankfold.attach(model, LaMDA(rank=4, alpha=8, allocation="spectral"), targets=["0", "1", "2"])
    ranks = [delta.S.shape[-1] for delta in adapter.deltas.values()]
    assert sum(ranks) == 12
    assert ranks[0] < ranks[1] < ranks[2]
    assert {delta.scale for delta in adapter.deltas.values()} == {2.0}
    close(model(x), before, 1e-12)
    rankfold.save(model, tmp_path)
    fresh = nn.Sequential(*(diagonal(*(decay**k for k in range(12))) for decay in spectra))
    again = rankfold.load(fresh, tmp_path)
    assert [delta.S.shape[-1] for delta in again.deltas.values()] == ranks


def test_two_of_three_factors_at_zero_are_refused(monkeypatch: pytest.MonkeyPatch):
    """B = 0 and S = 0 hold each other's gradient at zero, whatever the frozen A is."""

    def dead(self: rankfold.Delta, rng: torch.Generator) -> None:
        nn.init.ones_(self.A), nn.init.zeros_(self.B), nn.init.zeros_(self.S)

    monkeypatch.setattr(rankfold.deltas.lamda.LaMDADelta, "start", dead)
    with pytest.raises(rankfold.RankfoldError, match="two factors zero"):
        attached(nn.Linear(8, 6), LaMDA(rank=3))
