import pytest
import torch
from torch import nn

import rankfold
from rankfold import LoRA, SaRA, SaRANuclear
from rankfold.losses.sara_nuclear import masked
from tests.methods.support import close, draw, linear, put

SMALL = [[0.003, 0.5], [-0.004, -0.3]]


def on(
    *layers: nn.Module, method: rankfold.Method | None = None, **hyper: float
) -> tuple[rankfold.Adapter, SaRANuclear]:
    model = nn.Sequential(*layers)
    targets = [str(i) for i in range(len(layers))]
    adapter = rankfold.attach(model, method or SaRA(threshold=0.0045), targets=targets)
    callback = SaRANuclear(**{"min_side": 0, **hyper})
    callback.on_attach(adapter, model)
    return adapter, callback


def test_worked_numbers():
    """W ⊙ M is the first column, of one singular value, 0.005; its gradient is that column over its length."""
    adapter, callback = on(linear(SMALL), weight=2.0)
    delta = adapter.deltas["0"]
    close(masked(delta), [[0.003, 0], [-0.004, 0]])
    penalty = callback.penalty()
    close(penalty, 0.01)
    penalty.backward()
    close(delta.phi.grad, [1.2, -1.6])
    put(delta, phi=[0.003, -0.004])
    close(callback.penalty(), 0.02)


def test_is_of_the_values_and_not_of_the_changes():
    adapter, callback = on(linear(draw(7, 5)), method=SaRA(density=0.5), weight=1.0)
    delta = adapter.deltas["0"]
    off = torch.ones(35, dtype=torch.bool)
    off[delta.indices.long()] = False
    W = delta.W.detach().clone().flatten()
    W[off] = 0
    close(callback.penalty(), torch.linalg.svdvals(W.view(7, 5)).sum())


def test_entries_that_were_stopped_are_not_counted():
    adapter, callback = on(linear(SMALL), weight=1.0)
    adapter.deltas["0"].frozen = torch.tensor([True, False])
    close(callback.penalty(), 0.004)


def test_one_random_weight_for_each_update():
    _, callback = on(*(linear(SMALL) for _ in range(5)))
    drawn = []
    for step in range(40):
        callback.penalty()
        first = callback._drawn
        callback.penalty()
        assert callback._drawn == first, "all parts of an accumulated batch get the same"
        callback.after_step(step)
        drawn.append(first)
    assert set(drawn) == set(range(5))
    state = callback.on_save()
    rest = [(callback.penalty(), callback._drawn, callback.after_step(0))[1] for _ in range(10)]
    _, again = on(*(linear(SMALL) for _ in range(5)))
    again.on_load(state)
    assert [(again.penalty(), again._drawn, again.after_step(0))[1] for _ in range(10)] == rest


def test_small_matrices_and_weights_that_are_none_are_passed_over():
    layers = nn.Linear(65, 70), nn.Linear(70, 64), nn.Linear(64, 80)
    _, callback = on(*layers, method=SaRA(), min_side=64)
    assert len(callback._deltas) == 1
    for method, layer in ((SaRA(), nn.Conv2d(4, 4, 3)), (LoRA(rank=1), nn.Linear(80, 80))):
        with pytest.raises(rankfold.RankfoldError, match="has none"):
            on(layer, method=method)


def test_lowers_the_effective_rank():
    def nuclear_over_largest(weight: float) -> float:
        adapter, callback = on(linear(0.01 * draw(12, 12)), method=SaRA(density=0.9), weight=weight)
        delta = adapter.deltas["0"]
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
        target = draw(12, 1, seed=5) @ draw(1, 12, seed=6) + 0.2 * draw(12, 12, seed=7)
        for _ in range(300):
            optimizer.zero_grad()
            ((masked(delta) - target).square().sum() + callback.penalty()).backward()
            optimizer.step()
        sigma = torch.linalg.svdvals(masked(delta).detach())
        return float(sigma.sum() / sigma[0])

    assert nuclear_over_largest(3.0) < 0.8 * nuclear_over_largest(0.0)
