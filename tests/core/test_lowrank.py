"""The fused low-rank products against their plain expressions, in every mode that PyTorch can call them in."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rankfold.core.lowrank import add_lowrank, add_lowrank_rows, lowrank_linear

IN, OUT, RANK, SCALE, ROWS = 6, 5, 3, 0.7, 4
SHAPES = [(IN,), (7, IN), (2, 7, IN), (2, 3, 4, IN), (0, IN), (2, 0, IN), (0, 3, IN)]
DOUBLE = torch.float64


def reference(x, weight, bias, A, B, scale=SCALE):
    return F.linear(x, weight, bias) + F.linear(F.linear(x, A), B) * scale


def reference_rows(y, x, A, B):
    return y + torch.einsum("i...k,irk,ior->i...o", x, A, B)


def make(*shape, dtype=DOUBLE, requires_grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype).requires_grad_(requires_grad)


def layer(dtype=DOUBLE, bias=True, rank=RANK):
    """weight, bias, A, B, all requiring grad."""
    return (
        make(OUT, IN, dtype=dtype, seed=1),
        make(OUT, dtype=dtype, seed=2) if bias else None,
        make(rank, IN, dtype=dtype, seed=3),
        make(OUT, rank, dtype=dtype, seed=4),
    )


def rows_inputs(dtype=DOUBLE, shape=(ROWS, 3, IN), rank=RANK):
    return (
        make(*shape[:-1], OUT, dtype=dtype, seed=5),
        make(*shape, dtype=dtype, seed=6),
        make(shape[0], rank, IN, dtype=dtype, seed=7),
        make(shape[0], OUT, rank, dtype=dtype, seed=8),
    )


def gradients(y, inputs):
    """d(y·v)/d(inputs) for a fixed v with entries that all differ."""
    v = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad(y, [t for t in inputs if t is not None and t.requires_grad], v)


def assert_all_close(got, wanted, **tolerances):
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, **tolerances)


class Storages(TorchDispatchMode):
    """What the operators that run inside allocate."""

    def __init__(self):
        super().__init__()
        self.outside, self.made = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in filter(torch.is_tensor, args):
            storage = t.untyped_storage()
            if storage.data_ptr() not in self.made:
                self.outside.add(storage.data_ptr())
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and (storage := out.untyped_storage()).data_ptr() not in self.outside:
            self.made[storage.data_ptr()] = storage  # kept alive, so that no address is given twice
        return out

    def count(self, numel, dtype=DOUBLE):
        """How many tensors of this size were allocated."""
        return sum(storage.nbytes() == numel * dtype.itemsize for storage in self.made.values())


def saved_tensors(function):
    """What autograd keeps for the backward of function()."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = function()
    return kept, y


# --- values and gradients ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_the_plain_expression(shape, bias):
    x, params = make(*shape), layer(bias=bias)
    got, wanted = lowrank_linear(x, *params, SCALE), reference(x, *params)
    torch.testing.assert_close(got, wanted)
    assert_all_close(gradients(got, (x, *params)), gradients(wanted, (x, *params)))
    with torch.no_grad():
        torch.testing.assert_close(lowrank_linear(x, *params, SCALE), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_equals_the_plain_expression(shape):
    x, base, (_, _, A, B) = make(*shape), make(*shape[:-1], OUT, seed=9), layer()
    got = add_lowrank(base * 1, x, A, B, SCALE)
    wanted = base + x @ A.mT @ B.mT * SCALE
    torch.testing.assert_close(got, wanted)
    assert_all_close(gradients(got, (base, x, A, B)), gradients(wanted, (base, x, A, B)))
    with torch.no_grad():
        torch.testing.assert_close(add_lowrank(base * 1, x, A, B, SCALE), wanted)


@pytest.mark.parametrize("shape", [(ROWS, IN), (ROWS, 3, IN), (ROWS, 2, 3, IN), (1, 3, IN), (0, 3, IN), (ROWS, 0, IN)])
def test_rows_equal_the_plain_expression(shape):
    y, x, A, B = rows_inputs(shape=shape)
    got, wanted = add_lowrank_rows(y * 1, x, A, B), reference_rows(y, x, A, B)
    torch.testing.assert_close(got, wanted)
    assert_all_close(gradients(got, (y, x, A, B)), gradients(wanted, (y, x, A, B)))
    with torch.no_grad():
        torch.testing.assert_close(add_lowrank_rows(y * 1, x, A, B), wanted)


@pytest.mark.parametrize("rank", [1, 8, 15, 16, 17, 40])
def test_every_rank(rank):
    """The order in which a thin product is written depends on the rank."""
    x, params = make(2, 7, IN), layer(rank=rank)
    got, wanted = lowrank_linear(x, *params, SCALE), reference(x, *params)
    torch.testing.assert_close(got, wanted)
    assert_all_close(gradients(got, (x, *params)), gradients(wanted, (x, *params)))
    y, x, A, B = rows_inputs(rank=rank)
    got, wanted = add_lowrank_rows(y * 1, x, A, B), reference_rows(y, x, A, B)
    torch.testing.assert_close(got, wanted)
    assert_all_close(gradients(got, (y, x, A, B)), gradients(wanted, (y, x, A, B)))


def test_gradients_are_laid_out_like_their_parameters():
    """As fused optimisers and DDP's buckets want them, though the thin products may come out transposed."""
    for rank in (8, 32):
        x, (weight, bias, A, B) = make(9, IN), layer(rank=rank)
        lowrank_linear(x, weight, bias, A, B, SCALE).sum().backward()
        assert A.grad.is_contiguous()
        assert B.grad.is_contiguous()


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5])
def test_every_scale(scale):
    x, params = make(2, 7, IN), layer()
    got, wanted = lowrank_linear(x, *params, scale), reference(x, *params, scale)
    torch.testing.assert_close(got, wanted)
    assert_all_close(gradients(got, (x, *params)), gradients(wanted, (x, *params)))


def test_no_part_of_the_product_is_ignored():
    """The comparisons above could be vacuous: each input moves the output."""
    x, params = make(2, 7, IN), layer()
    plain = lowrank_linear(x, *params, SCALE)
    for i, t in enumerate((x, *params)):
        moved = [x, *params]
        moved[i] = t + 0.1
        assert not torch.allclose(lowrank_linear(*moved, SCALE), plain)
    assert not torch.allclose(lowrank_linear(x, *params, SCALE + 0.1), plain)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)))
def test_linear_gradients_for_every_choice_of_what_is_trained(needs):
    """needs: x, weight, bias, A, B. What is frozen gets no gradient, the rest the right one."""
    inputs = [t.detach().requires_grad_(need) for t, need in zip((make(2, 7, IN), *layer()), needs, strict=True)]
    got, wanted = lowrank_linear(*inputs, SCALE), reference(*inputs)
    assert got.requires_grad == any(needs)
    if any(needs):
        assert_all_close(gradients(got, inputs), gradients(wanted, inputs))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("rows", [False, True])
def test_add_gradients_for_every_choice_of_what_is_trained(needs, rows):
    y, x, A, B = (t.detach().requires_grad_(need) for t, need in zip(rows_inputs(), needs, strict=True))
    if not rows:
        A, B = (t[0].detach().requires_grad_(t.requires_grad) for t in (A, B))
    fresh = y * 1
    got = add_lowrank_rows(fresh, x, A, B) if rows else add_lowrank(fresh, x, A, B, SCALE)
    wanted = reference_rows(y, x, A, B) if rows else y + x @ A.mT @ B.mT * SCALE
    assert got.requires_grad == any(needs)
    if any(needs):
        assert_all_close(gradients(got, (y, x, A, B)), gradients(wanted, (y, x, A, B)))


def test_gradcheck_and_gradgradcheck():
    x, params = make(2, 4, IN), layer()
    assert gradcheck(lambda *t: lowrank_linear(*t, SCALE), (x, *params))
    assert gradgradcheck(lambda *t: lowrank_linear(*t, SCALE), (x, *params))
    y, x, A, B = rows_inputs()
    assert gradcheck(lambda y, *t: add_lowrank_rows(y * 1, *t), (y, x, A, B))
    assert gradgradcheck(lambda y, *t: add_lowrank_rows(y * 1, *t), (y, x, A, B))
    inputs = (y, x, A[0].detach().requires_grad_(), B[0].detach().requires_grad_())
    assert gradcheck(lambda y, *t: add_lowrank(y * 1, *t, SCALE), inputs)
    assert gradgradcheck(lambda y, *t: add_lowrank(y * 1, *t, SCALE), inputs)


@pytest.mark.parametrize("frozen", [{"weight", "bias"}, {"x"}, {"B"}, {"weight", "bias", "x"}])
def test_second_derivatives_with_frozen_parts(frozen):
    names = ("x", "weight", "bias", "A", "B")
    inputs = [t.detach().requires_grad_(n not in frozen) for n, t in zip(names, (make(3, IN), *layer()), strict=True)]
    assert gradgradcheck(lambda *t: lowrank_linear(*t, SCALE), inputs)


def test_second_derivative_with_only_B_trained_is_an_error_or_right():
    """x is not kept when A is frozen (LoRA-FA's memory), so h cannot be made again: refused, never silently wrong."""
    x, (weight, bias, A, B) = make(3, IN), layer()
    y = lowrank_linear(x, weight.detach(), bias.detach(), A.detach(), B, SCALE)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), B, create_graph=True)


def test_expanded_and_missing_output_gradients():
    x, params = make(2, 7, IN), layer()
    assert_all_close(
        torch.autograd.grad(lowrank_linear(x, *params, SCALE).sum(), (x, *params)),  # a gradient with strides of 0
        torch.autograd.grad(reference(x, *params).sum(), (x, *params)),
    )


# --- memory: what is kept, what is allocated ---


def frozen_base(shape=(4, 16, IN)):
    weight, bias, A, B = layer()
    return make(*shape), weight.detach(), bias.detach(), A, B


def test_x_is_kept_once_and_h_is_thin():
    x, weight, bias, A, B = frozen_base()
    kept, _ = saved_tensors(lambda: lowrank_linear(x, weight, bias, A, B, SCALE))
    assert sum(t.data_ptr() == x.data_ptr() for t in kept) == 1
    others = [t for t in kept if t.data_ptr() not in {x.data_ptr(), weight.data_ptr(), A.data_ptr(), B.data_ptr()}]
    assert [t.shape[-1] for t in others] == [RANK]


def test_x_is_not_kept_when_A_is_frozen():
    x, weight, bias, A, B = frozen_base()
    kept, y = saved_tensors(lambda: lowrank_linear(x, weight, bias, A.detach(), B, SCALE))
    assert all(t.data_ptr() != x.data_ptr() for t in kept)
    base = y.detach()
    kept, _ = saved_tensors(lambda: add_lowrank(base, x, A.detach(), B, SCALE))
    assert all(t.data_ptr() != x.data_ptr() for t in kept)


def test_the_weight_is_not_kept_when_x_needs_no_gradient():
    x, weight, bias, A, B = frozen_base()
    kept, _ = saved_tensors(lambda: lowrank_linear(x.detach(), weight, bias, A, B, SCALE))
    assert all(t.data_ptr() != weight.data_ptr() for t in kept)


@pytest.mark.parametrize("training", [True, False])
def test_one_full_size_tensor_each_way(training):
    x, weight, bias, A, B = frozen_base()
    tokens = x[..., 0].numel()
    with torch.set_grad_enabled(training), Storages() as forward:
        y = lowrank_linear(x, weight, bias, A, B, SCALE)
    assert forward.count(tokens * OUT) == 1
    assert forward.count(tokens * IN) == 0
    if training:
        with Storages() as backward:
            torch.autograd.grad(y, (x, A, B), torch.ones_like(y))
        assert backward.count(tokens * IN) == 1
    with Storages() as composed:
        reference(x, weight, bias, A, B)
    assert composed.count(tokens * OUT) > 1  # the counter does count


def test_add_overwrites_a_fresh_output():
    x, weight, bias, A, B = frozen_base()
    bank_A, bank_B = make(4, RANK, IN), make(4, OUT, RANK)
    for requires_grad, base_bias in itertools.product((True, False), (None, bias)):  # with a bias, y is a view
        y = F.linear(x.detach().requires_grad_(requires_grad), weight, base_bias)
        pointer = y.data_ptr()
        y = add_lowrank(y, x, A, B, SCALE)
        y = add_lowrank_rows(y, x, bank_A, bank_B)
        assert y.data_ptr() == pointer
        with Storages() as backward:  # and no copy of the gradient is made for it
            torch.autograd.grad(y, (A, B, bank_A, bank_B), torch.ones_like(y))
        assert backward.count(y.numel()) == 1, "ones_like alone"


def test_add_where_autograd_forbids_overwriting():
    _, x, A, B = rows_inputs()
    A, B = A[0].detach().requires_grad_(), B[0].detach().requires_grad_()
    leaf = make(ROWS, 3, OUT)
    parent = make(ROWS, 3, OUT * 2) * 1
    strided = (make(OUT, 3, ROWS) * 1).permute(2, 1, 0)
    for y in (leaf, parent[..., :OUT], strided, parent.detach()[..., :OUT]):
        before = y.detach().clone()
        got = add_lowrank(y, x, A, B, SCALE)
        torch.testing.assert_close(got, before + x @ A.mT @ B.mT * SCALE)
        torch.testing.assert_close(y.detach(), before)
        gradients(got, (x, A, B))


def test_the_output_may_be_overwritten_by_the_caller():
    """nn.ReLU(inplace=True) after an adapted layer, a residual added in place."""
    x, weight, bias, A, B = frozen_base()
    got = lowrank_linear(x, weight, bias, A, B, SCALE).add_(1).relu_()
    wanted = (reference(x, weight, bias, A, B) + 1).relu()
    assert_all_close(gradients(got, (x, A, B)), gradients(wanted, (x, A, B)))
    for base_bias in (None, bias):
        got = add_lowrank(F.linear(x, weight, base_bias), x, A, B, SCALE).relu_()
        wanted = reference(x, weight, base_bias, A, B).relu()
        assert_all_close(gradients(got, (x, A, B)), gradients(wanted, (x, A, B)))


def test_the_base_output_whose_producer_kept_it_is_never_silently_wrong():
    """exp keeps its output for its backward; overwriting it must raise, as any in-place operation does."""
    x, _, _, A, B = frozen_base()
    y = add_lowrank(make(4, 16, OUT).exp(), x, A, B, SCALE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_without_grad_there_is_no_autograd_node():
    x, weight, bias, A, B = frozen_base()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = lowrank_linear(x, weight, bias, A, B, SCALE)
            assert y.grad_fn is None
            torch.testing.assert_close(y, reference(x, weight, bias, A, B))
            y = add_lowrank(F.linear(x, weight, bias), x, A, B, SCALE)
            torch.testing.assert_close(y, reference(x, weight, bias, A, B))
    with torch.inference_mode():
        y, x, A, B = rows_inputs()
        torch.testing.assert_close(add_lowrank_rows(y * 1, x, A, B), reference_rows(y, x, A, B))
    nothing = [t.detach() for t in frozen_base()]
    assert lowrank_linear(*nothing, SCALE).grad_fn is None


def test_nothing_outlives_the_backward():
    x, weight, bias, A, B = frozen_base()
    y = lowrank_linear(x, weight, bias, A, B, SCALE)
    y.sum().backward()
    gc.collect()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


# --- layouts and dtypes ---


def test_non_contiguous_x():
    params = layer()
    for x in (make(7, 2, IN).transpose(0, 1), make(IN, 7).mT, make(2, 7, 2 * IN)[..., ::2], make(7, 1).expand(7, IN)):
        x = x.detach().requires_grad_()
        got, wanted = lowrank_linear(x, *params, SCALE), reference(x, *params)
        torch.testing.assert_close(got, wanted)
        assert_all_close(gradients(got, (x, *params)), gradients(wanted, (x, *params)))
        y = make(*x.shape[:-1], OUT)
        A, B = params[2:]
        got, wanted = add_lowrank(y * 1, x, A, B, SCALE), y + x @ A.mT @ B.mT * SCALE
        assert_all_close(gradients(got, (x, y, A, B)), gradients(wanted, (x, y, A, B)))
    y, x, A, B = rows_inputs()
    x = make(3, ROWS, IN).transpose(0, 1).detach().requires_grad_()
    got, wanted = add_lowrank_rows(y * 1, x, A, B), reference_rows(y, x, A, B)
    assert_all_close(gradients(got, (y, x, A, B)), gradients(wanted, (y, x, A, B)))


def test_transposed_weight():
    """Conv1D of GPT-2 keeps (in, out) and passes weight.T."""
    x, (_, bias, A, B) = make(2, 7, IN), layer()
    weight = make(IN, OUT)
    got, wanted = lowrank_linear(x, weight.T, bias, A, B, SCALE), reference(x, weight.T, bias, A, B)
    torch.testing.assert_close(got, wanted)
    assert_all_close(gradients(got, (x, weight, bias, A, B)), gradients(wanted, (x, weight, bias, A, B)))


def test_bfloat16_throughout():
    x, params = make(2, 7, IN, dtype=torch.bfloat16), layer(torch.bfloat16)
    got = lowrank_linear(x, *params, SCALE)
    exact = [t.detach().double().requires_grad_() for t in (x, *params)]
    wanted = reference(*exact)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, atol=0.15, rtol=0.05)
    grads = gradients(got, (x, *params))
    assert all(g.dtype == torch.bfloat16 for g in grads)
    assert_all_close([g.double() for g in grads], gradients(wanted, exact), atol=0.5, rtol=0.05)


@pytest.mark.parametrize("which", ["linear", "add", "rows"])
def test_float32_factors_over_a_bfloat16_base(which):
    """A, B and their gradients stay float32; nothing full-size is made in float32."""
    low, full = torch.bfloat16, torch.float32
    if which == "rows":
        y, x, A, B = (t.detach() for t in rows_inputs())
    else:
        x, y, A, B = make(4, 3, IN).detach(), make(4, 3, OUT).detach(), *(t.detach() for t in layer()[2:])
    x, y = x.to(low).requires_grad_(), y.to(low)
    A, B = A.to(full).requires_grad_(), B.to(full).requires_grad_()
    weight = layer()[0].detach().to(low)

    def call(x, A, B):
        if which == "linear":
            return lowrank_linear(x, weight, None, A, B, SCALE)
        return add_lowrank(y * 1, x, A, B, SCALE) if which == "add" else add_lowrank_rows(y * 1, x, A, B)

    got = call(x, A, B)
    assert got.dtype == low
    grads = gradients(got, (x, A, B))
    assert [g.dtype for g in grads] == [low, full, full]
    base = F.linear(x.double(), weight.double()) if which == "linear" else y.double()
    change = x.double() @ A.double().mT @ B.double().mT * (1 if which == "rows" else SCALE)
    torch.testing.assert_close(got.double(), base + change, atol=0.15, rtol=0.05)
    assert_all_close(
        [g.double() for g in grads],
        [g.double() for g in gradients(base + change, (x, A, B))],
        atol=0.5,
        rtol=0.05,
    )


def test_mixed_base_is_refused_as_in_a_plain_linear():
    x, (weight, _, A, B) = make(2, IN, dtype=torch.float32), layer(torch.bfloat16)
    with pytest.raises(RuntimeError):
        F.linear(x, weight)
    with pytest.raises(RuntimeError):
        lowrank_linear(x, weight, None, A, B, SCALE)


@pytest.mark.parametrize("trained_base", [False, True])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(trained_base, backward_inside):
    x = make(2, 7, IN, dtype=torch.float32)
    params = layer(torch.float32)
    if not trained_base:
        params = (params[0].detach(), params[1].detach(), *params[2:])
    inputs = (x, *params)
    results = []
    for function in (lambda: lowrank_linear(*inputs, SCALE), lambda: reference(*inputs)):
        with torch.autocast("cpu", torch.bfloat16):
            y = function()
            if backward_inside:
                results.append((y, gradients(y, inputs)))
        if not backward_inside:
            results.append((y, gradients(y, inputs)))
    (got, got_grads), (wanted, wanted_grads) = results
    assert got.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, atol=0.15, rtol=0.05)
    assert all(g.dtype == torch.float32 for g in got_grads)
    assert_all_close(got_grads, wanted_grads, atol=0.5, rtol=0.05)


def test_autocast_keeps_no_copy_of_the_weight():
    x, weight, bias, A, B = (t.detach().float() for t in frozen_base())
    x, A, B = (t.requires_grad_() for t in (x, A, B))
    with torch.autocast("cpu", torch.bfloat16):
        kept, _ = saved_tensors(lambda: lowrank_linear(x, weight, bias, A, B, SCALE))
    whole = [t for t in kept if t.shape == weight.shape]
    assert [t.data_ptr() for t in whole] == [weight.data_ptr()]
    assert not any(t.dtype == torch.float32 and t.shape == x.shape for t in kept)  # x is kept in the dtype of use


def test_autocast_of_the_additions():
    """A quantised base may answer in bfloat16 or, where it opts out of autocast, in float32."""
    _, x, A, B = (t.detach().float() for t in rows_inputs())
    for dtype, rows in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        inputs = [t.clone().requires_grad_() for t in (x, A if rows else A[0], B if rows else B[0])]
        y = make(ROWS, 3, OUT, requires_grad=False).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            got = add_lowrank_rows(y * 1, *inputs) if rows else add_lowrank(y * 1, *inputs, SCALE)
        change = inputs[0] @ inputs[1].mT @ inputs[2].mT * (1 if rows else SCALE)
        assert got.dtype == dtype
        torch.testing.assert_close(got, (y + change).to(dtype), atol=0.15, rtol=0.05)
        assert_all_close(gradients(got, inputs), gradients((y + change).to(dtype), inputs), atol=0.5, rtol=0.05)


def test_autocast_leaves_float64_alone():
    x, params = make(2, 7, IN), layer()
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = lowrank_linear(x, *params, SCALE), reference(x, *params)
        assert got.dtype == wanted.dtype == DOUBLE
        assert_all_close(gradients(got, (x, *params)), gradients(wanted, (x, *params)))


def test_backward_under_autocast_of_a_forward_without():
    x, params = make(2, 7, IN, dtype=torch.float32), layer(torch.float32)
    got, wanted = lowrank_linear(x, *params, SCALE), reference(x, *params)
    wanted = gradients(wanted, (x, *params))
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_close(gradients(got, (x, *params)), wanted)


# --- how it is called ---


def test_a_layer_used_twice():
    x, (weight, bias, A, B) = make(3, IN), layer()
    back = make(IN, OUT)
    inputs = (x, weight, bias, A, B)

    def twice(function):
        return function(function(x, weight, bias, A, B, SCALE) @ back.mT, weight, bias, A, B, SCALE)

    got, wanted = twice(lowrank_linear), twice(reference)
    torch.testing.assert_close(got, wanted)
    assert_all_close(gradients(got, inputs), gradients(wanted, inputs))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    x, weight, bias, A, B = frozen_base()
    y = make(*x.shape[:-1], OUT).detach()
    bank = make(4, RANK, IN), make(4, OUT, RANK)

    def block(x, A, B, bank_A, bank_B):
        h = lowrank_linear(x, weight, bias, A, B, SCALE).tanh()
        h = h + add_lowrank(y * 1, x, A, B, SCALE)
        return add_lowrank_rows(h * 1, x, bank_A, bank_B).tanh()

    inputs = (x, A, B, *bank)
    got = gradients_by_backward(lambda: checkpoint(block, *inputs, use_reentrant=reentrant), inputs)
    assert_all_close(got, gradients_by_backward(lambda: block(*inputs), inputs), atol=0, rtol=0)


def gradients_by_backward(function, inputs):
    for t in inputs:
        t.grad = None
    function().square().sum().backward()
    return [t.grad for t in inputs]


class Adapted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        weight, bias, A, B = (t.detach().float() for t in layer())
        self.weight, self.bias = torch.nn.Parameter(weight, False), torch.nn.Parameter(bias, False)
        self.A, self.B = torch.nn.Parameter(A), torch.nn.Parameter(B)

    def forward(self, x):
        y = lowrank_linear(x, self.weight, self.bias, self.A, self.B, SCALE)
        y = y + add_lowrank(F.linear(x, self.weight), x, self.A, self.B, SCALE)
        return add_lowrank_rows(y * 1, x, self.A.expand(len(x), -1, -1), self.B.expand(len(x), -1, -1))


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_without_a_graph_break(autocast):
    model, x = Adapted(), make(2, 7, IN, dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tolerance = {"atol": 0.5, "rtol": 0.05} if autocast else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted, got = model(x), compiled(x)
    inputs = (x, model.A, model.B)
    torch.testing.assert_close(got, wanted, **tolerance)
    assert_all_close(gradients(got, inputs), gradients(wanted, inputs), **tolerance)


def test_compile_with_inductor():
    model, x = Adapted(), make(2, 7, IN, dtype=torch.float32)
    got, wanted = torch.compile(model, fullgraph=True)(x), model(x)
    torch.testing.assert_close(got, wanted)
    inputs = (x, model.A, model.B)
    assert_all_close(gradients(got, inputs), gradients(wanted, inputs))


def test_func_grad_per_sample():
    model, x = Adapted(), make(5, 2, IN, dtype=torch.float32).detach()
    params = {"A": model.A.detach(), "B": model.B.detach()}

    def loss(params, x):
        return functional_call(model, params, (x[None],)).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(params, x)
    for i in range(len(x)):
        wanted = torch.autograd.grad(model(x[i : i + 1]).square().sum(), (model.A, model.B))
        assert_all_close((got["A"][i], got["B"][i]), wanted)


def test_func_jvp():
    x, params = make(3, IN).detach(), [t.detach() for t in layer()]
    tangent = make(3, IN, seed=11).detach()
    _, got = jvp(lambda x: lowrank_linear(x, *params, SCALE), (x,), (tangent,))
    torch.testing.assert_close(got, reference(tangent, params[0], None, *params[2:]))


def test_inference_tensors_from_elsewhere():
    with torch.inference_mode():
        x = make(2, IN, requires_grad=False) * 1
    weight, bias, A, B = (t.detach() for t in layer())
    with torch.no_grad():
        torch.testing.assert_close(lowrank_linear(x, weight, bias, A, B, SCALE), reference(x, weight, bias, A, B))
