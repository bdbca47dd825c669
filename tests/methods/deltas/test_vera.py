import math

import pytest
import torch
from torch import nn

import rankfold
from rankfold import VeRA
from tests.methods.support import attached, change, close, draw, linear, perturb


def model_of_three() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 6))


def test_definition_on_every_layer():
    adapter = rankfold.attach(model_of_three(), VeRA(rank=5), targets=["0", "1", "2"])
    A, B = adapter.shared.A, adapter.shared.B
    assert A.shape == (5, 20)
    assert B.shape == (20, 5)
    for delta in adapter.deltas.values():
        perturb(delta)
        out, n = delta.site.out, delta.site.in_
        expected = torch.diag(delta.lambda_b) @ B[:out] @ torch.diag(delta.lambda_d) @ A[:, :n]
        close(change(delta), expected.detach(), 1e-6)


def test_layers_share_one_pair_that_no_file_stores():
    adapter = rankfold.attach(model_of_three(), VeRA(rank=5), targets=["0", "1", "2"])
    assert len({id(delta.shared.A) for delta in adapter.deltas.values()}) == 1
    assert {name.split(".")[-1] for name in adapter.state_dict()} == {"lambda_b", "lambda_d"}
    assert sum(t.numel() for t in adapter.state_dict().values()) == adapter.num_parameters() == 3 * 5 + 20 + 20 + 6


def test_seed_makes_the_pair():
    def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        shared = rankfold.attach(model_of_three(), VeRA(rank=5), targets=["0", "2"], seed=seed).shared
        return shared.A, shared.B

    assert all(map(torch.equal, pair(3), pair(3)))
    assert not torch.equal(pair(3)[0], pair(4)[0])
    A, B = pair(3)
    bound = math.sqrt(6 / 20), math.sqrt(6 / 5)
    assert 0.9 * bound[0] < A.abs().max() <= bound[0]
    assert 0.9 * bound[1] < B.abs().max() <= bound[1]


def test_start_and_first_gradient():
    model, delta = attached(linear(draw(6, 5)), VeRA(rank=4))
    assert (delta.lambda_d == 0.1).all()
    assert not change(delta).any()
    x, up = draw(3, 5, seed=1), draw(3, 6, seed=2)
    model(x).backward(up)
    assert not delta.lambda_d.grad.any()
    B, A = delta.shared.B.double(), delta.shared.A.double()
    close(delta.lambda_b.grad, ((up.T @ x) * (0.1 * B @ A)).sum(1), 1e-11)


def test_overrides_may_shrink_the_rank_but_not_outgrow_the_pair():
    adapter = rankfold.attach(model_of_three(), VeRA(rank=5), targets=["0", "2"], overrides={"2": {"rank": 3}})
    assert adapter.deltas["2"].lambda_d.shape == (3,)
    with pytest.raises(rankfold.RankfoldError, match="shared pair has 5"):
        rankfold.attach(model_of_three(), VeRA(rank=5), targets=["0", "2"], overrides={"2": {"rank": 6}})


def test_experts_have_diagonals_of_their_own():
    experts = nn.Module()
    experts.up = nn.Parameter(draw(3, 8, 4))
    model = nn.Module()
    model.experts = experts
    delta = rankfold.attach(model, VeRA(rank=2), targets=["up"]).deltas["experts.up"]
    perturb(delta)
    B, A = delta.factors()
    pair = delta.shared.B.double(), delta.shared.A.double()
    for e in range(3):
        expected = torch.diag(delta.lambda_b[e]) @ pair[0] @ torch.diag(delta.lambda_d[e]) @ pair[1]
        close((B @ A)[e], expected.detach())
