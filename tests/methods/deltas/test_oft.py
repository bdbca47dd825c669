import pytest
import torch
from torch import nn

import rankfold
from rankfold import OFT
from rankfold.deltas.oft import cayley
from tests.methods.support import DOUBLE, attached, close, draw, linear, perturb, put


def test_worked_numbers():
    W = [[1, 2], [3, 4]]
    model, delta = attached(linear(W, [1, -1]), OFT(block_size=2))
    put(delta, q=[[0.5]])
    R = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=DOUBLE)
    close(delta.rotation(), R[None])
    close(delta.transform(delta.W), torch.tensor(W, dtype=DOUBLE) @ R.T)
    close(model(torch.tensor([[1.0, 1.0]], dtype=DOUBLE)), [[1.4 - 2 * 0.2 + 1, 3 * 1.4 - 4 * 0.2 - 1]])


def test_each_block_turns_its_own_inputs():
    W = draw(5, 6)
    _, delta = attached(linear(W), OFT(block_size=3))
    perturb(delta, size=1.0)
    expected = []
    for block, (a, b, c) in enumerate(delta.q.tolist()):
        Q = torch.tensor([[0, a, b], [-a, 0, c], [-b, -c, 0]], dtype=DOUBLE)
        R = torch.linalg.inv(torch.eye(3) + Q) @ (torch.eye(3) - Q)
        expected.append(W[:, 3 * block : 3 * block + 3] @ R.T)
    close(delta.transform(delta.W), torch.cat(expected, 1))


@pytest.mark.parametrize("layer", [nn.Linear(64, 7), nn.Conv2d(4, 7, 4)])
def test_the_rows_keep_their_lengths_and_angles(layer: nn.Module):
    _, delta = attached(layer.double(), OFT())
    perturb(delta, size=2.0)
    W = delta.W
    W_ = delta.transform(W)
    assert (W_ - W).abs().max() > 0.1
    close(W_ @ W_.T, W @ W.T)
    R = delta.rotation()
    close(R @ R.mT, torch.eye(R.shape[-1]).expand_as(R))
    close(torch.linalg.det(R), torch.ones(len(R)))


def test_a_convolution_with_the_rotated_kernel():
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    model, delta = attached(layer, OFT())
    perturb(delta)
    x = draw(2, 4, 7, 7)
    W = delta.transform(delta.W).reshape(layer.weight.shape)
    close(model(x), nn.functional.conv2d(x, W, layer.bias, 2, 1, 1, 2))


@pytest.mark.parametrize("terms", [2, 3, 5, 9])
def test_neumann_terms(terms: int):
    Q = draw(3, 4, 4)
    Q = 0.1 * (Q - Q.mT)
    series = sum(torch.linalg.matrix_power(-Q, k) for k in range(terms - 1))
    close(cayley(Q, terms), (torch.eye(4) - Q) @ series)
    error = float((cayley(Q, terms) - cayley(Q)).detach().abs().max())
    assert 0 < error < 2 * float(torch.linalg.matrix_norm(Q, 2).max()) ** (terms - 1)


def test_the_series_is_an_option_of_the_same_rotation():
    W = draw(5, 8)
    exact, series = (attached(linear(W), OFT(neumann=n))[1] for n in (None, 12))
    put(exact, q=0.01 * draw(1, 28)), put(series, q=exact.q)
    close(series.transform(series.W), exact.transform(exact.W))
    put(series, q=10 * exact.q.detach())
    R = series.rotation()
    assert (R @ R.mT - torch.eye(8)).abs().max() > 1e-9, "many terms of a small Q: it is only nearly orthogonal"


def test_first_gradient():
    """At q = 0 R moves as −2 Q: the gradient is that of −2 tr(Gᵀ W Qᵀ) in the numbers above the diagonal."""
    W, x, up = draw(5, 8), draw(6, 8, seed=1), draw(6, 5, seed=2)
    model, delta = attached(linear(W), OFT(block_size=4))
    model(x).backward(up)
    M = 2 * W.T @ (up.T @ x)  # d/dQᵀ, with the sign of Q = −Qᵀ taken in
    i, j = torch.triu_indices(4, 4, 1)
    blocks = [M[b : b + 4, b : b + 4] for b in (0, 4)]
    close(delta.q.grad, torch.stack([(block - block.T)[i, j] for block in blocks]), 1e-11)


@pytest.mark.parametrize(("size", "block"), [(64, 32), (48, 24), (576, 32), (27, 27), (10, 10)])
def test_block_size_of_none_is_the_largest_divisor_of_the_input_up_to_32(size: int, block: int):
    _, delta = attached(nn.Linear(size, 3), OFT())
    assert delta.q.shape == (size // block, block * (block - 1) // 2)
    assert OFT().count(delta.site) == delta.q.numel() == size * (block - 1) // 2


def test_what_does_not_fit_is_refused():
    with pytest.raises(rankfold.UnsupportedError, match="nothing up to 32 divides its 37 inputs"):
        attached(nn.Linear(37, 8), OFT())
    assert attached(nn.Conv2d(3, 8, 3), OFT(block_size=9))[1].q.shape == (3, 36)
    with pytest.raises(rankfold.UnsupportedError, match="cannot be cut into blocks of 5"):
        attached(nn.Linear(8, 8), OFT(block_size=5))
    with pytest.raises(rankfold.UnsupportedError, match="mix the rows of the vocabulary"):
        attached(nn.Embedding(32, 8), OFT())


def test_inputs_of_any_shape():
    model, delta = attached(linear(draw(3, 8)), OFT(block_size=4))
    perturb(delta)
    x = draw(2, 3, 4, 8)
    close(model(x)[1, 2, 3], model(x[1, 2, 3]))


def test_experts_are_layers_of_their_own():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 8, 4))
    delta = rankfold.attach(model, OFT(block_size=2), targets=["up"]).deltas["experts.up"]
    perturb(delta)
    together = delta.transform(delta.W)
    for e in range(3):
        _, alone = attached(linear(draw(3, 8, 4)[e]), OFT(block_size=2))
        put(alone, q=delta.q[e])
        close(together[e], alone.transform(alone.W))
