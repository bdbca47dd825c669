"""NLoRA's card: Nyström's approximation, the published start, and IntTune."""

import pytest
import torch
from torch import nn

import rankfold
from rankfold import KaSA, LoRA, LoRAXS, NLoRA, SLoRA
from rankfold.core import Site
from tests.methods.support import attached, change, close, draw, linear, put


def start(W, rank, **options):
    W = torch.as_tensor(W, dtype=torch.float64)
    site = Site("layer", "linear", tuple(W.shape), False, W.dtype)
    return NLoRA(**options).factors(site, W, rank, 1.0, None, torch.Generator())


def test_worked_numbers():
    W = [[2, 1], [4, 2]]
    B, A, N, offset = start(W, 1)
    close(B @ N @ A, W)
    assert offset
    B, A, N, offset = start(W, 1, middle="block", absorb=False)
    close(B @ N @ A, [[8, 4], [16, 8]])
    assert not offset


def test_exact_where_the_weight_has_the_rank_of_its_corner():
    W = draw(5, 2, seed=1) @ draw(2, 6, seed=2)
    B, A, N, _ = start(W, 2)
    close(B @ N @ A, W, 1e-9)
    B, A, N, _ = start(W, 4)  # a singular corner: what is below rcond is left out of the pseudo-inverse
    close(B @ N @ A, W, 1e-9)
    assert N.abs().max() < 1e3
    B, A, N, _ = start(torch.stack([W, 2 * W]), 2)
    close(B @ N @ A, torch.stack([W, 2 * W]), 1e-9)


def test_rcond_bounds_the_middle():
    W = torch.diag(torch.tensor([1.0, 1e-2, 1e-5, 1], dtype=torch.float64))
    close(start(W, 3)[2].diagonal(), [1, 100, 0], 1e-10)
    close(start(W, 3, rcond=0.1)[2].diagonal(), [1, 0, 0])
    close(start(W, 3, rcond=1e-9)[2].diagonal(), [1, 100, 1e5], 1e-6)


@pytest.mark.parametrize("middle", ["pinv", "block"])
def test_on_slora_it_starts_all_three_factors_and_the_layer_where_it_was(middle):
    W = draw(9, 8)
    model, delta = attached(linear(W), SLoRA(rank=3, alpha=6), init=NLoRA(middle=middle))
    close(delta.B, W[:, :3])
    close(delta.A, W[:3])
    close(delta.N, W[:3, :3] if middle == "block" else W[:3, :3].inverse(), 1e-9)
    x, up = draw(4, 8, seed=1), draw(4, 9, seed=2)
    close(model(x), x @ W.T, 1e-10)
    model(x).backward(up)
    G = up.T @ x
    B, N, A = (tensor.detach() for tensor in (delta.B, delta.N, delta.A))
    close(delta.N.grad, 2 * B.T @ G @ A.T, 1e-9)
    close(delta.B.grad, 2 * G @ A.T @ N.T, 1e-9)


def test_the_published_start_moves_the_model():
    W = draw(9, 8)
    _, delta = attached(linear(W), SLoRA(rank=3), init=NLoRA(middle="block", absorb=False))
    close(change(delta), W[:, :3] @ W[:3, :3] @ W[:3])


@pytest.mark.parametrize(("size", "moved"), [(0.02, 0.001), (1.0, 128.0)])
def test_how_far_the_published_start_moves_it(size, moved):
    """About r w³ an entry for entries of size w and random sign."""
    W = size * draw(256, 256).sign()
    B, A, N, _ = start(W, 128, middle="block", absorb=False)
    assert (B @ N @ A).square().mean().sqrt().item() == pytest.approx(moved, rel=0.2)


def test_inttune_is_lora_xs_with_this_start():
    W = draw(9, 8)
    model, delta = attached(linear(W), LoRAXS(rank=3, alpha=6), init=NLoRA())
    assert {name for name, _ in delta.named_parameters()} == {"R"}
    assert sum(p.numel() for p in delta.parameters()) == 9
    close(delta.B, W[:, :3])
    close(delta.A, W[:3])
    close(delta.R, W[:3, :3].inverse(), 1e-9)
    x, up = draw(4, 8, seed=1), draw(4, 9, seed=2)
    close(model(x), x @ W.T, 1e-10)
    model(x).backward(up)
    close(delta.R.grad, 2 * W[:, :3].T @ (up.T @ x) @ W[:3].T, 1e-9)
    torch.optim.SGD(delta.parameters(), lr=0.1).step()
    close(delta.B, W[:, :3])
    assert change(delta).any()


def test_a_delta_without_a_full_core_takes_the_middle_into_B():
    W = draw(9, 8)
    expected = W[:, :3] @ W[:3, :3]
    for method in (LoRA(rank=3), rankfold.DoRA(rank=3), rankfold.AdaLoRASVD(rank=3), KaSA(rank=3)):
        model, delta = attached(linear(W), method, init=NLoRA(middle="block"))
        close(delta.B, expected)
        close(delta.A, W[:3])
        if not isinstance(method, KaSA):
            x = draw(4, 8, seed=1)
            close(model(x), x @ W.T, 1e-10)


def test_saved_and_loaded_it_computes_the_same(tmp_path):
    torch.manual_seed(0)
    model, delta = attached(nn.Linear(9, 8), SLoRA(rank=3), init=NLoRA(rcond=0.1))
    put(delta, N=draw(3, 3))
    x = torch.randn(2, 9)
    expected = model(x)
    rankfold.save(model, tmp_path / "a")
    rankfold.detach(model)
    adapter = rankfold.load(model, tmp_path / "a")
    assert torch.equal(model(x), expected)
    assert adapter.init == NLoRA(rcond=0.1)
