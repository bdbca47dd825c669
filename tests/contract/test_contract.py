"""The contract: every registered method × every capability. A new method is tested by existing."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import rankfold
from rankfold.core.rank import compact, grow, plan_of
from rankfold.core.registry import example_site
from tests.contract.nets import KINDS, SLUGS, attach, difference, example, net_for, same, scramble, weights
from tests.quantizers import QUANTIZERS

SUPPORTS = {entry.slug: entry.supports for entry in rankfold.methods()}
every_method = pytest.mark.parametrize("slug", SLUGS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def refused(slug: str, capability: str) -> bool:
    """Whether the registry says the method cannot do it, for a stated reason."""
    return SUPPORTS[slug][capability] is not True


@every_kind
@every_method
def test_starts_as_the_base(slug: str, kind: str) -> None:
    model, x = net_for(slug, kind), example(kind)
    before = model(x)
    if refused(slug, kind):
        with pytest.raises(rankfold.UnsupportedError, match=slug):
            attach(model, slug, kind=kind)
        assert not rankfold.adapters(model)
        return
    attach(model, slug, kind=kind)
    if refused(slug, "identity"):
        assert difference(model(x), before) > 1e-12, f"{slug} says it departs, and does not"
    else:
        assert difference(model(x), before) < 1e-12


@every_kind
@every_method
def test_merged_equals_unmerged_and_unmerges_to_the_last_bit(slug: str, kind: str) -> None:
    if refused(slug, kind):
        pytest.skip(str(SUPPORTS[slug][kind]))
    model, x = net_for(slug, kind), example(kind)
    base, before = weights(model), model(x)
    scramble(attach(model, slug, kind=kind))
    adapted = model(x)
    assert difference(adapted, before) > 1e-4, "the scrambled adapter changes nothing: the test would not see a bug"
    if refused(slug, "merge"):
        with pytest.raises(rankfold.UnsupportedError):
            rankfold.merge(model, "default")
        return
    rankfold.merge(model, "default")
    assert difference(model(x), adapted) < 1e-11
    with rankfold.using(model, None):
        assert difference(model(x), adapted) < 1e-11
    assert weights(model).keys() == base.keys(), "a merged adapter's deltas must not be saved with the model"
    rankfold.unmerge(model)
    assert difference(model(x), adapted) == 0
    with rankfold.using(model, None):
        assert torch.equal(model(x), before)
    rankfold.merge(model, "default")
    rankfold.detach(model)
    assert same(weights(model), base)
    assert torch.equal(model(x), before)


@every_method
def test_two_merged_adapters_unmerge_in_any_order(slug: str) -> None:
    if refused(slug, "merge"):
        pytest.skip(str(SUPPORTS[slug]["merge"]))
    model, x = net_for(slug), example()
    before = model(x)
    scramble(attach(model, slug, "a"), 1)
    scramble(attach(model, slug, "b"), 2)
    rankfold.merge(model, "a")
    only_a = weights(model)
    rankfold.merge(model, "b")
    rankfold.unmerge(model, "a")
    with rankfold.using(model, None):
        only_b = model(x)
    rankfold.merge(model, "a")
    rankfold.unmerge(model, "b")
    assert same(weights(model), only_a)
    rankfold.unmerge(model, "a")
    with rankfold.using(model, "b"):
        assert difference(model(x), only_b) < 1e-11
    with rankfold.using(model, None):
        assert torch.equal(model(x), before)


@every_method
def test_only_the_adapter_gets_gradients_and_all_of_it_trains(slug: str) -> None:
    model, x = net_for(slug), example()
    adapter = attach(model, slug)
    start = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    losses = []
    for _ in range(4):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    own = {id(parameter) for parameter in adapter.parameters()}
    assert all(p.grad is None and not p.requires_grad for p in model.parameters() if id(p) not in own)
    assert losses[-1] < losses[0]
    still = [name for name, parameter in adapter.named_parameters() if torch.equal(parameter, start[name])]
    assert not still, f"never moved: {still}"


@every_method
def test_counts_what_its_formula_says(slug: str) -> None:
    for kind in ("linear", "conv", "experts"):
        if refused(slug, kind):
            continue
        adapter = attach(net_for(slug, kind), slug, kind=kind)
        assert adapter.num_parameters() == adapter.method.num_parameters(adapter.sites)
        assert adapter.num_parameters() == sum(p.numel() for p in adapter.model.parameters() if p.requires_grad)


@every_kind
@every_method
def test_rows_of_one_batch_equal_rows_alone(slug: str, kind: str) -> None:
    if refused(slug, kind):
        pytest.skip(str(SUPPORTS[slug][kind]))
    model, x = net_for(slug, kind), example(kind, rows=5)
    scramble(attach(model, slug, "a", kind=kind), 1)
    scramble(attach(model, slug, "b", kind=kind), 2)
    if not refused("lora", kind):
        scramble(attach(model, "lora", "other", kind=kind), 3)
    names = ["a", None, "b", "other" if not refused("lora", kind) else "a", "a"]
    alone = []
    for row, name in enumerate(names):
        with rankfold.using(model, name):
            alone.append(model(x[row : row + 1]))
    with rankfold.using(model, names):
        together = model(x)
    assert difference(together, torch.cat(alone)) < 1e-12
    loss = together.square().sum()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.cat(alone).square().sum().backward()
    assert gradients
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert difference(gradients[name], parameter.grad) < 1e-10


@every_method
def test_side_by_side_switch_disable_rename_delete(slug: str) -> None:
    model, x = net_for(slug), example()
    before = model(x)
    scramble(attach(model, slug, "a"), 1)
    with_a = model(x)
    scramble(attach(model, "lora", "b"), 2)
    with_b = model(x)
    assert difference(with_a, with_b) > 1e-3
    rankfold.set_active(model, "a")
    assert torch.equal(model(x), with_a)
    rankfold.set_active(model, None)
    assert torch.equal(model(x), before)
    rankfold.rename(model, "a", "again")
    with rankfold.using(model, "again"):
        assert torch.equal(model(x), with_a)
    with pytest.raises(rankfold.RankfoldError, match="again"):
        rankfold.set_active(model, "a")
    rankfold.detach(model, "again")
    with rankfold.using(model, "b"):
        assert torch.equal(model(x), with_b)
    rankfold.detach(model)
    assert torch.equal(model(x), before)
    assert type(model.fc1) is type(net_for(slug).fc1)


@every_method
def test_deepcopy_is_independent(slug: str) -> None:
    model, x = net_for(slug), example()
    adapter = scramble(attach(model, slug))
    adapted = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), adapted)
    scramble(adapter, 7)
    assert torch.equal(twin(x), adapted)
    rankfold.detach(model)
    assert torch.equal(twin(x), adapted)
    rankfold.set_active(twin, None)
    assert difference(twin(x), adapted) > 1e-3


@every_method
def test_bf16_base(slug: str) -> None:
    model, x = net_for(slug, dtype=torch.float32), example(dtype=torch.float32)
    scramble(attach(model, slug))
    adapted, state = model(x), {k: v.clone() for k, v in rankfold.adapters(model)["default"].state_dict().items()}
    half = net_for(slug, dtype=torch.float32).to(torch.bfloat16)
    adapter = attach(half, slug)
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    adapter.load_state_dict(state)
    y = half(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    rounds = rankfold.build(slug).over == ("float",)  # and a weight of 16 bits to another code
    assert difference(y.float(), adapted) < (0.2 if rounds else 0.05)
    y.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapter.parameters())


@every_method
def test_autocast(slug: str) -> None:
    model, x = net_for(slug, dtype=torch.float32), example(dtype=torch.float32)
    adapter = scramble(attach(model, slug))
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert difference(y.float(), expected) < 0.05
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in adapter.parameters())


@every_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(slug: str, reentrant: bool) -> None:
    model, x = net_for(slug), example().requires_grad_(True)
    adapter = scramble(attach(model, slug))
    model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in adapter.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for parameter, gradient in zip(adapter.parameters(), expected, strict=True):
        assert difference(parameter.grad, gradient) < 1e-12


@every_method
def test_compiles_in_one_graph(slug: str) -> None:
    torch._dynamo.reset()
    model, x = net_for(slug, dtype=torch.float32), example(dtype=torch.float32)
    adapter = scramble(attach(model, slug))
    expected = model(x)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in adapter.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert difference(y, expected) < 1e-5
    y.square().sum().backward()
    for parameter, gradient in zip(adapter.parameters(), gradients, strict=True):
        assert difference(parameter.grad, gradient) < 1e-4
    rankfold.set_active(model, None)
    assert difference(compiled(x), expected) > 1e-3
    rankfold.set_active(model, "default")
    assert difference(compiled(x), expected) < 1e-5


@every_method
@pytest.mark.parametrize("kind", ["linear", "conv", "experts"])
def test_exports_as_lora_with_a_true_error(slug: str, kind: str) -> None:
    if refused(slug, kind):
        pytest.skip(str(SUPPORTS[slug][kind]))
    model, x = net_for(slug, kind), example(kind)
    adapter = scramble(attach(model, slug, kind=kind))
    adapted = model(x)
    if refused(slug, "as-lora"):
        with pytest.raises(rankfold.UnsupportedError):
            rankfold.as_lora(model)
        return
    changes_bias = any(delta.biased and delta.b is not None for delta in adapter.deltas.values())
    lora, report = rankfold.as_lora(model, "default")
    assert lora.name == "default-lora"
    assert torch.equal(model(x), adapted), "the export must be inactive"
    if not changes_bias:
        assert max(report.values()) < 1e-7
        with rankfold.using(model, "default-lora"):
            assert difference(model(x), adapted) < 1e-6
    small, report = rankfold.as_lora(model, "default", rank=1, new_name="small")
    for site, delta in adapter.deltas.items():
        W = delta.W.double()
        B, A = small.deltas[site].factors()
        assert A.shape[-2] == B.shape[-1] == 1
        with torch.no_grad():
            wanted = delta.adapted_weight(W) - W
            got = small.deltas[site].scale * (B @ A)
            bias = delta.bias_update(delta.b) if delta.biased and delta.b is not None else torch.zeros(1)
            true = ((wanted - got).square().sum() + bias.square().sum()) / (wanted.square().sum() + bias.square().sum())
        assert report[site] == pytest.approx(float(true) ** 0.5, abs=1e-6)


@every_method
def test_an_adapter_that_cannot_train_is_refused(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product whose two factors are zero has no gradient; forms without two factors cannot be dead that way."""
    probe = attach(net_for(slug), slug)
    delta = next(iter(probe.deltas.values()))
    if not delta.startable:
        pytest.skip("not a product of two factors of its own")

    def zero(self: rankfold.Delta, rng: torch.Generator) -> None:
        for tensor in (*self.parameters(), *self.buffers()):
            torch.nn.init.zeros_(tensor)

    monkeypatch.setattr(type(delta), "start", zero)
    with pytest.raises(rankfold.RankfoldError, match="never train"):
        attach(net_for(slug), slug)


@every_method
def test_dropout_acts_in_training_only(slug: str) -> None:
    if "dropout" not in type(rankfold.build(slug)).model_fields:
        pytest.skip("has no dropout")
    model, x = net_for(slug), example()
    plain = scramble(attach(model, slug))
    expected = model(x)
    state = plain.state_dict()
    dropped = attach(model, slug, "dropped", dropout=0.5)
    dropped.load_state_dict(state)
    assert difference(model(x), expected) < 1e-12
    dropped.train()
    torch.manual_seed(0)
    with torch.no_grad():
        samples = torch.stack([model.fc1(x) for _ in range(300)])
        rankfold.set_active(model, "default")
        assert difference(samples[0], samples[1]) > 1e-3
        assert difference(samples.mean(0), model.fc1(x)) < 0.15


@every_method
@pytest.mark.parametrize("quantizer", list(QUANTIZERS))
def test_trains_over_a_quantised_base(slug: str, quantizer: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    model = QUANTIZERS[quantizer](model)
    x = torch.randn(6, 64)
    before, method = model(x).float(), rankfold.build(slug, **({"feedforward": []} if slug == "ia3" else {}))
    if refused(slug, "packed-base" if quantizer.startswith("rankfold") else "foreign-base"):
        with pytest.raises(rankfold.UnsupportedError, match=slug):
            rankfold.attach(model, method, targets=["0", "2"])
        return
    adapter = rankfold.attach(model, method, targets=["0", "2"])
    if not refused(slug, "identity"):
        assert difference(model(x).float(), before) < 0.02
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    target, losses = torch.randn(6, 64), []
    for _ in range(8):
        loss = (model(x).float() - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with rankfold.using(model, ["default", None, "default", None, None, "default"]):
        y = model(x).float()
    with rankfold.using(model, None):
        assert difference(y[[1, 3, 4]], model(x).float()[[1, 3, 4]]) < 0.02
    assert difference(y[[0, 2, 5]], model(x).float()[[0, 2, 5]]) < 0.02
    if SUPPORTS[slug]["as-lora"] is True:
        rankfold.as_lora(model)
    if method.bias_only or "float" not in method.over:
        y = model(x)
        rankfold.merge(model)
        assert difference(model(x), y) < 1e-6
    else:
        with pytest.raises(rankfold.UnsupportedError, match="quantised"):
            rankfold.merge(model)


@every_kind
@every_method
def test_rank_plans_compact_to_what_they_computed(slug: str, kind: str, tmp_path: Path) -> None:
    """A gate with zeros and two grown components, saved and loaded as they are, then made an ordinary product."""
    model, x = net_for(slug, kind), example(kind)
    if refused(slug, kind):
        pytest.skip(str(SUPPORTS[slug][kind]))
    if refused(slug, "rank-plan"):
        with pytest.raises(rankfold.RankfoldError, match="rank plan"):
            plan_of(next(iter(attach(model, slug, kind=kind).deltas.values())))
        return
    adapter = attach(model, slug, kind=kind)
    scramble(adapter)
    for site, delta in adapter.deltas.items():
        plan, r = plan_of(delta), delta.A.shape[-2]
        plan.gate = torch.nn.Parameter(
            torch.linspace(0.5, 2, r, dtype=torch.float64).expand(*delta.site.batch, r).clone()
        )
        plan.gate.data[..., 1] = 0
        ungrown = model(x)
        block = grow(adapter, site, 2)
        for parameter in block.parameters():
            torch.nn.init.constant_(parameter, 0.0)
        assert difference(model(x), ungrown) < 1e-12
        for parameter in block.parameters():
            torch.nn.init.uniform_(parameter, 0.1, 0.5, generator=torch.Generator().manual_seed(4))
        assert difference(model(x), ungrown) > 1e-6
    planned = model(x)
    rankfold.save(model, tmp_path / "planned")
    other = net_for(slug, kind)
    rankfold.load(other, tmp_path / "planned")
    assert difference(other(x), planned) < 1e-12
    ranks = {site: delta.A.shape[-2] + 1 for site, delta in adapter.deltas.items()}  # one gate is zero, two are grown
    assert compact(adapter) == ranks
    assert {site: delta.A.shape[-2] for site, delta in adapter.deltas.items()} == ranks
    assert difference(model(x), planned) < 1e-11
    assert sum(p.numel() for p in adapter.parameters()) == sum(
        adapter.methods[site].count(delta.site) * delta.site.count for site, delta in adapter.deltas.items()
    )
    rankfold.save(model, tmp_path / "compact")
    rankfold.load(other, tmp_path / "compact", name="compact")
    assert difference(other(x), planned) < 1e-11


@every_method
def test_strength_weighs_the_whole_change(slug: str) -> None:
    model, x = net_for(slug), example()
    adapter, seen = scramble(attach(model, slug)), []
    model.get_submodule("fc1").register_forward_hook(lambda *hooked: seen.append(hooked[2].detach()))
    model(x)
    adapter.deltas["fc1"].strength = lambda: 0.25
    model(x)
    with rankfold.using(model, None):
        model(x)
    assert difference(seen[1], seen[2] + 0.25 * (seen[0] - seen[2])) < 1e-12
    assert difference(seen[1], seen[0]) > 1e-6
    with pytest.raises(rankfold.RankfoldError):
        rankfold.merge(model, "default")


@pytest.fixture(scope="session")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every method, saved here and loaded in one new process: its outputs here, and those it gets there."""
    folder = tmp_path_factory.mktemp("adapters")
    threads, here = torch.get_num_threads(), {}
    torch.set_num_threads(1)  # in both processes: the last bits depend on it
    for slug in SLUGS:
        model = net_for(slug, dtype=torch.float32)
        scramble(attach(model, slug))
        rankfold.save(model, folder / slug)
        here[slug] = model(example(dtype=torch.float32)).detach()
    torch.set_num_threads(threads)
    script = (
        "import sys, torch, rankfold\n"
        "from safetensors.torch import save_file\n"
        "from tests.contract.nets import SLUGS, net_for, example\n"
        "torch.set_num_threads(1)\n"
        "outputs = {}\n"
        "for slug in SLUGS:\n"
        "    model = net_for(slug, dtype=torch.float32)\n"
        "    rankfold.load(model, f'{sys.argv[1]}/{slug}', name='again')\n"
        "    outputs[slug] = model(example(dtype=torch.float32)).detach().contiguous()\n"
        "save_file(outputs, sys.argv[1] + '/outputs.safetensors')\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, cwd=root)
    there = load_file(folder / "outputs.safetensors")
    return {slug: (here[slug], there[slug]) for slug in SLUGS}


@every_method
def test_loads_in_a_new_process(slug: str, reloaded: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    assert torch.equal(*reloaded[slug])


@every_method
def test_default_hyperparameters_fit_a_small_layer_and_survive_a_round_trip(slug: str) -> None:
    method = rankfold.build(slug)
    document = method.describe()
    assert rankfold.build(document.pop("name"), **document) == method
    assert method.refusal(example_site("linear", method.over[0])) is None


def test_the_registry_is_not_empty() -> None:
    assert {"lora", "dora", "vera", "ia3", "bitfit", "nola", "loldu", "bone", "randlora"} <= set(SLUGS)
