import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import rankfold
from rankfold import NOLA
from rankfold.core.seeded import basis_matrices
from tests.methods.support import DOUBLE, attached, change, close, draw, linear, perturb, put


def explicit(delta) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A of the definition, through the basis tensors themselves."""
    k, r, out, n = delta.k, delta.r, delta.site.out, delta.site.in_
    As = basis_matrices(delta.seed_A, k, r, n).to(DOUBLE) / k**0.5
    Bs = basis_matrices(delta.seed_B, k, out, r).to(DOUBLE) / k**0.5
    return torch.einsum("...k,kor->...or", delta.c, Bs), delta.A_0 + torch.einsum("...k,kri->...ri", delta.a, As)


def test_values_and_gradients_are_those_of_the_explicit_bases():
    model, delta = attached(linear(draw(6, 5)), NOLA(rank=3, alpha=6, k=7))
    perturb(delta)
    x = draw(4, 5, seed=1)
    B, A = explicit(delta)
    expected = x @ (delta.W.detach() + 2 * B @ A).T
    close(model(x), expected.detach())
    wanted = torch.autograd.grad(expected.square().sum(), (delta.a, delta.c))
    got = torch.autograd.grad(model(x).square().sum(), (delta.a, delta.c))
    close(got[0], wanted[0], 1e-10)
    close(got[1], wanted[1], 1e-10)


def test_one_basis_matrix():
    _, delta = attached(linear(draw(6, 5)), NOLA(rank=2, k=1))
    delta.A_0.zero_()
    put(delta, a=[2], c=[3])
    B1, A1 = basis_matrices(delta.seed_B, 1, 6, 2)[0].double(), basis_matrices(delta.seed_A, 1, 2, 5)[0].double()
    close(change(delta), 6 * B1 @ A1)


def test_start_and_first_gradient():
    model, delta = attached(nn.Linear(400, 60), NOLA(rank=4, k=8))
    assert not change(delta).any()
    assert 0.9 / 20 < delta.A_0.abs().max() <= 1 / 20
    model(torch.randn(3, 400)).square().sum().backward()
    assert not delta.a.grad.any()
    assert (delta.c.grad != 0).all()


def test_the_count_depends_on_k_alone_and_rank_raises_the_rank():
    for rank, shape in ((2, (6, 30)), (5, (40, 9))):
        _, delta = attached(linear(draw(*shape)), NOLA(rank=rank, k=3))
        assert sum(p.numel() for p in delta.parameters()) == NOLA(rank=rank, k=3).count(delta.site) == 6
        perturb(delta)
        assert torch.linalg.matrix_rank(change(delta)) == rank


def test_seed_and_name_make_the_bases_and_no_file_stores_them():
    def adapter(seed: int) -> rankfold.Adapter:
        model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
        made = rankfold.attach(model, NOLA(rank=2, k=3), targets=["0", "1"], seed=seed)
        for delta in made.deltas.values():
            perturb(delta)
        return made

    one, same, other = adapter(1), adapter(1), adapter(2)
    assert torch.equal(one.deltas["0"].factors()[1], same.deltas["0"].factors()[1])
    assert not torch.equal(one.deltas["0"].factors()[1], other.deltas["0"].factors()[1])
    assert not torch.equal(one.deltas["0"].factors()[1], one.deltas["1"].factors()[1])
    assert one.deltas["0"].seed_A != one.deltas["0"].seed_B
    assert {name.split(".")[-1] for name in one.state_dict()} == {"a", "c"}


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    layer = linear(torch.zeros(9, 9))
    torch.manual_seed(5)
    model, _ = attached(layer, NOLA(rank=2, k=3))
    model(torch.ones(1, 9, dtype=DOUBLE)).sum().backward()
    assert torch.equal(torch.rand(3), expected)


def test_no_basis_is_kept_for_the_backward():
    model, delta = attached(nn.Linear(64, 48), NOLA(rank=4, k=100))
    perturb(delta)
    kept: dict[int, int] = {}
    with saved_tensors_hooks(lambda t: kept.__setitem__(t.data_ptr(), t.numel()) or t, lambda t: t):
        y = model(torch.randn(2, 64))
    bases = 100 * 4 * (64 + 48)
    assert sum(kept.values()) < bases / 5
    y.sum().backward()


def test_without_gradients_the_factors_are_made_once_for_the_same_coefficients():
    model, delta = attached(linear(draw(6, 5)), NOLA(rank=2, k=3))
    perturb(delta)
    x = draw(2, 5)
    expected = model(x).detach()
    with torch.no_grad():
        close(model(x), expected)
        first = delta.factors()
        assert delta.factors()[0] is first[0]
        twin = copy.deepcopy(model)
        delta.c.data.mul_(2)  # goes past autograd's record of changes
        assert delta.factors()[0] is not first[0]
        close(delta.factors()[0], 2 * first[0])
        close(twin(x), expected)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert delta.c.grad is not None


def test_bfloat16_parameters():
    model, delta = attached(nn.Linear(16, 16), NOLA(rank=4))
    perturb(delta)
    x = torch.randn(3, 16)
    expected = model(x)
    model.bfloat16()
    y = model(x.bfloat16())
    assert (y.float() - expected).abs().max() < 0.05 * expected.abs().max()
    y.sum().backward()
    assert delta.a.grad.dtype == torch.bfloat16


def test_functional_gradients_for_each_sample():
    model, delta = attached(linear(draw(6, 5)), NOLA(rank=2, k=3))
    perturb(delta)
    x = draw(4, 5)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(4):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                close(each[name][i], parameter.grad, 1e-10)


def test_experts_share_the_bases_and_have_coefficients_of_their_own():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 4, 8))
    delta = rankfold.attach(model, NOLA(rank=2, k=5), targets=["up"]).deltas["experts.up"]
    perturb(delta)
    for got, wanted in zip(delta.factors(), explicit(delta), strict=True):
        close(got, wanted.detach())


def test_a_rank_over_the_size_is_refused():
    with pytest.raises(rankfold.UnsupportedError, match="at most 5"):
        attached(nn.Linear(5, 7), NOLA(rank=6))
