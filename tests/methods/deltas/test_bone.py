import pytest
import torch
from torch import nn

import rankfold
from rankfold import Bone
from tests.methods.support import DOUBLE, attached, change, close, draw, linear, perturb, put


def test_bat_worked_numbers():
    _, delta = attached(linear([[1, 2], [3, 4]]), Bone(rank=2))
    put(delta, D=[[[0, 1], [0, 0]]])
    close(change(delta), [[0, 2], [0, 3]])
    close(delta.transform(delta.W), [[1, 4], [3, 7]])


def test_bone_worked_numbers():
    model, delta = attached(linear(torch.zeros(2, 4)), Bone(rank=2, variant="bone"))
    put(delta, D=[[1, 2], [3, 4]])
    close(change(delta), [[1, 3, 1, 3], [2, 4, 2, 4]])
    close(model(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=DOUBLE)), [[22, 32]])


def test_bat_block_by_block():
    W = draw(6, 8)
    model, delta = attached(linear(W), Bone(rank=2))
    perturb(delta)
    expected = W.clone()
    for i in range(3):
        for j in range(4):
            rows, columns = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
            expected[rows, columns] += W[rows, columns] @ delta.D[i].detach() + delta.D[i].detach()
    close(delta.transform(delta.W), expected)
    close(model(torch.eye(8, dtype=DOUBLE)), expected.T)


def test_first_gradients():
    W, x, up = draw(6, 8), draw(5, 8, seed=1), draw(5, 6, seed=2)
    G = up.T @ x
    model, delta = attached(linear(W), Bone(rank=2))
    model(x).backward(up)

    def block(M: torch.Tensor, i: int, j: int) -> torch.Tensor:
        return M[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]

    rows = [sum((block(W, i, j) + torch.eye(2)).T @ block(G, i, j) for j in range(4)) for i in range(3)]
    close(delta.D.grad, torch.stack(rows), 1e-11)
    model, delta = attached(linear(W), Bone(rank=2, variant="bone"))
    model(x).backward(up)
    close(delta.D.grad, sum(G[:, 2 * j : 2 * j + 2].T for j in range(4)), 1e-11)


def test_rank_of_the_change():
    _, bat = attached(linear(draw(4, 4)), Bone(rank=2))
    _, bone = attached(linear(draw(4, 4)), Bone(rank=2, variant="bone"))
    perturb(bat), perturb(bone)
    assert torch.linalg.matrix_rank(change(bat)) == 4
    assert torch.linalg.matrix_rank(change(bone)) == 2


def test_bone_cuts_the_last_copy_where_rank_does_not_divide_in():
    _, delta = attached(linear(torch.zeros(3, 5)), Bone(rank=2, variant="bone"))
    perturb(delta)
    D = delta.D.detach()
    close(change(delta), torch.cat([D.T, D.T, D.T[:, :1]], 1))


@pytest.mark.parametrize(
    ("shape", "rank"), [((16, 32), 16), ((576, 1536), 64), ((128, 4096), 64), ((6, 8), 2), ((7, 8), 1)]
)
def test_rank_of_none_is_a_power_of_two_that_divides_both_sides(shape: tuple[int, int], rank: int):
    _, delta = attached(nn.Linear(*shape), Bone())
    assert delta.D.shape == (shape[1] // rank, rank, rank)
    assert Bone().count(delta.site) == rank * shape[1] == delta.D.numel()


def test_what_does_not_fit_is_refused():
    with pytest.raises(rankfold.UnsupportedError, match="3×3 blocks"):
        attached(nn.Linear(6, 8), Bone(rank=3))
    with pytest.raises(rankfold.UnsupportedError, match="input size"):
        attached(nn.Linear(6, 8), Bone(rank=7, variant="bone"))
    assert attached(nn.Linear(6, 8), Bone(rank=3, variant="bone"))[1].D.shape == (3, 8)


@pytest.mark.parametrize("variant", ["bat", "bone"])
def test_experts_are_layers_of_their_own(variant: str):
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 8, 4))
    delta = rankfold.attach(model, Bone(rank=2, variant=variant), targets=["up"]).deltas["experts.up"]
    perturb(delta)
    together = change(delta)
    for e in range(3):
        _, alone = attached(linear(draw(3, 8, 4)[e]), Bone(rank=2, variant=variant))
        put(alone, D=delta.D[e])
        close(together[e], change(alone))
