"""PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression. Malinovskii et al. 2024, arXiv
2405.14852."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rankfold.core.codebooks import CodebookLinear, Codebooks, decode, unpack
from rankfold.errors import RankfoldError
from rankfold.quantizers._distil import Lesson, Teacher, Trained, distil, optimizer_tensors, put_optimizer
from rankfold.quantizers._quantizer import Quantised, Quantizer, weight
from rankfold.quantizers._work import Work


class PVTuning(Quantizer):
    """Vectors out of codebooks, whose tables and codes learn to make the model say what the float one said.

        P   C, S ← Adam on ∂L/∂C, ∂L/∂S  (lr),      L = KL(p_float ‖ p)
        V   T ← T − code_lr · Adam(∂L/∂Ŵ);  of the ⌈ρ n⌉ runs where T is farthest from Ŵ, the nearest codes of T / S,
            in that order while sqrt(Σ ‖ΔŴ_run‖²) < τ ‖Ŵ‖, and one more;  Ŵ ← the new codes of the new tables
        T   ← δ Ŵ + (1 − δ) T

    A small step of all codes would round back to where it was; of the few that want to move most it does not, and for
    the others T remembers (δ = 0, as published; δ = 1 forgets). ρ = 1 with τ = ∞ and δ = 0 is plain straight-through.
    Codes start as k-means of the rows' runs, over one table after another what is left. Published code takes LAMB
    steps and tunes norms and embeddings too; here it is Adam, on tables and scales.
    """

    slug: ClassVar[str] = "pv-tuning"
    title: ClassVar[str] = "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression"
    source: ClassVar[str] = "arXiv 2405.14852"
    takes: ClassVar[type] = Codebooks

    rho: Annotated[float, Field(gt=0, le=1, description="share of the runs whose codes may change in a step")] = 0.01
    tau: Annotated[float, Field(gt=0, description="how far a step may move Ŵ, of its norm")] = 0.01
    delta_decay: Annotated[float, Field(ge=0, le=1, description="δ")] = 0.0
    lr: Annotated[float, Field(ge=0, description="of tables and scales")] = 3e-4
    code_lr: Annotated[float, Field(ge=0, description="of T; 0 leaves the codes (P alone)")] = 3e-3
    force_update: Annotated[bool, Field(description="a run whose best code is its own takes the next best")] = False
    epochs: Annotated[int, Field(ge=0, description="times that the text is gone through")] = 2
    seed: int = 0

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
    ) -> dict[str, Quantised]:
        if batches is None:
            raise RankfoldError("pv-tuning trains on text: quantize(..., calibration=batches)")
        lesson, made = Lesson(batches, Teacher(model, batches), trained, work), {}
        for number, (path, layer) in enumerate(layers.items()):
            made[path] = CodebookLinear.of(layer, *self._begun(layer, scheme, work, f"start-{number:04}"), scheme)
            exchange(layer, made[path], None)
            progress(path)
        self.tune(model, list(made.values()), lesson)
        report = {}
        for path, layer in layers.items():
            W = weight(layer)
            error = float((W - made[path].dequantise(W.dtype)).norm()) / max(float(W.norm()), torch.finfo(W.dtype).tiny)
            report[path] = Quantised(scheme.per_number(*W.shape), error, None)
        return report

    def _begun(self, layer: Any, scheme: Codebooks, work: Work | None, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """`start` of the layer's weight, or what was kept of it under that name."""
        if work is None:
            return self.start(weight(layer), scheme)
        if (kept := work.read_tensors(name)) is None:
            codes, books, scales = self.start(weight(layer), scheme)
            kept = {"codes": codes, "books": books, "scales": scales}
            work.write_tensors(name, kept)
        return kept["codes"], kept["books"], kept["scales"]

    def start(self, W: Tensor, scheme: Codebooks) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, runs, M), tables and scales of W (out, in): the nearest that k-means finds."""
        scales = W.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
        rest = runs_of(W / scales, scheme.width).flatten(0, 1)
        codes, books = [], []
        for _ in range(scheme.books):
            found, table = _means(rest, 2**scheme.bits, self.seed)
            rest = rest - table[found]
            codes.append(found)
            books.append(table)
        return torch.stack(codes, -1).unflatten(0, (len(W), -1)), torch.stack(books), scales

    def tune(self, model: nn.Module, layers: Sequence[CodebookLinear], lesson: Lesson) -> None:
        """Train the layers, all in their places in the model."""
        held = All([Held(layer, self) for layer in layers])
        try:
            distil(model, held, lesson, epochs=self.epochs, seed=self.seed)
        finally:
            for one in held.layers:
                one.let_go()


class All:
    """All layers while they are tuned."""

    def __init__(self, layers: "Sequence[Held]"):
        self.layers, self.parameters = layers, [one.W for one in layers]

    def step(self, share: float) -> None:
        for one in self.layers:
            one.step(share)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{key}": tensor for i, one in enumerate(self.layers) for key, tensor in one.tensors().items()}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        for i, one in enumerate(self.layers):
            own = f"{i}."
            one.put({key.removeprefix(own): tensor for key, tensor in tensors.items() if key.startswith(own)})


class Held:
    """A layer while it is tuned: it multiplies by a dense Ŵ that gets a gradient, always one that its codes give."""

    def __init__(self, layer: CodebookLinear, rule: PVTuning):
        self.layer, self.rule = layer, rule
        self.codes = unpack(layer.weight.view(torch.uint8), layer.in_features, layer.scheme)
        self.books = nn.Parameter(layer.books.detach().float())
        self.scales = nn.Parameter(layer.scales.detach().float())
        with torch.no_grad():
            self.W, self.T = nn.Parameter(self.decoded()), nn.Parameter(self.decoded())
        self.continuous = torch.optim.Adam([self.books, self.scales], betas=(0.9, 0.95))
        self.discrete = torch.optim.Adam([self.T], betas=(0.0, 0.95))
        layer.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        return nn.functional.linear(x, self.W.to(x.dtype), bias)

    def decoded(self) -> Tensor:
        return decode(self.codes, self.books, self.scales, self.layer.in_features)

    def step(self, share: float) -> None:
        """From the gradient of W: tables and scales, then T, then codes; W is what they then stand for."""
        rule = self.rule
        with torch.enable_grad():
            self.decoded().backward(self.W.grad)
        self.T.grad = None if self.W.grad is None else self.W.grad.clone()
        for optimizer, lr in ((self.continuous, rule.lr), (self.discrete, rule.code_lr)):
            optimizer.param_groups[0]["lr"] = lr * share
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            if rule.code_lr:
                self.codes = recoded(self.T, self.codes, self.books, self.scales, rule)
            self.W.copy_(self.decoded())
            self.T.lerp_(self.W, rule.delta_decay)

    def tensors(self) -> dict[str, Tensor]:
        own = {"codes": self.codes.int(), "books": self.books, "scales": self.scales, "T": self.T}
        return own | optimizer_tensors(self.continuous, "continuous") | optimizer_tensors(self.discrete, "discrete")

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.codes = tensors["codes"].to(self.codes)
            for name in ("books", "scales", "T"):
                getattr(self, name).copy_(tensors[name])
            self.W.copy_(self.decoded())
        put_optimizer(self.continuous, "continuous", tensors)
        put_optimizer(self.discrete, "discrete", tensors)

    def let_go(self) -> None:
        """The layer as it multiplies by itself, with what was learnt."""
        made = CodebookLinear.of(self.layer, self.codes, self.books, self.scales, self.layer.scheme)
        del self.layer.forward
        for name in ("weight", "books", "scales"):
            getattr(self.layer, name).data = getattr(made, name).data


def runs_of(W: Tensor, width: int) -> Tensor:
    """W (out, in) as runs (out, runs, width); the last is filled up with zeros."""
    return nn.functional.pad(W, (0, -W.shape[1] % width)).unflatten(1, (-1, width))


def recoded(T: Tensor, codes: Tensor, books: Tensor, scales: Tensor, rule: PVTuning) -> Tensor:
    """The V step: codes (out, runs, M) moved towards T (out, in) as far as rho and tau let them."""
    width, shape = books.shape[-1], codes.shape
    before = runs_of(decode(codes, books, scales, T.shape[1]), width).flatten(0, 1)
    target = runs_of(T, width).flatten(0, 1)
    urgent = (target - before).norm(dim=1)
    chosen = urgent.topk(math.ceil(rule.rho * len(urgent))).indices
    s = scales.expand(-1, shape[1]).reshape(-1, 1)[chosen]
    old = codes.flatten(0, 1)[chosen]
    new = nearest(target[chosen] / s, old, books, rule.force_update)
    moved = (sum(books[m][new[:, m]] - books[m][old[:, m]] for m in range(len(books))) * s).square().sum(1)
    far = moved.cumsum(0).sqrt()
    count = 1 + int(torch.searchsorted(far, (rule.tau * before.norm()).clamp(max=torch.finfo(far.dtype).max)))
    after = codes.flatten(0, 1).clone()
    after[chosen[:count]] = new[:count]
    return after.view(shape)


def nearest(targets: Tensor, codes: Tensor, books: Tensor, force: bool = False) -> Tensor:
    """Codes (n, M) of vectors (n, width): table by table the nearest, given the codes of the others."""
    codes, own = codes.clone(), codes
    for m in range(len(books)):
        others = sum(books[k][codes[:, k]] for k in range(len(books)) if k != m)
        apart = torch.cdist(targets - others, books[m])
        two = apart.topk(min(2, len(books[m])), largest=False).indices
        codes[:, m] = two[:, 0]
        if force and m == len(books) - 1:
            same = (codes == own).all(1)
            codes[same, m] = two[same, -1].to(codes.dtype)
    return codes


def _means(vectors: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes (n,) and table (k, width) by k-means; where there are fewer vectors, they are the table."""
    from sklearn.cluster import KMeans

    if len(vectors) <= k:
        table = nn.functional.pad(vectors, (0, 0, 0, k - len(vectors)))
        return torch.arange(len(vectors)), table
    kmeans = KMeans(k, n_init=1, max_iter=30, random_state=seed)  # type: ignore[arg-type]
    found = kmeans.fit(vectors.cpu().double().numpy())
    return torch.from_numpy(found.labels_).long(), torch.from_numpy(found.cluster_centers_).to(vectors)
