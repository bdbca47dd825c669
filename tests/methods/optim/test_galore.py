from typing import Any

import pytest
import torch
from torch import nn

import rankfold
from rankfold import GaLore
from rankfold.optim import SGD, Subspace, Svd
from tests.methods.optim.stepping import TALL, made, moved, parameter, resumed_bit_for_bit
from tests.methods.support import DOUBLE, close, draw


def test_the_first_step_by_hand() -> None:
    p = parameter(3, 2)
    step = moved(made(GaLore(rank=1, scale=1.0), p), p, TALL)
    # R = ±3: m = ±0.3, √v = 3 √0.001; √0.001/0.1 · 0.3/(3 √0.001 + 1e-6)
    root = 0.001**0.5
    expected = root / 0.1 * 0.3 / (3 * root + 1e-6)
    assert expected == pytest.approx(0.99999, abs=1e-6)
    close(step, [[-expected, 0], [0, 0], [0, 0]])


def test_two_steps_and_decay_by_hand() -> None:
    """W (2, 3) is wide, so its rows are compressed; the second gradient meets the first one's subspace."""
    p = nn.Parameter(torch.ones(2, 3, dtype=DOUBLE))
    optimizer = made(GaLore(rank=1, scale=0.5, eps=1e-3), p, lr=0.1, decay=0.2)
    moved(optimizer, p, torch.tensor([[2.0, 0, 0], [0, 0, 0]], dtype=DOUBLE))
    moved(optimizer, p, torch.tensor([[1.0, 3, 0], [5, 5, 5]], dtype=DOUBLE))
    W = 1.0, 1.0, 1.0
    m, v = [0.0] * 3, [0.0] * 3
    below = 1.0
    for t, row in enumerate([(2.0, 0.0, 0.0), (1.0, 3.0, 0.0)], start=1):
        m = [0.9 * a + 0.1 * g for a, g in zip(m, row, strict=True)]
        v = [0.999 * a + 0.001 * g * g for a, g in zip(v, row, strict=True)]
        factor = 0.1 * 0.5 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        W = tuple((w - factor * a / (b**0.5 + 1e-3)) * 0.98 for w, a, b in zip(W, m, v, strict=True))
        below *= 0.98
    close(p, [list(W), [below] * 3])


def test_a_gradient_that_lies_transposed_in_memory_is_stepped_by_as_any() -> None:
    inner, transposed = GaLore(rank=9).optimizer([parameter(5, 3)], 0.1, 0.0).inner, draw(3, 5, seed=1).mT
    p = parameter(5, 3)
    (N, _), (expected, _) = (
        inner.direction(G, inner.start(p, (5, 3), DOUBLE), 1) for G in (transposed, transposed.contiguous())
    )
    close(N, expected)
    close(N, 0.1 * transposed / (0.001**0.5 * transposed.abs() + 1e-6))


def test_each_step_has_rank_r_and_k_subspaces_have_k_r() -> None:
    p = parameter(8, 6)
    start = p.detach().clone()
    optimizer = made(GaLore(rank=1, every=4, spread=False), p)
    for step in range(12):
        assert torch.linalg.matrix_rank(moved(optimizer, p, draw(8, 6, seed=step)), atol=1e-9) == 1
    assert torch.linalg.matrix_rank(p.detach() - start, atol=1e-9) == 3


def test_full_rank_is_the_full_gradient_with_sgd_and_not_with_adam() -> None:
    p, q = parameter(5, 3), parameter(5, 3)
    optimizer = Subspace([p], 0.1, projector=Svd(9), inner=SGD())
    G = draw(5, 3, seed=1)
    close(moved(optimizer, p, G), -0.1 * G)
    rotated = moved(made(GaLore(rank=9, scale=1.0), q, lr=0.1), q, G)
    assert (rotated + 0.1 * G.sign()).abs().max() > 1e-2


def test_state_is_the_cards_formula() -> None:
    p = nn.Parameter(torch.zeros(512, 512, device="meta"))
    assert made(GaLore(rank=128), p).state_bytes() == 4 * (196_608)
    tall, bias = nn.Parameter(torch.zeros(40, 16)), nn.Parameter(torch.zeros(7))
    assert made(GaLore(rank=4), tall, bias).state_bytes() == 4 * (2 * 4 * 40 + 4 * 16 + 2 * 7)
    assert made(GaLore(rank=4), tall, project=False).state_bytes() == 4 * 2 * 640


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projector", ["svd", "randomised-svd", "dct"])
def test_resumes_bit_for_bit(projector: Any, dtype: torch.dtype, tmp_path: Any) -> None:
    resumed_bit_for_bit(GaLore(rank=2, every=2, projector=projector), tmp_path, dtype)


@pytest.mark.parametrize(
    ("side", "shape"),
    [("std", (6, 2)), ("reverse_std", (2, 4)), ("left", (2, 4)), ("right", (6, 2)), ("full", (2, 2))],
)
def test_sides(side: Any, shape: tuple[int, int]) -> None:
    p = parameter(6, 4)
    optimizer = made(GaLore(rank=2, side=side), p)
    G = draw(6, 4, seed=3)
    step = moved(optimizer, p, G)
    assert optimizer.state[p]["m"].shape == shape
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    if side in ("right", "std", "full"):
        close(step @ Vh[:2].T @ Vh[:2], step)
    if side in ("left", "reverse_std", "full"):
        close(U[:, :2] @ U[:, :2].T @ step, step)


def test_vectors_and_groups_that_are_not_projected_get_adam() -> None:
    component = GaLore(rank=1, eps=1e-12)
    bias, embedding = parameter(4), parameter(4, 3)
    for p, group in ((bias, {}), (embedding, {"project": False})):
        G = draw(*p.shape, seed=5)
        close(moved(made(component, p, lr=0.1, **group), p, G), -0.1 * G.sign(), atol=1e-8)


def test_renewals_are_spread_over_the_interval() -> None:
    params = [parameter(4, 3, seed=i) for i in range(4)]
    optimizer = made(GaLore(rank=1, every=8), *params)
    renewed = [[] for _ in params]
    bases = [None] * 4
    for step in range(24):
        for i, p in enumerate(params):
            p.grad = draw(4, 3, seed=10 * step + i)
        optimizer.step()
        for i, p in enumerate(params):
            basis = optimizer.state[p]["right"].clone()
            if bases[i] is None or not torch.equal(bases[i], basis):
                renewed[i].append(step)
            bases[i] = basis
    assert renewed == [[0, 8, 16], [0, 10, 18], [0, 12, 20], [0, 14, 22]]


def test_a_zero_gradient_moves_nothing_and_stays_finite() -> None:
    p = parameter(4, 3)
    for projector in ("svd", "randomised-svd", "dct"):
        optimizer = made(GaLore(rank=2, projector=projector), p)
        assert not moved(optimizer, p, torch.zeros(4, 3, dtype=DOUBLE)).any()
        assert moved(optimizer, p, draw(4, 3)).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_never_reaches_the_state(bad: float) -> None:
    p, q = parameter(4, 3), parameter(3)
    G = draw(4, 3)
    for option in ("raise", "skip"):
        optimizer = made(GaLore(rank=2, not_finite=option), p, q)
        q.grad = torch.ones(3, dtype=DOUBLE)
        moved(optimizer, p, G)
        before = {n: torch.as_tensor(v).clone() for n, v in optimizer.state[p].items()}
        q.grad[1] = bad
        if option == "raise":
            with pytest.raises(rankfold.RankfoldError, match=r"parameter 0\.1 .*NaN or infinity"):
                moved(optimizer, p, G)
        else:
            assert not moved(optimizer, p, G).any()
            assert optimizer.skipped == 1
        for name, value in before.items():
            assert torch.equal(value, torch.as_tensor(optimizer.state[p][name]))


def test_a_closure_a_schedule_and_a_group_with_its_own_rate() -> None:
    p, q = parameter(4, 3), parameter(4, 3)
    optimizer = GaLore(rank=2).optimizer([{"params": [p]}, {"params": [q], "lr": 0.0}], 0.1, 0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = q.detach().clone()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = p.square().sum() + q.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.step(closure) < first
    assert torch.equal(q, before)


def test_steps_within_the_backward_pass_are_the_same_steps() -> None:
    nets = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    plain, within = (made(GaLore(rank=2, every=2), *net.parameters(), lr=0.1, decay=0.1) for net in nets)
    within.step_in_backward()
    for step in range(5):
        x = draw(8, 6, seed=step)
        for net in nets:
            net(x).square().mean().backward()
        assert all(p.grad is None for p in nets[1].parameters())
        plain.step()
        plain.zero_grad()
        within.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)
    assert within.state[nets[1][0].weight]["step"] == 5


def test_within_the_backward_pass_nothing_that_is_not_finite_is_taken() -> None:
    for option in ("raise", "skip"):
        p = parameter(4, 3)
        optimizer = made(GaLore(rank=2, not_finite=option), p)
        optimizer.step_in_backward()
        before = p.detach().clone()
        if option == "raise":
            with pytest.raises(rankfold.RankfoldError, match="NaN or infinity"):
                (p * float("nan")).sum().backward()
        else:
            (p * float("nan")).sum().backward()
            assert optimizer.skipped == 1
        assert torch.equal(p, before)
        assert p not in optimizer.state


def test_wrong_values() -> None:
    with pytest.raises(rankfold.RankfoldError, match="rank"):
        rankfold.build("galore", rank=0)
    with pytest.raises(rankfold.RankfoldError, match="lr"):
        made(GaLore(), parameter(3, 3), lr=-1.0)
