"""What quantisers and compensations say, and `quantize`, which puts packed layers in the place of linear ones."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankfold.core.adapter import Adapter
from rankfold.core.attach import attach
from rankfold.core.calibration import Calibration, Statistic
from rankfold.core.calibration.blocks import Window, blocks_of, by_block
from rankfold.core.codebooks import Codebooks
from rankfold.core.component import Component, build
from rankfold.core.control import detach
from rankfold.core.layers import Adapted
from rankfold.core.linalg import svd
from rankfold.core.packed import Packed, PackedLinear, Scheme
from rankfold.core.quantized import is_plain
from rankfold.core.targets import Targets, find
from rankfold.errors import RankfoldError, UnsupportedError
from rankfold.quantizers._distil import Lesson, Teacher, Trained
from rankfold.quantizers._work import Done, Work


class Quantizer(Component):
    """Finds codes and scales of weights.

    One that takes each layer by itself is a `quantise`, and `needs` names the statistics that it reads. One that tries
    what blocks give says in `span` how many it runs at a time, and has its own `pack`.
    """

    axis: ClassVar[str] = "quantizers"
    takes: ClassVar[type] = Scheme

    def needs(self) -> tuple[Statistic[Any], ...]:
        return ()

    @property
    def span(self) -> tuple[int, int]:
        """How many blocks in a row are run at a time, and how many of them again in the next run; 0 for none."""
        return 0, 0

    def quantise(self, W: Tensor, scheme: Scheme, statistics: Calibration | None, site: str) -> Packed:
        """W (out, in), in float32 or float64."""
        raise NotImplementedError

    def pack(self, window: Window, scheme: Scheme) -> Iterator[tuple[str, Packed, Scheme]]:
        """The weight of each of the window's layers that are `due`, by path, with the scheme that it is kept in.

        As soon as one is given it stands in its place: what the window's blocks give then is what they give with it.
        """
        for path in window.due:
            yield path, self.quantise(weight(window.layers[path]), scheme, window.statistics, path), scheme

    def all_of(
        self,
        model: nn.Module,
        layers: Mapping[str, Any],
        scheme: Any,
        batches: Sequence[Any] | None,
        exchange: Callable[..., None],
        progress: Callable[[str], object],
        trained: Trained,
        work: Work | None,
    ) -> "dict[str, Quantised]":
        """All layers, by one that takes other schemes; `exchange(layer, made, None)` puts a packed one in its place."""
        raise NotImplementedError


class Compensation(Component):
    """Makes good with a product B A of rank r what quantising took: `factors(E, statistics, site)` for E = W − Ŵ.

    Where it `distils`, these are a start, and `distil` trains them over the whole packed model.
    """

    axis: ClassVar[str] = "quantizers"

    rank: int

    def needs(self) -> tuple[Statistic[Any], ...]:
        return ()

    def factors(self, E: Tensor, statistics: Calibration | None, site: str) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in)."""
        raise NotImplementedError

    @property
    def distils(self) -> bool:
        return False

    def distil(self, model: nn.Module, parameters: Sequence[nn.Parameter], lesson: Lesson) -> None:
        """Train the products' parameters, all in their places, on what the float model said."""
        raise NotImplementedError


def weight(layer: nn.Linear) -> Tensor:
    """W (out, in), in float32, or float64 where it has that."""
    W = layer.weight.detach()
    return W if W.dtype == torch.float64 else W.float()


def nearest(E: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B and A of that rank with the least `‖E − B A‖`."""
    U, sigma, Vh = svd(E, rank)
    root = sigma.sqrt()
    return U * root, root[:, None] * Vh


@dataclass(frozen=True)
class Quantised:
    """What became of a layer: bits a number, everything counted, and `‖W − Ŵ‖ / ‖W‖` (Frobenius).

    With a compensation `left` is `‖W − Ŵ − B A‖ / ‖W‖`, else None.
    """

    bits: float
    error: float
    left: float | None


def quantize(
    model: nn.Module,
    scheme: Scheme | Codebooks,
    how: str | Quantizer = "rtn",
    *,
    targets: Targets = "all-linear",
    calibration: Calibration | Iterable[Any] | None = None,
    compensate: str | Compensation | None = None,
    name: str = "compensation",
    progress: Callable[[str], object] | None = None,
    trained: Trained | None = None,
    work: str | Path | None = None,
) -> dict[str, Quantised]:
    """Put a `PackedLinear` in the place of every linear layer that `targets` names, in the model itself.

    With batches for calibration blocks are done in turn, each on what the quantised and compensated ones before it
    give. Whatever goes wrong, and Ctrl-C, leaves the model as it was: so its float weights stay until all is done. At
    the peak there are these, the packed ones, the input of one block for all batches (cbq: twice), the statistics of
    that block, and what a layer needs: with gptq some square matrices of its width, in float64. pv-tuning holds six
    floats more for every number of all layers, lrec what the model keeps for a backward pass.

    Args:
        model: with float weights there; without adapters.
        scheme: how the weights are kept; `Codebooks` by "pv-tuning".
        how: the quantiser, or its slug with its defaults.
        targets: which layers, as for `attach`.
        calibration: where statistics are needed: batches of model inputs, or what `rankfold.calibrate` made of the
            float model, for all layers.
        compensate: "lorc", "eora", or one of another rank: its products become a LoRA on the model, active.
        name: of that adapter.
        progress: called after each layer, with its path.
        trained: called after each step of what trains over all layers (lrec, pv-tuning): how many are done, of all.
        work: a folder where each block is kept as soon as it is done, and each minute what trains over all layers.
            The same call goes on after what is there; whoever has saved the model removes it.

    Returns:
        what became of each layer, by its path.

    Raises:
        RankfoldError: a weight holds NaN or infinity, a layer is adapted, or statistics are missing.
        UnsupportedError: a layer is quantised already, or is no linear layer.
    """
    trained = trained or (lambda done, of: None)
    rule = _built(how, Quantizer, "quantises")
    repair = None if compensate is None else _built(compensate, Compensation, "compensates")
    if not isinstance(scheme, rule.takes):
        raise RankfoldError(f"{rule.slug} keeps weights by {rule.takes.__name__}, not by {type(scheme).__name__}")
    layers: dict[str, Any] = {target.path: target.layer for target in find(model, targets)}
    for path, layer in layers.items():
        _check(path, layer)
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = list(calibration)
    elif calibration is not None and work is not None:
        raise RankfoldError("work= knows its data by the batches: quantize(..., calibration=batches)")
    kept = None if work is None else Work(work, model, layers, scheme, rule, repair, calibration)
    if not isinstance(scheme, Scheme):
        if repair is not None:
            raise RankfoldError(f"{rule.slug} leaves nothing to {repair.slug}: its own tables are what trains")
        with torch.no_grad(), _as_it_was(model, []) as exchange:
            batches = calibration if isinstance(calibration, list) else None
            return rule.all_of(model, layers, scheme, batches, exchange, progress or (lambda path: None), trained, kept)
    needs = (*rule.needs(), *(() if repair is None else repair.needs()))
    lesson = None
    if repair is not None and repair.distils:
        if not isinstance(calibration, list):
            raise RankfoldError(f"{repair.slug} trains on text: quantize(..., calibration=batches)")
        lesson = Lesson(calibration, Teacher(model, calibration), trained, kept)
    report: dict[str, Quantised] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    hooks: list[Any] = []
    with torch.no_grad(), _as_it_was(model, hooks) as exchange:
        for number, window in enumerate(_windows(model, rule, repair, layers, calibration)):
            before = None if kept is None else kept.read(number, window)
            if before is None and needs and window.calls:
                window.statistics = window.collect(needs)
            done: list[Done] = []
            for one, made in _pack(window, rule, repair, scheme) if before is None else _again(layers, before):
                exchange(layers[one.path], made, one.pair)
                if one.pair is not None:
                    pairs[one.path] = one.pair
                report[one.path] = Quantised(one.scheme.bits(made.out_features, made.in_features), one.error, one.left)
                done.append(one)
                if progress is not None:
                    progress(one.path)
            if kept is not None and before is None:
                kept.write(number, window, done)
        if repair is not None:
            adapter = _attach(model, pairs, name)
            if lesson is not None:
                for hook in hooks:  # the adapter has their products now
                    hook.remove()
                try:
                    repair.distil(model, list(adapter.parameters()), lesson)
                except BaseException:
                    detach(model, name)
                    raise
    return report


def _again(layers: Mapping[str, Any], done: Iterable[Done]) -> Iterator[tuple[Done, PackedLinear]]:
    return ((one, PackedLinear.of(layers[one.path], one.packed, one.scheme)) for one in done)


def _pack(
    window: Window, rule: Quantizer, repair: Compensation | None, scheme: Scheme
) -> Iterator[tuple[Done, PackedLinear]]:
    for path, packed, kept in rule.pack(window, scheme):
        W, made = weight(window.layers[path]), PackedLinear.of(window.layers[path], packed, kept)
        E = W - made.dequantise(W.dtype)
        pair, left, norm = None, None, max(float(W.norm()), torch.finfo(W.dtype).tiny)
        if repair is not None:
            B, A = pair = repair.factors(E, window.statistics, path)
            left = float((E - B @ A).norm()) / norm
        yield Done(path, packed, kept, pair, float(E.norm()) / norm, left), made


def _built(given: Any, kind: type[Any], does: str) -> Any:
    made = build(given) if isinstance(given, str) else given
    if not isinstance(made, kind):
        raise RankfoldError(f"{given!r} {does} nothing; see `rankfold methods --axis quantizers`")
    return made


def _check(path: str, layer: Any) -> None:
    if isinstance(layer, Adapted):
        raise RankfoldError(f"{path} is adapted: quantise the base model first, then attach or load the adapter")
    if not isinstance(layer, nn.Linear):
        raise UnsupportedError(f"{path} is a {type(layer).__name__}; only linear layers are packed: leave it out")
    if not is_plain(layer.weight):
        raise UnsupportedError(f"{path} is quantised already; take the model with its float weights")
    if layer.weight.is_meta:
        raise RankfoldError(f"{path} has no numbers (it is on the meta device): load its weights first")
    if not bool(layer.weight.isfinite().all()):
        raise RankfoldError(f"the weight of {path} holds NaN or infinity: no scale fits it")


def _windows(
    model: nn.Module,
    rule: Quantizer,
    repair: Compensation | None,
    layers: dict[str, Any],
    calibration: Calibration | list[Any] | None,
) -> Iterator[Window]:
    """The layers block by block, with what the blocks are called with where there are batches."""
    size, overlap = rule.span
    sees = rule.needs() or size or (repair is not None and repair.needs())
    reads = sees or (repair is not None and repair.distils)
    who = rule.slug if rule.needs() or size or repair is None else repair.slug
    if not reads and calibration is not None:
        raise RankfoldError(f"calibration= was given, but {who} needs no statistics")
    if reads and calibration is None:
        raise RankfoldError(f"{who} needs statistics of the data: quantize(..., calibration=batches)")
    if size and isinstance(calibration, Calibration):
        raise RankfoldError(f"{rule.slug} runs the blocks: quantize(..., calibration=batches), not their statistics")
    if sees and isinstance(calibration, list):
        yield from by_block(model, calibration, list(layers), size or 1, overlap, exact=size > 0)
        return
    for paths in blocks_of(layers).values():
        yield Window(
            model,
            {path: layers[path] for path in paths},
            paths,
            statistics=None if isinstance(calibration, list) else calibration,
        )


@contextmanager
def _as_it_was(model: nn.Module, hooks: list[Any]) -> Iterator[Callable[..., None]]:
    """A function that exchanges a layer, wherever it is; an error puts all of them back.

    While the `hooks` are there an exchanged layer's product with its compensation is added to what it gives.
    """
    places: list[tuple[nn.Module, str, nn.Module]] = []
    homes: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None:
                homes.setdefault(child, []).append((module, name))

    def exchange(old: nn.Module, new: nn.Module, pair: tuple[Tensor, Tensor] | None) -> None:
        for module, name in homes[old]:
            module._modules[name] = new
            places.append((module, name, old))
        if pair is not None:
            B, A = pair
            add = lambda _, args, y: y + (args[0] @ A.mT.to(y.dtype)) @ B.mT.to(y.dtype)  # noqa: E731
            hooks.append(new.register_forward_hook(add))

    try:
        yield exchange
    except BaseException:
        for module, name, old in places:
            module._modules[name] = old
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _attach(model: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]], name: str) -> Adapter:
    """A LoRA of those products, of scale 1."""
    from rankfold.deltas.lora import LoRA

    ranks = {path: A.shape[0] for path, (_, A) in pairs.items()}
    widest = max(ranks.values())
    overrides = {path: {"rank": r, "alpha": r} for path, r in ranks.items() if r != widest}
    adapter = attach(
        model, LoRA(rank=widest, alpha=widest), lambda path, _: path in pairs, name, overrides=overrides or None
    )
    with torch.no_grad():
        for path, (B, A) in pairs.items():
            adapter.deltas[path].set_start(B, A)
    return adapter
