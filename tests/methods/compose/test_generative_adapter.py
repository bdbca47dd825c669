"""Generative Adapter: an adapter from one pass over a context."""

from typing import Any

import pytest
import torch
from torch import Tensor

import rankfold
from rankfold.compose._leading import leading
from rankfold.compose.generative_adapter import (
    Context,
    FastWeight,
    FastWeights,
    GenerativeAdapter,
    completion_and_reconstruction,
)
from rankfold.compose.generator import attach_products, generate
from tests.methods.inits.tiny import tiny_llama
from tests.methods.support import draw
from tests.train.tiny import llama, tokenizer

SMALL = GenerativeAdapter(rank=6, inner=5, kept=3, alpha=12, chunk=4)


def made(config: GenerativeAdapter = SMALL, seed: int = 0, trained: bool = True) -> tuple[Any, FastWeights]:
    """A base and a generator for it; trained: B is not zero, and the norms are not one."""
    model = tiny_llama().eval().requires_grad_(False)
    generator = config.for_model(model).start(seed)
    if trained:
        for i, fast in enumerate(generator.each):
            fast.B.data.copy_(draw(*fast.B.shape, seed=i, dtype=torch.float32))
            fast.norm.data.add_(0.3 * draw(*fast.norm.shape, seed=9 + i, dtype=torch.float32))
    return model, generator.eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def test_worked_numbers() -> None:
    """K 6×3, V 6×3, m = 2: ‖S̃‖_F² = 2, and S̃ is U_m V_mᵀ."""
    K, V = draw(6, 3, seed=1), draw(6, 3, seed=2)
    made = leading(K.T @ V, 2)
    assert float(made.square().sum()) == pytest.approx(2)
    U, _, Vh = torch.linalg.svd(K.T @ V)
    torch.testing.assert_close(made, U[:, :2] @ Vh[:2])
    torch.testing.assert_close(leading((7 * K).T @ V, 2), made)  # the scale of K does not matter


def test_norms() -> None:
    S = draw(4, 5, 6)
    for norm, order in (("frobenius", "fro"), ("spectral", 2)):
        normed = GenerativeAdapter(norm=norm).normalise(S)
        torch.testing.assert_close(torch.linalg.matrix_norm(normed, order), torch.ones(4).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(normed / normed[:, :1, :1], S / S[:, :1, :1])
        assert not GenerativeAdapter(norm=norm).normalise(torch.zeros(2, 2)).any()
    assert not GenerativeAdapter().normalise(torch.zeros(2, 2)).any()


def test_leading_has_its_own_gradient() -> None:
    """By finite differences, also where kept singular values are equal, and where the rank is below m."""
    for a, b, m in ((6, 5, 3), (5, 6, 2), (4, 4, 4)):
        S = draw(2, a, b).requires_grad_()
        assert torch.autograd.gradcheck(lambda S, m=m: leading(S, m), S)
    U, V = (torch.linalg.qr(draw(5, 5, seed=s))[0] for s in (1, 2))
    S = (U @ torch.diag(torch.tensor([3.0, 3, 1, 0.5, 0.2]).double()) @ V).requires_grad_()
    assert torch.autograd.gradcheck(lambda S: leading(S, 3), S)
    K, V = draw(3, 6, seed=1).requires_grad_(), draw(3, 5, seed=2)
    assert torch.autograd.gradcheck(lambda K: leading(K.mT @ V, 4), K)
    assert leading(K.mT @ V, 4).square().sum().item() == pytest.approx(3)


def test_guard() -> None:
    """Where the cut falls between two equal values there is nothing to differentiate: 0 while training."""
    S = torch.diag(torch.tensor([3.0, 2, 2, 1])).requires_grad_()
    assert not leading(S, 2, training=True).any()
    leading(S, 2, training=True).sum().backward()
    assert not S.grad.any()  # type: ignore[union-attr]
    assert leading(S, 2).square().sum().item() == pytest.approx(2)
    torch.testing.assert_close(leading(S, 3, training=True), torch.diag(torch.tensor([1.0, 1, 1, 0])))


def test_large_states_by_random_projection() -> None:
    """The same numbers each time, and the leading directions where the spectrum falls."""
    S = draw(60, 8, seed=1) * 10.0 ** -torch.arange(8) @ draw(8, 50, seed=2)
    U, _, Vh = torch.linalg.svd(S)
    torch.testing.assert_close(leading(S, 4), U[:, :4] @ Vh[:4], atol=1e-6, rtol=0)
    assert torch.equal(leading(S, 4), leading(S, 4))


def test_state_in_chunks_and_in_any_order() -> None:
    fast = FastWeight(SMALL, 16, 16, 16)
    fast.start(torch.Generator().manual_seed(0))
    H, mask = draw(12, 16, dtype=torch.float32), torch.ones(12)
    whole = fast.state(H, mask)
    parts = [fast.state(h, m) for h, m in zip(H.split(5), mask.split(5), strict=True)]
    torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=0)
    order = torch.randperm(12)
    torch.testing.assert_close(fast.state(H[order], mask), whole, atol=1e-5, rtol=0)
    normed = H * (H.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(whole, (normed @ fast.A2.T).T @ (normed @ fast.A3.T), atol=1e-5, rtol=0)


def test_masked_tokens_have_no_influence() -> None:
    fast = FastWeight(SMALL, 16, 16, 16)
    fast.start(torch.Generator().manual_seed(0))
    H, mask = draw(2, 5, 16, dtype=torch.float32), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    other = H.clone()
    other[0, 3:] = 7
    torch.testing.assert_close(fast.state(H, mask), fast.state(other, mask), atol=0, rtol=0)
    torch.testing.assert_close(fast.state(H, mask)[0], fast.state(H[0, :3], mask[0, :3]))
    assert not torch.allclose(fast.state(H, torch.ones(2, 5)), fast.state(other, torch.ones(2, 5)))


def test_start_and_size() -> None:
    """A1 to A3 have deviation √(1/3) / √fan-in, B is 0; R1 (in + d) + R2 (d + out) + d numbers a target."""
    config = GenerativeAdapter(rank=64, inner=48)
    fast = FastWeight(config, 80, 300, 200)
    fast.start(torch.Generator().manual_seed(0))
    for A, fan_in in ((fast.A1, 300), (fast.A2, 200), (fast.A3, 200)):
        assert A.std().item() == pytest.approx((1 / 3 / fan_in) ** 0.5, rel=0.02)
    assert sum(p.numel() for p in fast.parameters()) == 48 * (300 + 200) + 64 * (200 + 80) + 200
    assert fast.scale == 1
    model, generator = made(trained=False)
    rows = ids(1, 3, 4)
    mask = torch.ones_like(rows)
    out = generator(model, rows, mask, torch.ones(3, 3).tril(-1).bool())
    assert torch.equal(out[0], model(input_ids=rows[0]).logits)
    alone = made()[1](model, rows, mask, torch.zeros(3, 3, dtype=torch.bool))  # nobody sees anybody
    assert torch.equal(alone, out)


def test_who_sees_whom() -> None:
    """Chunks a b c and their copies: a chunk sees those before it, a copy its own too, and no one sees a copy."""
    assert completion_and_reconstruction(3).int().tolist() == [
        [0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
    ]


@pytest.mark.parametrize("norm", ["svd", "frobenius", "spectral"])
def test_all_chunks_at_once_are_the_stream(norm: str) -> None:
    """The one pass that trains and reading chunk by chunk give the same, and the exported LoRA computes it too."""
    model, generator = made(SMALL.model_copy(update={"norm": norm}))
    text, after = ids(12), ids(1, 1, 4, seed=1)
    rows = torch.cat([text.view(1, 3, 4), after], 1)
    out = generator(model, rows, torch.ones_like(rows), torch.ones(4, 4).tril(-1).bool())
    context = Context(generator, model).add(text[:8])
    attach_products(generator, model, context.products(), "two")
    torch.testing.assert_close(model(input_ids=rows[0, 2:3]).logits, out[0, 2:3], atol=1e-5, rtol=1e-5)
    rankfold.detach(model)
    attach_products(generator, model, context.add(text[8:]).products(), "three")
    torch.testing.assert_close(model(input_ids=after[0]).logits, out[0, 3:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out[0, 3:], tiny_llama()(input_ids=after[0]).logits, atol=1e-2)


def test_exported_lora() -> None:
    """`α/R2 · B S̃ᵀ A1` of rank at most m, and its product is the module's own."""
    model, generator = made()
    context = Context(generator, model).add(ids(8))
    pairs = context.products()
    adapter = attach_products(generator, model, pairs, "generated")
    x = draw(1, 4, 16, dtype=torch.float32)
    for fast, S, (site, (B, A)) in zip(generator.each, context.states, pairs.items(), strict=True):
        assert (B.shape, A.shape) == ((16, 6), (6, 16))
        assert torch.linalg.matrix_rank(B @ A) == 3
        assert adapter.deltas[site].scale == 2
        expected = fast(x, leading(S, 3)[None])
        torch.testing.assert_close(2 * x @ (B @ A).T, expected, atol=1e-5, rtol=1e-5)


def test_text_in_adapter_out() -> None:
    base, words = llama().eval(), tokenizer()
    generator = GenerativeAdapter(rank=8, inner=8, kept=4, chunk=16).for_model(base).start(0).eval()
    for fast in generator.each:
        torch.nn.init.normal_(fast.B)
    adapter = generate(generator, base, words, "a text of more than sixteen bytes")
    assert list(adapter.deltas) == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    x = torch.arange(9)[None]
    with torch.no_grad():
        y = base(input_ids=x).logits
        with rankfold.using(base, None):
            assert not torch.allclose(base(input_ids=x).logits, y)
    with pytest.raises(rankfold.RankfoldError, match="no option 'seed'"):
        generator.products(base, words, "text", seed=1)


def test_training_lowers_the_loss_and_leaves_the_base() -> None:
    """Random tokens cannot be predicted, so that whatever falls below the base's loss was read in the context."""
    model = tiny_llama(initializer_range=0.3).eval().requires_grad_(False)
    generator = SMALL.for_model(model).start(0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(generator.train().parameters(), 3e-2)
    text = ids(4, 2, 4)
    losses = []
    for _ in range(30):
        loss = generator.loss(model, text, torch.ones_like(text))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    plain = model(input_ids=text.flatten(0, 1), labels=text.flatten(0, 1)).loss
    assert losses[0] == pytest.approx(float(plain), abs=1e-5)


def test_what_it_cannot_adapt() -> None:
    with pytest.raises(rankfold.RankfoldError, match=r"rank 1024 is over the size of .*16×16"):
        GenerativeAdapter().for_model(tiny_llama())
    with pytest.raises(rankfold.RankfoldError, match="lm_head is no linear layer inside a decoder layer"):
        SMALL.for_model(tiny_llama(), ["lm_head"])
