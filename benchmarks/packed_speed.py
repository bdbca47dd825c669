"""A packed layer beside torch's float32 linear: at one token, where memory bandwidth decides, and at 32 × 128 tokens.

Weights are as many copies as fill 64 MB in float32, used in turn, so that no cache holds them. With Numba installed
products of few tokens are compiled. PyTorch's own kernels of 4 and 8 bits are measured too: what they are fed is
random, and their scales are a row's (8 bits) or bfloat16 (4 bits) at best.
"""

import itertools
from collections.abc import Callable
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.core.packed import Packed, PackedLinear, Scheme
from rankfold.quantizers.rtn import RTN

FORMATS: Any = ("int8", "int4", "int3", "int2", "ternary", "nf4", "fp4")
SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096))


def layers(W: Tensor, format: Any, copies: int) -> list[PackedLinear]:
    plain, scheme = nn.Linear(W.shape[1], W.shape[0], False), Scheme(format=format)
    first = RTN().quantise(W, scheme, None, "")
    packed = [Packed(*(None if t is None else t.clone() for t in first)) for _ in range(copies)]
    return [PackedLinear.of(plain, one, scheme) for one in packed]


def torchs(out: int, in_: int, copies: int) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """PyTorch's kernels of codes in few bits."""
    q = torch.randint(16, (out, in_), dtype=torch.int32)
    fours = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1) for _ in range(copies)]
    eights = [torch.randint(-128, 127, (out, in_), dtype=torch.int8) for _ in range(copies)]
    pairs, scales = torch.rand(in_ // 64, out, 2), torch.rand(out)
    return {
        "torch int4": [lambda x, w=w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, 64, pairs) for w in fours],
        "torch int8": [lambda x, w=w: torch.ops.aten._weight_int8pack_mm(x, w, scales) for w in eights],
    }


@torch.no_grad()
def main() -> None:
    given, rows = harness.arguments(__doc__, rounds=9, tokens=4096), []
    for threads in sorted({1, given.threads}):
        torch.set_num_threads(threads)
        for out, in_ in SHAPES:
            copies = max(1, 2**24 // (out * in_))
            W = [torch.randn(out, in_) for _ in range(copies)]
            ours: dict[str, list[Any]] = {format: layers(W[0], format, copies) for format in FORMATS}
            every = {"float32": [lambda x, w=w: F.linear(x, w) for w in W], **ours, **torchs(out, in_, copies)}
            for tokens, sides, repeat in ((1, every, copies), (given.tokens, {"float32": every["float32"], **ours}, 1)):
                x = torch.randn(tokens, in_)
                turns = {name: itertools.cycle(those) for name, those in sides.items()}
                runs = {name: lambda turn=turn, x=x: next(turn)(x) for name, turn in turns.items()}
                times = harness.interleaved(runs, given.rounds, 1, repeat, patience=given.patience / 16)
                common = {"shape": f"{out}×{in_}", "threads": threads, "tokens": tokens}
                targets = dict.fromkeys(ours, 1.0 if tokens == 1 else 1.5)
                rows += harness.table(times, "float32", targets, **common)
    harness.report(given, "packed_speed", rows)


if __name__ == "__main__":
    main()
