"""Bases from a seed: the very numbers, so that no machine and no version of torch may change them."""

import pytest
import torch

from rankfold.core.seeded import basis_matrices, combine, correlate, ternary, uniform, unit_std

DOUBLE = torch.float64


def rng(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def splitmix64(seed: int, index: int) -> int:
    """Steele, Lea and Flood's generator in whole numbers of any size; the index-th word from 0."""
    full = (1 << 64) - 1
    x = (seed + (index + 1) * 0x9E3779B97F4A7C15) & full
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & full
    x = (x ^ x >> 27) * 0x94D049BB133111EB & full
    return x ^ x >> 31


def test_pinned_values_of_draws():
    drawn = uniform(rng(), 4)
    assert [x.hex() for x in drawn.tolist()] == [
        "0x1.1e15e00000000p-4", "-0x1.346cf00000000p-1", "0x1.4610c80000000p-2", "0x1.414fb00000000p-2"
    ]  # fmt: skip
    assert torch.equal(uniform(rng(), 4, bound=0.3), drawn * 0.3)
    assert torch.equal(uniform(rng(), 2, 2).flatten(), drawn)
    assert ternary(rng(), 4, sparsity=1.5).tolist() == [0, -1, 0, 0]


def test_pinned_values_of_the_integer_sequence():
    """1234567 gives 6457827717110365317 first in every implementation of SplitMix64."""
    assert splitmix64(1234567, 0) == 6457827717110365317
    for seed, k, rows, columns in ((7, 5, 3, 7), (2**62 - 1, 2, 1, 3), (0, 3, 4, 4)):
        M = basis_matrices(seed, k, rows, columns)
        words = -(-rows * columns // 4)
        for i in range(k):
            bits = b"".join(splitmix64(seed, i * words + w).to_bytes(8, "little") for w in range(words))
            whole = [int.from_bytes(bits[2 * j : 2 * j + 2], "little", signed=True) for j in range(rows * columns)]
            assert M[i].flatten().tolist() == [(h + 0.5) / 2**15 for h in whole]


def test_entries_are_uniform_and_independent():
    M = basis_matrices(3, 64, 32, 50)
    assert -1 < M.min() < -0.999
    assert 0.999 < M.max() < 1
    counts = torch.histc(M, 10, -1, 1) / M.numel()
    assert (counts - 0.1).abs().max() < 0.005
    G = torch.corrcoef(M.flatten(1))
    assert (G - torch.eye(64)).abs().max() < 0.1
    other = basis_matrices(4, 64, 32, 50)
    assert abs(torch.corrcoef(torch.stack([M.flatten(), other.flatten()]))[0, 1]) < 0.02


def test_what_a_matrix_holds_does_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch):
    coefficients = torch.randn(2, 9, dtype=DOUBLE)
    expected = basis_matrices(5, 9, 3, 5), combine(coefficients, 5, 3, 5)
    for at_once in (1, 31, 60):
        monkeypatch.setattr("rankfold.core.seeded._AT_ONCE", at_once)
        assert torch.equal(basis_matrices(5, 9, 3, 5), expected[0])
        torch.testing.assert_close(combine(coefficients, 5, 3, 5), expected[1], atol=1e-14, rtol=0)
        G = torch.randn(3, 5, dtype=DOUBLE)
        torch.testing.assert_close(correlate(G, 5, 9), (expected[0].double() * G).sum((1, 2)), atol=1e-13, rtol=0)


def test_combine_and_its_derivatives():
    M = basis_matrices(2, 6, 3, 5).to(DOUBLE)
    c = torch.randn(4, 6, dtype=DOUBLE, requires_grad=True)
    torch.testing.assert_close(combine(c, 2, 3, 5), torch.einsum("ek,kij->eij", c, M))
    assert torch.autograd.gradcheck(lambda c: combine(c, 2, 3, 5), c)
    assert torch.autograd.gradgradcheck(lambda c: combine(c, 2, 3, 5).square(), c)

    def loss(c: torch.Tensor) -> torch.Tensor:
        return combine(c, 2, 3, 5).square().sum()

    (expected,) = torch.autograd.grad(loss(c), c)
    torch.testing.assert_close(torch.func.grad(loss)(c.detach()), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(c.detach()), expected)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(c), c)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_combine_in_few_bits_rounds_the_result_only(dtype: torch.dtype):
    c = torch.randn(200, dtype=DOUBLE).to(dtype)
    exact = combine(c.double(), 1, 4, 6)
    assert combine(c, 1, 4, 6).dtype == dtype
    assert (combine(c, 1, 4, 6) - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps


def test_unit_std():
    basis = unit_std(uniform(rng(), 30, 20, bound=0.01))
    assert basis.std().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(unit_std(torch.zeros(3, 3)), torch.zeros(3, 3))
    assert torch.equal(unit_std(torch.ones(1, 1)), torch.ones(1, 1))
    sparse = ternary(rng(), 300, 100, sparsity=3)
    assert [round((sparse == value).float().mean().item(), 2) for value in (-1, 0, 1)] == [0.17, 0.67, 0.17]
