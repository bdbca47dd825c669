import pytest
import torch
from torch import nn

import rankfold
from rankfold import LoRAXS
from tests.methods.support import attached, change, close, draw, linear, perturb, put


def test_worked_numbers():
    """W = diag(3, 2, 1): B = (e1, e2), A = (3 e1, 2 e2), so R is weighed by the singular values of its column."""
    _, delta = attached(linear(torch.diag(torch.tensor([3.0, 2, 1]))), LoRAXS(rank=2, alpha=4))
    close(delta.B.abs(), [[1, 0], [0, 1], [0, 0]])
    close(delta.A, [[3, 0, 0], [0, 2, 0]])
    put(delta, R=[[1, 2], [3, 4]])
    close(change(delta), [[6, 8, 0], [18, 16, 0], [0, 0, 0]])


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_columns_in_U_and_rows_in_V(shape: tuple[int, int]):
    W = draw(*shape)
    _, delta = attached(linear(W), LoRAXS(rank=3))
    U, S, Vt = torch.linalg.svd(W)
    close(delta.B @ delta.A, U[:, :3] * S[:3] @ Vt[:3], 1e-12)
    close(delta.B.T @ delta.B, torch.eye(3))
    close(delta.A @ delta.A.T, torch.diag(S[:3] ** 2))
    perturb(delta)
    dW = change(delta)
    assert torch.linalg.matrix_rank(dW, atol=1e-9) == 3
    close(dW, U[:, :3] @ U[:, :3].T @ dW @ Vt[:3].T @ Vt[:3])


def test_starts_near_the_base_but_not_at_it():
    W = draw(40, 30)
    _, delta = attached(linear(W), LoRAXS(rank=25))
    assert delta.R.std().item() == pytest.approx(1e-5, rel=0.1)
    assert 1e-7 < change(delta).norm() / W.norm() < 1e-4
    _, delta = attached(linear(W), LoRAXS(rank=25, std=0))
    assert not change(delta).any()


def test_gradient_of_R_is_s_Bt_G_At_and_alone():
    model, delta = attached(linear(draw(6, 5)), LoRAXS(rank=3, alpha=6))
    before = {name: tensor.clone() for name, tensor in delta.named_buffers()}
    x, up = draw(4, 5, seed=1), draw(4, 6, seed=2)
    model(x).backward(up)
    close(delta.R.grad, 2 * delta.B.T @ (up.T @ x) @ delta.A.T, 1e-11)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    optimizer.step()
    assert [name for name, _ in delta.named_parameters()] == ["R"]
    assert before.keys() == {"B", "A"}
    assert all(torch.equal(before[name], tensor) for name, tensor in delta.named_buffers())


def test_as_many_numbers_in_a_layer_of_any_size():
    model = nn.Sequential(nn.Linear(10, 40), nn.Linear(40, 7))
    adapter = rankfold.attach(model, LoRAXS(rank=5), targets=["0", "1"])
    assert adapter.num_parameters() == 2 * 25


def test_a_float32_decomposition_of_a_16_bit_weight():
    torch.manual_seed(0)
    layer = nn.Linear(20, 30).bfloat16()
    _, delta = attached(layer, LoRAXS(rank=4))
    assert delta.B.dtype == torch.float32
    close(delta.B.T @ delta.B, torch.eye(4), 1e-5)
    U, S, Vt = torch.linalg.svd(layer.weight.double())
    close(delta.B @ delta.A, (U[:, :4] * S[:4] @ Vt[:4]).detach(), 1e-5)


def test_saves_its_factors(tmp_path):
    torch.manual_seed(0)
    model, delta = attached(nn.Linear(9, 8), LoRAXS(rank=3))
    perturb(delta)
    x = torch.randn(2, 9)
    expected = model(x)
    rankfold.save(model, tmp_path / "a")
    rankfold.detach(model)
    rankfold.load(model, tmp_path / "a")
    assert torch.equal(model(x), expected)


def test_experts_are_decomposed_one_by_one():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(draw(3, 8, 5))
    delta = rankfold.attach(model, LoRAXS(rank=2), targets=["up"]).deltas["experts.up"]
    for e, W in enumerate(draw(3, 8, 5)):
        U, S, Vt = torch.linalg.svd(W)
        close(delta.B[e] @ delta.A[e], U[:, :2] * S[:2] @ Vt[:2])
    assert not torch.equal(delta.R[0], delta.R[1])
