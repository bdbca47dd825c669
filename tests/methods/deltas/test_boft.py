import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold import BOFT, OFT
from tests.methods.support import DOUBLE, attached, close, draw, linear, perturb, put


def skew(R: Tensor) -> Tensor:
    return (R - R.mT) / 2


def butterfly(blocks: Tensor, distance: int) -> Tensor:
    """One factor as a matrix, from the paper's words: block j turns two half blocks that lie `distance` apart."""
    count, b, _ = blocks.shape
    half, R = b // 2, torch.zeros(count * b, count * b, dtype=DOUBLE)
    taken, j = set(), 0
    for first in range(2 * count):
        if first in taken:
            continue
        second = first + distance
        taken |= {first, second}
        index = [*range(first * half, first * half + half), *range(second * half, second * half + half)]
        Q = skew(blocks[j])
        R[torch.tensor(index)[:, None], torch.tensor(index)] = torch.linalg.inv(torch.eye(b) + Q) @ (torch.eye(b) - Q)
        j += 1
    return R


@pytest.mark.parametrize(("size", "b", "m"), [(8, 2, 3), (16, 4, 2), (24, 4, 2), (32, 2, 4), (24, 6, 2), (9, 3, 1)])
def test_the_product_of_butterflies(size: int, b: int, m: int):
    W = draw(5, size)
    model, delta = attached(linear(W, draw(5, seed=3)), BOFT(block_size=b, m=m))
    perturb(delta, size=1.0)
    R = torch.eye(size, dtype=DOUBLE)
    for i, blocks in enumerate(delta.R.detach()):
        R = (butterfly(blocks, 2**i) if b % 2 == 0 else torch.block_diag(*map(one, blocks))) @ R
    expected = delta.s.detach()[:, None] * (W @ R.T)
    close(delta.transform(delta.W), expected)
    x = draw(4, size, seed=1)
    close(model(x), x @ expected.T + draw(5, seed=3))


def one(R: Tensor) -> Tensor:
    Q = skew(R)
    return torch.linalg.inv(torch.eye(len(Q)) + Q) @ (torch.eye(len(Q)) - Q)


def test_worked_numbers():
    W = torch.tensor([[1, 2], [3, 4]], dtype=DOUBLE)
    model, delta = attached(linear(W, [10, 20]), BOFT(block_size=2, m=1))
    put(delta, R=[[[[7, 1], [0, -3]]]], s=[1, 2])  # Q = [[0, .5], [−.5, 0]]: what is symmetric in R does nothing
    R = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=DOUBLE)
    expected = torch.tensor([1, 2])[:, None] * (W @ R.T)
    close(delta.transform(delta.W), expected)
    close(model(torch.eye(2, dtype=DOUBLE)), expected.T + torch.tensor([10, 20]))


def test_one_factor_is_oft_with_a_gain():
    W, x = draw(5, 8), draw(3, 8, seed=1)
    ours, boft = attached(linear(W), BOFT(block_size=4, m=1))
    theirs, oft = attached(linear(W), OFT(block_size=4))
    perturb(oft)
    i, j = torch.triu_indices(4, 4, 1)
    upper = torch.zeros(2, 4, 4, dtype=DOUBLE)
    upper[:, i, j] = 2 * oft.q.detach()
    put(boft, R=upper[None])
    close(ours(x), theirs(x))


def test_the_rows_keep_their_lengths_and_angles_without_a_gain():
    _, delta = attached(linear(draw(7, 64)), BOFT())
    perturb(delta, size=2.0)
    put(delta, s=torch.ones(7))
    W, W_ = delta.W, delta.transform(delta.W)
    assert (W_ - W).abs().max() > 0.1
    close(W_ @ W_.T, W @ W.T)


def test_m_factors_mix_groups_of_b_times_2_to_the_m_minus_1():
    _, delta = attached(linear(torch.eye(32)), BOFT(block_size=4, m=3))
    perturb(delta)
    mixed = delta.transform(delta.W).detach().abs() > 1e-9
    assert torch.equal(mixed, torch.block_diag(*[torch.ones(16, 16)] * 2).bool())


def test_a_convolution_with_the_rotated_kernel():
    layer = nn.Conv2d(4, 6, 2, stride=2, groups=2).double()
    model, delta = attached(layer, BOFT(m=2))
    perturb(delta)
    x = draw(2, 4, 6, 6)
    W = delta.transform(delta.W).reshape(layer.weight.shape)
    close(model(x), nn.functional.conv2d(x, W, layer.bias, 2, 0, 1, 2))


@pytest.mark.parametrize(("size", "m", "b"), [(64, 2, 8), (16, 2, 8), (24, 2, 4), (16, 4, 2), (64, 1, 8), (6, 1, 2)])
def test_block_size_of_none_fits_the_groups(size: int, m: int, b: int):
    _, delta = attached(nn.Linear(size, 3), BOFT(m=m))
    assert delta.R.shape == (m, size // b, b, b)
    assert BOFT(m=m).count(delta.site) == m * size * b + 3 == delta.R.numel() + delta.s.numel()


def test_what_does_not_fit_is_refused():
    with pytest.raises(rankfold.UnsupportedError, match="10 inputs are no multiple of 4"):
        attached(nn.Linear(10, 8), BOFT())
    with pytest.raises(rankfold.UnsupportedError, match="8 inputs are no multiple of 16"):
        attached(nn.Linear(8, 8), BOFT(block_size=8))
    with pytest.raises(rankfold.UnsupportedError, match="half blocks"):
        attached(nn.Linear(12, 8), BOFT(block_size=3))
    with pytest.raises(rankfold.UnsupportedError, match="mix the rows of the vocabulary"):
        attached(nn.Embedding(32, 8), BOFT())


def test_experts_are_layers_of_their_own():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 8, 16))
    delta = rankfold.attach(model, BOFT(block_size=2, m=3), targets=["up"]).deltas["experts.up"]
    perturb(delta)
    together = delta.transform(delta.W)
    for e in range(3):
        _, alone = attached(linear(draw(3, 8, 16)[e]), BOFT(block_size=2, m=3))
        put(alone, R=delta.R[e], s=delta.s[e])
        close(together[e], alone.transform(alone.W))
