"""GPTQ by hand, against rounding to nearest, and in a model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.core.feedback import column_feedback
from rankfold.core.packed import PackedLinear, Scheme, dequantise
from rankfold.errors import RankfoldError
from rankfold.quantizers.gptq import GPTQ
from rankfold.quantizers.rtn import RTN
from tests.methods.support import DOUBLE, draw


def correlated(n: int, seed: int = 0, tokens: int = 400) -> Tensor:
    X = draw(tokens, n, seed=seed) @ (torch.eye(n, dtype=DOUBLE) + 0.3 * draw(n, n, seed=seed + 1))
    return X.mT @ X / tokens


def error(W: Tensor, V: Tensor, H: Tensor) -> float:
    return float(((W - V) @ H * (W - V)).sum())


def test_two_weights_by_hand() -> None:
    """RTN rounds both up and costs 0.96; the second one gives way to the first: 0.4, so 0, and 0.56."""
    W, H = torch.tensor([[0.6, 0.6]], dtype=DOUBLE), torch.tensor([[2.0, 1], [1, 2]], dtype=DOUBLE)
    seen: list[float] = []

    def whole(j: int, M: Tensor) -> Tensor:
        seen.append(float(M[0, j]))
        return M[:, j].round()

    found = column_feedback(W, H, whole, damping=0)
    assert found.tolist() == [[1, 0]]
    torch.testing.assert_close(torch.tensor(seen, dtype=DOUBLE), torch.tensor([0.6, 0.4], dtype=DOUBLE))
    assert error(W, found, H) == pytest.approx(0.56)
    assert error(W, W.round(), H) == pytest.approx(0.96)


@pytest.mark.parametrize("block", [1, 3, 64])
def test_blocks_change_nothing(block: int) -> None:
    W, H = draw(5, 10, seed=1), correlated(10)
    one = column_feedback(W, H, lambda j, M: M[:, j].round(), block=10)
    torch.testing.assert_close(column_feedback(W, H, lambda j, M: M[:, j].round(), block=block), one)


def test_inputs_that_are_always_zero_take_no_part() -> None:
    W, H = draw(3, 4, seed=2), correlated(4)
    H[1], H[:, 1] = 0, 0
    found = column_feedback(W, H, lambda j, M: M[:, j].round())
    assert not found[:, 1].any()
    rest = [0, 2, 3]
    ones = column_feedback(W[:, rest], H[rest][:, rest], lambda j, M: M[:, j].round())
    assert error(W[:, rest], found[:, rest], H[rest][:, rest]) == pytest.approx(
        error(W[:, rest], ones, H[rest][:, rest]), rel=0.05
    )


def test_a_matrix_that_is_no_second_moment_is_refused() -> None:
    with pytest.raises(RankfoldError, match="raise the damping"):
        column_feedback(draw(2, 2, seed=1), torch.tensor([[1.0, 3], [3, 1]]), lambda j, M: M[:, j])


KINDS = [
    {"group": 8},
    {"group": 5, "symmetric": True},
    {"group": "channel"},
    {"group": "tensor"},
    {"group": 4, "along": "out"},
    {"format": "nf4", "group": 8},
    {"format": "ternary", "group": "channel"},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_without_correlation_it_is_rounding_to_nearest(kind: dict[str, Any]) -> None:
    scheme = Scheme(**{"format": "int3", **kind})
    W = draw(12, 20, seed=3)
    mine, theirs = GPTQ().rounded(W, 2.5 * torch.eye(20, dtype=DOUBLE), scheme), RTN().quantise(W, scheme, None, "")
    assert torch.equal(mine.codes, theirs.codes)
    assert torch.equal(mine.scales, theirs.scales)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": True}, {"block": 4}], ids=str)
def test_with_correlation_outputs_are_nearer_than_rounded_to_nearest(
    kind: dict[str, Any], options: dict[str, Any]
) -> None:
    scheme = Scheme(**{"format": "int3", **kind})
    W, H = draw(12, 20, seed=4), correlated(20, seed=5)
    mine, theirs = (
        dequantise(packed, (12, 20), scheme, DOUBLE)
        for packed in (GPTQ(**options).rounded(W, H, scheme), RTN().quantise(W, scheme, None, ""))
    )
    assert error(W, mine, H) < 0.9 * error(W, theirs, H)


def test_a_groups_scales_see_all_feedback_so_far() -> None:
    """Also of columns in its own block: with blocks of 2 and of 64 columns the scales are the same."""
    W, H = draw(6, 8, seed=6), correlated(8, seed=7)
    scheme = Scheme(format="int2", group=4, scales="float32")
    narrow, wide = (GPTQ(block=block).rounded(W, H, scheme) for block in (2, 64))
    assert torch.equal(narrow.codes, wide.codes)
    assert torch.equal(narrow.scales, wide.scales)
    assert not torch.equal(wide.scales[:, 1], RTN().quantise(W, scheme, None, "").scales[:, 1])


def model_and_data() -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    mix = torch.eye(16) + 0.5 * torch.randn(16, 16)
    return model, [torch.randn(64, 16) @ mix for _ in range(4)]


@torch.no_grad()
def test_in_a_model_it_beats_rounding_to_nearest() -> None:
    found = {}
    for how in ("rtn", "gptq"):
        model, batches = model_and_data()
        expected = torch.cat([model(x) for x in batches])
        asked: dict[str, Any] = {"calibration": batches} if how == "gptq" else {}
        rankfold.quantize(model, Scheme(format="int3", group=8), how, targets=["0", "2"], **asked)
        assert isinstance(model[2], PackedLinear)
        found[how] = float((torch.cat([model(x) for x in batches]) - expected).norm())
    assert found["gptq"] < 0.85 * found["rtn"]


def test_statistics_are_asked_for_and_only_where_needed() -> None:
    model, batches = model_and_data()
    with pytest.raises(RankfoldError, match="gptq needs statistics"):
        rankfold.quantize(model, Scheme(), "gptq", targets=["0"])
    with pytest.raises(RankfoldError, match="rtn needs no statistics"):
        rankfold.quantize(model, Scheme(), "rtn", targets=["0"], calibration=batches)
    with pytest.raises(RankfoldError, match="all inputs of 0 are zero"):
        rankfold.quantize(model, Scheme(), "gptq", targets=["0"], calibration=[torch.zeros(4, 16)])
    assert type(model[0]) is nn.Linear


def test_groups_of_inputs_in_the_order_they_are_taken() -> None:
    """An ordered scheme: in act_order each group is of inputs of like size, with scales that have seen all feedback."""
    W, H = draw(12, 20, seed=8), correlated(20, seed=9)
    sizes = (torch.arange(20, dtype=DOUBLE) % 5 + 0.2) ** 2
    H = sizes[:, None] * H * sizes
    scheme = Scheme(format="int3", group=4, ordered=True, scales="float32")
    packed = GPTQ(act_order=True).rounded(W, H, scheme)
    order = H.diagonal().argsort(descending=True)
    assert packed.order is not None
    assert torch.equal(packed.order.long(), order)
    plain = scheme.model_copy(update={"ordered": False})
    inner = GPTQ().rounded(W[:, order], H[order][:, order], plain)
    found = dequantise(packed, (12, 20), scheme, DOUBLE)
    assert torch.equal(found[:, order], dequantise(inner, (12, 20), plain, DOUBLE))
    assert error(W, found, H) < error(W, dequantise(GPTQ().rounded(W, H, plain), (12, 20), plain, DOUBLE), H)
    layer = PackedLinear.of(nn.Linear(20, 12), packed, scheme)
    x = torch.randn(3, 20, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), x @ layer.dequantise().mT + layer.bias)
    torch.testing.assert_close(x.grad, layer.dequantise().sum(0).expand(3, -1))
    with pytest.raises(RankfoldError, match="takes inputs as they stand"):
        PackedLinear.of(nn.Linear(20, 12), RTN().quantise(W, scheme, None, ""), scheme)
