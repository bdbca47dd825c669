"""PSEC: a library of skills, and their composition in parameter space."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankfold
from rankfold import LoRA
from rankfold.compose.psec import Library, compose, pooled, working_range
from rankfold.deltas.psec import PSEC, context
from rankfold.errors import RankfoldError, UnsupportedError
from tests.contract.nets import attach as attach_to
from tests.contract.nets import difference, example, net, scramble
from tests.methods.support import DOUBLE, draw
from tests.train import tiny

SKILLS = ("left", "up")


def skilled(model: nn.Module | None = None, active: str | None = None) -> Any:
    """The base with two LoRAs of other ranks and scales, the second on one layer only, and one that is no product."""
    model = net() if model is None else model
    for i, (name, rank, targets) in enumerate((("left", 3, ["fc1", "fc2"]), ("up", 2, ["fc2"]))):
        scramble(rankfold.attach(model, LoRA(rank=rank, alpha=16), targets, name), 5 + i)
    scramble(attach_to(model, "dora", "turn"), 9)
    rankfold.set_active(model, active)
    return model


def attached(model: nn.Module, names: tuple[str, ...] = SKILLS) -> dict[str, Any]:
    return {name: rankfold.adapters(model)[name] for name in names}


def weigh(adapter: Any, *alpha: float) -> None:
    with torch.no_grad():
        adapter.shared.alpha.copy_(torch.tensor(alpha))


@pytest.mark.parametrize("how", ["constant", "learned"])
def test_alpha_zero_is_the_base_and_a_unit_vector_a_skill(how: Any) -> None:
    model, x = skilled(), example()
    names = (*SKILLS, "turn")
    adapter = compose(model, attached(model, names), weights=how)
    assert adapter.shared.alpha.tolist() == pytest.approx([1 / 3] * 3)  # type: ignore[union-attr]
    outputs = []
    for name in (None, *names):
        with rankfold.using(model, name):
            outputs.append(model(x))
    for i, expected in enumerate(outputs):
        weigh(adapter, *(float(i == j + 1) for j in range(3)))
        # The skill that is no product was decomposed in float32 numbers' accuracy at least.
        assert difference(model(x), expected) < (1e-12 if i == 0 else 1e-6)
    assert max(difference(outputs[i], outputs[j]) for i in range(4) for j in range(i)) > 1e-2


def test_constant_weights_are_the_merged_sum() -> None:
    """And mixed ones what the sum of the products gives, which is merged exactly."""
    model, x = skilled(), example()
    adapter = compose(model, attached(model), weights="constant", start=(0.7, -1.3))
    assert adapter.num_parameters() == 0
    y = model(x)
    by_hand = net()
    with torch.no_grad():
        for name, alpha in zip(SKILLS, (0.7, -1.3), strict=True):
            for site, delta in rankfold.adapters(model)[name].deltas.items():
                by_hand.get_submodule(site).weight += alpha * delta.scale * (delta.B @ delta.A)
    assert difference(y, by_hand(x)) < 1e-12
    rankfold.merge(model, "composed")
    assert difference(model(x), y) < 1e-12
    rankfold.unmerge(model)
    assert torch.equal(model(x), y)


def test_only_the_weights_train_and_find_the_mixture() -> None:
    model, x = skilled(), example()
    adapter = compose(model, attached(model), weights="constant", start=(0.25, 0.75))
    target = model(x).detach()
    rankfold.detach(model, "composed")
    adapter = compose(model, attached(model))
    assert [name for name, _ in adapter.named_parameters()] == ["shared.alpha"]
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    assert adapter.shared.alpha.tolist() == pytest.approx([0.25, 0.75], abs=1e-2)  # type: ignore[union-attr]


def by_context(model: nn.Module, **options: Any) -> Any:
    """A composition by context whose α really depends on s."""
    options = {"weights": "context", "width": 3, "hidden": (8, 8), **options}
    adapter: Any = compose(model, attached(model), **options)
    scramble(adapter, 4)
    return adapter


def test_each_row_has_the_weights_of_its_context() -> None:
    model, x = skilled(), example()
    s = draw(4, 3, seed=2)
    fresh: Any = compose(model, attached(model), weights="context", width=3, hidden=(8, 8), start=(0.3, 0.6))
    torch.testing.assert_close(fresh.shared(s), torch.tensor([[0.3, 0.6]] * 4, dtype=DOUBLE))  # for every s, at first
    rankfold.detach(model, "composed")
    adapter = by_context(model)
    alpha = adapter.shared(s).detach()
    assert alpha.std(0).min() > 1e-3
    first, second, last = adapter.shared.layers
    torch.testing.assert_close(alpha, last(second(first(s).relu()).relu()).detach())
    with context(model, s):
        together = model(x)
        together.square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in adapter.parameters())  # the MLP trains
    for row in range(4):
        rankfold.set_active(model, None)
        compose(model, attached(model), "row", weights="constant", start=alpha[row].tolist())
        assert difference(together[row], model(x[row : row + 1])[0]) < 1e-10
        rankfold.detach(model, "row")
    rankfold.set_active(model, "composed")
    with pytest.raises(UnsupportedError):
        rankfold.merge(model, "composed")
    with pytest.raises(RankfoldError, match="hang on a context: run the model inside"):
        model(x)
    for wrong in (draw(4, 2), draw(3), torch.ones(4, 3, dtype=torch.long)):
        with pytest.raises(RankfoldError, match=r"width being \[3\]"), context(model, wrong):
            pass
    with pytest.raises(RankfoldError, match="3 classes or contexts were given"), context(model, s[:3]):
        model(x)


@pytest.mark.parametrize("kind", ["conv1d", "embedding", "conv"])
def test_other_layers_take_contexts_by_row(kind: str) -> None:
    """Of random skills, as an adapter has that is attached without a library."""
    model, x, s = net(kind), example(kind), draw(4, 2, seed=2)
    before = model(x)
    adapter = attach_to(model, "psec", kind=kind, weights="context", width=2, hidden=(5, 4))
    assert adapter.num_parameters() == (2 + 1) * 5 + (5 + 1) * 4 + (4 + 1) * 2 == adapter.method.shared_count([])
    with context(model, s):
        assert difference(model(x), before) < 1e-12  # α starts at 0
        scramble(adapter, 4)
        together = model(x)
    assert difference(together, before) > 1e-3
    for row in range(4):
        with context(model, s[row : row + 1]):
            assert difference(together[row], model(x[row : row + 1])[0]) < 1e-12


def test_experts_have_no_weights_by_row() -> None:
    with pytest.raises(UnsupportedError, match="fused experts"):
        attach_to(net("experts"), "psec", kind="experts", weights="context", width=2)


def test_contexts_and_adapters_by_row() -> None:
    model, x, s = skilled(), example(), draw(4, 3, seed=2)
    by_context(model)
    names = ["composed", "left", None, "composed"]
    with rankfold.using(model, names), context(model, s):
        together = model(x)
    for row, name in enumerate(names):
        with rankfold.using(model, name), context(model, s[row : row + 1]):
            assert difference(together[row], model(x[row : row + 1])[0]) < 1e-12


@pytest.mark.parametrize("how", ["constant", "learned", "context"])
def test_it_is_saved_whole(how: Any, tmp_path: Path) -> None:
    model, x, s = skilled(), example(), draw(4, 3, seed=2)
    if how == "context":
        by_context(model)
    else:
        compose(model, attached(model), weights=how, start=(0.4, -0.2))
    with context(model, s) if how == "context" else rankfold.using(model, "composed"):
        y = model(x)
    rankfold.save(model, tmp_path, "composed")
    other = net()  # without the skills
    again = rankfold.load(other, tmp_path)
    assert again.method.skills == SKILLS  # type: ignore[attr-defined]
    with context(other, s) if how == "context" else rankfold.using(other, "composed"):
        assert torch.equal(other(x), y)


def test_the_library(tmp_path: Path) -> None:
    model = skilled()
    library = Library(tmp_path / "skills")
    assert library.skills() == []
    one = library.save(rankfold.adapters(model)["left"], about="go to the left")
    assert (one.name, one.about, one.method, one.layers) == ("left", "go to the left", "lora", 2)
    assert one.parameters == rankfold.adapters(model)["left"].num_parameters()
    rankfold.save(model, tmp_path / "saved", "up")
    library.save(tmp_path / "saved", "upwards")
    assert [skill.name for skill in library.skills()] == ["left", "upwards"]
    assert [skill.name for skill in Library(tmp_path / "skills").skills()] == ["left", "upwards"]  # it is on the disk
    assert not [path for path in library.folder.iterdir() if path.name not in ("left", "upwards")]
    assert json.loads((library.path("left") / "skill.json").read_text()) == {"about": "go to the left"}

    base, x = net(), example()
    library.load(base, "left")
    with rankfold.using(model, "left"):
        assert torch.equal(base(x), model(x))
    adapter = library.compose(base, ["left", "upwards"], weights="constant", start=(0.5, 0.5))
    expected = compose(model, attached(model), weights="constant", start=(0.5, 0.5))
    assert difference(base(x), model(x)) < 1e-12
    assert adapter.method.skills == ("left", "upwards") != expected.method.skills  # type: ignore[attr-defined]

    with pytest.raises(RankfoldError, match="has a skill 'left' already"):
        library.save(tmp_path / "saved", "left")
    library.remove("left")
    assert library.names() == ["upwards"]
    with pytest.raises(RankfoldError, match="no skill 'left'; it has: upwards"):
        library.describe("left")
    with pytest.raises(RankfoldError, match="no name of a skill"):
        library.load(base, "../saved")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RankfoldError):
        library.save(tmp_path / "empty", "nothing")
    assert library.names() == ["upwards"]


def test_what_cannot_be_weighed(tmp_path: Path) -> None:
    model = skilled()
    scramble(rankfold.attach(model, LoRA(rank=2), ["fc1"], "full", modules_to_save=["fc2"]))
    with pytest.raises(UnsupportedError, match="'full' holds fc2 in full"):
        compose(model, attached(model, ("full",)))
    attach_to(model, "bitfit", "bias")
    with pytest.raises(UnsupportedError, match="changes only biases"):
        compose(model, attached(model, ("bias",)))
    with pytest.raises(RankfoldError, match="'left' is attached to another model"):
        compose(net(), attached(model))
    rankfold.save(model, tmp_path, "left")
    other = net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(draw(*parameter.shape, seed=8))
    with pytest.raises(RankfoldError, match=r"differ from .*force=True"):
        compose(other, {"left": tmp_path})
    assert "differ" in str(compose(other, {"left": tmp_path}, force=True).forced)
    with pytest.raises(ValueError, match="start and skills must have as many"):
        PSEC(ranks=(2, 2), start=(1.0,))
    with pytest.raises(ValueError, match="width is how many"):
        PSEC(weights="context")


# ---- the paper's levels


def policy(layers: int) -> Any:
    """A noise predictor of (state, noisy action) with two skills."""
    torch.manual_seed(2)
    parts: list[nn.Module] = [nn.Linear(5, 2, dtype=DOUBLE)]
    if layers > 1:
        parts = [nn.Linear(5, 16, dtype=DOUBLE), nn.ReLU(), nn.Linear(16, 2, dtype=DOUBLE)]
    model = nn.Sequential(*parts)
    for seed, name in enumerate(SKILLS):
        scramble(rankfold.attach(model, LoRA(rank=2), "all-linear", name), seed)
    return model


def act(noise: Any, s: torch.Tensor) -> torch.Tensor:
    """The action behind one step of denoising."""
    a = draw(len(s), 2, seed=7)
    return (a - 0.6 * noise(torch.cat([s, a], 1))) / 0.8


@pytest.mark.parametrize("layers", [1, 2])
def test_parameter_noise_and_action_level(layers: int) -> None:
    """With weights that sum to 1 they are one thing in a policy of one linear layer, and three in a deep one."""
    model, s, w = policy(layers), draw(6, 3, seed=3), (0.3, 0.7)
    compose(model, attached(model), weights="constant", start=w)

    def by(name: str) -> Any:
        def noise(x: torch.Tensor) -> torch.Tensor:
            with rankfold.using(model, name):
                return model(x)

        return noise

    with torch.no_grad():
        parameter = act(by("composed"), s)
        noise = act(lambda x: sum(a * by(name)(x) for a, name in zip(w, SKILLS, strict=True)), s)
        action = sum(a * act(by(name), s) for a, name in zip(w, SKILLS, strict=True))
    assert difference(noise, action) < 1e-12  # one step is affine in the noise
    if layers == 1:
        assert difference(parameter, noise) < 1e-12
    else:
        assert difference(parameter, noise) > 1e-3


def test_the_penalty_is_the_authors() -> None:
    """α = (10, 14) and (6, 18) on their scale: (12 − 8)² + (16 − 16)² = 16."""
    assert float(working_range(torch.tensor([[10.0, 14], [6, 18]]) / 16)) == pytest.approx(16)


# ---- language models


def test_a_prompts_context() -> None:
    model = tiny.llama().eval()
    ids = torch.tensor([[9, 20, 33], [40, 41, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    table = model.get_input_embeddings().weight
    s = pooled(model, ids, mask)
    torch.testing.assert_close(s, torch.stack([table[[9, 20, 33]].mean(0), table[[40, 41]].mean(0)]))
    for name, seed in (("a", 1), ("b", 2)):
        scramble(rankfold.attach(model, LoRA(rank=2), "attention", name), seed)
    compose(model, {name: rankfold.adapters(model)[name] for name in "ab"}, weights="context", width=32, hidden=(4, 4))
    deep = pooled(model, ids, mask, layer=-1)  # of the base, whatever adapter is active
    with torch.no_grad():
        bare = tiny.llama().eval()(ids[:1], output_hidden_states=True).hidden_states[-1].mean(1)
    torch.testing.assert_close(deep[:1], bare, rtol=1e-4, atol=1e-5)
    with context(model, s), torch.no_grad():  # all of an answer in the context of its prompt
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 6)
