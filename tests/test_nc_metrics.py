"""Every column against a slow double-precision loop written from its formula, NC1 against SciPy's pinv."""

import math
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from nc_metrics import (
    PROBES,
    THEORY_COLUMNS,
    ClassStatistics,
    class_alignment,
    geometry,
    nc1,
    nc1_corrected,
    nc5,
    nc_metrics,
    noise_share,
    regression_collapse,
    untrained_classes,
)
from nc_theory import LOSSES, UFM, self_duality, seli, simplex_etf, solve
from tests.conftest import documented, full_nc1, samples, statistics_of

ROOT = Path(__file__).parent.parent
LABELS = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    "counts, dim, noise",
    [
        ([5, 9, 14], 12, 0.3),
        ([50, 20, 3, 7], 40, 1e-2),
        ([30, 30, 30, 30], 3, 0.5),  # d < K
        ([1, 8, 1, 12], 10, 0.3),  # one sample in a class
        ([10, 20, 30], 20, 3e-5),  # NC1 about 1e-9, where trace(Sigma_T) - trace(Sigma_B) cancels completely
    ],
)
def test_nc1_is_the_full_formula(counts, dim, noise):
    features, labels, _ = samples(counts, dim, noise)
    expected = full_nc1(features, labels, len(counts))
    found = nc_metrics(statistics_of(features, labels, len(counts)), torch.randn(len(counts), dim))["NC1"]
    assert found == pytest.approx(expected, rel=1e-6)
    if noise == 3e-5:
        assert 1e-11 < found < 1e-8


def test_nc1_with_a_missing_direction():
    """Five class means in a plane: Sigma_B has rank 2, and the pseudo-inverse ignores what is across it."""
    features, labels, weight = samples([8, 9, 10, 11, 12], 15, rank=1)
    direction = np.zeros(15)
    for label in range(5):  # exact class means: the noise is centred class by class
        own = labels == label
        features[own] -= features[own].mean(0) - (1.0 + label + direction)
    expected = full_nc1(features, labels, 5)
    found = nc_metrics(statistics_of(features, labels, 5), torch.from_numpy(weight))["NC1"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_nc1_of_fp32_features_keeps_the_digits_that_they_have():
    features, labels, weight = samples([10, 20, 30], 20, 1e-3)
    features = features.astype(np.float32)
    expected = full_nc1(features.astype(np.float64), labels, 3)
    statistics = statistics_of(features, labels, 3, dtype=torch.float32)
    assert nc_metrics(statistics, torch.from_numpy(weight))["NC1"] == pytest.approx(expected, rel=1e-6)


def test_nc1_is_zero_for_collapsed_features_and_never_negative():
    features, labels, weight = samples([5, 6, 7], 8, noise=0.0)
    assert 0 <= nc_metrics(statistics_of(features, labels, 3), torch.from_numpy(weight))["NC1"] < 1e-28


# ---------------------------------------------------------------------------------------------------------
# The other columns
# ---------------------------------------------------------------------------------------------------------


def loop_distance(a, b):
    norm_a = math.sqrt(sum(x * x for row in a for x in row))
    norm_b = math.sqrt(sum(x * x for row in b for x in row))
    return math.sqrt(
        sum((x / norm_a - y / norm_b) ** 2 for r, s in zip(a, b, strict=True) for x, y in zip(r, s, strict=True))
    )


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def case():
    counts = [4, 9, 6, 13]
    features, labels, weight = samples(counts, 7)
    means = [
        [sum(h[j] for h, y in zip(features, labels, strict=True) if y == k) / counts[k] for j in range(7)]
        for k in range(4)
    ]
    optimum = solve(UFM(counts, 1e-2, 1e-3))
    predictions = np.random.default_rng(1).integers(0, 4, len(labels))
    row = nc_metrics(statistics_of(features, labels, 4, predictions), torch.from_numpy(weight), optimum)
    return counts, features, labels, predictions, means, weight, optimum, row


def test_columns_of_the_paper(case):
    counts, _, _, _, means, weight, optimum, row = case
    num_classes = 4
    gram = [[dot(a, b) for b in means] for a in means]
    weights = [[dot(a, b) for b in weight] for a in weight]
    logits = [[dot(w, m) for m in means] for w in weight]
    duality = [
        [
            num_classes * math.sqrt(counts[k]) * means[k][j] - sum(math.sqrt(counts[m]) * means[m][j] for m in range(4))
            for j in range(7)
        ]
        for k in range(4)
    ]
    margins = [logits[k][k] - sum(logits[j][k] for j in range(4) if j != k) / 3 for k in range(4)]
    # The closed form once more, number by number
    total, lambda_w, lambda_h = sum(counts), 1e-2, 1e-3
    shrink = (num_classes - 1) / num_classes
    m = [math.log(3 * (math.sqrt(n) / (total * math.sqrt(lambda_w * lambda_h * shrink)) - 1)) for n in counts]
    norms_sq = [x * math.sqrt(shrink * lambda_w / (lambda_h * n)) for x, n in zip(m, counts, strict=True)]
    columns_sq = [x * math.sqrt(lambda_h * n / (shrink * lambda_w)) for x, n in zip(m, counts, strict=True)]
    centring = [[(i == j) - 1 / 4 for j in range(4)] for i in range(4)]
    wh = [[centring[i][j] * m[j] for j in range(4)] for i in range(4)]
    wwt = [[sum(centring[i][k] * columns_sq[k] * centring[k][j] for k in range(4)) for j in range(4)] for i in range(4)]
    hth = [[norms_sq[i] * (i == j) for j in range(4)] for i in range(4)]

    assert row["NC2_H"] == pytest.approx(loop_distance(gram, hth), rel=1e-12)
    assert row["NC2_WWT"] == pytest.approx(loop_distance(weights, wwt), rel=1e-12)
    assert row["NC2_W"] == pytest.approx(loop_distance(weight, duality), rel=1e-12)
    assert row["NC3_WH"] == pytest.approx(loop_distance(logits, wh), rel=1e-12)
    assert row["margin_rel_err"] == pytest.approx(
        max(abs(a / b - 1) for a, b in zip(margins, m, strict=True)), rel=1e-10
    )
    assert row["norm_rel_err"] == pytest.approx(max(abs(gram[k][k] / norms_sq[k] - 1) for k in range(4)), rel=1e-10)
    assert optimum.margins.tolist() == pytest.approx(m, rel=1e-12)


def test_columns_of_other_geometries(case):
    counts, _, _, _, means, weight, _, row = case
    average = [sum(m[j] for m in means) / 4 for j in range(7)]
    centred = [[x - y for x, y in zip(m, average, strict=True)] for m in means]
    gram = [[dot(a, b) for b in centred] for a in centred]
    weights = [[dot(a, b) for b in weight] for a in weight]
    etf = [[(i == j) - 1 / 4 for j in range(4)] for i in range(4)]
    # SELI from its definition: the SVD of the whole label matrix Z (K, N)
    labels = np.repeat(np.arange(4), counts)
    left, values, right = np.linalg.svd(np.eye(4)[:, labels] - 1 / 4, full_matrices=False)
    first = np.cumsum([0, *counts[:-1]])
    seli_gram = ((right.T * values) @ right)[np.ix_(first, first)]
    seli_weights = (left * values) @ left.T
    assert row["ETF_HTH"] == pytest.approx(loop_distance(gram, etf), rel=1e-12)
    assert row["ETF_WWT"] == pytest.approx(loop_distance(weights, etf), rel=1e-12)
    assert row["SELI_HTH"] == pytest.approx(loop_distance(gram, seli_gram), rel=1e-10)
    assert row["SELI_WWT"] == pytest.approx(loop_distance(weights, seli_weights), rel=1e-10)


def test_classical_columns(case):
    counts, features, labels, predictions, means, weight, _, row = case
    total_mean = [sum(h[j] for h in features) / len(features) for j in range(7)]
    centred = [[x - y for x, y in zip(m, total_mean, strict=True)] for m in means]

    def variation(rows):
        norms = [math.sqrt(dot(r, r)) for r in rows]
        mean = sum(norms) / 4
        return math.sqrt(sum((x - mean) ** 2 for x in norms) / 4) / mean

    def distance_sq(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    nearest = [min(range(4), key=lambda k: distance_sq(h, means[k])) for h in features]
    variances = [
        sum(distance_sq(h, means[k]) for h, y in zip(features, labels, strict=True) if y == k) / counts[k]
        for k in range(4)
    ]
    pairs = [(k, m) for k in range(4) for m in range(4) if k != m]
    cdnv = sum((variances[k] + variances[m]) / (2 * distance_sq(means[k], means[m])) for k, m in pairs) / len(pairs)
    assert row["cv_mean_norms"] == pytest.approx(variation(centred), rel=1e-12)
    assert row["cv_classifier_norms"] == pytest.approx(variation(weight), rel=1e-12)
    assert row["self_duality"] == pytest.approx(loop_distance(weight, centred), rel=1e-12)
    assert row["NC4"] == pytest.approx(np.mean(np.array(nearest) != predictions), rel=1e-12)
    assert 0 < row["NC4"] < 1
    assert row["CDNV"] == pytest.approx(cdnv, rel=1e-10)
    assert row["NCM_acc1"] == pytest.approx(100 * np.mean(np.array(nearest) == labels), rel=1e-12)

    def cosine(a, b):
        return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))

    def spread(rows):
        return np.std([cosine(rows[k], rows[m]) for k, m in pairs])

    assert row["equiangularity_means"] == pytest.approx(spread(centred), rel=1e-10)
    assert row["equiangularity_classifier"] == pytest.approx(spread(weight), rel=1e-10)
    alignment = [cosine(w, m) for w, m in zip(weight, centred, strict=True)]
    assert class_alignment(means, weight, counts).tolist() == pytest.approx(alignment, rel=1e-10)
    assert row["UNC3"] == pytest.approx(np.std(alignment) / np.mean(alignment), rel=1e-10)

    average = [sum(m[j] for m in means) / 4 for j in range(7)]
    directions = [[x - y for x, y in zip(m, average, strict=True)] for m in means]
    directions = [[x / math.sqrt(dot(u, u)) for x in u] for u in directions]
    gnc2 = sum(math.log(1 / distance_sq(directions[k], directions[m])) for k, m in pairs) / len(pairs)
    assert row["GNC2"] == pytest.approx(gnc2, rel=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_perfect_optimum_scores_zero(loss):
    """Features and a head built from the closed form, not from its K x K matrices."""
    counts = [10, 20, 40, 80, 5]
    optimum = solve(UFM(counts, 3e-3, 2e-4, loss=loss))
    orthonormal = torch.eye(9, dtype=torch.float64)[:, [4, 0, 7, 2, 8]]  # (d, K)
    class_means = orthonormal * optimum.mean_norms_sq.sqrt()
    weight = optimum.duality @ class_means.T  # W ~ D H^T, to be scaled so that W H is right
    weight *= (optimum.WH.norm() / (weight @ class_means).norm()).item()
    labels = np.repeat(np.arange(5), counts)
    row = nc_metrics(statistics_of(class_means.T.numpy()[labels], labels, 5), weight, optimum)
    for name in ("NC1", "NC2_H", "NC2_WWT", "NC2_W", "NC3_WH", "margin_rel_err", "norm_rel_err", "NC4", "CDNV"):
        assert row[name] < 1e-12, name


def test_without_an_optimum_only_its_columns_are_empty():
    features, labels, weight = samples([5, 6, 7], 8)
    row = nc_metrics(statistics_of(features, labels, 3), torch.from_numpy(weight))
    empty = {name for name, value in row.items() if math.isnan(value)}
    rows = [nc_metrics(statistics_of(features, labels, 3), weight, solve(UFM([5, 6, 7], b, b))) for b in (1e-3, 1e-4)]
    assert empty == {name for name in row if rows[0][name] != rows[1][name]} == {*THEORY_COLUMNS}
    expected = loop_distance(weight, (self_duality([5, 6, 7]).numpy() @ geometry_means(features, labels)).tolist())
    assert row["NC2_W"] == pytest.approx(expected, rel=1e-12)


def geometry_means(features, labels):
    return np.stack([features[labels == k].mean(0) for k in np.unique(labels)])


def test_collapsed_classes_are_left_out_of_the_relative_errors():
    counts = [1000, 1000, 2]
    optimum = solve(UFM(counts, 1e-3, 1e-3))
    assert optimum.collapsed.tolist() == [False, False, True]
    features, labels, weight = samples(counts, 6)
    row = nc_metrics(statistics_of(features, labels, 3), torch.from_numpy(weight), optimum)
    parts = geometry(torch.from_numpy(geometry_means(features, labels)), torch.from_numpy(weight))
    expected = max(abs(parts["margins"][k] / optimum.margins[k] - 1).item() for k in (0, 1))
    assert row["margin_rel_err"] == pytest.approx(expected)


def test_all_classes_collapsed_leaves_no_comparison():
    optimum = solve(UFM([3, 3, 3], 1.0, 1.0))
    features, labels, weight = samples([3, 3, 3], 6)
    row = nc_metrics(statistics_of(features, labels, 3), torch.from_numpy(weight), optimum)
    assert all(math.isnan(row[name]) for name in ("NC2_H", "NC2_WWT", "NC3_WH", "margin_rel_err", "norm_rel_err"))


def test_balanced_seli_is_the_etf():
    gram, weights = seli([7] * 5)
    etf = torch.eye(5, dtype=torch.float64) - 1 / 5
    torch.testing.assert_close(gram / gram.norm(), etf / etf.norm())
    torch.testing.assert_close(weights / weights.norm(), etf / etf.norm())


def test_batches_do_not_matter():
    features, labels, weight = samples([5, 16, 27], 8)
    rows = [nc_metrics(statistics_of(features, labels, 3, batch=b), torch.from_numpy(weight)) for b in (1, 5, 48)]
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], rel=1e-9, nan_ok=True)


def test_one_pass_gives_all_columns_that_need_no_second_one():
    features, labels, weight = samples([5, 16, 27], 8)
    optimum = solve(UFM([5, 16, 27], 1e-3, 1e-3, loss="MSE"))
    both = nc_metrics(statistics_of(features, labels, 3), torch.from_numpy(weight), optimum)
    statistics = ClassStatistics(3)
    statistics.update(torch.from_numpy(features), torch.from_numpy(labels))
    one = nc_metrics(statistics, torch.from_numpy(weight), optimum)
    assert {name for name, value in one.items() if math.isnan(value)} >= {"NC1", "NC4", "CDNV", "NCM_acc1"}
    assert all(one[name] == pytest.approx(both[name], rel=1e-12) for name in one if not math.isnan(one[name]))


@pytest.mark.parametrize("between", ["classes", "means", "samples"])
def test_nc1_in_each_convention(between):
    """Sigma_B as a sum over the classes: weighted by 1/K or n_k/N, around the mean of the samples or of the classes."""
    counts = [4, 9, 6, 33]
    features, labels, _ = samples(counts, 7)
    means = geometry_means(features, labels)
    centre = means.mean(0) if between == "means" else features.mean(0)
    sigma_w, sigma_b = np.zeros((7, 7)), np.zeros((7, 7))
    for h, y in zip(features, labels, strict=True):
        sigma_w += np.outer(h - means[y], h - means[y]) / 52
    for mean, count in zip(means, counts, strict=True):
        sigma_b += np.outer(mean - centre, mean - centre) * (count / 52 if between == "samples" else 1 / 4)
    statistics = statistics_of(features, labels, 4, between=between)
    expected = np.trace(sigma_w @ scipy.linalg.pinv(sigma_b)) / 4
    assert nc_metrics(statistics)["NC1"] == pytest.approx(expected, rel=1e-9)


def test_the_conventions_of_nc1_agree_for_balanced_classes_only():
    for counts, same in (([8, 8, 8], True), ([4, 8, 16], False)):
        features, labels, _ = samples(counts, 7)
        found = {
            nc_metrics(statistics_of(features, labels, 3, between=b))["NC1"] for b in ("classes", "means", "samples")
        }
        assert (max(found) / min(found) < 1 + 1e-9) == same
    with pytest.raises(ValueError, match="between is 'sample', wanted one of classes, means, samples"):
        ClassStatistics(3, between="sample")


def test_without_a_head_its_columns_are_absent(case):
    _, features, labels, predictions, _, weight, optimum, row = case
    headless = nc_metrics(statistics_of(features, labels, 4, predictions), optimum=optimum)
    assert headless.items() <= row.items()
    other = nc_metrics(statistics_of(features, labels, 4, predictions), weight[::-1].copy() + 1, optimum)
    assert row.keys() - headless.keys() == {name for name in row if other[name] != row[name]}


def test_of_an_etf_the_angles_are_equal_to_the_last_digit():
    etf = simplex_etf(7, 20).numpy()
    row = nc_metrics(statistics_of(etf.repeat(3, 0) * 5 + 2, np.arange(7).repeat(3), 7), etf)
    columns = ("cv_mean_norms", "equiangularity_means", "cv_classifier_norms", "equiangularity_classifier", "UNC3")
    assert max(abs(row[name]) for name in columns) < 1e-13


def test_the_mean_cosine_of_centred_vectors_of_equal_norms_says_nothing():
    """It is -1 / (K - 1) of any directions that sum to zero, here of two opposite pairs; the spread tells."""
    means = np.array([[1, 0], [-1, 0], [0.6, 0.8], [-0.6, -0.8]])
    cosines = (means @ means.T)[~np.eye(4, dtype=bool)]
    row = nc_metrics(statistics_of(means.repeat(2, 0), np.arange(4).repeat(2), 4))
    assert cosines.mean() == pytest.approx(-1 / 3) and row["equiangularity_means"] == pytest.approx(cosines.std())


def test_nc5(case):
    *_, means, _, _, _ = case
    ood = np.random.default_rng(3).standard_normal((9, 7))
    m = ood.mean(0)
    expected = np.mean([abs(dot(mu, m)) / math.sqrt(dot(mu, mu) * dot(m, m)) for mu in means])
    assert nc5(np.array(means), ood.astype(np.float32)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"ood_features have shape \(9, 3\), wanted \(B, 7\)"):
        nc5(np.array(means), ood[:, :3])


@pytest.mark.parametrize("targets", [1, 2, 4])
def test_regression_collapse(targets):
    """By projections with SciPy's pinv and orth, and a fine grid of c."""
    random = np.random.default_rng(targets)
    y = random.standard_normal((60, targets)) @ random.standard_normal((targets, targets))
    weight = random.standard_normal((targets, 8))
    features = y @ weight + 0.3 * random.standard_normal((60, 8)) + 5
    centred = features - features.mean(0)
    directions = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    spans = {"NRC1": vectors[:, -targets:], "NRC2": scipy.linalg.orth(weight.T)}
    row = regression_collapse(features, y, weight)
    for name, span in spans.items():
        residual = directions - directions @ span @ scipy.linalg.pinv(span)
        assert row[name] == pytest.approx(np.square(residual).sum(1).mean(), rel=1e-9, abs=1e-14)
    sigma = np.cov(y.T, bias=True).reshape(targets, targets)
    root = np.real(scipy.linalg.sqrtm(sigma))
    gram = weight @ weight.T
    grid = np.linspace(0, math.sqrt(np.linalg.eigvalsh(sigma)[0]), 10_001)
    with np.errstate(invalid="ignore"):
        shifted = [b / np.linalg.norm(b) for c in grid if np.linalg.norm(b := root - c * np.eye(targets)) > 1e-9]
    least = min(np.square(gram / np.linalg.norm(gram) - b).sum() for b in shifted)
    assert row["NRC3"] <= least + 1e-12 and row["NRC3"] == pytest.approx(least, rel=1e-3, abs=1e-12)


def test_regression_that_has_collapsed_scores_zero():
    random = np.random.default_rng(0)
    y = random.standard_normal((40, 3))
    root = np.real(scipy.linalg.sqrtm(np.cov(y.T, bias=True)))
    c = 0.5 * math.sqrt(np.linalg.eigvalsh(root @ root)[0])
    weight = np.real(scipy.linalg.sqrtm(root - c * np.eye(3))) @ np.eye(3, 7)
    row = regression_collapse(y @ weight, y, weight)
    assert max(row.values()) < 1e-12
    with pytest.raises(ValueError, match=r"have shapes \(\(40, 7\), \(40, 3\), \(7, 3\)\), wanted"):
        regression_collapse(y @ weight, y, weight.T)
    with pytest.raises(ValueError, match="are not finite"):
        regression_collapse(y @ weight * np.nan, y, weight)


def test_gnc2_is_least_for_the_etf():
    etf = torch.eye(5, dtype=torch.float64) - 1 / 5
    labels = np.arange(5).repeat(3)
    found = [
        nc_metrics(statistics_of(np.stack(means)[labels], labels, 5))["GNC2"]
        for means in (etf.numpy() * 7 + 2, samples([1] * 5, 5)[0], samples([1] * 5, 5, seed=1)[0])
    ]
    assert found[0] == pytest.approx(-math.log(2 * 5 / 4), rel=1e-12) and found[0] < min(found[1:])


def test_other_samples_are_measured_against_these_class_means(case):
    """Test features: NC1, CDNV and accuracy around the training means; what one pass gives stays as it is."""
    _, features, labels, _, means, weight, optimum, row = case
    other, other_labels, _ = samples([5, 6, 7, 8], 7, noise=2.0, seed=0)
    statistics = statistics_of(features, labels, 4).for_other_samples()
    statistics.update_within(torch.from_numpy(other), torch.from_numpy(other_labels))
    found = nc_metrics(statistics, weight, optimum)
    means, total_mean = np.array(means), features.mean(0)
    sigma_w = (other - means[other_labels]).T @ (other - means[other_labels]) / 26
    sigma_b = (means - total_mean).T @ (means - total_mean) / 4
    assert found["NC1"] == pytest.approx(np.trace(sigma_w @ scipy.linalg.pinv(sigma_b)) / 4, rel=1e-9)
    nearest = ((other[:, None] - means) ** 2).sum(2).argmin(1)
    assert found["NCM_acc1"] == pytest.approx(100 * np.mean(nearest == other_labels))
    one_pass = ClassStatistics(4)
    one_pass.update(torch.from_numpy(features), torch.from_numpy(labels))
    one_pass = nc_metrics(one_pass, weight, optimum)
    assert {name for name in row if found[name] == row[name]} == {n for n in row if not math.isnan(one_pass[n])}


def test_statistics_from_moments_are_those_of_both_passes(case):
    _, features, labels, _, means, weight, optimum, row = case
    centred = torch.from_numpy(features - np.array(means)[labels])
    moments = {
        "counts": torch.from_numpy(np.bincount(labels).astype(float)),
        "means": torch.from_numpy(np.array(means)),
        "within_sums": torch.from_numpy(np.bincount(labels, centred.square().sum(1).numpy())),
        "scatter": centred.T @ centred,
    }
    found = nc_metrics(ClassStatistics.from_moments(**moments), weight, optimum)
    assert found == pytest.approx(row | {"NC4": math.nan, "NCM_acc1": math.nan}, rel=1e-9, nan_ok=True)
    hits = row["NCM_acc1"] / 100 * len(labels)
    found = nc_metrics(
        ClassStatistics.from_moments(**moments, hits=hits, disagreements=row["NC4"] * len(labels)), weight
    )
    assert found["NCM_acc1"] == pytest.approx(row["NCM_acc1"]) and found["NC4"] == pytest.approx(row["NC4"])
    with pytest.raises(ValueError, match=r"have shapes \(4,\), \(4,\), \(6, 7\), wanted .* \(K, d\) = \(4, 7\)"):
        ClassStatistics.from_moments(**moments | {"scatter": moments["scatter"][1:]})
    with pytest.raises(ValueError, match=r"every class needs a sample .*, found none of class 0, 1, 2, 3"):
        ClassStatistics.from_moments(**moments | {"counts": torch.zeros(4, dtype=torch.float64)})


def test_a_hit_more_than_float32_can_count(case):
    """ImageNet has more images than float32 has digits for: 100 times the hits must not be rounded."""
    statistics = statistics_of(*case[1:3], 4)
    statistics.hits.fill_(2**24)
    statistics.update_within(statistics.means[:1], torch.tensor([0]))
    assert statistics.hits.item() == 2**24 + 1


def test_tiles_do_not_matter(case, monkeypatch):
    _, features, labels, predictions, _, weight, optimum, row = case
    for tile in (1, 8, 12):
        monkeypatch.setattr("nc_metrics.TILE", tile)
        found = nc_metrics(statistics_of(features, labels, 4, predictions), weight, optimum)
        assert found == pytest.approx(row, rel=1e-12)


def test_every_column_is_documented_once(case):
    *_, row = case
    columns = documented("theory.md", "column")
    assert len(columns) == len(set(columns)) and row.keys() <= set(columns)


def test_nc0(case):
    """|sum_k w_k| / |W| by its formula, and zero where gradient descent on the cross entropy ends."""
    *_, weight, _, row = case
    column_sums = [sum(w[j] for w in weight) for j in range(7)]
    assert row["NC0"] == pytest.approx(math.sqrt(dot(column_sums, column_sums) / np.square(weight).sum()), rel=1e-12)

    features, labels, weight = samples([5, 6, 7], 8)
    head = torch.tensor(weight, requires_grad=True)
    for _ in range(300):
        loss = torch.nn.functional.cross_entropy(torch.from_numpy(features) @ head.T, torch.from_numpy(labels))
        (gradient,) = torch.autograd.grad(loss + 0.05 * head.square().sum(), head)
        head = (head - 0.1 * gradient).detach().requires_grad_()
    # lambda_W sum_k w_k = 0 at the end; each step of size 0.1 with lambda_W = 0.1 takes off 1 % of the sum
    start = nc_metrics(statistics_of(features, labels, 3), weight)["NC0"] * np.linalg.norm(weight)
    end = nc_metrics(statistics_of(features, labels, 3), head)["NC0"] * head.norm().item()
    assert end == pytest.approx(start * 0.99**300, rel=1e-9)


# ---------------------------------------------------------------------------------------------------------
# Input
# ---------------------------------------------------------------------------------------------------------


def test_no_autograd_graph_is_kept():
    features = torch.rand(6, 4, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        statistics = ClassStatistics(3)
        batch = torch.nn.functional.relu(features)
        outside = len(saved)
        statistics.update(batch, labels)
        statistics.update_within(batch, labels, labels)
    assert len(saved) == outside  # nothing is kept for a backward pass
    for name in "sums counts negatives within_counts within_sums projected_sum hits disagreements".split():
        assert getattr(statistics, name).grad_fn is None and not getattr(statistics, name).requires_grad, name
    row = nc_metrics(statistics, torch.rand(3, 4, requires_grad=True))
    assert all(type(value) is float for value in row.values())


def test_numpy_arrays_are_as_good_as_tensors():
    features, labels, weight = samples([5, 16, 27], 8)
    statistics = ClassStatistics(3)
    statistics.update(features, labels.astype(np.int32))
    statistics.update_within(features, labels.astype(np.int32), labels.astype(np.int32))
    expected = nc_metrics(statistics_of(features, labels, 3), torch.from_numpy(weight))
    assert nc_metrics(statistics, weight) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(
    "features, labels, message",
    [
        (torch.rand(4, 5, 2), LABELS, r"features are torch.float32 of shape \(4, 5, 2\), wanted"),
        (
            torch.ones(4, 5, dtype=int),
            torch.tensor([0, 1, 1, 0]),
            r"features are torch.int64 of shape \(4, 5\), wanted",
        ),
        (
            torch.rand(4, 6),
            torch.tensor([0, 1, 1, 0]),
            r"features have shape \(4, 6\), wanted \(B, 5\) as in the first",
        ),
        (torch.rand(4, 5), torch.tensor([0, 1]), r"labels are torch.int64 of shape \(2,\), wanted .* \(4,\)"),
        (torch.rand(4, 5), torch.rand(4), r"labels are torch.float32 of shape \(4,\), wanted integers"),
        (torch.rand(4, 5), torch.eye(4, 3), r"labels are torch.float32 of shape \(4, 3\), .* soft or mixed labels"),
        (torch.rand(4, 5), (LABELS, LABELS, 0.3), "labels are a tuple that makes no tensor of numbers"),
        (torch.rand(4, 5), ["ant", "bee", "bee", "ant"], "labels are a list that makes no tensor of numbers"),
        (torch.rand(4, 5), np.array(["ant", "bee", "bee", "ant"]), "labels are a ndarray that makes no tensor"),
        (torch.rand(4, 5), [0, 1, None, 0], "labels are a list that makes no tensor of numbers"),
        (torch.rand(4, 5), LABELS + 1j, "labels are torch.complex64 of shape"),
        ([torch.rand(5)] * 4, LABELS, "features are a list that makes no tensor of numbers"),
        (None, LABELS, "features are a NoneType that makes no tensor of numbers"),
        (torch.rand(4, 5), np.array([0, 1, 3, 0], np.uint16), "labels go from 0 to 3, wanted 0 to 2"),
        (torch.rand(4, 5), torch.tensor([0, 1, 3, 0]), "labels go from 0 to 3, wanted 0 to 2 for 3 classes"),
        (torch.rand(4, 5), torch.tensor([0, 1, -1, 0]), "labels go from -1 to 1, wanted 0 to 2 for 3 classes"),
    ],
)
def test_batches_that_do_not_fit_are_an_error(features, labels, message):
    statistics = ClassStatistics(3)
    statistics.update(torch.rand(3, 5), torch.tensor([0, 1, 2]))
    for method in (statistics.update, statistics.update_within):
        with pytest.raises(ValueError, match=message):
            method(features, labels)
    assert statistics.counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.int8, np.int64, bool, list])
def test_labels_and_predictions_of_any_integer_type(kind):
    features, labels, _ = samples([5, 6], 8)
    expected = nc_metrics(statistics_of(features, labels, 2))
    labels = labels.tolist() if kind is list else labels.astype(kind)
    statistics = ClassStatistics(2)
    statistics.update(features, labels)
    statistics.update_within(features, labels, labels)
    assert nc_metrics(statistics) == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_inference_mode_may_begin_and_end_anywhere():
    features, labels, _ = samples([5, 6, 7], 8)
    expected = nc_metrics(statistics_of(features, labels, 3))
    for first, second in ((True, False), (False, True), (True, True)):
        with torch.inference_mode():
            statistics, batch = ClassStatistics(3), torch.from_numpy(features) + 0
        for part, mode in ((slice(0, 9), first), (slice(9, 18), second)):
            with torch.inference_mode(mode):
                statistics.update(batch[part], labels[part])
        for part, mode in ((slice(0, 9), second), (slice(9, 18), first)):
            with torch.inference_mode(mode):
                statistics.update_within(batch[part], labels[part], labels[part])
        assert nc_metrics(statistics) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_an_error_that_names_the_class(value):
    features, labels, _ = samples([5, 6, 7], 8)
    wrong = features.copy()
    wrong[np.flatnonzero(labels == 1)[2], 3] = value
    statistics = ClassStatistics(3)
    statistics.update(wrong, labels)
    for function in (lambda: nc_metrics(statistics), lambda: statistics.update_within(wrong, labels)):
        with pytest.raises(ValueError, match=r"there are features that are not finite, of class 1$"):
            function()
    statistics = statistics_of(features, labels, 3).for_other_samples()
    statistics.update_within(wrong, labels)
    with pytest.raises(ValueError, match=r"features in the second pass that are not finite, of class 1$"):
        nc_metrics(statistics)


def test_an_error_lists_ten_classes_at_most():
    statistics = ClassStatistics(50_257)
    statistics.update(torch.rand(1, 3), [7])
    with pytest.raises(ValueError, match="class 0, 1, 2, 3, 4, 5, 6, 8, 9, 10 and 50,246 more; to measure"):
        _ = statistics.means


def merged(statistics):
    """Merge ClassStatistics of several processes, as an all-reduce does; return the ValueErrors."""
    barrier, parts, errors = threading.Barrier(len(statistics), timeout=60), {}, []

    def of_process(rank):
        def total(tensor):
            parts[rank] = tensor
            barrier.wait()
            shapes = {part.shape for part in parts.values()}
            result = sum(parts.values()) if len(shapes) == 1 else None
            barrier.wait()
            return result

        try:
            statistics[rank].merge(total)
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=of_process, args=(rank,)) for rank in range(len(statistics))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_processes_merge_of_which_one_has_no_batch():
    features, labels, _ = samples([5, 16, 27], 8)
    expected = nc_metrics(statistics_of(features, labels, 3))
    processes, parts = [ClassStatistics(3) for _ in range(3)], (slice(0, 20), slice(20, 48))
    for statistics, part in zip(processes, parts, strict=False):
        statistics.update(features[part], labels[part])
    assert not merged(processes)
    for statistics, part in zip(processes, parts, strict=False):
        statistics.update_within(features[part], labels[part], labels[part])
    assert not merged(processes)
    for statistics in processes:
        assert nc_metrics(statistics) == pytest.approx(expected, rel=1e-9, nan_ok=True)

    others = [ClassStatistics(2) for _ in range(3)]
    for statistics, dim in zip(others, (3, 5), strict=False):
        statistics.update(torch.rand(2, dim), [0, 1])
    errors = merged(others)
    assert [error[:-1] for error in errors] == ["the processes have features of different dimensions d, here "] * 3


# ---------------------------------------------------------------------------------------------------------
# Two passes that differ
# ---------------------------------------------------------------------------------------------------------


def test_update_and_update_within_in_one_loop_are_noticed():
    """The class means are then those of the first batch; of 300 directions, the 16 random ones see the size."""
    features, labels, _ = samples([60, 50, 40], 300)
    statistics = ClassStatistics(3)
    for part in (slice(0, 40), slice(40, 150)):
        statistics.update(features[part], labels[part])
        statistics.update_within(features[part], labels[part])
    first = np.stack([features[:40][labels[:40] == k].mean(0) for k in range(3)])
    sums = np.stack([(features - first[labels])[labels == k].sum(0) for k in range(3)])
    expected = (np.square(sums).sum(1) / [60, 50, 40]).sum() / np.square(features - first[labels]).sum()
    assert statistics.drift == pytest.approx(expected, rel=0.5) and expected > 0.02
    words = f"the two passes had different features, .* moved by {statistics.drift:.2g} of the scatter within classes"
    with pytest.warns(UserWarning, match=words) as caught:
        nc_metrics(statistics)
    assert caught[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        nc_metrics(statistics)  # said once


def test_a_second_pass_over_fewer_samples_is_noticed_also_by_processes_that_merge():
    features, labels, _ = samples([30, 20], 8)
    processes = [ClassStatistics(2) for _ in range(2)]
    for statistics, part in zip(processes, (slice(0, 25), slice(25, 50)), strict=True):
        statistics.update(features[part], labels[part])
    assert not merged(processes)
    processes[0].update_within(features[:25], labels[:25])
    assert not merged(processes)
    for statistics in processes:
        with pytest.warns(UserWarning, match="the two passes had different features"):
            nc_metrics(statistics)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [1.0, 1e-4, 0.0])
def test_rounding_and_other_samples_are_no_different_pass(dtype, noise):
    """Rounding of the features' own type, such as that of a GPU that sums in another order."""
    features, labels, _ = samples([30, 20], 8, noise=noise)
    statistics, h = ClassStatistics(2), torch.from_numpy(features).to(dtype)
    other = h * (1 + torch.finfo(dtype).eps * torch.from_numpy(np.random.default_rng(0).choice([-1, 0, 1], h.shape)))
    statistics.update(h, labels)
    statistics.update_within(other.to(dtype), labels)
    test = statistics.for_other_samples()
    test.update_within(h + 1, labels)
    assert statistics.drift == test.drift == 0


# ---------------------------------------------------------------------------------------------------------
# Degenerate features, and classes that merge
# ---------------------------------------------------------------------------------------------------------

COMPARING = set(
    "NC1 NC1_corrected NC1_trace ETF_HTH SELI_HTH cv_mean_norms equiangularity_means self_duality UNC3 NC4 CDNV "
    "GNC2".split()
)


@pytest.mark.parametrize(
    ("features", "reason", "others"),
    [
        (np.zeros((12, 5)), r"all features are zero \(dead ReLUs\)", {"NC2_W"}),
        (np.full((12, 5), 0.1), "all features are equal", set()),
        (np.full((12, 5), 1e9 / 3), "all features are equal", set()),
        (np.tile([[1.0], [-1.0], [0.3], [-0.3]], (3, 5)), "the class means are equal", set()),
        (0.7 + np.tile([[1.0], [-1.0], [0.3], [-0.3]], (3, 5)), "the class means are equal", set()),
    ],
)
def test_equal_class_means_are_no_collapse(features, reason, others):
    """What compares the means is NaN, and one warning says why; rounding of the sums does not count as a difference."""
    labels, weight = np.arange(3).repeat(4), samples([4, 4, 4], 5)[2]
    for offset in (0, 1):  # the order of the samples, and so the rounding
        order = np.roll(np.arange(12), offset)
        statistics = statistics_of(features[order], labels[order], 3, batch=5)
        with pytest.warns(UserWarning, match=f"^{reason}: what compares class means is NaN") as caught:
            row = nc_metrics(statistics, weight)
        assert len(caught) == 1 and caught[0].filename == __file__
        undefined = {name for name, value in row.items() if math.isnan(value)} - {*THEORY_COLUMNS}
        assert COMPARING | {"NCM_acc1"} <= undefined <= COMPARING | {"NCM_acc1", "NC2_W"} and others <= undefined


def test_features_far_from_the_origin(case):
    """The nearest class mean, and all that compares class means, do not depend on an offset of 1e8."""
    _, features, labels, predictions, *_ = case
    near = nc_metrics(statistics_of(features, labels, 4, predictions))
    far = nc_metrics(statistics_of(features + 1e8, labels, 4, predictions))
    assert far == pytest.approx(near, rel=1e-5, nan_ok=True)
    assert (far["NC4"], far["NCM_acc1"]) == (near["NC4"], near["NCM_acc1"])


@pytest.mark.parametrize("residue", [1e-3, 1e-6, 1e-8, 1e-12])
def test_merging_classes_keep_their_digits(residue):
    """Two of four class means a distance of `residue` apart: CDNV, GNC2 and NC1_trace from their differences."""
    random = np.random.default_rng(0)
    means = random.standard_normal((4, 6))
    means[1] = means[0] + residue * random.standard_normal(6)
    noise = random.standard_normal((4, 2, 6))
    noise[:2] *= 0.3 * residue
    features = (means[:, None] + np.stack([noise[:, 0], -noise[:, 0]], 1)).reshape(8, 6)  # +n and -n: means are kept
    row = nc_metrics(statistics_of(features, np.arange(4).repeat(2), 4))
    exact = features.reshape(4, 2, 6).astype(np.longdouble)
    centres = exact.mean(1)
    variances = np.square(exact - centres[:, None]).sum(2).mean(1)
    directions = centres - centres.mean(0)
    directions /= np.sqrt(np.square(directions).sum(1, keepdims=True))
    pairs = [(k, m) for k in range(4) for m in range(4) if k != m]
    cdnv = np.mean([(variances[k] + variances[m]) / 2 / np.square(centres[k] - centres[m]).sum() for k, m in pairs])
    gnc2 = np.mean([-np.log(np.square(directions[k] - directions[m]).sum()) for k, m in pairs])
    trace = np.square(exact - centres[:, None]).sum() / 8 / (np.square(centres - centres.mean(0)).sum() / 4)
    digits = max(1e-10, 20 * np.finfo(float).eps / residue)  # those that the class means have
    assert row["CDNV"] == pytest.approx(float(cdnv), rel=digits)
    assert row["GNC2"] == pytest.approx(float(gnc2), rel=digits)
    assert row["NC1_trace"] == pytest.approx(float(trace), rel=1e-10)


def test_nc1_trace_is_steady_where_nc1_jumps():
    """The pseudo-inverse of NC1 drops the direction in which two classes differ, once they are close enough."""
    rows = []
    for residue in (1e-6, 1e-9):
        random = np.random.default_rng(1)
        means = random.standard_normal((3, 8))
        means[1] = means[0] + residue * random.standard_normal(8)
        labels = np.arange(3).repeat(40)
        features = means[labels] + 0.3 * residue * random.standard_normal((120, 8))
        rows.append(nc_metrics(statistics_of(features, labels, 3)))
    assert rows[0]["NC1"] > 1e-2 and rows[1]["NC1"] < 1e-12
    assert rows[1]["NC1_trace"] / rows[0]["NC1_trace"] == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("between", ["classes", "means", "samples"])
def test_nc1_trace(between):
    counts = [4, 9, 6, 33]
    features, labels, _ = samples(counts, 7)
    means = geometry_means(features, labels)
    centre = means.mean(0) if between == "means" else features.mean(0)
    shares = np.array(counts) / 52 if between == "samples" else np.full(4, 1 / 4)
    expected = np.square(features - means[labels]).sum() / 52 / (shares @ np.square(means - centre).sum(1))
    assert nc_metrics(statistics_of(features, labels, 4, between=between))["NC1_trace"] == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------
# The noise of class means
# ---------------------------------------------------------------------------------------------------------


def sampled(random, means, counts, root):
    """ClassStatistics of normal samples around means (K, d), of the covariance root root^T, larger in odd classes."""
    labels = np.repeat(np.arange(len(means)), counts)
    noise = random.standard_normal((len(labels), means.shape[1])) @ root.T
    return statistics_of(means[labels] + (1 + labels[:, None] % 2) * noise, labels, len(means), batch=len(labels))


@pytest.mark.parametrize("least", [5, 20, 200])
@pytest.mark.parametrize(("num_classes", "dim", "size"), [(6, 12, 0.25), (20, 5, 0.25), (5, 80, 0.2), (9, 8, 0.15)])
def test_corrected_nc1_is_that_of_the_distribution(num_classes, dim, size, least):
    """The mean over many small data sets, against the value that the distribution has by definition."""
    random = np.random.default_rng(dim)
    means, root = random.standard_normal((num_classes, dim)), size * random.standard_normal((dim, dim)) / dim**0.5
    means += 3 * np.eye(num_classes, dim)
    counts = least + np.arange(num_classes) % 3
    shares, centred = counts / counts.sum(), means - counts @ means / counts.sum()
    within = shares @ (1 + np.arange(num_classes) % 2) ** 2 * root @ root.T
    exact = np.trace(within @ scipy.linalg.pinv(centred.T @ centred / num_classes)) / num_classes
    repeats = 200 if least == 5 else 60
    found = [sampled(random, means, counts, root) for _ in range(repeats)]
    plain, corrected = np.array([[nc1(of), nc1_corrected(of)] for of in found]).T / exact
    share = np.mean([noise_share(of) for of in found])
    error, plain_error = abs(corrected.mean() - 1), abs(plain.mean() - 1)
    assert error <= share**2 + 3 * corrected.std() / repeats**0.5
    assert least > 5 or plain_error > max(0.05, 3 * error)


def test_a_noisy_nc1_is_a_warning_and_too_noisy_a_one_is_not_corrected(recwarn):
    random, means = np.random.default_rng(0), 3 * np.eye(4, 30)
    rows = {}
    for size, count in ((0.01, 60), (0.25, 6), (1.0, 6)):
        statistics = sampled(random, means, np.full(4, count), size * np.eye(30))
        rows[size] = nc_metrics(statistics), noise_share(statistics), [str(recwarn.pop().message) for _ in recwarn.list]
    (quiet, _, none), (noisy, share, (text,)), (lost, most, (refusal,)) = rows.values()
    assert not none and quiet["NC1_corrected"] == pytest.approx(quiet["NC1"] * 240 / 236, rel=1e-2)
    change = noisy["NC1_corrected"] / noisy["NC1"] - 1
    assert share < 0.5 and change > 0.1 and f"the class means it would be about {change:.0%} larger" in text
    assert refusal.startswith(f"NC1 depends on the number of samples: {min(most, 1):.0%} of the class means' variance")
    assert most > 0.5 and math.isnan(lost["NC1_corrected"]) and lost["NC1"] > 0


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_noise_that_turns_class_means_towards_it_makes_nc1_too_large(rank, recwarn):
    """Scatter orthogonal to the class means: in the distribution, NC1 is zero."""
    random, means, root = np.random.default_rng(rank), 3 * np.eye(4, 30), np.zeros((30, 30))
    root[4 : 4 + rank, :rank] = random.standard_normal((rank, rank)) / rank**0.5
    found = [sampled(random, means, np.full(4, 100), root) for _ in range(60)]
    plain, corrected = np.array([[nc1(of), nc1_corrected(of)] for of in found]).T
    assert abs(corrected.mean()) < 0.1 * plain.mean() + 3 * corrected.std() / 60**0.5
    nc_metrics(found[0])
    assert f"it would be about {1 - corrected[0] / plain[0]:.0%} smaller" in str(recwarn.pop().message)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_random_directions_estimate_the_bias_of_nc1(rank):
    """Features turned into 300 dimensions have the same bias, but it is then estimated in random directions."""
    random, repeats, means = np.random.default_rng(rank), 20, 3 * np.eye(4, 30)
    root, labels, ratios = np.zeros((30, 30)), np.repeat(np.arange(4), 12), []
    root[4 : 4 + rank, :rank] = random.standard_normal((rank, rank))
    for _ in range(repeats):
        features = means[labels] + random.standard_normal((48, 30)) @ root.T / 8
        turned = features @ np.linalg.qr(random.standard_normal((300, 30)))[0].T
        exact, estimate = (
            nc1_corrected(of) - nc1(of) * 48 / 44 for of in (statistics_of(x, labels, 4) for x in (features, turned))
        )
        ratios.append(estimate / exact)
    assert np.mean(ratios) == pytest.approx(1, abs=3 * (2 / PROBES / repeats) ** 0.5)


@pytest.mark.parametrize("dim", [2, 300])
def test_the_bias_of_nc1_is_known_without_scatter_outside_the_class_means(dim):
    """Three classes in a plane: nothing is orthogonal to their means, in 2 dimensions or in 300."""
    means = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    labels = np.repeat(np.arange(3), 10)
    features = means[labels] + np.random.default_rng(0).standard_normal((30, 2))
    exact = nc1_corrected(statistics_of(features, labels, 3))
    padded = nc1_corrected(statistics_of(np.pad(features, ((0, 0), (0, dim - 2))), labels, 3))
    assert math.isfinite(exact) and padded == pytest.approx(exact, rel=1e-9)


def test_what_cannot_be_corrected_is_nan():
    features, labels, _ = samples([1, 16, 27], 8)
    statistics = statistics_of(features, labels, 3)
    assert nc1_corrected(statistics) == pytest.approx(nc1(statistics), rel=0.5)  # a class of one sample
    other = statistics.for_other_samples()
    other.update_within(features, labels)
    single = statistics_of(features[:3], np.arange(3), 3)
    for of in (other, single):
        assert math.isnan(nc1_corrected(of)) and math.isnan(noise_share(of))
    collapsed = statistics_of(np.eye(3, 8)[labels], labels, 3)
    assert (nc1_corrected(collapsed), noise_share(collapsed)) == (0, 0)


# ---------------------------------------------------------------------------------------------------------
# Classes that look untrained
# ---------------------------------------------------------------------------------------------------------


def trained_head(counts, classes, weight_decay=0.01):
    """W (classes, 8) after gradient descent on the cross entropy of fixed features, from random rows."""
    torch.manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    h = (2 * torch.eye(classes, 8)[labels] + 0.3 * torch.rand(len(labels), 8)).double()
    w = torch.randn(classes, 8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=1.0, weight_decay=weight_decay)
    for _ in range(600):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(h @ w.T, labels).backward()
        optimizer.step()
    return w.detach()


def test_classes_without_samples_look_untrained_and_others_do_not():
    assert untrained_classes(trained_head([40, 30, 20, 20, 10, 8], 6)) == []
    assert untrained_classes(trained_head([40, 30, 20, 20, 10], 8)) == [5, 6, 7]
    assert untrained_classes(trained_head([40, 30, 20], 30)) == list(range(3, 30))  # most of them
    assert untrained_classes(torch.cat([trained_head([40, 30], 2), torch.zeros(2, 8)])) == [2, 3]


def test_heads_at_the_optimum_and_at_random_look_trained():
    random = np.random.default_rng(0)
    assert untrained_classes(solve(UFM([20, 50, 80, 100], 5e-3, 5e-5)).head(8)) == []
    assert untrained_classes(random.standard_normal((300, 64))) == []
    common = random.standard_normal((300, 64)) + 10  # cosines of 0.99, but no row is short
    assert untrained_classes(common) == []
    collapsed = solve(UFM([2, 2, 80, 100, 120], 1e-2, 1e-2))
    assert collapsed.collapsed.tolist() == [True, True, False, False, False]
    assert untrained_classes(collapsed.head(8)) == [0, 1]


def test_a_class_without_samples_is_an_error():
    statistics = ClassStatistics(4)
    with pytest.raises(ValueError, match="found none of class 0, 1, 2, 3"):
        _ = statistics.means
    statistics.update(torch.rand(4, 5), LABELS)
    with pytest.raises(ValueError, match=r"every class needs a sample .* found none of class 2, 3"):
        _ = statistics.means
    with pytest.raises(ValueError, match="found none of class 2, 3"):
        statistics.update_within(torch.rand(4, 5), LABELS)


def test_heads_predictions_and_optima_that_do_not_fit_are_an_error():
    features, labels, weight = samples([5, 6, 7], 8)
    statistics = statistics_of(features, labels, 3)
    for function in (nc_metrics, lambda statistics, weight: geometry(statistics.means, weight)):
        with pytest.raises(ValueError, match=r"weight has shape \(8, 3\), wanted \(K, d\) = \(3, 8\)"):
            function(statistics, weight.T)
    with pytest.raises(ValueError, match=r"class counts \(5, 6, 8\), the features are of class counts \(5, 6, 7\)"):
        nc_metrics(statistics, weight, solve(UFM([5, 6, 8], 1e-2, 1e-3)))
    for predictions in (labels[:2], labels[:, None], np.eye(18)[0], [0.0] * 18, np.eye(18, 3)):  # not argmax(1)
        with pytest.raises(ValueError, match=r"predictions are .*, wanted integers of shape \(18,\), such as logits"):
            statistics.update_within(features, labels, predictions)
    with pytest.raises(ValueError, match="predictions are a str that makes no tensor of numbers"):
        statistics.update_within(features, labels, "ants")
    assert statistics.within_counts.sum() == 18


def test_negative_features_beside_a_relu_optimum_are_a_warning(recwarn):
    features, labels, weight = samples([50, 60, 70], 8)
    statistics = statistics_of(features, labels, 3)
    assert math.isnan(ClassStatistics(3).negative_share) and statistics.negative_share == 0
    nc_metrics(statistics, weight, solve(UFM([50, 60, 70], 1e-2, 1e-3)))

    features[labels == 1, :3] *= -1  # 180 of 180 * 8 entries
    statistics = statistics_of(features, labels, 3)
    assert statistics.negative_share == pytest.approx(1 / 8)
    nc_metrics(statistics, weight)
    nc_metrics(statistics, weight, solve(UFM([50, 60, 70], 1e-2, 1e-3, relu=False)))
    assert [str(warning.message) for warning in recwarn] == []
    with pytest.warns(UserWarning, match=r"12\.50% of the features' entries are negative") as caught:
        nc_metrics(statistics, weight, solve(UFM([50, 60, 70], 1e-2, 1e-3)))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_it_runs_outside_the_checkout(tmp_path):
    """nc_metrics and nc_theory need torch, NumPy and SciPy, and nothing else of this repository."""
    for name in ("nc_metrics.py", "nc_theory"):
        (tmp_path / name).symlink_to(ROOT / name)
    code = "import nc_metrics, sys; print(*{name.split('.')[0] for name in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert not {"utils", "args", "engine", "matplotlib", "pandas"} & set(out.stdout.decode().split())


def test_an_optimum_that_needs_more_features_than_there_are_is_said():
    optimum = solve(UFM([20, 30, 50], lambda_w=5e-3, lambda_h=5e-5))
    for dim in (2, 3):
        features, labels, _ = samples([20, 30, 50], dim)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            nc_metrics(statistics_of(features, labels, 3), optimum=optimum)
        assert [str(of.message) for of in caught] == (dim < 3) * [
            "the optimum needs 3 directions, and the features have 2: no network with d = 2 reaches it"
        ]
