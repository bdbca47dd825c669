"""LoRC and EoRA by hand, their error's formula, and compensated models."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.core.packed import PackedLinear, Scheme, dequantise
from rankfold.errors import RankfoldError
from rankfold.quantizers._quantizer import nearest
from rankfold.quantizers.eora import eigenspace
from rankfold.quantizers.rtn import RTN
from tests.methods.support import DOUBLE, close, draw


def test_lorc_by_hand() -> None:
    E = torch.diag(torch.tensor([3.0, 2, 1], dtype=DOUBLE))
    B, A = nearest(E, 1)
    close(B @ A, torch.diag(torch.tensor([3.0, 0, 0], dtype=DOUBLE)))
    assert float((E - B @ A).norm()) == pytest.approx(5**0.5)


def test_the_error_is_what_the_singular_values_say() -> None:
    E = draw(7, 5, seed=1)
    sigma, last = torch.linalg.svdvals(E), float("inf")
    for m in range(1, 6):
        B, A = nearest(E, m)
        error = float((E - B @ A).square().sum())
        assert error == pytest.approx(float(sigma[m:].square().sum()), abs=1e-12)
        assert error < last
        last = error


def test_factors_in_8_bits_lose_next_to_nothing() -> None:
    """ZeroQuant-V2 keeps them so: here each row of B and of A with a scale of its own."""
    E, kind = draw(64, 48, seed=3), Scheme(format="int8", group="channel", symmetric=True, scales="float32")
    B, A = nearest(E, 8)
    rounded = [dequantise(RTN().quantise(M, kind, None, ""), tuple(M.shape), kind, DOUBLE) for M in (B, A)]  # type: ignore[arg-type]
    exact, kept = float((E - B @ A).norm()), float((E - rounded[0] @ rounded[1]).norm())
    assert exact < kept < 1.001 * exact


def test_eora_by_hand() -> None:
    """LoRC keeps the larger entry, and the output is off by 4 · 0.81; EoRA the one that the inputs weigh."""
    E, C = torch.diag(torch.tensor([1, 0.9], dtype=DOUBLE)), torch.diag(torch.tensor([1, 4], dtype=DOUBLE))

    def output_error(pair: tuple[Tensor, Tensor]) -> float:
        rest = E - pair[0] @ pair[1]
        return float((rest @ C * rest).sum())

    assert output_error(nearest(E, 1)) == pytest.approx(3.24)
    B, A = eigenspace(E, C, 1)
    close(B @ A, torch.diag(torch.tensor([0, 0.9], dtype=DOUBLE)))
    assert output_error((B, A)) == pytest.approx(1.0)


def test_eoras_error_is_what_its_singular_values_say_and_no_more_than_lorcs() -> None:
    E, X = draw(6, 8, seed=2), draw(50, 8, seed=3) @ draw(8, 8, seed=4)
    C = X.mT @ X
    values, Q = torch.linalg.eigh(C)
    sigma = torch.linalg.svdvals(E @ (Q * values.sqrt()))
    for r in (1, 3, 5):
        B, A = eigenspace(E, C, r)
        error = float((X @ (E - B @ A).mT).square().sum())
        assert error == pytest.approx(float(sigma[r:].square().sum()), rel=1e-9)
        plain = nearest(E, r)
        assert error < float((X @ (E - plain[0] @ plain[1]).mT).square().sum())


def test_equal_inputs_make_eora_lorc_and_only_their_shape_counts() -> None:
    E, C = draw(6, 5, seed=5), draw(9, 5, seed=6)
    C = C.mT @ C
    for mine, theirs in (
        (eigenspace(E, 3 * torch.eye(5, dtype=DOUBLE), 2), nearest(E, 2)),
        (eigenspace(E, 7 * C, 2), eigenspace(E, C, 2)),
    ):
        close(mine[0] @ mine[1], theirs[0] @ theirs[1], atol=1e-10)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    E, X = draw(4, 5, seed=7), draw(30, 5, seed=8)
    X[:, 2] = 0
    B, A = eigenspace(E, X.mT @ X, 4)
    assert bool(A.isfinite().all())
    assert float((X @ (E - B @ A).mT).norm()) < 1e-6 * float((X @ E.mT).norm())


class Block(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.up, self.down = nn.Linear(n, 2 * n), nn.Linear(2 * n, n)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Blocks as a transformer has them: an argument besides, a layer before them and one behind."""

    def __init__(self, n: int = 16, skip: bool = False):
        super().__init__()
        self.first, self.last, self.skip = nn.Linear(8, n), nn.Linear(n, 4), skip
        self.blocks = nn.ModuleList(Block(n) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
            x = x * 1.0 if self.skip else x  # blocks that do not see the very output of the one before
        return self.last(x)


def stack(**options: Any) -> tuple[Stack, list[Tensor]]:
    torch.manual_seed(0)
    model = Stack(**options)
    mix = torch.eye(8) + 0.7 * torch.randn(8, 8)
    return model, [torch.randn(64, 8) @ mix for _ in range(3)]


@torch.no_grad()
def distance(scheme: Scheme, how: str, **asked: Any) -> float:
    model, batches = stack()
    expected = torch.cat([model(x) for x in batches])
    if how == "gptq" or isinstance(asked.get("compensate"), rankfold.EoRA):
        asked["calibration"] = batches
    rankfold.quantize(model, scheme, how, targets="all-linear", **asked)
    return float((torch.cat([model(x) for x in batches]) - expected).norm() / expected.norm())


def test_outputs_come_nearer_with_gptq_and_with_compensation() -> None:
    scheme = Scheme(format="int3", group="channel")
    rtn, gptq = distance(scheme, "rtn"), distance(scheme, "gptq")
    assert gptq < rtn
    for how, alone in (("rtn", rtn), ("gptq", gptq)):
        lorc = distance(scheme, how, compensate=rankfold.LoRC(rank=3))
        assert lorc < alone
        assert distance(scheme, how, compensate=rankfold.EoRA(rank=3)) < lorc


def test_the_compensation_is_a_lora_that_can_be_saved_and_taken_away(tmp_path: Any) -> None:
    model, batches = stack()
    with torch.no_grad():
        expected = model(batches[0])
        report = rankfold.quantize(model, Scheme(format="int3"), compensate=rankfold.LoRC(rank=64))
        # All of the rank there is, so all of the error.
        torch.testing.assert_close(model(batches[0]), expected, rtol=1e-4, atol=1e-5)
        assert {f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")} < set(report)
        assert all(one.left is not None and one.left < 1e-5 < one.error for one in report.values())
        adapter = rankfold.adapters(model)["compensation"]
        assert isinstance(adapter.method, rankfold.LoRA)
        rankfold.save(model, tmp_path / "repair", name="compensation")
        with rankfold.using(model, None):
            apart = (model(batches[0]) - expected).norm()
        assert apart > 1e-2
        rankfold.detach(model)
        rankfold.load(model, tmp_path / "repair")
        torch.testing.assert_close(model(batches[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True], ids=["chained", "each by the whole model"])
def test_a_block_sees_what_the_quantised_ones_before_it_give(skip: bool) -> None:
    """The last block's statistics by `by_block`, against those of the finished model's prefix."""
    from rankfold.core.calibration import InputCovariance, calibrate
    from rankfold.core.calibration.blocks import by_block

    model, batches = stack(skip=skip)
    paths = [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")]
    float_model = calibrate(model, batches, [InputCovariance()], paths).get(InputCovariance(), "blocks.2.up")
    for window in by_block(model, batches, paths):
        seen = window.collect([InputCovariance()]).get(InputCovariance(), window.due[0])
        with torch.no_grad():
            for path in window.due:
                layer = model.get_submodule(path)
                layer.weight.mul_(1.5)  # type: ignore[operator]
    for path in ("blocks.2.up", "blocks.2.down"):
        with torch.no_grad():
            model.get_submodule(path).weight.div_(1.5)  # type: ignore[operator]
    expected = calibrate(model, batches, [InputCovariance()], paths).get(InputCovariance(), "blocks.2.up")
    torch.testing.assert_close(seen, expected)
    assert (seen - float_model).norm() > 0.05 * float_model.norm()


def test_an_error_on_the_way_leaves_the_model_as_it_was() -> None:
    model, batches = stack()
    before, y = dict(model.named_modules()), model(batches[0])
    done: list[str] = []

    def stop(path: str) -> None:
        done.append(path)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rankfold.quantize(model, Scheme(), "gptq", calibration=batches, compensate=rankfold.LoRC(rank=1), progress=stop)
    assert dict(model.named_modules()) == before
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert torch.equal(model(batches[0]), y)


def test_a_name_that_no_adapter_can_have_leaves_the_model_as_it_was() -> None:
    model, batches = stack()
    y = model(batches[0])
    with pytest.raises(RankfoldError, match="name"):
        rankfold.quantize(model, Scheme(), compensate=rankfold.LoRC(rank=1), name="no/name")
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert torch.equal(model(batches[0]), y)


def test_statistics_are_asked_for_by_the_one_who_needs_them() -> None:
    model, _ = stack()
    with pytest.raises(RankfoldError, match="eora needs statistics"):
        rankfold.quantize(model, Scheme(), compensate="eora")
    with pytest.raises(RankfoldError, match="'rtn' compensates nothing"):
        rankfold.quantize(model, Scheme(), compensate="rtn")


def test_a_decoder_with_a_configuration_of_its_own_keeps_no_cache_meanwhile() -> None:
    """T5's cross-attention would take its keys from the cache, and not call the layers that make them."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, decoder_start_token_id=0, **sizes)).eval()
    ids = torch.randint(1, 32, (2, 8))
    report = rankfold.quantize(
        model, Scheme(group=8), "gptq", targets=["k", "v"], calibration=[{"input_ids": ids, "decoder_input_ids": ids}]
    )
    assert len(report) == 12
    assert model.decoder.config.use_cache
    assert model.config.use_cache
