"""`rankfold quantize`, and what comes out of it: a model that every loader of Transformers reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import rankfold
from rankfold.cli import run
from rankfold.core.packed import PackedLinear
from rankfold.errors import RankfoldError
from rankfold.train.models import load_model
from rankfold.train.recipe import Model
from tests.train import tiny

IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and then it runs away into the dark wood. " * 60)
    return path


def test_a_model_becomes_small_and_loads_in_few_bits(llama_dir: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "small"
    assert run(["quantize", str(llama_dir), "--scheme", "int8", "--group", "16", "--output", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    before, after = AutoModelForCausalLM.from_pretrained(llama_dir), rankfold.load_quantized(out)
    layers = {path for path, module in after.named_modules() if isinstance(module, PackedLinear)}
    assert layers == told["layers"].keys()
    assert "lm_head" not in layers
    assert all(0 < one["error"] < 0.02 for one in told["layers"].values())
    expected = before(IDS).logits
    assert 0 < (after(IDS).logits - expected).norm() < 0.03 * expected.norm()
    for path in layers:
        layer = after.get_submodule(path)
        size = sum(t.numel() * t.itemsize for t in layer.state_dict().values())
        assert 8 * size == pytest.approx(told["layers"][path]["bits"] * layer.in_features * layer.out_features)
        assert size < 0.4 * 4 * layer.in_features * layer.out_features


def test_what_was_packed_is_read_bit_for_bit_and_trains_under_an_adapter(llama_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    rankfold.quantize(model, rankfold.Scheme(format="int3", group=16, scales="bfloat16"))
    y = model(IDS).logits
    rankfold.save_quantized(model, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(again(IDS).logits, y)
    assert again.get_submodule("model.layers.0.self_attn.q_proj").scales.dtype == torch.bfloat16
    half = rankfold.load_quantized(tmp_path / "small", dtype=torch.bfloat16)
    assert half(IDS).logits.dtype == torch.bfloat16
    adapter = rankfold.attach(again, rankfold.build("lora", rank=2))
    again(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_a_compensation_is_an_adapter_within(llama_dir: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "small"
    asked = ["--scheme", "int2", "--group", "16", "--how", "gptq", "--calibration", str(text), "--blocks", "4"]
    command = ["quantize", str(llama_dir), *asked, "--compensate", "eora", "--rank", "8", "--output", str(out)]
    assert run(command) == 0
    assert "with compensation" in capsys.readouterr().out
    expected = AutoModelForCausalLM.from_pretrained(llama_dir)(IDS).logits
    model = rankfold.load_quantized(out)
    plain = (model(IDS).logits - expected).norm()
    adapter = rankfold.load(model, out / "compensation")
    assert adapter.method.rank == 8  # type: ignore[attr-defined]
    assert (model(IDS).logits - expected).norm() < 0.9 * plain


def test_stopped_it_says_how_to_go_on_and_then_comes_to_the_same(
    llama_dir: Path, text: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--scheme", "int3", "--group", "16", "--how", "gptq", "--calibration", str(text), "--blocks", "2"]
    command = ["quantize", str(llama_dir), *asked, "--output"]
    assert run([*command, str(tmp_path / "whole")]) == 0
    plain, layers = rankfold.GPTQ.rounded, []

    def stop(*args: Any) -> Any:
        layers.append(1)
        if len(layers) == 9:  # in the second block
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(rankfold.GPTQ, "rounded", stop)
    assert run([*command, str(tmp_path / "out")]) == 130
    work = tmp_path / ".out.quantising"
    assert f"kept in {work}: the same command goes on" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    assert len(list(work.iterdir())) == 1
    assert run([*command, str(tmp_path / "out")]) == 0
    assert len(layers) == 9 + 7
    assert not work.exists()
    one, other = (rankfold.load_quantized(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("how", ["awq", "adadim"])
def test_what_needs_the_text_is_saved_with_what_it_found(how: str, llama_dir: Path, text: Path, tmp_path: Path) -> None:
    asked = ["--scheme", "int4", "--group", "16", "--how", how, "--calibration", str(text), "--blocks", "2"]
    assert run(["quantize", str(llama_dir), *asked, "--output", str(tmp_path / "out")]) == 0
    model = rankfold.load_quantized(tmp_path / "out")
    schemes = [module.scheme for module in model.modules() if isinstance(module, PackedLinear)]
    assert all(scheme.balanced == (how == "awq") for scheme in schemes)
    assert {scheme.along for scheme in schemes} == ({"in"} if how == "awq" else {"in", "out"})
    expected = AutoModelForCausalLM.from_pretrained(llama_dir)(IDS).logits
    assert (model(IDS).logits - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "int5"], "--scheme: Input should be"),
        (["--group", "0"], "--group: Input should be"),
        (["--format", "gguf"], "--format is rankfold or gptq"),
        (["--scheme", "2x8", "--double"], "codebooks have no"),
        (["--how", "gptq"], "gptq needs statistics of the data"),
        (["--rank", "4"], "--rank is the rank of a compensation"),
        (["--compensate", "rtn"], "compensates nothing"),
        (["--how", "gptq", "--calibration", "nowhere.txt"], "--calibration: cannot read nowhere.txt"),
    ],
)
def test_bad_input_is_named(options: list[str], message: str, llama_dir: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(["quantize", str(llama_dir), "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_short_is_named(llama_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "short.txt").write_text("too short")
    asked = ["--how", "gptq", "--calibration", str(tmp_path / "short.txt"), "--output", str(tmp_path / "out")]
    assert run(["quantize", str(llama_dir), *asked]) == 2
    assert "tokens, and two blocks of 256 take 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schemes": [{"scheme": {"format": "int9"}, "layers": []}]}, "names no schemes that can be read"),
        ({"schemes": [{"scheme": {}, "layers": ["model.__class__"]}]}, "no linear layer there"),
    ],
)
def test_a_hostile_configuration_is_refused(
    change: dict[str, Any], message: str, llama_dir: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    rankfold.quantize(model, rankfold.Scheme())
    rankfold.save_quantized(model, tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(RankfoldError, match=message):
        rankfold.load_quantized(tmp_path / "small")


def test_only_packed_models_are_saved_and_loaded_so(llama_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    with pytest.raises(RankfoldError, match="no packed layer"):
        rankfold.save_quantized(model, tmp_path / "out")
    with pytest.raises(RankfoldError, match="no model that rankfold has quantised"):
        rankfold.load_quantized(llama_dir)


def test_the_files_of_gptqs_tools(llama_dir: Path, text: Path, tmp_path: Path) -> None:
    """`--format gptq`; what comes out is the model of another command, too."""
    llama = tiny.llama(hidden_size=64, head_dim=32)
    llama.save_pretrained(tmp_path / "llama")
    tiny.tokenizer().save_pretrained(tmp_path / "llama")
    out = tmp_path / "out"
    asked = ["--scheme", "int4", "--group", "32", "--symmetric", "--format", "gptq", "--output", str(out)]
    assert run(["quantize", str(tmp_path / "llama"), *asked]) == 0
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"], config["sym"]) == ("gptq", 4, 32, True)
    loaded = load_model(Model(path=str(out)), None)
    assert isinstance(loaded.model.get_submodule("model.layers.0.mlp.up_proj"), PackedLinear)
    assert not loaded.new_modules


def test_codebooks_and_a_distilled_compensation(llama_dir: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    data = ["--calibration", str(text), "--blocks", "2"]
    asked = ["--scheme", "1x4", "--group", "4", "--how", "pv-tuning", *data, "--output", str(tmp_path / "pv")]
    assert run(["quantize", str(llama_dir), *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scheme"] == {"books": 1, "bits": 4, "width": 4}
    model = rankfold.load_quantized(tmp_path / "pv")
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "CodebookLinear"
    asked = ["--scheme", "nf4", "--double", "--compensate", "lrec", "--rank", "2", *data]
    assert run(["quantize", str(llama_dir), *asked, "--output", str(tmp_path / "lrec")]) == 0
    model = rankfold.load_quantized(tmp_path / "lrec")
    assert model.get_submodule("model.layers.0.mlp.up_proj").scheme.double
    assert rankfold.load(model, tmp_path / "lrec" / "compensation").method.rank == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("slug", ["peqa", "l4q"])
def test_what_ends_in_few_bits_is_merged_into_a_packed_model(slug: str, llama_dir: Path, tmp_path: Path) -> None:
    base = llama_dir
    if slug == "peqa":
        base = tmp_path / "small"
        assert run(["quantize", str(llama_dir), "--scheme", "int4", "--group", "16", "--output", str(base)]) == 0
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = rankfold.attach(model, rankfold.build(slug))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    expected = model(IDS).logits
    rankfold.save(model, tmp_path / "adapter")
    merged = tmp_path / "merged"
    assert run(["merge", "--model", str(base), "--adapter", str(tmp_path / "adapter"), "--output", str(merged)]) == 0
    again = rankfold.load_quantized(merged)
    assert all(isinstance(again.get_submodule(site), PackedLinear) for site in adapter.deltas)
    torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=1e-5)
    assert not list(merged.glob("*/adapter.safetensors"))
