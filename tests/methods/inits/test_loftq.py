"""LoftQ's card over real quantisers, and where it finds the unquantised weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rankfold
from rankfold.core.quantized import dense
from rankfold.core.weightfiles import WeightFiles
from rankfold.errors import RankfoldError
from rankfold.inits.loftq import LoftQ
from tests.methods.inits.tiny import tiny_llama, tokens
from tests.methods.support import DOUBLE, attached, change, close, draw, linear
from tests.quantizers import QUANTIZERS

WIDE = {"hidden_size": 64, "intermediate_size": 128}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))


def saved(model, path):
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return str(path)


def started(W, Q, rank, path, alpha=None):
    """The delta on a base Q whose reference W lies in a file."""
    save_file({"0.weight": torch.as_tensor(W, dtype=DOUBLE).contiguous()}, path)
    method = rankfold.LoRA(rank=rank, alpha=alpha)
    return attached(linear(Q), method, init=LoftQ(reference=str(path)), dtype=DOUBLE)[1]


@pytest.mark.parametrize("alpha", [1, 4])
def test_worked_numbers(alpha, tmp_path):
    """What rounding lost is diag(0.5, −0.25): rank 1 gets the larger half back, with √σ/√s in each factor."""
    delta = started([[2.5, 0], [0, 0.75]], [[2.0, 0], [0, 1]], 1, tmp_path / "w.safetensors", alpha)
    close(change(delta), [[0.5, 0], [0, 0]])
    close(delta.B.T @ delta.B, [[0.5 / alpha]])
    close(delta.A @ delta.A.T, [[0.5 / alpha]])
    assert "A0" not in delta._buffers


@pytest.mark.parametrize("quantizer", list(QUANTIZERS))
def test_nearer_to_the_weight_with_every_rank(quantizer, tmp_path):
    reference = saved(net(), tmp_path / "w.safetensors")
    W = net()[0].weight.detach()
    errors = []
    for rank in (1, 2, 8, 64):
        base = QUANTIZERS[quantizer](net())
        before = dense(base[0].weight, base[0]).float()
        method = rankfold.LoRA(rank=rank, alpha=2 * rank)
        adapter = rankfold.attach(base, method, targets=["0"], init=LoftQ(reference=reference))
        delta = adapter.deltas["0"]
        start = delta.adapted_weight(delta.W.float()).detach()
        sigma = torch.linalg.svdvals(W - before)
        torch.testing.assert_close((W - start).square().sum(), sigma[rank:].square().sum(), atol=1e-5, rtol=1e-4)
        errors.append((W - start).norm().item())
        assert torch.equal(delta.W, before.to(delta.W))  # the base stays as it was
    assert errors[0] < (W - before).norm()
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4  # rank 64 is all that was lost


def test_a_quantised_model_starts_nearer_to_the_model_it_was(tmp_path):
    tiny_llama(**WIDE).save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        plain = tiny_llama(**WIDE)(**tokens()).logits
    distances = []
    for init in (None, LoftQ(reference=str(tmp_path / "whole"))):
        model = QUANTIZERS["bitsandbytes-nf4"](tiny_llama(**WIDE))
        adapter = rankfold.attach(model, rankfold.LoRA(rank=16), init=init)
        with torch.no_grad():
            distances.append((model(**tokens()).logits - plain).norm().item())
    assert distances[1] < 0.8 * distances[0]
    model(**tokens()).loss.backward()
    assert all(delta.A.grad.any() and delta.B.grad.any() for delta in adapter.deltas.values())
    rankfold.save(model, tmp_path / "adapter")
    again = QUANTIZERS["bitsandbytes-nf4"](tiny_llama(**WIDE))
    loaded = rankfold.load(again, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(**tokens()).logits, model(**tokens()).logits)
    assert loaded.init == LoftQ(reference="whole")  # not where it lay
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter.json").read_text()


def test_a_base_restored_from_a_quantised_file_is_one_too(tmp_path):
    """Ordinary floats that were rounded on the way: there is no quantised layer, and what was lost counts alike."""
    W = draw(8, 6)
    delta = started(W, W.mul(4).round() / 4, 3, tmp_path / "w.safetensors")
    sigma = torch.linalg.svdvals(W - W.mul(4).round() / 4)
    close((W - delta.adapted_weight(delta.W).detach()).square().sum(), sigma[3:].square().sum(), atol=1e-10)


def test_other_layouts(tmp_path):
    """GPT-2 stores W transposed, a convolution has a kernel; the reference comes in the layer's own layout."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(8, 6), nn.Conv1d(4, 8, 3), nn.Embedding(9, 5))
    reference = saved(model, tmp_path / "w.safetensors")
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(1 + 0.1 * torch.randn_like(layer.weight))
    adapter = rankfold.attach(model, rankfold.LoRA(rank=5), ["0", "1", "2"], init=LoftQ(reference=reference))
    whole = WeightFiles.find(reference)
    wanted = [whole.read("0.weight").T, whole.read("1.weight").flatten(1), whole.read("2.weight").T]
    for delta, W in zip(adapter.deltas.values(), wanted, strict=True):
        lost = W - delta.W
        sigma = torch.linalg.svdvals(lost)
        close((lost - change(delta)).norm(), sigma[5:].norm(), atol=1e-5)


def test_every_place_the_weights_can_lie(tmp_path, monkeypatch):
    model = tiny_llama()
    name = "model.layers.1.mlp.down_proj.weight"
    wanted = model.get_parameter(name).detach()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    model.model.save_pretrained(tmp_path / "headless")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for place in ("whole", "shards", "headless", "whole/model.safetensors"):
        found = WeightFiles.find(str(tmp_path / place))
        assert torch.equal(found.read(name), wanted), place
    assert torch.equal(WeightFiles.find(str(tmp_path / "whole")).read(name.removeprefix("model.")), wanted)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: tmp_path / "shards")
    assert torch.equal(WeightFiles.find("org/name").read(name), wanted)
    import rankfold.train.models

    monkeypatch.setattr(rankfold.train.models, "gguf_directory", lambda path: tmp_path / "whole")
    (tmp_path / "model.gguf").touch()
    assert torch.equal(WeightFiles.find(str(tmp_path / "model.gguf")).read(name), wanted)


def test_only_the_tensor_asked_for_is_read(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="4KB")
    found = WeightFiles.find(str(tmp_path))
    name = "model.layers.0.self_attn.q_proj.weight"
    for path in set(found.files.values()) - {found.files[name]}:
        path.write_bytes(b"nothing of use")
    assert found.read(name).shape == (16, 16)
    with pytest.raises(RankfoldError, match=r"cannot read model.layers.1.mlp.down_proj.weight from"):
        found.read("model.layers.1.mlp.down_proj.weight")


def test_places_without_weights(tmp_path):
    with pytest.raises(RankfoldError, match="no weights at '/nowhere'"):
        WeightFiles.find("/nowhere")
    with pytest.raises(RankfoldError, match=r"holds neither model.safetensors nor"):
        WeightFiles.find(str(tmp_path))
    (tmp_path / "w.safetensors").write_text("text")
    with pytest.raises(RankfoldError, match=r"cannot read .* as safetensors"):
        WeightFiles.find(str(tmp_path / "w.safetensors"))
    for wrong in ("text", "[]", "{}", json.dumps({"weight_map": [1]})):
        (tmp_path / "model.safetensors.index.json").write_text(wrong)
        with pytest.raises(RankfoldError, match="is no index of shards"):
            WeightFiles.find(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../outside"}}))
    assert WeightFiles.find(str(tmp_path)).files["a"] == tmp_path / "outside"


def test_what_cannot_be(tmp_path):
    W, path = draw(6, 4), tmp_path / "w.safetensors"
    with pytest.raises(RankfoldError, match="the base at 0 equals the reference, so nothing was lost"):
        started(W, W, 2, path)
    with pytest.raises(RankfoldError, match=r"0.weight in .* has nothing to do with the base: another model"):
        started(W, draw(6, 4, seed=9), 2, path)
    with pytest.raises(RankfoldError, match=r"is a torch.float64 tensor \(5, 4\), expected floats for \(6, 4\)"):
        started(W[:5], W, 2, path)
    with pytest.raises(RankfoldError, match="divides the singular values by the scale"):
        started(W, W + 0.1, 2, path, alpha=0)
    save_file({"b.0.weight": W, "a.0.weight": W + 1, "other": W + 2}, path)
    with pytest.raises(RankfoldError, match=r"holds 2 tensors like '0.weight'; there are: a.0.weight, b.0.weight"):
        WeightFiles.find(str(path)).read("0.weight")
    with pytest.raises(RankfoldError, match=r"holds no tensors like '1.weight'"):
        WeightFiles.find(str(path)).read("1.weight")
    with pytest.raises(RankfoldError, match=r"reference: Field required \(hyperparameters of loftq: reference\)"):
        rankfold.build("loftq")


def test_the_registry_says_that_the_reference_is_required():
    (entry,) = [entry for entry in rankfold.methods() if entry.slug == "loftq"]
    assert json.loads(json.dumps(entry.as_dict()))["hyperparameters"] == {"reference": "required"}
