"""The oracles of the audit's measures, worked out by hand or with NumPy."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import rankfold
from rankfold.audit import entanglement, intruders, limits, metrics, safety


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


# ---- metrics


def test_ranks_of_a_spectrum() -> None:
    S = torch.tensor([2.0, 1, 1])
    assert metrics.effective_rank(S) == pytest.approx(2.828427, abs=1e-6)
    assert metrics.effective_rank(S, squared=True) == pytest.approx(2.381102, abs=1e-6)
    assert metrics.stable_rank(S) == pytest.approx(1.5)
    assert metrics.participation_ratio(S) == pytest.approx(36 / 18)
    assert metrics.energy_rank(S) == 3
    assert [metrics.energy_rank(S, share) for share in (0.5, 4 / 6, 5 / 6)] == [1, 1, 2]


@pytest.mark.parametrize(("S", "rank"), [([3.0], 1), ([0.5] * 7, 7), ([0.0, 0.0], 0)])
def test_flat_spectra_have_their_rank_by_every_measure(S: list[float], rank: int) -> None:
    given = torch.tensor(S)
    for measure in (metrics.effective_rank, metrics.stable_rank, metrics.participation_ratio, metrics.energy_rank):
        assert measure(given) == pytest.approx(rank)


def test_overlap_of_subspaces() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    same, apart = metrics.overlap(eye[:, :3], eye[:, :3]), metrics.overlap(eye[:, :2], eye[:, 2:4])
    assert (same.similarity, same.chordal, same.geodesic) == (1, 0, 0)
    assert apart.similarity == 0
    assert apart.chordal == pytest.approx(math.sqrt(2))
    assert apart.geodesic == pytest.approx(math.pi / 2 * math.sqrt(2))
    tilted = torch.stack([eye[0] * math.cos(0.3) + eye[1] * math.sin(0.3)], 1)
    assert metrics.overlap(eye[:, :1], tilted).angles.item() == pytest.approx(0.3)
    drawn = [
        metrics.overlap(torch.linalg.qr(randn(100, 4, seed=s)).Q, torch.linalg.qr(randn(100, 8, seed=s + 99)).Q)
        for s in range(20)
    ]
    assert np.mean([found.similarity for found in drawn]) == pytest.approx(drawn[0].chance, abs=0.01)
    assert drawn[0].chance == 0.08
    with pytest.raises(rankfold.RankfoldError, match="one space"):
        metrics.overlap(eye, torch.eye(5))


def test_growth_is_bounded_by_the_change() -> None:
    W, D = randn(20, 30), 0.3 * randn(20, 30, seed=1)
    S = torch.linalg.svdvals(D)
    before, after = torch.linalg.matrix_norm(W, 2), torch.linalg.matrix_norm(W + D, 2)
    grown = metrics.growth(float(before), float(after), S, float(W.norm()))
    assert grown.spectral == pytest.approx(float(after / before - 1))
    assert grown.frobenius == pytest.approx(float(D.norm() / W.norm()))
    assert abs(grown.spectral) <= grown.relative
    with pytest.raises(rankfold.RankfoldError, match="zero"):
        metrics.growth(0.0, 1.0, S, 0.0)


def test_amplification() -> None:
    W = torch.diag(torch.tensor([4.0, 2, 1]))
    e = torch.eye(3)
    assert metrics.amplification(W, e[:, 1:2], torch.tensor([6.0]), e[1:2]) == pytest.approx(3)
    assert metrics.amplification(W, e[:, :1], torch.tensor([6.0]), e[1:2]) == float("inf")
    assert metrics.amplification(W, e[:, :1], torch.tensor([0.0]), e[:1]) == 0


# ---- intruders


def planted(size: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.ones(9, 1, dtype=torch.float64) / 3
    return torch.diag(torch.arange(9, 0, -1, dtype=torch.float64) / 10), size * q, q.T


def test_a_planted_intruder_is_found() -> None:
    W, B, A = planted(10)
    found = intruders.match(intruders.base_of(W), B, A, k=4)
    np.testing.assert_allclose(found.m, [0.34687, 0.89069, 0.80114, 0.73244], atol=1e-5)
    assert found.S[0].item() == pytest.approx(10.50667, abs=1e-5)
    assert found.intruders(0.5).tolist() == [0]


def test_small_and_scaling_changes_make_none() -> None:
    W, B, A = planted(0.1)
    base = intruders.base_of(W)
    np.testing.assert_allclose(intruders.match(base, B, A, k=2).m, [0.98580, 0.97919], atol=1e-5)
    for change in (torch.zeros(9, 9), 0.7 * W):
        found = intruders.match(base, change.double(), torch.eye(9, dtype=torch.float64), k=9)
        np.testing.assert_allclose(found.m, 1, atol=1e-6)


def test_as_a_thin_svd_says_at_any_shape() -> None:
    for shape in ((200, 150), (150, 200)):
        W, B, A = randn(*shape), 3 * randn(shape[0], 2, seed=1), randn(2, shape[1], seed=2)
        U0 = np.linalg.svd(W.numpy(), full_matrices=False)[0]
        U, S, _ = np.linalg.svd((W + B @ A).numpy(), full_matrices=False)
        found = intruders.match(intruders.base_of(W), B, A, k=3)
        np.testing.assert_allclose(found.S[:2], S[:2], rtol=1e-6)
        np.testing.assert_allclose(found.m[:2], np.abs(U0.T @ U[:, :2]).max(0), atol=1e-4)


def test_a_wide_matrix_of_low_rank_has_only_its_own_vectors() -> None:
    W = randn(40, 3) @ randn(3, 20, seed=1)
    base = intruders.base_of(W)
    assert base.U.shape == (40, 3)
    torch.testing.assert_close(base.U.T @ base.U, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_clusters_turn_without_intruding() -> None:
    """Equal singular values: the vectors turn freely, the space they span does not."""
    W = torch.diag(torch.tensor([5.0, 3, 3, 3, 1], dtype=torch.float64))
    turn = torch.linalg.qr(randn(3, 3)).Q
    D = torch.zeros(5, 5, dtype=torch.float64)
    D[1:4, 1:4] = turn @ torch.diag(torch.tensor([3e-3, 2e-3, 1e-3], dtype=torch.float64)) @ turn.T
    base, eye = intruders.base_of(W), torch.eye(5, dtype=torch.float64)
    plain, joined = (intruders.match(base, D, eye, k=4, cluster=c).m for c in (0.0, 0.01))
    assert plain.min() < 0.95
    assert joined.min() > 0.999


def test_scaling_an_intruder() -> None:
    W, B, A = planted(10)
    found = intruders.match(intruders.base_of(W), B, A, k=4)
    which = found.intruders()
    for strength in (1.0, 0.4, 0.0):
        more_B, more_A = intruders.scaled(found, which, strength)
        S = torch.linalg.svdvals(W + B @ A + more_B @ more_A)
        expected = torch.linalg.svdvals(W + B @ A)
        expected[0] *= strength
        torch.testing.assert_close(S, expected.sort(descending=True).values, atol=1e-9, rtol=0)


# ---- entanglement


def test_entropies_of_states_that_are_known() -> None:
    two = math.log(2)
    assert entanglement.curve(torch.eye(4)).tolist() == pytest.approx([two, 2 * two, two], abs=1e-9)
    assert entanglement.curve(torch.ones(4, 4)).tolist() == pytest.approx([0, 0, 0], abs=1e-9)
    rank_one = entanglement.profile(randn(8, 1), randn(1, 16, seed=1))
    assert rank_one.entropies[2] == pytest.approx(0, abs=1e-9)
    assert rank_one.entropies[1] > 0.1
    assert rank_one.ranks[2] == 1
    assert not entanglement.curve(torch.zeros(8, 8)).any()


def test_low_rank_has_a_valley_and_full_rank_none() -> None:
    drawn = np.random.default_rng(0)
    at_six, profiles = [], {}
    for r in (1, 2, 4, 64):
        B, A = (torch.from_numpy(drawn.standard_normal(shape)) for shape in ((64, r), (r, 64)))
        profiles[r] = entanglement.profile(B, A)
        at_six.append(profiles[r].entropies[5])
        assert profiles[r].entropies == pytest.approx(entanglement.curve(B @ A).tolist(), abs=1e-6)
        turn = torch.linalg.qr(randn(r, r)).Q
        assert entanglement.profile(5 * B @ turn, turn.T @ A).entropies == pytest.approx(profiles[r].entropies)
    assert at_six == pytest.approx([0, 0.6866, 1.3292, 3.288], abs=1e-3)
    assert profiles[4].entropies[3] == pytest.approx(2.22, abs=0.01)
    assert profiles[4].entropies[7] == pytest.approx(2.22, abs=0.01)
    assert profiles[4].valley > 0.8
    assert profiles[64].valley < 0


def test_sizes_are_cut_to_powers_of_two_and_rows_permuted() -> None:
    B, A = randn(9, 3), randn(3, 21, seed=1)
    assert entanglement.profile(B, A).entropies == entanglement.profile(B[:8], A[:, :16]).entropies
    mixed = entanglement.profile(B[:8][torch.randperm(8, generator=rng())], A[:, :16]).entropies
    plain = entanglement.profile(B, A).entropies
    assert mixed[2:] == pytest.approx(plain[2:])
    assert mixed[0] != pytest.approx(plain[0], abs=1e-3)
    with pytest.raises(rankfold.RankfoldError, match="two sites"):
        entanglement.profile(torch.ones(1, 1), torch.ones(1, 8))


def test_laws_are_told_apart() -> None:
    volume = entanglement.law([0.5 * n for n in range(1, 9)])
    area = entanglement.law([0.3 + 0.7 * math.log(n) for n in range(1, 9)])
    assert (volume.volume_slope, volume.volume_fit) == pytest.approx((0.5, 1))
    assert (area.area_slope, area.area_fit) == pytest.approx((0.7, 1))
    assert volume.area_fit < 0.95
    assert area.volume_fit < 0.95


# ---- limits


def test_features_multiply_to_the_beginning_of_the_exponential() -> None:
    q, k = torch.tensor([1.0, 0], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert limits.features(q, 2).shape == (6,)
    assert float(limits.features(q, 2) @ limits.features(k, 2)) == pytest.approx(1.625)
    x, y = 0.4 * randn(5, 3), 0.4 * randn(5, 3, seed=1)
    for degree in (1, 3, 5):
        error = (limits.features(x, degree) @ limits.features(y, degree).T - (x @ y.T).exp()).abs().max()
        assert 0 < float(error) <= limits.error_bound(float((x @ y.T).abs().max()), degree)


def test_attention_and_loras_gradient_through_features() -> None:
    X, W, A, V = randn(12, 4) / 2, randn(4, 4, seed=1) / 4, randn(2, 4, seed=2) / 2, randn(12, 3, seed=3)
    K = X @ randn(4, 4, seed=4) / 4
    outputs, gradients = [], []
    for exact in (True, False):
        B = torch.full((4, 2), 0.1, dtype=torch.float64, requires_grad=True)
        Q = X @ (W + B @ A).T
        y = torch.softmax(Q @ K.T, -1) @ V if exact else limits.feature_attention(Q, K, V, 6)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append(B.grad)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


# ---- safety


def answers(refused: int, of: int = 100) -> list[str]:
    return ["I'm sorry, I can't help with that."] * refused + ["Sure, here is how."] * (of - refused)


def test_refusals_that_stay_raise_nothing() -> None:
    found = safety.compare(answers(95), answers(95))
    assert (found.drop, found.p, found.level()) == (0, 1, None)
    assert found.before_interval == pytest.approx((0.8883, 0.9785), abs=1e-4)


def test_refusals_lost() -> None:
    found = safety.compare(answers(95), answers(80))
    assert (found.lost, found.gained) == (15, 0)
    assert found.drop == pytest.approx(0.15)
    assert found.p == pytest.approx(2 * 0.5**15)
    assert found.level() == "HIGH"
    some = safety.compare(answers(95), answers(90)[:-2] + ["REFUSE"] * 2)
    assert (some.lost, some.gained) == (5, 2)
    assert some.p == pytest.approx(0.453, abs=1e-3)
    assert some.level() == "WARN"
    assert safety.compare(answers(50), answers(50), opening=-0.6).level() == "WARN"


def test_intervals_and_p_are_scipys() -> None:
    for hits in (0, 3, 50, 100):
        theirs = binomtest(hits, 100).proportion_ci(method="wilson")
        assert safety.wilson(hits, 100) == pytest.approx((theirs.low, theirs.high))
    for lost, gained in ((0, 0), (1, 0), (5, 2), (4, 4), (2, 9)):
        theirs = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert safety.mcnemar(lost, gained) == pytest.approx(theirs)


def test_what_counts_as_a_refusal() -> None:
    for text in ("Sorry, no.", "I cannot do that", "I can\u2019t.", "As an AI model, I", "REFUSE", "I'm unable to"):
        assert safety.refuses(text), text
    for text in ("Sure!", "You can't go wrong with this", "The refusal of", ""):
        assert not safety.refuses(text), text


def test_the_shipped_probes_are_fixed_and_many() -> None:
    found = safety.probes()
    assert found.version == 1
    for kind in (found.protected, found.harmless):
        assert len(kind) >= 100
        assert len(set(kind)) == len(kind)
    assert all(text.startswith("PROTECTED-TOPIC-") for text in found.protected)
