"""Audits of an adapter on a small language model."""

import json

import pytest
import torch
from torch import nn

import rankfold
from rankfold.audit import entanglement
from rankfold.audit.forgetting import Forgetting, forgetting
from rankfold.audit.report import Audit, Limits, alarms, audit, soften
from rankfold.audit.safety import compare
from rankfold.train.encode import token_blocks
from tests.train import tiny


def adapted(size: float = 0.2, rank: int = 2) -> tuple[nn.Module, rankfold.Adapter]:
    model = tiny.llama().eval()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=rank), targets=["q_proj", "k_proj", "v_proj", "down_proj"])
    generator = torch.Generator().manual_seed(0)
    for delta in adapter.deltas.values():
        delta.B.data.copy_(size * torch.randn(delta.B.shape, generator=generator))
    return model, adapter


def blocks() -> list[torch.Tensor]:
    return token_blocks("The quick brown fox jumps over the lazy dog. " * 20, tiny.tokenizer(), 64)


def test_rows_say_what_dense_algebra_says() -> None:
    model, adapter = adapted()
    made = audit(model)
    assert len(made.rows) == 8
    row = next(row for row in made.rows if row.site.endswith("1.mlp.down_proj"))
    delta = adapter.deltas[row.site]
    W, D = delta.W.double(), (delta.B @ delta.A).double().detach()
    S, S1 = torch.linalg.svdvals(W), torch.linalg.svdvals(W + D)
    assert row.spectral_growth == pytest.approx(float(S1[0] / S[0] - 1), abs=1e-5)
    assert row.frobenius_norm == pytest.approx(float(D.norm() / W.norm()), rel=1e-5)
    assert row.rank == 2
    assert row.singular_values == pytest.approx(torch.linalg.svdvals(D)[:2].tolist(), rel=1e-4)
    U0, U1 = torch.linalg.svd(W, full_matrices=False)[0], torch.linalg.svd(W + D)[0]
    assert row.matches == pytest.approx((U0.T @ U1[:, :10]).abs().amax(0).tolist(), abs=1e-4)
    assert set(made.missing) == {"forgetting", "norms", "attention", "refusals"}
    assert json.loads(json.dumps(made.as_dict()))["rows"][0]["site"] == made.rows[0].site


def test_layers_that_are_measured_at_once_stay_in_their_order() -> None:
    model, adapter = adapted()
    threads = torch.get_num_threads()
    seen: list[None] = []
    try:
        torch.set_num_threads(1)
        one_at_a_time = audit(model).rows
        torch.set_num_threads(3)
        rows = audit(model, progress=lambda: seen.append(None)).rows
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert [row.site for row in rows] == list(adapter.deltas)
    assert len(seen) == len(rows)
    for one, other in zip(one_at_a_time, rows, strict=True):
        assert other.matches == pytest.approx(one.matches, abs=1e-4)
        assert other.entropies == pytest.approx(one.entropies, abs=1e-4)


def test_turning_the_factors_changes_nothing() -> None:
    model, adapter = adapted()
    before = audit(model).rows
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(1))).Q
    for delta in adapter.deltas.values():
        delta.B.data, delta.A.data = delta.B.data @ turn, turn.T @ delta.A.data
    for one, other in zip(before, audit(model).rows, strict=True):
        assert other.effective_rank == pytest.approx(one.effective_rank, rel=1e-4)
        assert other.overlap == pytest.approx(one.overlap, abs=1e-4)
        assert other.valley == pytest.approx(one.valley, abs=1e-4)
        assert other.matches == pytest.approx(one.matches, abs=1e-3)


def test_an_adapter_that_does_nothing_raises_nothing() -> None:
    model, _ = adapted(size=0.0)
    made = audit(model, blocks=blocks(), refusals=(compare(["no"], ["no"]), compare(["no"], ["no"])))
    for row in made.rows:
        assert (row.rank, row.effective_rank, row.frobenius_norm, row.intruders) == (0, 0, 0, 0)
        assert row.spectral_growth == pytest.approx(0, abs=1e-6)
        assert not any(row.entropies)
    assert made.forgetting is not None
    assert (made.forgetting.loss, made.forgetting.low, made.forgetting.high, made.forgetting.agreement) == (0, 0, 0, 1)
    assert made.alarms == []
    assert made.worst is None
    assert made.missing == {}


def test_alarms_name_the_measure_and_the_place() -> None:
    model, _ = adapted(size=3.0)
    made = audit(model, blocks=blocks())
    kinds = {alarm.name: alarm for alarm in made.alarms}
    assert made.worst == "HIGH"
    assert kinds["spectral growth"].level == "HIGH"
    assert kinds["frobenius norm"].where in {row.site for row in made.rows}
    assert "intruders" in kinds
    assert made.alarms == sorted(made.alarms, key=lambda alarm: alarm.level != "HIGH")
    lenient = Limits(growth=1e9, growth_high=1e9, frobenius=1e9, forgetting=1e9, forgetting_high=1e9)
    assert {alarm.name for alarm in audit(model, blocks=blocks(), limit=lenient).alarms} <= {
        "intruders",
        "attention norm",
        "probes not asked",
    }


@pytest.mark.parametrize(("loss", "level"), [(0.02, None), (0.03, "WARN"), (0.11, "HIGH")])
def test_forgetting_and_lost_refusals_raise_alarms(loss: float, level: str | None) -> None:
    lost = {None: 0, "WARN": 3, "HIGH": 15}[level]
    refused = compare(["Sorry"] * 100, ["Sorry"] * (100 - lost) + ["Yes"] * lost)
    made = Audit("a", "lora", 1, [], {}, forgetting=Forgetting(loss, 0, 0, 1, 0, 1, 100), protected=refused)
    assert [alarm.level for alarm in alarms(made, Limits())] == ([] if level is None else [level] * 2)


def test_forgetting_is_the_difference_of_the_losses() -> None:
    model, _ = adapted()
    found = forgetting(model, "default", blocks())
    losses = []
    for name in (None, "default"):
        with rankfold.using(model, name), torch.no_grad():
            losses.append(sum(float(model(input_ids=b[None], labels=b[None]).loss) for b in blocks()) / len(blocks()))
    assert found.loss == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert found.low <= found.loss <= found.high
    assert found.drift > 0
    with pytest.raises(rankfold.RankfoldError, match="and two blocks of 128 take 256"):
        token_blocks("short", tiny.tokenizer())


def test_forgetting_of_a_masked_model_is_a_pseudo_loss() -> None:
    """The cross-entropy of the hidden tokens, the same ones with and without the adapter."""
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **shape)).eval()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=2), ["value"])
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"]), with_kwargs=True)
    text = [torch.randint(4, 40, (20,)) for _ in range(3)]
    assert forgetting(model, "default", text, mask=3).loss == 0
    with torch.no_grad():
        adapter.deltas["bert.encoder.layer.0.attention.self.value"].B.normal_(std=30)
    seen.clear()
    found = forgetting(model, "default", text, mask=3)
    asked, losses = seen[:], [0.0, 0.0]
    for i, ids in enumerate(asked):
        block, hidden = text[i // 2], ids[0] == 3
        assert int(hidden.sum()) == 3
        assert torch.equal(ids[0][~hidden], block[~hidden])
        with rankfold.using(model, (None, "default")[i % 2]), torch.no_grad():
            logits = model(input_ids=ids).logits[0, hidden]
        losses[i % 2] += float(nn.functional.cross_entropy(logits, block[hidden])) / 3
    assert found.tokens == 9
    assert found.loss == pytest.approx(losses[1] - losses[0], abs=1e-6)
    assert abs(found.loss) > 1e-4
    with pytest.raises(rankfold.RankfoldError, match="the id of its mask token"):
        forgetting(model, "default", text)


def test_a_reference_is_measured_beside_it() -> None:
    model, _adapter = adapted()
    other, _ = adapted()
    rankfold.merge(other)
    made = audit(model, reference=other)
    for row in made.rows:
        assert row.reference is not None
        both = row.between["reference"]  # it is the same change
        assert (both.left, both.right) == pytest.approx((1, 1), abs=1e-4)
        assert row.reference.frobenius_norm == pytest.approx(row.frobenius_norm, rel=1e-3)
    with pytest.raises(rankfold.RankfoldError, match="another model"):
        audit(model, reference=nn.Linear(2, 2))


def test_other_adapters_are_measured_beside_it() -> None:
    """One that reads what it reads and writes elsewhere, one on other weights, and one that does nothing."""
    model, adapter = adapted()
    reads, _, _ = (
        rankfold.attach(model, rankfold.LoRA(rank=2), targets=targets, name=name)
        for name, targets in (("reads", ["q_proj"]), ("elsewhere", ["o_proj"]), ("nothing", ["q_proj"]))
    )
    for site, delta in reads.deltas.items():
        mine = adapter.deltas[site]
        delta.A.data.copy_(mine.A.data)
        away = torch.randn(delta.B.shape, generator=torch.Generator().manual_seed(5))
        Q = torch.linalg.qr(mine.B.detach()).Q
        delta.B.data.copy_(away - Q @ (Q.T @ away))
    made = audit(model, "default", others=["reads", "elsewhere", "nothing"])
    for row in made.rows:
        assert set(row.between) == ({"reads"} if row.site.endswith("q_proj") else set())
        for both in row.between.values():
            assert both.left == pytest.approx(0, abs=1e-5)
            assert both.right == pytest.approx(1, abs=1e-5)
            assert both.left_chance == both.right_chance == 2 / 32
    assert "overlap with elsewhere" in made.missing
    assert "overlap with nothing" in made.missing
    with pytest.raises(rankfold.RankfoldError, match="no adapter"):
        audit(model, "default", others=["unknown"])


def test_attention_with_the_adapter_and_without() -> None:
    model, _ = adapted()
    found = entanglement.attention(model, "default", blocks(), texts=2)
    assert found.tokens == 64
    assert model.config._attn_implementation != "eager"
    model.set_attn_implementation("eager")
    curves = []
    with rankfold.using(model, None), torch.no_grad():
        for block in blocks()[:2]:
            layers = model(input_ids=block[None, :64], output_attentions=True).attentions
            for head in torch.cat([layer[0] for layer in layers]).double():
                cuts = [torch.linalg.svdvals(head.reshape(2**cut, -1)).square() for cut in range(1, 12)]
                curves.append([float(-torch.special.xlogy(p / p.sum(), p / p.sum()).sum()) for p in cuts])
    assert found.base == pytest.approx(torch.tensor(curves).mean(0).tolist(), abs=1e-5)
    assert max(found.layers) > 1e-4
    assert found.base_law == entanglement.law(found.base[:6])
    silent, _ = adapted(size=0.0)
    same = entanglement.attention(silent, "default", blocks(), texts=1)
    assert same.base == same.adapted
    with pytest.raises(rankfold.RankfoldError, match="too short"):
        entanglement.attention(model, "default", [torch.arange(7)] * 2)


def test_softened_intruders_have_the_size_they_are_given() -> None:
    model, adapter = adapted(size=1.0)
    made, counts = soften(model, "default", 0.5)
    assert counts
    softened = audit(model, made.name)
    changed = 0
    for before, after in zip(audit(model, "default").rows, softened.rows, strict=True):
        delta, soft = adapter.deltas[before.site], made.deltas[before.site]
        W = delta.W.double()
        first = torch.linalg.svdvals(W + (delta.B @ delta.A).double())
        second = torch.linalg.svdvals(W + soft.scale * (soft.B @ soft.A).double())
        expected = first.clone()
        places = [j for j, m in enumerate(before.matches) if m < 0.5]
        expected[places] *= 0.5
        torch.testing.assert_close(second, expected.sort(descending=True).values, atol=1e-4, rtol=1e-4)
        changed += len(places)
        assert after.rank <= before.rank + len(places)
    assert changed == sum(counts.values())
    with pytest.raises(rankfold.RankfoldError, match="from 0 to 1"):
        soften(model, "default", 1.5)


def test_experts_and_methods_without_a_change_of_weights() -> None:
    from tests.contract.nets import attach, net, scramble

    model = net("experts", torch.float32)
    scramble(attach(model, "lora", kind="experts"))
    assert [row.site for row in audit(model).rows[:2]] == ["experts.gate_up_proj[0]", "experts.gate_up_proj[1]"]
    _made, counts = soften(model, "default", 0.0)
    assert sum(counts.values()) == sum(row.intruders for row in audit(model).rows)
    biases = net("linear")
    attach(biases, "bitfit")
    with pytest.raises(rankfold.RankfoldError, match="no weight"):
        audit(biases)
