import pytest
import torch
from torch import nn

import rankfold
from rankfold import SVFit
from tests.methods.support import attached, change, close, draw, linear, put


def test_worked_numbers():
    W = torch.diag(torch.tensor([3.0, 2, 1]))
    _, delta = attached(linear(W), SVFit(rank=2))
    close(delta.z, [3, 2])
    put(delta, z=[4, 1.5])
    close(delta.adapted_weight(delta.W), torch.diag(torch.tensor([4, 1.5, 1])))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_z_takes_the_place_of_the_singular_values_and_the_vectors_stay(shape: tuple[int, int]):
    W = draw(*shape)
    _, delta = attached(linear(W), SVFit(rank=3))
    assert not change(delta).any()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    close(delta.z, S[:3])
    z = torch.tensor([9.0, 0.25, -2.0], dtype=torch.float64)  # negative is allowed
    put(delta, z=z)
    close(delta.adapted_weight(W), U @ torch.diag(torch.cat([z, S[3:]])) @ Vt)


def test_gradient_of_z_and_nothing_else_trains():
    model, delta = attached(linear(draw(6, 5)), SVFit(rank=2))
    x, up = draw(4, 5, seed=1), draw(4, 6, seed=2)
    model(x).backward(up)
    G = up.T @ x
    U, _, Vt = torch.linalg.svd(delta.W.detach())
    close(delta.z.grad, [U[:, i] @ G @ Vt[i] for i in range(2)], 1e-11)
    before = {name: tensor.clone() for name, tensor in delta.named_buffers()}
    torch.optim.SGD(delta.parameters(), lr=0.1).step()
    assert before.keys() == {"U", "S", "Vt"}
    assert all(torch.equal(before[name], tensor) for name, tensor in delta.named_buffers())
    assert change(delta).any()


def test_the_change_has_at_most_rank_r():
    _, delta = attached(linear(draw(9, 8)), SVFit(rank=3))
    put(delta, z=[1, 1, 1])
    assert torch.linalg.matrix_rank(change(delta), atol=1e-9) == 3
    put(delta, z=[1, *delta.S[1:].tolist()])
    assert torch.linalg.matrix_rank(change(delta), atol=1e-9) == 1


def test_all_values_zero_take_the_whole_matrix_out():
    W = draw(6, 5)
    _, delta = attached(linear(W), SVFit(rank=5))
    put(delta, z=torch.zeros(5))
    close(delta.adapted_weight(W), torch.zeros(6, 5))


def test_the_top_values_fit_a_stretch_of_the_leading_directions_that_the_lowest_cannot():
    """A target whose difference to W lies in the leading directions is reached by z to the last digit."""
    W = draw(8, 6)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    target = U @ torch.diag(torch.cat([1.5 * S[:2], S[2:]])) @ Vt
    model, delta = attached(linear(W), SVFit(rank=2))
    x = draw(50, 6, seed=4)
    optimizer = torch.optim.LBFGS(delta.parameters(), max_iter=50, tolerance_grad=1e-14, tolerance_change=1e-18)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (model(x) - x @ target.T).square().mean()
        value.backward()
        return value

    first = loss().item()
    optimizer.step(loss)
    assert loss().item() < 1e-12 * first
    close(delta.z, 1.5 * S[:2], 1e-6)


def test_saves_what_it_needs_counts_r_and_refuses():
    adapter = rankfold.attach(nn.Sequential(nn.Linear(5, 7)), SVFit(rank=3), targets=["0"])
    assert adapter.num_parameters() == 3
    assert {name.split(".")[-1] for name in adapter.state_dict()} == {"z", "U", "S", "Vt"}
    with pytest.raises(rankfold.UnsupportedError, match="5 singular values"):
        attached(nn.Linear(5, 7), SVFit(rank=6))
    with pytest.raises(rankfold.RankfoldError, match="two factors"):
        attached(nn.Linear(5, 7), SVFit(rank=3), init=rankfold.build("pissa"))
