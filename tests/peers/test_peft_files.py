"""Adapters exchanged with PEFT through files, in both directions: same folder, same outputs."""

import copy
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import rankfold

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about what it fixes by itself
VOCABULARY = 40


def llama(cls: type = LlamaForCausalLM, layers: int = 2, **options: Any) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **options,
    )  # fmt: skip
    return cls(config)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, experts_implementation="eager",  # the other has no float64
        )
    )  # fmt: skip


class Convolutions(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1, stride=2, **options)
        self.conv2 = nn.Conv2d(8, 8, 1, bias=False)
        self.line = nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.line(self.conv2(torch.relu(self.conv1(x))).flatten(2)).mean(-1))


class Names(nn.Module):
    """Paths that end in one another: `proj`, `a.proj`, `a.a_proj`; and blocks 1 and 11."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.a = nn.ModuleDict({"proj": nn.Linear(8, 8), "a_proj": nn.Linear(8, 8)})
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a["a_proj"](self.a["proj"](self.proj(x)))
        for layer in self.layers:
            x = x + layer["proj"](x).tanh()
        return x


def fresh(make: Callable[..., nn.Module], dtype: torch.dtype = torch.float64, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.to(dtype).eval()


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, VOCABULARY, (3, 6), generator=generator)
    match inner:
        case Convolutions():
            return model(torch.randn(2, 4, 8, 8, generator=generator).to(dtype))
        case Names():
            return model(torch.randn(2, 8, generator=generator).to(dtype))
        case T5ForConditionalGeneration():
            return model(input_ids=ids, decoder_input_ids=ids).logits
    return model(input_ids=ids).logits


def scramble(parameters: Any, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.3 * noise).to(parameter.dtype))


def saved_by_peft(
    make: Callable[..., nn.Module], config: peft.PeftConfig, folder: Path, dtype: torch.dtype = torch.float64, **options: Any
) -> Tensor:
    """Save an adapter that PEFT made, with trained-like numbers; returns its outputs."""
    model = peft.get_peft_model(fresh(make, dtype), config)
    scramble(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(folder, **options)
    return outputs(model.eval())


def close(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def tolerance(dtype: torch.dtype) -> float:
    return 1e-10 if dtype == torch.float64 else 2e-6


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **options})


MLP = ["gate_proj", "up_proj", "down_proj"]
CONV = ["conv1", "conv2", "line"]
# What PEFT can save and we read: model, configuration.
FROM_PEFT: dict[str, tuple[Callable[..., nn.Module], Callable[[], peft.PeftConfig]]] = {
    "lora": (llama, lora),
    "lora-task": (llama, lambda: lora(task_type="CAUSAL_LM", lora_dropout=0.1)),
    "lora-rslora": (llama, lambda: lora(use_rslora=True)),
    "lora-patterns": (
        llama,
        lambda: lora(rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 4}, alpha_pattern={"^model.layers.0.mlp.down_proj": 7, "q_proj": 2.5}, use_rslora=True),
    ),
    "lora-regex": (llama, lambda: lora(target_modules=r".*\.(q|v)_proj")),
    "lora-all-linear": (llama, lambda: lora(r=2, target_modules="all-linear")),
    "lora-exclude": (llama, lambda: lora(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"])),
    "lora-exclude-regex": (llama, lambda: lora(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.0\..*v_proj")),
    "lora-layers": (llama, lambda: lora(layers_to_transform=[1])),
    "lora-layer": (llama, lambda: lora(layers_to_transform=0, layers_pattern="layers")),
    "lora-whole-path": (Names, lambda: lora(target_modules=["proj", "a.a_proj"])),
    "lora-embedding": (llama, lambda: lora(target_modules=["embed_tokens", "q_proj"])),
    "lora-modules": (llama, lambda: lora(modules_to_save=["lm_head", "embed_tokens"])),
    "lora-parameter-of-a-linear": (llama, lambda: lora(target_modules=["q_proj"], target_parameters=["o_proj.weight"])),
    "lora-gpt2": (gpt2, lambda: lora(target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True)),
    "lora-bert": (bert, lambda: lora(target_modules=["query", "value"], task_type="SEQ_CLS")),
    "lora-bert-module": (bert, lambda: lora(target_modules=["query"], modules_to_save=["classifier"])),
    "lora-t5": (t5, lambda: lora(target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM")),
    "lora-conv": (Convolutions, lambda: lora(target_modules=CONV, modules_to_save=["head"])),
    "lora-experts": (mixtral, lambda: lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    "lora-experts-only": (mixtral, lambda: lora(target_modules=[], target_parameters=["experts.down_proj"], rank_pattern={"layers.1.mlp.experts.down_proj": 2})),
    "lora-gaussian": (llama, lambda: lora(init_lora_weights="gaussian")),
    "dora": (llama, lambda: lora(use_dora=True)),
    "dora-rslora": (llama, lambda: lora(use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2})),
    "dora-embedding": (llama, lambda: lora(use_dora=True, target_modules=["embed_tokens", "o_proj"])),
    "dora-gpt2": (gpt2, lambda: lora(use_dora=True, target_modules=["c_attn", "c_fc"])),
    "dora-conv": (Convolutions, lambda: lora(use_dora=True, target_modules=CONV)),
    "vera": (llama, lambda: peft.VeraConfig(r=6, target_modules=["q_proj", "k_proj", "down_proj"], projection_prng_key=11)),
    "vera-gpt2": (gpt2, lambda: peft.VeraConfig(r=6, target_modules=["c_attn", "c_fc"])),
    "vera-bert": (bert, lambda: peft.VeraConfig(r=6, target_modules=["query"], task_type="SEQ_CLS")),
    "ia3": (llama, lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3-square": (llama, lambda: peft.IA3Config(target_modules=["q_proj", "o_proj"], feedforward_modules=["o_proj"])),
    "ia3-regex": (llama, lambda: peft.IA3Config(target_modules=r".*(k|up|down)_proj", feedforward_modules=r".*1.*(up|down)_proj")),
    "ia3-no-feedforward": (bert, lambda: peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[])),
    "ia3-no-dot": (Names, lambda: peft.IA3Config(target_modules=["proj", "a_proj"], feedforward_modules=["proj"])),
    "ia3-gpt2": (gpt2, lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "ia3-conv": (Convolutions, lambda: peft.IA3Config(target_modules=["conv1", "conv2"], feedforward_modules=["conv2"])),
    "randlora": (llama, lambda: peft.RandLoraConfig(r=5, target_modules=["q_proj", "o_proj", *MLP], randlora_alpha=7)),
    "randlora-one-base": (llama, lambda: peft.RandLoraConfig(r=16, target_modules=["q_proj", "k_proj"])),
    "randlora-sparse": (gpt2, lambda: peft.RandLoraConfig(r=4, target_modules=["c_attn", "c_proj"], sparse=True)),
    "miss-bat": (llama, lambda: peft.MissConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"], init_weights="bat")),
    "miss": (bert, lambda: peft.MissConfig(r=5, target_modules=["query", "output.dense"])),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", FROM_PEFT)
def test_reads_what_peft_saved(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, config = FROM_PEFT[case]
    expected = saved_by_peft(make, config(), tmp_path, dtype)
    model = fresh(make, dtype)
    base = outputs(model)
    assert close(base, expected) > 1e-3
    adapter = rankfold.import_peft(model, tmp_path)
    assert adapter.name == "default"
    assert close(outputs(model), expected) < tolerance(dtype)
    rankfold.detach(model)
    assert torch.equal(outputs(model), base)


@pytest.mark.parametrize("case", FROM_PEFT)
def test_goes_to_peft_and_back_with_equal_state(case: str, tmp_path: Path) -> None:
    make, config = FROM_PEFT[case]
    expected = saved_by_peft(make, config(), tmp_path / "theirs")
    model = fresh(make)
    first = rankfold.import_peft(model, tmp_path / "theirs", name="first")
    assert rankfold.export_peft(model, tmp_path / "ours", name="first") == tmp_path / "ours"
    again = peft.PeftModel.from_pretrained(fresh(make), tmp_path / "ours")
    assert close(outputs(again), expected) < 1e-10
    second = rankfold.import_peft(model, tmp_path / "ours", name="second")
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(tensor, second.state_dict()[key]) for key, tensor in first.state_dict().items())
    assert second.method == first.method or case == "ia3-no-dot"
    # What came from PEFT is as good as ours: saved, loaded, and the same.
    rankfold.save(model, tmp_path / "rankfold", name="second")
    other = fresh(make)
    rankfold.load(other, tmp_path / "rankfold")
    assert close(outputs(other), expected) < 1e-10


# What we make and PEFT reads: model, method, targets, further arguments of attach.
TO_PEFT: dict[str, tuple[Callable[..., nn.Module], Callable[[], Any], Any, dict[str, Any]]] = {
    "lora": (llama, lambda: rankfold.LoRA(rank=4), "all-linear", {}),
    "lora-options": (llama, lambda: rankfold.LoRA(rank=3, alpha=7.5, rslora=True, dropout=0.1), "attention", {}),
    "lora-overrides": (
        lambda: llama(layers=12), lambda: rankfold.LoRA(rank=2), ["q_proj", "v_proj"],
        {"overrides": {"layers.1.self_attn.q_proj": {"rank": 5}, r".*\.11\..*": {"alpha": 3.0}, r".*\.7\..*": {"rank": 3, "rslora": True}}},
    ),
    "lora-one-of-many": (Names, lambda: rankfold.LoRA(rank=2), lambda name, _: name in ("proj", "layers.1.proj"), {"overrides": {"proj": {"alpha": 9.0}}}),
    "lora-suffixes": (Names, lambda: rankfold.LoRA(rank=2), ["proj"], {"overrides": {r"proj": {"rank": 3}, r"a\.proj": {"rank": 4}, r"layers\.1\.proj": {"rank": 5}}}),
    "lora-gpt2": (gpt2, lambda: rankfold.LoRA(rank=4), ["c_attn", "mlp.c_proj", "wte", "wpe"], {}),
    "lora-head": (bert, lambda: rankfold.LoRA(rank=2), ["query"], {"modules_to_save": ["classifier"]}),
    "lora-no-head": (bert, lambda: rankfold.LoRA(rank=2), ["query"], {}),
    "lora-on-head": (lambda: llama(LlamaForSequenceClassification), lambda: rankfold.LoRA(rank=2), ["q_proj", "score"], {}),
    "lora-t5": (t5, lambda: rankfold.LoRA(rank=2), ["q", "v"], {}),
    "lora-conv": (Convolutions, lambda: rankfold.LoRA(rank=4), CONV, {}),
    "lora-experts": (mixtral, lambda: rankfold.LoRA(rank=3, dropout=0.1), ["gate_up_proj", "down_proj", "o_proj"], {}),
    "dora": (gpt2, lambda: rankfold.DoRA(rank=3, alpha=4), ["c_attn", "wte"], {"overrides": {"wte": {"rank": 2}}}),
    "dora-conv": (Convolutions, lambda: rankfold.DoRA(rank=3), CONV, {}),
    "vera": (llama, lambda: rankfold.VeRA(rank=8), "all-linear", {"seed": 3}),
    "ia3": (llama, lambda: rankfold.IA3(), "all-linear", {}),
    "ia3-gpt2": (gpt2, lambda: rankfold.IA3(), ["c_attn", "c_proj"], {}),
    "randlora": (llama, lambda: rankfold.RandLoRA(rank=4, scaling="bases"), ["q_proj", "o_proj", "gate_proj"], {"seed": 3}),
    "randlora-padded": (llama, lambda: rankfold.RandLoRA(rank=5), ["gate_proj", "down_proj"], {}),
    "bone": (llama, lambda: rankfold.Bone(rank=4), "all-linear", {}),
    "bone-later": (llama, lambda: rankfold.Bone(rank=6, variant="bone"), "mlp", {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", TO_PEFT)
def test_peft_reads_what_we_export(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, method, targets, options = TO_PEFT[case]
    model = fresh(make, dtype)
    base = outputs(model)
    adapter = rankfold.attach(model, method(), targets=targets, **options)
    scramble(adapter.parameters())
    adapter.train(False)
    expected = outputs(model)
    assert close(expected, base) > 1e-3
    rankfold.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh(make, dtype), tmp_path)
    assert close(outputs(theirs), expected) < tolerance(dtype)
    # They find the same layers, and nothing is left unread in the file.
    assert {key.removeprefix("base_model.model.") for key in peft.get_peft_model_state_dict(theirs)} - _base(theirs) == {
        key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter_model.safetensors")
    }
    again = rankfold.import_peft(model, tmp_path, name="again")
    mine = {key: value for key, value in adapter.state_dict().items() if not key.startswith("shared.")}
    back = {key: value for key, value in again.state_dict().items() if not key.startswith("shared.")}
    assert mine.keys() == back.keys()
    assert all(torch.equal(tensor, back[key]) for key, tensor in mine.items())
    assert close(outputs(model), expected) < tolerance(dtype)


def _base(model: nn.Module) -> set[str]:
    """Names under which PEFT also saves weights of the base."""
    return {key.removeprefix("base_model.model.") for key in model.state_dict() if ".base_layer." in key and "lora_" not in key}
