"""PortLLM: an adapter goes unchanged to an update of its base."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankfold
from rankfold import LoRA
from rankfold.compose.portllm import drift, port, unport
from rankfold.core.checkpoint import read
from rankfold.core.weightfiles import WeightFiles
from rankfold.errors import AdapterFileError, RankfoldError
from tests.contract.nets import KINDS, Block, Experts
from tests.contract.nets import TARGETS as SITES

SIZE = 0.05  # of the updates


class Net(nn.Module):
    """Layers as Transformers names and stores them, one of each kind that a file of weights can tell apart."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(20, 12)
        self.conv = nn.Conv1d(12, 10, 3, padding=1)
        self.fc = Conv1D(14, 10)
        self.out = nn.Linear(14, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.fc(self.conv(self.embed(ids).mT).mT.contiguous()).tanh())


TARGETS = ["embed", "conv", "fc", "out"]
IDS = torch.arange(15).view(3, 5)


def net(updates: int = 0) -> Net:
    """The base, and what became of it after so many updates."""
    torch.manual_seed(0)
    model = Net()
    for step in range(updates):
        rng = torch.Generator().manual_seed(10 + step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(SIZE * parameter.std() * torch.randn(parameter.shape, generator=rng))
    return model


def trained(model: nn.Module, name: str = "task", method: Any = None, **options: Any) -> rankfold.Adapter:
    adapter = rankfold.attach(model, method or LoRA(rank=3, alpha=6), TARGETS, name, **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) / 4)
    return adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter, and the weights of the base and of two updates, as files."""
    at = tmp_path_factory.mktemp("bases")
    model = net()
    trained(model)
    rankfold.save(model, at / "adapter", "task")
    for step in range(3):
        (at / f"base{step}").mkdir()
        save_file(net(step).state_dict(), at / f"base{step}" / "model.safetensors")
    return at


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def test_the_unchanged_base_is_bit_identical(folder: Path, tmp_path: Path) -> None:
    port(folder / "adapter", folder / "base0", tmp_path / "same")
    one, other = net(), net()
    rankfold.load(one, folder / "adapter")
    rankfold.load(other, tmp_path / "same")
    assert torch.equal(output(one), output(other))
    assert not torch.equal(output(one), output(net()))


def test_numbers_stay_and_the_document_says_where_it_sits(folder: Path, tmp_path: Path) -> None:
    _, drifts = port(folder / "adapter", folder / "base1", tmp_path / "new", old=folder / "base0")
    before, after = tensors(folder / "adapter"), tensors(tmp_path / "new")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = read(folder / "adapter").document, read(tmp_path / "new").document
    assert new.ported == [old.base]
    assert new.base.sample != old.base.sample
    assert new.base.parameters == sum(p.numel() for p in Net().parameters())
    assert (new.base.name_or_path, new.sha256, new.forced) == ("base1", old.sha256, None)
    with pytest.warns(UserWarning, match="differ"):  # the old file on the new base
        rankfold.load(net(1), folder / "adapter")
    model = net(1)
    rankfold.load(model, tmp_path / "new")  # which the new one does not: warnings are errors
    assert list(drifts) == TARGETS
    for name, one in drifts.items():
        W, W1 = (m.get_submodule(name).weight.detach() for m in (net(), net(1)))
        assert one.size == pytest.approx(float((W1 - W).norm() / W.norm()), rel=1e-5)
        assert one.size == pytest.approx(SIZE, rel=0.3)
        assert one.cosine is not None
        assert one.cosine > 0.9


def test_weights_in_memory_and_in_files_say_the_same(folder: Path, tmp_path: Path) -> None:
    _, files = port(folder / "adapter", folder / "base1", tmp_path / "a", old=folder / "base0")
    _, memory = port(folder / "adapter", net(1), tmp_path / "b", old=net())
    assert files == memory
    a, b = (read(tmp_path / one).document for one in "ab")
    assert a.base.sample == b.base.sample
    model = net(1)
    trained(model, "other")
    rankfold.merge(model, "other")
    with pytest.raises(RankfoldError, match="other merged into its weights: unmerge"):
        port(folder / "adapter", model, tmp_path / "c")


def test_one_layer_is_in_memory_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the new base and of the old one; what the adapter does not sit on is not read."""
    read_at, alive, most = WeightFiles.read, list[weakref.ref[torch.Tensor]](), 0

    def reading(self: WeightFiles, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read_at(self, name)
        alive.append(weakref.ref(tensor))
        names.append(name)
        most = max(most, sum(one() is not None for one in alive))
        return tensor

    names: list[str] = []
    monkeypatch.setattr(WeightFiles, "read", reading)
    port(folder / "adapter", folder / "base1", tmp_path / "a", old=folder / "base0")
    assert names == [f"{name}.weight" for name in TARGETS for _ in range(2)]
    assert 1 < most <= 3  # the next one comes in before the last one goes


def test_the_order_commutes() -> None:
    """(θ + Δθ) + Δθ_i = (θ + Δθ_i) + Δθ, and taking the patch away again gives θ' back."""
    model = net()
    adapter = trained(model)
    ported, _ = port(adapter, net(1))
    assert isinstance(ported.model, Net)
    updated = {name: p.detach().clone() for name, p in net(1).named_parameters()}
    rankfold.merge(model, "task")
    rankfold.merge(ported.model, "task")
    for name in TARGETS:
        first = ported.model.get_submodule(name).weight.detach().clone()
        update = updated[f"{name}.weight"] - net().get_submodule(name).weight.detach()
        torch.testing.assert_close(first, model.get_submodule(name).weight + update, rtol=0, atol=1e-6)
        assert not torch.equal(first, updated[f"{name}.weight"])
    rankfold.unmerge(ported.model)
    assert all(torch.equal(ported.model.get_parameter(f"{name}.weight"), updated[f"{name}.weight"]) for name in TARGETS)


def test_an_attached_one_goes_to_a_model_in_memory() -> None:
    model, other = net(), net(1)
    adapter = trained(model, modules_to_save=())
    before = output(model)
    ported, drifts = port(adapter, other, "again")
    assert (ported.name, ported.model) == ("again", other)
    assert drifts["out"].size == pytest.approx(SIZE, rel=0.3)  # its own base is at hand
    assert torch.equal(output(model), before)
    assert torch.equal(output(other), output(net(1)))  # inactive
    assert all(torch.equal(t, adapter.state_dict()[name]) for name, t in ported.state_dict().items())
    assert len(ported.ported) == 1


def test_a_chain_and_back(folder: Path, tmp_path: Path) -> None:
    port(folder / "adapter", folder / "base1", tmp_path / "1")
    port(tmp_path / "1", folder / "base2", tmp_path / "2")
    twice = read(tmp_path / "2").document
    original, once = read(folder / "adapter").document, read(tmp_path / "1").document
    assert twice.ported == [original.base, once.base]
    model = net(2)
    rankfold.load(model, tmp_path / "2")
    rankfold.save(model, tmp_path / "saved", "task")  # what it was ported from stays with it
    assert read(tmp_path / "saved").document.ported == twice.ported
    unport(tmp_path / "2", tmp_path / "1again")
    unport(tmp_path / "1again", tmp_path / "0again")
    back = read(tmp_path / "0again").document
    assert back.model_copy(update={"id": original.id}) == original
    assert all(torch.equal(t, tensors(tmp_path / "0again")[name]) for name, t in tensors(folder / "adapter").items())
    with pytest.raises(RankfoldError, match="never ported"):
        unport(tmp_path / "0again", tmp_path / "x")


def test_other_shapes_and_other_models_are_refused(folder: Path, tmp_path: Path) -> None:
    wider = net()
    wider.out, wider.fc = nn.Linear(14, 8), nn.Identity()
    for target in (wider, tmp_path / "wider"):
        if isinstance(target, Path):
            target.mkdir()
            save_file(wider.state_dict(), target / "model.safetensors")
        with pytest.raises(RankfoldError, match=r"fc.*out is 8×14, and the adapter's is 6×14.*trans-lora"):
            port(folder / "adapter", target, tmp_path / "x")
    torch.manual_seed(5)
    another = Net()
    with pytest.raises(RankfoldError, match=r"differ by 1\.\d+ .*another model's, no update"):
        port(folder / "adapter", another, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    _, drifts = port(folder / "adapter", another, tmp_path / "x", old=net(), force=True)
    assert "differ by 1." in str(read(tmp_path / "x").document.forced)
    assert all(one.size > 1 for one in drifts.values())
    rankfold.load(another, tmp_path / "x")


def test_drift_of_known_weights() -> None:
    W = torch.diag(torch.tensor([4.0, 2, 1, 0.5]))
    assert drift(W, W) == drift(W, W, 1)
    assert drift(W, W).size == 0
    assert drift(W, 1.5 * W, 2).size == pytest.approx(0.5)
    assert drift(W, 1.5 * W, 2).cosine == pytest.approx(1)
    swapped = W[[2, 3, 0, 1]][:, [2, 3, 0, 1]]  # the leading two directions are now the last two
    assert drift(W, swapped, 2).cosine == pytest.approx(0, abs=1e-6)
    c, s = 0.8, 0.6
    turned = W @ torch.block_diag(torch.tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]]), torch.eye(1)).T
    assert drift(W, turned, 1).cosine == pytest.approx((1 + 0.8) / 2, abs=0.05)  # the output's side, and the input's
    assert drift(torch.ones(3), torch.zeros(3)) == drift(torch.ones(3), torch.zeros(3), 2)
    assert drift(torch.ones(3), torch.zeros(3)).cosine is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str, tmp_path: Path) -> None:
    def made() -> nn.Module:
        torch.manual_seed(1)
        return Experts() if kind == "experts" else Block(kind)

    method = rankfold.build("bitfit") if kind == "norm" else LoRA(rank=2)
    model, updated = made(), made()
    with torch.no_grad():
        for parameter in updated.parameters():
            parameter.mul_(1.01)
    rankfold.attach(model, method, SITES.get(kind, ["fc1", "fc2"]))
    rankfold.save(model, tmp_path / "a")
    save_file(updated.state_dict(), tmp_path / "model.safetensors")
    _, files = port(tmp_path / "a", tmp_path / "model.safetensors", tmp_path / "b", old=made())
    _, memory = port(tmp_path / "a", updated, tmp_path / "c", old=made())
    assert files == memory
    assert all(one.size == pytest.approx(0 if kind == "norm" else 0.01, rel=1e-2) for one in files.values())
    rankfold.load(updated, tmp_path / "b")


def test_modules_in_full_and_compressed_ones_go_along(folder: Path, tmp_path: Path) -> None:
    model = net()
    rankfold.attach(model, LoRA(rank=2), ["conv"], "task", modules_to_save=["out"])
    rankfold.save(model, tmp_path / "a", "task")
    port(tmp_path / "a", folder / "base1", tmp_path / "b")
    wider = net(1)
    wider.out = nn.Linear(14, 8)
    with pytest.raises(RankfoldError, match=r"out\.bias, which the adapter holds in full"):
        port(tmp_path / "a", wider, tmp_path / "c")
    from rankfold.compose.compress import compress

    compress(folder / "adapter", rankfold.build("compeft"), tmp_path / "small")
    port(tmp_path / "small", folder / "base1", tmp_path / "ported")
    sizes = [(tmp_path / one / "adapter.safetensors").stat().st_size for one in ("small", "ported")]
    assert sizes[1] < sizes[0] + 2000
    one, other = net(), net(1)
    a, b = rankfold.load(one, tmp_path / "small"), rankfold.load(other, tmp_path / "ported")
    assert all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def test_damaged_files_are_refused(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "adapter" / "adapter.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "adapter.safetensors").write_bytes(bytes(data))
    with pytest.raises(AdapterFileError, match="damaged"):
        port(tmp_path, folder / "base1", tmp_path / "x")
    document = json.loads((folder / "adapter" / "adapter.json").read_text())
    assert document["ported"] == []
