"""Every kind of layer and every way a model is used, with the expected result worked out without Rankfold.

Three methods stand for the three ways to say a change: LoRA (factors), DoRA (transform) and `Dense` below (update).
"""

import copy
import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold
from rankfold.deltas.dora import DoRA
from rankfold.deltas.lora import LoRA


class Dense(LoRA):
    """ΔW = U, a whole matrix. It takes LoRA's slug, so that the registry does not hear of it."""

    def delta(self, site: rankfold.Site, shared: nn.Module | None) -> "DenseDelta":  # type: ignore[override]
        return DenseDelta(site)


class DenseDelta(rankfold.Delta):
    def __init__(self, site: rankfold.Site):
        super().__init__(site)
        self.U = site.parameter_like(site.out, site.in_)

    def start(self, rng: torch.Generator) -> None:
        nn.init.zeros_(self.U)

    def update(self) -> Tensor:
        return self.U


METHODS = {"factors": LoRA(rank=3, alpha=6), "transform": DoRA(rank=3, alpha=6), "update": Dense(rank=3)}
every_form = pytest.mark.parametrize("form", list(METHODS))


def changed(W: Tensor, delta: Any) -> Tensor:
    """W' of the three methods, from their papers; DoRA's norm is a constant to the gradient."""
    if hasattr(delta, "U"):
        return W + delta.U
    V = W + 2 * delta.B @ delta.A
    return delta.m[..., None] * V / V.norm(dim=-1, keepdim=True).detach() if hasattr(delta, "m") else V


def scramble(adapter: rankfold.Adapter, seed: int = 0, size: float = 0.3) -> rankfold.Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(
                size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            )
    return adapter


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    error = float((a.detach() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1e-30))
    assert error <= tolerance, f"relative difference {error:.2e} over {tolerance:.0e}"


# ---- one layer of each kind


def gpt2_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(12, 8)
    nn.init.normal_(layer.bias)
    return layer


def gemma3_embedding() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(20, 8, padding_idx=0, embed_scale=2.5)


def ids(rows: int = 4) -> Tensor:
    return torch.randint(0, 20, (rows, 6))


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, *shape, dtype=torch.float64)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(8, 12), numbers(5, 8)),
    "linear, one vector a row": (lambda: nn.Linear(8, 12), numbers(8)),
    "linear, no bias": (lambda: nn.Linear(8, 12, bias=False), numbers(5, 8)),
    "conv1d of GPT-2": (gpt2_conv1d, numbers(5, 8)),
    "embedding": (lambda: nn.Embedding(20, 8), ids),
    "embedding, padding": (lambda: nn.Embedding(20, 8, padding_idx=3), ids),
    "embedding, scaled": (gemma3_embedding, ids),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), numbers(6, 9)),
    "conv1d, stride and dilation": (lambda: nn.Conv1d(6, 8, 3, stride=2, dilation=2, padding=1), numbers(6, 11)),
    "conv1d, circular": (lambda: nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), numbers(6, 9)),
    "conv1d, groups": (lambda: nn.Conv1d(6, 8, 3, groups=2), numbers(6, 9)),
    "conv1d, depthwise": (lambda: nn.Conv1d(8, 8, 4, groups=8, padding=3), numbers(8, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), numbers(3, 7, 6)),
    "conv2d, no bias": (lambda: nn.Conv2d(3, 8, 3, bias=False), numbers(3, 7, 6)),
    "conv2d, stride": (lambda: nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(0, 1)), numbers(3, 7, 6)),
    "conv2d, patches": (lambda: nn.Conv2d(3, 8, 4, stride=4), numbers(3, 8, 8)),
    "conv2d, same and dilation": (lambda: nn.Conv2d(3, 8, 3, padding="same", dilation=2), numbers(3, 7, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), numbers(3, 7, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), numbers(4, 7, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), numbers(8, 7, 6)),
    "conv2d, 1×1": (lambda: nn.Conv2d(4, 8, 1), numbers(4, 7, 6)),
}


def stored(layer: nn.Module, W: Tensor) -> Tensor:
    """W (out, in) in the layout of the layer's weight; `matrix` is the way back."""
    return (
        W.T
        if layer.weight.shape == W.T.shape and layer.weight.dim() == 2 and is_turned(layer)
        else W.reshape(layer.weight.shape)
    )


def matrix(layer: nn.Module) -> Tensor:
    return layer.weight.T if is_turned(layer) else layer.weight.flatten(1)


def is_turned(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding) or "Conv1D" in type(layer).__name__


@every_form
@pytest.mark.parametrize("kind", list(LAYERS))
def test_one_layer(kind: str, form: str) -> None:
    make, inputs = LAYERS[kind]
    model = nn.Sequential(make()).double()
    plain, x = copy.deepcopy(model[0]), inputs()
    before = plain(x)
    adapter = rankfold.attach(model, METHODS[form], targets=["0"])
    close(model(x), before)
    scramble(adapter)
    delta = adapter.deltas["0"]

    leaf = x.clone().requires_grad_() if x.is_floating_point() else x
    y = model(leaf)
    weigh = torch.randn_like(y)
    if getattr(plain, "padding_idx", None) is not None:  # what its gradient means is said below
        weigh = weigh * (x != plain.padding_idx)[..., None]
    (y * weigh).sum().backward()
    expected_leaf = x.clone().requires_grad_() if x.is_floating_point() else x
    W = stored(plain, changed(matrix(plain).detach(), delta))
    expected = torch.func.functional_call(plain, {"weight": W}, (expected_leaf,))
    own = list(adapter.parameters())
    wanted = [*own, *([expected_leaf] if x.is_floating_point() else [])]
    gradients = torch.autograd.grad((expected * weigh).sum(), wanted)
    close(y, expected)
    for parameter, gradient in zip(wanted, gradients, strict=True):
        close((leaf if parameter is expected_leaf else parameter).grad, gradient, 1e-9)

    with rankfold.using(model, ["default", None, None, "default"]):
        rows = model(x)
    close(rows[[0, 3]], expected[[0, 3]])
    close(rows[[1, 2]], before[[1, 2]])

    rankfold.merge(model)
    close(model[0].weight, W)
    close(model(x), expected)
    rankfold.detach(model)
    assert torch.equal(model[0].weight, plain.weight)
    assert type(model[0]) is type(plain)
    assert torch.equal(model(x), before)


def test_the_padding_row_of_an_embedding_gets_no_gradient() -> None:
    for form, method in METHODS.items():
        model = nn.Sequential(nn.Embedding(20, 8, padding_idx=3)).double()
        adapter = scramble(rankfold.attach(model, method, targets=["0"]))
        model(torch.tensor([[3, 3, 5]])).square().sum().backward()
        gradient = adapter.deltas["0"].U.grad if form == "update" else adapter.deltas["0"].A.grad
        assert not gradient[:, 3].any(), form
        assert gradient[:, 5].any(), form


def test_an_embedding_with_max_norm_is_refused_only_where_it_is_a_target() -> None:
    model = nn.Sequential(nn.Embedding(20, 8, max_norm=1.0), nn.Linear(8, 8))
    with pytest.raises(rankfold.UnsupportedError, match="0: an embedding with max_norm"):
        rankfold.attach(model, LoRA(rank=2), targets=["0"])
    assert type(model[0]) is nn.Embedding
    rankfold.attach(model, LoRA(rank=2), targets=["1"])


def test_transposed_convolutions_are_no_target() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 4, 1))
    with pytest.raises(rankfold.RankfoldError, match=r"0 \(ConvTranspose2d\), which no delta can sit on"):
        rankfold.attach(model, LoRA(rank=2), targets=["0"])


# ---- Transformers models


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager",
        "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).double().eval()


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def replaced(
    plain: nn.Module, adapter: rankfold.Adapter, experts: bool = False, turned: bool = False
) -> dict[str, Tensor]:
    """Every adapted weight W' in its layout, for `functional_call` on the plain model."""
    weights = {}
    for name, delta in adapter.deltas.items():
        if experts:
            W = plain.get_parameter(name).detach()
            W = changed(W.mT if turned else W, delta)
            weights[name] = W.mT if turned else W
        else:
            layer = plain.get_submodule(name)
            weights[f"{name}.weight"] = stored(layer, changed(matrix(layer).detach(), delta))
    return weights


def check_against(
    plain: nn.Module,
    model: nn.Module,
    adapter: rankfold.Adapter,
    weights: Callable[[], dict[str, Tensor]],
    tolerance: float = 1e-8,
    **inputs: Any,
) -> None:
    """Outputs and gradients of the adapted model against the plain one with W' put in its place."""
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    gradients = torch.autograd.grad(loss, list(adapter.parameters()))
    expected = torch.func.functional_call(
        plain, weights(), (), {**inputs, "labels": inputs["input_ids"]}, tie_weights=False
    ).loss
    wanted = torch.autograd.grad(expected, list(adapter.parameters()))
    close(loss, expected, tolerance)
    for gradient, want in zip(gradients, wanted, strict=True):
        close(gradient, want, tolerance)


@every_form
def test_gpt2(form: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        vocab_size=61,
        n_positions=32,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    model = GPT2LMHeadModel(config).double().eval()
    plain = copy.deepcopy(model)
    adapter = scramble(rankfold.attach(model, METHODS[form]))
    assert len(adapter.deltas) == 8
    check_against(plain, model, adapter, lambda: replaced(plain, adapter), input_ids=tokens())
    adapted = model(tokens()).logits
    rankfold.merge(model)
    close(model(tokens()).logits, adapted)


def mixture(family: str, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 61, "num_local_experts": 4, "num_experts_per_tok": 2,
        "initializer_range": 0.4, "head_dim": 8,
        "attn_implementation": "eager", "experts_implementation": implementation, "max_position_embeddings": 64,
    }  # fmt: skip
    if family == "mixtral":
        from transformers import MixtralConfig, MixtralForCausalLM

        return MixtralForCausalLM(MixtralConfig(**sizes)).double().eval()
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**sizes)).double().eval()


@every_form
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_fused_experts(family: str, implementation: str, form: str) -> None:
    # `grouped_mm` has no float64
    tolerance = 1e-4 if implementation == "grouped_mm" else 1e-9
    model = mixture(family, implementation)
    model = model.float() if implementation == "grouped_mm" else model
    plain, x = copy.deepcopy(model), tokens(4)
    before = plain(x).logits
    adapter = rankfold.attach(model, METHODS[form], targets=["gate_up_proj", "down_proj"])
    assert len(adapter.deltas) == 4
    assert model.config._experts_implementation == implementation
    close(model(x).logits, before, tolerance)
    scramble(adapter)
    check_against(
        plain, model, adapter, lambda: replaced(plain, adapter, True, family == "gpt-oss"), tolerance, input_ids=x
    )

    weights = replaced(plain, adapter, True, family == "gpt-oss")
    adapted = torch.func.functional_call(plain, weights, (x,)).logits
    with torch.no_grad(), rankfold.using(model, ["default", None, "default", None]):
        rows = model(x).logits
    close(rows[[0, 2]], adapted[[0, 2]], tolerance)
    close(rows[[1, 3]], before[[1, 3]], tolerance)
    rankfold.merge(model)
    for name, weight in weights.items():
        close(model.get_parameter(name), weight, 1e-6)
    close(model(x).logits, adapted, tolerance)
    rankfold.detach(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert torch.equal(model(x).logits, before)


def test_an_expert_weight_is_adapted_once_for_each_forward() -> None:
    """The eager way reads the weight for every expert; that must not build W' of all experts each time."""
    model = mixture("mixtral", "eager")
    adapter = rankfold.attach(model, METHODS["update"], targets=["gate_up_proj", "down_proj"])
    calls = []
    for delta in adapter.deltas.values():
        delta.update = lambda delta=delta: calls.append(delta) or delta.U  # type: ignore[method-assign]
    model(tokens())
    assert len(calls) == len(adapter.deltas)


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
@every_form
def test_tied_embeddings(form: str, side: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama(tie_word_embeddings=True)
    plain, x = copy.deepcopy(model), tokens()
    before = plain(x).logits
    other = model.lm_head if side == "embed_tokens" else model.get_input_embeddings()
    adapter = scramble(rankfold.attach(model, METHODS[form], targets=[side]))
    (delta,) = adapter.deltas.values()
    W = plain.lm_head.weight.detach()
    untied = copy.deepcopy(plain)
    untied.lm_head.weight = nn.Parameter(W.clone())
    mine = untied.get_input_embeddings() if side == "embed_tokens" else untied.lm_head
    mine.weight = nn.Parameter(changed(W.T, delta).T if side == "embed_tokens" else changed(W, delta))
    expected = untied(x).logits
    close(model(x).logits, expected)

    with pytest.warns(UserWarning, match=r"is tied to .* stays as it was"):
        rankfold.merge(model)
    assert torch.equal(other.weight, W)
    close(model(x).logits, expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    close(again(x).logits, model(x).logits, 1e-6)  # its rotary frequencies are made in float32

    rankfold.unmerge(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings
    with rankfold.using(model, None):
        assert torch.equal(model(x).logits, before)


def test_a_module_under_two_names_is_adapted_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    model = Twice().double()
    plain, x = copy.deepcopy(model), torch.randn(3, 8, dtype=torch.float64)
    adapter = scramble(rankfold.attach(model, METHODS["factors"]))
    assert list(adapter.deltas) == ["first"]
    assert adapter.num_parameters() == 3 * 16
    W = changed(plain.first.weight, adapter.deltas["first"])
    b = plain.first.bias
    y = model(x)
    expected = F.linear(torch.relu(F.linear(x, W, b)), W, b)
    close(y, expected)
    own = list(adapter.parameters())
    for got, want in zip(torch.autograd.grad(y.sum(), own), torch.autograd.grad(expected.sum(), own), strict=True):
        close(got, want)
    assert len(model.state_dict()) == 2 * (2 + 2), "as PyTorch does: once for each name"
    rankfold.merge(model)
    close(model(x), expected)
    rankfold.detach(model)
    assert torch.equal(model(x), plain(x))


# ---- PyTorch's own attention


def test_multihead_attention_is_not_adapted_silently() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(
        rankfold.RankfoldError, match=r"out_proj \(NonDynamicallyQuantizableLinear\), which no delta can sit on"
    ):
        rankfold.attach(model, LoRA(rank=2), targets=["out_proj"])
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert sorted(rankfold.attach(layer, LoRA(rank=2)).deltas) == ["linear1", "linear2"]


@pytest.mark.parametrize("padded", [False, True])
def test_pytorchs_transformer_does_not_bypass_the_adapter_in_inference(padded: bool) -> None:
    """Its fast path reads `linear1`'s weight without calling it; padded batches become nested tensors."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if padded else None
    plain = copy.deepcopy(model)
    adapter = scramble(rankfold.attach(model, METHODS["factors"]))
    plain.load_state_dict(plain.state_dict() | replaced(plain, adapter))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        expected = plain(x, src_key_padding_mask=mask)
        close(model(x, src_key_padding_mask=mask), expected)
    rankfold.detach(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- what else is done to models


def test_hooks_of_accelerate() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Twofold(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model = nn.Sequential(nn.Linear(8, 8)).double()
    plain, x = copy.deepcopy(model[0]), torch.randn(3, 8, dtype=torch.float64)
    add_hook_to_module(model[0], Twofold())
    adapter = scramble(rankfold.attach(model, METHODS["factors"], targets=["0"]))
    expected = F.linear(x, changed(plain.weight, adapter.deltas["0"]), plain.bias)
    close(model(x), 2 * expected)
    close(copy.deepcopy(model)(x), 2 * expected)
    rankfold.detach(model)
    close(model(x), 2 * plain(x))
    adapter = scramble(rankfold.attach(model, METHODS["factors"], targets=["0"]))
    remove_hook_from_module(model[0])
    close(model(x), expected)
    rankfold.detach(model)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@every_form
def test_copies_stand_alone(form: str, family: str) -> None:
    model, x = llama() if family == "llama" else mixture("mixtral", "eager"), tokens()
    before = model(x).logits
    targets = "all-linear" if family == "llama" else ["gate_up_proj", "q_proj"]
    scramble(rankfold.attach(model, METHODS[form], targets=targets))
    adapted = model(x).logits.detach()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x).logits, adapted)
    rankfold.detach(model)
    assert torch.equal(model(x).logits, before)
    assert torch.equal(copied(x).logits, adapted)
    assert rankfold.adapters(copied)["default"].model is copied
    rankfold.set_active(copied, None)
    assert torch.equal(copied(x).logits, before)
    rankfold.merge(copied, "default")
    close(copied(x).logits, adapted)
    again = copy.deepcopy(copied)
    rankfold.detach(again)
    assert torch.equal(again(x).logits, before), "the copy of a merged model has lost the original weights"
    close(copied(x).logits, adapted)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_whole_model_can_be_pickled(family: str) -> None:
    model, x = llama() if family == "llama" else mixture("mixtral", "eager"), tokens()
    targets = "all-linear" if family == "llama" else ["gate_up_proj", "q_proj"]
    scramble(rankfold.attach(model, DoRA(rank=3), targets=targets))
    before = model(x).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x).logits, before)
    with rankfold.using(again, ["default", None]), torch.no_grad():
        again(x)
    rankfold.detach(again)
    rankfold.detach(model)
    assert torch.equal(again(x).logits, model(x).logits)


def test_state_dict_leaves_merged_adapters_out_and_others_in() -> None:
    model = llama()
    plain = set(model.state_dict())
    a, b = (scramble(rankfold.attach(model, LoRA(rank=2), targets=["q_proj"], name=name)) for name in ("a", "b"))
    assert len(model.state_dict()) == len(plain) + 2 * 2 * 2
    rankfold.merge(model, "a")
    extra = set(model.state_dict()) - plain
    assert len(extra) == 4
    assert all(".b." in key for key in extra)
    rankfold.merge(model, "b")
    assert set(model.state_dict()) == plain
    name = "model.layers.0.self_attn.q_proj"
    total = a.deltas[name].B @ a.deltas[name].A + b.deltas[name].B @ b.deltas[name].A
    merged = model.state_dict()[f"{name}.weight"]
    rankfold.unmerge(model)
    close(merged, model.get_submodule(name).weight + total)


def test_threads_never_see_each_others_adapter() -> None:
    model, x = llama(), tokens()
    for seed, name in enumerate("abc"):
        scramble(rankfold.attach(model, LoRA(rank=2), name=name), seed)
    rankfold.set_active(model, None)
    choices: list[Any] = ["a", "b", "c", None, ["a", "b"], [None, "c"]]
    expected = []
    with torch.no_grad():
        for choice in choices:
            with rankfold.using(model, choice):
                expected.append(model(x).logits)
        plain = expected[3]
        wrong: list[Any] = []
        inside = threading.Event()

        def serve(choice: Any, want: Tensor) -> None:
            with torch.no_grad():
                for _ in range(15):
                    with rankfold.using(model, choice):
                        inside.set()
                        if not torch.equal(model(x).logits, want) or not torch.equal(model(x).logits, want):
                            wrong.append(choice)

        def call() -> None:
            inside.wait(10)
            with torch.no_grad():
                for _ in range(30):
                    if not torch.equal(model(x).logits, plain):
                        wrong.append("a plain call")

        threads = [threading.Thread(target=serve, args=pair) for pair in zip(choices, expected, strict=True)]
        threads += [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    assert not wrong


def test_a_thread_that_fails_inside_a_forward_leaves_the_model_free() -> None:
    model, x = llama(), tokens()
    rankfold.attach(model, LoRA(rank=2))
    with rankfold.using(model, ["default"] * 3 + [None] * 2), pytest.raises(rankfold.RankfoldError):
        model(x)
    done = []
    thread = threading.Thread(target=lambda: done.append(model(x)))
    thread.start()
    thread.join(20)
    assert done


@pytest.mark.parametrize("form", ["factors", "transform"])
def test_compiled_without_a_graph_break_and_again_for_each_adapter(form: str) -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    for seed, name in enumerate("ab"):
        scramble(rankfold.attach(model, METHODS[form], targets=["0", "2"], name=name), seed)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for choice in ("a", "b", None, "a", ["a", None, "b", "a"], ["b", "b", None, "a"], "b"):
        with rankfold.using(model, choice):
            own = [p for p in model.parameters() if p.requires_grad]
            want = model(x)
            got = compiled(x)
            close(got, want)
            if choice is not None:
                wanted = torch.autograd.grad(want.square().sum(), own, allow_unused=True)
                for a, b in zip(torch.autograd.grad(got.square().sum(), own, allow_unused=True), wanted, strict=True):
                    assert (a is None or not a.any()) if b is None else close(a, b, 1e-10) is None
    rankfold.set_active(model, "a")
    one = compiled(x)
    rankfold.set_active(model, None)
    assert not torch.equal(one, compiled(x)), "the compiled model has not noticed the switch"


def test_fused_experts_compile() -> None:
    model, x = mixture("mixtral", "batched_mm").model.layers[0].mlp.experts, torch.randn(6, 16, dtype=torch.float64)
    index, weights = torch.tensor([[0, 1], [1, 2], [3, 0]]).repeat(2, 1), torch.rand(6, 2, dtype=torch.float64)
    scramble(rankfold.attach(model, METHODS["transform"], targets=["gate_up_proj", "down_proj"]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for choice in ("default", None, ["default", None, "default"]):
        with rankfold.using(model, choice):
            close(compiled(x, index, weights), model(x, index, weights))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_gradient_checkpointing_inside_using(reentrant: bool, rows: bool) -> None:
    model, x = llama().train(), tokens()
    for seed, name in enumerate("ab"):
        scramble(rankfold.attach(model, LoRA(rank=2), name=name), seed)
    rankfold.set_active(model, "b")
    choice = ["a", None] if rows else "a"
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        with rankfold.using(model, choice):
            model(x, labels=x).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(".a." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


@every_form
@pytest.mark.parametrize("kind", ["linear", "conv1d of GPT-2", "conv2d", "embedding"])
def test_autocast(kind: str, form: str) -> None:
    make, inputs = LAYERS[kind]
    model = nn.Sequential(make())
    plain, x = copy.deepcopy(model[0]), inputs()
    x = x.float() if x.is_floating_point() else x
    adapter = scramble(rankfold.attach(model, METHODS[form], targets=["0"]))
    W = stored(plain, changed(matrix(plain).detach(), adapter.deltas["0"]))
    exact = torch.func.functional_call(plain, {"weight": W}, (x,))
    with torch.autocast("cpu", torch.bfloat16):
        y, dtype = model(x), plain(x).dtype
        y.float().square().sum().backward()
    assert y.dtype == dtype
    close(y.float(), exact, 0.04)
    want = torch.autograd.grad(exact.square().sum(), list(adapter.parameters()))
    for parameter, gradient in zip(adapter.parameters(), want, strict=True):
        assert parameter.grad.dtype == torch.float32
        close(parameter.grad, gradient, 0.06)


@every_form
def test_functional_call_with_grad_and_vmap(form: str) -> None:
    from torch.func import functional_call, grad, vmap

    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    scramble(rankfold.attach(model, METHODS[form], targets=["0", "2"]))
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    found = grad(loss)(own, x)
    for name, wanted in zip(own, torch.autograd.grad(model(x).square().sum(), list(own.values())), strict=True):
        close(found[name], wanted, 1e-10)
    each = vmap(grad(loss), in_dims=(None, 0))({name: p.detach() for name, p in own.items()}, x)
    for row in range(len(x)):
        alone = torch.autograd.grad(model(x[row : row + 1]).square().sum(), list(own.values()))
        for name, wanted in zip(own, alone, strict=True):
            close(each[name][row], wanted, 1e-10)


# ---- generation


def test_generate() -> None:
    model, x = llama(), tokens()
    adapter = scramble(rankfold.attach(model, METHODS["factors"]))
    merged = llama()
    merged.load_state_dict(merged.state_dict() | replaced(merged, adapter))
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = merged.generate(x, **options)
    assert torch.equal(model.generate(x, **options), expected)
    assert not torch.equal(llama().generate(x, **options), expected), (
        "the adapter changes nothing: the test would not see a bug"
    )


def test_pipeline() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3", pad_token="w0", eos_token="w2")
    model = llama()
    adapter = scramble(rankfold.attach(model, METHODS["factors"]))
    merged = llama()
    merged.load_state_dict(merged.state_dict() | replaced(merged, adapter))
    texts = []
    for one in (model, merged):
        generate = pipeline("text-generation", model=one, tokenizer=tokenizer)
        texts.append(generate("w7 w9 w11", max_new_tokens=6, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("beams", [1, 3])
@every_form
def test_generate_with_an_adapter_for_each_row(form: str, beams: int) -> None:
    model, x = llama(), tokens()
    scramble(rankfold.attach(model, METHODS[form], name="a"), size=0.5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    alone = []
    for row, name in enumerate(["a", None]):
        with rankfold.using(model, name):
            alone.append(model.generate(x[row : row + 1], **options)[0])
    with rankfold.using(model, ["a", None]):
        together = model.generate(x, **options)
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])


def test_a_wrong_number_of_rows() -> None:
    model, x = llama(), tokens(3)
    rankfold.attach(model, LoRA(rank=2), name="a")
    with (
        rankfold.using(model, ["a", None]),
        pytest.raises(rankfold.RankfoldError, match=r"2 adapter names were given.*multiple of 2"),
    ):
        model(x)
    with (
        rankfold.using(model, ["a", None, "a", None]),
        pytest.raises(rankfold.RankfoldError, match="4 adapter names were given"),
    ):
        model(x)
    with pytest.raises(rankfold.RankfoldError, match="no adapter is called 'b'"), rankfold.using(model, ["a", "b"]):
        pass
    with pytest.raises(rankfold.RankfoldError, match="empty list"), rankfold.using(model, []):
        pass
