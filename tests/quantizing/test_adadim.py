"""AdaDim by hand, and which direction it takes where the inputs have outliers and where they have none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.core.calibration import InputCovariance, calibrate
from rankfold.core.calibration.blocks import standing
from rankfold.core.packed import PackedLinear, Scheme, dequantise
from rankfold.errors import RankfoldError
from rankfold.quantizers.rtn import RTN
from tests.methods.support import DOUBLE, draw


def rounded(W: Tensor, **options: Any) -> Tensor:
    scheme = Scheme(format="int2", scales="float32", **options)
    return dequantise(RTN().quantise(W, scheme, None, ""), tuple(W.shape), scheme, W.dtype)


def test_two_columns_by_hand() -> None:
    """Along the row the small weights are wiped out; down the column both have a scale of their own."""
    W = torch.tensor([[-0.1, 10], [0.2, -20]], dtype=DOUBLE)
    assert rounded(W, group=2)[:, 0].tolist() == [0, 0]
    torch.testing.assert_close(rounded(W, group=2, along="out"), W)


def test_down_columns_is_along_the_rows_of_the_transpose() -> None:
    W = draw(8, 12, seed=1)
    assert torch.equal(rounded(W, group=4, along="out"), rounded(W.mT, group=4).mT)


class Mlp(nn.Module):
    """Both inner layers see the same x; the output depends on either."""

    def __init__(self, n: int = 16):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(n, 2 * n), nn.Linear(n, 2 * n), nn.Linear(2 * n, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.gate(x)) * self.up(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def net(outliers: bool = False) -> tuple[Net, list[Tensor]]:
    """With `outliers` the inputs are 20 times as large in one channel, and its weights a fifth of the others."""
    torch.manual_seed(0)
    model, batches = Net(), [torch.randn(32, 16) for _ in range(3)]
    if outliers:
        with torch.no_grad():
            for layer in (model.layers[0].gate, model.layers[0].up):
                layer.weight[:, 3] *= 0.2  # type: ignore[index,operator]
        for x in batches:
            x[:, 3] *= 20
    return model, batches


def directions(model: nn.Module) -> dict[str, str]:
    return {path: m.scheme.along for path, m in model.named_modules() if isinstance(m, PackedLinear)}


@torch.no_grad()
def quantised(how: Any, scheme: Scheme, outliers: bool = False) -> tuple[float, dict[str, str]]:
    model, batches = net(outliers)
    expected = torch.cat([model.layers[0](x) for x in batches])
    asked: dict[str, Any] = {} if how == "rtn" else {"calibration": batches}
    rankfold.quantize(model, scheme, how, **asked)
    return float((torch.cat([model.layers[0](x) for x in batches]) - expected).norm()), directions(model)


def test_outliers_turn_the_groups_and_other_layers_take_the_better_direction_too() -> None:
    scheme = Scheme(format="int3", group=16)
    error, found = quantised("adadim", scheme, outliers=True)
    rows, columns = (quantised("rtn", scheme.model_copy(update={"along": along}), True)[0] for along in ("in", "out"))
    assert found["layers.0.gate"] == found["layers.0.up"] == "out"
    assert error < min(rows, columns)
    assert columns < rows


def test_the_first_layer_has_the_smaller_error_of_the_two() -> None:
    """Its own weight in both directions, the rest in float; and the other layers are decided beside it."""
    scheme = Scheme(format="int2", group=16)
    model, batches = net()
    with torch.no_grad():
        errors, mlp = {}, model.layers[0]
        expected = torch.cat([mlp(x) for x in batches])
        for along in ("in", "out"):
            W = rounded(mlp.gate.weight, group=16, along=along).half().float()
            with standing({mlp.gate: W}):  # type: ignore[dict-item]
                errors[along] = float((torch.cat([mlp(x) for x in batches]) - expected).norm())
    rankfold.quantize(model, scheme, "adadim", calibration=batches)
    assert directions(model)["layers.0.gate"] == min(errors, key=lambda along: errors[along])


def test_the_last_layer_of_a_module_is_judged_by_its_own_output() -> None:
    """Of the module's output only `down` is left to decide, on what the packed layers before it give."""
    model, batches = net(outliers=True)
    plain, _ = net(outliers=True)
    rankfold.quantize(model, Scheme(format="int2", group=8), "adadim", calibration=batches)
    chosen, W = model.layers[0].down, plain.layers[0].down.weight.detach()
    assert isinstance(chosen, PackedLinear)
    expected = torch.cat([plain.layers[0](x) for x in batches]).detach()
    errors = {}
    for along in ("in", "out"):
        V = RTN().quantise(W, scheme := Scheme(format="int2", group=8, along=along), None, "")
        plain.layers[0].gate, plain.layers[0].up = model.layers[0].gate, model.layers[0].up
        with torch.no_grad(), standing({plain.layers[0].down: dequantise(V, tuple(W.shape), scheme, W.dtype)}):  # type: ignore[dict-item]
            errors[along] = float((torch.cat([plain.layers[0](x) for x in batches]) - expected).norm())
    assert chosen.scheme.along == min(errors, key=lambda along: errors[along])


def test_gptq_rounds_in_the_direction_that_rounding_to_nearest_chose() -> None:
    scheme = Scheme(format="int3", group=16)
    by_rtn, found = quantised("adadim", scheme, outliers=True)
    by_gptq, again = quantised(rankfold.build("adadim", rounding="gptq"), scheme, outliers=True)
    assert found["layers.0.gate"] == again["layers.0.gate"]
    assert by_gptq < by_rtn
    model, batches = net()
    H = calibrate(model, batches, [InputCovariance()], ["layers.0.gate"]).get(InputCovariance(), "layers.0.gate")
    W = model.layers[0].gate.weight.detach()
    rankfold.quantize(model, scheme, rankfold.build("adadim", rounding="gptq"), calibration=batches)
    layer: Any = model.layers[0].gate
    rule = rankfold.build("gptq", act_order=True, static_groups=layer.scheme.along == "in")
    assert torch.equal(layer.packed.codes, rule.rounded(W, H, layer.scheme).codes)


def test_the_data_itself_is_needed_and_an_error_leaves_the_weights() -> None:
    model, batches = net()
    found = calibrate(model, batches, [InputCovariance()])
    with pytest.raises(RankfoldError, match="adadim runs the blocks"):
        rankfold.quantize(model, Scheme(), "adadim", calibration=found)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        rankfold.quantize(model, Scheme(), "adadim", calibration=[*batches, torch.zeros(3, 5)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
