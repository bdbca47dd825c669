import math
from typing import Any

import pytest
import torch
from torch import nn

from rankfold import GaLore, GradNormLoRP
from rankfold.core.eightbit import codes, dequantise, quantise
from rankfold.errors import RankfoldError
from rankfold.optim import AdamW8bit, Subspace, Svd
from tests.methods.optim.stepping import made, moved, parameter
from tests.methods.support import DOUBLE, draw

CPU = torch.device("cpu")


def kept(x: torch.Tensor, signed: bool) -> torch.Tensor:
    """x after it was quantised."""
    code, largest = torch.zeros(len(x), dtype=torch.uint8), torch.zeros(-(-len(x) // 256))
    quantise(x, code, largest, signed)
    return dequantise(code, largest, signed, x.dtype)


def test_the_tables() -> None:
    for signed, smallest in ((True, 5.5e-7), (False, 3.25e-7)):
        table = codes(signed, DOUBLE, CPU)
        assert len(table.unique()) == 256
        assert 0.0 in table
        assert table.max() == 1.0
        assert math.isclose(float(table[table > 0].min()), smallest, rel_tol=1e-6)
    assert codes(False, DOUBLE, CPU).min() == 0


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_is_off_by_half_a_gap_at_most(signed: bool) -> None:
    x = draw(1000, seed=1)
    x = x if signed else x.abs()
    table = codes(signed, DOUBLE, CPU)
    gap = float((table[1:] - table[:-1]).max())
    largest = torch.nn.functional.pad(x, (0, 24)).view(-1, 256).abs().amax(1).repeat_interleave(256)[:1000]
    error = (kept(x, signed) - x).abs()
    negative_edge = signed * (1 - float(-table.min()))  # -1 itself is not in the table
    assert bool((error <= largest * (max(gap / 2, negative_edge) + 1e-6)).all())
    assert error.max() > 0


def test_a_block_of_zeros_stays_zero_and_codes_come_back() -> None:
    x = torch.zeros(512, dtype=DOUBLE)
    x[256:] = codes(True, DOUBLE, CPU) * 4
    torch.testing.assert_close(kept(x, True), x)


def test_state_bytes() -> None:
    p = nn.Parameter(torch.zeros(512, 300))
    n = 512 * 32
    assert made(GaLore(rank=32, bits=8), p).state_bytes() == 2 * n + 8 * (n // 256) + 4 * 32 * 300
    normed = made(GradNormLoRP(rank=32, bits=8), p).state_bytes()
    assert normed == made(GaLore(rank=32, bits=8), p).state_bytes() + 4 * 3 * 512
    small = nn.Parameter(torch.zeros(40, 16))
    assert made(GaLore(rank=4, bits=8), small).state_bytes() == made(GaLore(rank=4), small).state_bytes()


@pytest.mark.parametrize("component", [GaLore, GradNormLoRP])
def test_steps_stay_near_those_in_32_bits(component: Any) -> None:
    p, q = parameter(256, 40), parameter(256, 40)
    ours, wide = made(component(rank=20, bits=8), p, lr=0.1), made(component(rank=20), q, lr=0.1)
    slope = draw(256, 40, seed=99)
    start = p.detach().clone()
    for step in range(8):
        G = slope + 0.1 * draw(256, 40, seed=step)
        moved(ours, p, G)
        moved(wide, q, G)
    assert "m.code" in ours.state[p]
    gap = (p - q).norm() / (q - start).norm()
    assert 0 < gap < 0.05


def test_resumes_bit_for_bit_with_the_types_it_had(tmp_path: Any) -> None:
    p = parameter(256, 40, dtype=torch.bfloat16)
    optimizer = made(GaLore(rank=20, bits=8), p, lr=0.1)
    for step in range(3):
        moved(optimizer, p, draw(256, 40, seed=step, dtype=p.dtype))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    q = nn.Parameter(p.detach().clone())
    again = made(GaLore(rank=20, bits=8), q, lr=0.1)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.state[q]["m.code"].dtype == torch.uint8
    G = draw(256, 40, seed=9, dtype=p.dtype)
    moved(optimizer, p, G)
    moved(again, q, G)
    assert torch.equal(p, q)


def test_other_switches_are_refused() -> None:
    with pytest.raises(RankfoldError, match="8 bits"):
        Subspace([parameter(3, 3)], projector=Svd(1), inner=AdamW8bit(), switch="reset")
