"""ComPEFT: the card's numbers, what is kept of an adapter, and that a compressed file is an adapter like any other."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold import ComPEFT, LoRA
from rankfold.compose._compression import decoded
from rankfold.compose.compeft import grid, largest
from rankfold.compose.compress import compress
from rankfold.core.checkpoint import SavedDeltas, read
from rankfold.errors import RankfoldError, UnsupportedError
from tests.contract.nets import SLUGS, attach, example, net, net_for, scramble

SLOW = pytest.mark.slow
TAU = torch.tensor([0.1, -0.4, 0.2, 0.0, -0.3])


def ternary(how: ComPEFT, **tensors: Tensor) -> dict[str, Tensor]:
    method = LoRA()
    return decoded(how.codes(tensors, dict.fromkeys(tensors, method)), tensors)


def trained(rank: int = 6, **options: Any) -> tuple[Any, rankfold.Adapter]:
    """A LoRA on two layers that has moved from its start, mostly in B."""
    model = net(dtype=torch.float32)
    adapter = rankfold.attach(model, LoRA(rank=rank, alpha=12), ["fc1", "fc2"], seed=5, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.3 if name.endswith("B") else 0.05))
    return model, adapter


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(example(dtype=torch.float32))


# ---- the mathematics


def test_worked_numbers() -> None:
    """std 0.25884; the two largest of five are kept, where the released rule keeps three."""
    assert float(TAU.std()) == pytest.approx(0.25884, abs=5e-6)
    found = ternary(ComPEFT(density=0.4), t=TAU)["t"]
    torch.testing.assert_close(found, 0.2588436 * torch.tensor([0.0, -1, 0, 0, -1]))
    released = ternary(ComPEFT(density=0.6), t=TAU)["t"]
    torch.testing.assert_close(released, 0.2588436 * torch.tensor([0.0, -1, 1, 0, -1]))
    torch.testing.assert_close(ternary(ComPEFT(density=0.4, alpha=3), t=TAU)["t"], 3 * found)


def test_stc_takes_the_mean_magnitude_of_what_is_kept() -> None:
    found = ternary(ComPEFT(density=0.6, scale="mean"), t=TAU)["t"]
    torch.testing.assert_close(found, 0.3 * torch.tensor([0.0, -1, 1, 0, -1]))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_signs_on_the_support_and_three_values(density: float) -> None:
    tau = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = ternary(ComPEFT(density=density), t=tau)["t"]
    kept = found != 0
    assert int(kept.sum()) == 1000 * density
    assert torch.equal(found[kept].sign(), tau[kept].sign())
    assert len(found.unique()) <= 3
    assert density == 1 or tau[~kept].abs().max() <= tau[kept].abs().min()


def test_what_ties_is_kept_in_order_and_one_number_at_least() -> None:
    assert largest(torch.tensor([1.0, -1, 1, 1]), 0.5).tolist() == [0, 1]
    assert largest(torch.tensor([1.0, -2, 1]), 0.001).tolist() == [1]


def test_one_vector_of_all_tensors_or_each_by_itself() -> None:
    """A ten times as large as B: of B nothing is kept, unless by tensor."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(20, 5, generator=generator) for _ in range(2))
    joint = ternary(ComPEFT(density=0.2), A=10 * A, B=B)
    assert int(joint["A"].count_nonzero()) == 40
    assert not joint["B"].any()
    both = torch.cat([10 * A.reshape(-1), B.reshape(-1)])
    assert float(joint["A"].max()) == pytest.approx(float(both.std()))
    apart = ternary(ComPEFT(density=0.2, by_tensor=True), A=10 * A, B=B)
    assert [int(tensor.count_nonzero()) for tensor in apart.values()] == [20, 20]
    assert float(apart["B"].max()) == pytest.approx(float(B.std()))
    assert float(apart["A"].max()) == pytest.approx(float(10 * A.std()))


def test_a_code_for_each_tensor_where_that_is_shorter() -> None:
    """All that is kept is in A and C; the zeros of B between them would cost the code of the whole."""
    generator = torch.Generator().manual_seed(0)
    A, B, C = (scale * torch.randn(40_000, generator=generator) for scale in (100, 1, 100))
    codes = ComPEFT(density=0.25).codes({"A": A, "B": B, "C": C}, {})
    assert [code.names for code in codes] == [("A",), ("B",), ("C",)]
    k = 0.375
    bits = 80_000 * (-k * math.log2(k) - (1 - k) * math.log2(1 - k) + k)
    assert 8 * sum(len(code.data) for code in codes) < 1.04 * bits
    assert [code.names for code in ComPEFT(density=0.25).codes({"A": A, "C": C}, {})] == [("A", "C")]


# ---- adapters


def test_the_file_is_as_small_as_the_formula_says(tmp_path: Path) -> None:
    model = nn.ModuleDict({str(i): nn.Linear(600, 600) for i in range(4)})
    adapter = rankfold.attach(model, LoRA(rank=32), "all-linear")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.shape[0]))
    rankfold.save(model, tmp_path / "whole")
    for k in (0.05, 0.2):
        path, report = compress(tmp_path / "whole", ComPEFT(density=k), tmp_path / f"{k}")
        d = adapter.num_parameters()
        bits = d * (-k * math.log2(k) - (1 - k) * math.log2(1 - k) + k) + 16
        assert bits <= 8 * report.code <= 1.03 * bits
        assert report.after == (path / "adapter.safetensors").stat().st_size
        assert report.before == sum(file.stat().st_size for file in (tmp_path / "whole").iterdir())
        assert report.ratio == pytest.approx(2 * d / report.after)
        assert report.ratio > {0.05: 39, 0.2: 15.9}[k]  # the document and the header counted
        assert (report.numbers, report.coded) == (d, d)


@pytest.mark.parametrize("how", ["compeft", ComPEFT(by_tensor=True), ComPEFT(from_start=True, density=0.3), "onebit"])
def test_what_is_loaded_is_what_was_put_beside(how: Any, tmp_path: Path) -> None:
    """From an attached adapter and from its file, here and in the file, to the last bit; the source stays."""
    model, adapter = trained()
    before, state = output(model), adapter.state_dict()
    beside, report = compress(adapter, how)
    assert beside.name == "default-compressed"
    assert torch.equal(output(model), before)
    with rankfold.using(model, "default-compressed"):
        small = output(model)
    assert (small - before).abs().max() > 1e-3
    rankfold.save(model, tmp_path / "whole")
    files = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    for source, to in ((adapter, tmp_path / "a"), (tmp_path / "whole", str(tmp_path / "b"))):
        path, again = compress(source, how, to)
        assert again.layers == report.layers
        other = net(dtype=torch.float32)
        loaded = rankfold.load(other, path)
        assert torch.equal(output(other), small)
        assert loaded.name == "default"
        assert {n: t.tolist() for n, t in loaded.state_dict().items()} == {
            n: t.tolist() for n, t in beside.state_dict().items()
        }
    assert {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()} == files
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter.state_dict().items())


def test_errors_are_those_of_the_changes(tmp_path: Path) -> None:
    model, adapter = trained()
    beside, report = compress(adapter, "compeft", "small")
    for site, layer in report.layers.items():
        old, new = (a.deltas[site].scale * (a.deltas[site].B @ a.deltas[site].A).detach() for a in (adapter, beside))
        assert layer.error == pytest.approx(float((old - new).norm() / old.norm()), abs=1e-5)
        both = torch.cat([t.reshape(-1) for n, t in beside.named_parameters() if n.startswith(f"deltas.{site}.")])
        assert layer.kept == pytest.approx(float((both != 0).float().mean()))
    assert rankfold.adapters(model).keys() == {"default", "small"}


def test_from_the_start_codes_what_training_did(tmp_path: Path) -> None:
    """Everything kept, and α from the data: what is left of the error is that of B and of A's change, not of A."""
    _, adapter = trained()
    start = rankfold.attach(net(dtype=torch.float32), LoRA(rank=6, alpha=12), ["fc1", "fc2"], seed=5).state_dict()
    beside, _ = compress(adapter, ComPEFT(from_start=True, by_tensor=True, density=0.25))
    for name, tensor in beside.state_dict().items():
        tau, coded = adapter.state_dict()[name] - start[name], tensor - start[name]
        kept = tau.abs() >= tau.abs().reshape(-1).sort(descending=True).values[tau.numel() // 4 - 1]
        torch.testing.assert_close(coded, tau.std() * tau.sign() * kept, atol=1e-6, rtol=0)


def test_from_the_start_of_ia3_is_one(tmp_path: Path) -> None:
    """Vectors are coded too then, as the differences to 1."""
    model = net(dtype=torch.float32)
    adapter = rankfold.attach(model, rankfold.IA3(feedforward=[]), ["fc1", "fc2"])
    scramble(adapter)
    with pytest.raises(UnsupportedError, match="trains vectors, from_start=True"):
        compress(adapter, "compeft")
    beside, _ = compress(adapter, ComPEFT(from_start=True, density=0.5))
    values = {round(float(v), 5) for t in beside.state_dict().values() for v in t.reshape(-1)}
    assert len(values) == 3
    assert 1.0 in values


def test_a_start_that_is_gone_is_refused() -> None:
    _, adapter = trained(init=rankfold.build("pissa"))
    with pytest.raises(UnsupportedError, match="started by 'pissa'"):
        compress(adapter, ComPEFT(from_start=True))
    dora = rankfold.attach(net(dtype=torch.float32), rankfold.DoRA(), ["fc1"])
    with pytest.raises(UnsupportedError, match=r"cannot be made without the base.*Leave from_start out"):
        compress(dora, ComPEFT(from_start=True))


DIFFERENT = {"lora", "dora", "kind", "vera", "sft-sparse", "s2-lora", "mos", "oft", "bitfit", "bi-lora"}


@pytest.mark.parametrize("slug", [slug if slug in DIFFERENT else pytest.param(slug, marks=SLOW) for slug in SLUGS])
def test_every_method_is_coded_or_refused(slug: str, tmp_path: Path) -> None:
    """Frozen tensors, vectors and whole numbers are stored as they are; the file gives the adapter put beside."""
    model = net_for(slug, dtype=torch.float32)
    adapter = scramble(attach(model, slug))
    rankfold.save(model, tmp_path / "whole")
    matrices = {name for name, p in adapter.named_parameters() if p.dim() > 1}
    for how in ("compeft", "onebit"):
        if not matrices or (slug, how) == ("bi-lora", "compeft"):
            with pytest.raises(UnsupportedError, match=r"onebit|has none"):
                compress(adapter, how, how)
            continue
        beside, report = compress(adapter, how, how)
        with rankfold.using(model, how):
            expected = output(model)
        path, _ = compress(tmp_path / "whole", how, tmp_path / how)
        other = net_for(slug, dtype=torch.float32)
        rankfold.load(other, path)
        assert torch.equal(output(other), expected)
        state = adapter.state_dict()
        same = {name for name, tensor in beside.state_dict().items() if torch.equal(tensor, state[name])}
        assert same == state.keys() - matrices
        assert report.layers.keys() == adapter.deltas.keys()
        assert all(math.isfinite(layer.error) for layer in report.layers.values())


def test_a_compressed_adapter_is_one_like_any_other(tmp_path: Path) -> None:
    """Merged, routed by row, exported, squeezed, saved whole, compressed again: as what it stands for is."""
    _, adapter = trained()
    path, _ = compress(adapter, ComPEFT(density=0.3, by_tensor=True), tmp_path / "small")
    other = net(dtype=torch.float32)
    plain = output(other)
    loaded = rankfold.load(other, path)
    expected = output(other)
    rankfold.merge(other, "default")
    torch.testing.assert_close(output(other), expected, atol=1e-5, rtol=1e-5)
    rankfold.unmerge(other)
    with rankfold.using(other, ["default", None, "default", None]):
        rows = output(other)
    torch.testing.assert_close(rows[::2], expected[::2])
    torch.testing.assert_close(rows[1::2], plain[1::2])
    rankfold.squeeze(path, 12, tmp_path / "squeezed")
    again = net(dtype=torch.float32)
    rankfold.load(again, tmp_path / "squeezed")
    torch.testing.assert_close(output(again), expected, atol=1e-5, rtol=1e-5)
    rankfold.save(other, tmp_path / "whole")
    assert (tmp_path / "whole" / "adapter.json").exists()
    assert read(tmp_path / "whole").encoding is None
    assert read(path).document.base == read(tmp_path / "whole").document.base
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in SavedDeltas(path).whole().state_dict().items())
    twice, report = compress(path, ComPEFT(density=0.1), tmp_path / "twice")
    kept = [layer.kept for layer in report.layers.values()]
    assert sum(k * 6 * 48 for k in kept) == pytest.approx(round(0.1 * 2 * 6 * 48))
    assert rankfold.load(net(dtype=torch.float32), twice).num_parameters() == loaded.num_parameters()


def test_export_to_peft(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, adapter = trained()
    path, _ = compress(adapter, "compeft", tmp_path / "small")
    model = net(dtype=torch.float32)
    loaded = rankfold.load(model, path)
    rankfold.export_peft(model, tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.fc1.lora_A.weight"], loaded.deltas["fc1"].A)


def test_a_module_in_full_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "head": nn.Linear(4, 2)})
    adapter = rankfold.attach(model, LoRA(rank=2), ["a"], modules_to_save=["head"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3)
    rankfold.save(model, tmp_path / "whole")
    other = nn.ModuleDict({"a": nn.Linear(6, 4), "head": nn.Linear(4, 2)})
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "deltas" not in k and "head" not in k}, False)
    path, report = compress(tmp_path / "whole", "compeft", tmp_path / "small")
    loaded = rankfold.load(other, path, strict=False)
    for name, parameter in adapter.modules["head"].module.named_parameters():
        assert torch.equal(loaded.modules["head"].module.get_parameter(name), parameter)
    assert (report.numbers, report.coded) == (20 + 10, 20)


def test_grid_finds_the_pair_with_the_least_loss() -> None:
    """The loss is the distance to the outputs of the adapter itself, computed here once more for each pair."""
    model, adapter = trained()
    wanted, calls = output(model), []

    def loss() -> float:
        calls.append(1)
        return float((output(model) - wanted).square().mean())

    best, losses = grid(adapter, loss, (0.1, 0.5), (0.5, 1, 2), ComPEFT(by_tensor=True))
    assert len(calls) == len(losses) == 6
    assert losses[best.density, best.alpha] == min(losses.values()) > 0
    assert len(set(losses.values())) == 6
    assert best.by_tensor
    for (k, alpha), value in losses.items():
        compress(adapter, ComPEFT(density=k, alpha=alpha, by_tensor=True), "again")
        with rankfold.using(model, "again"):
            assert value == pytest.approx(float((output(model) - wanted).square().mean()))
        rankfold.detach(model, "again")
    assert rankfold.adapters(model).keys() == {"default"}
    assert torch.equal(output(model), wanted)


def test_what_the_caller_got_wrong(tmp_path: Path) -> None:
    model, adapter = trained()
    (tmp_path / "file").touch()
    rankfold.save(model, tmp_path / "whole")
    for call, words in (
        (lambda: compress(adapter, "lora"), "does not compress"),
        (lambda: compress(adapter, "zip"), "no component is called 'zip'"),
        (lambda: compress(tmp_path / "whole", "compeft"), "say the folder"),  # type: ignore[call-overload]
        (lambda: compress(tmp_path / "whole", "compeft", tmp_path / "file"), "is a file"),
        (lambda: compress(tmp_path / "whole", "compeft", tmp_path / "whole"), "is the adapter itself"),
        (lambda: compress(tmp_path / "none", "compeft", tmp_path / "x"), "there is no folder"),
        (lambda: compress(tmp_path / "none", "compeft", tmp_path), "there is no folder"),
        (lambda: compress(adapter, "compeft", "default"), "default"),
        (lambda: rankfold.build("compeft", density=0), "greater than or equal to 0.001"),
        (lambda: rankfold.build("compeft", alpha=0), "greater than 0"),
    ):
        with pytest.raises(RankfoldError, match=words):
            call()
    assert not (tmp_path / "x").exists()
    assert rankfold.adapters(model).keys() == {"default"}


def test_a_diverged_adapter_is_not_compressed(tmp_path: Path) -> None:
    _, adapter = trained()
    with torch.no_grad():
        adapter.deltas["fc1"].B[0, 0] = torch.nan
    with pytest.raises(RankfoldError, match=r"fc1\.B holds NaN"):
        compress(adapter, "compeft", tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_what_it_was_compressed_by_is_told(tmp_path: Path) -> None:
    _, adapter = trained()
    path, _ = compress(adapter, ComPEFT(density=0.1), tmp_path / "small")
    encoding = read(path).encoding
    assert encoding is not None
    assert encoding.by == ComPEFT(density=0.1).describe()
    assert json.loads(json.dumps(encoding.by)) == encoding.by
