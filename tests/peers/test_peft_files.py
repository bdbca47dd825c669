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
    GptOssConfig,
    GptOssForCausalLM,
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
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    )


def mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, experts_implementation="eager",  # the other has no float64
        )
    )  # fmt: skip


def gpt_oss() -> nn.Module:
    """Its experts are stored as (E, in, out)."""
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, num_local_experts=4, experts_implementation="eager",
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
    make: Callable[..., nn.Module],
    config: peft.PeftConfig,
    folder: Path,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Tensor:
    """Save an adapter that PEFT made, with trained-like numbers; returns its outputs."""
    model = peft.get_peft_model(fresh(make, dtype), config)
    # AdaLoRA's ranknum is no parameter of the adapter, though PEFT turns on its gradient along with the others'.
    scramble(p for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name)
    model.save_pretrained(folder, **options)
    return outputs(model.eval())


def close(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def tolerance(dtype: torch.dtype, case: str = "") -> float:
    """PEFT keeps a spectrum, LoHa's scale and AdaLoRA's rank in float32, in a float64 model too."""
    rounded = case.startswith(("fourierft", "loha", "adalora"))
    return 1e-10 if dtype == torch.float64 and not rounded else 5e-6


def in_both(cases: dict[str, Any], *also: str) -> list[Any]:
    """Every case in float64, where a wrong layout cannot hide in rounding, and some in float32 too."""
    return [pytest.param(case, torch.float64, id=case) for case in cases] + [
        pytest.param(case, torch.float32, id=f"{case}-float32") for case in also
    ]


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **options})


def dora(**options: Any) -> peft.LoraConfig:
    return lora(use_dora=True, **options)


def vera(*targets: str, **options: Any) -> peft.VeraConfig:
    return peft.VeraConfig(target_modules=list(targets), **{"r": 6, **options})


def ia3(targets: str | list[str], feedforward: str | list[str]) -> peft.IA3Config:
    return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)


def randlora(*targets: str, **options: Any) -> peft.RandLoraConfig:
    return peft.RandLoraConfig(target_modules=list(targets), **options)


def miss(*targets: str, **options: Any) -> peft.MissConfig:
    return peft.MissConfig(target_modules=list(targets), **options)


def oft(*targets: str, **options: Any) -> peft.OFTConfig:
    return peft.OFTConfig(target_modules=list(targets), **{"r": 0, "oft_block_size": 4, **options})


def boft(*targets: str, **options: Any) -> peft.BOFTConfig:
    return peft.BOFTConfig(target_modules=list(targets), **options)


def loha(*targets: str, **options: Any) -> peft.LoHaConfig:
    return peft.LoHaConfig(target_modules=list(targets), **{"r": 3, "alpha": 5, **options})


def lokr(*targets: str, **options: Any) -> peft.LoKrConfig:
    return peft.LoKrConfig(target_modules=list(targets), **{"r": 1, "alpha": 5, **options})


def fourierft(*targets: str, **options: Any) -> peft.FourierFTConfig:
    return peft.FourierFTConfig(target_modules=list(targets), **{"n_frequency": 50, "scaling": 20.0, **options})


def adalora(*targets: str, **options: Any) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(target_modules=list(targets), total_step=10, **{"init_r": 3, "lora_alpha": 5, **options})


CONV = ["conv1", "conv2", "line"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
PATTERNS = {
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 4},
    "alpha_pattern": {"^model.layers.0.mlp.down_proj": 7, "q_proj": 2.5},
}
ONE_EXPERT = {"target_parameters": BOTH[1:], "rank_pattern": {"layers.1.mlp.experts.down_proj": 2}}
QV = ["q_proj", "v_proj"]
# What PEFT can save and we read: model, configuration.
FROM_PEFT: dict[str, tuple[Callable[..., nn.Module], Callable[[], peft.PeftConfig]]] = {
    "lora": (llama, lora),
    "lora-task": (llama, lambda: lora(task_type="CAUSAL_LM", lora_dropout=0.1)),
    "lora-rslora": (llama, lambda: lora(use_rslora=True)),
    "lora-patterns": (llama, lambda: lora(use_rslora=True, **PATTERNS)),
    "lora-regex": (llama, lambda: lora(target_modules=r".*\.(q|v)_proj")),
    "lora-all-linear": (llama, lambda: lora(r=2, target_modules="all-linear")),
    "lora-exclude": (llama, lambda: lora(target_modules=QV, exclude_modules=["layers.0.self_attn.q_proj"])),
    "lora-exclude-regex": (llama, lambda: lora(target_modules=QV, exclude_modules=r".*\.0\..*v_proj")),
    "lora-layers": (llama, lambda: lora(layers_to_transform=[1])),
    "lora-layer": (llama, lambda: lora(layers_to_transform=0, layers_pattern="layers")),
    "lora-whole-path": (Names, lambda: lora(target_modules=["proj", "a.a_proj"])),
    "lora-embedding": (llama, lambda: lora(target_modules=["embed_tokens", "q_proj"])),
    "lora-modules": (llama, lambda: lora(modules_to_save=["lm_head", "embed_tokens"])),
    "lora-parameter": (llama, lambda: lora(target_modules=["q_proj"], target_parameters=["o_proj.weight"])),
    "lora-gpt2": (gpt2, lambda: lora(target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True)),
    "lora-bert": (bert, lambda: lora(target_modules=["query", "value"], task_type="SEQ_CLS")),
    "lora-bert-module": (bert, lambda: lora(target_modules=["query"], modules_to_save=["classifier"])),
    "lora-t5": (t5, lambda: lora(target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM")),
    "lora-conv": (Convolutions, lambda: lora(target_modules=CONV, modules_to_save=["head"])),
    "lora-experts": (mixtral, lambda: lora(target_modules=["q_proj"], target_parameters=BOTH)),
    "lora-one-expert": (mixtral, lambda: lora(target_modules=[], **ONE_EXPERT)),
    "lora-transposed-experts": (gpt_oss, lambda: lora(target_modules=["q_proj"], target_parameters=BOTH)),
    "lora-gaussian": (llama, lambda: lora(init_lora_weights="gaussian")),
    "dora": (llama, dora),
    "dora-rslora": (llama, lambda: dora(use_rslora=True, rank_pattern={"q_proj": 2})),
    "dora-embedding": (llama, lambda: dora(target_modules=["embed_tokens", "o_proj"])),
    "dora-gpt2": (gpt2, lambda: dora(target_modules=["c_attn", "c_fc"])),
    "dora-conv": (Convolutions, lambda: dora(target_modules=CONV)),
    "vera": (llama, lambda: vera("q_proj", "k_proj", "down_proj", projection_prng_key=11)),
    "vera-gpt2": (gpt2, lambda: vera("c_attn", "c_fc")),
    "vera-bert": (bert, lambda: vera("query", task_type="SEQ_CLS")),
    "ia3": (llama, lambda: ia3(["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    "ia3-square": (llama, lambda: ia3(["q_proj", "o_proj"], ["o_proj"])),
    "ia3-regex": (llama, lambda: ia3(r".*(k|up|down)_proj", r".*1.*(up|down)_proj")),
    "ia3-no-feedforward": (bert, lambda: ia3(["key", "value"], [])),
    "ia3-no-dot": (Names, lambda: ia3(["proj", "a_proj"], ["proj"])),
    "ia3-gpt2": (gpt2, lambda: ia3(["c_attn", "mlp.c_proj"], ["mlp.c_proj"])),
    "ia3-conv": (Convolutions, lambda: ia3(["conv1", "conv2"], ["conv2"])),
    "randlora": (llama, lambda: randlora("q_proj", "o_proj", "gate_proj", "down_proj", r=5, randlora_alpha=7)),
    "randlora-one-base": (llama, lambda: randlora("q_proj", "k_proj", r=16)),
    "randlora-sparse": (gpt2, lambda: randlora("c_attn", "c_proj", r=4, sparse=True)),
    "miss-bat": (llama, lambda: miss("q_proj", "k_proj", "down_proj", r=4, init_weights="bat")),
    "miss": (bert, lambda: miss("query", "output.dense", r=5)),
    "miss-mini": (llama, lambda: miss("q_proj", "down_proj", r=5, init_weights="mini", mini_r=8)),
    "oft": (llama, lambda: oft("q_proj", "down_proj", use_cayley_neumann=False)),
    "oft-neumann": (llama, lambda: oft("q_proj", "k_proj", oft_block_size=32)),
    "oft-few-terms": (bert, lambda: oft("query", num_cayley_neumann_terms=3)),
    "oft-number": (llama, lambda: oft("q_proj", "down_proj", r=3, oft_block_size=0, use_cayley_neumann=False)),
    "boft": (llama, lambda: boft("q_proj", "down_proj")),
    "boft-number": (llama, lambda: boft("q_proj", "down_proj", boft_block_size=0, boft_block_num=2)),
    "boft-without-kernel": (llama, lambda: boft("q_proj", "down_proj", boft_n_butterfly_factor=2)),
    "boft-conv": (Convolutions, lambda: boft("conv1", "conv2", boft_block_size=2)),
    "loha": (llama, lambda: loha("q_proj", "down_proj", **PATTERNS)),
    "loha-thin": (llama, lambda: loha("q_proj", "down_proj", r=2)),
    "loha-conv": (Convolutions, lambda: loha(*CONV, "head")),
    "lokr": (llama, lambda: lokr("q_proj", "down_proj", **PATTERNS)),
    "lokr-whole": (llama, lambda: lokr("q_proj", "down_proj", r=8, init_weights="lycoris")),
    "lokr-both": (llama, lambda: lokr("q_proj", "down_proj", decompose_both=True, decompose_factor=4)),
    "lokr-conv": (Convolutions, lambda: lokr("conv1", "conv2", "head", r=2)),
    "lokr-conv-whole": (Convolutions, lambda: lokr("conv1", "conv2", "head", r=8)),
    "fourierft": (llama, lambda: fourierft("q_proj", "down_proj", random_loc_seed=3)),
    "fourierft-pattern": (gpt2, lambda: fourierft("c_attn", "c_proj", n_frequency_pattern={"mlp.c_proj": 20})),
    "adalora": (llama, lambda: adalora("q_proj", "down_proj")),
    "adalora-gpt2": (gpt2, lambda: adalora("c_attn", "c_fc", init_r=5, lora_alpha=0)),
    "adalora-conv": (Convolutions, lambda: adalora("conv1", "conv2")),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    in_both(FROM_PEFT, "lora", "lora-experts", "dora", "vera", "randlora", "miss-bat", "oft", "loha", "lokr"),
)
def test_reads_what_peft_saved(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, config = FROM_PEFT[case]
    expected = saved_by_peft(make, config(), tmp_path, dtype)
    model = fresh(make, dtype)
    base = outputs(model)
    assert close(base, expected) > 1e-3
    adapter = rankfold.import_peft(model, tmp_path)
    assert adapter.name == "default"
    assert close(outputs(model), expected) < tolerance(dtype, case)
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
    assert close(outputs(again), expected) < tolerance(torch.float64, case)
    second = rankfold.import_peft(model, tmp_path / "ours", name="second")
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(tensor, second.state_dict()[key]) for key, tensor in first.state_dict().items())
    if first.method.slug != "ia3":  # it can say the same gains in several ways
        assert [method_at(second, site) for site in second.deltas] == [method_at(first, site) for site in first.deltas]
    # What came from PEFT is as good as ours: saved, loaded, and the same.
    rankfold.save(model, tmp_path / "rankfold", name="second")
    other = fresh(make)
    rankfold.load(other, tmp_path / "rankfold")
    assert close(outputs(other), expected) < tolerance(torch.float64, case)


OVERRIDES = {
    "layers.1.self_attn.q_proj": {"rank": 5},
    r".*\.11\..*": {"alpha": 3.0},
    r".*\.7\..*": {"rank": 3, "rslora": True},
}
SUFFIXES = {"layers.1.proj": {"rank": 5}, "a.proj": {"rank": 4}, "pro[j]": {"rank": 3}}


def some(*paths: str) -> Callable[[str, nn.Module], bool]:
    return lambda name, module: name in paths


def method_at(adapter: rankfold.Adapter, site: str) -> rankfold.Method:
    return adapter.methods.get(site, adapter.method)


OVERRIDES_OF_Q = {"layers.1.self_attn.q_proj": {"rank": 5, "alpha": 2.0}}
# What we make and PEFT reads: model, method, targets, further arguments of attach.
TO_PEFT: dict[str, tuple[Callable[..., nn.Module], Callable[[], Any], Any, dict[str, Any]]] = {
    "lora": (llama, lambda: rankfold.LoRA(rank=4), "all-linear", {}),
    "lora-options": (llama, lambda: rankfold.LoRA(rank=3, alpha=7.5, rslora=True, dropout=0.1), "attention", {}),
    "lora-overrides": (lambda: llama(layers=12), lambda: rankfold.LoRA(rank=2), QV, {"overrides": OVERRIDES}),
    "lora-one-of-many": (
        Names,
        lambda: rankfold.LoRA(rank=2),
        some("proj", "layers.1.proj"),
        {"overrides": {"layers.1.proj": {"alpha": 9.0}}},
    ),
    "lora-suffixes": (Names, lambda: rankfold.LoRA(rank=2), ["proj"], {"overrides": SUFFIXES}),
    "lora-gpt2": (gpt2, lambda: rankfold.LoRA(rank=4), ["c_attn", "mlp.c_proj", "wte", "wpe"], {}),
    "lora-head": (bert, lambda: rankfold.LoRA(rank=2), ["query"], {"modules_to_save": ["classifier"]}),
    "lora-no-head": (bert, lambda: rankfold.LoRA(rank=2), ["query"], {}),
    "lora-on-head": (
        lambda: llama(LlamaForSequenceClassification),
        lambda: rankfold.LoRA(rank=2),
        ["q_proj", "score"],
        {},
    ),
    "lora-t5": (t5, lambda: rankfold.LoRA(rank=2), ["q", "v"], {}),
    "lora-conv": (Convolutions, lambda: rankfold.LoRA(rank=4), CONV, {}),
    "lora-experts": (mixtral, lambda: rankfold.LoRA(rank=3, dropout=0.1), ["gate_up_proj", "down_proj", "o_proj"], {}),
    "lora-transposed-experts": (gpt_oss, lambda: rankfold.LoRA(rank=3), ["gate_up_proj", "down_proj"], {}),
    "dora": (gpt2, lambda: rankfold.DoRA(rank=3, alpha=4), ["c_attn", "wte"], {"overrides": {"wte": {"rank": 2}}}),
    "dora-conv": (Convolutions, lambda: rankfold.DoRA(rank=3), CONV, {}),
    "vera": (llama, lambda: rankfold.VeRA(rank=8), "all-linear", {"seed": 3}),
    "ia3": (llama, rankfold.IA3, "all-linear", {}),
    "ia3-gpt2": (gpt2, rankfold.IA3, ["c_attn", "c_proj"], {}),
    "randlora": (llama, lambda: rankfold.RandLoRA(rank=4, scaling="bases"), ["q_proj", "gate_proj"], {"seed": 3}),
    "randlora-padded": (llama, lambda: rankfold.RandLoRA(rank=5), ["gate_proj", "down_proj"], {}),
    "bone": (llama, lambda: rankfold.Bone(rank=4), "all-linear", {}),
    "bone-later": (llama, lambda: rankfold.Bone(rank=6, variant="bone"), "mlp", {}),
    "miss": (llama, lambda: rankfold.MiSS(rank=6, dropout=0.1), "mlp", {}),
    "miss-mini": (llama, lambda: rankfold.MiSS(rank=6, mini=4), "mlp", {}),
    "oft": (llama, rankfold.OFT, "all-linear", {}),
    "oft-blocks": (llama, lambda: rankfold.OFT(neumann=6), QV, {"overrides": {"v_proj": {"block_size": 16}}}),
    "oft-number": (
        llama,
        lambda: rankfold.OFT(block_size=8),
        "all-linear",
        {"overrides": {"down_proj": {"block_size": 16}}},
    ),
    "boft": (llama, lambda: rankfold.BOFT(m=1), "all-linear", {}),
    "boft-number": (llama, lambda: rankfold.BOFT(m=1), "mlp", {"overrides": {"down_proj": {"block_size": 16}}}),
    "boft-conv": (Convolutions, lambda: rankfold.BOFT(m=1, block_size=4), ["conv1", "conv2"], {}),
    "loha": (llama, lambda: rankfold.LoHa(rank=2, alpha=3.5), QV, {"overrides": OVERRIDES_OF_Q}),
    "loha-conv": (Convolutions, lambda: rankfold.LoHa(rank=3), CONV, {}),
    "lokr": (llama, lambda: rankfold.LoKr(rank=1), "all-linear", {"overrides": OVERRIDES_OF_Q}),
    "lokr-factor": (llama, lambda: rankfold.LoKr(rank=1, factor=2, decompose_both=True), "mlp", {}),
    "lokr-conv": (Convolutions, lambda: rankfold.LoKr(rank=4), ["conv1", "conv2", "head"], {}),
    "fourierft": (llama, lambda: rankfold.FourierFT(alpha=20.0), "all-linear", {}),
    "fourierft-gpt2": (gpt2, lambda: rankfold.FourierFT(n=30, alpha=20.0, entry_seed=5), ["c_attn", "c_proj"], {}),
    "adalora": (llama, lambda: rankfold.AdaLoRASVD(rank=3, alpha=4), QV, {}),
    "adalora-ranks": (
        gpt2,
        lambda: rankfold.AdaLoRASVD(rank=4),
        ["c_attn", "c_proj"],
        {"overrides": {"mlp.c_proj": {"rank": 2}}},
    ),
    "adalora-conv": (Convolutions, lambda: rankfold.AdaLoRASVD(rank=2), ["conv1", "conv2"], {}),
}


@pytest.mark.parametrize(("case", "dtype"), in_both(TO_PEFT, "lora", "lora-experts", "dora", "randlora", "bone"))
def test_peft_reads_what_we_export(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, method, targets, options = TO_PEFT[case]
    model = fresh(make, dtype)
    base = outputs(model)
    adapter = rankfold.attach(model, method(), targets=targets, **options)
    scramble(adapter.parameters())
    adapter.train(False)
    expected = outputs(model)
    assert close(expected, base) > 1e-4
    rankfold.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh(make, dtype), tmp_path)
    assert close(outputs(theirs), expected) < tolerance(dtype, case)
    # They find the same layers, and nothing is left unread in the file.
    assert {key.removeprefix("base_model.model.") for key in peft.get_peft_model_state_dict(theirs)} - _base(
        theirs
    ) == {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter_model.safetensors")}
    again = rankfold.import_peft(model, tmp_path, name="again")
    mine = {key: value for key, value in adapter.state_dict().items() if not key.startswith("shared.")}
    back = {key: value for key, value in again.state_dict().items() if not key.startswith("shared.")}
    assert mine.keys() == back.keys()
    assert all(torch.equal(tensor, back[key]) for key, tensor in mine.items())
    assert close(outputs(model), expected) < tolerance(dtype, case)


def _base(model: nn.Module) -> set[str]:
    """Names under which PEFT also saves weights of the base, and RandLoRA's bases again for each layer."""
    return {
        key.removeprefix("base_model.model.").replace(".default", "")
        for key in model.state_dict()
        if (".base_layer." in key and "lora_" not in key) or re.search(r"\.randlora_[AB]\.", key)
    } - {"base_model.randlora_A", "base_model.randlora_B"}


# ---- adapters that need a word more


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("slug", ["lora", "dora", "adalora-svd"])
def test_a_start_taken_out_of_the_base_becomes_rank_2r(slug: str, fold: bool, tmp_path: Path) -> None:
    model = fresh(llama)
    adapter = rankfold.attach(
        model, rankfold.build(slug, rank=3, alpha=5), targets=["q_proj", "down_proj"], init=rankfold.PiSSA(), fold=fold
    )
    scramble(adapter.parameters())
    expected = outputs(model)
    rankfold.export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_r" if slug == "adalora-svd" else "r"] == 6
    theirs = peft.PeftModel.from_pretrained(fresh(llama), tmp_path)
    assert close(outputs(theirs), expected) < tolerance(torch.float64, slug)
    rankfold.import_peft(model, tmp_path, name="again")
    assert close(outputs(model), expected) < tolerance(torch.float64, slug)


@pytest.mark.parametrize("slug", ["nola", "loldu"])
def test_other_methods_go_by_way_of_a_lora(slug: str, tmp_path: Path) -> None:
    model = fresh(llama)
    scramble(rankfold.attach(model, rankfold.build(slug, rank=2), targets=["q_proj"], name="mine").parameters())
    expected = outputs(model)
    with pytest.raises(rankfold.UnsupportedError, match=r"as_lora\(model, 'mine'\).*'mine-lora'"):
        rankfold.export_peft(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    rankfold.as_lora(model, "mine")
    rankfold.export_peft(model, tmp_path / "x", "mine-lora")
    assert close(outputs(peft.PeftModel.from_pretrained(fresh(llama), tmp_path / "x")), expected) < 1e-9


@pytest.mark.parametrize(
    ("make", "modules", "task"),
    [
        (llama, [], "CAUSAL_LM"),
        (gpt2, [], "CAUSAL_LM"),
        (bert, ["classifier"], "SEQ_CLS"),
        (bert, [], None),  # PEFT would look for a trained head in the file
        (t5, [], "SEQ_2_SEQ_LM"),
        (Names, [], None),
    ],
)
def test_configuration_tells_peft_what_it_reads(
    make: Callable[..., nn.Module], modules: list[str], task: str | None, tmp_path: Path
) -> None:
    model = fresh(make)
    if hasattr(model, "config"):
        model.config.name_or_path = "org/base"
    rankfold.attach(model, rankfold.LoRA(rank=2), modules_to_save=modules)
    rankfold.export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == task
    assert config["base_model_name_or_path"] == ("org/base" if hasattr(model, "config") else None)
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True
    assert config["modules_to_save"] == (modules or None)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (2, 2, {}, {})
    if make is llama:
        assert sorted(config["target_modules"]) == [
            "down_proj",
            "gate_proj",
            "k_proj",
            "o_proj",
            "q_proj",
            "up_proj",
            "v_proj",
        ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_names_that_no_list_can_single_out(tmp_path: Path) -> None:
    """`proj` is a layer's whole path and the end of others."""
    model = fresh(Names)
    rankfold.attach(model, rankfold.LoRA(rank=2), targets=lambda name, _: name in ("proj", "layers.1.proj"))
    rankfold.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh(Names), tmp_path)
    adapted = {
        name.removeprefix("base_model.model.") for name, module in theirs.named_modules() if hasattr(module, "lora_A")
    }
    assert adapted == {"proj", "layers.1.proj"}


def test_vera_without_its_random_pair(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=6, target_modules=["q_proj", "down_proj"], save_projection=False, projection_prng_key=11)
    expected = saved_by_peft(llama, config, tmp_path, torch.float32)
    model = fresh(llama, torch.float32)
    assert rankfold.import_peft(model, tmp_path).seed == 11
    assert close(outputs(model), expected) < 1e-5


def test_several_adapters_and_inactive(tmp_path: Path) -> None:
    expected = saved_by_peft(llama, lora(), tmp_path / "a")
    other = saved_by_peft(llama, peft.VeraConfig(r=6, target_modules=["q_proj"]), tmp_path / "b")
    model = fresh(llama)
    base = outputs(model)
    rankfold.import_peft(model, tmp_path / "a", "a", active=False)
    assert torch.equal(outputs(model), base)
    rankfold.import_peft(model, tmp_path / "b", "b")
    assert close(outputs(model), other) < 1e-10
    with rankfold.using(model, "a"):
        assert close(outputs(model), expected) < 1e-10
    with pytest.raises(rankfold.RankfoldError, match="attached already"):
        rankfold.import_peft(model, tmp_path / "a", "a")
    rankfold.export_peft(model, tmp_path / "c", "a")  # names are the plain model's, whatever else is attached
    assert close(outputs(peft.PeftModel.from_pretrained(fresh(llama), tmp_path / "c")), expected) < 1e-10


def rewrite(folder: Path, change: Callable[[str], str | None]) -> None:
    """Rename (or, with None, drop) the tensors of a saved adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {new: tensor for key, tensor in tensors.items() if (new := change(key))}, folder / "adapter_model.safetensors"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: re.sub(r"(lora_[AB])\.", r"\1.default.", key),
        lambda key: re.sub(r"(lora_[AB])\.", r"\1.other.", key.removeprefix("base_model.model.")),
        lambda key: re.sub(r"^(.*)(lm_head)\.", r"\1\2.modules_to_save.default.", key),
        lambda key: key.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
    ],
)
def test_every_way_to_write_the_names(change: Callable[[str], str], tmp_path: Path) -> None:
    expected = saved_by_peft(llama, lora(use_dora=True, modules_to_save=["lm_head"]), tmp_path)
    rewrite(tmp_path, change)
    model = fresh(llama)
    rankfold.import_peft(model, tmp_path)
    assert close(outputs(model), expected) < 1e-10


def test_base_weights_in_the_file(tmp_path: Path) -> None:
    expected = saved_by_peft(llama, lora(), tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    model = fresh(llama)
    rankfold.import_peft(model, tmp_path)
    assert close(outputs(model), expected) < 1e-10
    changed = fresh(llama)
    with torch.no_grad():
        changed.model.embed_tokens.weight[3, 4] += 1
    with pytest.raises(rankfold.UnsupportedError, match=r"embed_tokens\.weight.*modules_to_save"):
        rankfold.import_peft(changed, tmp_path)


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    expected = saved_by_peft(llama, lora(), tmp_path)
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = fresh(llama)
    rankfold.import_peft(model, "org/adapter")
    assert asked == [("org/adapter", ["adapter_config.json", "adapter_model.safetensors"])]
    assert close(outputs(model), expected) < 1e-10


def test_needs_no_peft(tmp_path: Path) -> None:
    saved_by_peft(Names, lora(target_modules=["proj"]), tmp_path / "a")
    code = f"""
import sys
sys.modules["peft"] = None
import torch, rankfold
from torch import nn
model = nn.Module()
model.proj = nn.Linear(8, 8)
model.a = nn.ModuleDict({{"proj": nn.Linear(8, 8), "a_proj": nn.Linear(8, 8)}})
model.layers = nn.ModuleList(nn.ModuleDict({{"proj": nn.Linear(8, 8)}}) for _ in range(12))
rankfold.import_peft(model, {str(tmp_path / "a")!r})
rankfold.export_peft(model, {str(tmp_path / "b")!r})
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "b" / "adapter_config.json").exists()


# ---- what is refused, and that nothing changes then


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    saved_by_peft(llama, lora(modules_to_save=["lm_head"]), folder)
    return folder


def refused(
    folder: Path, match: str, make: Callable[..., nn.Module] = llama, error: type[Exception] = rankfold.RankfoldError
) -> None:
    model = fresh(make)
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(error, match=match):
        rankfold.import_peft(model, folder)
    assert not rankfold.adapters(model)
    assert classes == [type(module) for module in model.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def changed(good: Path, folder: Path, **options: Any) -> Path:
    """A copy of the good adapter with other options; `...` takes one away."""
    shutil.copytree(good, folder)
    config = json.loads((good / "adapter_config.json").read_text()) | options
    (folder / "adapter_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not ...})
    )
    return folder


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("bias", "lora_only", "'bias' is 'lora_only'.*bitfit"),
        ("bias", "all", "'bias' is 'all'"),
        ("trainable_token_indices", [1, 2], "trainable_token_indices.*modules_to_save"),
        ("lora_bias", True, "'lora_bias' is 'True'"),
        ("layer_replication", [[0, 2]], "layer_replication"),
        ("alora_invocation_tokens", [3], "alora_invocation_tokens"),
        ("use_qalora", True, "use_qalora"),
        ("arrow_config", {"top_k": 2}, "arrow_config"),
        ("kasa_config", {"beta": 1.0}, "kasa_config"),
        ("megatron_config", {"a": 1}, "megatron_config"),
        ("ensure_weight_tying", True, "ensure_weight_tying.*untied"),
        ("something_new", "on", "'something_new' is 'on'"),
        ("init_lora_weights", "pissa", "'pissa'.*path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_4", "pissa_niter_4"),
        ("init_lora_weights", "loftq", "loftq"),
        ("init_lora_weights", "newest", "newest"),
        ("peft_type", "PREFIX_TUNING", "PREFIX_TUNING.*LORA.*VERA.*IA3"),
        ("peft_type", ..., "peft_type"),
        ("peft_type", ["LORA"], "peft_type"),
    ],
)
def test_unsupported_options_are_refused_by_name(
    good: Path, option: str, value: Any, match: str, tmp_path: Path
) -> None:
    refused(changed(good, tmp_path / "x", **{option: value}), match, error=rankfold.UnsupportedError)


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("r", "8", "'r'"),
        ("r", True, "'r'"),
        ("r", 0, "'r'"),
        ("r", 4, "lora_[AB].*shape"),
        ("r", 10**9, "rank|numbers"),
        ("lora_alpha", "big", "lora_alpha"),
        ("lora_dropout", 1.5, "lora_dropout"),
        ("rank_pattern", {"q_proj": -1}, "rank_pattern"),
        ("rank_pattern", {"(q_proj": 3}, "no regular expression"),
        ("alpha_pattern", {"(.+)+x": 3.0}, "take forever"),
        ("target_modules", "(a|a)*b", "take forever"),
        ("target_modules", ".*" * 12 + "x", "take forever"),
        ("target_modules", ["q_proj", 3], "target_modules"),
        ("target_modules", ["q_proj"], "down_proj.*the configuration does not name"),
        ("target_modules", ["q_proj", "down_proj", "v_proj"], "holds nothing for .*v_proj"),
        ("target_modules", None, "the configuration does not name"),
        ("layers_to_transform", [0], r"layers\.1.*the configuration does not name"),
        ("modules_to_save", ["lm_head", "norm"], "lacks.*norm"),
        ("modules_to_save", None, "'lm_head|lm_head.weight"),
        ("use_dora", True, "lora_magnitude_vector"),
    ],
)
def test_configurations_that_do_not_fit(good: Path, option: str, value: Any, match: str, tmp_path: Path) -> None:
    folder = changed(good, tmp_path / "x", **{option: value})
    if (option, value) == ("modules_to_save", None):
        # The head is then a weight of the base that was trained along.
        match = "lm_head.*trained along"
    refused(folder, match)


def test_options_that_change_nothing_are_accepted(good: Path, tmp_path: Path) -> None:
    folder = changed(
        good, tmp_path / "x", enable_lora=None, merge_weights=False, loftq_config={"a": 1}, eva_config={"rho": 2.0},
        init_lora_weights="eva", something_new=None, modules_to_save=["lm_head", "score"], fan_in_fan_out=True,
    )  # fmt: skip
    model = fresh(llama)
    rankfold.import_peft(model, folder)
    other = fresh(llama)
    rankfold.import_peft(other, good)
    assert torch.equal(outputs(model), outputs(other))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda key: None if "lora_A" in key else key, "lacks .*lora_A"),
        (lambda key: None if "layers.1.self_attn" in key else key, "holds nothing for model.layers.1.self_attn.q_proj"),
        (lambda key: None, "holds no tensor of a LORA adapter"),
        (lambda key: key.replace("layers.1.", "layers.7."), r"layers\.7.*no such module"),
        (lambda key: key.replace("layers.1.self_attn.q_proj", "norm"), "model.norm.*no delta can sit|model.norm"),
        (
            lambda key: key.replace("lora_A.weight", "lora_A.a.weight").replace("lora_B.weight", "lora_B.b.weight"),
            "several adapters",
        ),
        (lambda key: key.replace("lora_A.weight", "lora_A.bias"), "no bias"),
        (lambda key: key.replace("lm_head.weight", "other.weight"), "other.weight.*neither"),
        (lambda key: key.replace("lora_A", "__class__"), "neither of the adapter nor"),
        (lambda key: key.replace("q_proj.lora_B", "q_proj.lora_embedding_B"), "lora_B|lora_embedding_B"),
    ],
)
def test_tensors_that_do_not_fit(good: Path, change: Callable[[str], str | None], match: str, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "x")
    rewrite(tmp_path / "x", change)
    refused(tmp_path / "x", match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.fill_(float("nan")), "NaN"),
        (lambda t: t[:-1].clone(), "shape"),
        (lambda t: t.to(torch.int64), "shape|dtype"),
        (lambda t: t[None].clone(), "shape"),
    ],
)
def test_values_that_do_not_fit(good: Path, change: Callable[[Tensor], Tensor], match: str, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "x")
    tensors = load_file(good / "adapter_model.safetensors")
    key = next(key for key in tensors if "layers.1" in key and "lora_B" in key)
    save_file(tensors | {key: change(tensors[key])}, tmp_path / "x" / "adapter_model.safetensors")
    refused(tmp_path / "x", match, error=rankfold.AdapterFileError)


def test_the_same_tensor_twice(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "x")
    tensors = load_file(good / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key)
    save_file(
        tensors | {key.replace("lora_B", "lora_B.default"): tensors[key].clone()},
        tmp_path / "x" / "adapter_model.safetensors",
    )
    refused(tmp_path / "x", "are the same tensor", error=rankfold.AdapterFileError)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not valid JSON"),
        ("[]", "no JSON object"),
        ("{", "not valid JSON"),
        ('{"peft_type": "LORA", "r": NaN}', "NaN"),
        ('{"peft_type": "LORA", "peft_type": "IA3"}', "twice"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
        ('{"peft_type": "LORA", "x": "' + "a" * (9 << 20) + '"}', "more than any configuration"),
    ],
)
def test_hostile_configurations(good: Path, text: str, match: str, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "x")
    (tmp_path / "x" / "adapter_config.json").write_text(text)
    refused(tmp_path / "x", match, error=rankfold.AdapterFileError)


def test_a_pickle_is_refused_and_says_how_to_convert_it(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "x")
    (tmp_path / "x" / "adapter_model.safetensors").rename(tmp_path / "x" / "adapter_model.bin")
    refused(
        tmp_path / "x",
        r"pickle.*save_file\(torch\.load\('adapter_model.bin', weights_only=True\)",
        error=rankfold.AdapterFileError,
    )


def test_places_that_hold_no_adapter(good: Path, tmp_path: Path) -> None:
    refused(tmp_path, "adapter_config.json", error=rankfold.AdapterFileError)
    refused(tmp_path / "nowhere" / "at" / "all", "no folder", error=rankfold.AdapterFileError)
    refused(good / "adapter_config.json", "is a file", error=rankfold.AdapterFileError)
    refused(Path("x" * 5000), "no path|no folder", error=rankfold.AdapterFileError)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "adapter_config.json").symlink_to(good / "adapter_config.json")
    refused(tmp_path / "x", "symbolic link", error=rankfold.AdapterFileError)
    shutil.copy(good / "adapter_config.json", tmp_path)
    refused(tmp_path, "holds no adapter_model.safetensors", error=rankfold.AdapterFileError)


def test_another_model(good: Path) -> None:
    refused(good, "no such module", gpt2, rankfold.AdapterFileError)
    refused(
        good,
        "shape",
        lambda: LlamaForCausalLM(
            LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
        ),
    )


def test_resized_embeddings_are_refused(tmp_path: Path) -> None:
    model = fresh(llama)
    model.resize_token_embeddings(VOCABULARY + 3)
    peft.get_peft_model(model, lora()).save_pretrained(tmp_path, save_embedding_layers=True)
    refused(tmp_path, "(embed_tokens|lm_head).weight.*resized", error=rankfold.UnsupportedError)


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}])
def test_convolutions_that_peft_computes_otherwise(options: dict[str, Any], tmp_path: Path) -> None:
    def make() -> nn.Module:
        return Convolutions(**options)

    peft.get_peft_model(make(), lora(r=2, target_modules=["conv1"])).save_pretrained(tmp_path / "theirs")
    refused(tmp_path / "theirs", "groups, dilation", make, rankfold.UnsupportedError)
    model = make()
    rankfold.attach(model, rankfold.LoRA(rank=2), targets=["conv1"])
    with pytest.raises(rankfold.UnsupportedError, match="groups, dilation"):
        rankfold.export_peft(model, tmp_path / "ours")


def test_randlora_with_different_numbers_of_bases(tmp_path: Path) -> None:
    saved_by_peft(llama, peft.RandLoraConfig(r=4, target_modules=["q_proj", "k_proj"]), tmp_path / "theirs")
    refused(tmp_path / "theirs", "different numbers of random bases", error=rankfold.UnsupportedError)
    saved_by_peft(
        llama, peft.RandLoraConfig(r=4, target_modules=["q_proj"], save_projection=False), tmp_path / "without"
    )
    refused(tmp_path / "without", "save_projection", error=rankfold.UnsupportedError)


def test_miss_keeps_its_dropout_and_bat_loses_it(tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ["q_proj"], "miss_dropout": 0.5}
    saved_by_peft(llama, peft.MissConfig(**options), tmp_path / "miss")
    method = rankfold.import_peft(fresh(llama), tmp_path / "miss").method
    assert method == rankfold.MiSS(rank=4, dropout=0.5)
    expected = saved_by_peft(llama, peft.MissConfig(**options, init_weights="bat"), tmp_path / "bat")
    model = fresh(llama)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rankfold.import_peft(model, tmp_path / "bat")
    assert any("miss_dropout=0.5" in str(one.message) for one in said)
    assert close(outputs(model), expected) < 1e-10


def test_a_neumann_series_says_of_which_version_it_is(tmp_path: Path) -> None:
    saved_by_peft(llama, oft("q_proj"), tmp_path / "good")
    for folder, version in (("old", "0.17.1"), ("older", ...)):
        changed(tmp_path / "good", tmp_path / folder, peft_version=version)
        refused(tmp_path / folder, "another series before PEFT 0.18", error=rankfold.UnsupportedError)
    changed(tmp_path / "good", tmp_path / "two", num_cayley_neumann_terms=2)
    refused(tmp_path / "two", "num_cayley_neumann_terms", error=rankfold.UnsupportedError)
    changed(tmp_path / "good", tmp_path / "exact", peft_version=..., use_cayley_neumann=False)
    rankfold.import_peft(fresh(llama), tmp_path / "exact")


@pytest.mark.parametrize(
    ("config", "option", "match"),
    [
        (lambda: oft("q_proj", coft=True), "coft", "'coft' is 'True'"),
        (lambda: oft("q_proj", block_share=True), "block_share", "'block_share' is 'True'"),
        (lambda: loha("q_proj", use_effective_conv2d=True), "use_effective_conv2d", "use_effective_conv2d"),
    ],
)
def test_forms_that_rankfold_does_not_have(
    config: Callable[[], peft.PeftConfig], option: str, match: str, tmp_path: Path
) -> None:
    saved_by_peft(llama, config(), tmp_path / "theirs")
    assert option in json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    refused(tmp_path / "theirs", match, error=rankfold.UnsupportedError)


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        (lambda: boft("q_proj", boft_dropout=0.5), "boft_dropout=0.5"),
        (lambda: loha("q_proj", rank_dropout=0.5), "rank_dropout=0.5"),
        (lambda: lokr("q_proj", module_dropout=0.5), "module_dropout=0.5"),
    ],
)
def test_dropouts_that_rankfold_does_not_have(
    config: Callable[[], peft.PeftConfig], left_out: str, tmp_path: Path
) -> None:
    expected = saved_by_peft(llama, config(), tmp_path)
    model = fresh(llama)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rankfold.import_peft(model, tmp_path)
    assert any(left_out in str(one.message) for one in said)
    assert close(outputs(model), expected) < 5e-6


@pytest.mark.parametrize("b", [2, 4])
def test_butterflies_go_where_the_cuda_kernel_is(b: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft.tuners.boft.layer as layer

    from tests.peers.test_peft_boft import BlockDiagonal

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", BlockDiagonal)
    model = fresh(llama)
    adapter = rankfold.attach(model, rankfold.BOFT(block_size=b, m=3), targets=["q_proj", "down_proj"])
    scramble(adapter.parameters())
    expected = outputs(model)
    with pytest.warns(UserWarning, match="CUDA kernel"):
        rankfold.export_peft(model, tmp_path)
    assert close(outputs(peft.PeftModel.from_pretrained(fresh(llama), tmp_path)), expected) < 1e-10
    rankfold.import_peft(model, tmp_path, name="again")
    assert close(outputs(model), expected) < 1e-10


def test_layers_that_adalora_left_with_fewer_components_or_none(tmp_path: Path) -> None:
    model = peft.get_peft_model(fresh(llama), adalora("q_proj", "down_proj"))
    scramble(p for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name)
    kept = {
        name: [True] * 3 for name, _ in model.base_model.model.named_parameters() if name.endswith("lora_E.default")
    }
    kept["model.layers.0.self_attn.q_proj.lora_E.default"] = [True, False, True]
    kept["model.layers.1.mlp.down_proj.lora_E.default"] = [False] * 3
    model.peft_config["default"].rank_pattern = kept
    model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, kept)
    expected = outputs(model.eval())
    model.save_pretrained(tmp_path / "theirs")
    ours = fresh(llama)
    adapter = rankfold.import_peft(ours, tmp_path / "theirs")
    assert close(outputs(ours), expected) < tolerance(torch.float64, "adalora")
    ranks = {name.removeprefix("model.layers."): delta.A.shape[0] for name, delta in adapter.deltas.items()}
    assert ranks == {"0.self_attn.q_proj": 2, "0.mlp.down_proj": 3, "1.self_attn.q_proj": 3}
    rankfold.export_peft(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(fresh(llama), tmp_path / "ours")
    assert close(outputs(again), expected) < tolerance(torch.float64, "adalora")
    # Tensors without numbers where the configuration does not say so are a damaged file.
    changed(tmp_path / "theirs", tmp_path / "x", rank_pattern=None)
    refused(tmp_path / "x", "holds fewer numbers", error=rankfold.AdapterFileError)


def test_ia3_says_where_the_gains_are(tmp_path: Path) -> None:
    saved_by_peft(llama, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), tmp_path / "good")
    refused(
        changed(tmp_path / "good", tmp_path / "x", feedforward_modules=None),
        "feedforward_modules",
        error=rankfold.AdapterFileError,
    )
    refused(
        changed(tmp_path / "good", tmp_path / "y", feedforward_modules="(.+)+x"),
        "forever",
        error=rankfold.AdapterFileError,
    )


def test_experts_that_the_configuration_does_not_name(tmp_path: Path) -> None:
    saved_by_peft(
        mixtral,
        lora(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        tmp_path / "good",
    )
    refused(
        changed(tmp_path / "good", tmp_path / "x", target_parameters=["down_proj"]),
        "target_parameters name 1",
        mixtral,
        rankfold.AdapterFileError,
    )
    refused(
        changed(tmp_path / "good", tmp_path / "y", target_parameters=None),
        "target_parameters name 0",
        mixtral,
        rankfold.AdapterFileError,
    )


@pytest.mark.parametrize(
    ("make", "method", "targets", "options", "match"),
    [
        (mixtral, lambda: rankfold.DoRA(rank=2), ["gate_up_proj"], {}, "experts"),
        (gpt2, lambda: rankfold.VeRA(rank=2), ["wte", "c_attn"], {}, "embedding"),
        (gpt2, lambda: rankfold.Bone(rank=4), ["c_attn"], {}, "conv1d"),
        (llama, lambda: rankfold.Bone(), ["q_proj", "k_proj"], {}, "one rank"),
        (llama, lambda: rankfold.VeRA(rank=4), QV, {"overrides": {"v_proj": {"rank": 2}}}, "of its own"),
        (llama, lambda: rankfold.RandLoRA(rank=4), ["q_proj", "k_proj"], {}, "different numbers of random bases"),
        (llama, lambda: rankfold.LoRA(rank=2), QV, {"overrides": {"v_proj": {"dropout": 0.1}}}, "dropout"),
        (gpt2, lambda: rankfold.BitFit(), "biases", {}, "no ΔW"),
        (Convolutions, lambda: rankfold.OFT(block_size=4), ["conv1"], {}, "linear only"),
        (llama, lambda: rankfold.OFT(block_size=4), QV, {"overrides": {"v_proj": {"block_size": 8}}}, "one block size"),
        (llama, lambda: rankfold.OFT(neumann=3), QV, {}, "series of 3 terms"),
        (llama, lambda: rankfold.BOFT(), QV, {"overrides": {"v_proj": {"block_size": 4}}}, "one block size"),
        (lambda: Convolutions(groups=2), lambda: rankfold.BOFT(m=1), ["conv1"], {}, "without groups"),
        (Convolutions, lambda: rankfold.LoKr(), ["line"], {}, "one-dimensional"),
        (llama, lambda: rankfold.LoKr(), QV, {"overrides": {"v_proj": {"factor": 2}}}, "one factor"),
        (llama, lambda: rankfold.FourierFT(), QV, {"overrides": {"v_proj": {"alpha": 2.0}}}, "one scaling"),
        (Convolutions, lambda: rankfold.AdaLoRASVD(rank=2), ["line"], {}, "two-dimensional"),
        (llama, lambda: rankfold.AdaLoRASVD(rank=2), QV, {"overrides": {"v_proj": {"alpha": 3.0}}}, "one scale"),
        (gpt2, lambda: rankfold.LoHa(rank=2), ["c_attn"], {}, "conv1d"),
        (llama, lambda: rankfold.LoRA(rank=2), [], {"modules_to_save": ["lm_head"]}, "without an adapted layer"),
    ],
)  # fmt: skip
def test_what_peft_cannot_say_is_refused_and_nothing_written(
    make: Callable[..., nn.Module],
    method: Callable[[], Any],
    targets: Any,
    options: dict[str, Any],
    match: str,
    tmp_path: Path,
) -> None:
    model = fresh(make)
    rankfold.attach(model, method(), targets=targets, **options)
    with pytest.raises(rankfold.UnsupportedError, match=match):
        rankfold.export_peft(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_adapter_with_nan_is_not_exported(tmp_path: Path) -> None:
    model = fresh(llama)
    adapter = rankfold.attach(model, rankfold.LoRA(rank=2))
    with torch.no_grad():
        next(adapter.parameters())[0, 0] = torch.inf
    with pytest.raises(rankfold.RankfoldError, match="NaN or infinity"):
        rankfold.export_peft(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(rankfold.RankfoldError, match="is a file"):
        rankfold.export_peft(model, tmp_path / "file")
    with pytest.raises(rankfold.RankfoldError, match="nobody"):
        rankfold.export_peft(model, tmp_path / "y", "nobody")
