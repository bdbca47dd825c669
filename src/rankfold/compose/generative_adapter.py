"""Generative Adapter: Contextualizing Language Models in Parameters with A Single Forward Pass. Chen et al. 2024, arXiv
2411.05877."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rankfold.compose._flat import adding
from rankfold.compose._leading import leading
from rankfold.compose.generator import About, Generator
from rankfold.core import Rank, fill
from rankfold.core.component import Component
from rankfold.errors import RankfoldError

_BLOCK = re.compile(r"(.*?\.\d+)\..+")
EPS = 1e-6


class GenerativeAdapter(Component):
    """A fast weight for each target, filled by reading: `ΔW = (α/R2) B S̃ᵀ A1` with the state `S = Σ_chunks KᵀV`.

    `Ĥ = RMSNorm(H)` of the states H (T, d) that enter the target's decoder layer, `K = Ĥ A2ᵀ (T, R1)`,
    `V = Ĥ A3ᵀ (T, R2)`; S̃ is S with the m leading singular values set to 1 and the rest to 0 (`svd`), S over its
    Frobenius or its spectral norm. A1 (R1, in), A2 (R1, d), A3 (R2, d) are drawn, B (out, R2) starts at 0.

    Trained on text cut into chunks, all in one forward pass: chunk j of the text is predicted with what the chunks
    before j left (completion), and then again with chunk j's own state too (reconstruction); the base is frozen.

    `rank` is R2, `inner` R1, `kept` m. Published code finds the directions with `torch.svd_lowrank` from random numbers
    that differ from call to call, and while training gives up a state with two like singular values: see `_leading`.
    """

    slug: ClassVar[str] = "generative-adapter"
    title: ClassVar[str] = (
        "Generative Adapter: Contextualizing Language Models in Parameters with A Single Forward Pass"
    )
    source: ClassVar[str] = "arXiv 2411.05877"

    rank: Rank = 1024
    inner: Rank = 1024
    alpha: float = Field(64.0, gt=0)
    kept: int = Field(128, ge=1)
    norm: Literal["svd", "frobenius", "spectral"] = "svd"
    chunk: int = Field(1024, ge=2)  # tokens

    def network(self, about: About) -> "FastWeights":
        return FastWeights(self, about)

    def for_model(self, model: Any, targets: str | Sequence[str] = ("o_proj",)) -> "FastWeights":
        """A new generator for layers of the model, each inside a numbered decoder layer."""
        from rankfold.core.targets import find
        from rankfold.deltas.lora import LoRA

        sites = [target.site for target in find(model, targets if isinstance(targets, str) else list(targets))]
        for site in sites:
            if site.kind not in ("linear", "conv1d") or _BLOCK.fullmatch(site.name) is None:
                raise RankfoldError(f"targets: {site.name} is no linear layer inside a decoder layer")
            if self.rank > min(site.out, site.in_):
                raise RankfoldError(
                    f"generative-adapter: rank {self.rank} is over the size of {site.name}, {site.out}×{site.in_}"
                )
        lora = LoRA(rank=self.rank, alpha=self.alpha)
        return FastWeights(self, About.of(self, model, {site.name: lora for site in sites}, []))

    def normalise(self, S: Tensor, training: bool = False) -> Tensor:
        """S̃ of states S (..., R1, R2)."""
        if self.norm == "svd":
            return leading(S, self.kept, training)
        size = torch.linalg.matrix_norm(S, "fro" if self.norm == "frobenius" else 2)[..., None, None]
        return S / (size + EPS)


class FastWeight(nn.Module):
    """The trained parameters of one target, and what they make of hidden states."""

    def __init__(self, config: GenerativeAdapter, out: int, in_: int, width: int):
        super().__init__()
        self.A1 = nn.Parameter(torch.empty(config.inner, in_))
        self.A2 = nn.Parameter(torch.empty(config.inner, width))
        self.A3 = nn.Parameter(torch.empty(config.rank, width))
        self.B = nn.Parameter(torch.empty(out, config.rank))
        self.norm = nn.Parameter(torch.empty(width))
        self.scale = config.alpha / config.rank

    def start(self, rng: torch.Generator) -> None:
        """Kaiming-normal with a = √5: standard deviation √(1/3) / √fan-in."""
        for A in (self.A1, self.A2, self.A3):
            fill(A.data, rng, std=(1 / 3 / A.shape[1]) ** 0.5)
        nn.init.zeros_(self.B)
        nn.init.ones_(self.norm)

    def state(self, H: Tensor, mask: Tensor) -> Tensor:
        """KᵀV (..., R1, R2) of hidden states (..., T, d); a token whose mask (..., T) is 0 has no part in it."""
        normed = F.rms_norm(H.to(self.norm.dtype), self.norm.shape, self.norm, EPS)
        return (normed @ self.A2.T * mask.unsqueeze(-1)).mT @ (normed @ self.A3.T)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """`(α/R2) x A1ᵀ S̃ Bᵀ` of x (rows, T, in) with a normalised state for each row (rows, R1, R2)."""
        return self.scale * (x.to(self.A1.dtype) @ self.A1.T @ state @ self.B.T)


class FastWeights(Generator):
    """A `FastWeight` for each target of the base, and the passes over the base that fill and use them."""

    def __init__(self, config: GenerativeAdapter, about: About):
        super().__init__(config, about)
        shapes = [tuple(record.shape) for record in about.sites.values()]
        self.fast = nn.ModuleList(FastWeight(config, *shape, about.width) for shape in shapes)  # type: ignore[misc]

    def start(self, seed: int) -> "FastWeights":
        rng = torch.Generator().manual_seed(seed)
        for fast in self.each:
            fast.start(rng)
        return self

    @property
    def each(self) -> list[FastWeight]:
        """The fast weights, in the order of the sites."""
        return list(self.fast)  # type: ignore[arg-type]

    def forward(self, model: Any, ids: Tensor, mask: Tensor, sees: Tensor) -> Tensor:
        """Logits (b, n, T, vocabulary) of n rows of T tokens (b, n, T), none of which attends to another.

        Row j is computed under the state `Σ_i sees[j, i] K_iᵀ V_i` of the rows that it sees, `sees` (n, n) boolean. K
        and V of a row are those of this very pass, so there must be no circle in who sees whom.
        """
        b, n, _ = ids.shape
        read = sees.any(0)
        distinct, which = sees.unique(dim=0, return_inverse=True)

        def states(number: int, H: Tensor) -> Tensor:
            own = self.each[number].state(H.unflatten(0, (b, n))[:, read], mask[:, read])
            seen = torch.einsum("ji,biac->bjac", distinct[:, read].to(own.dtype), own)
            return self.config.normalise(seen, self.training)[:, which].flatten(0, 1)

        with self.under(model, states):
            out = model(input_ids=ids.flatten(0, 1), attention_mask=mask.flatten(0, 1), use_cache=False)
        return out.logits.unflatten(0, (b, n))

    def loss(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean cross-entropy of completion and reconstruction over texts (b, n, T) of n chunks of T tokens."""
        ids, mask = (torch.cat([part, part], 1) for part in (input_ids, attention_mask))
        logits = self(model, ids, mask, completion_and_reconstruction(input_ids.shape[1]).to(ids.device))
        wanted = ids.masked_fill(mask == 0, -100)[..., 1:]
        return F.cross_entropy(logits[..., :-1, :].flatten(0, -2).float(), wanted.flatten())

    @contextmanager
    def under(self, model: Any, states: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """While inside, target i adds what its fast weight makes of `states(i, H)`, H the input of its layer."""
        entered: dict[str, Tensor] = {}
        blocks = {site: _BLOCK.fullmatch(site)[1] for site in self.about.sites}  # type: ignore[index]

        def enter(path: str) -> Callable[..., None]:
            def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
                entered[path] = args[0] if args else kwargs["hidden_states"]

            return hook

        def change(number: int, path: str) -> Callable[[Tensor], Tensor]:
            return lambda x: self.each[number](x, states(number, entered[path]))

        handles = [
            model.get_submodule(path).register_forward_pre_hook(enter(path), with_kwargs=True)
            for path in dict.fromkeys(blocks.values())
        ]
        try:
            with adding(model, {site: change(i, path) for i, (site, path) in enumerate(blocks.items())}):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def products(self, model: Any, tokenizer: Any, text: str, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
        if options:
            raise RankfoldError(f"generative-adapter has no option {min(options)!r}: it reads the context, no more")
        return Context(self, model).add(tokenizer(text, return_tensors="pt")["input_ids"][0]).products()


class Context:
    """What a generator has read so far, and goes on reading: the state S (R1, R2) of each target and nothing else."""

    def __init__(self, generator: FastWeights, model: Any):
        self.generator, self.model = generator, model
        self.states = [fast.A2.new_zeros(len(fast.A2), len(fast.A3)) for fast in generator.each]

    def add(self, ids: Tensor) -> "Context":
        """Read more tokens (T,), chunk by chunk, each with what was read before it."""
        was_training = self.model.training
        self.model.eval()
        for chunk in ids.to(self.states[0].device).split(self.generator.config.chunk):
            self._read(chunk[None])
        self.model.train(was_training)
        return self

    @torch.no_grad()
    def _read(self, ids: Tensor) -> None:
        mask, before, new = torch.ones_like(ids), [self._normalised(S)[None] for S in self.states], dict[int, Tensor]()

        def states(number: int, H: Tensor) -> Tensor:
            new[number] = self.generator.each[number].state(H, mask)[0]
            return before[number]

        with self.generator.under(self.model, states):
            self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        self.states = [S + new[number] for number, S in enumerate(self.states)]

    @torch.no_grad()
    def products(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The adapter: `lora_b = B (out, R2)` and `lora_a = S̃ᵀ A1 (R2, in)` of each target."""
        each = zip(self.generator.about.sites, self.generator.each, self.states, strict=True)
        return {site: (fast.B.detach(), self._normalised(S).mT @ fast.A1) for site, fast, S in each}

    def _normalised(self, S: Tensor) -> Tensor:
        return self.generator.config.normalise(S)


def completion_and_reconstruction(n: int) -> Tensor:
    """Which rows see which, (2n, 2n), of n chunks and their copies: a chunk those before it, a copy its own too."""
    up_to = torch.ones(n, n, dtype=torch.bool).tril()
    none = torch.zeros(n, n, dtype=torch.bool)
    return torch.cat([torch.cat([up_to.tril(-1), none], 1), torch.cat([up_to, none], 1)])
