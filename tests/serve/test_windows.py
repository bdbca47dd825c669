"""Windows of tokens: the same loss and gradients as the whole sequence, however it is cut."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import rankfold
from rankfold.errors import UnsupportedError
from rankfold.serve.stack import Stack
from rankfold.serve.windows import Windowed
from rankfold.train.encode import IGNORED
from tests.train import tiny

Grads = dict[str, Tensor]
SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=4),
    "gemma3": transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "falcon": transformers.FalconConfig(**SIZES),  # whose layers give a tuple
}


def made(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


def sequence(length: int = 13, unlabelled: int = 4) -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 100, (length,), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:unlabelled] = IGNORED
    return ids, labels


def attached(model: Any, method: Any, *args: Any, **named: Any) -> rankfold.Adapter:
    """An adapter that is no identity, so that all of it has gradients."""
    adapter = rankfold.attach(model, method, *args, **named)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    return adapter


def taken(adapter: rankfold.Adapter) -> Grads:
    """The gradients, which are gone from the parameters then."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in adapter.named_parameters()}
    for p in adapter.parameters():
        p.grad = None
    return found


def whole(model: Any, adapter: rankfold.Adapter, ids: Tensor, labels: Tensor) -> tuple[float, Grads]:
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED)
    loss.backward()
    return loss.item(), taken(adapter)


def gone_through(run: Windowed, forward: int, backward: int) -> Windowed:
    went, back = [], []
    while run.done < run.length:
        went.append(run.forward(forward))
    while run.behind:
        back.append(run.backward(backward))
    assert sum(went) == sum(back) == run.length
    return run


def same(ours: Grads, theirs: Grads, tolerance: float = 1e-9) -> None:
    assert any(bool(t.any()) for t in theirs.values())
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance * float(tensor.abs().max()))


@pytest.mark.parametrize("cut", [(1, 1), (3, 5), (5, 2), (9, 1), (1, 9), (20, 20)])
def test_any_windows(cut: tuple[int, int]) -> None:
    model, (ids, labels) = made(MODELS["llama"]), sequence(9, 3)
    adapter = attached(model, rankfold.LoRA(rank=4))
    loss, grads = whole(model, adapter, ids, labels)
    run = gone_through(Windowed(Stack(model), ids, labels), *cut)
    assert run.loss == pytest.approx(loss, rel=1e-9)
    same(taken(adapter), grads)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_a_models_gradients(name: str) -> None:
    model, (ids, labels) = made(MODELS[name]), sequence()
    adapter = attached(model, rankfold.LoRA(rank=4))
    loss, grads = whole(model, adapter, ids, labels)
    run = gone_through(Windowed(Stack(model), ids, labels), 7, 5)
    assert run.loss == pytest.approx(loss, rel=1e-9)
    same(taken(adapter), grads)


@pytest.mark.parametrize("slug", ["dora", "vera", "ia3", "boft", "nola", "mos", "lora-xs", "spectral", "bone", "hydra"])
def test_a_methods_gradients(slug: str) -> None:
    model, (ids, labels) = tiny.llama().double().eval(), sequence()
    adapter = attached(model, rankfold.build(slug))
    loss, grads = whole(model, adapter, ids, labels)
    run = gone_through(Windowed(Stack(model), ids, labels), 4, 3)
    assert run.loss == pytest.approx(loss, rel=1e-9)
    same(taken(adapter), grads)


def test_without_the_gradients_of_earlier_keys_and_values_it_is_wrong() -> None:
    model, (ids, labels) = tiny.llama().double().eval(), sequence()
    adapter = attached(model, rankfold.LoRA(rank=4))
    _, grads = whole(model, adapter, ids, labels)
    run = Windowed(Stack(model), ids, labels)
    run.forward(13)
    while run.behind:
        run.backward(4)
        for layer in run.cache.layers:
            for grad in layer.dKV:
                grad.zero_()
    found = taken(adapter)
    off = {n: float((found[n] - t).norm() / t.norm()) for n, t in grads.items() if ".0.self_attn.k_proj" in n}
    assert off
    assert all(far > 0.05 for far in off.values())


def test_what_lies_below_and_above_the_layers() -> None:
    """An adapter on the embedding and the head trained in full, as far as they are not tied."""
    model, (ids, labels) = tiny.llama().double().eval(), sequence()
    targets = ["embed_tokens", "1.self_attn.v_proj"]
    adapter = attached(model, rankfold.LoRA(rank=4), targets, modules_to_save=["lm_head", "model.norm"])
    _, grads = whole(model, adapter, ids, labels)
    assert len(grads) == 6
    gone_through(Windowed(Stack(model), ids, labels), 6, 5)
    same(taken(adapter), grads)


def test_a_layer_below_all_that_is_trained_is_not_gone_back_through() -> None:
    model, (ids, labels) = tiny.llama().double().eval(), sequence()
    adapter = attached(model, rankfold.LoRA(rank=4), ["1.mlp.down_proj"])
    _, grads = whole(model, adapter, ids, labels)
    run = Windowed(Stack(model), ids, labels)
    run.forward(13)
    passes: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_, i=i: passes.append(i)) for i, layer in enumerate(run.stack.layers)]
    run.backward(13)
    for hook in hooks:
        hook.remove()
    assert passes.count(0) == 1  # passed by
    assert passes.count(1) == 2
    same(taken(adapter), grads)


def test_the_sum_of_sequences_and_other_counts() -> None:
    """Gradients add up, each label with the weight that the caller gives it."""
    model = tiny.llama().double().eval()
    adapter = attached(model, rankfold.LoRA(rank=4))
    rows = [sequence(9, 2), sequence(13, 6)]  # 7 labels each
    grads = [whole(model, adapter, *row)[1] for row in rows]
    stack = Stack(model)
    for ids, labels in rows:
        gone_through(Windowed(stack, ids, labels, count=14), 5, 5)
    same(taken(adapter), {name: (grads[0][name] + grads[1][name]) / 2 for name in grads[0]})


def test_dropout_is_drawn_alike_both_ways() -> None:
    """Whatever was drawn in a window is drawn again: the gradient is that of the loss as a function of B."""
    model, (ids, labels) = made(MODELS["gpt2"]), sequence()
    adapter = attached(model, rankfold.LoRA(rank=4, dropout=0.5), ["0.attn.c_attn", "1.mlp.c_fc"])
    adapter.train()
    stack = Stack(model)

    def run() -> float:
        torch.manual_seed(3)
        return gone_through(Windowed(stack, ids, labels), 5, 2).loss

    first = run()
    grads = taken(adapter)
    assert run() == first
    taken(adapter)
    for name, p in adapter.named_parameters():
        direction, step = torch.randn_like(p), 1e-5
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * step * direction)
            losses.append(run())
            with torch.no_grad():
                p.sub_(sign * step * direction)
        taken(adapter)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(float((grads[name] * direction).sum()), rel=1e-5, abs=1e-9)
    adapter.train(False)
    assert abs(run() - first) > 1e-4


def test_one_draw_a_sequence_however_it_is_cut() -> None:
    """So that what is drawn later, the order of the data for one, does not depend on how busy a server was."""
    model, (ids, labels) = tiny.llama().double().eval(), sequence()
    attached(model, rankfold.LoRA(rank=4, dropout=0.5)).train()
    after = []
    for n in (2, 13):
        torch.manual_seed(3)
        gone_through(Windowed(Stack(model), ids, labels), n, n)
        after.append(torch.rand(()))
    assert after[0] == after[1]


def test_the_score_alone() -> None:
    model, (ids, labels) = tiny.llama().double().eval(), sequence()
    adapter = attached(model, rankfold.LoRA(rank=4))
    loss, _ = whole(model, adapter, ids, labels)
    run = Windowed(Stack(model), ids, labels)
    while run.done < run.length:
        run.forward(4, score=True)
    assert run.loss == pytest.approx(loss, rel=1e-9)


class Saved:
    """Counts the numbers that autograd keeps at once, and those of frozen linear layers' inputs."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.kept: list[tuple[int, ...]] = []

    def pack(self, tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return tensor
        self.now += tensor.numel()
        self.peak = max(self.peak, self.now)
        self.kept.append(tuple(tensor.shape))
        return Held(self, tensor)


class Held:
    def __init__(self, saved: Saved, tensor: Tensor):
        self.saved, self.tensor = saved, tensor

    def __del__(self) -> None:
        self.saved.now -= self.tensor.numel()


def unpacked(held: Any) -> Tensor:
    return held.tensor if isinstance(held, Held) else held


def kept_by(model: Any, forward: int, backward: int, length: int = 48) -> Saved:
    ids, labels = sequence(length, 0)
    saved = Saved()
    run = Windowed(Stack(model), ids, labels) if forward else None
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, unpacked):
        if run is None:
            model(input_ids=ids[None], labels=labels[None], use_cache=False).loss.backward()
        else:
            while run.done < run.length:
                run.forward(forward)
            assert not saved.kept
            while run.behind:
                run.backward(backward)
    return saved


def test_at_most_one_layers_graph_of_one_window_is_kept() -> None:
    """Of a whole pass the peak grows with layers and tokens; of windows it is one layer's, of those tokens."""
    peaks = {}
    for layers in (2, 6):
        model = tiny.llama(num_hidden_layers=layers, vocab_size=110).eval()
        rankfold.attach(model, rankfold.LoRA(rank=2))
        peaks[layers] = kept_by(model, 8, 8).peak, kept_by(model, 48, 48).peak, kept_by(model, 0, 0).peak
    assert peaks[2][:2] == peaks[6][:2]
    assert peaks[6][2] > 2 * peaks[2][2]
    assert peaks[6][0] < peaks[6][1] / 2 < peaks[6][2] / 4


def test_a_frozen_linear_keeps_no_activation() -> None:
    """Where down_proj alone is adapted, all other linear layers need only their weights."""
    model = tiny.llama().eval()
    rankfold.attach(model, rankfold.LoRA(rank=2), ["down_proj"])
    ids, labels = sequence(12, 0)
    run = Windowed(Stack(model), ids, labels)
    run.forward(12)
    frozen = Frozen(model)
    with torch.autograd.graph.saved_tensors_hooks(frozen.pack, lambda t: t):
        run.backward(12)
    assert frozen.calls == 2 * 6 + 1  # q, k, v, o, gate and up of each layer, and the head
    assert frozen.activations == 0


class Frozen:
    """Runs a model's frozen linears apart, to see what each keeps for its backward pass beside its weight."""

    def __init__(self, model: nn.Module):
        self.inside, self.calls, self.activations = False, 0, 0
        for module in model.modules():
            if type(module) is nn.Linear:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self.inside = True
        self.calls += 1

    def _leave(self, *_: Any) -> None:
        self.inside = False

    def pack(self, tensor: Tensor) -> Tensor:
        weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        self.activations += self.inside and not weight
        return tensor


def test_the_model_is_as_it_was_found() -> None:
    model, (ids, labels) = made(MODELS["llama"]), sequence()
    attached(model, rankfold.LoRA(rank=4))
    stack = Stack(model, attention="eager")
    before, seen = [dict(layer.__dict__) for layer in stack.layers], set()
    stack.layers[0].register_forward_pre_hook(lambda *_: seen.add(model.config._attn_implementation))
    gone_through(Windowed(stack, ids, labels), 5, 5)
    assert model.config._attn_implementation == "sdpa"
    assert "eager" in seen
    for layer, old in zip(stack.layers, before, strict=True):
        assert "forward" not in layer.__dict__
        assert layer.__dict__.keys() == old.keys()


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2),
        transformers.Qwen3NextConfig(
            **{**GROUPED, "num_hidden_layers": 4}, head_dim=8, num_experts=2, moe_intermediate_size=8,
            shared_expert_intermediate_size=8, linear_num_value_heads=2, linear_num_key_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8,
        ),
    ],
)  # fmt: skip
def test_models_that_keep_something_else_of_a_sequence(config: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedError, match="windows of tokens"):
        Stack(model)
