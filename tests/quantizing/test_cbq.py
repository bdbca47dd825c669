"""CBQ's rounding by hand, its outliers, and windows of blocks that are learnt together."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.core.packed import PackedLinear, Scheme, dequantise
from rankfold.errors import RankfoldError, UnsupportedError
from rankfold.quantizers.cbq import CBQ, Rounding, boundary, divergence, stretched, undecided
from rankfold.quantizers.rtn import RTN
from tests.methods.support import DOUBLE, draw
from tests.quantizing.test_adadim import net
from tests.quantizing.test_compensation import Stack, stack
from tests.quantizing.test_work import quantised as on_a_stack

INT2 = Scheme(format="int2", group=8, scales="float32")


def rounding(scheme: Scheme = INT2, rank: int = 3) -> tuple[Tensor, Rounding]:
    W = draw(12, 20, seed=1).tanh()
    return W, Rounding(W, torch.ones(20, dtype=DOUBLE), scheme, rank, 0, {})


def test_a_sigmoid_that_is_stretched_reaches_0_and_1() -> None:
    V = torch.tensor([0, math.log(11) - 0.01, math.log(11) + 1e-9, 30, -math.log(11) - 1e-9, -30], dtype=DOUBLE)
    delta = stretched(V)
    assert float(delta[0]) == pytest.approx(0.5)
    assert 0.99 < delta[1] < 1
    assert delta[2:].tolist() == [1, 1, 0, 0]


def test_the_penalty_is_0_where_all_is_decided_and_only_there() -> None:
    delta = torch.tensor([0, 1, 0.5, 0.9], dtype=DOUBLE)
    found = undecided(delta, 2.0)
    torch.testing.assert_close(found, torch.tensor([0, 0, 1, 0.36], dtype=DOUBLE))
    assert float(undecided(delta, 20.0)[3]) == pytest.approx(1 - 0.8**20)


def test_divergence_by_hand() -> None:
    """KL((½, ½) ‖ (¾, ¼)) = ½ ln(2/3) + ½ ln 2."""
    h, y = torch.zeros(1, 2, dtype=DOUBLE), torch.tensor([[math.log(3), 0]], dtype=DOUBLE)
    assert float(divergence(h, y)) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert float(divergence(y, y)) == 0


def test_outliers_are_what_stands_apart_above_the_quartiles() -> None:
    """Q1 = 2 and Q3 = 4, so T = 7 and only 100 is above: the largest that stays is 4."""
    assert float(boundary(torch.tensor([1.0, 2, 3, 4, 100]))) == 4
    assert float(boundary(torch.tensor([3.0, 1, 4, 2]))) == 4
    # Of 10, 11, 60 and 61, all above T, the last two stand apart by 49, more than the first two by 6.
    assert float(boundary(torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4, 2, 3, 2, 3, 2, 10, 11, 60, 61]))) == 11


def test_it_starts_at_round_to_nearest() -> None:
    for scheme in (INT2, INT2.model_copy(update={"along": "out", "format": "ternary", "symmetric": True})):
        W, one = rounding(scheme)
        mine, theirs = one.packed(), RTN().quantise(W, scheme, None, "")
        assert torch.equal(mine.codes, theirs.codes)
        assert torch.equal(mine.scales, theirs.scales)
        torch.testing.assert_close(one.value(one.delta()), dequantise(theirs, (12, 20), scheme, DOUBLE))


def test_what_is_learnt_is_of_low_rank_and_stays_on_the_grid_within_a_step() -> None:
    W, one = rounding()
    assert one.A1.numel() + one.A2.numel() == 3 * (12 + 20)
    with torch.no_grad():
        one.A2.copy_(draw(3, 20, seed=2))
    assert int(torch.linalg.matrix_rank(one.A1 @ one.A2)) == 3
    packed = one.packed()
    V = dequantise(packed, (12, 20), INT2, DOUBLE)
    torch.testing.assert_close(one.value(one.delta()).detach(), V)
    steps = packed.scales.double().repeat_interleave(8, 1)[:, :20]
    assert bool(((V - W).abs() <= steps * (1 + 1e-6)).all())
    assert not torch.equal(packed.codes, RTN().quantise(W, INT2, None, "").codes)


def test_gradients_are_those_of_the_formula() -> None:
    """Of V through the stretched sigmoid though the value is hardened, and of the steps; none beyond the grid."""
    _, one = rounding()
    G = draw(12, 20, seed=3)
    (one.value(one.delta()) * G).sum().backward()
    s = one.scales.double().repeat_interleave(8, 1)[:, :20]
    q = one.base + one.z + (one.V0 >= 0)
    sigma = one.V0.sigmoid()
    dV = torch.where((q >= 0) & (q <= 3), G * s * sigma * (1 - sigma) * 1.2, 0)
    torch.testing.assert_close(one.A2.grad, (one.A1.mT @ dV).detach())
    assert one.share.grad is not None
    torch.testing.assert_close(
        one.share.grad[:, :2], (G * (q.clamp(0, 3) - one.z) * s)[:, :16].unflatten(1, (2, 8)).sum(-1)
    )


@torch.no_grad()
def far(model: nn.Module, batches: list[Tensor], expected: Tensor) -> float:
    return float((torch.cat([model(x) for x in batches]) - expected).norm())


def quantised(how: Any) -> tuple[float, Stack]:
    model, batches = stack()
    with torch.no_grad():
        expected = torch.cat([model(x) for x in batches])
    rankfold.quantize(model, INT2, how, targets=["up", "down"], calibration=None if how == "rtn" else batches)
    return far(model, batches, expected), model


def test_blocks_alone_and_together_are_nearer_than_rounded_to_nearest() -> None:
    rtn, _ = quantised("rtn")
    alone, _ = quantised(CBQ(blocks=1, epochs=4))
    together, model = quantised(CBQ(blocks=2, epochs=4))
    assert max(alone, together) < 0.8 * rtn
    assert alone != together
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 6
    assert all(layer.scheme.balanced for layer in layers)


def test_a_block_in_two_windows_goes_on_from_what_it_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks in windows of two: the middle one begins its second window with what the first gave it."""
    model, batches = stack()
    seen: list[dict[str, Tensor]] = []
    learn = CBQ.learn

    def spy(self: CBQ, window: Any, layers: Any) -> None:
        starts = {path: one.A2.detach().clone() for path, one in layers.items()}
        learn(self, window, layers)
        seen.append({**starts, **{f"{path} after": one.A2.detach().clone() for path, one in layers.items()}})

    monkeypatch.setattr(CBQ, "learn", spy)
    rankfold.quantize(model, INT2, CBQ(epochs=2), calibration=batches)
    first, second = seen[-2:]  # before these is the window of the layers in no block
    assert not first["blocks.1.up"].any()
    assert second["blocks.1.up"].any()
    assert torch.equal(second["blocks.1.up"], first["blocks.1.up after"])
    assert {path for path in first if "after" not in path} == {
        f"blocks.{i}.{n}" for i in (0, 1) for n in ("up", "down")
    }


def test_stopped_between_windows_it_comes_to_the_same(tmp_path: Any) -> None:
    asked: dict[str, Any] = {"how": CBQ(epochs=2), "compensate": None, "scheme": INT2}
    expected = on_a_stack(None, **asked).state_dict()
    with pytest.raises(KeyboardInterrupt):
        on_a_stack(tmp_path, stop_after=5, **asked)
    found = on_a_stack(tmp_path, **asked).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_large_inputs_are_divided_and_far_weights_cut() -> None:
    model, batches = net()
    for x in batches:
        x[:, 5] *= 50
    with torch.no_grad():
        model.layers[0].gate.weight[3, 7] = 9.0  # type: ignore[index,operator]
    rankfold.quantize(model, Scheme(format="int8", group=16), CBQ(epochs=1), calibration=batches)
    layer: Any = model.layers[0].gate
    sizes = torch.cat(batches).abs().amax(0)
    expected = (sizes / boundary(sizes)).clamp(min=1).sqrt()
    torch.testing.assert_close(layer.balance, expected)
    assert float(layer.balance[5]) > 3
    assert float(layer.dequantise().abs().max()) < 0.5


def test_rounded_activations_are_rounded_while_it_learns() -> None:
    model, batches = net()
    scheme = Scheme(format="int4", group=8, activations="int8")
    with torch.no_grad():
        expected = torch.cat([model(x) for x in batches])
    rankfold.quantize(model, scheme, CBQ(epochs=2), calibration=batches)
    assert far(model, batches, expected) < 0.2 * float(expected.norm())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_it_cannot_round_is_refused_and_an_error_leaves_the_model() -> None:
    model, batches = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match="nf4 has not"):
        rankfold.quantize(model, Scheme(format="nf4"), "cbq", calibration=batches)
    with pytest.raises(RankfoldError, match="cbq needs statistics"):
        rankfold.quantize(model, INT2, "cbq")

    def stop(path: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rankfold.quantize(model, INT2, CBQ(epochs=1), calibration=batches, progress=stop)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
