"""The audit of an adapter: a row of measures for each adapted weight, measures of the whole model, and alarms."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.audit import entanglement, intruders, limits, metrics
from rankfold.audit.forgetting import Forgetting, forgetting
from rankfold.audit.safety import Refusals
from rankfold.core.adapter import Adapter
from rankfold.core.convert import as_lora, product
from rankfold.core.linalg import spaces
from rankfold.core.rank import replace as put
from rankfold.core.routing import state_of
from rankfold.errors import RankfoldError

Level = Literal["WARN", "HIGH"]
NOT_ASKED = "the probes were not run"


@dataclass(frozen=True)
class Limits:
    """From where on a measure raises an alarm."""

    growth: float = 0.10
    growth_high: float = 0.50
    frobenius: float = 0.30
    forgetting: float = 0.02
    forgetting_high: float = 0.10


@dataclass(frozen=True)
class Between:
    """How the left and the right space of ΔW overlap with another adapter's, as many directions as both have; `chance`
    is what spaces that know nothing of each other would have."""

    left: float
    left_chance: float
    right: float
    right_chance: float


@dataclass(frozen=True)
class Row:
    """What a change did to one weight W (out, in). `matches` are m_j of the leading components of W + ΔW; `overlap` is
    the similarity of ΔW's left space and as many leading left vectors of W, `chance` what it would be by chance;
    `reference` holds the same measures of the reference's change, and `between` how ΔW's spaces lie to those of the
    other adapters that change this weight, by their names, and of the reference."""

    site: str
    shape: tuple[int, int]
    rank: int
    effective_rank: float
    stable_rank: float
    participation: float
    energy_rank: int
    spectral_growth: float
    relative_norm: float
    frobenius_norm: float
    amplification: float
    overlap: float
    chance: float
    intruders: int
    matches: list[float]
    entropies: list[float]
    valley: float
    singular_values: list[float]
    between: dict[str, Between] = field(default_factory=dict)
    reference: "Row | None" = None


@dataclass(frozen=True)
class Alarm:
    """`value` of the measure `name` is beyond `threshold`."""

    name: str
    where: str
    value: float
    threshold: float
    level: Level


@dataclass
class Audit:
    """The report. `missing` says what was not measured and why: that is never a pass."""

    adapter: str
    method: str
    parameters: int
    rows: list[Row]
    settings: dict[str, Any]
    forgetting: Forgetting | None = None
    protected: Refusals | None = None
    harmless: Refusals | None = None
    norms: list[limits.Norms] = field(default_factory=list)
    attention: entanglement.Attention | None = None
    missing: dict[str, str] = field(default_factory=dict)
    alarms: list[Alarm] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def worst(self) -> Level | None:
        levels = {alarm.level for alarm in self.alarms}
        return "HIGH" if "HIGH" in levels else "WARN" if levels else None


@torch.no_grad()
def audit(
    model: nn.Module,
    name: str | None = None,
    *,
    reference: nn.Module | None = None,
    others: Sequence[str] = (),
    blocks: Sequence[Tensor] | None = None,
    mask: int | None = None,
    refusals: tuple[Refusals, Refusals] | None = None,
    k: int = 10,
    threshold: float = 0.5,
    cluster: float = 0.0,
    limit: Limits | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Audit:
    """Measure what the adapter `name` (the active one by default) does to the model.

    Args:
        model: the base with the adapter on it; nothing is changed.
        reference: the same model tuned in full, or with another adapter merged into it, to compare every layer with.
        others: further adapters on the model, to whose changes this one's are compared.
        blocks: token ids (L,) of text that has nothing to do with the task, for forgetting (language models).
        mask: the id of the mask token, for a masked language model.
        refusals: how answers to the protected and the harmless probes compare (`rankfold.audit.safety.compare`).
        k: how many leading components are looked at for intruders. threshold: ε. cluster: see `intruders.match`.
        limit: where alarms begin.
        progress: called after each adapted layer.

    Raises RankfoldError where the adapter has no ΔW anywhere, or the reference has other shapes.
    """
    state = state_of(model)
    name = state.active if name is None else state.check(name)
    if name is None:
        raise RankfoldError(f"no adapter is active: name one of {', '.join(state.adapters)}")
    adapter: Adapter = state.adapters[name]
    settings = {"k": k, "threshold": threshold, "cluster": cluster}
    made = Audit(name, adapter.method.slug, adapter.num_parameters(), [], settings)
    changed = [site for site in adapter.deltas if _is_changed(adapter, site)]
    if not changed:
        raise RankfoldError(f"{adapter.method.slug} changes no weight by a ΔW: there is no spectrum to look at")
    if left := [site for site in adapter.deltas if site not in changed]:
        made.missing["spectra"] = f"{len(left)} layers are changed by no ΔW, such as {left[0]}"
    beside = {other: state.adapters[state.check(other)] for other in others}

    @torch.no_grad()
    def measured(site: str) -> list[Row]:
        theirs = {other: list(_changes(found, site)) for other, found in beside.items() if _is_changed(found, site)}
        rows = []
        for i, (place, W, B, A) in enumerate(_changes(adapter, site)):
            tuned = None if reference is None else _reference(reference, adapter, site, place, W)
            pairs = {other: changes[i][2:] for other, changes in theirs.items()}
            rows.append(_row(_name(site, place), W, B, A, tuned, pairs, k, threshold, cluster))
        return rows

    for rows in _several_at_once(measured, changed, adapter.deltas[changed[0]].W.device):
        made.rows += rows
        progress()
    for other in others:
        if not any(other in row.between for row in made.rows):
            made.missing[f"overlap with {other}"] = "it changes none of these weights"
    _whole_model(made, model, name, blocks, mask, refusals)
    made.alarms = alarms(made, limit or Limits())
    return made


def _several_at_once(
    measured: Callable[[str], list[Row]], sites: Sequence[str], device: torch.device
) -> Iterator[list[Row]]:
    """The rows of each site, in order. One decomposition makes little use of more than one of a processor's cores."""
    threads = torch.get_num_threads()
    workers = min(4, threads) if device.type == "cpu" else 1
    pool = ThreadPoolExecutor(workers, "rankfold-audit", lambda: torch.set_num_threads(threads // workers))
    try:
        yield from pool.map(measured, sites)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _whole_model(
    made: Audit,
    model: nn.Module,
    name: str,
    blocks: Sequence[Tensor] | None,
    mask: int | None,
    refusals: tuple[Refusals, Refusals] | None,
) -> None:
    if blocks is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        why = "no text was given" if blocks is None else "text alone cannot be run through an encoder-decoder"
        made.missing |= dict.fromkeys(("forgetting", "norms", "attention"), why)
    else:
        batch = {"input_ids": blocks[0][None].to(next(model.parameters()).device)}

        def measured(what: str, measure: Callable[[], Any]) -> Any:
            try:
                return measure()
            except RankfoldError as error:
                made.missing[what] = str(error)

        made.forgetting = measured("forgetting", lambda: forgetting(model, name, blocks, mask=mask))
        made.norms = measured("norms", lambda: limits.norms(model, name, batch)) or []
        made.attention = measured("attention", lambda: entanglement.attention(model, name, blocks))
    if refusals is None:
        made.missing["refusals"] = NOT_ASKED if answers(model) else "the model writes no text that could be asked for"
    else:
        made.protected, made.harmless = refusals


def answers(model: Any) -> bool:
    """Whether the model continues a text, so that it can be asked something."""
    return bool(getattr(model, "can_generate", bool)()) and not model.config.is_encoder_decoder


def _is_changed(adapter: Adapter, site: str) -> bool:
    """Whether the weight is changed by a ΔW."""
    return site in adapter.deltas and adapter.deltas[site].form not in ("function", "bias")


def _changes(adapter: Adapter, site: str) -> Iterator[tuple[int | None, Tensor, Tensor, Tensor]]:
    """(expert or None, W (out, in), B, A) with ΔW = B A."""
    delta = adapter.deltas[site]
    B, A, _ = product(delta, None)
    W = delta.W.detach()
    if delta.is_folded:
        W = W + delta.scale * (delta.B0 @ delta.A0).to(W.dtype)
    W = W if W.dtype == torch.float64 else W.float()
    if W.dim() == 2:
        yield None, W, B, A
    else:
        for e in range(W.shape[0]):
            yield e, W[e], B[e], A[e]


def _name(site: str, place: int | None) -> str:
    return site if place is None else f"{site}[{place}]"


def _reference(reference: nn.Module, adapter: Adapter, site: str, place: int | None, W: Tensor) -> Tensor:
    """The reference's ΔW (out, in) of a site."""
    own = adapter.deltas[site].site
    path = site.removesuffix(f".{own.parameter}") if own.kind == "experts" else site
    try:
        weight = getattr(reference.get_submodule(path), own.parameter)
    except AttributeError:
        raise RankfoldError(f"the reference has no layer {path}: it is another model") from None
    tuned = adapter.deltas[site].layer.to_matrix(weight.detach())
    tuned = (tuned if place is None else tuned[place]).to(W)
    if tuned.shape != W.shape:
        raise RankfoldError(f"{site} is {tuple(W.shape)} here and {tuple(tuned.shape)} in the reference")
    return tuned - W


def _row(
    site: str,
    W: Tensor,
    B: Tensor,
    A: Tensor,
    tuned: Tensor | None,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    k: int,
    threshold: float,
    cluster: float,
) -> Row:
    base = intruders.base_of(W)
    U, Vh, row = _measured(site, base, B, A, k, threshold, cluster)
    others, reference = {}, None
    if tuned is not None:
        eye = torch.eye(tuned.shape[1], dtype=tuned.dtype, device=tuned.device)
        *others["reference"], reference = _measured(site, base, tuned, eye, k, threshold, cluster)
    for name, pair in pairs.items():
        others[name] = spaces(*pair)[::2]
    between = {name: _between(U, Vh, *space) for name, space in others.items() if min(U.shape[1], space[0].shape[1])}
    return replace(row, between=between, reference=reference)


def _between(U: Tensor, Vh: Tensor, other_U: Tensor, other_Vh: Tensor) -> Between:
    both = min(U.shape[1], other_U.shape[1])
    left = metrics.overlap(U[:, :both], other_U[:, :both])
    right = metrics.overlap(Vh[:both].mT, other_Vh[:both].mT)
    return Between(left.similarity, left.chance, right.similarity, right.chance)


def _measured(
    site: str, base: intruders.Base, B: Tensor, A: Tensor, k: int, threshold: float, cluster: float
) -> tuple[Tensor, Tensor, Row]:
    """The left vectors (out, rank) of ΔW = B A, the right ones (rank, in), and what its spectrum comes to."""
    U, S, Vh = spaces(B, A)
    rank = len(S)
    found = intruders.match(base, B, A, k, cluster=cluster)
    grown = metrics.growth(float(base.S[0]), float(found.S[0]), S if rank else S.new_zeros(1), float(base.W.norm()))
    lies = metrics.overlap(U, base.U[:, :rank]) if rank else None
    bits = entanglement.profile(B, A)
    row = Row(
        site=site,
        shape=(base.W.shape[0], base.W.shape[1]),
        rank=rank,
        effective_rank=metrics.effective_rank(S),
        stable_rank=metrics.stable_rank(S) if rank else 0.0,
        participation=metrics.participation_ratio(S),
        energy_rank=metrics.energy_rank(S),
        spectral_growth=grown.spectral,
        relative_norm=grown.relative,
        frobenius_norm=grown.frobenius,
        amplification=metrics.amplification(base.W, U, S, Vh),
        overlap=lies.similarity if lies else 0.0,
        chance=lies.chance if lies else 0.0,
        intruders=len(found.intruders(threshold)),
        matches=found.m.tolist(),
        entropies=bits.entropies,
        valley=bits.valley,
        singular_values=S.tolist(),
    )
    return U, Vh, row


def alarms(made: Audit, limit: Limits) -> list[Alarm]:
    """What is beyond the limits: the worst first, and those of the whole model before those of a weight."""
    raised: list[Alarm] = []

    def check(name: str, where: str, value: float, warn: float, high: float | None = None) -> None:
        if high is not None and value > high:
            raised.append(Alarm(name, where, value, high, "HIGH"))
        elif value > warn:
            raised.append(Alarm(name, where, value, warn, "WARN"))

    for row in made.rows:
        check("spectral growth", row.site, row.spectral_growth, limit.growth, limit.growth_high)
        check("frobenius norm", row.site, row.frobenius_norm, limit.frobenius)
        check("intruders", row.site, row.intruders, 0)
    if made.forgetting is not None:
        check("forgetting", "the model", made.forgetting.loss, limit.forgetting, limit.forgetting_high)
    if made.protected is not None and (level := made.protected.level()) is not None:
        raised.append(
            Alarm("refusals lost", "the model", made.protected.drop, 0.10 if level == "HIGH" else 0.03, level)
        )
    if made.missing.get("refusals") == NOT_ASKED:
        raised.append(Alarm("probes not asked", "the model", 0, 1, "WARN"))
    for layer in made.norms:
        if layer.crossed:
            raised.append(Alarm("attention norm", layer.layer, layer.adapted, layer.bound, "WARN"))
    return sorted(raised, key=lambda alarm: (alarm.level != "HIGH", alarm.where != "the model"))


@torch.no_grad()
def soften(
    model: nn.Module, name: str, strength: float, *, k: int = 10, threshold: float = 0.5, new_name: str | None = None
) -> tuple[Adapter, dict[str, int]]:
    """A LoRA, inactive beside adapter `name`, that does the same but with every intruder's σ_j at `strength · σ_j`.

    1 changes nothing, 0 takes the intruders out of W + ΔW. Returns it and how many were scaled at each site where there
    were any. Raises UnsupportedError for a method without a ΔW.
    """
    if not 0 <= strength <= 1:
        raise RankfoldError(f"an intruder is scaled by something from 0 to 1, not {strength}")
    made, _ = as_lora(model, name, new_name=new_name or f"{name}-softened")
    adapter, counts = state_of(model).adapters[name], {}
    for site in list(made.deltas):
        added = []
        for _, W, B, A in _changes(adapter, site):
            found = intruders.match(intruders.base_of(W), B, A, k)
            added.append(intruders.scaled(found, found.intruders(threshold), strength))
        counts[site] = sum(B.shape[1] for B, _ in added)
        most = max(B.shape[1] for B, _ in added)
        delta = made.deltas[site]
        more_B = torch.stack([F.pad(B, (0, most - B.shape[1])) for B, _ in added]).view(*delta.B.shape[:-1], most)
        more_A = torch.stack([F.pad(A, (0, 0, 0, most - A.shape[0])) for _, A in added])
        more_A = more_A.view(*delta.A.shape[:-2], most, delta.A.shape[-1])
        if most:
            put(made, site, torch.cat([delta.B, more_B.to(delta.B)], -1), torch.cat([delta.A, more_A.to(delta.A)], -2))
    return made, {site: count for site, count in counts.items() if count}
