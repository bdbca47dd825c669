from typing import Any

import pytest
import torch
from torch import nn

import rankfold
from rankfold import LoRA, SaRA, SaRAReselect
from tests.methods.support import close, draw, linear


def run(method: SaRA, **hyper: Any) -> tuple[Any, SaRAReselect, torch.optim.Optimizer]:
    model = nn.Sequential(linear(0.01 * draw(10, 8)))
    adapter = rankfold.attach(model, method, targets=["0"])
    callback = SaRAReselect(**hyper)
    callback.on_attach(adapter, model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-3, weight_decay=0.1)
    callback.on_start(optimizer, 8)
    return adapter.deltas["0"], callback, optimizer


def update(delta: Any, callback: SaRAReselect, optimizer: Any, steps: range, x_seed: int = 0) -> None:
    for step in steps:
        G = draw(10, 8, seed=100 + step)
        delta.phi.grad = G.flatten()[delta.indices.long()].clone()
        callback.before_step(step)
        optimizer.step()
        callback.after_step(step)


@pytest.mark.parametrize("method", [SaRA(threshold=0.004), SaRA(density=0.3)])
def test_what_has_grown_stops_and_the_rest_trains_on_with_a_new_state(method: SaRA):
    delta, callback, optimizer = run(method, step=4)
    update(delta, callback, optimizer, range(4))
    t = 0.004 if method.threshold else float(delta.w.abs().max())
    grown = delta.values().detach().abs() >= t
    assert 0 < int(grown.sum()) < grown.numel()
    assert torch.equal(delta.frozen, grown)
    assert not optimizer.state
    before = delta.phi.detach().clone()
    update(delta, callback, optimizer, range(4, 8))
    assert torch.equal(delta.phi[grown], before[grown]), "frozen where they are, against decay too"
    assert bool((delta.phi[~grown] != before[~grown]).all())
    assert int(optimizer.state[delta.phi]["step"]) == 4


def test_nothing_jumps_at_the_step():
    delta, callback, optimizer = run(SaRA(density=0.3), step=4)
    update(delta, callback, optimizer, range(3))
    twin, other, theirs = run(SaRA(density=0.3), step=100)
    update(twin, other, theirs, range(4))
    update(delta, callback, optimizer, range(3, 4))
    assert torch.equal(delta.phi, twin.phi)
    assert torch.equal(delta.indices, twin.indices)


def test_a_share_freezes_nothing_that_never_moved():
    delta, callback, _ = run(SaRA(density=0.3), step=1)
    callback.after_step(0)
    assert not delta.frozen.any()
    _, callback, _ = run(SaRA())
    assert callback._at == 4, "half of the run"


def test_goes_on_after_a_stop(tmp_path):
    through = run(SaRA(density=0.3), step=4)
    update(*through, range(8))
    for stop in (2, 6):
        delta, callback, optimizer = run(SaRA(density=0.3), step=4)
        update(delta, callback, optimizer, range(stop))
        torch.save([delta.state_dict(), optimizer.state_dict(), callback.on_save()], tmp_path / "a")
        tensors, state, saved = torch.load(tmp_path / "a", weights_only=True)
        again, callback, optimizer = run(SaRA(density=0.3), step=4)
        again.load_state_dict(tensors)
        optimizer.load_state_dict(state)
        callback.on_load(saved)
        update(again, callback, optimizer, range(stop, 8))
        close(again.phi, through[0].phi, 0)


def test_refusals():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(rankfold.RankfoldError, match="step of sara"):
        SaRAReselect().on_attach(rankfold.attach(model, LoRA(rank=1), targets=["0"]), model)
    with pytest.raises(rankfold.RankfoldError, match="plan a number"):
        SaRAReselect().on_start(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1), None)
