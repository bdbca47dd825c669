"""Memory of one training step: sparse and block changes beside LoRA of equal count and full fine-tuning of the layers.

Three feed-forward blocks of SmolLM2-135M's size (gate and up 1536 x 576, down 576 x 1536), float32, 512 tokens, AdamW.
`kept` is what autograd holds from the forward to the backward beyond weights and input; `state` is the optimiser's;
`peak` the most that a step holds at once beyond the base and the input, the adapter and the state included. Where only
`down_proj` is adapted, nothing of the first block but its last layer takes part in the backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import harness
import torch
from torch import Tensor, nn

import rankfold

LAYERS = ["gate_proj", "up_proj", "down_proj"]


class Block(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def model(blocks: int, width: int = 576, inner: int = 1536) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, inner) for _ in range(blocks))).requires_grad_(False)


@contextmanager
def kept(owned: set[int]) -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd saves, by address, without those that are owned."""
    storages: dict[int, int] = {}
    alive: list[Any] = []  # so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def measure(net: nn.Module, parameters: list[nn.Parameter], x: Tensor) -> dict[str, int]:
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers(), x)}
    optimizer = torch.optim.AdamW(parameters)
    with kept(owned) as storages:
        loss = net(x).square().mean()
    held = sum(storages.values())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    state = sum(v.nbytes for s in optimizer.state.values() for v in s.values())

    def step() -> None:
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    count, own = sum(p.numel() for p in parameters), sum(p.nbytes for p in net.parameters() if p.requires_grad)
    own = (
        0 if own == sum(p.nbytes for p in net.parameters()) else own
    )  # full fine-tuning has no adapter beside the base
    return {"parameters": count, "kept": held, "state": state, "peak": harness.peak(step) + state + own}


def main() -> None:
    given = harness.arguments(__doc__, blocks=3, tokens=512)
    x = torch.randn(given.tokens, 576, generator=torch.Generator().manual_seed(1))
    rows = []
    for rank in (4, 40):  # 0.95 % and 9.5 % of the weights
        lora = rankfold.LoRA(rank=rank)
        share = rank * (576 + 1536) / (576 * 1536)
        sides: dict[str, Any] = {
            "lora": lora,
            "sft-sparse": rankfold.SFTSparse(density=share),
            "lt-sft": rankfold.LTSFT(density=share),
            "sara": rankfold.SaRA(density=share),
            "s2ft": rankfold.S2FT(ratio=share),
            "s2ft, down only": rankfold.S2FT(ratio=min(1.0, 3 * share)),
        }
        for name, method in sides.items():
            net = model(given.blocks)
            targets = LAYERS[2:] if "only" in name else LAYERS
            adapter = rankfold.attach(net, method, targets=targets)
            rows.append({"share %": 100 * share, "side": name, **measure(net, list(adapter.parameters()), x)})
    net = model(given.blocks).requires_grad_(True)
    rows.append({"share %": 100.0, "side": "full fine-tuning", **measure(net, list(net.parameters()), x)})
    for row in rows:
        row |= {key + " MiB": row.pop(key) / 2**20 for key in ("kept", "state", "peak")}
    harness.report(given, "sparse_memory", rows)


if __name__ == "__main__":
    main()
