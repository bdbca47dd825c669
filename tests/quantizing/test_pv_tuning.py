"""Codebooks, the layer over them, and both steps of PV-tuning by hand and against their limits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.core.codebooks import CodebookLinear, Codebooks, decode, pack, unpack
from rankfold.core.packed import Scheme
from rankfold.core.quantized import dense
from rankfold.errors import RankfoldError
from rankfold.quantizers._distil import Teacher, divergence
from rankfold.quantizers.pv_tuning import Held, PVTuning, nearest, recoded, runs_of
from tests.methods.support import close, draw
from tests.train import tiny

THREE = torch.tensor([[[-1.0], [0.0], [1.0]]])  # one table of three numbers


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("in_", [24, 21])
def test_codes_come_back_from_bytes(bits: int, in_: int) -> None:
    scheme = Codebooks(books=2, bits=bits, width=4)
    codes = torch.randint(2**bits, (5, math.ceil(in_ / 4), 2), generator=torch.Generator().manual_seed(bits))
    data = pack(codes, scheme)
    assert data.shape == (5, scheme.bytes(in_))
    assert torch.equal(unpack(data, in_, scheme), codes)
    if in_ == 24 and bits > 1:  # a row begins at a byte
        assert data.numel() * 8 == 5 * 6 * 2 * bits


def test_values_by_hand() -> None:
    books = torch.tensor([[[1.0, 2], [3, 4]], [[10, 20], [30, 40]]])
    codes = torch.tensor([[[0, 1], [1, 0]], [[1, 1], [0, 0]]])
    W = decode(codes, books, torch.tensor([[1.0], [2]]), 3)
    assert W.tolist() == [[31, 42, 13], [66, 88, 22]]


def test_bits_of_a_number() -> None:
    """AQLM's 1x16 over 8 numbers is 2 bits and the tables."""
    n = 2**14
    assert Codebooks(bits=16, width=8).per_number(n, n) == pytest.approx(2 + 16 * 2**16 * 8 / n**2 + 16 / n)
    assert Codebooks(books=2, bits=8, width=8).per_number(n, n) == pytest.approx(2, abs=2e-3)
    with pytest.raises(ValueError, match="fill no bytes"):
        Codebooks(bits=3)


def layer_of(scheme: Codebooks, seed: int = 0) -> tuple[nn.Linear, CodebookLinear]:
    torch.manual_seed(seed)
    plain = nn.Linear(20, 12)
    return plain, CodebookLinear.of(plain, *PVTuning().start(plain.weight.detach(), scheme), scheme)


def test_the_layer_multiplies_by_what_it_dequantises_and_keeps_its_input_only() -> None:
    plain, layer = layer_of(Codebooks(bits=2, width=4))
    W = dense(layer.weight, layer)
    x = torch.randn(3, 20, requires_grad=True)
    layer.books.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert not any(t.numel() >= 240 for t in kept)
    torch.testing.assert_close(y, nn.functional.linear(x, W, plain.bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, W.sum(0).expand(3, -1))
    assert layer.books.grad is not None
    adapter = rankfold.attach(nn.Sequential(layer), rankfold.LoRA(rank=2), targets=["0"])
    assert adapter.deltas["0"].W is not None


def test_k_means_is_exact_where_there_are_vectors_enough_and_better_with_more() -> None:
    W = draw(6, 16, seed=1, dtype=torch.float32)
    errors = []
    for books, bits in ((1, 1), (1, 2), (1, 4), (2, 4), (1, 8)):
        codes, tables, scales = PVTuning().start(W, Codebooks(books=books, bits=bits, width=4))
        errors.append(float((decode(codes, tables, scales, 16) - W).norm()))
    assert errors[:4] == sorted(errors[:4], reverse=True)
    assert errors[-1] < 1e-5


def test_the_nearest_codes_and_the_next_best_where_they_are_forced() -> None:
    targets = torch.tensor([[0.9], [0.1], [-0.8]])
    assert nearest(targets, torch.tensor([[1], [1], [1]]), THREE).flatten().tolist() == [2, 1, 0]
    assert nearest(targets, torch.tensor([[2], [1], [1]]), THREE, True).flatten().tolist() == [1, 2, 0]
    two = torch.cat([10 * THREE, THREE])
    assert nearest(torch.tensor([[9.2]]), torch.tensor([[1, 1]]), two).tolist() == [[2, 0]]


@pytest.mark.parametrize("rho", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("tau", [1e-6, 0.05, math.inf])
def test_no_more_changes_than_rho_and_tau_let(rho: float, tau: float) -> None:
    books, scales = draw(1, 8, 4, seed=2), draw(10, 1, seed=3).abs() + 0.5
    codes = torch.randint(8, (10, 6, 1), generator=torch.Generator().manual_seed(4))
    before, T = decode(codes, books, scales, 24), draw(10, 24, seed=5)
    after = recoded(T, codes, books, scales, PVTuning(rho=rho, tau=tau))
    changed = (after != codes).any(-1)
    assert changed.sum() <= math.ceil(rho * 60)
    moved = (runs_of(decode(after, books, scales, 24) - before, 4).norm(dim=-1) * changed).flatten().sort().values
    assert moved[:-1].square().sum().sqrt() <= (1 + 1e-9) * tau * before.norm()  # all but the one in excess, at most
    if rho == 1 and tau == math.inf:
        best = nearest((runs_of(T, 4) / scales[:, None]).flatten(0, 1), codes.flatten(0, 1), books)
        assert torch.equal(after.flatten(0, 1), best)
        assert changed.any()
    if tau == 1e-6:
        assert changed.sum() == 1  # one is always let through


def test_the_most_urgent_run_goes_first() -> None:
    codes, T = torch.ones(1, 5, 1, dtype=torch.long), torch.tensor([[0.6, 0.9, 0.7, -0.8, 0.1]])
    once = recoded(T, codes, THREE, torch.ones(1, 1), PVTuning(rho=0.2, tau=math.inf))
    assert once.flatten().tolist() == [1, 2, 1, 1, 1]


@pytest.mark.parametrize(("decay", "flips"), [(0.0, True), (1.0, False)])
def test_small_steps_add_up_only_where_they_are_remembered(decay: float, flips: bool) -> None:
    """Adam's step is code_lr; with T kept 0.5 is crossed after ⌈0.5/0.12⌉ = 5 of them, and without it never."""
    plain = nn.Linear(3, 1, bias=False)
    scheme = Codebooks(bits=2, width=1)
    books = torch.tensor([[[-1.0], [0.0], [1.0], [9.0]]])
    layer = CodebookLinear.of(plain, torch.ones(1, 3, 1, dtype=torch.long), books, torch.ones(1, 1), scheme)
    held = Held(layer, PVTuning(rho=1, tau=math.inf, lr=0, code_lr=0.12, delta_decay=decay))
    flipped = []
    for step in range(1, 8):
        held.W.grad = torch.tensor([[-1.0, 0.0, 2.0]])
        held.step(1.0)
        assert torch.equal(held.W, held.decoded())  # always what the codes stand for
        if held.codes.flatten().tolist() == [2, 1, 0]:
            flipped.append(step)
    assert flipped[:1] == ([5] if flips else [])


def test_tables_and_scales_get_the_gradient_of_the_weight() -> None:
    _, layer = layer_of(Codebooks(bits=2, width=4))
    held = Held(layer, PVTuning(lr=1e-2, code_lr=0))
    codes, books, G = held.codes.clone(), held.books.detach().clone(), draw(12, 20, seed=6, dtype=torch.float32)
    held.W.grad = G.clone()
    held.step(1.0)
    assert torch.equal(held.codes, codes)
    s = layer.scales.detach().float()
    for k in range(4):
        gradient = (runs_of(G * s, 4) * (codes == k)).sum((0, 1))
        used = gradient.abs() > 1e-6
        close((held.books.detach() - books)[0, k][used], -1e-2 * gradient[used].sign(), atol=1e-4)


SCHEME = Codebooks(bits=2, width=2)


def batches(seed: int, n: int = 6) -> list[Tensor]:
    return list(draw(n, 32, 16, seed=seed, dtype=torch.float32))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6))


def tuned(**asked: Any) -> tuple[float, nn.Sequential]:
    model, text = mlp(), batches(1)
    teacher = Teacher(model, text)
    how = PVTuning(lr=3e-3, code_lr=1e-2, epochs=8, **asked)
    rankfold.quantize(model, SCHEME, how, targets=["0", "2"], calibration=text)
    with torch.no_grad():
        return sum(float(divergence(model(x), teacher[i])) for i, x in enumerate(text)), model


def test_a_model_comes_nearer_to_itself_and_its_weights_are_what_codes_give() -> None:
    model, text = mlp(), batches(1)
    teacher = Teacher(model, text)
    rankfold.quantize(model, SCHEME, PVTuning(epochs=0), targets=["0", "2"], calibration=text)
    with torch.no_grad():
        start = sum(float(divergence(model(x), teacher[i])) for i, x in enumerate(text))
    end, model = tuned(rho=0.05, tau=0.05)
    assert end < 0.7 * start
    layer: Any = model[0]
    assert isinstance(layer, CodebookLinear)
    vectors = runs_of(layer.dequantise(torch.float32) / layer.scales.float(), 2).flatten(0, 1)
    assert torch.cdist(vectors, layer.books[0].float()).amin(1).max() < 1e-3
    assert len(vectors.mul(1e3).round().unique(dim=0)) <= 4
    assert "forward" not in vars(layer)


def test_a_model_of_transformers_is_saved_and_loaded(tmp_path: Any) -> None:
    model, ids = tiny.llama(), torch.arange(3, 15)[None]
    told: list[tuple[int, int]] = []
    report = rankfold.quantize(
        model,
        Codebooks(bits=4, width=4),
        PVTuning(epochs=1),
        calibration=[{"input_ids": ids}, {"input_ids": ids}],
        trained=lambda *done: told.append(done),
    )
    assert told == [(1, 2), (2, 2)]
    assert all(0 < one.error < 1 for one in report.values())
    expected = model(ids).logits
    rankfold.save_quantized(model, tmp_path / "out")
    again = rankfold.load_quantized(tmp_path / "out")
    assert torch.equal(again(ids).logits, expected)
    assert isinstance(again.get_submodule("model.layers.0.mlp.up_proj"), CodebookLinear)
    adapter = rankfold.attach(again, rankfold.LoRA(rank=2))
    again(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_what_does_not_fit_is_refused_and_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = mlp(), batches(1)
    with pytest.raises(RankfoldError, match="keeps weights by Codebooks, not by Scheme"):
        rankfold.quantize(model, Scheme(), "pv-tuning", targets=["0"], calibration=text)
    with pytest.raises(RankfoldError, match="keeps weights by Scheme, not by Codebooks"):
        rankfold.quantize(model, SCHEME, "rtn", targets=["0"])
    with pytest.raises(RankfoldError, match="pv-tuning trains on text"):
        rankfold.quantize(model, SCHEME, "pv-tuning", targets=["0"])
    with pytest.raises(RankfoldError, match="leaves nothing to lorc"):
        rankfold.quantize(model, SCHEME, "pv-tuning", targets=["0"], calibration=text, compensate="lorc")
    assert type(model[0]) is nn.Linear
    monkeypatch.setattr(Held, "step", lambda self, share: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        rankfold.quantize(model, SCHEME, "pv-tuning", targets=["0"], calibration=text)
    assert type(model[0]) is nn.Linear
