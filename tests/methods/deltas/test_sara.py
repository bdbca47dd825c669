import math

import pytest
import torch
from torch import nn

import rankfold
from rankfold import SaRA
from tests.methods.support import attached, close, draw, linear, perturb

WORKED = [[0.001, 0.5], [-0.0015, -0.3]]


def test_worked_mask_is_the_first_column():
    _, delta = attached(linear(WORKED), SaRA(threshold=0.002))
    assert delta.indices.tolist() == [0, 2]
    close(delta.values(), [0.001, -0.0015])
    assert delta.phi.tolist() == [0, 0]


def test_gradient_of_w_is_the_dense_gradient_on_the_mask():
    model, delta = attached(linear(WORKED), SaRA(threshold=0.002))
    x, gy = draw(5, 2), draw(5, 2, seed=3)
    model(x).backward(gy)
    close(delta.phi.grad, (gy.T @ x)[:, 0])


def test_starts_as_the_base_without_a_jump_to_absolute_values():
    model, delta = attached(linear(WORKED), SaRA(threshold=0.002))
    x = draw(5, 2)
    close(model(x), x @ torch.tensor(WORKED, dtype=x.dtype).T)
    close(delta.adapted_weight(delta.W), WORKED, 0)


@pytest.mark.parametrize(("shape", "k"), [((30, 40), 120), ((3, 3), 1), ((8, 9), 7)])
def test_a_share_takes_the_smallest(shape: tuple[int, int], k: int):
    W = draw(*shape)
    _, delta = attached(linear(W), SaRA())
    assert delta.phi.numel() == k == SaRA().count(delta.site)
    rest = torch.ones(W.numel(), dtype=torch.bool)
    rest[delta.indices.long()] = False
    assert delta.values().abs().max() <= W.flatten()[rest].abs().min()
    assert delta.small().all()


def test_a_threshold_counts_over_weights_and_leaves_out_those_without():
    model = nn.Sequential(linear(WORKED), linear([[0.5, 0.6], [0.0, 0.001]]), linear([[1.0, 2.0]]))
    adapter = rankfold.attach(model, SaRA(threshold=0.002), targets=["0", "1", "2"])
    assert {site: delta.indices.tolist() for site, delta in adapter.deltas.items()} == {"0": [0, 2], "1": [2, 3]}
    assert adapter.num_parameters() == 4 == sum(adapter.methods[s.name].count(s) for s in adapter.sites)
    with pytest.raises(rankfold.RankfoldError):
        rankfold.build("sara", threshold=0)


def test_a_threshold_is_strict_and_sees_through_layouts(tmp_path):
    W = torch.tensor([[0.1, 0.2, 0.3], [-0.1, -0.2, 5.0]], dtype=torch.float64)
    embedding = nn.Embedding(3, 2, dtype=torch.float64)
    embedding.weight.data.copy_(W.T)
    for layer in (linear(W), embedding):
        model, delta = attached(layer, SaRA(threshold=0.2))
        assert delta.indices.tolist() == [0, 3]
        perturb(delta)
        rankfold.save(model, tmp_path)
        rankfold.merge(model)
        assert rankfold.load(model, tmp_path, name="b").deltas["0"].indices.tolist() == [0, 3], "the file says, not W"
        rankfold.unmerge(model)


def test_values_off_the_mask_are_the_same_bits_after_training():
    torch.manual_seed(0)
    layer = nn.Linear(20, 30)
    W, x = layer.weight.detach().clone(), torch.randn(16, 20)
    model, delta = attached(layer, SaRA())
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-3 * math.exp(-350 * 2e-3))
    for _ in range(10):
        model(x).square().sum().backward()
        optimizer.step()
    rankfold.merge(model)
    moved = (model[0].weight.detach().view(torch.int32) != W.view(torch.int32)).flatten().nonzero().flatten()
    assert torch.equal(moved, delta.indices.long())


def test_is_plain_adamw_on_the_mask():
    """λ = 0 and no progressive step: the same numbers as AdamW on a full weight whose other entries are put back."""
    W, x = draw(6, 5), draw(9, 5, seed=2)
    model, delta = attached(linear(W), SaRA(density=0.4))
    ours = torch.optim.AdamW(delta.parameters(), lr=0.01, weight_decay=0.0)
    dense = W.clone().requires_grad_()
    theirs = torch.optim.AdamW([dense], lr=0.01, weight_decay=0.0)
    off = torch.ones(30, dtype=torch.bool)
    off[delta.indices.long()] = False
    for _ in range(5):
        for optimizer, loss in ((ours, model(x).square().sum()), (theirs, (x @ dense.T).square().sum())):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        dense.data.view(-1)[off] = W.flatten()[off]
    close(delta.adapted_weight(W), dense)
    assert delta.phi.abs().min() > 0.01
