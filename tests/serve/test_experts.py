"""Experts on disk: the same outputs whatever is in memory, every byte counted, and widths within a budget."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import rankfold
from rankfold.core.packed import Scheme, dequantise
from rankfold.errors import AdapterFileError, RankfoldError, UnsupportedError
from rankfold.quantizers.rtn import RTN
from rankfold.serve.expert_files import (
    ExpertFile,
    at_width,
    count,
    expert_layers,
    matrices,
    pack_experts,
    packed_bytes,
)
from rankfold.serve.experts import PagedExperts
from rankfold.serve.paged_models import load_paged, save_paged
from rankfold.serve.widths import Profile, profile

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
IDS = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(5))


def mixtral(layers: int = 3, experts: int = 6, k: int = 2) -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **SMALL, intermediate_size=24, num_hidden_layers=layers, num_local_experts=experts, num_experts_per_tok=k
        )
    )


def qwen() -> Any:
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **SMALL,
            intermediate_size=24,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=8,
            num_hidden_layers=3,
            num_experts=5,
            num_experts_per_tok=2,
            mlp_only_layers=[1],
        )
    )


def gpt_oss() -> Any:
    """Weights are transposed, gates interleaved, and there are biases."""
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **SMALL, intermediate_size=24, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2
        )
    )


def switch() -> Any:
    return transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(
            vocab_size=40,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=4,
            num_sparse_encoder_layers=2,
            num_decoder_layers=4,
            num_sparse_decoder_layers=2,
            num_heads=2,
            num_experts=4,
            expert_capacity=2,  # so few that some tokens get no expert
            decoder_start_token_id=0,
        )
    )


def made(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = kind(**options).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # so that routers have an opinion, and biases a say
            p.mul_(5) if p.dim() > 1 else p.add_(0.1 * torch.randn(p.shape))
            if "bias" in name:
                p.normal_()
    return model


def mixed(model: Any) -> dict[tuple[int, int], int]:
    sizes = map(count, expert_layers(model).values())
    return {(l, e): (8, 4, 3, 2)[(l + e) % 4] for l, n in enumerate(sizes) for e in range(n)}  # noqa: E741


@torch.no_grad()
def rounded(model: Any, widths: dict[tuple[int, int], int]) -> Any:
    """The model with every expert rounded where it is: what paging must give to the bit."""
    for layer, module in enumerate(expert_layers(model).values()):
        for expert in range(count(module)):
            own = at_width(widths[layer, expert])
            for W in matrices(module, expert).values():
                W.copy_(dequantise(RTN().quantise(W, own, None, ""), tuple(W.shape), own, W.dtype))  # type: ignore[arg-type]
    if not isinstance(module, torch.nn.ModuleDict):
        model.set_experts_implementation("eager")
    return model


def outputs(model: Any, tokens: int = 5) -> list[Tensor]:
    told = model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [told.sequences, *told.logits]


@pytest.mark.parametrize("kind", [mixtral, qwen, gpt_oss, switch])
def test_same_outputs_for_any_cache(kind: Any, tmp_path: Path) -> None:
    """To the bit, with room for one expert, for fewer than a layer uses, for all; whatever is foreseen."""
    widths = mixed(made(kind))
    file = pack_experts(made(kind), tmp_path / "experts", widths)
    expected = outputs(rounded(made(kind), widths))
    assert not all(torch.equal(a, b) for a, b in zip(outputs(made(kind)), expected, strict=True))
    for cache in (1, 3, len(widths)):
        for prefetch in (True, False):
            model = made(kind)
            with PagedExperts(model, file, cache, prefetch=prefetch) as pages:
                got = outputs(model)
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
                assert len(pages._held) <= cache
                assert prefetch or 1 < cache < len(widths) or pages.stats.loads == pages.stats.misses
                assert not any(pages._resident._pins[key] for key in widths if key not in pages._ahead)


def test_what_is_predicted_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pack_experts(made(mixtral), tmp_path / "experts", 4)
    expected = outputs(rounded(made(mixtral), dict.fromkeys(mixed(made(mixtral)), 4)))
    model = made(mixtral)
    with PagedExperts(model, file, 5) as pages:
        monkeypatch.setattr(pages._after[0].__class__, "predict", lambda self, now, n: [5, 4, 3, 2, 1, 0][:n])
        got = outputs(model)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def routed(model: Any, run: Any) -> list[set[tuple[int, int]]]:
    """Which experts each forward of each layer chose, in order."""
    seen: list[set[tuple[int, int]]] = []
    hooks = []
    for number, module in enumerate(expert_layers(model).values()):

        def note(_: Any, args: Any, number: int = number) -> None:
            seen.append({(number, e) for e in args[1].unique().tolist()})

        hooks.append(module.register_forward_pre_hook(note))
    run(model)
    for hook in hooks:
        hook.remove()
    return seen


def test_every_byte_is_counted(tmp_path: Path) -> None:
    """Room for all: each expert that is used is read once. No prefetch and room for one: each use is a read."""
    widths = mixed(made(mixtral))
    file = pack_experts(made(mixtral), tmp_path / "experts", widths)
    seen = routed(rounded(made(mixtral), widths), outputs)
    shapes = [(48, 16), (16, 24)]

    def size(key: tuple[int, int]) -> int:
        return packed_bytes(shapes, at_width(widths[key]))

    # 8 bits, rows of 16 and 24: codes, and for each row a scale in 16 bits and a zero
    assert size((0, 0)) == 48 * (16 + 2 + 1) + 16 * (24 + 2 + 1)
    reads: list[tuple[int, int]] = []
    for cache, prefetch, expected in ((99, True, set().union(*seen)), (1, False, [k for keys in seen for k in keys])):
        model, reads = made(mixtral), []
        with PagedExperts(model, file, cache, prefetch=prefetch) as pages:
            read = pages.file.read
            pages.file.read = lambda key, device, read=read, reads=reads: reads.append(key) or read(key, device)  # type: ignore[method-assign]
            outputs(model)
            told = pages.stats
        assert sorted(reads) == sorted(expected)
        assert (told.loads, told.bytes_read) == (len(reads), sum(map(size, reads)))
        assert told.hits + told.misses == sum(map(len, seen))
        assert told.misses == len(reads)
    data = sum(map(size, widths))
    head = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size == head + data


class Chain:
    """Routers of a Mixtral that send every token of layer l to expert `order[step][l]`."""

    def __init__(self, model: Any, order: Any):
        self.step = 0
        for number, block in enumerate(model.model.layers):
            gate = block.mlp.gate

            def route(_: Any, args: Any, out: Any, number: int = number) -> Any:
                logits, weights, index = out
                return logits, torch.ones_like(weights), torch.full_like(index, order(self.step, number))

            gate.register_forward_hook(route)


def test_a_chain_is_all_hits_after_one_round(tmp_path: Path) -> None:
    """Expert (t + l) mod 6 at token t in layer l: the next layer's is always one more. Room for two of 18."""
    model = made(mixtral, k=1)
    file = pack_experts(model, tmp_path / "experts", 2)
    for prefetch, rate in ((True, 1.0), (False, 0.0)):
        model = made(mixtral, k=1)
        chain = Chain(model, lambda t, l: (t + l) % 6)  # noqa: E741
        with PagedExperts(model, file, 2, prefetch=prefetch) as pages, torch.no_grad():
            for chain.step in range(13):
                if chain.step == 7:  # the step from token 5 to token 6 is the round's last
                    pages.stats.__init__()
                model(input_ids=IDS[:, :1])
            assert pages.stats.hit_rate == rate
            assert pages.stats.hits + pages.stats.misses == 18


def test_saved_and_loaded_without_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind, auto in ((mixtral, transformers.AutoModelForCausalLM), (switch, transformers.AutoModelForSeq2SeqLM)):
        model, widths = made(kind), mixed(made(kind))
        before = outputs(model)
        save_paged(model, tmp_path / kind.__name__, widths)
        assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))
        assert getattr(model.config, "quantization_config", None) is None
        expected = outputs(rounded(model, widths))
        loaded, pages = load_paged(tmp_path / kind.__name__, 4, auto=auto)
        with pages:
            names = set(expert_layers(made(kind)))
            assert not [n for n, p in loaded.named_parameters() if any(n.startswith(f"{path}.") for path in names)]
            assert all(torch.equal(a, b) for a, b in zip(outputs(loaded), expected, strict=True))
        assert "UNEXPECTED" not in caplog.text
        assert "MISSING" not in caplog.text


def test_adapters_elsewhere_work_on_it(tmp_path: Path) -> None:
    file = pack_experts(made(mixtral), tmp_path / "experts", 4)
    model = made(mixtral)
    with PagedExperts(model, file, 2):
        plain = outputs(model)
        adapter = rankfold.attach(model, rankfold.LoRA(rank=2), "attention")
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_()
        assert not torch.equal(outputs(model)[-1], plain[-1])
        rankfold.detach(model)
        assert torch.equal(outputs(model)[-1], plain[-1])
    model = made(mixtral)
    rankfold.attach(model, rankfold.LoRA(rank=2), ["gate_up_proj"])
    with pytest.raises(AdapterFileError, match="adapted"):
        PagedExperts(model, file, 2)


def test_a_failure_leaves_nothing_pinned(tmp_path: Path) -> None:
    file = pack_experts(made(mixtral), tmp_path / "experts", 4)
    model = made(mixtral)
    with PagedExperts(model, file, 4) as pages:
        read = pages.file.read
        pages.file.read = lambda key, device: 1 / 0  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            model(input_ids=IDS)
        pages.file.read = read  # type: ignore[method-assign]
        model(input_ids=IDS)
        assert not any(pages._resident._pins[key] for key in pages._held if key not in pages._ahead)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    file = pack_experts(made(mixtral), tmp_path / "experts", 4)
    with pytest.raises(AdapterFileError, match="no file"):
        PagedExperts(made(mixtral), tmp_path / "nothing", 2)
    for other in (made(mixtral, experts=5), made(mixtral, layers=2), made(switch)):
        with pytest.raises(AdapterFileError, match="page the model that was packed"):
            PagedExperts(other, file, 2)
    with pytest.raises(UnsupportedError, match="no layers of experts"):
        pack_experts(torch.nn.Linear(2, 2), tmp_path / "none")
    with pytest.raises(UnsupportedError, match="rounded to nearest"):
        pack_experts(made(mixtral), tmp_path / "none", 4, Scheme(ordered=True))
    assert not (tmp_path / "none").exists()
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    described = json.loads(header["__metadata__"]["experts"])
    for change in ("format", "drop", "path"):
        layers = json.loads(json.dumps(described))
        if change == "format":
            layers[1]["schemes"][2]["format"] = "int8"
        elif change == "drop":
            del layers[2]
        else:
            layers[0]["shapes"]["gate_up_proj"] = "large"
        text = json.dumps({**header, "__metadata__": {"experts": json.dumps(layers)}}).encode()
        (tmp_path / "bad").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(AdapterFileError, match="damaged" if change != "path" else "does not describe"):
            ExpertFile(tmp_path / "bad")


def test_worked_widths() -> None:
    """Bytes 80, 40, 20. a costs 0, 4, 6 and b 0, 1, 4: b first (1 / 40), a (4 / 40), a (2 / 20), last b (3 / 20)."""
    loss = {(0, 0): {8: 0.0, 4: 4.0, 2: 6.0}, (0, 1): {8: -1.0, 4: 1.0, 2: 4.0}}
    found = Profile(loss, {key: {8: 80, 4: 40, 2: 20} for key in loss})
    a, b = (0, 0), (0, 1)
    assert found.choose(budget=160) == {a: 8, b: 8}
    assert found.choose(budget=159) == {a: 8, b: 4}
    assert found.choose(budget=100) == {a: 4, b: 4}
    assert found.choose(budget=79) == {a: 2, b: 4}
    assert found.choose(budget=40) == {a: 2, b: 2}
    assert found.choose(quality=0.5) == {a: 8, b: 8}
    assert found.choose(quality=3) == {a: 8, b: 4}
    assert found.choose(quality=4) == {a: 8, b: 2}
    assert found.choose(quality=7) == {a: 2, b: 4}
    assert found.choose(quality=10) == {a: 2, b: 2}
    for wrong in ({"budget": 39}, {}, {"budget": 100, "quality": 1.0}):
        with pytest.raises(RankfoldError):
            found.choose(**wrong)  # type: ignore[arg-type]


def test_profile_finds_what_matters(tmp_path: Path) -> None:
    """Widths cost what rounding that expert alone costs; the model is left alone; budgets hold; bytes only fall."""
    model = made(mixtral, layers=2, experts=4)
    batches = [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS.flip(0, 1), "labels": IDS.flip(0, 1)}]
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = profile(model, batches)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    other = made(mixtral, layers=2, experts=4)
    with torch.no_grad():
        plain = sum(float(other(**b).loss) for b in batches) / 2
        own = at_width(2)
        for W in matrices(expert_layers(other)["model.layers.1.mlp.experts"], 2).values():
            W.copy_(dequantise(RTN().quantise(W, own, None, ""), tuple(W.shape), own, W.dtype))  # type: ignore[arg-type]
        assert found.loss[1, 2][2] == pytest.approx(sum(float(other(**b).loss) for b in batches) / 2 - plain)
    assert sum(abs(w[2]) for w in found.loss.values()) > 3 * sum(abs(w[8]) for w in found.loss.values())
    whole, least = (sum(f(w.values()) for w in found.bytes.values()) for f in (max, min))
    steps = [found.choose(budget=int(least + (whole - least) * share)) for share in (1.0, 0.7, 0.4, 0.0)]
    for wide, narrow in pairwise(steps):
        assert all(narrow[key] <= wide[key] for key in wide)
    for share, widths in zip((1.0, 0.7, 0.4, 0.0), steps, strict=True):
        file = pack_experts(model, tmp_path / "experts", widths)
        assert sum(sum(map(layer.bytes, range(4))) for layer in opened(file)) <= least + (whole - least) * share


def opened(file: Path) -> Iterator[Any]:
    found = ExpertFile(file)
    found.close()
    yield from found.layers
