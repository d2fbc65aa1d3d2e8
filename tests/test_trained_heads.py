"""scripts/trained_heads.py without the packages that it installs: what it computes of a head, and reads from files."""

import io
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from nc_metrics import distance
from nc_theory import UFM, solve
from scripts import trained_heads


def test_the_row_of_a_head_at_the_theorem():
    """Counts of 40 classes in random order: norms rank as the counts do, and W W^T is that of the theorem."""
    counts = np.random.default_rng(0).permutation(np.arange(10.0, 410.0, 10.0))
    head = solve(UFM(counts.astype(int).tolist(), 1e-12, 1e-12)).head(40).numpy()
    row = trained_heads.row_of(head, -counts, counts)
    norms = np.linalg.norm(head, axis=1)
    assert row["classes"] == row["d"] == 40 and row["NC0"] == pytest.approx(0, abs=1e-9)
    assert row["common"] == pytest.approx(0, abs=1e-9) and row["untrained"] == 0
    assert row["norms_rank"] == pytest.approx(1) and row["biases_rank"] == pytest.approx(-1)
    assert row["majority"] == row["longest"] == pytest.approx(norms.max() / np.median(norms))
    assert row["optimum_WWT"] < 0.05 < row["ETF_WWT"]
    tenths = [np.median(part) / np.median(norms) for part in np.array_split(norms[np.argsort(counts)], 10)]
    assert [row[f"norm_{i}"] for i in range(1, 11)] == pytest.approx(tenths)
    assert row["norm_exponent"] == pytest.approx(0.25, abs=0.03) and row["optimum_WWT"] < row["optimum_WWT_large"]
    etf = trained_heads.row_of(np.eye(5) - 0.2, np.zeros(5), np.array([1.0, 2, 3, np.nan, 5]))
    assert etf["ETF_WWT"] == pytest.approx(0, abs=1e-9) and etf["rarest_cosine"] == pytest.approx(-0.25)
    assert etf["equiangularity_classifier"] == pytest.approx(0, abs=1e-9) and "norm_1" not in etf
    shifted = trained_heads.row_of(np.eye(5) - 0.2 + 3, np.zeros(5))
    assert shifted["ETF_centred"] < 1e-9 < shifted["ETF_WWT"]
    assert shifted["common"] == pytest.approx(5 * 5 * 9 / (4 + 5 * 5 * 9)) and "norms_rank" not in shifted


@pytest.mark.parametrize("collapsing", [0.5, 2.0])
def test_the_head_of_the_theorem_at_large_penalties(collapsing):
    """Classes of up to `collapsing` samples collapse, n_k <= N^2 lambda_W lambda_H K/(K-1)."""
    counts = torch.tensor([1.0, 3.0, 9.0, 20.0])
    penalty = (collapsing * 3 / 4) ** 0.5 / 33
    optimum = solve(UFM(counts.tolist(), penalty, penalty))
    head = optimum.head(4)
    assert optimum.collapsed.tolist() == [collapsing > 1, False, False, False]
    assert distance(head @ head.T, trained_heads.optimal_gram(counts, collapsing)) < 1e-9


def test_features_of_a_head_leave_out_classes_without_samples():
    torch.manual_seed(0)
    weight, labels = torch.randn(6, 8).double(), torch.tensor([0, 2, 5]).repeat(20)
    features = 3 * weight[labels] + 0.1 * torch.randn(60, 8).double()
    row = trained_heads.features_row(features, labels, weight, torch.zeros(6).double())
    assert (row["samples"], row["classes_seen"], row["acc1"], row["NC4"]) == (60, 3, 100, 0)
    assert 0 < row["NC1"] < row["NC1_corrected"] < 0.01 and row["alignment"] > 0.5


def test_fewer_samples_of_each_class():
    """The mean over disjoint parts, each of a third and a tenth of the samples of each class."""
    torch.manual_seed(0)
    labels, h = torch.tensor([0, 1]).repeat(30), torch.randn(60, 4)
    rows = [row for _, row in trained_heads.sampled("name", h, labels, np.eye(2, 4), np.zeros(2))]
    assert [(row["samples"], row["classes_seen"]) for row in rows] == [(60, 2), (20, 2), (6, 2)]
    order = labels.argsort(stable=True)
    parts = [
        trained_heads.features_row(h[part].double(), labels[part], torch.eye(2, 4).double(), torch.zeros(2))
        for part in (order[::3], order[1::3], order[2::3])
    ]
    assert rows[1]["NC1"] == pytest.approx(sum(part["NC1"] for part in parts) / 3)


def test_magika_reads_the_first_and_last_bytes_of_files_of_known_types(tmp_path):
    source = b"  \nprint(1)\n" * 100
    (tmp_path / "code.py").write_bytes(source)
    (tmp_path / "short.py").write_bytes(b"1")
    files = trained_heads.typed_files(tmp_path)
    assert sorted(kind for _, kind in files) == sorted(["python", *trained_heads.MADE_TYPES])
    with zipfile.ZipFile(io.BytesIO(dict((kind, content) for content, kind in files)["zip"])) as archive:
        assert archive.read("module.py") == source
    config = {"beg_size": 4, "block_size": 20, "padding_token": 256}
    assert trained_heads.magika_input(b" abcdefg\n", config) == [*b"abcd", *b"defg"]
    assert trained_heads.magika_input(b" ab\n", config) == [*b"ab\n", 256, 256, *b" ab"]


def test_tones_have_the_pitch_of_their_bin():
    """The strongest of the frequencies within 10 bins, by projection, is at most a bin away: 20 cents."""
    labels = torch.tensor([150, 200, 250])
    frames = trained_heads.tones(labels, torch.Generator().manual_seed(0)).double()
    assert frames.mean(1).abs().max() < 1e-6 and frames.std(1).sub(1).abs().max() < 1e-4
    for frame, label in zip(frames, labels, strict=True):
        bins = label + torch.arange(-10, 11)
        hertz = 10 * 2 ** ((1997.3794084376191 + 20 * bins.double()) / 1200)
        waves = (2j * torch.pi * hertz[:, None] * torch.arange(1024) / 16000).exp()
        harmonics = sum((waves**k @ frame.to(waves.dtype)).abs() ** 2 for k in range(1, 9))
        assert abs(bins[harmonics.argmax()] - label) <= 1


def test_the_layers_of_torchcrepe():
    """Ones on one channel: a convolution of width 1 in the middle, BatchNorm of nothing, and maxima of two by two."""
    state, sizes = {}, [512, 64, 64, 64, 64, 64]
    for i, size in enumerate(sizes, 1):
        state[f"conv{i}.weight"] = torch.zeros(1, 1, size, 1)
        state[f"conv{i}.weight"][0, 0, 254 if i == 1 else 31] = 1
        state[f"conv{i}.bias"] = torch.zeros(1)
        one, zero = torch.ones(1), torch.zeros(1)
        norm = {"running_mean": zero, "running_var": one - 1e-3, "weight": one, "bias": zero}
        state |= {f"conv{i}_BN.{name}": value for name, value in norm.items()}
    frames = torch.randn(2, 1024)
    maxima = frames[:, ::4].relu().reshape(2, 4, 64).amax(2)  # of 256 positions, in six halvings
    torch.testing.assert_close(trained_heads.crepe_layers(state, frames), maxima)


def test_the_packages_files_are_read(tmp_path):
    text = "const float kBias[] = {\n1.5f, -2.0e-3f,\n3.0,\n};\nconst float kWeights[] = {1.0f};"
    assert trained_heads.array_in_cpp(text, "kBias").tolist() == [1.5, -2e-3, 3]
    assert trained_heads.array_in_cpp(text, "kWeights").tolist() == [1]
    (tmp_path / "charsets.py").write_text("OLD = ['', 'a']\nNEW = ['', 'b']\nLONG = ['', 'a', 'b']\n")
    assert trained_heads.charset(tmp_path / "charsets.py", 2) == ["", "b"]
    found = trained_heads.frequencies_of(["", "a", "A", "x"], {"a": 0.5})
    np.testing.assert_equal(found, [np.nan, 0.5, 0.5, np.nan])
    genes = "TX_START\tTX_END\tEXON_START\n0\t100\t0,50,\n200\t300\t200,\n"
    (tmp_path / "genes.txt").write_text(genes)
    assert trained_heads.splice_frequencies(tmp_path / "genes.txt").tolist() == [198, 1, 1]


def test_the_recurrent_layer_of_a_head_is_that_of_its_numbers():
    """One step of a GRU with gates r, z, n, from the formulas."""
    random = np.random.default_rng(0)
    shapes = {"w_ih": (9, 3), "w_hh": (9, 3), "b_ih": 9, "b_hh": 9}
    values = {f"enc_{name}": random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    w_ih, w_hh, b_ih, b_hh = values.values()
    values = {name: torch.from_numpy(value) for name, value in values.items()}
    x, h = (random.standard_normal(3).astype(np.float32) for _ in range(2))
    of_x, of_h = w_ih @ x + b_ih, w_hh @ h + b_hh
    r, z = (1 / (1 + np.exp(-(of_x + of_h)[part])) for part in (slice(0, 3), slice(3, 6)))
    expected = (1 - z) * np.tanh(of_x[6:] + r * of_h[6:]) + z * h
    found, _ = trained_heads.gru(values, "enc")(torch.tensor(x)[None, None], torch.tensor(h)[None, None])
    np.testing.assert_allclose(found[0, 0].detach(), expected, rtol=1e-5)


def test_the_figure_of_the_heads_is_drawn_from_the_results(tmp_path):
    trained_heads.draw(pd.read_csv(trained_heads.HEADS), tmp_path / "heads.png")
    assert np.asarray(Image.open(tmp_path / "heads.png").convert("L")).std() > 10
