"""The Triton kernel beside the formula: on CUDA, and, where Triton is installed, in its interpreter on any machine."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rankfold.core.packed import PackedLinear, Scheme, dequantise
from rankfold.quantizers.rtn import RTN

KINDS = (
    Scheme(format="int4", group=16),
    Scheme(format="int4", group=7),
    Scheme(format="int4", group="tensor", symmetric=True),
    Scheme(format="nf4", group="channel"),
    Scheme(format="fp4", group=32),
)


def check(device: str) -> None:
    """Every kind, with rows and inputs that fill no block; a few tokens."""
    from rankfold.core import packed_cuda

    for kind in KINDS:
        for out, in_ in ((5, 9), (20, 140)):
            packed = RTN().quantise(torch.randn(out, in_, device=device), kind, None, "")
            x = torch.randn(3, in_, device=device)
            expected = x @ dequantise(packed, (out, in_), kind, torch.float32).mT
            y = packed_cuda.product(packed, in_, kind, x)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_in_tritons_interpreter() -> None:
    code = "from tests.quantizing.test_packed_cuda import check; check('cpu')"
    root, env = Path(__file__).parents[2], {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=env, timeout=120)


@pytest.mark.gpu
def test_the_kernel_on_cuda() -> None:
    pytest.importorskip("triton")
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 100])
def test_the_layer_on_cuda(dtype: torch.dtype, tokens: int) -> None:
    pytest.importorskip("triton")
    for kind in KINDS:
        plain = nn.Linear(64, 48)
        layer = PackedLinear.of(plain, RTN().quantise(plain.weight.detach(), kind, None, ""), kind).cuda()
        x = torch.randn(tokens, 64, device="cuda", dtype=dtype, requires_grad=True)
        y = layer(x)
        expected = nn.functional.linear(x.float(), layer.dequantise(torch.float32), layer.bias)
        near = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(y.float(), expected, rtol=near, atol=near)
        (dx,) = torch.autograd.grad(y.float().sum(), x)
        torch.testing.assert_close(dx.float(), torch.autograd.grad(expected.sum(), x)[0].float(), rtol=near, atol=near)
