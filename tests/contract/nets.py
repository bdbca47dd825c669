"""Small models, one for each kind of layer, and helpers the contract tests share."""

import torch
from torch import Tensor, nn

import rankfold
from rankfold.core.component import component
from rankfold.core.method import Method
from rankfold.core.packed import PackedLinear

SLUGS = [entry.slug for entry in rankfold.methods() if issubclass(component(entry.slug), Method)]
KINDS = ("linear", "conv1d", "embedding", "conv", "experts", "norm")
TARGETS = {"experts": ["gate_up_proj", "down_proj"], "norm": ["norm"]}


class Block(nn.Module):
    """x → first → GELU → second, both of one kind of layer; `example` makes inputs for it."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "conv1d":
            from transformers.pytorch_utils import Conv1D

            self.fc1, self.fc2 = Conv1D(32, 16), Conv1D(16, 32)
        elif kind == "embedding":
            self.fc1, self.fc2 = nn.Embedding(40, 32), nn.Linear(32, 16)
        elif kind == "conv":
            self.fc1, self.fc2 = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 1)
        elif kind == "norm":
            self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        else:
            self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "norm":
            x = self.norm(x)
        return self.fc2(torch.nn.functional.gelu(self.fc1(x)))


class Experts(nn.Module):
    """A mixture of experts whose weights are fused 3-D parameters, as in Transformers 5: every token uses two."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = FusedExperts()
        self.router = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weights, index = self.router(flat).softmax(-1).topk(2)
        return self.experts(flat, index, weights).view_as(x)


class FusedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 16) / 4)
        self.down_proj = nn.Parameter(torch.randn(4, 16, 32) / 6)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("ti,toi->to", x, self.gate_up_proj[index[:, 0]]).chunk(2, -1)
        first = torch.einsum("ti,toi->to", torch.sigmoid(gate) * up, self.down_proj[index[:, 0]])
        gate, up = torch.einsum("ti,toi->to", x, self.gate_up_proj[index[:, 1]]).chunk(2, -1)
        second = torch.einsum("ti,toi->to", torch.sigmoid(gate) * up, self.down_proj[index[:, 1]])
        return first * weights[:, :1] + second * weights[:, 1:]


def net(kind: str = "linear", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    model = Experts() if kind == "experts" else Block(kind)
    return model.to(dtype).eval()


def net_for(slug: str, kind: str = "linear", dtype: torch.dtype = torch.float64) -> nn.Module:
    """`net`, with packed linear layers for a method that sits on nothing else."""
    model = net(kind, dtype)
    if kind == "linear" and "float" not in rankfold.build(slug).over:
        rankfold.quantize(model, rankfold.Scheme(format="int4", group=8), targets=["fc1", "fc2"])
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the tensors in the model's state_dict; a packed layer has its dense weight for codes and scales."""
    state = {}
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        if not isinstance(layer, PackedLinear) or leaf == "bias":
            state[name] = tensor.clone()
        elif leaf == "weight":
            state[name] = layer.dequantise()
    return state


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether the tensors are equal to the last bit, and of the same names and dtypes."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def example(kind: str = "linear", rows: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if kind == "embedding":
        return torch.randint(0, 40, (rows, 5), generator=generator)
    shape = (rows, 16, 6, 6) if kind == "conv" else (rows, 5, 16)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def attach(
    model: nn.Module, slug: str, name: str = "default", kind: str = "linear", **hyper: object
) -> rankfold.Adapter:
    """The method with its default hyperparameters on both layers of the model."""
    targets = TARGETS.get(kind, ["fc1"] if kind == "embedding" else ["fc1", "fc2"])
    return rankfold.attach(model, rankfold.build(slug, **hyper), targets=targets, name=name)


def scramble(adapter: rankfold.Adapter, seed: int = 3) -> rankfold.Adapter:
    """Move every trained number off its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            size = parameter.abs().mean().clamp(min=0.2).item()
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.5 * size * noise).to(parameter.dtype))
    return adapter


def difference(a: Tensor, b: Tensor) -> float:
    """Largest deviation, relative to the size of b."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
