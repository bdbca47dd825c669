import copy

import pytest
import torch
from torch import nn

import rankfold
from rankfold import MoS
from rankfold.deltas.mos import kind_of
from tests.methods.support import DOUBLE, change, close, draw

HYPER = {"rank": 4, "budget": 2, "private": 1, "shards": 2}


class Net(nn.Module):
    """Six layers of one kind, and one alone."""

    def __init__(self, layers: int = 6):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(layers))
        self.head = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block["q"](x))
        return self.head(x)


def net(layers: int = 6) -> Net:
    torch.manual_seed(0)
    return Net(layers).to(DOUBLE)


def attached(layers: int = 6, **hyper: int) -> tuple[Net, rankfold.Adapter]:
    model = net(layers)
    adapter = rankfold.attach(model, MoS(**(HYPER | hyper)), targets=["q"])
    with torch.no_grad():
        adapter.shared.B["q_8x8"].copy_(draw(*adapter.shared.B["q_8x8"].shape, seed=9))
    return model, adapter


def test_worked_numbers_of_the_shards():
    adapter = rankfold.attach(nn.Sequential(nn.Linear(4, 2)), MoS(rank=2, budget=2, private=2, shards=2), targets=["0"])
    delta = adapter.deltas["0"]
    with torch.no_grad():
        adapter.shared.A["0_2x4"].copy_(torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]))
        adapter.shared.B["0_2x4"].copy_(torch.tensor([[0], [1], [2], [3]]))
        delta.I_A.copy_(torch.tensor([0, 3, 2, 1]))
        delta.I_B.copy_(torch.tensor([3, 0, 1, 2]))
    B, A = delta.factors()
    close(A, [[0, 1, 6, 7], [4, 5, 2, 3]])
    close(B, [[3, 1], [0, 2]])


def test_index_is_public_rows_then_private_ones_and_repeats_none():
    _, adapter = attached()
    N, (r, e, p, cut) = 6, HYPER.values()
    public = (e - p) * N * cut
    for n, delta in enumerate(adapter.deltas.values()):
        for index in (delta.I_A, delta.I_B):
            assert len(set(index.tolist())) == r * cut
            assert bool((index[: (r - p) * cut] < public).all())
            assert index[(r - p) * cut :].tolist() == list(range(public + n * p * cut, public + (n + 1) * p * cut))


def test_pairs_and_layers_are_drawn_apart():
    _, adapter = attached()
    drawn = [tuple(index.tolist()) for delta in adapter.deltas.values() for index in (delta.I_A, delta.I_B)]
    assert len(set(drawn)) == len(drawn)


def test_start_scale_and_count():
    model = net()
    x = draw(3, 8)
    before = model(x)
    adapter = rankfold.attach(model, MoS(**HYPER), targets=["q", "head"])
    assert torch.equal(model(x), before)
    PA = adapter.shared.A["q_8x8"]
    assert 0.9 * 8**-0.5 < PA.abs().max() < 8**-0.5  # of the whole vector, not of its shards
    assert not adapter.shared.B["q_8x8"].any()
    assert adapter.deltas["blocks.0.q"].scale == 16 / 4
    assert adapter.num_parameters() == 2 * 6 * (8 + 8) + 2 * 1 * (8 + 6)


def test_private_rank_alone_is_lora():
    """e = r = p: every layer has a slice of its own, and ΔW is that slice's product."""
    _, adapter = attached(rank=2, budget=2, private=2)
    A, B = (pool["q_8x8"].detach().view(6, 2, 8) for pool in (adapter.shared.A, adapter.shared.B))
    for n, delta in enumerate(adapter.deltas.values()):
        close(change(delta), 8 * B[n].T @ A[n])


def test_gradients_go_to_the_layers_that_drew_a_row():
    model, adapter = attached()
    model(draw(5, 8)).square().sum().backward()
    PA = adapter.shared.A["q_8x8"]
    # The gradient of each layer's own A, from copies that share nothing.
    expected, drawn = torch.zeros_like(PA), torch.zeros(len(PA))
    for name, delta in adapter.deltas.items():
        alone = net()
        for other, each in adapter.deltas.items():
            with torch.no_grad():
                alone.get_submodule(other).weight.add_(change(each))
        alone(draw(5, 8)).square().sum().backward()
        G, (B, _) = alone.get_submodule(name).weight.grad, delta.factors()
        expected.index_add_(0, delta.I_A, (delta.scale * B.detach().T @ G).reshape(-1, PA.shape[1]))
        drawn[delta.I_A] += 1
    close(PA.grad, expected, 1e-10)
    private = (2 - 1) * 6 * 2
    assert bool((drawn[private:] == 1).all())
    assert drawn[:private].max() > 1, "no row is shared, so the test shows nothing"
    assert not PA.grad[drawn == 0].any()


def test_a_kind_with_few_layers_draws_what_there_is():
    _, adapter = attached(layers=1)
    delta = adapter.deltas["blocks.0.q"]
    assert sorted(delta.I_A.tolist()) == [0, 1, 2, 3]
    assert delta.scale == 16 / 2
    _, adapter = attached(layers=2)
    assert adapter.deltas["blocks.1.q"].factors()[1].shape == (3, 8)


def test_experts_are_layers_of_the_kind():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(4, 8, 4))
    adapter = rankfold.attach(model, MoS(**HYPER), targets=["up"])
    delta = adapter.deltas["experts.up"]
    assert adapter.num_parameters() == 2 * 4 * (8 + 4)
    assert delta.I_A.shape == (4, 8)
    assert len({tuple(row) for row in delta.I_A.tolist()}) == 4
    with torch.no_grad():
        adapter.shared.B["up_8x4"].copy_(draw(16, 4))
    B, A = delta.factors()
    PA = adapter.shared.A["up_8x4"]
    close(A[2, 1], torch.cat([PA[delta.I_A[2, 2]], PA[delta.I_A[2, 3]]]))
    assert B.shape == (4, 8, 4)


def test_the_seed_brings_the_draw_back(tmp_path):
    model, _ = attached()
    x = draw(3, 8)
    rankfold.save(model, tmp_path)
    again = net()
    adapter = rankfold.load(again, tmp_path)
    assert torch.equal(again(x), model(x))
    assert set(adapter.state_dict()) == {"shared.A.q_8x8", "shared.B.q_8x8"}
    other = rankfold.attach(net(), MoS(**HYPER), targets=["q"], seed=1)
    assert not torch.equal(other.deltas["blocks.0.q"].I_A, adapter.deltas["blocks.0.q"].I_A)
    twin = copy.deepcopy(again)
    with torch.no_grad():
        adapter.shared.B["q_8x8"].zero_()
    assert torch.equal(twin(x), model(x))


def test_what_does_not_fit_is_refused():
    with pytest.raises(rankfold.UnsupportedError, match="3 shards"):
        rankfold.attach(net(), MoS(shards=3), targets=["q"])
    with pytest.raises(rankfold.RankfoldError, match="private <= budget <= rank"):
        rankfold.build("mos", rank=2, budget=4)
    with pytest.raises(rankfold.RankfoldError, match="other ranks or shards"):
        rankfold.attach(net(), MoS(**HYPER), targets=["q"], overrides={"blocks.0.q": {"rank": 6}})


def test_kinds():
    site = rankfold.Site("model.layers.3.q_proj", "linear", (8, 4), True, torch.float32)
    assert kind_of(site) == "q_proj_8x4"
