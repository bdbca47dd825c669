"""Rotations by orthonormal Hadamard matrices, H Hᵀ = I, which spread what is large in one place over all of them."""

import functools

import torch
from torch import Tensor


def rotate(X: Tensor, back: bool = False) -> Tensor:
    """X H along the last dimension (n); `back` is X Hᵀ, which undoes it.

    H is a Kronecker product: Sylvester's matrices for a power of two; for other n one of Paley's (of order 12, 20, 28,
    36, ...) with Sylvester's; where neither is one, equal blocks along the diagonal, as large a power of two as fits.
    """
    Y = X.reshape(*X.shape[:-1], *(size for size, _ in _factors(X.shape[-1])))
    lead = X.dim() - 1
    for i, (size, plain) in enumerate(_factors(X.shape[-1])):
        if not plain:
            H = matrix(size).to(X)
            Y = (Y.movedim(lead + i, -1) @ (H.mT if back else H)).movedim(-1, lead + i)
    return Y.reshape(X.shape)


@functools.lru_cache(maxsize=256)
def matrix(n: int) -> Tensor:
    """An orthonormal Hadamard matrix (n, n) in float64: Sylvester's for a power of two, else one of Paley's."""
    H = torch.ones(1, 1, dtype=torch.float64)
    if n & (n - 1):
        H = _paley(n)
        if H is None:
            raise ValueError(f"no construction of Paley's has the order {n}")
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / n**0.5


@functools.lru_cache(maxsize=1024)
def _factors(n: int) -> tuple[tuple[int, bool], ...]:
    """Orders whose Kronecker product is the rotation of n numbers, the largest first; True is for the identity."""
    twos = n & -n
    odd, sizes = n // twos, []
    if odd > 1:
        order = next((odd * 2**k for k in range(2, twos.bit_length()) if _paley(odd * 2**k) is not None), None)
        sizes.append((odd, True) if order is None else (order, False))
        twos = twos if order is None else n // order
    while twos > 1:  # small matrices one after the other, as a fast transform would have them
        sizes.append((min(twos, 32), False))
        twos //= sizes[-1][0]
    return tuple(sizes) or ((1, True),)


@functools.lru_cache(maxsize=1024)
def _paley(n: int) -> Tensor | None:
    """Paley's matrix of ±1 of the order n = q + 1 for a prime q = 3 mod 4, or 2 (q + 1) for a prime q = 1 mod 4."""
    for q, second in ((n - 1, False), (n // 2 - 1, True)):
        if q % 4 != (1 if second else 3) or not _prime(q):
            continue
        square = torch.full((q,), -1.0, dtype=torch.float64)
        square[torch.arange(q) ** 2 % q] = 1.0
        square[0] = 0.0
        Q = square[(torch.arange(q)[:, None] - torch.arange(q)) % q]
        S = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        S[0, 1:], S[1:, 0], S[1:, 1:] = 1.0, 1.0 if second else -1.0, Q
        one = torch.eye(q + 1, dtype=torch.float64)
        if not second:
            return S + one
        return torch.cat([torch.cat([S + one, S - one], 1), torch.cat([S - one, -S - one], 1)])
    return None


def _prime(q: int) -> bool:
    return q > 2 and all(q % d for d in range(2, int(q**0.5) + 1))
