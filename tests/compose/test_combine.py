"""Several adapters as one: attached or saved, of any methods, layers and ranks, a layer at a time."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rankfold
from rankfold import LoRA, SVDMerge
from rankfold.compose._merge import Merge
from rankfold.compose._sources import open_source
from rankfold.core.checkpoint import read
from tests.contract.nets import SLUGS, attach, difference, example, net, net_for, scramble
from tests.methods.support import close

SUPPORTS = {entry.slug: entry.supports for entry in rankfold.methods()}
RANK = {"lora": {"rank": 3, "alpha": 6}}


def adapted(slug: str, name: str, kind: str = "linear", seed: int = 3, **hyper: Any) -> tuple[nn.Module, Any]:
    model = net(kind)
    adapter = scramble(attach(model, slug, name, kind, **{**RANK.get(slug, {}), **hyper}), seed)
    return model, adapter


def saved(slug: str, folder: Path, kind: str = "linear", seed: int = 3, **hyper: Any) -> tuple[Path, dict[str, Tensor]]:
    """The folder of an adapter, and its changes ΔW by site."""
    model, adapter = adapted(slug, slug.replace("-", "_"), kind, seed, **hyper)
    return rankfold.save(model, folder / f"{slug}{seed}", adapter.name), changes(adapter)


@torch.no_grad()
def changes(adapter: rankfold.Adapter) -> dict[str, Tensor]:
    return {site: delta.adapted_weight(delta.W) - delta.W for site, delta in adapter.deltas.items()}


def total(changes: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    sites = {site: None for own in changes for site in own}
    return {
        site: torch.stack([w * own[site] for w, own in zip(weights, changes, strict=True) if site in own]).sum(0)
        for site in sites
    }


def loaded(folder: Any, kind: str = "linear") -> dict[str, Tensor]:
    return changes(rankfold.load(net(kind), folder))


@pytest.mark.parametrize("slug", SLUGS)
def test_every_method_beside_a_lora(slug: str, tmp_path: Path) -> None:
    """Attached, saved with the base in memory, and saved with its weights in a file: the sum of the two changes."""
    model, weights = net_for(slug), [0.7, -0.4]
    a = scramble(attach(model, slug, "a"))
    b = scramble(attach(model, "lora", "b", **RANK["lora"]), 4)
    rankfold.save(model, tmp_path / "a", "a")
    rankfold.save(model, tmp_path / "b", "b")
    if SUPPORTS[slug]["as-lora"] is not True:
        with pytest.raises(rankfold.UnsupportedError, match="has no ΔW"):
            rankfold.combine([a, b], "linear")
        with pytest.raises(rankfold.UnsupportedError, match="has no ΔW"):
            rankfold.combine([tmp_path / "a", tmp_path / "b"], "linear", to=tmp_path / "c", model=net())
        assert not (tmp_path / "c").exists()
        assert list(rankfold.adapters(model)) == ["a", "b"]
        return
    state, expected = copy.deepcopy(a.state_dict()), total([changes(a), changes(b)], weights)
    made, report = rankfold.combine([a, b], "linear", weights)
    base = net_for(slug)
    save_file({name: tensor.contiguous() for name, tensor in base.state_dict().items()}, tmp_path / "model.safetensors")
    for from_file in (base, tmp_path) if SUPPORTS[slug]["float-base"] is True else (base,):
        where, same = rankfold.combine(
            [tmp_path / "a", tmp_path / "b"], "linear", weights, tmp_path / "c", model=from_file
        )
        found = changes(rankfold.load(net_for(slug), where))
        for site, change in changes(made).items():
            close(change, expected[site], atol=1e-9)
            close(found[site], expected[site], atol=1e-9)
            assert report[site] == same[site]
            assert report[site].error < 1e-7
    assert all(torch.equal(tensor, state[name]) for name, tensor in a.state_dict().items()), "an input was changed"
    assert made.name == read(where).document.name == "task-arithmetic"


@pytest.mark.parametrize("slug", ["dora", "ia3", "boft", "oft"])
def test_what_depends_on_the_base_says_so(slug: str, tmp_path: Path) -> None:
    folder, _ = saved(slug, tmp_path)
    with pytest.raises(rankfold.UnsupportedError, match=r"depends on the base weights.*give the base model"):
        rankfold.combine([folder], "linear", to=tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "conv", "experts"])
def test_every_kind_of_layer(kind: str, tmp_path: Path) -> None:
    one, first = saved("lora", tmp_path, kind)
    two, second = saved("loha", tmp_path, kind)
    rank = 1 << 10
    where, report = rankfold.combine([one, two], "svd", [1, 2], tmp_path / "c", rank=rank)
    for site, change in loaded(where, kind).items():
        close(change, total([first, second], [1, 2])[site], atol=1e-9)
        assert report[site].error < 1e-7
    x = example(kind)
    model = net(kind)
    before = model(x)
    rankfold.load(model, where)
    assert difference(model(x), before) > 1e-3


def test_other_sites_ranks_and_a_scale(tmp_path: Path) -> None:
    """Each layer has the ranks of those that adapt it; an adapter that leaves it alone counts as rank 0."""
    model = net()
    a = scramble(rankfold.attach(model, LoRA(rank=3, alpha=9, rslora=True), ["fc1"], "a"))
    b = scramble(rankfold.attach(model, LoRA(rank=2), ["fc1", "fc2"], "b", overrides={"fc2": {"rank": 5}}), 4)
    made, report = rankfold.combine([a, b], "linear", [1, 1])
    expected = total([changes(a), changes(b)], [1, 1])
    assert {site: (layer.before, layer.rank) for site, layer in report.items()} == {
        "fc1": ((3, 2), 5),
        "fc2": ((0, 5), 5),
    }
    for site, change in changes(made).items():
        close(change, expected[site])
    rankfold.save(model, tmp_path / "a", "a")
    rankfold.save(model, tmp_path / "b", "b")
    where, _ = rankfold.combine([tmp_path / "a", tmp_path / "b"], "linear", [1, 1], tmp_path / "c")
    document = read(where).document
    assert document.targets == ["fc1", "fc2"]
    for site, change in loaded(where).items():
        close(change, expected[site])


def test_the_report_tells_the_errors() -> None:
    model = net()
    adapters = [scramble(attach(model, "lora", name, rank=4), i) for i, name in enumerate("ab")]
    made, report = rankfold.combine(adapters, SVDMerge(), [1, -1], "less", rank=3)
    expected = total([changes(a) for a in adapters], [1, -1])
    for site, layer in report.items():
        off = float((changes(made)[site] - expected[site]).norm() / expected[site].norm())
        assert layer.cut == pytest.approx(off, rel=1e-6)
        assert layer.error == pytest.approx(off, rel=1e-6)
        assert (layer.read, layer.rank) == (0, 3)
    assert made.name == "less"


def test_taking_an_adapter_away_undoes_it() -> None:
    """w = −1 beside w = 1: nothing is left."""
    model, x = net(), example()
    before = model(x)
    a = scramble(attach(model, "lora", "a"))
    made, report = rankfold.combine([a, a], "svd", [1, -1])
    rankfold.set_active(model, made.name)
    assert difference(model(x), before) < 1e-9
    assert all(layer.error == 0 for layer in report.values())


def test_what_is_merged_meanwhile_changes_nothing() -> None:
    """A change that depends on the base weights is that of the original ones."""
    model = net()
    adapters = [scramble(attach(model, slug, slug), i) for i, slug in enumerate(("dora", "lora"))]
    expected = total([changes(a) for a in adapters], [0.5, 0.5])
    for i, merged in enumerate((("lora",), ("dora",), ("lora", "dora"))):
        for name in merged:
            rankfold.merge(model, name)
        made, _ = rankfold.combine(adapters, "linear", to=f"made{i}")
        rankfold.unmerge(model)
        for site, change in changes(made).items():
            close(change, expected[site], atol=1e-9)


def test_a_bias_is_counted_as_lost(tmp_path: Path) -> None:
    """A LoRA holds no bias: IA3 scales one."""
    model = net()
    a = scramble(attach(model, "ia3", "a", feedforward=[]))
    made, report = rankfold.combine([a], "linear")
    for site, layer in report.items():
        delta: Any = a.deltas[site]
        W, b = changes(a)[site], (delta.l.detach() - 1) * model.get_submodule(site).bias.detach()  # type: ignore[union-attr]
        assert layer.read == pytest.approx(float((b.square().sum() / (b.square().sum() + W.square().sum())).sqrt()))
        close(changes(made)[site], W)


def heads(folder: Path, *seeds: int) -> list[Path]:
    found = []
    for i, seed in enumerate(seeds):
        model = net("norm")
        adapter = rankfold.attach(model, LoRA(rank=2), ["fc1"], f"a{i}", modules_to_save=["norm"])
        scramble(adapter, seed)
        for part in adapter.modules.values():
            torch.nn.init.constant_(part.module.weight, float(seed))  # type: ignore[arg-type]
            torch.nn.init.constant_(part.module.bias, 0.0)  # type: ignore[arg-type]
        found.append(rankfold.save(model, folder / f"a{i}", f"a{i}"))
    return found


def test_modules_in_full_are_taken_over_or_refused(tmp_path: Path) -> None:
    one, two, other = heads(tmp_path, 3, 3, 5)
    plain = saved("lora", tmp_path)[0]
    for adapters in ([one, two], [plain, one]):
        where, _ = rankfold.combine(adapters, "svd", to=tmp_path / "c", force=True)
        assert read(where).document.modules == ["norm"]
        made = rankfold.load(net("norm"), where)
        assert torch.equal(made.modules["norm"].module.weight, torch.full((16,), 3.0).double())  # type: ignore[arg-type]
    with pytest.raises(rankfold.RankfoldError, match="'a0' and 'a2' both hold norm in full, and differ"):
        rankfold.combine([one, other], "svd", to=tmp_path / "d")
    model = net("norm")
    scramble(rankfold.attach(model, LoRA(rank=2), ["fc1"], "whole", modules_to_save=["fc2"]))
    rankfold.save(model, tmp_path / "whole", "whole")
    with pytest.raises(
        rankfold.RankfoldError, match="'whole' holds fc2 in full, and another adapter has a delta on fc2"
    ):
        rankfold.combine([plain, tmp_path / "whole"], "svd", to=tmp_path / "d", force=True)
    model = net("norm")
    attached = [rankfold.load(model, folder) for folder in (one, two)]
    made, _ = rankfold.combine(attached, "svd")
    assert torch.equal(made.modules["norm"].module.weight, torch.full((16,), 3.0).double())  # type: ignore[arg-type]


def test_nested_ranks_and_folded_offsets(tmp_path: Path) -> None:
    model = net()
    a = scramble(rankfold.attach(model, LoRA(rank=3), ["fc1"], "a", init=rankfold.build("pissa"), fold=True))
    a.nested = 1
    b = scramble(attach(model, "lora", "b"), 5)
    x = example()
    rankfold.save(model, tmp_path / "a", "a")
    made, _ = rankfold.combine([a], "linear", [1])
    outputs = []
    for name in ("a", made.name):
        rankfold.set_active(model, name)
        outputs.append(model(x))
    assert difference(*outputs) < 1e-9
    where, _ = rankfold.combine([tmp_path / "a"], "linear", [1], tmp_path / "c")
    document = read(where).document
    assert (document.nested, document.fold, document.init) == (None, False, None)
    other = net()
    rankfold.load(other, where)
    assert difference(other(x), outputs[0]) < 1e-9
    assert b.nested is None


# ---- bases


def of_another_base(folder: Path) -> Path:
    torch.manual_seed(9)
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    scramble(attach(model, "lora", "other"))
    return rankfold.save(model, folder / "other", "other")


def test_another_base_is_refused_or_forced(tmp_path: Path) -> None:
    folder, other = saved("lora", tmp_path)[0], of_another_base(tmp_path)
    with pytest.raises(rankfold.RankfoldError, match=r"'lora' and 'other' were trained on differ by 1.*force=True"):
        rankfold.combine([folder, other], "svd", to=tmp_path / "c")
    assert not (tmp_path / "c").exists()
    where, _ = rankfold.combine([folder, other], "svd", to=tmp_path / "c", force=True)
    forced = read(where).document.forced
    assert forced is not None
    assert "differ by 1" in forced
    model = net()
    adapter = rankfold.load(model, where)
    assert adapter.forced == forced
    rankfold.save(model, tmp_path / "again", adapter.name)
    assert read(tmp_path / "again").document.forced == forced
    assert read(folder).document.forced is None
    rankfold.squeeze(where, 2, tmp_path / "small")
    rankfold.combine([folder, where], "svd", to=tmp_path / "more")
    assert read(tmp_path / "small").document.forced == read(tmp_path / "more").document.forced == forced


def test_given_weights_that_are_anothers(tmp_path: Path) -> None:
    folder, _ = saved("dora", tmp_path)
    wrong = net()
    with torch.no_grad():
        for parameter in wrong.parameters():
            parameter.normal_()
    with pytest.raises(rankfold.RankfoldError, match="the base weights that were given differ from those"):
        rankfold.combine([folder], "svd", to=tmp_path / "c", model=wrong)
    with pytest.raises(rankfold.RankfoldError, match=r"adapts fc1 \(32×16\), and the model has no such layer"):
        rankfold.combine([folder], "svd", to=tmp_path / "c", model=nn.Sequential(nn.Linear(16, 32)))
    merged = net()
    scramble(attach(merged, "lora", "m"))
    rankfold.merge(merged)
    with pytest.raises(rankfold.RankfoldError, match="has m merged into its weights"):
        rankfold.combine([folder], "svd", to=tmp_path / "c", model=merged)


def test_another_class_or_shape(tmp_path: Path) -> None:
    folder, _ = saved("lora", tmp_path)
    model = nn.ModuleDict({"fc1": nn.Linear(16, 32), "fc2": nn.Linear(30, 16)}).double()
    model.load_state_dict(net().state_dict() | {"fc2.weight": torch.zeros(16, 30)}, strict=False)
    scramble(rankfold.attach(model, LoRA(rank=2), ["fc1"], "dict"))
    rankfold.save(model, tmp_path / "dict", "dict")
    with pytest.raises(rankfold.RankfoldError, match=r"trained on 'Block' of .* and 'dict' on 'ModuleDict' of"):
        rankfold.combine([folder, tmp_path / "dict"], "svd", to=tmp_path / "c")
    scramble(rankfold.attach(model, LoRA(rank=2), ["fc2"], "small"))
    rankfold.save(model, tmp_path / "small", "small")
    with pytest.raises(rankfold.RankfoldError, match="fc2 is linear of 16×32 in one adapter and linear of 16×30"):
        rankfold.combine([folder, tmp_path / "small"], "svd", to=tmp_path / "c", force=True)


def test_wrong_arguments(tmp_path: Path) -> None:
    folder, _ = saved("lora", tmp_path)
    for arguments, message in (
        (([folder], "tise"), "did you mean 'ties'"),
        (([folder], "lora"), "'lora' merges no adapters; there are: linear, svd, lego, .*ties"),
        (([], "svd"), "no adapter to combine"),
        (([folder], "svd", [1.0, 2.0]), "2 weights for 1 adapters"),
        (([folder], "svd", [float("nan")]), "weights must be numbers"),
        (([folder], "svd"), "say the folder"),
    ):
        with pytest.raises(rankfold.RankfoldError, match=message):
            rankfold.combine(*arguments)  # type: ignore[call-overload]
    with pytest.raises(rankfold.RankfoldError, match="rank must be at least 1"):
        rankfold.combine([folder], "svd", to=tmp_path / "c", rank=0)


def test_a_file_that_changes_or_is_damaged_is_told(tmp_path: Path) -> None:
    folder, _ = saved("lora", tmp_path)
    source = open_source(folder)
    data = bytearray((folder / "adapter.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "adapter.safetensors").write_bytes(data)
    with pytest.raises(rankfold.AdapterFileError, match="sha256"):
        open_source(folder)
    (folder / "adapter.safetensors").write_bytes(data + b"0")
    with pytest.raises(rankfold.AdapterFileError, match="changed while it was read"):
        source.pair("fc1")


def test_pairs_split_the_scale_evenly(tmp_path: Path) -> None:
    folder, expected = saved("lora", tmp_path)
    plain = rankfold.load(net(), folder).deltas["fc1"]
    B, A, error = open_source(folder).pair("fc1")
    close(B @ A, expected["fc1"])
    close(A, 2**0.5 * plain.A)
    assert error == 0


# ---- memory


class Held(TorchDispatchMode):
    """The most bytes that tensors made while it is on held at one time, and what they hold now."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Any] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        import weakref

        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self.alive[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        if self.alive.pop(key, None) is not None:
            self.now -= size


class Wide(nn.Module):
    def __init__(self, layers: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))


@pytest.mark.parametrize(
    ("how", "other", "layers"),
    [("svd", "lora", 1.5), ("linear", "lora", 1.5), ("ties", "lora", 10), ("ties", "dora", 16)],
)
def test_memory_is_that_of_a_layer(how: str, other: str, layers: float, tmp_path: Path) -> None:
    """Of 3 or of 9 layers of 400×400 as much: so many times what one takes. For DoRA base weights are read too."""
    peaks = []
    for count in (3, 9):
        torch.manual_seed(0)
        model = Wide(count, 400)
        folders = []
        for i, slug in enumerate(("lora", other)):
            scramble(rankfold.attach(model, rankfold.build(slug, rank=8), "all-linear", f"a{i}"), i)
            folders.append(rankfold.save(model, tmp_path / f"a{i}-{count}", f"a{i}"))
            rankfold.detach(model, f"a{i}")
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        del model
        with Held() as held:
            rankfold.combine(folders, how, to=tmp_path / f"out{count}", model=tmp_path if other == "dora" else None)
        peaks.append(held.peak)
    assert peaks[1] < 1.1 * peaks[0]
    assert 8 * 400 * 4 < peaks[1] < layers * 400 * 400 * 4, peaks


def test_a_rule_of_ones_own() -> None:
    """A Merge in anybody's file is as good as one of ours."""

    class First(Merge):
        def combine(
            self, pairs: Any, weights: Any, rank: Any, rng: Any, seen: Any = None
        ) -> tuple[Tensor, Tensor, float]:
            return *pairs[0], 0.0

    model = net()
    adapters = [scramble(attach(model, "lora", name), i) for i, name in enumerate("ab")]
    made, report = rankfold.combine(adapters, First(), to="first")
    for site, change in changes(made).items():
        close(change, changes(adapters[0])[site])
        assert report[site].error > 0.1
