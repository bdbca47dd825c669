"""CorDA's card: worked numbers, what the components add up to, the metric, damping, and the model left as it was."""

import pytest
import torch

import rankfold
from rankfold.core.calibration import SampleCovariance
from rankfold.errors import RankfoldError, UnsupportedError
from rankfold.inits.corda import CorDA, damped
from rankfold.inits.pissa import PiSSA
from tests.methods.inits.tiny import answer, tiny_llama, tokens
from tests.methods.support import DOUBLE, attached, change, close, draw, linear

TINY = 1e-12  # a damping that shows in no digit


def spread(n, seed=3):
    """A covariance of inputs in n dimensions, far from a multiple of I."""
    X = draw(4 * n, n, seed=seed) * torch.logspace(0, 1.5, n, dtype=DOUBLE)
    return X.T @ X / 8


def started(W, C, rank, alpha=None, **options):
    method = rankfold.LoRA(rank=rank, alpha=alpha)
    C = torch.as_tensor(C, dtype=DOUBLE)
    return attached(linear(W), method, init=CorDA(**options), calibration=answer(SampleCovariance(), C), dtype=DOUBLE)[
        1
    ]


def start(delta):
    """s B₀A₀, the part of W that is trained."""
    return delta.scale * (delta.B @ delta.A).detach()


@pytest.mark.parametrize("alpha", [1, 4])
def test_worked_numbers(alpha):
    W, C = torch.diag(torch.tensor([1.0, 2])), torch.diag(torch.tensor([4.0, 1]))
    close(start(started(W, C, 1, alpha, damping=TINY)), [[0, 0], [0, 2]], atol=1e-10)
    close(start(started(W, C, 1, alpha, damping=TINY, mode="instruction")), [[1, 0], [0, 0]], atol=1e-10)
    # With δ = 1: C + 2.5 I = diag(6.5, 3.5), and W C = diag(6.5, 7): the order turns.
    close(start(started(W, C, 1, alpha, damping=1)), [[1, 0], [0, 0]], atol=1e-10)


@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
def test_all_components_add_up_to_the_weight(shape):
    W, C = draw(*shape), spread(shape[1])
    for mode in ("knowledge", "instruction"):
        close(start(started(W, C, 7, mode=mode)), W, atol=1e-9)
    parts = started(W, C, 3), started(W, C, 4, mode="instruction")
    close(sum(map(start, parts)), W, atol=1e-9)


def test_with_inputs_alike_in_all_directions_it_is_pissa_and_its_opposite():
    W = draw(8, 6)
    _, pissa = attached(linear(W), rankfold.LoRA(rank=2, alpha=4), init=PiSSA(), dtype=DOUBLE)
    delta = started(W, torch.eye(6), 2, 4, mode="instruction", damping=TINY)
    close(delta.B, pissa.B.detach(), atol=1e-10)
    close(delta.A, pissa.A.detach(), atol=1e-10)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    close(start(started(W, torch.eye(6), 2)), U[:, -2:] * S[-2:] @ Vt[-2:], atol=1e-10)


@pytest.mark.parametrize("mode", ["knowledge", "instruction"])
def test_what_dropping_the_components_costs_on_the_data(mode):
    """The r components of KPA cost √Σσ_J² on the data, less than those of a plain SVD; IPA's cost the most."""
    W, C, r = draw(8, 10), spread(10), 3
    delta = started(W, C, r, mode=mode, damping=TINY)
    sigma = torch.linalg.svdvals(W @ C)
    J = sigma[-r:] if mode == "knowledge" else sigma[:r]
    cost = (start(delta) @ C).norm()
    torch.testing.assert_close(cost, J.square().sum().sqrt(), rtol=1e-7, atol=0)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    plain = U[:, -r:] * S[-r:] @ Vt[-r:] if mode == "knowledge" else U[:, :r] * S[:r] @ Vt[:r]
    assert (cost < (plain @ C).norm()) == (mode == "knowledge")
    close(delta.B.T @ delta.B, torch.diag(J), atol=1e-6)
    gram = delta.A @ delta.A.T
    assert (gram - torch.diag(gram.diagonal())).abs().max() > 0.01 * gram.max()  # A's rows are not orthogonal


def test_where_the_singular_values_go():
    W, C = draw(8, 10), spread(10)
    both, in_B, in_A = (started(W, C, 3, 6, sigma=sigma) for sigma in ("both", "B", "A"))
    close(in_A.B.T @ in_A.B, torch.eye(3), atol=1e-9)
    root = (both.B.T @ both.B).diagonal().sqrt()
    close(in_B.B, (both.B * root).detach(), atol=1e-9)
    close(in_A.A, (root.unsqueeze(1) * both.A).detach(), atol=1e-9)
    for delta in (in_B, in_A):
        close(start(delta), start(both), atol=1e-9)
        close(change(delta), torch.zeros(8, 10))


def test_damping_doubles_until_the_inverse_is_one():
    x = draw(12, 1)
    C = (x @ x.T).float()  # of rank 1
    whole, inverse = damped(C, 1e-9, 0.05)
    eye, mean = torch.eye(12), C.diagonal().mean()
    errors = []
    for doubled in range(40):
        shifted = C + 1e-9 * 2**doubled * mean * eye
        back, failed = torch.linalg.inv_ex(shifted)
        errors.append(float("inf") if failed else float((shifted @ back - eye).norm()))
    first = next(i for i, error in enumerate(errors) if error < 0.05)
    assert first > 2
    assert torch.equal(whole, C + 1e-9 * 2**first * mean * eye)
    assert (whole @ inverse - eye).norm() < 0.05
    assert torch.equal(damped(C, 0.01, 0.05)[0], C + 0.01 * mean * eye)
    with pytest.raises(RankfoldError, match="NaN or infinity"):
        damped(C / 0, 0.01, 0.05)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("mode", ["knowledge", "instruction"])
def test_a_model_starts_where_it_was_and_is_given_back_to_the_bit(mode, fold):
    model, batch = tiny_llama(), tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = rankfold.LoRA(rank=4, alpha=8)
    with torch.no_grad():
        plain = model(**batch).logits
        rankfold.attach(model, method, init=CorDA(mode=mode), calibration=[batch, tokens(1)], fold=fold)
        torch.testing.assert_close(model(**batch).logits, plain, atol=1e-5, rtol=1e-5)
    rankfold.detach(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_batching_does_not_matter():
    """One sequence is one sample, however many of them a batch holds."""
    rows = tokens(rows=4)
    starts = []
    for size in (1, 4):
        batches = [{key: value[i : i + size] for key, value in rows.items()} for i in range(0, 4, size)]
        adapter = rankfold.attach(tiny_llama(DOUBLE), rankfold.LoRA(rank=2), init=CorDA(), calibration=batches)
        starts.append([start(delta) for delta in adapter.deltas.values()])
    for one, four in zip(*starts, strict=True):
        close(one, four, atol=1e-7)


def test_what_cannot_be():
    with pytest.raises(RankfoldError, match="divides the singular values by the scale"):
        started(draw(4, 4), torch.eye(4), 2, alpha=0)
    with pytest.raises(RankfoldError, match="all inputs of 0 are zero"):
        started(draw(4, 4), torch.zeros(4, 4), 2)
    with pytest.raises(UnsupportedError, match="one-hot"):
        rankfold.attach(tiny_llama(), rankfold.LoRA(rank=2), ["embed_tokens"], init=CorDA(), calibration=[tokens()])
    for wrong in ({"mode": "kpm"}, {"sigma": "U"}, {"damping": 0}, {"tolerance": 0}):
        with pytest.raises(RankfoldError, match=next(iter(wrong))):
            rankfold.build("corda", **wrong)
