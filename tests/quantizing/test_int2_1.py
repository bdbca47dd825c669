"""EMEF and LREC: what a packed base keeps for the backward pass, what adapters over it cost, and a LoRA that learns to
say what the float model said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.core.delta import Site
from rankfold.core.packed import PackedLinear, Scheme
from rankfold.errors import RankfoldError
from rankfold.quantizers._distil import Teacher, divergence
from tests.methods.support import DOUBLE
from tests.quantizing.test_compensation import stack
from tests.train import tiny

TEXT = torch.randint(5, 200, (8, 2, 16), generator=torch.Generator().manual_seed(0))
INT2 = Scheme(format="int2", group=16)


def test_divergence_by_hand() -> None:
    """KL((½, ½) ‖ (¼, ¾)) = ½ ln(½/¼) + ½ ln(½/¾) = ½ ln(4/3)."""
    log_p, y = torch.tensor([[0.5, 0.5]], dtype=DOUBLE).log(), torch.tensor([[0.25, 0.75]], dtype=DOUBLE).log()
    assert float(divergence(y, log_p)) == pytest.approx(0.5 * float(torch.tensor(4 / 3).log()), rel=1e-6)
    assert float(divergence(y + 3, log_p)) == pytest.approx(float(divergence(y, log_p)), rel=1e-6)
    assert float(divergence(log_p, log_p)) == pytest.approx(0, abs=1e-7)


def test_padding_does_not_count() -> None:
    log_p, y = torch.randn(2, 3, 5).log_softmax(-1), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    alone = torch.stack([divergence(y[i, j], log_p[i, j]) for i, j in ((0, 0), (0, 1), (1, 0))]).mean()
    torch.testing.assert_close(divergence(y, log_p, {"attention_mask": mask}), alone)


def test_the_teacher_is_the_model_as_it_was() -> None:
    model = tiny.llama()
    batches = [{"input_ids": ids} for ids in TEXT[:2]]
    teacher = Teacher(model, batches)
    with torch.no_grad():
        expected = model(**batches[1]).logits
        assert float(divergence(expected, teacher[1], batches[1])) < 1e-5
        model.lm_head.weight.mul_(0.5)
        assert float(divergence(model(**batches[1]).logits, teacher[1], batches[1])) > 1e-3


def test_the_name() -> None:
    """LLaMA-7B in 2 bits with fp16 adapters of rank 16 on all seven projections: 2.1 bits a weight."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    numbers = 0
    for shape in shapes:
        with torch.device("meta"):
            delta = rankfold.LoRA(rank=16).delta(Site("it", "linear", shape, False, torch.float16), None)
        numbers += sum(p.numel() for p in delta.parameters())
    bits = 16 * numbers / sum(out * in_ for out, in_ in shapes)
    assert bits == pytest.approx(0.0988, abs=5e-5)


def saved(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What is kept for the backward pass beside the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        return run(), list(kept.values())


def wide_llama() -> Any:
    return tiny.llama(hidden_size=128, intermediate_size=512)


def test_codes_are_all_that_a_packed_base_keeps() -> None:
    """Training over it keeps what training over a float base keeps, activations, and no dense weight beside."""
    sizes = {}
    for kind in ("float", "int2"):
        model = wide_llama()
        if kind == "int2":
            rankfold.quantize(model, INT2)
        rankfold.attach(model, rankfold.LoRA(rank=2))
        _, kept = saved(model, lambda model=model: model(TEXT[0], labels=TEXT[0]).loss)
        weights = {(128, 128), (512, 128), (128, 512), (64, 128), (128, 64)}
        assert not any(tuple(t.shape) in weights for t in kept)
        sizes[kind] = sum(t.numel() * t.itemsize for t in kept)
    assert sizes["int2"] <= sizes["float"]
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    codes = sum(m.weight.numel() for m in packed)
    assert codes == sum(m.in_features * m.out_features for m in packed) // 4


def test_with_checkpoints_a_block_keeps_its_input_only() -> None:
    model = wide_llama()
    rankfold.quantize(model, INT2)
    adapter = list(rankfold.attach(model, rankfold.LoRA(rank=2)).parameters())
    model.train()

    def run() -> Tensor:
        return model(TEXT[0], labels=TEXT[0]).loss

    loss, kept = saved(model, run)
    whole = sum(t.numel() * t.itemsize for t in kept)
    grads = torch.autograd.grad(loss, adapter)
    model.gradient_checkpointing_enable()
    loss, kept = saved(model, run)
    assert sum(t.numel() * t.itemsize for t in kept) < 0.5 * whole
    for one, other in zip(torch.autograd.grad(loss, adapter), grads, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_those_over_the_dequantised_weight() -> None:
    found = []
    for dense in (False, True):
        torch.manual_seed(0)
        plain = nn.Linear(24, 10)
        model = nn.Sequential(plain)
        rankfold.quantize(model, Scheme(format="int2", group=8), targets=["0"])
        if dense:
            with torch.no_grad():
                plain.weight.copy_(model[0].dequantise())  # type: ignore[operator]
            model = nn.Sequential(plain)
        adapter = rankfold.attach(model, rankfold.LoRA(rank=2), targets=["0"], seed=1)
        torch.manual_seed(2)
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(torch.randn_like(p))
        x = torch.randn(5, 24, requires_grad=True)
        found.append(torch.autograd.grad(model(x).square().sum(), [x, *adapter.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def batches(*rows: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": TEXT[i]} for i in rows]


@torch.no_grad()
def away(model: nn.Module, teacher: Teacher) -> float:
    return float(divergence(model(**batches(3)[0]).logits, teacher[0]))


@pytest.fixture(scope="module")
def learnt() -> Any:
    """A tiny model whose logits say something, in 2 bits, plain and with each start of LREC."""

    def fresh() -> Any:
        model = tiny.llama()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.dim() == 2 else 1)
        return model

    model = fresh()
    teacher = Teacher(model, batches(3))
    rankfold.quantize(model, INT2)
    found = {"plain": away(model, teacher)}
    for name, repair in {
        "lrec": rankfold.LREC(rank=8, lr=1e-2, epochs=4),
        "lorc": rankfold.LoRC(rank=8),
        "lrec on lorc": rankfold.LREC(rank=8, lr=1e-2, epochs=4, start="lorc"),
    }.items():
        model = fresh()
        text = batches(*range(7)) if name != "lorc" else None
        rankfold.quantize(model, INT2, calibration=text, compensate=repair)
        found[name] = away(model, teacher)
    return found, model


def test_the_correction_brings_the_model_nearer_to_itself(learnt: Any) -> None:
    found, _ = learnt
    assert found["lrec"] < 0.9 * found["plain"]
    assert found["lrec on lorc"] < found["lorc"] < found["plain"]


def test_what_comes_out_is_a_lora_over_the_packed_model(learnt: Any, tmp_path: Any) -> None:
    _, model = learnt
    expected = model(TEXT[0]).logits
    rankfold.save(model, tmp_path / "it", name="compensation")
    rankfold.detach(model)
    assert not torch.equal(model(TEXT[0]).logits, expected)
    rankfold.load(model, tmp_path / "it")
    assert torch.equal(model(TEXT[0]).logits, expected)


def test_products_count_once_while_they_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = stack()
    seen: list[Tensor] = []
    monkeypatch.setattr(rankfold.LREC, "distil", lambda self, model, *_: seen.append(model(data[0])))
    rankfold.quantize(model, Scheme(format="int2"), calibration=data, compensate=rankfold.LREC(rank=2, start="lorc"))
    assert torch.equal(seen[0], model(data[0]))


def test_every_step_is_told_of() -> None:
    model, data = stack()
    told: list[tuple[int, int]] = []
    repair = rankfold.LREC(rank=2, epochs=3)
    rankfold.quantize(model, INT2, calibration=data, compensate=repair, trained=lambda *done: told.append(done))
    assert told == [(i + 1, 3 * len(data)) for i in range(3 * len(data))]


def test_it_starts_as_the_quantised_model() -> None:
    lrec = rankfold.LREC(rank=3)
    B, A = lrec.factors(torch.randn(6, 10), None, "a")
    assert not B.any()
    assert A.shape == (3, 10)
    assert 0 < A.abs().max() <= 10**-0.5  # Kaiming's bound for a = √5
    assert torch.equal(A, lrec.factors(torch.randn(6, 10), None, "a")[1])
    assert not torch.equal(A, lrec.factors(torch.randn(6, 10), None, "b")[1])


def test_it_needs_text_and_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = stack()
    with pytest.raises(RankfoldError, match="lrec trains on text"):
        rankfold.quantize(model, Scheme(), compensate="lrec")
    y, modules = model(data[0]), dict(model.named_modules())

    def stop(self: Any, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rankfold.LREC, "distil", stop)
    with pytest.raises(KeyboardInterrupt):
        rankfold.quantize(model, Scheme(), calibration=data, compensate="lrec")
    assert not rankfold.adapters(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(data[0]), y)
