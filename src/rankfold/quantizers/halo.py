"""HALO: Hadamard-Assisted Lossless Optimization for Efficient Low-Precision LLM Training and Fine-Tuning.

Ashkboos et al. 2025, arXiv 2501.02625.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd import Function

from rankfold.core.activations import FLOATS, float8
from rankfold.core.component import Component
from rankfold.core.hadamard import rotate
from rankfold.core.layers import change_plain
from rankfold.core.lowrank import autocast_off, matrix
from rankfold.core.targets import all_linear, submodule
from rankfold.errors import RankfoldError

_MOST = {"int8": 127.0, "int4": 7.0}


class HALO(Component):
    """Training whose products have rounded factors: q rounds a tensor with one scale, H is a Hadamard rotation.

        level   Y = X Wᵀ            dX = dY W                       dW = dYᵀ X
        0       q(X) q(W)ᵀ          q(dY) q(W)                      q(dY)ᵀ q(X)
        1       q(X H) q(W H)ᵀ      q(dY) q(W H) Hᵀ                 q(dY)ᵀ q(X H) Hᵀ
        2       q(X H) q(W H)ᵀ      Gᵀ q(G dY) q(W H) Hᵀ            q(dY)ᵀ q(X H) Hᵀ

    with another rotation G over the tokens, as the released code has it; the paper leaves variants. Kept for the
    backward pass are codes, a byte each. The paper's choices are level 0 with fp8 and level 2 with int8.

    Weights stay as they are and products are computed in floats on the rounded numbers: what it does to a training is
    seen, no time is saved. Frozen weights get no dW. In evaluation layers are as ever. Biases, which the released code
    does not have, are added in full.
    """

    slug: ClassVar[str] = "halo"
    title: ClassVar[str] = (
        "HALO: Hadamard-Assisted Lossless Optimization for Efficient Low-Precision LLM Training and Fine-Tuning"
    )
    source: ClassVar[str] = "arXiv 2501.02625"

    level: Annotated[Literal[0, 1, 2], Field(description="which of the products are rotated")] = 2
    format: Literal["int8", "int4", "fp8", "fp8-e5m2"] = "int8"

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """While it lasts every float linear layer of the model but the output head trains so, adapted or not."""
        paths: list[Any] = [submodule(model, path) for path in sorted(all_linear(model))]
        layers = [layer for layer in paths if getattr(layer, "_plain", type(layer)) is nn.Linear]
        if not layers:
            raise RankfoldError("halo rounds the products of float linear layers, and the model has none")
        for layer in layers:
            layer.halo = self
            change_plain(layer, HaloLinear)
        try:
            yield
        finally:
            for layer in layers:
                change_plain(layer, nn.Linear)
                del layer.halo


class HaloLinear(nn.Linear):
    halo: HALO

    def forward(self, x: Tensor) -> Tensor:
        return self.product_with(x, self.weight, self.bias)

    def product_with(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The layer's product with any weight: an adapted layer has its W' in it."""
        if not self.training:
            return F.linear(x, W, b)
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        with autocast_off(x):
            y: Any = _Product.apply(x, W.to(x.dtype), self.halo.level, self.halo.format)
            return y if b is None else y + b.to(y.dtype)


def codes(X: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """X as numbers of 8 bits and their scale, max|X| over the largest number."""
    most = torch.finfo(FLOATS[format]).max if format in FLOATS else _MOST[format]
    s = (X.abs().amax() / most).clamp(min=torch.finfo(X.dtype).tiny)
    return float8(X / s, format) if format in FLOATS else (X / s).round().to(torch.int8), s


def values(q: Tensor, s: Tensor) -> Tensor:
    return q.to(s.dtype) * s


class _Product(Function):
    """X Wᵀ with the backward pass of its level; X (..., in) and W (out, in)."""

    @staticmethod
    def forward(ctx, x, W, level, format):
        turn = rotate if level else lambda M: M
        X, W = codes(turn(matrix(x)), format), codes(turn(W), format)
        ctx.save_for_backward(*(X if ctx.needs_input_grad[1] else (None, None)), *W)
        ctx.level, ctx.format, ctx.shape = level, format, x.shape
        return (values(*X) @ values(*W).mT).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, *grads):
        *X, W, s = ctx.saved_tensors
        level, back, dx, dW = ctx.level, (lambda M: rotate(M, back=True)) if ctx.level else lambda M: M, None, None
        with autocast_off(grads[0]):
            dY = matrix(grads[0])
            rounded = values(*codes(dY, ctx.format))
            if ctx.needs_input_grad[0]:
                if level == 2:
                    turned = values(*codes(rotate(dY.mT).mT, ctx.format)) @ values(W, s)
                    dx = back(rotate(turned.mT, back=True).mT)
                else:
                    dx = back(rounded @ values(W, s))
                dx = dx.reshape(ctx.shape)
            if ctx.needs_input_grad[1]:
                dW = back(rounded.mT @ values(*X))
        return dx, dW, None, None
