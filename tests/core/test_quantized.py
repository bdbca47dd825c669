"""Every method over bases whose weights are held in few bits, against the same method over the dequantised weights."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold
from rankfold.core.packed import NF4, PackedLinear
from rankfold.core.quantized import dense, is_plain
from tests.quantizers import QUANTIZERS, linear_4bit, linear_8bit

SLUGS = [entry.slug for entry in rankfold.methods() if entry.axis == "deltas"]
SUPPORTS = {entry.slug: entry.supports for entry in rankfold.methods()}
every_method = pytest.mark.parametrize("slug", SLUGS)
every_quantizer = pytest.mark.parametrize("quantizer", list(QUANTIZERS))


def floats(layer: nn.Module) -> Tensor:
    """The dense weight, read without Rankfold."""
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.weight
    if isinstance(layer, PackedLinear):
        codes = weight.view(torch.uint8)
        q = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, : layer.in_features].long()
        scales, zeros = (
            None if t is None else t.float().repeat_interleave(32, 1)[:, : layer.in_features]
            for t in (layer.scales, layer.zeros)
        )
        return (torch.tensor(NF4)[q] if zeros is None else q - zeros) * scales
    if type(weight).__name__ == "Params4bit":
        return dequantize_4bit(weight.data, weight.quant_state)
    if type(weight).__name__ == "Int8Params":
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * scales[:, None] / 127
    return weight.get_original_weight() if type(weight).__name__ == "NF4Tensor" else weight.dequantize()


def net(quantizer: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return QUANTIZERS[quantizer](nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(dtype))


def refused(model: nn.Module, slug: str) -> bool:
    """Whether the method says that it cannot sit on the weights as this model keeps them; then it must not."""
    kept = "packed" if isinstance(model[0], PackedLinear) else "foreign"
    if SUPPORTS[slug][f"{kept}-base"] is True:
        return False
    with pytest.raises(rankfold.UnsupportedError, match=slug):
        attach(model, slug, targets=("0",))
    assert not rankfold.adapters(model)
    return True


def twin(model: nn.Module) -> nn.Module:
    """The model with ordinary linear layers that hold the dequantised weights."""
    layers = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            new.weight.data = floats(layer).detach().float().clone()
            if layer.bias is not None:
                new.bias.data = layer.bias.detach().float().clone()
            layer = new
        layers.append(layer)
    return nn.Sequential(*layers)


def attach(
    model: nn.Module, slug: str, name: str = "default", targets: tuple[str, ...] = ("0", "2")
) -> rankfold.Adapter:
    hyper = {"feedforward": []} if slug == "ia3" else {}
    return rankfold.attach(model, rankfold.build(slug, **hyper), targets=list(targets), name=name)


def scramble(adapter: rankfold.Adapter, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            size = parameter.abs().mean().clamp(min=0.05)
            parameter.add_(0.3 * size * torch.randn(parameter.shape, generator=generator))


def same(a: Tensor, b: Tensor, tolerance: float) -> None:
    a, b = a.detach().float(), b.detach().float()
    error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
    assert error <= tolerance, f"relative difference {error:.2e} over {tolerance:.0e}"


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (50, 33), (51, 33)], ids=str)
@every_quantizer
def test_dense_is_the_librarys_own_dequantisation(quantizer: str, shape: tuple[int, int]) -> None:
    if quantizer == "torchao-int4" and shape[0] % 32:
        pytest.skip("torchao wants whole groups of 32 inputs")
    if quantizer == "torchao-nf4" and shape[0] * shape[1] % 64:
        pytest.skip("torchao's NF4 wants whole blocks of 64 numbers")
    original = nn.Linear(*shape)
    layer = QUANTIZERS[quantizer](nn.Sequential(copy.deepcopy(original)))[0]
    if type(layer).__name__ == "Linear4bit":
        layer.support_avx512bf16_for_cpu = False  # what its repacking does to weights is tested below
    expected, x = floats(layer), torch.randn(2, 5, shape[0])
    assert not is_plain(layer.weight)
    for training in (True, False):  # before, between and after forwards: bitsandbytes moves its scales in the first
        same(dense(layer.weight, layer), expected, 1e-6)
        layer.train(training)
        # LLM.int8 rounds the inputs too, to 8 bits, outside training.
        same(
            layer(x),
            F.linear(x, expected, original.bias),
            0.02 if quantizer == "bitsandbytes-int8" and not training else 1e-5,
        )
    same(dense(layer.weight, layer), expected, 1e-6)
    same(expected, original.weight, 0.4)


@every_quantizer
@every_method
def test_equals_the_same_adapter_over_the_dequantised_weights(slug: str, quantizer: str) -> None:
    quantised = net(quantizer)
    if SUPPORTS[slug]["float-base"] is not True or refused(quantised, slug):
        pytest.skip("it sits on one sort of base only")
    floating = twin(quantised)
    x = torch.randn(3, 5, 64)
    outputs, inputs, gradients = [], [], []
    state = None
    for model in (quantised, floating):
        adapter = attach(model, slug)
        if state is None:
            scramble(adapter)
            state = adapter.state_dict()
        else:
            adapter.load_state_dict(state)
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().mean().backward()
        outputs.append(y)
        inputs.append(leaf.grad)
        gradients.append({name: p.grad for name, p in adapter.named_parameters()})
    same(outputs[0], outputs[1], 1e-4)
    same(inputs[0], inputs[1], 1e-4)
    for name, gradient in gradients[1].items():
        same(gradients[0][name], gradient, 1e-4)
    names = ["default", None, "default"]
    with rankfold.using(quantised, names), rankfold.using(floating, names):
        same(quantised(x), floating(x), 1e-4)


@every_quantizer
@every_method
def test_whole_life_of_an_adapter(slug: str, quantizer: str, tmp_path: Path) -> None:
    model = net(quantizer)
    plain = {name: type(module) for name, module in model.named_modules()}
    x, target = torch.randn(6, 64), torch.randn(6, 64)
    before = model(x)
    if refused(model, slug):
        return
    adapter = attach(model, slug)
    if SUPPORTS[slug]["identity"] is True:
        same(model(x), before, 1e-4)

    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = F.mse_loss(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    after = model(x)

    rankfold.save(model, tmp_path / "adapter", name="default")
    rankfold.load(model, tmp_path / "adapter", name="again")
    with rankfold.using(model, "again"):
        same(model(x), after, 1e-6)
    with rankfold.using(model, None):
        assert torch.equal(model(x), before)

    with pytest.raises(rankfold.RankfoldError):
        rankfold.attach(model, rankfold.build(slug), targets=["0"], name="folded", fold=True)
    if SUPPORTS[slug]["float-base"] is not True:
        rankfold.merge(model, "default")
        with rankfold.using(model, None):
            same(model(x), after, 1e-6)
        rankfold.unmerge(model)
    elif SUPPORTS[slug]["merge"] is True and not rankfold.build(slug).bias_only:
        with pytest.raises(rankfold.UnsupportedError, match="quantised: merging would round"):
            rankfold.merge(model, "default")
    if SUPPORTS[slug]["as-lora"] is True:
        _, report = rankfold.as_lora(model, "default")
        if max(report.values()) < 1e-4:  # what a method adds to a bias is lost, and counted
            with rankfold.using(model, "default-lora"):
                same(model(x), after, 1e-3)
    rankfold.detach(model)
    assert {name: type(module) for name, module in model.named_modules()} == plain
    assert torch.equal(model(x), before)


@every_quantizer
@pytest.mark.parametrize("slug", ["lora", "dora", "bone"])
def test_bf16(slug: str, quantizer: str) -> None:
    model = net(quantizer, torch.bfloat16)
    floating = twin(model)
    x = torch.randn(2, 5, 64)
    adapter = attach(model, slug)
    scramble(adapter)
    attach(floating, slug).load_state_dict(adapter.state_dict())
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    same(y, floating(x), 0.04)
    y.float().square().mean().backward()
    assert all(p.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in adapter.parameters())


@every_quantizer
def test_gradients_reach_the_layers_before_and_an_evaluation_between_changes_nothing(quantizer: str) -> None:
    model = net(quantizer)
    floating = twin(model)
    x = torch.randn(3, 64)
    adapter = attach(model, "lora", targets=("0",))
    scramble(adapter)
    attach(floating, "lora", targets=("0",)).load_state_dict(adapter.state_dict())
    with torch.no_grad():
        model.eval()(x)
    for one in (model, floating):
        one.train()(x).square().mean().backward()
    expected = dict(rankfold.adapters(floating)["default"].named_parameters())
    for name, parameter in adapter.named_parameters():
        same(parameter.grad, expected[name].grad, 1e-4)


@every_quantizer
def test_gradients_in_eval_mode(quantizer: str) -> None:
    """LLM.int8 answers with a view in eval mode, over which nothing may be written in place."""
    model = net(quantizer).eval()
    adapter = attach(model, "lora")
    scramble(adapter)
    model(torch.randn(2, 5, 64)).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit])
@every_method
def test_bitsandbytes_that_is_not_quantised_yet_is_refused(slug: str, make) -> None:
    model = nn.Sequential(make(nn.Linear(64, 64), move=False))
    if refused(model, slug):
        return
    with pytest.raises(rankfold.UnsupportedError, match=r"0: .*not quantised yet.*model\.to\(device\)"):
        attach(model, slug, targets=("0",))
    assert not rankfold.adapters(model)
    assert type(model[0]).__module__.startswith("bitsandbytes")
    with pytest.raises(rankfold.UnsupportedError, match="not quantised yet"):
        dense(model[0].weight, model[0])
    model.to("cpu")
    attach(model, slug, targets=("0",))


def test_int8_with_float_weights_reads_as_they_are() -> None:
    from bitsandbytes.nn import Linear8bitLt

    layer = Linear8bitLt(64, 64, has_fp16_weights=True)
    assert torch.equal(dense(layer.weight, layer), layer.weight.data)


def test_4bit_stored_as_bf16_as_fsdp_wants_it() -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, quant_type="nf4", quant_storage=torch.bfloat16)
    layer = layer.to("cpu")
    model, x = nn.Sequential(layer), torch.randn(2, 64)
    expected = floats(layer)
    before = model(x)
    adapter = attach(model, "lora", targets=("0",))
    assert layer.weight.dtype == torch.bfloat16
    assert next(adapter.parameters()).dtype == torch.float32
    assert torch.equal(adapter.deltas["0"].W, expected)
    assert torch.equal(model(x), before)
    layer.weight.quant_state = None  # as left by FSDP: the layer still has it
    assert torch.equal(adapter.deltas["0"].W, expected)


@pytest.mark.parametrize("double", [False, True])
def test_4bit_repacked_for_cpu_inference(double: bool) -> None:
    """bitsandbytes does this by itself on CPUs with AVX512-BF16; its packing is plain PyTorch, so we can do it here."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = linear_4bit(nn.Linear(128, 64), double=double)
    model, x = nn.Sequential(layer), torch.randn(3, 128, requires_grad=True)
    expected = floats(layer)
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    same(dense(layer.weight, layer), expected, 0.01)  # its scales were rounded to bfloat16
    assert layer.weight.quant_state.packing_format_for_cpu, "reading a weight must not change it"
    layer.support_avx512bf16_for_cpu = True
    adapter = attach(model, "lora", targets=("0",))
    same(model(x), F.linear(x, expected, layer.bias), 0.01)
    model(x).sum().backward()
    assert x.grad is not None
    assert adapter.deltas["0"].B.grad is not None
    with torch.no_grad():
        model.eval()(x.detach())
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    rankfold.detach(model)
    assert layer.support_avx512bf16_for_cpu


def test_layers_beside_adapted_ones_are_not_repacked_either() -> None:
    """A layer that bitsandbytes repacked in an evaluation could not take part in training afterwards."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = net("bitsandbytes-nf4")
    expected = floats(model[2])
    for layer in (model[0], model[2]):
        layer.support_avx512bf16_for_cpu = True
    weight = model[2].weight
    weight.data, _ = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    adapter = attach(model, "lora", targets=("0",))
    scramble(adapter)
    with torch.no_grad():
        model.eval()(torch.randn(3, 64))
    assert not getattr(weight.quant_state, "packing_format_for_cpu", False)
    same(floats(model[2]), expected, 0.01)
    model.train()(torch.randn(3, 64)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    rankfold.detach(model)
    assert model[0].support_avx512bf16_for_cpu
    assert model[2].support_avx512bf16_for_cpu


def test_a_base_without_gradient_is_refused_instead_of_training_wrongly() -> None:
    """torchao's kernels with quantised activations detach their input."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    before = model(x := torch.randn(3, 64))
    attach(model, "lora", targets=("0", "1"))
    with pytest.raises(rankfold.UnsupportedError, match="passes no gradient to its input"):
        model(x)
    with torch.no_grad():
        same(model(x), before, 1e-6)


def test_a_weight_that_cannot_be_read_carries_only_what_does_not_read_it() -> None:
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = nn.Sequential(nn.Linear(128, 64))
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32))
    x = torch.randn(3, 128)
    with torch.no_grad():
        before = model(x)
        adapter = attach(model, "lora", targets=("0",))
        scramble(adapter)
        delta = adapter.deltas["0"]
        same(model(x), before + x @ (delta.scale * delta.B @ delta.A).T, 1e-5)
    with pytest.raises(rankfold.UnsupportedError, match="Int4OpaqueTensor has no way back"):
        _ = delta.W


def test_float8_is_not_taken_for_a_plain_weight() -> None:
    weight = nn.Parameter(torch.randn(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    assert not is_plain(weight)
    with pytest.raises(rankfold.UnsupportedError, match="float8_e4m3fn numbers in no layout"):
        dense(weight)


@every_quantizer
@pytest.mark.parametrize("slug", ["lora", "dora"])
def test_copies_and_pickles(slug: str, quantizer: str) -> None:
    model, x = net(quantizer), torch.randn(3, 64)
    adapter = attach(model, slug)
    scramble(adapter)
    expected = model(x).detach()
    if quantizer != "torchao-nf4":  # copied by quantising it again, in blocks larger than this model's weights
        copied = copy.deepcopy(model)
        same(copied(x), expected, 1e-6)
        with torch.no_grad():
            for parameter in rankfold.adapters(copied)["default"].parameters():
                parameter.zero_()
        assert torch.equal(model(x), expected), "the copy shares tensors with the original"
        copied(x).sum().backward()
    if quantizer in ("torchao-int8", "torchao-int4"):
        return  # `quantize_` gives its layers an `extra_repr` that cannot be pickled, whether adapted or not
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    same(torch.load(buffer, weights_only=False)(x), expected, 1e-6)


@every_quantizer
def test_moved_to_another_dtype(quantizer: str) -> None:
    model, x = net(quantizer), torch.randn(3, 64)
    scramble(attach(model, "lora"))
    expected = model(x)
    model.to(torch.bfloat16)
    same(model(x.bfloat16()), expected, 0.04)
    model(x.bfloat16()).float().sum().backward()


@pytest.mark.parametrize(
    ("slug", "quantizer"),
    [
        ("lora", "bitsandbytes-nf4"),
        ("dora", "bitsandbytes-nf4"),
        ("lora", "bitsandbytes-int8"),
        ("dora", "torchao-int8"),
    ],
)
def test_compiled(slug: str, quantizer: str) -> None:
    model, x = net(quantizer), torch.randn(3, 64)
    scramble(attach(model, slug))
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(compiled(x), expected, 1e-4)


def llama_configs() -> dict[str, object]:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import BitsAndBytesConfig, TorchAoConfig

    return {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "torchao-int8": TorchAoConfig(Int8WeightOnlyConfig()),
        "torchao-int4": TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    }


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device_map", [None, "cpu"])
@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8", "torchao-int4"])
def test_a_model_that_transformers_loaded_quantised(name: str, device_map: str | None, llama_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=llama_configs()[name], dtype=torch.float32, device_map=device_map
    ).train()
    assert model.is_quantized
    ids = torch.randint(3, 97, (2, 9))
    before = model(input_ids=ids).logits
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4))
    assert len(adapter.deltas) == 14
    assert torch.equal(model(input_ids=ids).logits, before)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1

    model.eval()
    alone = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    with rankfold.using(model, ["default", None]):
        together = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(together[0], alone[0])
    with rankfold.using(model, None):
        assert torch.equal(together[1], model.generate(ids[1:], max_new_tokens=5, do_sample=False)[0])
    rankfold.detach(model)
    assert torch.equal(model.train()(input_ids=ids).logits, before)
