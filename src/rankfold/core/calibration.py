"""Calibration: statistics of a model's inputs and gradients, streamed from a few batches and shared by all who ask.

An init, a quantiser or a pruner states what it reads as values (`InputCovariance()`, `InputPCA(16)`); `calibrate` runs
the batches through the model once, collects all of it, and `Calibration.get(statistic, site)` hands it out. Sites that
see the very same input (q, k, v; gate, up) share one accumulator. A new statistic is one subclass of `Statistic`.
"""

import contextlib
import json
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold
from rankfold.core import targets as target_module
from rankfold.core.delta import Site
from rankfold.core.files import write_whole
from rankfold.core.linalg import leading_svd
from rankfold.core.targets import Target, Targets
from rankfold.errors import RankfoldError, UnsupportedError

T = TypeVar("T")
FORMAT = 1
_STATISTICS: dict[str, type["Statistic[Any]"]] = {}


# ---- what can be asked for


class Accumulator:
    """What grows batch by batch: `add` a matrix, then `result(batches)` names the tensors of the statistic."""

    def add(self, X: Tensor) -> None:
        raise NotImplementedError

    def result(self, batches: int) -> dict[str, Tensor]:
        raise NotImplementedError


class Statistic(Generic[T]):
    """A question about one site; its answer is a T. Subclasses are frozen dataclasses, so equal questions are shared.

    Statistics of inputs get, batch by batch, the tokens' inputs `X (tokens, in)`; those with `of_gradient` get each
    use's gradient `G (out, in)`. Both come in the site's dtype (float32, or float64 for a float64 model).
    """

    of_gradient: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _STATISTICS[cls.__name__] = cls

    def refuses(self, site: Site) -> str | None:
        """Why the site cannot have it, or None."""
        if site.kind == "norm":
            return "a normalisation has no weight matrix"
        if site.kind == "experts" and not self.of_gradient:
            return "fused experts choose and multiply their tokens inside one module, which shows no expert's input"
        return None

    def size(self, site: Site) -> int:
        """How many numbers the accumulator holds."""
        raise NotImplementedError

    def accumulator(self, site: Site) -> Accumulator:
        raise NotImplementedError

    def read(self, tensors: dict[str, Tensor]) -> T:
        """The answer from the accumulator's tensors."""
        raise NotImplementedError

    def answers(self, asked: "Statistic[Any]") -> bool:
        """Whether what was collected for this question also answers the other."""
        return self == asked

    def settled(self, accumulators: Sequence[tuple[Any, int]]) -> bool:
        """Whether more batches would change nothing; each accumulator comes with the number of sites that share it."""
        return False


@dataclass(frozen=True)
class InputCovariance(Statistic[Tensor]):
    """`XᵀX / tokens (in, in)`: the inputs' second moments, not centred (CorDA, GPTQ, EoRA)."""

    def refuses(self, site: Site) -> str | None:
        if site.kind == "embedding":
            return f"its {site.in_} inputs are one-hot, so the matrix is diagonal: ask for InputSecondMoment()"
        return super().refuses(site)

    def size(self, site: Site) -> int:
        return site.in_**2

    def accumulator(self, site: Site) -> Accumulator:
        return _Covariance()

    def read(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors["value"]


@dataclass(frozen=True)
class InputSecondMoment(Statistic[Tensor]):
    """The mean of x² `(in,)`, feature by feature (Wanda, FLAP). For an embedding: how often each token occurs."""

    def size(self, site: Site) -> int:
        return site.in_

    def accumulator(self, site: Site) -> Accumulator:
        return _SecondMoment()

    def read(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors["value"]


class PCA(NamedTuple):
    """Principal components of inputs, the strongest first; k may be less than asked where there were few tokens."""

    components: Tensor  # (k, in), orthonormal rows, the largest entry of each positive
    ratios: Tensor  # (k,), explained variance over the variance of all features
    singular_values: Tensor  # (k,), of the centred (tokens, in) matrix
    mean: Tensor  # (in,)


@dataclass(frozen=True)
class InputPCA(Statistic[PCA]):
    """The leading principal components of the mean-centred inputs, by incremental SVD (Ross et al. 2008; EVA).

    Components have settled when each one that counts has a cosine of at least `tolerance` with what it was a batch
    before; then the rest of the data is not read for them. Those that count are the `used` part of all sites'
    components that explains most (EVA deals its ranks to these and leaves the others out).
    """

    components: int
    tolerance: float = 0.99
    used: float = 1.0

    def __post_init__(self) -> None:
        if self.components < 1 or not 0 < self.tolerance <= 1 or not 0 < self.used <= 1:
            raise RankfoldError(f"{self}: components must be at least 1, tolerance and used in (0, 1]")

    def refuses(self, site: Site) -> str | None:
        if site.kind == "embedding":
            return "its inputs are one-hot: they have no directions beyond single tokens"
        return super().refuses(site)

    def size(self, site: Site) -> int:
        return (min(self.components, site.in_) + 2) * site.in_

    def accumulator(self, site: Site) -> Accumulator:
        return _IncrementalPCA(min(self.components, site.in_))

    def read(self, tensors: dict[str, Tensor]) -> PCA:
        k = self.components
        return PCA(tensors["components"][:k], tensors["ratios"][:k], tensors["singular_values"][:k], tensors["mean"])

    def answers(self, asked: Statistic[Any]) -> bool:
        """The components asked for are the first of those collected, if these were collected as carefully."""
        return isinstance(asked, InputPCA) and self.components >= asked.components and self.tolerance >= asked.tolerance

    def settled(self, accumulators: Sequence[tuple["_IncrementalPCA", int]]) -> bool:
        if any(pca.cosines is None for pca, _ in accumulators):
            return False
        ratios = torch.cat([pca.ratios.cpu().repeat(sites) for pca, sites in accumulators])
        cosines = torch.cat([pca.cosines.cpu().repeat(sites) for pca, sites in accumulators])  # type: ignore[union-attr]
        counting = ratios.argsort(descending=True, stable=True)[: max(1, round(self.used * len(ratios)))]
        return bool((cosines[counting] >= self.tolerance).all())


@dataclass(frozen=True)
class MeanGradient(Statistic[Tensor]):
    """The mean over batches of `∂loss/∂W (out, in)` at this use of W, and (E, out, in) for fused experts.

    The weight is not touched: its gradient comes from the layer's input and output gradient, which also gives a
    quantised layer the gradient of the weight it stands for, and a tied one that of this use alone. Fused experts
    need their own weight's gradient; it is taken and dropped before the next layer's.
    """

    of_gradient: ClassVar[bool] = True

    def size(self, site: Site) -> int:
        return site.count * site.out * site.in_

    def accumulator(self, site: Site) -> Accumulator:
        return _MeanGradient()

    def read(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors["value"]


# ---- how it is accumulated


class _Covariance(Accumulator):
    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, X: Tensor) -> None:
        self.total = X.new_zeros(X.shape[1], X.shape[1]) if self.total is None else self.total
        self.total.addmm_(X.mT, X)
        self.tokens += X.shape[0]

    def result(self, batches: int) -> dict[str, Tensor]:
        return {"value": self.total / self.tokens}  # type: ignore[operator]


class _SecondMoment(Accumulator):
    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, X: Tensor) -> None:
        squares = X.square().sum(0).to_dense()  # an embedding's one-hot X is sparse
        self.total = squares if self.total is None else self.total.add_(squares)
        self.tokens += X.shape[0]

    def result(self, batches: int) -> dict[str, Tensor]:
        return {"value": self.total / self.tokens}  # type: ignore[operator]


class _MeanGradient(Accumulator):
    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, X: Tensor) -> None:
        self.total = X.clone() if self.total is None else self.total.add_(X)

    def result(self, batches: int) -> dict[str, Tensor]:
        return {"value": self.total / batches}  # type: ignore[operator]


class _IncrementalPCA(Accumulator):
    """With n tokens seen, mean μ, components V and singular values σ, a batch Y of m tokens with mean ν gives

        [diag(σ) V;  Y − ν;  √(nm / (n+m)) (μ − ν)]

    whose leading right singular vectors and values are the new V and σ (exactly so if no component was cut before).
    A batch of fewer tokens than components is used too; EVA's code skips it.
    """

    def __init__(self, components: int):
        self.k, self.tokens = components, 0
        self.rng = torch.Generator().manual_seed(0)
        self.mean: Any = None  # (in,)
        self.V: Any = None  # (k, in)
        self.sigma: Any = None  # (k,)
        self.squares: Any = 0.0  # Σ (x − μ)², over tokens and features
        self.cosines: Tensor | None = None  # (k,) of each component with the one before this batch

    @property
    def ratios(self) -> Tensor:
        return self.sigma.square() / torch.where(self.squares > 0, self.squares, 1).to(self.sigma)

    def add(self, X: Tensor) -> None:
        n, m = self.tokens, X.shape[0]
        mean = X.mean(0, dtype=torch.float64)
        X = (X - mean).to(X.dtype)
        self.squares = self.squares + X.square().sum(dtype=torch.float64)
        if n:
            shift = self.mean - mean
            self.squares = self.squares + n * m / (n + m) * shift.square().sum()
            X = torch.cat([self.sigma.unsqueeze(1) * self.V, X, (n * m / (n + m)) ** 0.5 * shift.to(X).unsqueeze(0)])
            mean = mean + n / (n + m) * shift
        old, (_, self.sigma, self.V) = self.V, leading_svd(X, self.k, self.rng)
        self.mean, self.tokens = mean, n + m
        if old is not None and len(old) == self.k:
            self.cosines = (old * self.V).sum(1)

    def result(self, batches: int) -> dict[str, Tensor]:
        return {
            "components": self.V,
            "ratios": self.ratios,
            "singular_values": self.sigma,
            "mean": self.mean.to(self.V),
        }


# ---- the answers


class Calibration:
    """What `calibrate` collected: in memory, or on disk where it would not have fit `memory_limit`."""

    def __init__(
        self,
        where: dict[str, dict[Statistic[Any], tuple[int, str]]],
        parts: Sequence[dict[str, Tensor] | Path],
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ):
        self._where = where  # by site and statistic: the number of the part, and the tensors' prefix in it
        self._parts = list(parts)
        self._folder = folder  # lives, and is removed, with this object

    @property
    def sites(self) -> list[str]:
        return list(self._where)

    def get(self, statistic: Statistic[T], site: str) -> T:
        """The answer to `statistic` at the site of that name, on the CPU.

        Raises RankfoldError if it was not collected, with a list of what was.
        """
        if site not in self._where:
            there = f"{', '.join(self.sites[:4])} ({len(self.sites)} sites)" if self._where else "none"
            raise RankfoldError(
                f"no statistic was collected at {site!r}: either it was not among the calibration's targets or no "
                f"batch reached it. There is something at: {there}"
            )
        for collected, (part, key) in self._where[site].items():
            if collected.answers(statistic):
                try:
                    return statistic.read(self._tensors(part, key))
                except KeyError as error:
                    raise RankfoldError(f"{self._parts[part]} lacks the tensor {key}{error.args[0]}") from None
        there = ", ".join(map(repr, self._where[site]))
        raise RankfoldError(f"{statistic!r} was not collected at {site!r}; there are: {there}")

    def _tensors(self, part: int, key: str) -> dict[str, Tensor]:
        held = self._parts[part]
        if isinstance(held, dict):
            return {name.removeprefix(key): tensor for name, tensor in held.items() if name.startswith(key)}
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(held, "pt") as file:
                names = [name for name in file.keys() if name.startswith(key)]  # noqa: SIM118
                return {name.removeprefix(key): file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise RankfoldError(f"cannot read the calibration file {held}: {error}") from None

    def save(self, folder: str | Path) -> Path:
        """Write `calibration.json` and its tensors, as safetensors files, into the folder, in place of what was there.

        The JSON file comes last and names its tensor files: whatever interrupts leaves the old calibration or the new.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        old = list(folder.glob("calibration-*.safetensors"))
        stamp = uuid.uuid4().hex[:8]
        names = [f"calibration-{stamp}-{i}.safetensors" for i in range(len(self._parts))]
        for name, part in zip(names, self._parts, strict=True):
            if isinstance(part, dict):
                write_whole(folder / name, lambda path, part=part: save_file(part, path))
            else:
                write_whole(folder / name, lambda path, part=part: _copy(part, path))
        statistics = list(dict.fromkeys(statistic for there in self._where.values() for statistic in there))
        description = {
            "format": FORMAT,
            "rankfold": rankfold.__version__,
            "statistics": [{"name": type(s).__name__, **asdict(s)} for s in statistics],  # type: ignore[call-overload]
            "files": names,
            "sites": {
                site: [[statistics.index(statistic), part, key] for statistic, (part, key) in there.items()]
                for site, there in self._where.items()
            },
        }
        write_whole(folder / "calibration.json", json.dumps(description, indent=1))
        for path in old:
            path.unlink(missing_ok=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Calibration":
        """Read what `save` wrote. Tensors stay on disk until they are asked for.

        Raises RankfoldError if there is no calibration, or it is damaged or of another version.
        """
        folder = Path(folder)
        try:
            description = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RankfoldError(f"{folder} holds no readable calibration.json: {error}") from None
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            found = description.get("format") if isinstance(description, dict) else type(description).__name__
            raise RankfoldError(f"{folder}: calibration format {found!r}, this version of Rankfold reads {FORMAT}")
        try:
            statistics = [_statistic(dict(entry)) for entry in description["statistics"]]
            parts = [_inside(folder, name) for name in description["files"]]
            where = {
                str(site): {statistics[int(i)]: (range(len(parts))[part], str(key)) for i, part, key in entries}
                for site, entries in description["sites"].items()
            }
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, RankfoldError):
                raise
            raise RankfoldError(f"{folder}: calibration.json is damaged ({type(error).__name__}: {error})") from None
        return cls(where, parts)

    def __repr__(self) -> str:
        statistics = dict.fromkeys(statistic for there in self._where.values() for statistic in there)
        return f"Calibration({len(self._where)} sites: {', '.join(map(repr, statistics))})"


def _statistic(entry: dict[str, Any]) -> Statistic[Any]:
    name = entry.pop("name")
    if name not in _STATISTICS:
        raise RankfoldError(f"no statistic is called {name!r}; known are {', '.join(_STATISTICS)}")
    return _STATISTICS[name](**entry)


def _inside(folder: Path, name: str) -> Path:
    """A file directly in the folder; names with a path in them are refused."""
    if Path(name).name != name or not (folder / name).is_file():
        raise RankfoldError(f"{folder}: calibration.json names {name!r}, which is no file in that folder")
    return folder / name


# ---- collecting


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    statistics: Sequence[Statistic[Any]],
    targets: Targets = "all-linear",
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    memory_limit: int | None = None,
    max_batches: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Run the batches through the plain base model in eval mode and collect `statistics` at every target.

    The model is left as it was found: modes, `requires_grad`, gradients, hooks, active adapter.

    Args:
        model: any model; adapters attached to it are switched off meanwhile (merged ones are part of the base).
        batches: mappings (`model(**batch)`), tuples (`model(*batch)`) or tensors. Tokens with `attention_mask` 0 or
            with label -100 do not count in statistics of inputs.
        statistics: such as `[InputPCA(16), MeanGradient()]`.
        targets: what `attach` takes, or a list of full site names.
        loss: `loss(model, batch) -> scalar`, for `MeanGradient`; default `model(**batch).loss`. Where given, it is
            how a batch is run.
        memory_limit: bytes of accumulators held at once. What does not fit is collected in further passes over the
            batches, and the results go to temporary files; a one-shot iterator is then kept in a list.
        max_batches: read no more than these.
        progress: show a bar when it takes over a second.

    Raises:
        RankfoldError: no batches, a statistic that a target cannot have, an accumulator over the limit, non-finite
            inputs or gradients, a loss that is missing.
    """
    found = _find(model, targets)
    wanted = _checked(found, statistics, memory_limit)
    if memory_limit is not None and iter(batches) is batches:
        batches = list(islice(batches, max_batches))
    spill: tempfile.TemporaryDirectory[str] | None = None
    where: dict[str, dict[Statistic[Any], tuple[int, str]]] = {name: {} for name in wanted}
    parts: list[dict[str, Tensor] | Path] = []
    with torch.inference_mode(False), _at_rest(model), _Bar(batches, max_batches, progress) as bar:
        while wanted:
            one = _Pass(found, wanted, memory_limit)
            one.run(model, islice(batches, max_batches), loss, bar)
            tensors = one.results(where, len(parts))
            wanted = one.deferred
            if wanted and spill is None:
                spill = tempfile.TemporaryDirectory(prefix="rankfold-calibration-")
            parts.append(tensors if spill is None else _spill(tensors, Path(spill.name) / f"{len(parts)}.safetensors"))
    return Calibration({name: there for name, there in where.items() if there}, parts, spill)


def _find(model: nn.Module, targets: Targets) -> dict[str, Target]:
    if not isinstance(targets, str) and not callable(targets):
        names = set(targets)
        exact = {t.site.name: t for t in target_module.find(model, lambda name, module: True)}
        if names and names <= exact.keys():  # full names mean these sites and no others that end alike
            return {name: target for name, target in exact.items() if name in names}
    return {target.site.name: target for target in target_module.find(model, targets)}


def _checked(
    found: dict[str, Target], statistics: Sequence[Statistic[Any]], memory_limit: int | None
) -> dict[str, list[Statistic[Any]]]:
    """What each site shall have, once all of it is known to be possible."""
    if not statistics or not all(isinstance(statistic, Statistic) for statistic in statistics):
        raise RankfoldError(f"statistics={statistics!r}: give at least one of {', '.join(_STATISTICS)}")
    distinct = list(dict.fromkeys(statistics))
    for name, target in found.items():
        for statistic in distinct:
            if refusal := statistic.refuses(target.site):
                raise UnsupportedError(f"{statistic!r} cannot be collected at {name} ({target.site.kind}): {refusal}")
            size = _bytes(statistic, target.site)
            if memory_limit is not None and size > memory_limit:
                raise RankfoldError(f"{statistic!r} at {name} takes {size:,} bytes, over memory_limit={memory_limit:,}")
    return {name: list(distinct) for name in found}


def _bytes(statistic: Statistic[Any], site: Site) -> int:
    return statistic.size(site) * site.dtype.itemsize


def _spill(tensors: dict[str, Tensor], path: Path) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, path)
    return path


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)


@dataclass
class _Cell:
    """One accumulator and the sites that share it."""

    statistic: Statistic[Any]
    accumulator: Accumulator
    sites: list[str]
    filled: bool = False

    def add(self, X: Tensor) -> None:
        self.accumulator.add(X)
        self.filled = True


@dataclass
class _Stream:
    """The inputs that one or more sites see: the first site to see them feeds the cells of all."""

    leader: str
    wanted: list[Statistic[Any]]
    cells: list[_Cell]
    calls: dict[str, int] = field(default_factory=dict)
    latest: tuple[weakref.ref[Tensor], int] | None = None

    def is_latest(self, x: Tensor) -> bool:
        return self.latest is not None and self.latest[0]() is x and self.latest[1] == x._version


class _Pass:
    """One run over the batches. What does not fit the limit is noted in `deferred` when its site is first reached."""

    def __init__(self, found: dict[str, Target], wanted: dict[str, list[Statistic[Any]]], limit: int | None):
        self.found, self.wanted, self.limit = found, wanted, limit
        self.deferred: dict[str, list[Statistic[Any]]] = {}
        self.cells: list[_Cell] = []
        self.streams: dict[str, _Stream] = {}
        self.gradients: dict[tuple[str, Statistic[Any]], _Cell | None] = {}
        self.settled: set[Statistic[Any]] = set()
        self.masks: dict[tuple[int, ...], Tensor] = {}
        self.held = self.batches = 0
        self.restore = contextlib.ExitStack()

    def run(
        self, model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor] | None, bar: "_Bar"
    ) -> None:
        differentiate = any(s.of_gradient for statistics in self.wanted.values() for s in statistics)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        with self.restore, torch.set_grad_enabled(differentiate):
            for name, statistics in self.wanted.items():
                self.watch(self.found[name], statistics)
            for batch in batches:
                batch = _to(batch, device)
                self.masks = _masks(batch)
                if differentiate:
                    self.backward(model, batch, loss)
                elif loss is not None:
                    loss(model, batch)
                else:
                    _forward(model, batch)
                self.batches += 1
                bar.step()
                if self.all_settled():
                    break
        if not self.batches:
            raise RankfoldError("the calibration batches are empty (is the iterator used up?)")

    def backward(self, model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor] | None) -> None:
        value = loss(model, batch) if loss is not None else getattr(_forward(model, batch), "loss", None)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise RankfoldError("MeanGradient needs a loss: give batches with labels, or calibrate(..., loss=...)")
        if not bool(torch.isfinite(value)):
            raise RankfoldError(f"the loss of calibration batch {self.batches} is {value.item()}")
        if value.requires_grad:
            value.backward()
        elif not any(s.of_gradient for waiting in self.deferred.values() for s in waiting):
            raise RankfoldError("the loss does not depend on any target, so there is no gradient to collect")

    def watch(self, target: Target, statistics: list[Statistic[Any]]) -> None:
        layer = target.layer
        if any(not s.of_gradient for s in statistics):
            see = layer.register_forward_pre_hook(
                lambda layer, args, kwargs: self.see_input(target, _first(args, kwargs)), with_kwargs=True
            )
            self.restore.callback(see.remove)
        for statistic in (s for s in statistics if s.of_gradient):
            if target.site.kind == "experts":
                see = layer.register_forward_pre_hook(lambda *_, s=statistic: self.record_experts(target, s))
            else:
                see = layer.register_forward_hook(
                    lambda layer, args, kwargs, y, s=statistic: self.record(target, s, _first(args, kwargs), y),
                    with_kwargs=True,
                )
            self.restore.callback(see.remove)

    # -- inputs

    @torch.no_grad()
    def see_input(self, target: Target, x: Tensor) -> None:
        name = target.site.name
        stream = self.streams.get(name)
        if stream is None:
            stream = self.streams[name] = self.open_stream(target, x)
        elif stream.leader != name and not stream.is_latest(x):
            raise self.no_longer_shared(name, stream)
        stream.calls[name] = stream.calls.get(name, 0) + 1
        if stream.leader != name:
            return
        stream.latest = weakref.ref(x), x._version
        cells = [cell for cell in stream.cells if cell.statistic not in self.settled]
        if not cells:
            return
        with torch.autocast(x.device.type, enabled=False):
            X = _tokens(target, x, self.masks)
            self.check_finite(X, f"the input of {name}")
            for cell in cells if X.shape[0] else ():
                cell.add(X)

    def open_stream(self, target: Target, x: Tensor) -> _Stream:
        """The stream of a site that is reached for the first time: another site's, if that has just seen the same x."""
        name = target.site.name
        wanted = [statistic for statistic in self.wanted[name] if not statistic.of_gradient]
        if target.site.kind in ("linear", "conv1d"):
            for stream in self.streams.values():
                alike = self.found[stream.leader].site.kind in ("linear", "conv1d") and stream.wanted == wanted
                if alike and stream.calls[stream.leader] == 1 and stream.is_latest(x):
                    here = [cell.statistic for cell in stream.cells]
                    for cell in stream.cells:
                        cell.sites.append(name)
                    for statistic in wanted:
                        if statistic not in here:
                            self.deferred.setdefault(name, []).append(statistic)
                    return stream
        cells = [cell for statistic in wanted if (cell := self.open_cell(target.site, statistic)) is not None]
        return _Stream(name, wanted, cells)

    def no_longer_shared(self, name: str, stream: _Stream) -> RankfoldError:
        return RankfoldError(
            f"{name} and {stream.leader} had the same input when both were first reached, and later had not: "
            "calibrate them in two calls"
        )

    # -- gradients

    def record(self, target: Target, statistic: Statistic[Any], x: Tensor, y: Tensor) -> Tensor | None:
        """Have the backward through y add the gradient of the weight that made y from x."""
        cell = self.gradient_cell(target.site, statistic)
        if cell is None or not torch.is_grad_enabled():
            return None
        if not y.requires_grad and x.requires_grad:
            raise UnsupportedError(
                f"{target.site.name}, a {type(target.layer).__name__} with a weight of type "
                f"{type(target.site.stored).__name__}, passes no gradient to its input"
            )
        if not y.requires_grad:  # nothing before needs a gradient, so the graph begins here
            y = y.detach().requires_grad_().clone()  # a clone, since a leaf could not be changed in place
        x, version = x.detach(), x._version

        def add(g: Tensor) -> None:
            if x._version != version:
                raise RankfoldError(
                    f"the input of {target.site.name} was overwritten in the forward: no gradient there"
                )
            self.add_gradient(cell, target, _weight_gradient(target, x, g))

        y.register_hook(add)
        return y

    def record_experts(self, target: Target, statistic: Statistic[Any]) -> None:
        """Have the weight's own gradient taken off it as soon as a backward has made it."""
        if (target.site.name, statistic) in self.gradients:
            return
        cell = self.gradient_cell(target.site, statistic)
        if cell is None:
            return

        def add(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            self.add_gradient(cell, target, target.mixin.to_matrix(target.layer, gradient))  # type: ignore[arg-type]

        weight = target.site.stored
        self.restore.callback(setattr, weight, "grad", weight.grad)
        self.restore.callback(weight.requires_grad_, False)
        weight.grad = None
        weight.requires_grad_(True)
        self.restore.callback(weight.register_post_accumulate_grad_hook(add).remove)

    def gradient_cell(self, site: Site, statistic: Statistic[Any]) -> _Cell | None:
        key = site.name, statistic
        if key not in self.gradients:
            self.gradients[key] = self.open_cell(site, statistic)
        return self.gradients[key]

    @torch.no_grad()
    def add_gradient(self, cell: _Cell, target: Target, G: Tensor) -> None:
        self.check_finite(G, f"the gradient of {target.site.name}")
        cell.add(G.to(target.site.dtype))

    # -- both

    def open_cell(self, site: Site, statistic: Statistic[Any]) -> _Cell | None:
        """A new accumulator, or None where it has to wait for the next pass."""
        size = _bytes(statistic, site)
        if self.limit is not None and self.held + size > self.limit:
            self.deferred.setdefault(site.name, []).append(statistic)
            return None
        self.held += size
        cell = _Cell(statistic, statistic.accumulator(site), [site.name])
        self.cells.append(cell)
        return cell

    def check_finite(self, tensor: Tensor, what: str) -> None:
        values = tensor.coalesce().values() if tensor.is_sparse else tensor
        if not bool(torch.isfinite(values).all()):
            raise RankfoldError(f"{what} holds NaN or infinity in calibration batch {self.batches}")

    def all_settled(self) -> bool:
        """Whether no cell needs another batch."""
        for statistic in {cell.statistic for cell in self.cells} - self.settled:
            mine = [(cell.accumulator, len(cell.sites)) for cell in self.cells if cell.statistic == statistic]
            if statistic.settled(mine):
                self.settled.add(statistic)
        return bool(self.cells) and all(cell.statistic in self.settled for cell in self.cells)

    def results(self, where: dict[str, dict[Statistic[Any], tuple[int, str]]], part: int) -> dict[str, Tensor]:
        """The tensors of this pass, on the CPU; `where` learns at which key each site finds its own."""
        for name, stream in self.streams.items():
            if stream.calls[name] != stream.calls[stream.leader]:
                raise self.no_longer_shared(name, stream)
        tensors: dict[str, Tensor] = {}
        filled = [cell for cell in self.cells if cell.filled]
        for things in (self.cells, self.streams, self.gradients):
            things.clear()  # so that each accumulator is freed once its result is made
        while filled:
            cell, key = filled.pop(0), f"{len(tensors)}."
            for name, tensor in cell.accumulator.result(self.batches).items():
                tensors[key + name] = tensor.cpu().contiguous()
            for site in cell.sites:
                where[site][cell.statistic] = part, key
        return tensors


# ---- batches and layers


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_to(value, device) for value in batch]
    return batch.detach().to(device) if isinstance(batch, Tensor) else batch


def _masks(batch: Any) -> dict[tuple[int, ...], Tensor]:
    """Which tokens count, by the shape (batch, length) of the inputs they are about.

    An encoder's mask and a decoder's labels of the same length cannot be told apart: what either leaves out is left
    out of both, so that no padding gets in.
    """
    masks: dict[tuple[int, ...], Tensor] = {}
    for key in ("attention_mask", "decoder_attention_mask", "labels") if isinstance(batch, Mapping) else ():
        given = batch.get(key)
        if isinstance(given, Tensor) and given.dim() == 2:
            mask = given != -100 if key == "labels" else given != 0
            masks[tuple(mask.shape)] = masks[tuple(mask.shape)] & mask if tuple(mask.shape) in masks else mask
    return masks


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _tokens(target: Target, x: Tensor, masks: dict[tuple[int, ...], Tensor]) -> Tensor:
    """The site's inputs as X (tokens, in) in its dtype, without the tokens that are masked."""
    site = target.site
    if site.kind == "conv":
        return _patches(target.layer, x.to(site.dtype)).transpose(-1, -2).reshape(-1, site.in_)
    ids = site.kind == "embedding"
    lead = tuple(x.shape) if ids else tuple(x.shape[:-1])
    x = x.reshape(-1) if ids else x.reshape(-1, site.in_)
    # A mixture of experts flattens (batch, length) before its layers.
    mask = next((m for shape, m in masks.items() if lead in (shape, (m.numel(),))), None)
    if mask is not None:
        x = x[mask.reshape(-1).to(x.device)]
    return _one_hot(x, site) if ids else x.to(site.dtype)


def _one_hot(ids: Tensor, site: Site) -> Tensor:
    at = torch.stack([torch.arange(len(ids), device=ids.device), ids])
    ones = torch.ones(len(ids), dtype=site.dtype, device=ids.device)
    return torch.sparse_coo_tensor(at, ones, (len(ids), site.in_), check_invariants=True)


def _patches(layer: Any, x: Tensor) -> Tensor:
    """What each position of a convolution sees: (batch, groups, channels / groups · kernel, positions).

    The groups share the columns of W, each using its own rows, so each one's patch counts as an input.
    """
    kernel = tuple(layer.weight.shape[2:])
    if x.dim() == layer.weight.dim() - 1:
        x = x.unsqueeze(0)
    padding = layer._reversed_padding_repeated_twice
    x = F.pad(x, padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    dilation, stride = layer.dilation, layer.stride
    if len(kernel) == 1:  # as an image of height 1
        x, kernel, dilation, stride = x.unsqueeze(-2), (1, *kernel), (1, *dilation), (1, *stride)
    patches = F.unfold(x, kernel, dilation, 0, stride)
    return patches.reshape(patches.shape[0], layer.groups, -1, patches.shape[-1])


@torch.no_grad()
def _weight_gradient(target: Target, x: Tensor, g: Tensor) -> Tensor:
    """∂loss/∂W (out, in) from the layer's input x and its output's gradient g, in the site's dtype."""
    site = target.site
    layer: Any = target.layer
    g = g.to(site.dtype)
    if site.kind == "embedding":
        G = g.new_zeros(site.in_, site.out).index_add_(0, x.reshape(-1), g.reshape(-1, site.out))
        if layer.padding_idx is not None:
            G[layer.padding_idx] = 0
        return G.mT * getattr(layer, "embed_scale", 1.0)
    if site.kind == "conv":
        X = _patches(layer, x.to(site.dtype))
        g = g.reshape(X.shape[0], layer.groups, site.out // layer.groups, X.shape[-1])
        return torch.einsum("bgop,bgip->goi", g, X).reshape(site.out, site.in_)
    return g.reshape(-1, site.out).mT @ x.reshape(-1, site.in_).to(site.dtype)


# ---- around it all


@contextlib.contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """The plain base, in eval mode, with nothing that requires a gradient; afterwards all as it was."""
    from rankfold.core.adapter import _find_state

    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # bitsandbytes repacks 4-bit weights for inference on some CPUs, where they then pass no gradient.
    repacking = [module for module in model.modules() if module.__dict__.get("support_avx512bf16_for_cpu")]
    state = _find_state(model)
    with contextlib.nullcontext() if state is None else state.using(None):
        try:
            for module in repacking:
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            model.eval().requires_grad_(False)
            yield
        finally:
            for module in repacking:
                module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


class _Bar:
    """A progress bar that appears after a second. Rich is imported only then."""

    def __init__(self, batches: Iterable[Any], max_batches: int | None, wanted: bool):
        length = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
        self.total = min((n for n in (length, max_batches) if n is not None), default=None)
        self.wanted, self.begin, self.done = wanted, time.monotonic(), 0
        self.bar: Any = None

    def __enter__(self) -> "_Bar":
        return self

    def step(self) -> None:
        self.done += 1
        if not self.wanted or time.monotonic() - self.begin < 1:
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.bar.start()
            self.bar.add_task("Calibrating", total=self.total)
        total = self.total and max(self.total, self.done)  # further passes begin after the first one's end
        self.bar.update(0, completed=self.done, total=total)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
