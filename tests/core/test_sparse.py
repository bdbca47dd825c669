"""The sparse index delta against dense arithmetic, its memory, and files that lie about the indices."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankfold
from rankfold import SFTSparse
from rankfold.core.sparse import Sparse, choose, exchange
from rankfold.errors import AdapterFileError
from tests.methods.support import DOUBLE, attached, close, draw, linear, perturb

WORKED = [[0, 0, 7], [0, -2, 0]]


def worked(bias: bool = True) -> tuple[nn.Sequential, Sparse]:
    """W (2, 3), φ = (7, −2) at the flat indices (2, 4)."""
    model, delta = attached(linear(draw(2, 3), draw(2) if bias else None), SFTSparse(k=2))
    delta.place(torch.tensor([2, 4]), torch.tensor([7.0, -2.0]))
    return model, delta


def saved_for_backward(run) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        run()
    return kept


@pytest.mark.parametrize("bias", [True, False])
def test_worked_numbers(bias: bool):
    model, delta = worked(bias)
    close(delta.update(), WORKED)
    x = draw(4, 5, 3)
    close(model(x), F.linear(x, model[0].weight + torch.tensor(WORKED, dtype=DOUBLE), model[0].bias))


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_the_dense_ones(bias: bool):
    model, delta = worked(bias)
    x, W = draw(4, 5, 3).requires_grad_(), (model[0].weight + torch.tensor(WORKED, dtype=DOUBLE)).requires_grad_()
    gy = draw(4, 5, 2, seed=3)
    gx, G = torch.autograd.grad(F.linear(x, W, model[0].bias), (x, W), gy)
    ours, phi = torch.autograd.grad(model(x), (x, delta.phi), gy)
    close(ours, gx)
    close(phi, G.flatten()[[2, 4]])
    assert torch.autograd.gradcheck(model, (x,))
    assert torch.autograd.gradgradcheck(model, (x,))


@pytest.mark.parametrize("kind", ["conv", "embedding", "experts"])
def test_gradient_on_other_layers_is_the_dense_one_at_the_indices(kind: str):
    from tests.contract.nets import TARGETS, example, net

    model, dense = net(kind), net(kind)
    targets = TARGETS.get(kind, ["fc1"])
    adapter = rankfold.attach(model, SFTSparse(density=0.05), targets=targets)
    model(example(kind)).square().sum().backward()
    dense(example(kind)).square().sum().backward()
    for site, delta in adapter.deltas.items():
        path = site if kind == "experts" else f"{site}.weight"
        layout = dense.get_parameter(path).grad
        G = layout.T if kind == "embedding" else layout
        close(delta.phi.grad, G.flatten()[delta.indices.long()])
        assert delta.phi.grad.any()


def test_the_watch_sees_the_dense_gradient():
    model, delta = worked()
    seen: list[torch.Tensor] = []
    delta.watch = seen.append
    x, gy = draw(6, 3), draw(6, 2, seed=3)
    model(x).backward(gy)
    close(seen[0], gy.T @ x)
    delta.update().backward(gy[:2, :2] @ draw(2, 3))
    close(seen[1], gy[:2, :2] @ draw(2, 3))


def test_keeps_the_input_and_the_sparse_parts_only():
    """No mask, no W' and no dense gradient outlives its layer: out · in is far more than all that is kept."""
    layer = nn.Linear(64, 200)
    model, _ = attached(layer, SFTSparse(k=5))
    x = torch.randn(3, 64)
    own = {layer.weight.data_ptr(), layer.bias.data_ptr(), x.data_ptr()}
    kept = [t for t in saved_for_backward(lambda: model(x)) if t.data_ptr() not in own]
    assert sum(t.numel() for t in kept) == 2 * 5
    with torch.no_grad():
        assert not saved_for_backward(lambda: model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_16_bit_base_does_not_round_the_change_away(dtype: torch.dtype):
    layer = nn.Linear(8, 8).to(dtype)
    with torch.no_grad():
        layer.weight.fill_(1)
    model, delta = attached(layer, SFTSparse(k=64))
    delta.place(torch.arange(64), torch.full((64,), 1e-3))
    x = torch.ones(1, 8, dtype=dtype)
    layer.bias.data.fill_(-8)  # so that the output has digits for the change
    assert float((model(x).detach() - 8e-3).abs().max()) < 1e-4
    assert delta.phi.dtype == torch.float32


def test_under_functorch_and_vmap():
    model, delta = worked()
    x = draw(5, 3)

    def loss(phi, x):
        return torch.func.functional_call(model, {"0.deltas.default.phi": phi}, (x,)).square().sum()

    expected = torch.autograd.grad(loss(delta.phi, x), delta.phi)[0]
    close(torch.func.grad(loss)(delta.phi.detach(), x), expected)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(delta.phi.detach(), x)
    close(each.sum(0), expected)


def test_off_the_indices_every_bit_stays():
    W = torch.randn(9, 7)
    W[0, 0] = -0.0
    layer = nn.Linear(7, 9)
    layer.weight.data.copy_(W)
    model, delta = attached(layer, SFTSparse(k=5))
    delta.place(torch.arange(1, 6))
    perturb(delta)
    rankfold.merge(model)
    same = (model[0].weight.view(torch.int32) == W.view(torch.int32)).flatten()
    assert same.nonzero().flatten().tolist() == [0, *range(6, 63)]


def test_indices_survive_copies_dtypes_and_files(tmp_path):
    model, delta = worked()
    assert delta.indices.dtype == torch.int32
    twin = copy.deepcopy(model)
    delta.indices[0] = 0
    assert twin[0].deltas.default.indices.tolist() == [2, 4]
    half = twin.to(torch.bfloat16)
    assert half[0].deltas.default.indices.dtype == torch.int32
    assert half[0].deltas.default.phi.dtype == torch.bfloat16
    model, _ = worked()
    rankfold.save(model, tmp_path)
    base = nn.Sequential(linear(draw(2, 3), draw(2)))
    loaded = rankfold.load(base, tmp_path).deltas["0"]
    assert loaded.indices.dtype == torch.int32
    assert loaded.indices.tolist() == [2, 4]
    close(base(draw(4, 3)), model(draw(4, 3)))


@pytest.mark.parametrize(
    ("indices", "words"), [([2, 6], "outside"), ([-1, 4], "outside"), ([4, 4], "twice"), ([2**31 - 1, 0], "outside")]
)
def test_a_file_whose_indices_lie_is_refused(tmp_path, indices: list[int], words: str):
    model, delta = worked()
    before = [delta.indices.clone(), delta.phi.detach().clone()]
    with torch.no_grad():
        delta.indices.copy_(torch.tensor(indices))
    rankfold.save(model, tmp_path)
    base = nn.Sequential(linear(draw(2, 3), draw(2)))
    with pytest.raises(AdapterFileError, match=words):
        rankfold.load(base, tmp_path)
    assert not rankfold.adapters(base)
    assert type(base[0]) is nn.Linear
    lying = rankfold.adapters(model)["default"].state_dict()
    model, delta = worked()
    with pytest.raises(rankfold.RankfoldError, match=words):
        rankfold.adapters(model)["default"].load_state_dict(lying)
    assert torch.equal(delta.indices, before[0])
    assert torch.equal(delta.phi, before[1])


def test_k_is_the_files_where_it_was_moved_and_no_more_than_fits(tmp_path):
    model, delta = worked()
    delta.place(torch.tensor([0, 1, 5]), torch.ones(3))
    adapter = rankfold.adapters(model)["default"]
    rankfold.save(model, tmp_path)
    assert rankfold.load(nn.Sequential(linear(draw(2, 3), draw(2))), tmp_path).deltas["0"].phi.tolist() == [1, 1, 1]
    state = adapter.state_dict()
    fresh, small = worked()
    for wrong in (
        {**state, "deltas.0.phi": torch.zeros(4, dtype=DOUBLE)},
        {name: torch.zeros(7, dtype=t.dtype) for name, t in state.items()},
        {**state, "deltas.0.indices": torch.zeros(3, dtype=torch.int64)},
        {**state, "deltas.0.phi": torch.full((3,), torch.nan, dtype=DOUBLE)},
        {**state, "deltas.0.B0": torch.zeros(2, 1), "deltas.0.A0": torch.zeros(1, 3)},
    ):
        with pytest.raises(rankfold.RankfoldError):
            rankfold.adapters(fresh)["default"].load_state_dict(wrong)
        assert small.phi.tolist() == [7, -2]
        assert small.indices.tolist() == [2, 4]
    rankfold.adapters(fresh)["default"].load_state_dict(state)
    assert small.indices.tolist() == [0, 1, 5]


def test_an_optimiser_lives_on_when_phi_takes_another_size():
    model, delta = worked()
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1)
    for k in (2, 5, 1):
        if k != 2:
            optimizer.state.pop(delta.phi)
            delta.place(torch.arange(k))
        loss = model(draw(4, 3)).square().sum()  # the loss before this one is alive while this one is made
        loss.backward()
        optimizer.step()
        assert delta.phi.grad.shape == (k,)
        assert optimizer.state[delta.phi]["exp_avg"].shape == (k,)
        assert delta.phi.abs().min() > 0.05
        optimizer.zero_grad()
    assert list(model.parameters())[-1] is delta.phi


def test_a_parameter_exchanged_under_a_living_graph():
    parameter = nn.Parameter(torch.ones(3))
    alive = (parameter * 2).sum()
    exchange(parameter, torch.ones(2))
    (parameter * 2).sum().backward()
    assert parameter.grad.tolist() == [2, 2]
    del alive


@pytest.mark.parametrize(("n", "k"), [(10, 10), (10, 1), (10_000, 100), (10_000, 2_600)])
def test_chosen_numbers_differ_and_spread(n: int, k: int):
    drawn = choose(n, k, torch.Generator().manual_seed(0))
    assert drawn.unique().numel() == k
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < n
    assert torch.equal(drawn, choose(n, k, torch.Generator().manual_seed(0)))
    if k >= 100:
        assert abs(float(drawn.double().mean()) / n - 0.5) < 0.1
