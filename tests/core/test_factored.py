"""The core between two factors: what inits do to each delta that has one."""

import itertools
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold import DoRA, LoRA, LoRAXS, PiSSA
from rankfold.core import Init, Site, Start
from tests.contract.nets import TARGETS, difference, example, net, scramble
from tests.methods.support import attached, change, close, draw, linear, put

PRODUCTS = ["adalora-svd", "dora", "kasa", "lora", "lora-xs", "slora", "sorsa"]


class OnlyA(Init):
    """B = 0 and a start for A, as EVA's, without its data."""

    slug: ClassVar[str] = "test-only-a"
    title: ClassVar[str] = "only A"
    source: ClassVar[str] = "this file"

    def factors(self, site: Site, W: Tensor, rank: int, scale: float, statistics: Any, rng: Any) -> Start:
        return Start(W.new_zeros(*site.batch, site.out, rank), torch.eye(rank, site.in_).to(W))


class Between(Init):
    """A start with this M between B and A."""

    slug: ClassVar[str] = "test-between"
    title: ClassVar[str] = "between"
    source: ClassVar[str] = "this file"
    M: Any = None

    def factors(self, site: Site, W: Tensor, rank: int, scale: float, statistics: Any, rng: Any) -> Start:
        return Start(draw(site.out, rank, seed=1).to(W), draw(rank, site.in_, seed=2).to(W), self.M.to(W), offset=True)


def start_of(slug: str, init: Init | None = None, **options: Any) -> tuple[nn.Module, Any]:
    return attached(linear(draw(9, 8)), rankfold.build(slug, rank=3, **options), init=init)


def train(model: nn.Module, delta: Any) -> list[float]:
    """The losses of 20 small steps towards a random target."""
    x, y, losses = draw(30, 8, seed=3), draw(30, 9, seed=4), []
    optimizer = torch.optim.SGD(delta.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("alpha", [3.0, 12.0])
@pytest.mark.parametrize("slug", PRODUCTS)
def test_pissa_starts_each_where_it_was_and_trains(slug: str, alpha: float):
    model, delta = start_of(slug, PiSSA(), alpha=alpha)
    # KaSA alone computes something else than W: what its cut leaves.
    expected = change(start_of("kasa")[1]) if slug == "kasa" else torch.zeros(9, 8)
    close(change(delta), expected, 1e-12)
    U, S, Vt = torch.linalg.svd(draw(9, 8))
    B, A = delta.factors() if delta.form == "factors" else (delta.B, delta.A)
    close(delta.scale * B @ A, U[:, :3] * S[:3] @ Vt[:3], 1e-12)
    losses = train(model, delta)
    assert all(b < a for a, b in itertools.pairwise(losses))
    assert all(parameter.grad.any() for parameter in delta.parameters())


@pytest.mark.parametrize("slug", [slug for slug in PRODUCTS if slug != "lora-xs"])
def test_a_start_without_an_offset_does_the_same(slug: str):
    model, delta = start_of(slug, OnlyA())
    expected = change(start_of("kasa")[1]) if slug == "kasa" else torch.zeros(9, 8)
    close(change(delta), expected, 1e-12)
    assert torch.equal(delta.A, torch.eye(3, 8, dtype=delta.A.dtype))
    losses = train(model, delta)
    assert all(b < a for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("kind", ["conv", "conv1d", "embedding", "experts"])
@pytest.mark.parametrize("init", ["pissa", "milora", "olora", "nlora"])
def test_starts_from_the_weight_fit_every_kind_of_layer(init: str, kind: str):
    for slug in ("lora", "lora-xs", "sorsa"):
        model, x = net(kind), example(kind)
        before = model(x)
        targets = TARGETS.get(kind, ["fc1"] if kind == "embedding" else ["fc1", "fc2"])
        adapter = rankfold.attach(model, rankfold.build(slug, rank=3), targets=targets, init=rankfold.build(init))
        assert difference(model(x), before) < 1e-11
        scramble(adapter)
        assert difference(model(x), before) > 1e-4


def test_a_frozen_factor_of_zero_is_refused():
    with pytest.raises(rankfold.RankfoldError, match="frozen factor zero"):
        start_of("lora-xs", OnlyA())


@pytest.mark.parametrize("slug", PRODUCTS)
@pytest.mark.parametrize("M", [[[1, 2, 3], [0, 4, 5], [6, 0, 7]], [[3, 0, 0], [0, 2, 0], [0, 0, 1]]])
def test_a_middle_goes_where_there_is_room_for_it(slug: str, M: Any):
    M = torch.tensor(M, dtype=torch.float64)
    _, delta = start_of(slug, Between(M=M))
    B, A = draw(9, 3, seed=1), draw(3, 8, seed=2)
    mine = delta.factors()[0] if delta.form == "factors" else delta.B
    close(mine @ delta.A, B @ M @ A, 1e-12)
    if slug != "kasa":
        close(change(delta), torch.zeros(9, 8), 1e-12)
    diagonal = torch.equal(M, torch.diag(M.diagonal()))
    match slug:
        case "lora-xs" | "slora":
            close(delta.M, M)
            close(delta.B, B)
        case "lora" | "dora":
            close(delta.B, B @ M)
        case _:
            close(delta.M, M.diagonal() if diagonal else torch.ones(3))
            close(delta.B, B if diagonal else B @ M)


@pytest.mark.parametrize("slug", ["kasa", "sorsa"])
def test_a_methods_own_offset_folds(slug: str):
    (model, delta), (plain, twin) = (
        attached(linear(draw(9, 8)), rankfold.build(slug, rank=3), fold=fold) for fold in (True, False)
    )
    assert delta.is_folded
    assert not twin.is_folded
    x = draw(4, 8, seed=1)
    for name, parameter in delta.named_parameters():
        value = parameter.detach() + draw(*parameter.shape, seed=5)
        put(delta, **{name: value}), put(twin, **{name: value})
    outputs = model(x), plain(x)
    close(outputs[0], outputs[1].detach(), 1e-11)
    for output in outputs:
        output.square().sum().backward()
    for mine, other in zip(delta.parameters(), twin.parameters(), strict=True):
        close(mine.grad, other.grad, 1e-9)


@pytest.mark.parametrize(("method", "init"), [(LoRA(rank=2), None), (LoRAXS(rank=2), None), (DoRA(rank=2), OnlyA())])
def test_without_an_offset_there_is_nothing_to_fold(method: rankfold.Method, init: Init | None):
    with pytest.raises(rankfold.RankfoldError, match="there is none at 0"):
        attached(linear(draw(9, 8)), method, init=init, fold=True)
