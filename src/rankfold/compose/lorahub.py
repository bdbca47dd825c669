"""LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition. Huang et al. 2023, arXiv 2307.13269."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import rankfold
from rankfold.compose._merge import Merge, Pair, combine, pairs_at
from rankfold.compose._sources import open_source
from rankfold.compose._units import cut, mixed, widened
from rankfold.core.adapter import Adapter
from rankfold.core.control import adapters as attached
from rankfold.errors import RankfoldError


class LoraHub(Merge):
    """`A(w) = Σ w_i A_i` and `B(w) = Σ w_i B_i`: one weight on both factors, so that ΔW is quadratic in w.

    The authors need equal ranks; here a lower one is filled up with zeros. `lorahub` searches the weights.
    """

    slug: ClassVar[str] = "lorahub"
    title: ClassVar[str] = "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition"
    source: ClassVar[str] = "arXiv 2307.13269"

    def combine(
        self, pairs: Sequence[Pair], weights: Sequence[float], rank: int | None, rng: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor, float]:
        return cut(*mixed(widened(pairs), weights), rank)


@dataclass(frozen=True)
class Trial:
    """One evaluation of the search: the weights w, the mean loss on the examples, and that with the penalty."""

    weights: tuple[float, ...]
    loss: float
    penalised: float


@dataclass(frozen=True)
class Search:
    """What a search tried, in order: first the base alone (w = 0). `chosen` are the adapters that took part."""

    chosen: tuple[int, ...]
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        return min(self.trials, key=lambda trial: trial.penalised)


def lorahub(
    adapters: Sequence[Adapter | str | Path],
    examples: Iterable[Mapping[str, Tensor]],
    to: str | Path | None = None,
    *,
    model: nn.Module | None = None,
    budget: int = 40,
    penalty: float = 0.05,
    bound: float = 1.5,
    most: int = 20,
    force: bool = False,
    seed: int = 0,
    progress: Callable[[], Any] = lambda: None,
) -> tuple[Adapter | Path, Search]:
    """Mix adapters for a new task of which there are a few examples: weights are searched without gradients.

        min over w of  mean loss on the examples + 0.05 · mean_i |w_i|,  |w_i| ≤ 1.5,  from w = 0

    The authors search with NGOpt of Nevergrad, which for so small a budget is COBYLA: a linear model of the loss over
    N + 1 points, in a region that shrinks. So it is here, SciPy's, with the same first step, 0.5. It draws nothing, and
    the best of all tried weights is taken. The released code divides the mean loss by the number of examples once more,
    which makes the penalty the larger; here not.

    Args:
        adapters: attached ones, or folders of saved ones, of any methods and ranks.
        examples: batches of the model's inputs with labels, so that `model(**batch).loss` is the loss.
        to: the new adapter's name, or the folder that it is written to, as in `rankfold.combine`.
        model: the base model; where the first adapter is attached, by default that one's.
        budget: how often the loss is measured; at least two more than there are adapters.
        penalty, bound: of the weights.
        most: if there are more adapters, so many are drawn from them with `seed`.
        force: mix adapters of different bases all the same.
        progress: is called after each measurement.

    Returns:
        the new adapter, or the folder, and the search.

    Raises:
        RankfoldError: there are no examples or too small a budget, or the adapters cannot be combined.
    """
    from scipy.optimize import minimize

    examples = list(examples)
    chosen = sorted(np.random.default_rng(seed).permutation(len(adapters))[:most].tolist())
    library = [adapters[i] for i in chosen]
    if not library or not examples:
        raise RankfoldError(f"lorahub: {len(adapters)} adapters and {len(examples)} batches of examples: give some")
    if budget < len(library) + 2:
        raise RankfoldError(
            f"lorahub: {len(library)} weights need a budget of at least {len(library) + 2}, and it is {budget}: raise "
            "it, or give fewer adapters (or a smaller `most`)"
        )
    if isinstance(library[0], Adapter):
        model = library[0].model if model is None else model
    if model is None or (to is None and not isinstance(library[0], Adapter)):
        raise RankfoldError("lorahub: say the base model, to try the examples on, and the folder for the new adapter")
    trials: list[Trial] = []
    with _Mixture(library, model, force) as mixture:

        def tried(w: np.ndarray) -> float:
            w = np.clip(w, -bound, bound)
            loss = mixture.loss(w.tolist(), examples)
            trials.append(Trial(tuple(w.tolist()), loss, loss + penalty * float(np.abs(w).mean())))
            progress()
            return trials[-1].penalised

        zero = np.zeros(len(library))
        limits = [(-bound, bound)] * len(library)
        minimize(tried, zero, method="COBYLA", bounds=limits, options={"maxiter": budget, "rhobeg": 0.5})
    search = Search(tuple(chosen), tuple(trials))
    made, _ = combine(library, LoraHub(), search.best.weights, to, model=model, force=force)  # type: ignore[misc]
    return made, search


class _Mixture:
    """A LoRA on the model that becomes any mixture of the adapters; gone when the context is left."""

    def __init__(self, library: Sequence[Adapter | str | Path], model: nn.Module, force: bool):
        self._model, self._library, self._force, self._names = model, list(library), force, list[str]()

    def __enter__(self) -> "_Mixture":
        try:
            if not isinstance(self._library[0], Adapter):  # what is combined is put beside the first
                name, folder = self._free("first"), self._library[0]
                self._library[0] = rankfold.load(self._model, folder, name, active=False, strict=not self._force)
                self._names.append(name)
            name, zeros = self._free("mixture"), [0.0] * len(self._library)
            trial, _ = combine(self._library, LoraHub(), zeros, name, model=self._model, force=self._force)  # type: ignore[misc]
            self._names.append(name)
        except BaseException:
            self.__exit__()
            raise
        self._deltas = trial.deltas
        sources = [open_source(adapter, self._model) for adapter in self._library]
        self._pairs = {name: pairs_at(sources, delta.site)[0] for name, delta in self._deltas.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            rankfold.detach(self._model, name)

    @torch.no_grad()
    def loss(self, weights: Sequence[float], examples: Sequence[Mapping[str, Tensor]]) -> float:
        rng = torch.Generator()
        for site, delta in self._deltas.items():
            B, A, _ = LoraHub().combine(self._pairs[site], weights, None, rng)
            delta.set_start(B, A)
        training, device = self._model.training, next(self._model.parameters()).device
        self._model.eval()
        try:
            with rankfold.using(self._model, self._names[-1]):
                batches = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in examples)
                return fmean(float(self._model(**batch).loss) for batch in batches)
        finally:
            self._model.train(training)

    def _free(self, name: str) -> str:
        """A name that no adapter on the model has."""
        taken = attached(self._model)
        return next(free for i in range(len(taken) + 1) if (free := f"lorahub-{name}{i}") not in taken)
