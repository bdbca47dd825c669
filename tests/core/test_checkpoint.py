"""Saving and loading adapters: what comes back is what was saved, on the model it was saved from."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import rankfold
from rankfold.core import Start, checkpoint, files, fingerprint
from rankfold.errors import AdapterFileError, RankfoldError


def llama(seed: int = 0, width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        name_or_path="org/tiny",
    )
    return LlamaForCausalLM(config).eval()


def ids() -> torch.Tensor:
    return torch.arange(24).reshape(2, 12) % 64


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def trained(model: nn.Module, name: str = "default", seed: int = 1, **kwargs) -> rankfold.Adapter:
    """A new adapter whose every parameter has moved, as after training."""
    adapter = rankfold.attach(model, kwargs.pop("method", rankfold.LoRA(rank=4)), name=name, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def plant(model: nn.Module) -> dict[str, object]:
    """What must be the same again after a load that failed."""
    return {
        "classes": [type(module) for module in model.modules()],
        "names": [name for name, _ in model.named_parameters()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "attached": list(rankfold.adapters(model)),
        "hooks": (len(model._forward_hooks), len(model._forward_pre_hooks)),
    }


class OffsetStart(rankfold.Init):
    """A start that is taken out of the base again: the leading entries of the weight itself."""

    slug = "test-offset"
    title = "for tests"
    source = "none"
    axis = "inits"

    def factors(self, site, W, rank, scale, statistics, rng):
        return Start(W[:, :rank].clone(), 0.01 * W[:rank].clone(), offset=True)


# ---- round trips


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"method": rankfold.LoRA(rank=3, alpha=7.3, rslora=True, dropout=0.25)},
        {"overrides": {"q_proj": {"rank": 7}, "1.mlp.down_proj": {"alpha": 2.5}}},
        {"modules_to_save": ["lm_head"]},
        {"targets": ["embed_tokens", "q_proj"]},
        {"init": OffsetStart()},
        {"init": OffsetStart(), "fold": True},
        {"dtype": torch.bfloat16},
    ],
    ids=["plain", "hyperparameters", "overrides", "modules", "embedding", "offset", "folded", "bf16"],
)
def test_a_loaded_adapter_computes_the_same_to_the_bit(tmp_path: Path, kwargs: dict) -> None:
    model = llama()
    plain = logits(model)
    saved = trained(model, **kwargs)
    expected = logits(model)
    assert not torch.equal(expected, plain)
    rankfold.save(model, tmp_path)

    other = llama()
    loaded = rankfold.load(other, tmp_path)
    assert torch.equal(logits(other), expected)
    assert (loaded.name, loaded.method, loaded.init, loaded.seed) == ("default", saved.method, saved.init, saved.seed)
    assert loaded.methods == saved.methods
    assert loaded.targets == saved.targets
    assert list(loaded.modules) == list(saved.modules)
    ours, theirs = loaded.state_dict(), saved.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in saved.parameters()]


_IN_A_NEW_PROCESS = """
import sys, torch, rankfold
from tests.core.test_checkpoint import llama, logits
model = llama()
for name in sys.argv[2:]:
    rankfold.load(model, f"{sys.argv[1]}/{name}")
    torch.save(logits(model), f"{sys.argv[1]}/{name}.pt")
"""


def test_a_new_process_computes_the_same_to_the_bit(tmp_path: Path) -> None:
    cases = {
        "plain": {},
        "overrides": {"overrides": {"q_proj": {"rank": 7}}},
        "modules": {"modules_to_save": ["lm_head"]},
        "offset": {"init": OffsetStart()},
    }
    model = llama()
    expected = {}
    for name, kwargs in cases.items():
        trained(model, name=name, **kwargs)
        rankfold.save(model, tmp_path / name, name=name)
        expected[name] = logits(model)
    command = [sys.executable, "-c", _IN_A_NEW_PROCESS, str(tmp_path), *cases]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in cases:
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), expected[name]), name


def test_saved_under_one_name_and_loaded_under_another_beside_it(tmp_path: Path) -> None:
    model = llama()
    trained(model, name="a", seed=1)
    a = logits(model)
    rankfold.save(model, tmp_path / "x", name="a")
    trained(model, name="b", seed=2)
    b = logits(model)
    rankfold.save(model, tmp_path / "y", name="b")

    assert rankfold.load(model, tmp_path / "x", "again", active=False).name == "again"
    assert torch.equal(logits(model), b)  # `b` is still the active one
    rankfold.set_active(model, "again")
    assert torch.equal(logits(model), a)

    other = llama()
    rankfold.load(other, tmp_path / "x")
    rankfold.load(other, tmp_path / "y")
    assert torch.equal(logits(other), b)
    with rankfold.using(other, "a"):
        assert torch.equal(logits(other), a)
    with rankfold.using(other, ["a", "b"]):
        assert torch.allclose(logits(other), torch.stack([a[0], b[1]]), atol=1e-6)
    with pytest.raises(RankfoldError, match="'a' is attached already"):
        rankfold.load(other, tmp_path / "x")


def test_a_loaded_adapter_trains_apart_from_others_and_from_its_file(tmp_path: Path) -> None:
    model = llama()
    trained(model)
    rankfold.save(model, tmp_path)
    before = (tmp_path / "adapter.safetensors").read_bytes()
    one, two = rankfold.load(model, tmp_path, "one"), rankfold.load(model, tmp_path, "two")
    with rankfold.using(model, "one"):
        model(input_ids=ids(), labels=ids()).loss.backward()
    optimiser = torch.optim.AdamW(one.parameters(), lr=0.1)
    optimiser.step()
    saved = rankfold.adapters(model)["default"].state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in two.state_dict().items())
    assert not any(torch.equal(tensor, saved[name]) for name, tensor in one.state_dict().items())
    assert (tmp_path / "adapter.safetensors").read_bytes() == before
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))


def test_saving_what_was_loaded_gives_the_same_adapter(tmp_path: Path) -> None:
    model = llama()
    trained(model, overrides={"q_proj": {"rank": 2}}, modules_to_save=["lm_head"])
    rankfold.save(model, tmp_path / "one")
    rankfold.load(model, tmp_path / "one", "again")
    rankfold.save(model, tmp_path / "two", name=None)  # the active one
    one, two = (checkpoint.read(tmp_path / which) for which in ("one", "two"))
    assert two.document.name == "again"
    assert one.document.sha256 == two.document.sha256
    assert one.document.model_dump(exclude={"name", "id"}) == two.document.model_dump(exclude={"name", "id"})


def test_read_needs_no_model_and_no_tensors(tmp_path: Path) -> None:
    model = llama()
    adapter = trained(model, modules_to_save=["lm_head"])
    assert rankfold.save(model, tmp_path / "deep" / "folder") == tmp_path / "deep" / "folder"
    found = checkpoint.read(tmp_path / "deep" / "folder")
    assert {name: (entry.shape, entry.dtype) for name, entry in found.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in adapter.state_dict().items()
    }
    assert found.num_parameters() == adapter.num_parameters()
    assert found.bytes == 4 * adapter.num_parameters()
    assert found.document.method == {"name": "lora", **rankfold.LoRA(rank=4).model_dump()}
    assert (found.document.base.class_, found.document.base.name_or_path) == ("LlamaForCausalLM", "org/tiny")
    assert found.document.base.parameters == sum(p.numel() for p in llama().parameters())


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = llama()
    adapter = trained(model)
    rankfold.save(model, tmp_path)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert file.metadata()["rankfold"] == (tmp_path / "adapter.json").read_text()
        for name, tensor in adapter.state_dict().items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_dtype_and_device_of_the_loaded_parameters(tmp_path: Path) -> None:
    model = llama()
    trained(model)
    rankfold.save(model, tmp_path)
    loaded = rankfold.load(llama().double(), tmp_path, dtype=torch.float64)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert {delta.site.dtype for delta in loaded.deltas.values()} == {torch.float64}


def test_a_number_too_large_for_the_asked_dtype_is_refused(tmp_path: Path) -> None:
    model = llama()
    adapter = trained(model)
    with torch.no_grad():
        next(adapter.parameters())[0, 0] = 1e6
    rankfold.save(model, tmp_path)
    rankfold.load(llama(), tmp_path)
    with pytest.raises(AdapterFileError, match=r"another dtype.*infinity"):
        rankfold.load(llama(), tmp_path, dtype=torch.float16)


def test_a_compiled_model_is_looked_through(tmp_path: Path) -> None:
    model = llama()
    trained(model)
    rankfold.save(model, tmp_path)
    expected = logits(model)
    other = llama()
    rankfold.load(torch.compile(other), tmp_path)
    assert torch.equal(logits(other), expected)


def test_all_of_a_model_in_full_copies(tmp_path: Path) -> None:
    """Only the module at the saved path comes back, not another one whose path ends alike."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "inner": nn.ModuleDict({"head": nn.Linear(4, 4)})})
    trained(model, targets=[], modules_to_save=["inner.head"])
    rankfold.save(model, tmp_path)
    rankfold.detach(model)
    assert list(rankfold.load(model, tmp_path).modules) == ["inner.head"]


# ---- saving


def test_saving_refuses_what_could_not_be_loaded(tmp_path: Path) -> None:
    model = llama()
    adapter = trained(model)
    rankfold.save(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        next(adapter.parameters())[0, 0] = float("nan")
    with pytest.raises(RankfoldError, match=r"not saved.*deltas\.model\.layers\.0\.self_attn\.q_proj\.A holds NaN"):
        rankfold.save(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_saving_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RankfoldError, match="no adapter is attached"):
        rankfold.save(llama(), tmp_path)
    model = llama()
    trained(model)
    with pytest.raises(RankfoldError, match=r"no adapter is called 'other'.*'default'"):
        rankfold.save(model, tmp_path, name="other")
    rankfold.set_active(model, None)
    with pytest.raises(RankfoldError, match="no adapter is active"):
        rankfold.save(model, tmp_path, name=None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RankfoldError, match="is a file"):
        rankfold.save(model, tmp_path / "file")


@pytest.mark.parametrize("failing", ["fsync", "replace", "interrupt", "second file"])
def test_a_save_that_fails_leaves_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    model = llama()
    adapter = trained(model)
    rankfold.save(model, tmp_path)
    old, old_logits = (tmp_path / "adapter.safetensors").read_bytes(), logits(model)
    with torch.no_grad():
        next(adapter.parameters()).add_(1.0)
    new_logits = logits(model)
    error: type[BaseException] = KeyboardInterrupt if failing == "interrupt" else OSError
    replace = Path.replace

    def fail(*_: object) -> None:
        raise error(28, "No space left on device")

    def fail_second(self: Path, target: Path) -> Path:
        return fail() if Path(target).name == "adapter.json" else replace(self, target)  # type: ignore[func-returns-value]

    if failing in ("fsync", "interrupt"):
        monkeypatch.setattr(files.os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail if failing == "replace" else fail_second)
    with pytest.raises(error):
        rankfold.save(model, tmp_path)
    monkeypatch.undo()

    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]
    other = llama()
    rankfold.load(other, tmp_path)
    if failing == "second file":  # the tensor file is new and whole, and its own document counts
        assert checkpoint.read(tmp_path).document.id != json.loads((tmp_path / "adapter.json").read_text())["id"]
        assert torch.equal(logits(other), new_logits)
    else:
        assert (tmp_path / "adapter.safetensors").read_bytes() == old
        assert torch.equal(logits(other), old_logits)


def test_a_cut_between_the_files_may_change_the_method(tmp_path: Path) -> None:
    """The old adapter.json says rank 4, the new tensors are of rank 2: the embedded document knows."""
    model = llama()
    trained(model, name="old")
    rankfold.save(model, tmp_path, name="old")
    before = (tmp_path / "adapter.json").read_bytes()
    trained(model, name="new", method=rankfold.LoRA(rank=2))
    expected = logits(model)
    rankfold.save(model, tmp_path, name="new")
    (tmp_path / "adapter.json").write_bytes(before)
    other = llama()
    assert rankfold.load(other, tmp_path).name == "new"
    assert torch.equal(logits(other), expected)
    (tmp_path / "adapter.json").unlink()
    assert checkpoint.read(tmp_path).document.name == "new"


# ---- the base it belongs to


def test_an_equal_base_in_another_form_is_taken_silently(tmp_path: Path) -> None:
    model = llama()
    trained(model)
    rankfold.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rankfold.load(llama().bfloat16(), tmp_path)
        rankfold.load(llama().half(), tmp_path)
        rankfold.load(llama().double(), tmp_path)


def test_a_slightly_different_base_warns_with_the_figure(tmp_path: Path) -> None:
    model = llama()
    trained(model)
    rankfold.save(model, tmp_path)
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape))
    with pytest.warns(UserWarning, match=r"differ .* by 0\.(0\d|1\d?)\b.*further trained") as caught:
        rankfold.load(other, tmp_path)
    assert caught[0].filename == __file__


def test_another_models_weights_are_refused_and_the_model_is_untouched(tmp_path: Path) -> None:
    model = llama()
    trained(model)
    rankfold.save(model, tmp_path)
    other = llama(seed=5)
    before = plant(other)
    with pytest.raises(
        AdapterFileError, match=r"differ .* by 1\.\d.*'LlamaForCausalLM' 'org/tiny' of [\d,]+ parameters.*strict=False"
    ):
        rankfold.load(other, tmp_path)
    assert plant(other) == before
    with pytest.warns(UserWarning, match="strict=False"):
        rankfold.load(other, tmp_path, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_of_another_structure_is_refused_by_layer_and_shape(tmp_path: Path, strict: bool) -> None:
    model = llama()
    trained(model)
    rankfold.save(model, tmp_path)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))
    for other, words in (
        (
            llama(width=64),
            r"q_proj' as 'linear' of 32×32.* 'linear' of 64×64.*'LlamaForCausalLM' 'org/tiny'",
        ),
        (
            gpt2,
            r"'model\.layers\.0\.self_attn\.q_proj'.*GPT2LMHeadModel has no such layer.*'LlamaForCausalLM' 'org/tiny'",
        ),
    ):
        before = plant(other)
        with pytest.raises(AdapterFileError, match=words):
            rankfold.load(other, tmp_path, strict=strict)
        assert plant(other) == before


def test_a_module_in_full_of_another_shape_is_refused(tmp_path: Path) -> None:
    def model(classes: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"body": nn.Linear(8, 8), "score": nn.Linear(8, classes)})

    first = model(3)
    trained(first, targets=["body"], modules_to_save=["score"])
    rankfold.save(first, tmp_path)
    with pytest.raises(AdapterFileError, match=r"score\.weight has shape 4×8 here, and the file holds one of 3×8"):
        rankfold.load(model(4), tmp_path)
    with pytest.raises(AdapterFileError, match=r"the module 'score' in full, and this ModuleDict has none"):
        rankfold.load(nn.ModuleDict({"body": first["body"]}), tmp_path)


def test_merged_weights_are_compared_by_their_originals(tmp_path: Path) -> None:
    model = llama()
    adapter = trained(model)
    rankfold.save(model, tmp_path)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(20)
    rankfold.merge(model, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rankfold.load(model, tmp_path, "again")
        rankfold.save(model, tmp_path / "two", name="again")
        rankfold.unmerge(model)
        rankfold.load(llama(), tmp_path / "two")


def test_the_sample_sees_a_weight_that_changed_in_place(tmp_path: Path) -> None:
    model = llama()
    trained(model)
    rankfold.save(model, tmp_path)
    rankfold.load(model, tmp_path, "again")
    for parameter in list(model.parameters()):
        if not parameter.requires_grad:
            parameter.data.normal_()
    with pytest.raises(AdapterFileError, match="another model's weights"):
        rankfold.load(model, tmp_path, "third")


def test_where_a_model_lay_on_disk_is_not_told(tmp_path: Path) -> None:
    model = llama()
    model.config._name_or_path = "/home/somebody/secret project/tiny"
    trained(model)
    rankfold.save(model, tmp_path)
    assert checkpoint.read(tmp_path).document.base.name_or_path == "tiny"
    assert "somebody" not in (tmp_path / "adapter.json").read_text()


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [1.0, 0.0], 1.0),
        ([3.0, 4.0], [-3.0, -4.0], 2.0),
        ([3.0, 4.0], [3.0, 3.0], 0.2),
    ],
)
def test_difference_is_relative_to_the_larger(theirs: list[float], ours: list[float], expected: float) -> None:
    assert fingerprint.difference({"a": theirs}, {"a": ours}) == pytest.approx(expected)
    assert fingerprint.difference({"a": theirs, "b": [1.0]}, {"a": ours, "b": [1.0]}) == pytest.approx(
        expected / 2**0.5
    )


def test_a_transposed_layer_has_the_same_sample() -> None:
    """The sample is of W (out, in), so GPT-2's transposed layer and a linear one agree."""
    from transformers.pytorch_utils import Conv1D

    from rankfold.core.targets import find

    linear, conv = nn.Linear(6, 10), Conv1D(10, 6)
    conv.weight.data = linear.weight.data.T.contiguous()
    for layer in (linear, conv):
        values = fingerprint.sample(find(nn.ModuleDict({"layer": layer}), ["layer"])[0].site, {})
        flat = linear.weight.detach().flatten()
        assert values == [float(flat[i * 59 // 15]) for i in range(16)]


# ---- where it comes from


def test_a_hub_id_is_downloaded_and_its_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model = llama()
    trained(model)
    repository = tmp_path / "models--org--adapter"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    rankfold.save(model, tmp_path / "plain")
    for name in ("adapter.json", "adapter.safetensors"):
        (tmp_path / "plain" / name).rename(blobs / f"hash-of-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-of-{name}")
    asked = []

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo, sorted(allow_patterns)))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    other = llama()
    rankfold.load(other, "org/adapter")
    assert asked == [("org/adapter", ["adapter.json", "adapter.safetensors"])]
    assert torch.equal(logits(other), logits(model))
    rankfold.load(other, snapshot, "again")  # the cache's own folder, given by hand


def test_what_cannot_be_downloaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        AdapterFileError, match=r"no folder 'org/adapter'.*cannot be downloaded.*ConnectionError: no route to host"
    ):
        rankfold.load(llama(), "org/adapter")


def test_a_missing_folder_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="there is no folder"):
        rankfold.load(llama(), tmp_path / "nowhere")


# ---- economy


def test_loaded_tensors_share_one_storage(tmp_path: Path) -> None:
    model = llama()
    trained(model)
    rankfold.save(model, tmp_path)
    loaded = rankfold.load(model, tmp_path, "again")
    storages = {tensor.untyped_storage().data_ptr() for tensor in loaded.state_dict().values()}
    assert len(storages) == 1
    total = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    assert next(loaded.parameters()).untyped_storage().nbytes() == total
