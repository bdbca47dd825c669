"""`rankfold similar` and `rankfold.compose.similar`: two adapters side by side."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn

import rankfold
from rankfold import LoRA
from rankfold.cli import similar as command
from rankfold.compose.similar import similar
from tests.contract import nets
from tests.methods.support import change, draw


def net(seed: int = 0, width: int = 12) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({"a": nn.Linear(12, 10), "b": nn.Linear(10, width)}).double()


def adapter(model: Any, name: str, pairs: Mapping[str, tuple[Tensor, Tensor]], alpha: float = 1) -> rankfold.Adapter:
    ranks = {site: {"rank": A.shape[0], "alpha": alpha * A.shape[0]} for site, (_, A) in pairs.items()}
    made = rankfold.attach(model, LoRA(rank=1), list(pairs), name=name, overrides=ranks)
    for site, pair in pairs.items():
        made.deltas[site].set_start(*pair)
    return made


def pair(rank: int, seed: int, out: int = 10, in_: int = 12) -> tuple[Tensor, Tensor]:
    return draw(out, rank, seed=seed), draw(rank, in_, seed=seed + 100)


def test_an_adapter_and_itself() -> None:
    model = net()
    factors = {"a": pair(3, 1), "b": pair(2, 2, 12, 10)}
    one = adapter(model, "one", factors)
    two = adapter(model, "two", {site: (B * -2, A) for site, (B, A) in factors.items()}, alpha=0.5)
    same, opposite = similar(one, one), similar(one, two)
    for found, sign in ((same, 1), (opposite, -1)):
        assert found.bases is None
        assert found.only == ([], [])
        for layer in (found, *found.layers.values()):
            assert layer.cosine == pytest.approx(sign)
            assert layer.ratio == pytest.approx(1)
            assert layer.outputs == pytest.approx(1)
            assert layer.inputs == pytest.approx(1)
            assert layer.alignment == pytest.approx(sign)
    assert same.layers["a"].ranks == (3, 3)
    assert same.layers["a"].by_chance == (0.3, 0.25)
    assert opposite.names == ("one", "two")
    assert opposite.methods == ("lora", "lora")


def test_against_the_dense_changes() -> None:
    """Cosine and ratio of ΔW, layer by layer and of the whole; the overlap of the column and the row space."""
    model = net()
    one = adapter(model, "one", {"a": pair(3, 1), "b": pair(2, 2, 12, 10)}, alpha=3)
    two = adapter(model, "two", {"a": pair(5, 4), "b": pair(1, 5, 12, 10)})
    found = similar(one, two)
    dense = [{site: change(delta) for site, delta in each.deltas.items()} for each in (one, two)]
    for site, layer in found.layers.items():
        x, y = dense[0][site], dense[1][site]
        assert layer.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()))
        assert layer.ratio == pytest.approx(float(y.norm() / x.norm()))
        U, V = (torch.linalg.qr(each.deltas[site].B.detach())[0] for each in (one, two))
        assert layer.outputs == pytest.approx(float((U.mT @ V).square().sum() / min(layer.ranks)))
    x, y = (torch.cat([matrix.flatten() for matrix in each.values()]) for each in dense)
    assert found.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()))
    assert found.ratio == pytest.approx(float(y.norm() / x.norm()))
    assert found.inputs == pytest.approx(sum(layer.inputs or 0 for layer in found.layers.values()) / 2)


def test_one_space_inside_another_and_two_that_do_not_meet() -> None:
    eye = torch.eye(12).double()
    model = net()
    first = adapter(model, "first", {"a": (eye[:10, :2], eye[:2])})
    inside = adapter(model, "inside", {"a": (5 * eye[:10, 1:2], eye[1:2])})
    apart = adapter(model, "apart", {"a": (eye[:10, 4:6], eye[:2])})
    assert similar(first, inside).as_dict()["layers"]["a"] == {
        "cosine": pytest.approx(0.5**0.5),
        "ratio": pytest.approx(5 / 2**0.5),
        "outputs": pytest.approx(1),
        "inputs": pytest.approx(1),
        "by_chance": (0.2, pytest.approx(1 / 6)),
        "alignment": pytest.approx(0.5),
        "ranks": (2, 1),
        "errors": (0, 0),
    }
    found = similar(first, apart)
    assert (found.cosine, found.outputs) == (0, 0)
    assert found.inputs == pytest.approx(1)


def test_alignment_forgets_sizes() -> None:
    """σ = (10, 4, 1) and (4, 10, 1) of the same directions: two of each count, and they are the same."""
    eye = torch.eye(12).double()
    model = net()
    one = adapter(model, "one", {"a": (eye[:10, :3] * torch.tensor([10.0, 4, 1]), eye[:3])})
    two = adapter(model, "two", {"a": (eye[:10, :3] * torch.tensor([4.0, 10, 1]), eye[:3])})
    found = similar(one, two).layers["a"]
    assert found.alignment == pytest.approx(1)
    assert found.cosine == pytest.approx(81 / 117)


def test_layers_that_one_leaves_alone_and_changes_of_zero() -> None:
    model = net()
    B, A = pair(2, 1)
    both = adapter(model, "both", {"a": (B, A), "b": pair(2, 2, 12, 10)})
    only = adapter(model, "only", {"a": (B, A)})
    found = similar(both, only)
    assert found.only == (["b"], [])
    assert list(found.layers) == ["a"]
    whole = sum(float(change(delta).square().sum()) for delta in both.deltas.values())
    assert found.cosine == pytest.approx(float((B @ A).norm() / whole**0.5))
    none = adapter(model, "none", {"a": (0 * B, A)})
    found = similar(only, none)
    layer = found.layers["a"]
    assert (found.cosine, found.ratio, found.outputs, found.alignment) == (None, 0, None, None)
    assert (layer.cosine, layer.ratio, layer.inputs, layer.by_chance, layer.ranks) == (None, 0, None, None, (2, 0))
    assert similar(none, only).ratio is None


def test_experts_are_compared_one_by_one() -> None:
    model = nets.net("experts")
    one, two = (
        nets.scramble(nets.attach(model, "lora", name, "experts", rank=2), seed) for seed, name in enumerate("xy")
    )
    found = similar(one, two)
    site = next(iter(one.deltas))
    dense = [change(each.deltas[site]) for each in (one, two)]
    for i, (x, y) in enumerate(zip(*dense, strict=True)):
        assert found.layers[f"{site}[{i}]"].cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()))


def test_other_methods_and_other_bases() -> None:
    model = net()
    one = adapter(model, "one", {"a": pair(2, 1)})
    dora = rankfold.attach(model, rankfold.build("dora", rank=2), ["a"], name="dora")
    dora.deltas["a"].set_start(one.deltas["a"].B.detach(), one.deltas["a"].A.detach())
    found = similar(one, dora)
    assert found.methods == ("lora", "dora")
    x, y = change(one.deltas["a"]), change(dora.deltas["a"])
    assert found.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()))
    other = adapter(net(seed=1), "other", {"a": pair(2, 1)})
    found = similar(one, other)
    assert found.cosine == pytest.approx(1)
    assert found.bases is not None
    assert "differ by 1." in found.bases
    with pytest.raises(rankfold.RankfoldError, match="b is linear of 12×10 in one adapter and linear of 9×10"):
        similar(adapter(net(), "x", {"b": pair(1, 1, 12, 10)}), adapter(net(width=9), "y", {"b": pair(1, 1, 9, 10)}))


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    made = []
    for name, factors in (("one", {"a": pair(3, 1), "b": pair(2, 2, 12, 10)}), ("two", {"a": pair(2, 4)})):
        model = net(seed=len(made))
        adapter(model, name, factors)
        made.append(str(rankfold.save(model, tmp_path / name, name=name)))
    return made


def run(*arguments: str) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    app(["similar", *arguments], standalone_mode=False)


def test_command(folders: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    run(*folders, "--json")
    out = json.loads(capfd.readouterr().out)
    found = similar(*folders)
    assert out == json.loads(json.dumps(found.as_dict()))
    assert out["only"] == [["b"], []]
    run(*folders)
    text = capfd.readouterr().out
    assert f"{found.cosine:.3f}" in text
    assert "one: lora; alone on 1 layers: b" in text
    assert "other bases" in text
    assert "3, 2" in text
    run(*folders, "--no-layers")
    assert "3, 2" not in capfd.readouterr().out
