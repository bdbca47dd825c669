import copy

import pytest
import torch
from torch import nn

import rankfold
from rankfold import S2LoRA
from tests.methods.support import DOUBLE, change, close, draw


def net(width: int = 6) -> nn.Sequential:
    """Three layers of one shape and one of another."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)]
    return nn.Sequential(*layers).to(DOUBLE)


def attached(**hyper: object) -> tuple[nn.Sequential, rankfold.Adapter]:
    model = net()
    adapter = rankfold.attach(model, S2LoRA(rank=3, **hyper), targets=["0", "1", "2", "3"])
    return model, adapter


def trained(**hyper: object) -> tuple[nn.Sequential, rankfold.Adapter]:
    model, adapter = attached(**hyper)
    with torch.no_grad():
        for i, delta in enumerate(adapter.deltas.values()):
            delta.lambda_.copy_(draw(3, seed=i))
    return model, adapter


def test_the_formula():
    _, adapter = trained(normalise=False)
    A, B = adapter.shared.A["6x6"], adapter.shared.B["6x6"]
    for name in ("0", "1", "2"):
        close(change(adapter.deltas[name]), B @ torch.diag(adapter.deltas[name].lambda_) @ A)
    assert adapter.deltas["3"].factors()[0].shape == (4, 3)


def test_starts_as_the_base_with_small_normal_factors():
    model, adapter = attached()
    x = draw(2, 6)
    close(model(x), net()(x), 1e-15)
    assert not any(delta.lambda_.any() for delta in adapter.deltas.values())
    wide = rankfold.attach(nn.Sequential(nn.Linear(400, 300)), S2LoRA(), targets=["0"]).shared
    assert wide.A["300x400"].std().item() == pytest.approx(0.02, rel=0.03)
    assert wide.B["300x400"].std().item() == pytest.approx(0.02, rel=0.03)


def test_count_is_one_pair_a_shape_and_a_vector_a_layer():
    _, adapter = attached()
    assert adapter.num_parameters() == 3 * (6 + 6) + 3 * (6 + 4) + 4 * 3
    with torch.device("meta"):
        whisper = nn.ModuleDict({str(i): nn.Linear(768, 768) for i in range(6)})
    sites = [rankfold.Site(str(i), "linear", (768, 768), True, torch.float32) for i in range(len(whisper))]
    assert S2LoRA(rank=32).shared_count(sites) == 49152
    assert S2LoRA(rank=32).num_parameters(sites) == 49152 + 6 * 32


def test_gradient_of_the_shared_factors_is_the_sum_over_layers():
    model, adapter = trained(normalise=False)
    A, B = adapter.shared.A["6x6"], adapter.shared.B["6x6"]
    model(draw(5, 6)).square().sum().backward()
    gB, gA = B.grad.clone(), A.grad.clone()
    # G_i, the gradient of the loss to W_i + ΔW_i, from plain layers that hold those.
    plain = net()
    for i, layer in enumerate(plain):
        with torch.no_grad():
            layer.weight.add_(change(adapter.deltas[str(i)]))
    plain(draw(5, 6)).square().sum().backward()
    same = [(plain[i].weight.grad, torch.diag(adapter.deltas[str(i)].lambda_.detach())) for i in range(3)]
    close(gB, sum(G @ A.T @ L for G, L in same), 1e-10)
    close(gA, sum(L @ B.T @ G for G, L in same), 1e-10)


def test_rank_is_the_number_of_coefficients_that_are_not_zero():
    _, adapter = trained()
    with torch.no_grad():
        adapter.deltas["1"].lambda_[1] = 0
        adapter.deltas["2"].lambda_[:2] = 0
    assert [int(torch.linalg.matrix_rank(change(adapter.deltas[name]))) for name in ("0", "1", "2")] == [3, 2, 1]


@pytest.mark.parametrize("normalise", [True, False])
def test_normalised_factors_take_the_free_scale_away(normalise: bool):
    _, adapter = trained(normalise=normalise)
    before = change(adapter.deltas["0"])
    with torch.no_grad():
        adapter.shared.B["6x6"].mul_(5)
        adapter.shared.A["6x6"].mul_(torch.tensor([[2.0], [3.0], [4.0]]))
    same = (change(adapter.deltas["0"]) - before).abs().max() < 1e-12
    assert bool(same) is normalise


def test_experts_share_a_pair_and_have_coefficients_of_their_own():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 8, 4))
    adapter = rankfold.attach(model, S2LoRA(rank=2), targets=["up"])
    assert adapter.num_parameters() == 2 * (8 + 4) + 3 * 2
    delta = adapter.deltas["experts.up"]
    with torch.no_grad():
        delta.lambda_.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    close(change(delta)[1], 2 * change(delta)[0])
    assert torch.linalg.matrix_rank(change(delta)[[0, 2]].flatten(1)) == 2


def test_a_file_and_a_copy_bring_the_same_function(tmp_path):
    model, adapter = trained()
    x = draw(2, 6)
    rankfold.save(model, tmp_path)
    again = net()
    loaded = rankfold.load(again, tmp_path)
    assert torch.equal(again(x), model(x))
    assert loaded.num_parameters() == adapter.num_parameters()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        adapter.shared.B["6x6"].zero_()
    assert torch.equal(twin(x), again(x))


def test_another_rank_for_one_layer_is_refused():
    with pytest.raises(rankfold.RankfoldError, match="other than the pair it shares"):
        rankfold.attach(net(), S2LoRA(rank=3), targets=["0", "1"], overrides={"1": {"rank": 2}})
