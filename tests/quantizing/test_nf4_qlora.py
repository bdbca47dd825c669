"""QLoRA's format: NF4's table as the paper builds it, scales in 8 bits, and the layer that keeps them so."""

from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from rankfold.core.packed import NF4, Packed, PackedLinear, Scheme, halve, whole
from rankfold.quantizers.rtn import RTN
from tests.methods.support import DOUBLE, draw


def test_the_table_is_made_of_quantiles() -> None:
    """8 above zero and 7 below, each an even share of the probability up to `o`; bitsandbytes rounds them to 1e-7."""
    o = 0.9677083
    above = torch.special.ndtri(torch.linspace(o, 0.5, 9, dtype=DOUBLE)[:-1])
    below = -torch.special.ndtri(torch.linspace(o, 0.5, 8, dtype=DOUBLE)[:-1])
    table = torch.cat([below, torch.zeros(1, dtype=DOUBLE), above]).sort().values
    torch.testing.assert_close(torch.tensor(NF4, dtype=DOUBLE), table / table.max(), atol=1e-6, rtol=0)
    assert sum(t > 0 for t in NF4) == 8
    assert sum(t < 0 for t in NF4) == 7


def test_scales_in_8_bits_by_hand() -> None:
    """Two blocks: less the mean 2 each is in [-1, 1] of its largest distance, and takes the table's nearest value."""
    scales = torch.full((1, 512), 2.0)
    scales[0, 0], scales[0, 1], scales[0, 256], scales[0, 257] = 3.0, 1.0, 2.5, 1.5
    codes, blocks = halve(scales)
    assert blocks.tolist() == [2.0, 1.0, 0.5]
    again = whole(codes, blocks)
    assert again[0, 2] == 2.0  # 0 is in the table
    assert again[0, 0] == 3.0  # so is 1, and -1 is not: -0.9929688 is the lowest
    assert again[0, 1] == pytest.approx(2 - 0.9929688)
    assert again[0, 256] == 2.5
    assert again[0, 257] == pytest.approx(2 - 0.5 * 0.9929688)


def test_bits_of_a_number() -> None:
    """4 + 8/64 + 32/(64 · 256), and the mean."""
    n = 4096
    assert Scheme(format="nf4", double=True).bits(n, n) == pytest.approx(4.126953125 + 32 / n**2, abs=1e-12)


def layer_of(kind: Scheme) -> tuple[nn.Linear, Packed, PackedLinear]:
    plain = nn.Linear(128, 40)
    with torch.no_grad():
        plain.weight.copy_(draw(40, 128, seed=3, dtype=torch.float32))
    packed = RTN().quantise(plain.weight.detach(), kind, None, "")
    return plain, packed, PackedLinear.of(plain, packed, kind)


@pytest.mark.parametrize("asked", [{"format": "nf4"}, {"format": "int4", "group": 32}, {"format": "int3"}], ids=str)
def test_a_layer_keeps_its_scales_as_bytes(asked: dict[str, Any]) -> None:
    kind = Scheme(**asked, double=True)
    plain, packed, layer = layer_of(kind)
    _, _, once = layer_of(Scheme(**asked, scales="float32"))
    assert layer.scales.dtype == torch.uint8
    size = sum(t.numel() * t.itemsize for name, t in layer.state_dict().items() if name != "bias")
    assert 8 * size == pytest.approx(kind.bits(40, 128) * plain.weight.numel())
    assert size < sum(t.numel() * t.itemsize for name, t in once.state_dict().items() if name != "bias")
    s = layer.packed.scales
    spacing = (s - packed.scales).abs() / (packed.scales - packed.scales.mean()).abs().max()
    assert 0 < spacing.max() < 0.0101  # half of the table's widest gap, next to -1
    x = torch.randn(3, 128, requires_grad=True)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantise(), plain.bias))
    torch.testing.assert_close(layer.dequantise(), once.dequantise(), atol=0.02, rtol=0)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantise().sum(0).expand(3, -1))


def test_the_bytes_go_through_a_file() -> None:
    kind = Scheme(format="nf4", double=True)
    _, _, layer = layer_of(kind)
    again = PackedLinear(128, 40, kind, True, torch.float32, "cpu")
    again.load_state_dict(load(save(layer.state_dict())))
    assert torch.equal(again.dequantise(), layer.dequantise())
