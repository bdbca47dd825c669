"""Trainings whose products have rounded factors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import rankfold
from rankfold import HALO
from rankfold.core.hadamard import rotate
from rankfold.core.packed import PackedLinear
from rankfold.quantizers import halo
from rankfold.quantizers.halo import HaloLinear, codes, values
from tests.methods.support import close, draw

LEVELS = pytest.mark.parametrize("level", [0, 1, 2])


def product(how: HALO, x: Tensor, W: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """Y, dX and dW of one layer."""
    layer = HaloLinear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    layer.halo, x = how, x.clone().requires_grad_()
    layer.weight.data = W
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.weight), up)


def test_worked_numbers() -> None:
    """4 bits of [16, 1, 1, 1] leave [16, 0, 0, 0], an error of 1.732; rotated they are [9.5, 7.5, 7.5, 7.5], 1.113."""
    x = torch.tensor([16.0, 1, 1, 1])
    plain = values(*codes(x, "int4"))
    close(plain, [16, 0, 0, 0], 1e-6)
    assert float((x - plain).norm()) == pytest.approx(1.732, abs=1e-3)
    turned = rotate(x)
    close(turned, [9.5, 7.5, 7.5, 7.5], 1e-6)
    assert float((turned - values(*codes(turned, "int4"))).norm()) == pytest.approx(1.113, abs=1e-3)


@pytest.mark.parametrize(("format", "dtype"), [("fp8", torch.float8_e4m3fn), ("fp8-e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_are_torchs(format: str, dtype: torch.dtype) -> None:
    x = draw(50, 30, dtype=torch.float32) * torch.logspace(-6, 3, 30)
    q, s = codes(x, format)
    assert q.dtype == dtype
    assert s == x.abs().max() / torch.finfo(dtype).max
    assert torch.equal(q.float(), (x / s).to(dtype).float())


@LEVELS
@pytest.mark.parametrize("shape", [(3, 12, 24, 20), (2, 5, 7, 9)])
def test_without_rounding_it_is_the_plain_layer(level: Any, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halo, "codes", lambda X, _: (X, torch.ones((), dtype=X.dtype)))
    *lead, in_, out = shape
    x, W, up = draw(*lead, in_), draw(out, in_, seed=1), draw(*lead, out, seed=2)
    y, dx, dW = product(HALO(level=level), x, W, up)
    close(y, F.linear(x, W), 1e-12)
    close(dx, up @ W, 1e-12)
    close(dW, up.flatten(0, 1).mT @ x.flatten(0, 1), 1e-12)


@LEVELS
@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_each_level_by_its_row_of_the_table(level: int, format: Any) -> None:
    X, W, dY = draw(8, 12), draw(4, 12, seed=1), draw(8, 4, seed=2)
    q = lambda M: values(*codes(M, format))  # noqa: E731
    H, G = rotate(torch.eye(12).double()), rotate(torch.eye(8).double()).mT
    wanted = {
        0: (q(X) @ q(W).mT, q(dY) @ q(W), q(dY).mT @ q(X)),
        1: (q(X @ H) @ q(W @ H).mT, q(dY) @ q(W @ H) @ H.mT, q(dY).mT @ q(X @ H) @ H.mT),
        2: (q(X @ H) @ q(W @ H).mT, G.mT @ q(G @ dY) @ q(W @ H) @ H.mT, q(dY).mT @ q(X @ H) @ H.mT),
    }[level]
    for got, one in zip(product(HALO(level=level, format=format), X, W, dY), wanted, strict=True):
        close(got, one, 1e-11)


def test_rotation_helps_where_features_have_outliers() -> None:
    x, W, up = draw(64, 64), draw(32, 64, seed=1), draw(64, 32, seed=2)
    x[:, 5] *= 60
    errors = []
    for level in (0, 1, 2):
        y, _, dW = product(HALO(level=level), x, W, up)
        errors.append([float((y - x @ W.mT).norm()), float((dW - up.mT @ x).norm())])
    assert max(errors[1][0], errors[2][0]) < 0.5 * errors[0][0]
    up[7] *= 60  # a token of its own is spread by the rotation of level 2 alone
    errors = [float((product(HALO(level=level), x, W, up)[1] - up @ W).norm()) for level in (1, 2)]
    assert errors[1] < 0.7 * errors[0]


def test_a_byte_for_each_number_is_kept() -> None:
    layer, kept = HaloLinear(256, 256, bias=False), []
    layer.halo = HALO()
    x = torch.randn(16, 256, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        layer(x)
    assert sum(kept) == 256 * 256 + 16 * 256 + 8


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24))


@pytest.mark.parametrize("slug", ["lora", "dora", "bone", "oft", "sft-sparse", "bitfit", "l4q", "full"])
def test_whatever_is_trained_trains_over_it_and_what_is_saved_is_as_ever(slug: str) -> None:
    model, x, target = net(), torch.randn(16, 24), torch.randn(16, 24)
    adapter = None if slug == "full" else rankfold.attach(model, rankfold.build(slug), targets=["0", "2"])
    with torch.no_grad():
        exact, names = model(x), list(model.state_dict())
    optimizer, losses = torch.optim.Adam(model.parameters() if adapter is None else adapter.parameters(), 1e-2), []
    with HALO(level=2, format="int8").training(model):
        rough = model(x)
        for _ in range(8):
            loss = F.mse_loss(model(x), target)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        trained = model(x)
        model.train()
    assert 1e-5 < float((rough - exact).detach().abs().max()) < 0.1, "the products were not rounded"
    assert losses[-1] < losses[0]
    torch.testing.assert_close(model(x), trained)
    assert list(model.state_dict()) == names
    if adapter is not None:
        rankfold.detach(model)
    assert type(model[0]) is nn.Linear
    assert "halo" not in model[0].__dict__


def test_an_adapter_may_come_and_go_while_it_lasts_and_rows_are_routed() -> None:
    model, x = net(), torch.randn(4, 24)
    with HALO().training(model):
        rankfold.attach(model, rankfold.LoRA(rank=2), targets=["0"])
        with rankfold.using(model, ["default", None, None, "default"]):
            torch.testing.assert_close(model(x), model(x))
        rankfold.detach(model)
        assert type(model[0]) is HaloLinear
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("merged_within", [False, True])
@pytest.mark.parametrize("unmerged_within", [False, True])
def test_l4q_becomes_a_packed_layer_within_and_after(merged_within: bool, unmerged_within: bool) -> None:
    """Training rounds the products with W_q; what merging leaves is W_q itself, and neither takes from the other."""
    model, x, target = net(), torch.randn(16, 24), torch.randn(16, 24)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = rankfold.attach(model, rankfold.L4Q(group=8), targets=["0", "2"])
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    with HALO().training(model):
        for _ in range(3):
            F.mse_loss(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = model.eval()(x)
        assert not torch.equal(model.train()(x), trained)
        if merged_within:
            rankfold.merge(model)
            torch.testing.assert_close(model(x), trained)
        if merged_within and unmerged_within:
            rankfold.unmerge(model)
            assert not torch.equal(model(x), trained)  # its products are rounded again
            torch.testing.assert_close(model.eval()(x), trained)
            model.train()
    if not merged_within or unmerged_within:
        rankfold.merge(model)
    assert all(isinstance(model[i], PackedLinear) for i in (0, 2))
    torch.testing.assert_close(model(x), trained)
    rankfold.unmerge(model)
    torch.testing.assert_close(model(x), trained)
    rankfold.detach(model)
    assert type(model[0]) is nn.Linear
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert "halo" not in model[0].__dict__


def test_errors() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    rankfold.quantize(model, rankfold.Scheme(), targets=["0"])
    with pytest.raises(rankfold.RankfoldError, match="float linear layers"), HALO().training(model):
        pass
    model = net()
    with pytest.raises(ZeroDivisionError), HALO().training(model):
        _ = 1 / 0
    assert type(model[0]) is nn.Linear
