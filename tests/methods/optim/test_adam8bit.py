import pytest
import torch
from torch import nn

import rankfold
from rankfold import Adam8bit
from rankfold.core.eightbit import codes
from tests.methods.support import draw


def optimizer_of(*parameters, lr=0.01, weight_decay=0.1, **group):
    return Adam8bit().optimizer([{"params": list(parameters), **group}], lr, weight_decay)


def train(optimizer, p, steps):
    for step in steps:
        p.grad = draw(*p.shape, seed=step, dtype=p.dtype) + 0.5
        optimizer.step()


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    ours = codes(signed, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(ours, functional.create_dynamic_map(signed), rtol=1e-6, atol=0)


def test_bytes_of_state():
    large, small = nn.Parameter(torch.zeros(100, 50)), nn.Parameter(torch.zeros(10, 10))
    optimizer = optimizer_of(large, small)
    assert optimizer.state_bytes() == 2 * 5000 + 8 * 20 + 8 * 100
    train(optimizer, large, range(1))
    train(optimizer, small, range(1))
    states = [v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert sum(states) == optimizer.state_bytes()
    assert optimizer_of(large, quantise=False).state_bytes() == 8 * 5000


def test_small_parameters_are_stepped_by_adamw():
    p, q = nn.Parameter(draw(20, 10)), nn.Parameter(draw(20, 10))
    train(optimizer_of(p), p, range(5))
    train(torch.optim.AdamW([q], lr=0.01, weight_decay=0.1), q, range(5))
    torch.testing.assert_close(p, q, atol=1e-12, rtol=0)


def test_the_first_step_is_that_of_adamw_and_later_ones_stay_close():
    p, q = nn.Parameter(draw(80, 60)), nn.Parameter(draw(80, 60))
    ours, theirs = optimizer_of(p), torch.optim.AdamW([q], lr=0.01, weight_decay=0.1)
    train(ours, p, range(1))
    train(theirs, q, range(1))
    torch.testing.assert_close(p, q, atol=1e-9, rtol=0)
    start = q.detach().clone()
    train(ours, p, range(1, 30))
    train(theirs, q, range(1, 30))
    assert (p - q).norm() < 0.1 * (q - start).norm()
    assert not torch.equal(p, q)


def test_resumes_bit_for_bit_in_bfloat16():
    p = nn.Parameter(draw(80, 60, dtype=torch.bfloat16))
    optimizer = optimizer_of(p)
    train(optimizer, p, range(3))
    q = nn.Parameter(p.detach().clone())
    again = optimizer_of(q)
    again.load_state_dict(optimizer.state_dict())
    train(optimizer, p, range(3, 6))
    train(again, q, range(3, 6))
    assert torch.equal(p, q)
    assert again.state[q]["m.code"].dtype == torch.uint8
    assert again.state[q]["v.largest"].dtype == torch.float32


def test_a_gradient_that_vanishes_does_not_throw_a_number_away():
    p = nn.Parameter(torch.zeros(80, 60))
    optimizer = optimizer_of(p, weight_decay=0.0)
    for step in range(5):
        p.grad = torch.zeros(80, 60)
        p.grad[0, 0] = 1.0
        p.grad[0, 1] = 3e-4 if step == 0 else 0.0
        optimizer.step()
    assert p[0, 1].abs() < 0.1


def test_nan_is_kept_out():
    p = nn.Parameter(draw(80, 60))
    optimizer = optimizer_of(p)
    p.grad = torch.full_like(p, torch.nan)
    with pytest.raises(rankfold.RankfoldError, match="NaN"):
        optimizer.step()
    assert not optimizer.state
