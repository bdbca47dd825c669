import pytest
import torch
from torch import nn

import rankfold
from rankfold import SFTSparse
from tests.methods.support import attached, change, close, draw, linear, perturb


def three() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 30), nn.Linear(30, 20), nn.Linear(20, 5))


def test_starts_at_random_different_indices_and_at_zero():
    model, delta = attached(linear(draw(30, 40)), SFTSparse(density=0.25))
    assert delta.phi.tolist() == [0.0] * 300
    assert delta.indices.unique().numel() == 300
    rows = torch.div(delta.indices, 40, rounding_mode="floor").bincount(minlength=30)
    assert int(rows.max()) <= 22
    assert int(rows.min()) >= 2
    x = draw(4, 40)
    close(model(x), x @ model[0].weight.T)


@pytest.mark.parametrize(
    ("method", "k"),
    [(SFTSparse(), 12), (SFTSparse(density=1e-6), 1), (SFTSparse(k=7), 7), (SFTSparse(density=1), 1200)],
)
def test_count(method: SFTSparse, k: int):
    """⌊0.01 · 1200⌋; at least one; as many as k says; all of them."""
    _, delta = attached(linear(draw(30, 40)), method)
    assert delta.phi.numel() == k == method.count(delta.site)


def test_a_total_is_shared_out_by_size():
    """1,000 values over weights of 300, 600 and 100 entries; what is over by rounding down is not handed out."""
    adapter = rankfold.attach(three(), SFTSparse(total=505), targets=["0", "1", "2"])
    assert [delta.phi.numel() for delta in adapter.deltas.values()] == [151, 303, 50]
    assert [adapter.methods[str(i)].count(site) for i, site in enumerate(adapter.sites)] == [151, 303, 50]
    tiny = rankfold.attach(three(), SFTSparse(total=3), targets=["0", "1", "2"])
    assert {site: delta.phi.numel() for site, delta in tiny.deltas.items()} == {"1": 1}


def test_a_shared_total_is_saved_site_by_site(tmp_path):
    model = three()
    adapter = rankfold.attach(model, SFTSparse(total=505), targets=["0", "1", "2"])
    for delta in adapter.deltas.values():
        perturb(delta)
    rankfold.save(model, tmp_path)
    rankfold.attach(model, SFTSparse(), targets=["0"], name="other")
    loaded = rankfold.load(model, tmp_path, name="again")
    assert loaded.num_parameters() == 504
    assert loaded.methods["0"].k == 151
    x = torch.randn(3, 10)
    with rankfold.using(model, "default"):
        expected = model(x)
    assert torch.equal(model(x), expected)


def test_more_values_than_entries_are_refused():
    with pytest.raises(rankfold.UnsupportedError, match="k = 51 is over the weight's 50"):
        attached(linear(draw(5, 10)), SFTSparse(k=51))
    for wrong in ({"density": 0}, {"density": 1.5}, {"k": -1}, {"total": 0}):
        with pytest.raises(rankfold.RankfoldError):
            rankfold.build("sft-sparse", **wrong)


def test_merged_equals_unmerged_to_rounding_and_is_sparse():
    model, delta = attached(linear(draw(30, 40), draw(30)), SFTSparse(density=0.1))
    perturb(delta)
    assert int((change(delta) != 0).sum()) == 120
    x = draw(4, 40)
    expected = model(x)
    rankfold.merge(model)
    close(model(x), expected)


def test_the_seed_decides_the_indices():
    one, two, other = (attached(linear(draw(30, 40)), SFTSparse(), seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(one.indices, two.indices)
    assert not torch.equal(one.indices, other.indices)


def test_weight_decay_pulls_back_to_the_pretrained_weight():
    _, delta = attached(linear(draw(5, 4)), SFTSparse(k=6))
    perturb(delta)
    before = delta.phi.detach().clone()
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=2.0)
    delta.phi.grad = torch.zeros_like(delta.phi)
    optimizer.step()
    close(delta.phi, 0.8 * before)


def test_finds_a_sparse_update_that_its_indices_cover():
    W, x = draw(8, 6), draw(50, 6, seed=4)
    target = W.clone()
    target[2, 3] += 1.5
    target[7, 0] -= 0.7
    model, delta = attached(linear(W), SFTSparse(k=4))
    delta.place(torch.tensor([0, 2 * 6 + 3, 7 * 6, 47]))
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x) - x @ target.T).square().mean().backward()
        optimizer.step()
    close(delta.phi, [0, 1.5, -0.7, 0], 1e-3)
