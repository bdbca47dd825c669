"""Adapters laid out for vLLM: PEFT gives the source's outputs from the files, and what vLLM refuses is not in them."""

import json
import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import rankfold
from rankfold.cli import run
from rankfold.errors import AdapterFileError, RankfoldError, UnsupportedError
from rankfold.serve.vllm import RANKS, export_vllm
from tests.train import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about what it fixes by itself
IDS = torch.arange(1, 13)[None]


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def write(folder: Path, method: Any, targets: Any = ("q_proj", "v_proj"), **options: Any) -> Tensor:
    """Save an adapter that does something, and say what the model gives with it."""
    model = llama()
    adapter = rankfold.attach(model, method, list(targets), **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    rankfold.save(model, folder)
    with torch.no_grad():
        return model(IDS).logits


def through_peft(folder: Path) -> Tensor:
    model = peft.PeftModel.from_pretrained(llama(), str(folder), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def as_vllm_reads(folder: Path) -> dict[str, Any]:
    """What vLLM checks when it loads an adapter: `r`, `lora_alpha`, and names of factors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["bias"], config["use_dora"], config["modules_to_save"]) == ("none", False, None)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, _, leaf = name.removeprefix("base_model.model.").rpartition(".lora_")
        assert path.rpartition(".")[2] in {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert tensor.shape[0 if leaf == "A.weight" else 1] == config["r"], name
    return config


def test_loras_of_any_ranks_are_exact(tmp_path: Path) -> None:
    """Mixed ranks and alphas, rsLoRA, and one whose start was taken out of the base (rank 2r)."""
    expected = {
        "mixed": write(
            tmp_path / "in" / "mixed",
            rankfold.LoRA(rank=3, alpha=5),
            overrides={"model.layers.1.self_attn.q_proj": {"rank": 9, "alpha": 2}},
        ),
        "rs": write(tmp_path / "in" / "rs", rankfold.LoRA(rank=2, rslora=True), ["down_proj"]),
        "pissa": write(tmp_path / "in" / "pissa", rankfold.LoRA(rank=4), init=rankfold.build("pissa")),
    }
    model = llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    manifest = export_vllm(model, [tmp_path / "in"], tmp_path / "out", base="org/base")
    assert not rankfold.adapters(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert [(one["name"], one["rank"], one["method"]) for one in manifest["adapters"]] == [
        ("mixed", 9, "lora"), ("pissa", 8, "lora"), ("rs", 2, "lora")
    ]  # fmt: skip
    assert (manifest["base"], manifest["max_lora_rank"]) == ("org/base", 16)
    for one in manifest["adapters"]:
        folder = tmp_path / "out" / one["path"]
        assert as_vllm_reads(folder)["r"] == one["rank"]
        assert one["error"] == 0
        torch.testing.assert_close(through_peft(folder), expected[one["name"]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dora", "vera", "loha", "ia3"])
def test_other_methods_within_their_error(method: str, tmp_path: Path) -> None:
    """Of full rank a method's outputs are its own; cut to 2, the error told is that of the weights."""
    expected = write(tmp_path / "in" / method, rankfold.build(method))
    export_vllm(llama(), [tmp_path / "in" / method], tmp_path / "out", base="base")
    as_vllm_reads(tmp_path / "out" / method)
    torch.testing.assert_close(through_peft(tmp_path / "out" / method), expected, rtol=1e-4, atol=1e-4)
    manifest = export_vllm(llama(), [tmp_path / "in" / method], tmp_path / "cut", base="base", rank=2)
    (told,) = manifest["adapters"]
    assert as_vllm_reads(tmp_path / "cut" / method)["r"] == told["rank"] == 2
    assert manifest["max_lora_rank"] == RANKS[0]
    ours, theirs = llama(), llama()
    rankfold.load(ours, tmp_path / "in" / method)
    rankfold.import_peft(theirs, tmp_path / "cut" / method)
    rankfold.merge(ours)
    rankfold.merge(theirs)
    errors = []
    for path in (f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")):
        W, ours_, theirs_ = (m.get_submodule(path).weight.detach() for m in (llama(), ours, theirs))
        errors.append(float((ours_ - theirs_).norm() / (ours_ - W).norm()))
    assert max(errors) > 0.01
    assert told["error"] == pytest.approx(max(errors), rel=1e-3)


def test_the_command_names_all(tmp_path: Path) -> None:
    write(tmp_path / "one", rankfold.LoRA(rank=8))
    write(tmp_path / "two+more", rankfold.LoRA(rank=12))
    model = llama()
    rankfold.load(model, tmp_path / "one")
    rankfold.export_peft(model, tmp_path / "peft" / "three")
    rankfold.detach(model)
    manifest = export_vllm(
        model, [tmp_path / "one", tmp_path / "two+more", tmp_path / "peft"], tmp_path / "out", base="a b"
    )
    assert shlex.split(manifest["command"]) == [
        *("vllm", "serve", "a b", "--enable-lora", "--max-lora-rank", "16", "--lora-modules"),
        *("one=one", "two+more=two+more", "three=three"),
    ]
    torch.testing.assert_close(through_peft(tmp_path / "out" / "one"), through_peft(tmp_path / "out" / "three"))


def test_what_vllm_cannot_serve_is_named_and_nothing_written(tmp_path: Path) -> None:
    write(tmp_path / "in" / "good", rankfold.LoRA(rank=2))
    for method, targets, options, told in (
        ("lora", ["embed_tokens"], {}, "no linear layer"),
        ("lora", ["q_proj"], {"modules_to_save": ["lm_head"]}, "in full"),
    ):
        write(tmp_path / "in" / "zbad", rankfold.build(method), targets, **options)
        with pytest.raises(UnsupportedError, match=f"zbad.*{told}"):
            export_vllm(llama(), [tmp_path / "in"], tmp_path / "out", base="base")
        assert {p.name for p in tmp_path.iterdir()} == {"in"}
    (tmp_path / "in" / "zbad" / "adapter.safetensors").write_bytes(b"nothing")
    model = llama()
    with pytest.raises(AdapterFileError, match="zbad"):
        export_vllm(model, [tmp_path / "in"], tmp_path / "out", base="base")
    assert not rankfold.adapters(model)


def test_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "same", rankfold.LoRA(rank=2))
    write(tmp_path / "b" / "same", rankfold.LoRA(rank=2))
    write(tmp_path / "c" / "x=y", rankfold.LoRA(rank=2))
    for folders, options, told in (
        (["a", "b"], {}, "one name"),
        (["c"], {}, "cannot hold that name"),
        (["d"], {}, "holds no adapter"),
        ([], {}, "no adapter was given"),
        (["a"], {"rank": 600}, "1 to 512"),
        (["a"], {"base": None}, "give base="),
    ):
        with pytest.raises(RankfoldError, match=told):
            export_vllm(llama(), [tmp_path / one for one in folders], tmp_path / "out", **{"base": "base", **options})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.write_llama(tmp_path / "llama")
    model = LlamaForCausalLM.from_pretrained(base)
    for name in ("one", "two"):
        rankfold.attach(model, rankfold.LoRA(rank=4), ["q_proj"], name=name)
        rankfold.save(model, tmp_path / "adapters" / name, name=name)
    monkeypatch.chdir(tmp_path)
    command = ["export", "adapters", "--model", "llama", "--output", "out"]
    assert run([*command, "--format", "vllm"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["base"] == str(base)
    assert "--max-lora-rank 8 --lora-modules one=one two=two" in capsys.readouterr().err
    assert as_vllm_reads(tmp_path / "out" / "two")["base_model_name_or_path"] == "llama"
    assert run([*command, "--format", "vllm"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run([*command, "--adapter", "adapters/one"]) == 2
    assert "--format peft writes one" in capsys.readouterr().err
