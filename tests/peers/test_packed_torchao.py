"""Round to nearest beside torchao's primitives, and GPTQ beside the elimination that it stands for.

torchao's own GPTQ (a prototype in 0.18) runs on CUDA only. So GPTQ is compared with the formulas of Optimal Brain
Quantization in NumPy, which invert H and eliminate one row and column after the other, where ours takes a Cholesky
factor.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rankfold.core.packed import Packed, Scheme, dequantise, unpack
from rankfold.quantizers.gptq import GPTQ
from rankfold.quantizers.rtn import RTN


def weight(seed: int = 0) -> Tensor:
    W = torch.randn(24, 192, generator=torch.Generator().manual_seed(seed)) * 0.05
    W[3] = W[3].abs() + 0.1  # zero is out of its range
    return W


def codes(packed: Packed, shape: tuple[int, int], kind: Scheme) -> Tensor:
    rows, n, _, _ = kind.layout(*shape)
    q = unpack(packed.codes, n, kind).reshape(rows, n)
    return q if kind.along == "in" else q.mT


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [64, "channel", "tensor"])
@pytest.mark.parametrize("along", ["in", "out"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_round_to_nearest_is_torchaos(bits: Any, group: Any, along: Any, symmetric: bool) -> None:
    peer = pytest.importorskip("torchao.quantization.quant_primitives")
    W = weight() if along == "in" else weight().mT.contiguous()
    kind = Scheme(format=f"int{bits}", group=group, along=along, symmetric=symmetric, scales="float32")  # type: ignore[arg-type]
    ours = RTN().quantise(W, kind, None, "")

    run = {"channel": 192, "tensor": 192}.get(group, group)
    block = tuple(W.shape) if group == "tensor" else (1, run) if along == "in" else (run, 1)
    # with symmetric codes ours has a middle, and as many codes below as above
    most = 2 ** (bits - 1) - 1
    low, high = (-most, most) if symmetric else (0, 2**bits - 1)
    mapping = peer.MappingType.SYMMETRIC if symmetric else peer.MappingType.ASYMMETRIC
    dtype = torch.int8 if symmetric else torch.uint8
    s, z = peer.choose_qparams_affine(W, mapping, block, dtype, low, high, torch.finfo(torch.float32).tiny)
    q = peer.quantize_affine(W, block, s, z, dtype, low, high)
    values = peer.dequantize_affine(q, block, s, z, dtype, low, high)

    found = codes(ours, tuple(W.shape), kind).int()  # type: ignore[arg-type]
    rows = lambda t: (t.mT if along == "out" and t.dim() == 2 else t).flatten()  # noqa: E731
    assert torch.equal(ours.scales.flatten(), rows(s))
    if ours.zeros is not None:
        assert torch.equal(ours.zeros.flatten().int(), rows(z).int())
    # torchao multiplies by 1 / s: halfway between two codes the last bit of that may take the other one
    other = found - (kind.offset if symmetric else 0) != q.int()
    assert int(other.sum()) <= 1
    got = dequantise(ours, tuple(W.shape), kind, torch.float32)
    assert torch.equal(got[~other], values[~other])
    torch.testing.assert_close((got - W).abs()[other], (values - W).abs()[other])


def eliminated(W: np.ndarray, H: np.ndarray, bits: int, group: int, damping: float) -> np.ndarray:
    """Ŵ by OBQ in the columns' order: the best change of the rest is `−(w_j − q_j) / [H⁻¹]_jj · [H⁻¹]_j`, and then H
    loses its row and column j. Scales of a group are those of the weights as they are when it begins."""
    W, n, top = W.copy(), W.shape[1], 2**bits - 1
    inverse = np.linalg.inv(H + damping * np.diag(H).mean() * np.eye(n))
    for j in range(n):
        if j % group == 0:
            low = np.minimum(W[:, j : j + group].min(1), 0)
            s = (np.maximum(W[:, j : j + group].max(1), 0) - low) / top
            z = np.clip(np.round(-low / s), 0, top)
        quantised = (np.clip(np.round(W[:, j] / s) + z, 0, top) - z) * s
        moved = (W[:, j] - quantised) / inverse[j, j]
        W[:, j + 1 :] -= moved[:, None] * inverse[j, j + 1 :]
        W[:, j] = quantised
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return W


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", [16, 128])
def test_gptq_is_the_elimination(bits: Any, block: int) -> None:
    rng = np.random.default_rng(0)
    W, X = rng.standard_normal((12, 48)), rng.standard_normal((200, 48)) @ rng.standard_normal((48, 48))
    kind = Scheme(format=f"int{bits}", group=16, scales="float32")  # type: ignore[arg-type]
    H = X.T @ X
    found = GPTQ(block=block).rounded(torch.tensor(W), torch.tensor(H), kind)
    expected = eliminated(W, H, bits, 16, 0.01)
    np.testing.assert_allclose(dequantise(found, W.shape, kind, torch.float64).numpy(), expected, rtol=1e-5, atol=1e-5)
    plain = dequantise(RTN().quantise(torch.tensor(W), kind, None, ""), W.shape, kind, torch.float64).numpy()
    assert np.linalg.norm((W - expected) @ X.T) < np.linalg.norm((W - plain) @ X.T)
