"""The fused low-rank product y = x Wᵀ + b + s (x Aᵀ) Bᵀ, with its backward written by hand.

Letters: x (..., in) the input, W (out, in) the base weight, A (r, in), B (out, r), s the scale, h = s x Aᵀ (..., r).
What the hand-written form saves over the composed one: the change is accumulated into the base's output, its gradient
into the base's input gradient (no second full-size tensor either way), s rides on the thin h, x is kept once and not
at all where nothing needs it. Without grad mode there is no autograd node. `torch.compile` and `torch.func` get the
composed expression: they differentiate and fuse it themselves.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def lowrank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x Wᵀ + b + s (x Aᵀ) Bᵀ: x (..., in), weight (out, in), bias (out,), A (r, in), B (out, r) -> (..., out).

    Under autocast everything is done in autocast's dtype, as in `nn.Linear`; otherwise A and B follow x's dtype.
    """
    if composed():
        return F.linear(x, weight, bias) + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * scale
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:  # which autocast leaves alone
        x = x.to(torch.get_autocast_dtype(kind))
    A, B = A.to(x.dtype), B.to(x.dtype)
    if any_requires_grad(x, weight, bias, A, B):
        return _LowRankLinear.apply(x, weight, bias, A, B, scale)
    return _forward(x, weight, bias, A, B, scale)[0]


def add_lowrank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + s (x Aᵀ) Bᵀ in y's dtype: y (..., out), x (..., in), A (r, in), B (out, r) -> (..., out).

    y must be fresh, held by the caller alone: it is overwritten wherever autograd allows it.
    """
    if composed():
        x, A, B = x.to(y.dtype), A.to(y.dtype), B.to(y.dtype)
        return y + (F.linear(F.linear(x, A), B) * scale).to(y.dtype)
    return _add((_tokens(x.shape),), y, x, A, B, scale)


def add_lowrank_rows(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """yᵢ + (xᵢ Aᵢᵀ) Bᵢᵀ for each row i, in y's dtype: y (R, ..., out), x (R, ..., in), A (R, r, in), B (R, out, r).

    The scale is already in B. y must be fresh, as in `add_lowrank`.
    """
    lead = x.shape[0], _tokens(x.shape[1:])
    if composed():
        x, A, B = _see(x, lead).to(y.dtype), A.to(y.dtype), B.to(y.dtype)
        return y + torch.bmm(torch.bmm(x, A.mT), B.mT).to(y.dtype).reshape(y.shape)
    return _add(lead, y, x, A, B, 1.0)


def _add(lead: tuple[int, ...], y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`lead` are the dimensions, before the last, that y and x are seen with: (tokens,) or (rows, tokens)."""
    with autocast_off(y):
        x, A, B = x.to(y.dtype), A.to(y.dtype), B.to(y.dtype)
        if any_requires_grad(y, x, A, B):
            out = _AddLowRank.apply(lead, _writable(y), x, A, B, scale)
            return out if out.shape == y.shape else out.view(y.shape)
        y = y.contiguous()
        _accumulate(_see(y, lead), _h(_see(x, lead), A, scale), B.mT)
        return y


def _writable(y: Tensor) -> Tensor:
    """y's values where autograd lets us write to them: y itself, the whole that y is a view of, or a copy.

    F.linear with a bias answers with a view of its product; writing to a view would cost a copy of its gradient. What
    another custom function answers with may be a view too (bitsandbytes), of a whole that autograd knows nothing about.
    """
    whole = y if y._base is None else y._base
    same = y.is_contiguous() and whole.is_contiguous() and whole.numel() == y.numel()
    if not same or whole.requires_grad != y.requires_grad or (whole.is_leaf and whole.requires_grad):
        return y.clone(memory_format=torch.contiguous_format)
    return whole


def _forward(x, weight, bias, A, B, scale):
    lead, x = x.shape[:-1], matrix(x)
    h = _h(x, A, scale)
    y = _accumulate(F.linear(x, weight, bias), h, B.mT)
    # A plain view made in here could not be overwritten later (a ReLU in place, a residual added in place).
    return torch.ops.aten._unsafe_view(y, (*lead, y.shape[-1])), h


class _LowRankLinear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        y, h = _forward(x, weight, bias, A, B, scale)
        need_x, need_weight, _, need_A, need_B, _ = ctx.needs_input_grad
        ctx.scale = scale
        ctx.save_for_backward(
            x if need_weight or need_A else None, weight if need_x else None, A, B, h if need_B else None
        )
        return y

    @staticmethod
    def backward(ctx, gy):
        x, weight, A, B, h = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B, _ = ctx.needs_input_grad
        with autocast_off(gy):
            lead, gy = gy.shape[:-1], matrix(gy)
            x = None if x is None else matrix(x)
            gh, gA, gB = _thin_gradients(gy, x, A, B, h, ctx.scale, need_x, need_A, need_B)
            gx = gweight = None
            if need_x:
                gx = _accumulate(gy @ weight.to(gy.dtype), gh, A).view(*lead, A.shape[-1])  # type: ignore[arg-type]
            if need_weight:
                gweight = gy.mT @ x  # type: ignore[operator]
            return gx, gweight, gy.sum(0) if need_bias else None, gA, gB, None


class _AddLowRank(Function):
    @staticmethod
    def forward(ctx, lead, y, x, A, B, scale):
        h = _h(_see(x, lead), A, scale)
        _accumulate(_see(y, lead), h, B.mT)
        *_, need_A, need_B, _ = ctx.needs_input_grad
        ctx.lead, ctx.scale, ctx.shape = lead, scale, x.shape
        ctx.mark_dirty(y)
        ctx.save_for_backward(x if need_A else None, A, B, h if need_B else None)
        return y

    @staticmethod
    def backward(ctx, gy):
        x, A, B, h = ctx.saved_tensors
        _, need_y, need_x, need_A, need_B, _ = ctx.needs_input_grad
        with autocast_off(gy):
            x = None if x is None else _see(x, ctx.lead)
            gh, gA, gB = _thin_gradients(_see(gy, ctx.lead), x, A, B, h, ctx.scale, need_x, need_A, need_B)
            gx = (gh @ A).view(ctx.shape) if need_x else None
            return None, gy if need_y else None, gx, gA, gB, None


def _thin_gradients(gy, x, A, B, h, scale, need_x, need_A, need_B):
    """(gh, gA, gB), None where not needed; matrices or, for rows, batches of them."""
    if torch.is_grad_enabled() and need_B:
        # Differentiated again: h was made inside forward, where nothing was recorded.
        if x is None:
            raise RuntimeError("a second derivative through a low-rank layer needs A to require grad")
        h = _h(x, A, scale)
    gh = gA = None
    if need_x or need_A:
        gh = _h(gy, B.mT, scale)  # the same product, backwards
    if need_A:
        gA = _thin(x.mT, gh).mT  # type: ignore[arg-type]
    return gh, gA, _thin(gy.mT, h) if need_B else None


def _h(x: Tensor, A: Tensor, scale: float) -> Tensor:
    h = _thin(x, A.mT)
    return h if scale == 1 else h.mul_(scale)


def _thin(a: Tensor, b: Tensor) -> Tensor:
    """a b, for a b of r columns.

    BLAS is slow at skinny products. Written as r rows they run 1.3 to 4 times faster on a processor than as r columns
    where r < 16; from 16 on, up to 1.7 times slower (`benchmarks/README.md`).
    """
    return a @ b if b.shape[-1] >= 16 else (b.mT @ a.mT).mT


def _accumulate(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y += a b, for matrices or batches of them."""
    return y.addmm_(a, b) if y.dim() == 2 else y.baddbmm_(a, b)


def _see(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(..., n) -> (*lead, n); a view where x is contiguous."""
    return x.reshape(*lead, x.shape[-1])


def matrix(x: Tensor) -> Tensor:
    """(..., n) -> (tokens, n). Written out, since -1 is ambiguous in an empty batch."""
    return x.reshape(_tokens(x.shape), x.shape[-1])


def _tokens(shape: torch.Size) -> int:
    return math.prod(shape[:-1])


def composed() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def any_requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_off(x: Tensor):
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
