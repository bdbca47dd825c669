"""LoRA-LEGO: rank-1 units, grouped whatever their order, form and signs."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold import LoRA, LoRALego
from rankfold.compose._units import balanced, cut, factors, mixed, rows, widened
from rankfold.compose.lora_lego import sort
from tests.methods.support import change, close, draw

Pair = tuple[Tensor, Tensor]
OFF = {"parameter_reweighting": False, "output_reweighting": False}


def lego(pairs: Sequence[Pair], rank: int | None = None, weights: Any = None, **options: Any) -> Pair:
    rule = LoRALego(**options)
    rng = torch.Generator().manual_seed(0)
    B, A, error = rule.combine(pairs, rule.weights(len(pairs)) if weights is None else weights, rank, rng)
    assert error == 0
    return B, A


def loras(*ranks: int, out: int = 6, in_: int = 7) -> list[Pair]:
    return [(draw(out, r, seed=2 * i), draw(r, in_, seed=2 * i + 1)) for i, r in enumerate(ranks)]


def single(*units: Sequence[float]) -> list[Pair]:
    """LoRAs of rank 1 from their units [a ; b]."""
    return [factors(torch.tensor([unit], dtype=torch.float64), len(unit) // 2) for unit in units]


def total(pairs: Sequence[Pair]) -> Tensor:
    return torch.stack([B @ A for B, A in pairs]).sum(0)


def test_worked_numbers() -> None:
    """Units {[1,0|1,0], [0,1|0,1], [1,0|1,0]}, k = 2: ΔW = diag(1, 1) √(r/k), r = 1."""
    B, A = lego(single([1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]), 2)
    close(B @ A, 0.5**0.5 * torch.eye(2).double())
    B, A = lego(single([1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]), 2, output_reweighting=False)
    close(B @ A, torch.eye(2))


def test_two_orthogonal_units_in_one_cluster() -> None:
    """Of norm 1: the mean has norm 0.7071, and is made √2 times as long."""
    pairs = single([0.5**0.5, 0, 0.5**0.5, 0], [0, 0.5**0.5, 0, 0.5**0.5])
    assert float(rows(*lego(pairs, 1, **OFF)).norm()) == pytest.approx(0.5**0.5)
    again = rows(*lego(pairs, 1, output_reweighting=False))
    assert float(again.norm()) == pytest.approx(1)
    close(again.abs(), [[0.5, 0.5, 0.5, 0.5]])


def test_all_units_kept_are_the_sum() -> None:
    """Side by side, LoRAs are their sum, whatever their ranks."""
    pairs = loras(3, 1, 2)
    B, A = lego(pairs, 6, **OFF)
    assert A.shape == (6, 7)
    close(B @ A, total(pairs))
    B, A = lego(pairs, 6, weights=[0.5, -2, 0], **OFF)
    close(B @ A, total([(0.5 * pairs[0][0], pairs[0][1]), (-2 * pairs[1][0], pairs[1][1])]))
    assert A.shape == (4, 7)  # what has weight 0 is no unit
    B, A = lego(pairs, 6, parameter_reweighting=True)
    close(B @ A, 0.5**0.5 * total(pairs))  # √(r/k) acts on a mere concatenation too


@pytest.mark.parametrize("balance", [True, False])
def test_order_changes_nothing(balance: bool) -> None:
    pairs = loras(4, 4, 3)
    B, A = lego(pairs, balance=balance)
    assert A.shape == (4, 7)
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(A.shape[0], generator=rng) for _, A in pairs]
        shuffled = [(B[:, p], A[p]) for (B, A), p in zip(pairs, orders, strict=True)]
        D, C = lego([shuffled[i] for i in torch.randperm(3, generator=rng)], balance=balance)
        close(D @ C, B @ A, atol=1e-10)


def test_form_and_sign_of_a_unit_change_nothing() -> None:
    """(b, a) and (c b, a / c) are one matrix; without `balance`, as in the paper, the result hangs on c."""
    pairs = loras(3, 3)
    moved = [(B * c, A / c[:, None]) for (B, A), c in zip(pairs, draw(2, 3, seed=9), strict=True)]
    close(total(moved), total(pairs))
    close(torch.matmul(*lego(moved)), torch.matmul(*lego(pairs)), atol=1e-10)
    raw = [torch.matmul(*lego(some, balance=False)) for some in (pairs, moved)]
    assert float((raw[0] - raw[1]).norm() / raw[0].norm()) > 0.1


def test_copies_of_one_lora_are_that_lora() -> None:
    one = loras(4)[0]
    turned = (one[0][:, [2, 0, 3, 1]] * -1.0, one[1][[2, 0, 3, 1]] * -1.0)
    B, A = lego([one, turned, one])
    assert A.shape == (4, 7)
    close(B @ A, one[0] @ one[1])
    B, A = lego([one, turned, one], 9, output_reweighting=False)  # nine clusters of four different units
    assert 4 <= A.shape[-2] <= 9
    assert LoRALego().weights(3) == [1, 1, 1]


def test_clusters_are_found() -> None:
    """Two LoRAs of the same two directions, noisy, in another order and with other signs: each is recovered."""
    B, A = torch.linalg.qr(draw(6, 2, seed=1))[0], torch.linalg.qr(draw(7, 2, seed=2))[0].mT
    noisy = (B[:, [1, 0]] * torch.tensor([-1.0, 1]) + 0.01 * draw(6, 2), A[[1, 0]] * torch.tensor([[-1.0], [1]]))
    D, C = lego([(B, A), noisy])
    assert float((D @ C - B @ A).norm()) < 0.05


def test_units_of_zero_and_experts() -> None:
    B, A = loras(3)[0]
    B[:, 1] = 0
    D, C = lego([(B, A)])
    assert C.shape == (2, 7)
    close(D @ C, (3 / 2) ** 0.5 * B @ A)
    D, C = lego([(0 * B, A)])
    assert (D.shape, C.shape, float((D @ C).abs().max())) == ((6, 1), (1, 7), 0)
    pairs = loras(2, 2)
    experts = [(torch.stack([B, 2 * B]), torch.stack([A, A])) for B, A in pairs]
    D, C = lego(experts, 4, output_reweighting=False)
    close(D @ C, torch.stack([total(pairs), 2 * total(pairs)]))
    D, C = lego([(torch.stack([B, 0 * B]), torch.stack([A, A])) for B, A in pairs], 4, output_reweighting=False)
    assert C.shape == (2, 4, 7)
    close(D @ C, torch.stack([total(pairs), 0 * total(pairs)]))


def test_the_order_of_sorting_is_that_of_values() -> None:
    units = torch.tensor([[3.0, 1], [-1, -4], [-3, -1.1]])
    assert sort(units, turn=False).tolist() == [[-3, pytest.approx(-1.1)], [-1, -4], [3, 1]]
    assert sort(units, turn=True).tolist() == [[1, 4], [3, 1], [3, pytest.approx(1.1)]]
    almost = torch.tensor([[1.0, -0.99], [-0.99, 1]])  # alike, though the largest entry of each is positive
    close(sort(almost, turn=True), torch.tensor([[-0.99, 1], [-1, 0.99]]).double(), atol=1e-6)


def test_units() -> None:
    B, A = loras(3)[0]
    D, C = balanced(B, A)
    close(D @ C, B @ A)
    close(D.norm(dim=0), C.norm(dim=1))
    back = factors(rows(B, A), 7)
    assert torch.equal(back[0], B)
    assert torch.equal(back[1], A)
    wide = widened([(B, A), (B[:, :1], A[:1])])
    assert [part.shape for part in wide[1]] == [(6, 3), (3, 7)]
    close(wide[1][0] @ wide[1][1], B[:, :1] @ A[:1])
    close(mixed([(B, A)], [0.5])[0] @ mixed([(B, A)], [0.5])[1], B @ A / 4)
    assert cut(B, A, 3) == (B, A, 0)
    U, S, Vh = torch.linalg.svd(B @ A)
    D, C, error = cut(B, A, 2)
    close(D @ C, U[:, :2] * S[:2] @ Vh[:2])
    assert error == pytest.approx(float(S[2] / S[:3].norm()))


def test_adapters_in_any_order_and_of_any_rank() -> None:
    """Through `combine`: the rank is the largest of theirs, and the order of the adapters changes nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5)).double()
    adapters = []
    for i, rank in enumerate((2, 4, 3)):
        adapter = rankfold.attach(model, LoRA(rank=rank, alpha=3), ["0", "1"], name=f"task{i}", seed=i)
        for delta in adapter.deltas.values():
            delta.set_start(draw(*delta.B.shape, seed=i), draw(*delta.A.shape, seed=50 + i))
        adapters.append(adapter)
    one, report = rankfold.combine(adapters, "lego", to="one")
    other, _ = rankfold.combine(adapters[::-1], LoRALego(), to="other")
    assert {layer.rank for layer in report.values()} == {4}
    for site, delta in one.deltas.items():
        close(change(other.deltas[site]), change(delta), atol=1e-10)
    whole, _ = rankfold.combine(adapters, LoRALego(**OFF), to="whole", rank=9)
    for site, delta in whole.deltas.items():
        close(change(delta), torch.stack([change(adapter.deltas[site]) for adapter in adapters]).sum(0), atol=1e-10)
