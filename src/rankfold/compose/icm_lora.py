"""In-Context Meta LoRA Generation. Shao et al. 2025, arXiv 2501.17635."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rankfold.compose._flat import Layout, Pairs
from rankfold.compose.generator import About, Generator, lora_of
from rankfold.core import Component
from rankfold.core.linalg import svd_of_product
from rankfold.errors import RankfoldError


class ICMLoRA(Component):
    """A conditional VAE over flattened LoRA weights x (P,), conditioned on a task vector c.

    `loss = MSE(x̂, x) + λ KL`, `KL = −½ Σ (1 + log σ² − μ² − σ²)` with `μ, log σ² = encode(x, c)`,
    `z = μ + σ ε`, `x̂ = decode(z, c)`. x is standardised, tensor by tensor, and padded with zeros to a multiple of
    2^layers. To generate: z ~ N(0, I), decode with c, cut to P, restore.

    c is the base model's last hidden state at the last position of a text, averaged over `samples` texts of the task.
    Published code takes it from the model that has the task's LoRA already, and averages over the steps of an answer;
    trains on one task with one c, so that c says nothing; and restores with the mean and deviation of a real adapter of
    the task. Here each sample has the c of its own task, less the mean over the tasks and over their spread; mean and
    deviation are those of all of a task's samples and kept with the generator; a new text takes the nearest task's.

    `channels` are the encoder's, a convolution of stride 2 each (the decoder's backwards), `kl` is λ, and `canonical`
    turns every product into `U √Σ, √Σ Vᵀ` first (our addition): LoRAs that do the same are then the same numbers.
    """

    slug: ClassVar[str] = "icm-lora"
    title: ClassVar[str] = "In-Context Meta LoRA Generation"
    source: ClassVar[str] = "arXiv 2501.17635"

    latent: int = Field(256, ge=1)
    channels: tuple[int, ...] = Field((8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8), min_length=1, max_length=24)
    kernel: int = Field(7, ge=3)
    kl: float = Field(0.005, ge=0)
    samples: int = Field(30, ge=1)
    canonical: bool = True

    def network(self, about: About) -> "ConditionalVAE":
        return ConditionalVAE(self, about)

    def for_zoo(
        self, model: Any, zoo: Mapping[str, Sequence[Pairs]], vectors: Mapping[str, Tensor]
    ) -> "ConditionalVAE":
        """A new generator for adapters like those of the zoo, by task, all of the same layers and ranks."""
        from rankfold.deltas.lora import LoRA

        layout = Layout.of(next(iter(zoo.values()))[0])
        methods = {site: LoRA(rank=A[0]) for site, (_, A) in layout.shapes.items()}
        vae = ConditionalVAE(self, About.of(self, model, methods, list(zoo)))
        flats = [torch.stack([vae.flatten(pairs) for pairs in samples]) for samples in zoo.values()]
        vae.tasks.copy_(torch.stack([vectors[task] for task in zoo]))
        vae.statistics.copy_(torch.stack([layout.statistics(x) for x in flats]))
        vae.centre.copy_(vae.tasks.mean(0))
        spread = (vae.tasks - vae.centre).square().sum(-1).mean().sqrt() / vae.tasks.shape[1] ** 0.5
        vae.spread.copy_(spread if float(spread) > 0 else torch.ones(()))
        return vae


class ConditionalVAE(Generator):
    """The network, the task vectors (tasks, |c|) it was trained with, and the tasks' statistics (tasks, 2, tensors)."""

    tasks: Tensor
    statistics: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, config: ICMLoRA, about: About):
        super().__init__(config, about)
        ranks = {site: lora_of(record, site, "the generator").rank for site, record in about.sites.items()}
        self.layout = Layout({s: ((r.shape[0], ranks[s]), (ranks[s], r.shape[1])) for s, r in about.sites.items()})
        self.length = sum(self.layout.sizes)
        cut = 1 << len(config.channels)
        # Two positions at least are left of a sample, so that a batch norm has a variance.
        self.padded = max(2, -(-self.length // cut)) * cut
        inner, c, z, pad = (self.padded // cut) * config.channels[-1], about.width, config.latent, config.kernel // 2
        ins, outs = (1, *config.channels[:-1]), config.channels
        up = config.channels[::-1] + config.channels[:1]
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(nn.Conv1d(i, o, config.kernel, 2, pad), nn.BatchNorm1d(o), nn.LeakyReLU())
                for i, o in zip(ins, outs, strict=True)
            ),
            nn.Flatten(),
            nn.Linear(inner, z),
        )
        self.mu, self.log_variance = nn.Linear(z + c, z), nn.Linear(z + c, z)
        self.expand = nn.Linear(z + c, inner)
        self.decoder = nn.Sequential(
            *(
                nn.Sequential(
                    nn.ConvTranspose1d(i, o, config.kernel, 2, pad, output_padding=1), nn.BatchNorm1d(o), nn.ELU()
                )
                for i, o in itertools.pairwise(up)
            ),
            nn.Conv1d(config.channels[0], 1, config.kernel, 1, pad),
        )
        self.register_buffer("tasks", torch.zeros(len(about.tasks), c))
        self.register_buffer("statistics", torch.zeros(len(about.tasks), 2, 2 * len(self.layout.shapes)))
        self.register_buffer("centre", torch.zeros(c))
        self.register_buffer("spread", torch.ones(()))

    def start(self, seed: int) -> "ConditionalVAE":
        """PyTorch's own starts, drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in self.modules():
                reset: Any = getattr(module, "reset_parameters", None)
                if module is not self and reset is not None:
                    reset()
        return self

    def flatten(self, pairs: Pairs) -> Tensor:
        """x (P,) of one adapter, not yet standardised."""
        if self.config.canonical:
            pairs = {site: canonical(B, A) for site, (B, A) in pairs.items()}
        return self.layout.flatten(pairs).float()

    def condition(self, c: Tensor) -> Tensor:
        return (c - self.centre) / self.spread

    def encode(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """μ and log σ² (b, latent) of standardised x (b, P) and task vectors c (b, |c|)."""
        h = self.encoder(F.pad(x, (0, self.padded - self.length)).unsqueeze(1))
        h = torch.cat([h, self.condition(c)], -1)
        return self.mu(h), self.log_variance(h)

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        """x̂ with its padding (b, padded) of z (b, latent) and c (b, |c|)."""
        h = self.expand(torch.cat([z, self.condition(c)], -1))
        return self.decoder(h.unflatten(-1, (self.config.channels[-1], -1))).squeeze(1)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The MSE, and the KL averaged over the batch. In eval mode z is μ, so that measuring draws nothing."""
        mu, log_variance = self.encode(x, c)
        z = mu + torch.randn_like(mu) * (0.5 * log_variance).exp() if self.training else mu
        return F.mse_loss(self.decode(z, c), F.pad(x, (0, self.padded - self.length))), divergence(mu, log_variance)

    def loss(self, model: Any, weights: Tensor, condition: Tensor, **_: Any) -> Tensor:
        mse, kl = self(weights, condition)
        return mse + self.config.kl * kl

    @torch.no_grad()
    def sample(self, c: Tensor, seed: int = 0, task: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """B and A of each site for a task vector (|c|,), on the scale of `task`, or of the one with the nearest vector.

        The network is in eval mode for it: batch norms use what they learnt.
        """
        if task is not None and task not in self.about.tasks:
            raise RankfoldError(f"icm-lora: there is no task {task!r}; there are: {', '.join(self.about.tasks)}")
        place = self.nearest(c) if task is None else self.about.tasks.index(task)
        z = torch.randn(1, self.config.latent, generator=torch.Generator().manual_seed(seed)).to(c)
        was_training, _ = self.training, self.eval()
        x = self.decode(z, c[None])[0, : self.length]
        self.train(was_training)
        return self.layout.unflatten(self.layout.restore(x, self.statistics[place]))

    def nearest(self, c: Tensor) -> int:
        """The number of the task whose vector is nearest to c."""
        return int((self.tasks - c).norm(dim=-1).argmin())

    def products(self, model: Any, tokenizer: Any, text: str, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
        if unknown := sorted(options.keys() - {"seed", "task"}):
            raise RankfoldError(f"icm-lora has no option {unknown[0]!r}; it has seed and task")
        vector = task_vector(model, tokenizer, examples(text), self.config.samples)
        return self.sample(vector.to(self.centre.device), **options)


def divergence(mu: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)) of (b, latent), averaged over the batch."""
    return (-0.5 * (1 + log_variance - mu.square() - log_variance.exp()).sum(-1)).mean()


def canonical(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """`U √Σ` and `√Σ Vᵀ` of B A: the same for all factors of the same product, up to equal singular values."""
    U, S, Vh = svd_of_product(B, A)
    return U * S.sqrt().unsqueeze(-2), S.sqrt().unsqueeze(-1) * Vh


def examples(text: str) -> list[str]:
    """The texts in a file of several, with an empty line between them."""
    return [part.strip() for part in text.split("\n\n") if part.strip()]


@torch.no_grad()
def task_vector(model: Any, tokenizer: Any, texts: Sequence[str], samples: int = 30) -> Tensor:
    """The model's last hidden state (|c|,) at the last position of a text, averaged over the first `samples` texts."""
    if not texts:
        raise RankfoldError("icm-lora: a task vector needs at least one example, and the context is empty")
    device, was_training, _ = next(model.parameters()).device, model.training, model.eval()
    longest = getattr(model.config, "max_position_embeddings", None)
    states = []
    for text in texts[:samples]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
        out = model(input_ids=ids[:, -(longest or ids.shape[1]) :], output_hidden_states=True, use_cache=False)
        states.append(out.hidden_states[-1][0, -1].float())
    model.train(was_training)
    return torch.stack(states).mean(0)
