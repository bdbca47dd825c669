"""ICM-LoRA: adapters drawn from a conditional VAE."""

from typing import Any

import pytest
import torch
from torch import Tensor

import rankfold
from rankfold import LoRA
from rankfold.compose._flat import Layout, adding, products
from rankfold.compose.generator import About, generate
from rankfold.compose.icm_lora import ConditionalVAE, ICMLoRA, canonical, divergence, examples, task_vector
from rankfold.core.document import Base
from tests.methods.inits.tiny import tiny_llama
from tests.methods.support import draw
from tests.train.tiny import llama, tokenizer

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SMALL = ICMLoRA(channels=(4, 8), latent=8, canonical=False)


def pairs(seed: int, rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    shapes = {Q: (16, 16), V: (8, 16)}
    return {site: (draw(out, rank, seed=seed), draw(rank, in_, seed=seed + 1)) for site, (out, in_) in shapes.items()}


def zoo(config: ICMLoRA = SMALL, each: int = 4) -> ConditionalVAE:
    """Two tasks: the second's adapters are ten times the first's, about 3."""
    samples: dict[str, Any] = {"one": [pairs(10 * i) for i in range(each)]}
    samples["two"] = [{s: (10 * B + 3, 10 * A + 3) for s, (B, A) in pairs(10 * i + 5).items()} for i in range(each)]
    vectors = {task: draw(16, seed=i, dtype=torch.float32) for i, task in enumerate(samples)}
    return config.for_zoo(tiny_llama(), samples, vectors).start(0)


def about(config: ICMLoRA, shape: list[int], width: int = 16) -> About:
    site = {"kind": "linear", "shape": shape, "dtype": "float32", "method": LoRA(rank=1).describe()}
    base = Base.model_validate({"class": "Net", "name_or_path": "", "parameters": 1, "sample": {}})
    return About(generator=config.describe(), sites={"layer": site}, base=base, width=width, tasks=["one"])  # type: ignore[dict-item]


def test_worked_numbers() -> None:
    """P = 1,929,928 is padded to 1,933,312 and 472 long after twelve halvings."""
    with torch.device("meta"):
        vae = ICMLoRA().network(about(ICMLoRA(), [1_929_927, 1], 768))
        assert (vae.length, vae.padded) == (1_929_928, 1_933_312)
        convolved = vae.encoder[:12](torch.empty(2, 1, vae.padded))
        assert convolved.shape == (2, 8, 472)
        assert vae.decode(torch.empty(2, 256), torch.empty(2, 768)).shape == (2, 1_933_312)
        assert vae.mu.in_features == 256 + 768


def test_flat_and_back() -> None:
    """Site by site, B and then A, row by row; a standardised vector is restored to 1e-6."""
    one = pairs(1)
    layout = Layout.of(one)
    flat = layout.flatten(one)
    assert torch.equal(flat[:32], one[Q][0].flatten())
    assert torch.equal(flat[32:64], one[Q][1].flatten())
    for site, (B, A) in layout.unflatten(flat).items():
        assert torch.equal(B, one[site][0])
        assert torch.equal(A, one[site][1])
    both = torch.stack([flat, 2 * flat])
    assert torch.equal(layout.unflatten(both)[V][0][1], 2 * one[V][0])
    assert torch.equal(layout.flatten(dict(reversed(one.items()))), flat)
    statistics = layout.statistics(both)
    assert statistics.shape == (2, 4)
    torch.testing.assert_close(statistics[:, 0], torch.stack([both[:, :32].mean(), both[:, :32].std()]))
    standard = layout.standardise(both, statistics)
    torch.testing.assert_close(layout.statistics(standard), torch.tensor([[0.0] * 4, [1.0] * 4]).double())
    torch.testing.assert_close(layout.restore(standard, statistics), both, atol=1e-6, rtol=0)
    same = layout.statistics(torch.full((3, len(flat)), 5.0))
    torch.testing.assert_close(layout.restore(layout.standardise(flat.float(), same), same), flat.float())


def test_other_layers_or_ranks_are_refused() -> None:
    layout = Layout.of(pairs(1))
    with pytest.raises(rankfold.RankfoldError, match=r"differ at model.layers.0.self_attn.q_proj: \(\(16, 2\)"):
        layout.flatten(pairs(1, rank=3))
    with pytest.raises(rankfold.RankfoldError, match=rf"differ at {V}"):
        layout.flatten({Q: pairs(1)[Q]})


def test_canonical_is_the_same_for_the_same_product() -> None:
    B, A, M = draw(9, 3, seed=1), draw(3, 7, seed=2), draw(3, 3, seed=3)
    U, R = canonical(B, A)
    torch.testing.assert_close(U @ R, B @ A)
    other = canonical(B @ M, torch.linalg.solve(M, A))
    torch.testing.assert_close(other[0], U)
    torch.testing.assert_close(other[1], R)
    swapped = canonical(B.flip(1), A.flip(0))
    torch.testing.assert_close(swapped[0], U)


def test_divergence() -> None:
    """0 for N(0, I) alone; ½ μ² for a shift; ½ (σ² − 1 − log σ²) for another width."""
    assert divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    assert float(divergence(torch.tensor([[2.0, 0], [0, 0]]), torch.zeros(2, 2))) == pytest.approx(1)
    assert float(divergence(torch.zeros(1, 1), torch.full((1, 1), 1.0))) == pytest.approx((2.718281828 - 2) / 2)
    assert float(divergence(torch.zeros(1, 1), torch.full((1, 1), -1.0))) > 0


def test_condition_decides_and_nothing_else_does() -> None:
    vae = zoo().eval()
    one, two = vae.tasks
    torch.testing.assert_close(vae.condition(vae.tasks).mean(0), torch.zeros(16), atol=1e-6, rtol=0)
    assert float(vae.condition(vae.tasks).square().mean()) == pytest.approx(1)
    first = vae.sample(one, seed=3, task="one")
    again, other = vae.sample(one, seed=3, task="one"), vae.sample(two, seed=3, task="one")
    assert all(torch.equal(first[s][i], again[s][i]) for s in first for i in (0, 1))
    assert not torch.allclose(first[Q][0], other[Q][0])
    assert not torch.allclose(first[Q][0], vae.sample(one, seed=4, task="one")[Q][0])


def test_a_sample_is_on_its_own_tasks_scale() -> None:
    """The nearest task's mean and deviation, or those of the task that is named; in training mode too."""
    vae = zoo().train()
    one, two = vae.tasks
    assert (vae.nearest(one + 0.01), vae.nearest(two - 0.01)) == (0, 1)
    plain, large = vae.sample(one), vae.sample(one, task="two")
    assert vae.training
    flat = [vae.layout.flatten(made) for made in (plain, large)]
    standard = [vae.layout.standardise(x, s) for x, s in zip(flat, vae.statistics, strict=True)]
    torch.testing.assert_close(standard[0], standard[1])
    assert float(vae.statistics[1, 1].min()) > 5 * float(vae.statistics[0, 1].max())
    with pytest.raises(rankfold.RankfoldError, match="no task 'three'; there are: one, two"):
        vae.sample(one, task="three")


def test_one_sample_without_the_divergence_is_learnt_by_heart() -> None:
    vae = zoo(ICMLoRA(channels=(8, 16), latent=32, kl=0, canonical=False)).train()
    x = vae.layout.standardise(vae.flatten(pairs(0)), vae.layout.statistics(vae.flatten(pairs(0))[None]))[None]
    c = vae.tasks[:1]
    optimizer = torch.optim.AdamW(vae.parameters(), 1e-2)
    for _ in range(60):
        loss = vae.loss(None, x, c)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1e-3
    assert vae.loss(None, x, c).item() == pytest.approx(float(vae(x, c)[0].detach()), abs=1e-3)


def test_loss_weighs_the_divergence() -> None:
    vae = zoo(SMALL.model_copy(update={"kl": 0.5})).eval()
    x, c = draw(2, vae.length, dtype=torch.float32), vae.tasks
    with torch.no_grad():
        mse, kl = vae(x, c)
        torch.testing.assert_close(vae.loss(None, x, c), mse + 0.5 * kl)
        mu, log_variance = vae.encode(x, c)
        padded = torch.cat([x, torch.zeros(2, vae.padded - vae.length)], 1)
        torch.testing.assert_close(mse, (vae.decode(mu, c) - padded).square().mean())
        torch.testing.assert_close(kl, divergence(mu, log_variance))


def test_task_vector() -> None:
    """The mean, over the first texts, of the last state at the last position; padding and the rest play no part."""
    base, words = llama().eval(), tokenizer()
    texts = ["a text", "another, longer text", "a third"]
    with torch.no_grad():
        states = [base.model(**words(t, return_tensors="pt")).last_hidden_state[0, -1] for t in texts]
    torch.testing.assert_close(task_vector(base, words, texts, 2), (states[0] + states[1]) / 2)
    torch.testing.assert_close(task_vector(base, words, texts), sum(states) / 3)
    with pytest.raises(rankfold.RankfoldError, match="at least one example"):
        task_vector(base, words, examples(" \n\n "))


def test_text_in_adapter_out() -> None:
    base, words = llama().eval(), tokenizer()
    site = "model.layers.1.self_attn.q_proj"
    samples = {
        t: [{site: (draw(32, 2, seed=i), draw(2, 32, seed=i + k))} for i in range(3)] for k, t in enumerate("ab")
    }
    vectors = {task: task_vector(base, words, [task]) for task in samples}
    vae = SMALL.for_zoo(base, samples, vectors).start(0).eval()
    adapter = generate(vae, base, words, "a\n\na", "made", seed=5)
    expected = vae.sample(vectors["a"], 5)[site]
    torch.testing.assert_close(adapter.deltas[site].factors(), expected)
    x = torch.arange(9)[None]
    with torch.no_grad():
        y = base(input_ids=x).logits
        with rankfold.using(base, None), adding(base, products({site: expected})):
            torch.testing.assert_close(base(input_ids=x).logits, y)
        with rankfold.using(base, None):
            assert not torch.allclose(base(input_ids=x).logits, y)
    with pytest.raises(rankfold.RankfoldError, match="no option 'scale'; it has seed and task"):
        vae.products(base, words, "a", scale=2)
