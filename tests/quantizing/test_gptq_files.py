"""GPTQ's files against a reader and a writer made here after AutoGPTQ's and GPTQModel's description of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rankfold
from rankfold.core.packed import PackedLinear, Scheme
from rankfold.errors import RankfoldError, UnsupportedError
from tests.train import tiny

IDS = torch.arange(3, 15)[None]
LAYER = "model.layers.1.mlp.down_proj"


def fields(words: list[int], bits: int, n: int) -> list[int]:
    """n numbers out of words of 32 bits: the first in the lowest bits, and on over the ends of words."""
    stream = sum((word % 2**32) << 32 * i for i, word in enumerate(words))
    return [stream >> bits * i & 2**bits - 1 for i in range(n)]


def words(values: list[int], bits: int) -> list[int]:
    stream = sum(value << bits * i for i, value in enumerate(values))
    unsigned = [stream >> 32 * i & 2**32 - 1 for i in range(len(values) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


def published(file: dict[str, Tensor], path: str, bits: int, v2: bool = False) -> Tensor:
    """W (out, in) as the format defines it: s (q − z), with 1 added to the zeros of the first version."""
    qweight, qzeros, scales = (file[f"{path}.{name}"] for name in ("qweight", "qzeros", "scales"))
    g_idx = file[f"{path}.g_idx"].long()
    rows, n = scales.shape[1], len(g_idx)
    assert qweight.dtype == qzeros.dtype == file[f"{path}.g_idx"].dtype == torch.int32
    q = torch.tensor([fields(column.tolist(), bits, n) for column in qweight.T])
    z = torch.tensor([fields(row.tolist(), bits, rows) for row in qzeros]) + (0 if v2 else 1)
    return scales.T[:, g_idx].double() * (q - z.T[:, g_idx])


def write_llama(folder: Path) -> Path:
    tiny.llama(hidden_size=64, head_dim=32, attention_bias=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def written(folder: Path, scheme: Scheme, out: Path, **asked: Any) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    rankfold.quantize(model, scheme, **asked)
    rankfold.save_quantized(model, out, format="gptq")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    return model, load_file(out / "model.safetensors"), config


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "group"), [(True, "channel"), (False, 32)])
def test_what_we_write_is_what_the_format_says(
    bits: int, symmetric: bool, group: Any, llama_dir: Path, tmp_path: Path
) -> None:
    scheme = Scheme(format=f"int{bits}", group=group, symmetric=symmetric)  # type: ignore[arg-type]
    model, file, config = written(llama_dir, scheme, tmp_path / "out")
    assert (config["quant_method"], config["bits"], config["sym"]) == ("gptq", bits, symmetric)
    assert config["group_size"] == (32 if group == 32 else -1)
    assert config["checkpoint_format"] == "gptq"
    layer = model.get_submodule(LAYER)
    assert torch.equal(published(file, LAYER, bits), layer.dequantise(torch.float64))
    assert not any(name.endswith(("q_proj.weight", ".zeros")) for name in file)
    again = rankfold.load_quantized(tmp_path / "out")
    assert isinstance(again.get_submodule(LAYER), PackedLinear)
    assert again.get_submodule(LAYER).scheme == scheme
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert model.config.quantization_config.quant_method == "rankfold"  # as before


def test_a_zero_of_zero_needs_the_second_version(llama_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    with torch.no_grad():
        model.get_submodule(LAYER).weight[0].abs_()
    rankfold.quantize(model, Scheme(group="channel"))
    rankfold.save_quantized(model, tmp_path / "out", format="gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"
    file = load_file(tmp_path / "out" / "model.safetensors")
    layer: Any = model.get_submodule(LAYER)
    assert torch.equal(published(file, LAYER, 4, v2=True), layer.dequantise(torch.float64))
    assert torch.equal(rankfold.load_quantized(tmp_path / "out")(IDS).logits, model(IDS).logits)


def foreign(folder: Path, bits: int, v2: bool, act_order: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """A checkpoint as other tools leave it, of random numbers; the weights that it stands for, by layer."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    file, expected = dict(model.state_dict()), {}
    for path, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear) or path == "lm_head":
            continue
        (rows, n), groups = layer.weight.shape, layer.weight.shape[1] // 32
        q = torch.randint(2**bits, (n, rows))
        z = torch.randint(1, 2**bits, (groups, rows))
        s = (torch.rand(groups, rows) / 2**bits).to(dtype)
        g_idx = torch.arange(n) // 32
        g_idx = g_idx[torch.randperm(n)] if act_order else g_idx
        held = {
            "qweight": torch.tensor([words(column.tolist(), bits) for column in q.T]).T,
            "qzeros": torch.tensor([words((row - (0 if v2 else 1)).tolist(), bits) for row in z]),
            "g_idx": g_idx,
        }
        del file[f"{path}.weight"]
        if layer.bias is not None:
            file[f"{path}.bias"] = torch.randn(rows)
        file |= {f"{path}.{name}": value.int().contiguous() for name, value in held.items()}
        file[f"{path}.scales"] = s
        expected[path] = (s[g_idx].double() * (q - z[g_idx])).T
    save_file(file, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    told = {"bits": bits, "group_size": 32, "desc_act": act_order, "sym": False, "quant_method": "gptq"}
    config["quantization_config"] = {**told, "checkpoint_format": "gptq_v2"} if v2 else told
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("v2", "act_order", "dtype"), [(False, True, torch.float16), (True, False, torch.bfloat16)])
def test_what_others_write_is_read_packed(
    bits: int, v2: bool, act_order: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = write_llama(tmp_path / "llama")
    expected = foreign(folder, bits, v2, act_order, dtype)
    model = rankfold.load_quantized(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for path, W in expected.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, PackedLinear)
        assert layer.scales.dtype == dtype
        assert layer.weight.numel() == layer.in_features * layer.out_features * bits // 8
        assert torch.equal(layer.dequantise(torch.float64), W)
        x = torch.randn(3, layer.in_features)
        bias = torch.zeros(1) if layer.bias is None else layer.bias.float()
        assert bias.any() == ("self_attn" in path)
        torch.testing.assert_close(layer(x), x @ W.T.float() + bias)
    adapter = rankfold.attach(model, rankfold.build("lora", rank=2))
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    rankfold.detach(model)
    rankfold.save_quantized(model, tmp_path / "ours")
    again = rankfold.load_quantized(tmp_path / "ours")
    assert torch.equal(again.get_submodule(LAYER).dequantise(torch.float64), expected[LAYER])
    rankfold.save_quantized(again, tmp_path / "theirs", format="gptq")
    file = load_file(tmp_path / "theirs" / "model.safetensors")
    assert torch.equal(published(file, LAYER, bits), expected[LAYER])
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert config["desc_act"] == act_order


def test_layers_that_stay_float_and_adapters_are_told(llama_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    rankfold.quantize(
        model, Scheme(), targets=lambda path, layer: path.endswith("up_proj"), compensate=rankfold.LoRC(rank=2)
    )
    expected = model(IDS).logits
    rankfold.save_quantized(model, tmp_path / "out", format="gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert r"-:^model\.layers\.0\.self_attn\.q_proj$" in config["dynamic"]
    assert not any("lm_head" in path or "up_proj" in path for path in config["dynamic"])
    again = rankfold.load_quantized(tmp_path / "out")
    rankfold.load(again, tmp_path / "out" / "compensation")
    torch.testing.assert_close(again(IDS).logits, expected)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme(format="nf4"), "nf4 with groups of 64"),
        (Scheme(along="out"), "along='out'"),
        (Scheme(group="tensor"), "groups of tensor"),
        (Scheme(activations="int8"), "nothing else"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(
    scheme: Scheme, message: str, llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        written(llama_dir, scheme, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_of_several_kinds_or_odd_sizes_are_refused(llama_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    rankfold.quantize(model, Scheme(), targets=lambda path, layer: path.endswith("up_proj"))
    rankfold.quantize(model, Scheme(format="int3"), targets=lambda path, layer: path.endswith("down_proj"))
    with pytest.raises(UnsupportedError, match="pack them alike"):
        rankfold.save_quantized(model, tmp_path / "out", format="gptq")
    odd = tiny.llama(intermediate_size=60)
    rankfold.quantize(odd, Scheme())
    with pytest.raises(UnsupportedError, match="whole words"):
        rankfold.save_quantized(odd, tmp_path / "out", format="gptq")


@pytest.mark.parametrize("damage", ["shape", "g_idx", "none", "format"])
def test_a_hostile_file_is_refused(damage: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    foreign(folder, 4, False, False, torch.float16)
    file = load_file(folder / "model.safetensors")
    if damage == "shape":
        file[f"{LAYER}.scales"] = file[f"{LAYER}.scales"][:, :5].contiguous()
    elif damage == "g_idx":
        file[f"{LAYER}.g_idx"][:] = 7
    elif damage == "none":
        file = {name: tensor for name, tensor in file.items() if not name.endswith("qweight")}
    else:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["checkpoint_format"] = "marlin"
        (folder / "config.json").write_text(json.dumps(config))
    save_file(file, folder / "model.safetensors", metadata={"format": "pt"})
    messages = {"shape": "none of GPTQ's files", "g_idx": "g_idx", "none": "no safetensors", "format": "'marlin'"}
    with pytest.raises(RankfoldError, match=messages[damage]):
        rankfold.load_quantized(folder)
