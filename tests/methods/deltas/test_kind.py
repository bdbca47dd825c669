import copy

import pytest
import torch
from torch import nn

import rankfold
from rankfold import KIND
from rankfold.deltas.kind import classes, inherit
from tests.methods.support import DOUBLE, attached, change, close, draw, linear, perturb

HYPER = {"rank": 6, "learngenes": 2, "groups": 2}
W, b, x = draw(7, 9), draw(7, seed=1), draw(4, 9, seed=2)


def trained(**hyper: object) -> tuple[nn.Module, object]:
    model, delta = attached(linear(W, b), KIND(**(HYPER | hyper)))
    perturb(delta)
    return model, delta


def parts(delta, *which: int) -> torch.Tensor:
    """Σ_k U_k σ_k V_kᵀ over these k."""
    return sum(delta.sigma[k] * torch.outer(delta.B[:, k], delta.A[k]) for k in which).detach()


def weight_of(delta, c: int | None) -> torch.Tensor:
    """W(c), and what of W the K parts do not hold."""
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    rest = W - U[:, :6] @ torch.diag(sigma[:6]) @ Vt[:6]
    return rest + parts(delta, 0, 1, *{0: (2, 3), 1: (4, 5), None: (2, 3, 4, 5)}[c])


def test_open_gates_start_as_the_base():
    model, _ = attached(linear(W, b), KIND(**HYPER))
    close(model(x), x @ W.T + b, 1e-12)
    model, _ = attached(linear(W, b), KIND(**HYPER, alpha=3.0))
    close(model(x), x @ W.T + b, 1e-12)


def test_all_components_are_all_of_the_weight():
    _, delta = attached(linear(W), KIND(rank=7, learngenes=3, groups=4))
    close(parts(delta, *range(7)), W, 1e-12)
    with classes(delta.layer._rankfold.model, 1):
        close(W + change(delta), parts(delta, 0, 1, 2, 4), 1e-12)


def test_gates():
    _, delta = trained()
    close(delta.gates, [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("c", [None, 0, 1])
def test_one_class_for_all_rows(c: int | None):
    model, delta = trained()
    with classes(model, c):
        close(model(x), x @ weight_of(delta, c).T + b, 1e-12)
        close(W + change(delta), weight_of(delta, c), 1e-12)
    close(model(x), x @ weight_of(delta, None).T + b, 1e-12)


def test_a_lora_of_one_class():
    model, delta = trained()
    with classes(model, 1):
        rankfold.as_lora(model, new_name="one")
    with rankfold.using(model, "one"):
        close(model(x), x @ weight_of(delta, 1).T + b, 1e-9)


def test_masked_forward_is_the_merged_weight_row_by_row():
    model, delta = trained()
    with classes(model, [1, None, 0, 1]):
        together = model(x)
    for row, c in enumerate([1, None, 0, 1]):
        close(together[row], x[row] @ weight_of(delta, c).T + b, 1e-12)
        with classes(model, c):
            rankfold.merge(model)
            close(together[row], model(x)[row], 1e-12)
            rankfold.unmerge(model)


def test_a_class_trains_the_learngenes_and_its_own_tailors():
    model, delta = trained()
    with classes(model, [1, 1, 1, 1]):
        model(x).square().sum().backward()
    for gradient in (delta.B.grad.any(0), delta.sigma.grad, delta.A.grad.any(1)):
        assert (gradient != 0).tolist() == [True, True, False, False, True, True]


def test_rows_have_classes_and_adapters_of_their_own():
    model, _ = trained()
    rankfold.attach(model, KIND(**HYPER), targets=["0"], name="other")
    perturb(rankfold.adapters(model)["other"].deltas["0"], seed=7)
    names, chosen = ["other", "default", None, "default"], [0, 1, 1, None]
    with rankfold.using(model, names), classes(model, chosen):
        together = model(x)
    for row, (name, c) in enumerate(zip(names, chosen, strict=True)):
        with rankfold.using(model, name), classes(model, c):
            close(together[row], model(x)[row], 1e-12)


@pytest.mark.parametrize("kind", ["conv", "grouped", "embedding", "tokens", "windows"])
def test_every_kind_of_layer_takes_classes_by_row(kind: str):
    layers = {
        "conv": (nn.Conv2d(4, 6, 3, dtype=DOUBLE), draw(3, 4, 5, 5)),
        "grouped": (nn.Conv2d(4, 6, 3, groups=2, dtype=DOUBLE), draw(3, 4, 5, 5)),
        "embedding": (nn.Embedding(9, 7, dtype=DOUBLE), torch.arange(6).view(3, 2)),
        "tokens": (linear(W), draw(3, 5, 9)),
        "windows": (linear(W), draw(6, 5, 9)),  # two consecutive windows for each row of the batch
    }
    layer, inputs = layers[kind]
    model, delta = attached(layer, KIND(**HYPER))
    perturb(delta)
    with classes(model, [1, 0, None]):
        together = model(inputs)
    for row, c in enumerate([1, 0, None]):
        with classes(model, c):
            close(together.chunk(3)[row], model(inputs).chunk(3)[row], 1e-12)


def test_compiled_forwards_follow_the_classes():
    model, _ = trained()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for chosen in ([1, None, 0, 1], [0, 0, 1, 1], None):
        with classes(model, chosen):
            close(compiled(x), model(x), 1e-12)


def test_folded_and_saved_are_the_same_function(tmp_path):
    model, delta = trained()
    rankfold.save(model, tmp_path)
    again = nn.Sequential(linear(W, b))
    rankfold.load(again, tmp_path)
    twin = copy.deepcopy(model)
    folded, other = attached(linear(W, b), KIND(**HYPER), fold=True)
    other.load_state_dict(delta.state_dict(), strict=False)
    for chosen in ([1, None, 0, 1], 1, None):
        with classes(model, chosen):
            expected = model(x)
        for same in (again, twin, folded):
            with classes(same, chosen):
                close(same(x), expected, 1e-12)


def test_stage_two_starts_from_the_learngenes_alone_and_trains_tailors_only(tmp_path):
    model, old = trained(alpha=3.0)
    base = W - old.scale * (old.B0 @ old.A0)
    method = KIND(rank=4, learngenes=0, groups=2, start="zero")
    new = rankfold.attach(model, method, targets=["0"], name="new")
    inherit(new, rankfold.adapters(model)["default"])
    expected = x @ (base + old.scale * parts(old, 0, 1)).T + b
    close(model(x), expected, 1e-12)
    with classes(model, [1, None, 0, 1]):
        close(model(x), expected, 1e-12)
    assert new.num_parameters() == 4 * (7 + 9 + 1)
    perturb(new.deltas["0"])
    delta = new.deltas["0"]
    with classes(model, 1):
        close(model(x), expected + x @ parts(delta, 2, 3).T, 1e-12)
    after = model(x)
    rankfold.detach(model, "default")
    close(model(x), after, 1e-12)
    rankfold.save(model, tmp_path, name="new")
    again = nn.Sequential(linear(W, b))
    rankfold.load(again, tmp_path)
    close(again(x), after, 1e-12)


def test_what_does_not_fit_is_refused():
    model, _ = trained()
    for choice in (2, -1, [0, 2, 0, 0]):
        with pytest.raises(rankfold.RankfoldError, match="there is no class"), classes(model, choice):
            pass
    with pytest.raises(rankfold.RankfoldError, match="must be a multiple"), classes(model, [0, 1, 0]):
        model(x)
    with pytest.raises(rankfold.UnsupportedError, match="one W for all"), classes(model, [0, 1, 0, 1]):
        rankfold.merge(model)
    with pytest.raises(rankfold.RankfoldError, match="multiple of 3 groups"):
        rankfold.build("kind", rank=8, learngenes=4, groups=3)
    plain = nn.Sequential(linear(W))
    rankfold.attach(plain, rankfold.LoRA(rank=2), targets=["0"])
    with pytest.raises(rankfold.RankfoldError, match="have 0 tailor groups"), classes(plain, 0):
        pass
    with pytest.raises(rankfold.RankfoldError, match="learngenes of a kind"):
        inherit(*(rankfold.adapters(plain)["default"],) * 2)


def test_an_init_takes_the_place_of_the_start():
    model, delta = attached(linear(W, b), KIND(**HYPER), init=rankfold.PiSSA())
    close(model(x), x @ W.T + b, 1e-12)
    assert delta.A0.shape == (6, 9)
