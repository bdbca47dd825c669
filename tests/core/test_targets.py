"""Targets: which layers a word, a suffix, an expression or a callable names, and what is said when it names none."""

import pytest
from torch import nn

import rankfold
from rankfold.core.targets import find


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.norm, self.up = Attention(), nn.LayerNorm(8), nn.Linear(8, 16)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.layers[1].up = self.layers[0].up  # shared
        self.lm_head = nn.Linear(8, 10)


def names(targets: object) -> list[str]:
    return [target.site.name for target in find(Model(), targets)]  # type: ignore[arg-type]


Q = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
K = ["layers.0.self_attn.k_proj", "layers.1.self_attn.k_proj"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {*Q, *K, "layers.0.up"}),  # a shared layer once, the head not
        ("attention", {*Q, *K}),
        ("mlp", {"layers.0.up"}),
        ("biases", {*Q, "layers.0.norm", "layers.1.norm", "layers.0.up", "lm_head"}),
        (["q_proj"], set(Q)),
        (["0.self_attn.q_proj", "lm_head"], {Q[0], "lm_head"}),
        (r"layers\.1\..*_proj", {Q[1], K[1]}),
        (lambda path, module: isinstance(module, nn.Embedding), {"embed"}),
    ],
)
def test_names(targets: object, expected: set[str]) -> None:
    found = names(targets)
    assert set(found) == expected
    assert len(found) == len(expected)


def test_a_suffix_begins_at_a_dot() -> None:
    with pytest.raises(rankfold.RankfoldError, match="matches no layer"):
        names(["proj"])


def test_a_name_that_should_be_in_a_list_is_told() -> None:
    """A text is a pattern of whole paths."""
    with pytest.raises(rankfold.RankfoldError, match=r"by the name of a layer it is a list: \[q_proj\]"):
        names("q_proj")


@pytest.mark.parametrize("targets", [["w_proj"], "w_proj", lambda path, module: False])
def test_no_match_lists_what_there_is(targets: object) -> None:
    with pytest.raises(rankfold.RankfoldError, match=r"embed, k_proj, lm_head, norm, q_proj, up") as error:
        names(targets)
    if not callable(targets):
        assert "w_proj" in str(error.value)


def test_one_wrong_name_in_a_list_is_no_silent_gap() -> None:
    with pytest.raises(rankfold.RankfoldError, match=r"no layer is called 'v_proj'; there are: .*q_proj"):
        names(["q_proj", "v_proj"])


def test_a_match_that_no_delta_can_sit_on_is_named() -> None:
    with pytest.raises(rankfold.RankfoldError, match=r"layers\.0\.self_attn \(Attention\)"):
        names(["self_attn"])


@pytest.mark.parametrize("targets", ["(", [], [3]])
def test_malformed(targets: object) -> None:
    with pytest.raises(rankfold.RankfoldError, match="regular expression"):
        names(targets)


def test_refusals_leave_the_model_as_it_was() -> None:
    model = Model()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(rankfold.RankfoldError, match="at most 8 fits"):
        rankfold.attach(model, rankfold.LoRA(rank=9), targets=["q_proj"])
    with pytest.raises(rankfold.RankfoldError, match="match none of the 2 targets"):
        rankfold.attach(model, rankfold.LoRA(rank=2), targets=["q_proj"], overrides={"up": {"rank": 4}})
    assert {name: type(module) for name, module in model.named_modules()} == before
    rankfold.attach(model, rankfold.LoRA(rank=2), targets=["q_proj"], name="one")
    with pytest.raises(rankfold.RankfoldError, match="'one' is attached already"):
        rankfold.attach(model, rankfold.LoRA(rank=2), targets=["q_proj"], name="one")
    assert list(rankfold.adapters(model)) == ["one"]


def test_adapters_are_no_targets_of_other_adapters() -> None:
    model = Model()
    rankfold.attach(model, rankfold.LoRA(rank=2), name="one")
    assert {t.site.name for t in find(model, "all-linear")} == {*Q, *K, "layers.0.up"}
    assert not [t for t in find(model, lambda path, module: True) if "deltas" in t.path]
