"""Figures, drawn from the CSV, npz, log and config of a recorded run: an MLP on digits, 80 epochs, seed 1."""

import json
import shutil
from itertools import combinations

import matplotlib.style
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from analysis.figures import (
    class_accuracy,
    curves,
    draw_runs,
    heatmaps,
    layers,
    show_two_powers,
    theorem,
    training,
    write_animation,
)
from analysis.panels import NC_PANELS, TRAINING_PANELS
from analysis.settings import make_settings, read_measured_run
from analysis.style import COLOURS, STYLE_FILE
from engine.run import drawn
from engine.tables import THEORY_SUFFIXES, read_rows, write_table
from nc_theory import UFM, released_formula, solve, solve_numerically
from tests.conftest import documented
from tests.recorded import (
    COUNTS,
    EPOCHS,
    LOG,
    RECORDED,
    ROWS,
    change_geometry,
    change_rows,
    geometry,
    recorded,
    save_nothing,
    set_config,
    three_seeds,
    without_saving,
    write_accuracies,
)
from utils import UserError


@pytest.fixture(autouse=True)
def style():
    """Apply the style that draw_runs uses."""
    with matplotlib.style.context(STYLE_FILE):
        yield


def settings_of(*folders, theory="objective", epoch=None):
    return make_settings([read_measured_run(folder, theory) for folder in folders], epoch)


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def legend_of(part):
    legend = part.get_legend() if hasattr(part, "get_legend") else part.legends[0]
    return [text.get_text() for text in legend.get_texts()]


# ---------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------


LACKING = {"class_accuracy", "layers"}  # figures for which the recorded runs have no data


def test_figures_of_a_run(run_script, tmp_path):
    """In the run's folder: PDFs with text in embedded TrueType fonts, PNGs of the same size, a GIF."""
    recorded(tmp_path / "run")
    out, _ = run_script("plot_nc.py", "run", "--animate")
    figures = {path.name: path for path in (tmp_path / "run" / "figures").glob("[!.]*")}
    assert {f"run/figures/{name}" for name in figures} == set(out.split())
    stills = sorted({*documented("results.md", "figure")} - LACKING)
    assert set(figures) == {f"{n}.{kind}" for n in stills for kind in ("pdf", "png")} | {"heatmaps_animation.gif"}
    assert set(drawn(tmp_path / "run" / "figures")) == set(figures)  # what --force deletes
    for name in stills:
        pdf = figures[f"{name}.pdf"].read_bytes()
        assert b"/FontFile2" in pdf and b"/Type3" not in pdf
        assert pdf.count(b"/Subtype /Image") == (2 if name == "heatmaps" else 0)  # its two colour bars
        assert Image.open(figures[f"{name}.png"]).width == (1000 if name == "heatmaps" else 1350)  # 5, 6.75 inches
    assert Image.open(figures["heatmaps_animation.gif"]).n_frames == len(EPOCHS)


def test_figures_of_several_runs(run_script, tmp_path):
    """In a folder of their own, with heatmaps per setting; the runs' folders are unchanged."""
    three_seeds(tmp_path)
    recorded(tmp_path / "other", lr=0.01)
    flags = ["seed1", "seed2", "seed3", "other", "other", "--out", "all", "--epoch", 41]
    run_script("plot_nc.py", *flags, before=without_saving)
    figures = {*documented("results.md", "figure"), "heatmaps_1_lr-0.001", "heatmaps_2_lr-0.01"}
    assert {path.stem for path in (tmp_path / "all").glob("[!.]*")} == figures - {"heatmaps"} - LACKING
    assert not (tmp_path / "seed1" / "figures").exists()
    run_script("plot_nc.py", "seed1", "seed2", before=without_saving)
    assert (tmp_path / "figures" / "heatmaps.pdf").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing"], "nothing: no such folder"),
        (["empty"], "empty: no rows in nc_metrics.csv; run validate_NC_unbalanced.py first"),
        (["run", "--theory", "nominal"], "run: no rows in nc_metrics_nominal.csv"),
        (["run", "--epoch", "7"], "run: no geometry of epoch 7, there are 1, 21, 41, 61, 80"),
        (["old"], "old/nc_metrics.csv: no column NC2_W; measure again with --recompute"),
        (["torn"], "torn/geometry/epoch_080.npz: missing or damaged; measure again with --recompute"),
        (["odd"], "odd/geometry/epoch_080.npz: missing or damaged"),
    ],
)
def test_missing_files_are_a_one_line_error(run_script, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    for name in ("run", "old", "torn", "odd"):
        recorded(tmp_path / name)
    path = tmp_path / "old" / "nc_metrics.csv"
    path.write_text(path.read_text().replace("NC2_W,", "other,"))
    path = tmp_path / "torn" / "geometry" / "epoch_080.npz"
    path.write_bytes(path.read_bytes()[:3000])
    path = tmp_path / "odd" / "geometry" / "epoch_080.npz"
    change_geometry(path, lambda name, array: array[:3] if name == "WWT_theory" else array)
    _, error = run_script("plot_nc.py", *flags, status=2)
    assert message in error and error.count("\n") == 1


def test_what_a_folder_lacks_is_left_out(monkeypatch, tmp_path):
    """A folder of bare checkpoints has no config and no log; a run without --sep_decay has no theory."""
    monkeypatch.setattr(Figure, "savefig", save_nothing)
    bare = recorded(tmp_path / "bare")
    for name in ("config.json", "train_log.jsonl"):
        (bare / name).unlink()
    figures = {path.stem for path in draw_runs([read_measured_run(bare)], bare / "figures")}
    assert {"nc_curves", "theorem", "heatmaps"} <= figures and figures.isdisjoint({"training", "class_accuracy"})
    figure = theorem(settings_of(bare))
    assert legend_of(figure) == ["measured at epoch 80", "theory"]  # no penalties known, so no threshold
    assert list(figure.axes[0].lines[1].get_xdata()) == list(geometry(80)["class_counts"])

    plain = recorded(tmp_path / "plain")
    unknown = ("NC2_H", "NC2_WWT", "NC3_WH")
    change_rows(plain, lambda column: column * np.nan if column.name in unknown else column)
    path = plain / "geometry" / "epoch_080.npz"
    change_geometry(path, lambda name, array: None if name.endswith("_theory") else array)
    assert legend_of(theorem(settings_of(plain))) == ["measured at epoch 80"]
    _, nc2, nc3 = curves(NC_PANELS, settings_of(plain)).axes
    assert [line.get_label() for line in nc2.lines] == ["$W$ against $H$"]
    assert [text.get_text() for text in nc3.texts] == ["no optimum known"] and not nc3.lines

    shutil.rmtree(plain / "geometry")
    figures = {path.stem for path in draw_runs([read_measured_run(plain)], plain / "new")}
    assert {"nc_curves", "training"} <= figures
    assert figures.isdisjoint({"theorem", "class_accuracy", "heatmaps"})


# ---------------------------------------------------------------------------------------------------------
# Against the epoch
# ---------------------------------------------------------------------------------------------------------


def test_curves_of_a_run_are_its_columns(tmp_path):
    run = settings_of(recorded(tmp_path / "run"))
    figure = curves(NC_PANELS, run)
    panels = figure.axes
    figure.draw_without_rendering()
    for axis in panels:  # the legend is off the curves, and the last point has a marker
        assert not axis.get_legend().get_window_extent().overlaps(axis.get_window_extent())
        assert all(line.get_markevery()[-1] == len(EPOCHS) - 1 for line in axis.lines)
    for axis, columns in zip(panels, (["NC1"], ["NC2_H", "NC2_WWT", "NC2_W"], ["NC3_WH"]), strict=True):
        assert axis.get_yscale() == "log" and axis.get_xlabel() == "epoch" and not axis.collections
        for line, column in zip(axis.lines, columns, strict=True):
            assert list(line.get_xdata()) == EPOCHS
            np.testing.assert_allclose(line.get_ydata(), ROWS[column], rtol=1e-12)
    assert [axis.get_title() for axis in panels] == ["NC1", "NC2", "NC3"]
    assert legend_of(panels[0]) == [r"tr$(\Sigma_W\Sigma_B^\dagger)/K$"]

    loss, accuracy, rate = curves(TRAINING_PANELS, run).axes
    assert legend_of(loss) == ["objective", "cross entropy", "optimum, 0.958"] and legend_of(accuracy) == [
        "training",
        "test",
    ]
    lines = [*loss.lines[:2], accuracy.lines[0], rate.lines[0]]
    for line, column in zip(lines, ["loss", "ce", "train_acc1", "lr"], strict=True):
        assert list(line.get_xdata()) == list(range(1, 81))
        np.testing.assert_allclose(line.get_ydata(), [entry[column] for entry in LOG], rtol=1e-12)
    np.testing.assert_allclose(accuracy.lines[1].get_ydata(), ROWS["test_acc1"])
    assert accuracy.get_yscale() == "linear" and loss.get_yscale() == rate.get_yscale() == "log"


def test_the_loss_of_a_file_bears_its_own_name(tmp_path):
    run = recorded(tmp_path / "run")
    log, config = run / "train_log.jsonl", json.loads((run / "config.json").read_text())
    log.write_text(log.read_text().replace('"ce"', '"my_losses.focal"'))
    (run / "config.json").write_text(json.dumps(config | {"data_column": "my_losses.focal"}))
    axis = training(settings_of(run), "epoch").axes[0]
    assert legend_of(axis) == ["objective", "my_losses.focal", "optimum, 0.958"]
    np.testing.assert_allclose(axis.lines[1].get_ydata(), [entry["ce"] for entry in LOG], rtol=1e-12)


def test_the_loss_ends_at_the_optimum_of_what_was_minimised(tmp_path):
    """`released` halves the data term, and so the optimum of the objective."""
    released = recorded(tmp_path / "released", objective="released")
    problem = UFM(COUNTS, lambda_w=2 * 0.01, lambda_h=2 * 0.0005 / 10)  # ten batches an epoch
    line = curves(TRAINING_PANELS, settings_of(released)).axes[0].lines[2]
    np.testing.assert_allclose(line.get_ydata(), solve(problem).loss / 2, rtol=1e-12)
    assert line.get_label() == f"optimum, {solve(problem).loss / 2:.4g}"

    settings = settings_of(released, recorded(tmp_path / "paper", objective="paper"))
    figure = curves(TRAINING_PANELS, settings)
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "-", "--", "--"]
    assert [text.split(", ")[1] for text in legend_of(figure)][1] == "dashed: optimum 0.958"
    unknown = settings_of(recorded(tmp_path / "plain", sep_decay=False))
    assert legend_of(curves(TRAINING_PANELS, unknown).axes[0]) == ["objective", "cross entropy"]
    nominal = recorded(tmp_path / "nominal")
    (nominal / "nc_metrics.csv").rename(nominal / "nc_metrics_nominal.csv")
    assert len(curves(TRAINING_PANELS, settings_of(nominal, theory="nominal")).axes[0].lines) == 2


def test_the_optimum_is_that_of_the_penalties_of_the_moment(tmp_path):
    """Otherwise the objective would lie below it while the penalties rise."""
    run = recorded(tmp_path / "run")
    path = run / "train_log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["penalty_scale"] = min(1, (line["epoch"] - 1) / 20)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    axis = curves(TRAINING_PANELS, settings_of(run)).axes[0]
    optimum = dict(zip(*axis.lines[2].get_data(), strict=True))
    for epoch in (2, 11, 20, 21, 80):
        scale = min(1, (epoch - 1) / 20)
        expected = solve(UFM(COUNTS, lambda_w=0.01 * scale, lambda_h=0.0005 * scale)).loss
        assert optimum[epoch] == pytest.approx(expected, rel=1e-12)
    assert np.isnan(optimum[1]) and legend_of(axis)[2] == "optimum, 0.958"  # without penalties there is none


def test_a_logarithmic_axis_shows_two_powers_of_ten(tmp_path):
    axis = Figure().subplots()
    for low, high, powers in (
        (0.3, 0.8, {0.1, 1}),
        (0.13, 1.1, {0.1, 1}),
        (2, 90, {1, 10, 100}),
        (0.01, 10, {0.01, 10}),
    ):
        axis.clear()
        axis.set(yscale="log", ylim=(low, high))
        show_two_powers(axis)
        bottom, top = axis.get_ylim()
        inside = [power for power in powers if bottom * 0.999 <= power <= top * 1.001]
        assert len(inside) >= 2 and bottom <= low and top >= high and top / bottom <= 10 * high / low


def test_the_axes_say_what_is_small(tmp_path):
    panels = curves(NC_PANELS, settings_of(recorded(tmp_path / "run"))).axes
    assert [axis.get_ylabel() for axis in panels] == ["variability within classes", *["distance to the theorem"] * 2]


def test_seeds_are_mean_and_range(tmp_path):
    """Three seeds at 1, 2 and 4 times the recorded values: geometric mean 2, arithmetic mean 7/3, range 1 to 4."""
    seeds = settings_of(*three_seeds(tmp_path))
    for panels, axis, column, mean in (
        (NC_PANELS, 0, "NC1", 2),
        (NC_PANELS, 2, "NC3_WH", 2),
        (TRAINING_PANELS, 1, "test_acc1", 7 / 3),
    ):
        figure = curves(panels, seeds)
        line, band = figure.axes[axis].lines[-1], figure.axes[axis].collections[-1].get_paths()[0].vertices
        np.testing.assert_allclose(line.get_ydata(), mean * ROWS[column], rtol=1e-12)
        for epoch, value in zip(EPOCHS, ROWS[column], strict=True):
            edge = band[band[:, 0] == epoch, 1]
            np.testing.assert_allclose([edge.min(), edge.max()], [value, 4 * value], rtol=1e-12)
        assert legend_of(figure) == ["3 seeds: mean over seeds (geometric on log axes) and range"]


def test_seeds_are_drawn_where_all_have_a_value(tmp_path):
    folders = three_seeds(tmp_path)
    path = folders[1] / "nc_metrics.csv"
    write_table(path, read_rows(path)[:3])
    seeds = settings_of(*folders)
    assert list(curves(NC_PANELS, seeds).axes[0].lines[0].get_xdata()) == EPOCHS[:3]
    assert seeds[0].epoch == 41
    with pytest.raises(UserError, match="no geometry of epoch 80, there are 1, 21, 41"):
        settings_of(*folders, epoch=80)


def test_curves_against_steps_and_minutes(tmp_path):
    """Digits: 1,020 images in batches of 102, ten steps an epoch; seeds that took 1, 2 and 4 times as long."""
    seeds = settings_of(*three_seeds(tmp_path))
    minutes = np.cumsum([line["seconds"] for line in LOG])[np.array(EPOCHS) - 1] * 7 / 3 / 60
    for x, label, ends in (
        ("step", "optimizer step", 10 * np.array(EPOCHS)),
        ("minutes", "minutes of training", minutes),
    ):
        axis = curves(NC_PANELS, seeds, x).axes[0]
        assert axis.get_xlabel() == label
        np.testing.assert_allclose(axis.lines[0].get_xdata(), ends, rtol=1e-12)
        np.testing.assert_allclose(axis.lines[0].get_ydata(), 2 * ROWS["NC1"], rtol=1e-12)
    for name, x in (("train_log.jsonl", "minutes"), ("config.json", "step")):
        bare = recorded(tmp_path / x)
        (bare / name).unlink()
        with pytest.raises(UserError, match=f"{x}: no {name}: --x {x} is not known"):
            curves(NC_PANELS, settings_of(bare), x)


def test_settings_are_overlaid_and_named_by_what_differs(tmp_path):
    settings = settings_of(*three_seeds(tmp_path), recorded(tmp_path / "other", 0.5, lr=0.01))
    figure = curves(NC_PANELS, settings)
    columns = ["NC1", "NC2_H", "NC2_WWT", "NC2_W", "NC3_WH"]
    assert [axis.get_title().split(",")[0] for axis in figure.axes[:5]] == ["NC1", "NC2", "NC2", "NC2", "NC3"]
    for axis, column in zip(figure.axes, columns, strict=False):
        first, second = axis.lines
        np.testing.assert_allclose(first.get_ydata(), 2 * ROWS[column], rtol=1e-12)
        np.testing.assert_allclose(second.get_ydata(), 0.5 * ROWS[column], rtol=1e-12)
        assert first.get_color() != second.get_color() and first.get_marker() != second.get_marker()
        assert len(axis.collections) == 1  # the band of the seeds
    assert legend_of(figure) == ["lr 0.001, 3 seeds", "lr 0.01"]
    assert len(curves(TRAINING_PANELS, settings).axes) == 6  # two losses, two accuracies, lr, one blank


# ---------------------------------------------------------------------------------------------------------
# Against n_k
# ---------------------------------------------------------------------------------------------------------


def test_the_theorem_is_a_curve_over_n_k(tmp_path):
    """The theorem's formula in NumPy, as a function of n_k at the run's N and K, with the threshold of collapse."""
    lambda_w, lambda_h, total, classes = 0.01, 0.0005, 1020, 10
    figure = theorem(settings_of(recorded(tmp_path / "run")))
    sizes = figure.axes[0].lines[1].get_xdata()
    ratio = np.sqrt(sizes) / (total * np.sqrt(lambda_w * lambda_h * (classes - 1) / classes))
    margins = np.maximum(0, np.log(np.maximum((classes - 1) * (ratio - 1), 1e-300)))
    norms = margins * np.sqrt((classes - 1) * lambda_w / (classes * lambda_h * sizes))
    threshold = total**2 * lambda_w * lambda_h * classes / (classes - 1)
    assert sizes[0] < threshold < 34 and sizes[-1] > 170
    for axis, name, expected in zip(figure.axes, ("margins", "mean_norms_sq"), (margins, norms), strict=True):
        points, curve, collapse = axis.lines
        np.testing.assert_allclose(points.get_xdata(), geometry(80)["class_counts"])
        np.testing.assert_allclose(points.get_ydata(), geometry(80)[name])
        np.testing.assert_allclose(curve.get_ydata(), expected, rtol=1e-9)
        np.testing.assert_allclose(collapse.get_xdata(), threshold)
    assert legend_of(figure) == ["measured at epoch 80", "theory", "collapse threshold 5.78 (below all classes)"]


def test_a_threshold_far_from_the_classes_is_in_the_legend_alone(tmp_path):
    run = recorded(tmp_path / "run")
    problem = {"class_counts": COUNTS, "lambda_w": 0.01, "lambda_h": 5e-6}
    set_config(run, problems={"objective": problem, "nominal": problem})
    figure = theorem(settings_of(run))
    assert len(figure.axes[0].lines) == 2 and figure.axes[0].get_xlim()[0] > 10
    assert legend_of(figure)[2] == "collapse threshold 0.0578 (below all classes)"


@pytest.mark.parametrize("counts", [COUNTS, [102] * 10, [1, 900]])
@pytest.mark.parametrize(
    ("theory", "loss", "bias", "form"),
    [
        ("objective", "CrossEntropy", False, solve),
        ("objective", "MSE", False, solve),
        ("objective", "CrossEntropy", True, lambda problem: solve_numerically(problem, starts=1).optimum),
        ("nominal", "CrossEntropy", True, solve),
        ("released", "CrossEntropy", False, released_formula),
    ],
)
def test_the_curve_meets_the_theory_of_the_classes(tmp_path, theory, loss, bias, form, counts):
    """For every theory, the curve at the run's n_k has the values that validation stored."""
    run = recorded(tmp_path / "run", counts=counts, loss=loss, bias=bias)
    suffix = THEORY_SUFFIXES[theory]
    optimum = form(UFM(counts, 0.01, 0.0005, loss, bias=bias and theory == "objective"))
    names = ("HTH", "WWT", "WH", "margins", "mean_norms_sq")
    arrays = {name + end: getattr(optimum, name).numpy() for name in names for end in ("", "_theory")}
    np.savez(run / "geometry" / "epoch_080.npz", class_counts=counts, **arrays)
    if suffix:
        (run / "nc_metrics.csv").rename(run / f"nc_metrics{suffix}.csv")
        (run / "geometry").rename(run / f"geometry{suffix}")
    figure = theorem(settings_of(run, theory=theory))
    for axis, name in zip(figure.axes, ("margins", "mean_norms_sq"), strict=True):
        curve = axis.lines[1]
        found = np.interp(counts, curve.get_xdata(), curve.get_ydata())
        np.testing.assert_allclose(found, getattr(optimum, name), rtol=0.01, atol=1e-3)
        assert bias or len(set(curve.get_xdata())) == 100
        assert axis.get_xscale() == ("log" if max(counts) > 100 * min(counts) else "linear")
    has_threshold = theory == "nominal" or (theory == "objective" and not bias)
    assert len(legend_of(figure)) == 2 + has_threshold


def test_seeds_are_spread_about_their_mean(tmp_path):
    """1, 2 and 4 times the recorded geometry: points at 7/3, bars from 1 to 4."""
    figure = theorem(settings_of(*three_seeds(tmp_path)))
    for axis, name in zip(figure.axes, ("margins", "mean_norms_sq"), strict=True):
        recorded_values = geometry(80)[name]
        (bars,) = axis.collections
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(axis.lines[0].get_ydata(), 7 / 3 * recorded_values)
        np.testing.assert_allclose(ends, np.stack([recorded_values, 4 * recorded_values], axis=1))
    assert legend_of(figure)[0] == "measured at epoch 80, mean and range over 3 seeds"


def test_seeds_with_the_same_result_are_a_point(tmp_path):
    """The mean of three equal floats may be off by rounding, on either side."""
    figure = theorem(settings_of(*(recorded(tmp_path / f"{seed}", seed=seed) for seed in (1, 2, 3))))
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), geometry(80)["margins"])


def test_settings_in_the_theorem_have_a_row_each(tmp_path):
    settings = settings_of(*three_seeds(tmp_path), recorded(tmp_path / "other", bias=True))
    figure = theorem(settings)
    assert legend_of(figure) == [
        "bias off, mean and range over 3 seeds, collapse threshold 5.78 (below all classes)",
        "bias on",
    ]
    assert figure.legends[0].get_title().get_text() == "measured at epoch 80; theory; collapse threshold"


def test_test_accuracy_of_each_class(monkeypatch, tmp_path):
    """Points are the mean over the seeds, bars their range, and the line is the mean of the classes with equal n_k."""
    monkeypatch.setattr(Figure, "savefig", save_nothing)
    folders = three_seeds(tmp_path)
    values = np.arange(10.0)
    assert "class_accuracy" not in {
        path.stem for path in draw_runs([read_measured_run(folders[0])], tmp_path / "figures")
    }
    for folder, factor in zip(folders, (1, 2, 6), strict=True):
        write_accuracies(folder, factor * values)
    figure = class_accuracy(settings_of(*folders))
    (axis,) = figure.axes
    points, *_, line, threshold = axis.lines
    np.testing.assert_allclose(points.get_ydata(), 3 * values)
    np.testing.assert_allclose(threshold.get_xdata(), 1020**2 * 0.01 * 0.0005 * 10 / 9)
    np.testing.assert_allclose(line.get_xdata(), COUNTS[::2])
    np.testing.assert_allclose(line.get_ydata(), 3 * np.array([0.5, 2.5, 4.5, 6.5, 8.5]))
    ends = np.array([segment[:, 1] for segment in axis.collections[0].get_segments()])
    np.testing.assert_allclose(ends, np.stack([values, 6 * values], axis=1))
    assert legend_of(figure) == [
        "measured at epoch 80, mean and range over 3 seeds",
        "mean at equal $n_k$",
        "collapse threshold 5.78 (below all classes)",
    ]
    other = recorded(tmp_path / "other", bias=True)
    write_accuracies(other, values)
    assert (class_accuracy(settings_of(*folders, other)).get_size_inches()[0] == figure.get_size_inches()[0]).all()
    assert "class_accuracy" in {path.stem for path in draw_runs([read_measured_run(folders[0])], tmp_path / "figures")}
    assert "class_accuracy" not in {
        path.stem for path in draw_runs([read_measured_run(folders[0])], tmp_path / "61", epoch=61)
    }


ODD_NAMES = ["$x_1$", "a_b^2", "$", "<b>&", r"\alpha", "{}", "%", "n" * 200, "cat", "dog"]


def test_names_of_classes_are_drawn_as_they_are(tmp_path):
    """Beside the points and the matrices, without mathtext, and cut where they are long."""
    folder = recorded(tmp_path / "run")
    set_config(folder, class_names=ODD_NAMES)
    write_accuracies(folder, np.arange(10.0))
    (setting,) = settings_of(folder)
    for figure, width in ((class_accuracy([setting]), 16), (heatmaps(geometry(80), 80, names=ODD_NAMES), 12)):
        figure.savefig(tmp_path / "x.pdf")
        named = {text.get_text(): text for text in texts(figure)}
        for name in ODD_NAMES:
            text = named[name if len(name) < width else name[: width - 1] + "…"]
            assert not text.get_parse_math()
    (numbers,) = settings_of(recorded(tmp_path / "unnamed"))
    assert numbers.class_names is None


def test_folders_with_dollar_signs_are_drawn_as_they_are(tmp_path):
    folders = [recorded(tmp_path / "$x_1$" / name, seed=1, lr=lr) for name, lr in (("a$", 0.1), ("b", 0.2))]
    for folder in folders:
        (folder / "config.json").unlink()
    figure = curves(NC_PANELS, settings_of(*folders))
    figure.savefig(tmp_path / "x.pdf")
    assert legend_of(figure)[0].replace(r"\$", "$") == "a$"


# ---------------------------------------------------------------------------------------------------------
# Matrices
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [41, 80])
def test_heatmaps_are_the_matrices_of_the_epoch(epoch):
    """On the theory's colour scale; the norms of the differences are the distances of the CSV."""
    parts = dict(geometry(epoch))
    axes = np.array(heatmaps(parts, epoch).axes[:9]).reshape(3, 3)
    meshes = [[axis.collections[0] for axis in row] for row in axes]
    row = ROWS[EPOCHS.index(epoch)]
    for column, (name, metric) in enumerate((("HTH", "NC2_H"), ("WWT", "NC2_WWT"), ("WH", "NC3_WH"))):
        measured, theory, difference = (np.asarray(meshes[k][column].get_array()).reshape(10, 10) for k in range(3))
        np.testing.assert_allclose(measured, parts[name] / np.linalg.norm(parts[name]))
        np.testing.assert_allclose(theory, parts[f"{name}_theory"] / np.linalg.norm(parts[f"{name}_theory"]))
        np.testing.assert_allclose(difference, measured - theory)
        assert np.linalg.norm(difference) == pytest.approx(row[metric], rel=1e-6)
        assert axes[2, column].get_title() == f"distance {row[metric]:.2g}"
    for rows in (meshes[:2], meshes[2:]):
        limits = {mesh.get_clim() for row in rows for mesh in row}
        (low, high) = limits.pop()
        assert not limits and low == -high
        assert high == max(abs(mesh.get_array()).max() for row in rows for mesh in row)
    assert [axis.get_title() for axis in axes[0]] == [r"$H^{\!\top}\!H$", r"$WW^{\!\top}$", "$WH$"]
    low, high = axes[0, 0].get_ylim()
    assert low > high  # class 0 is at the top, as in a matrix


def test_heatmaps_without_a_theory_or_with_all_classes_collapsed():
    parts = {name: array for name, array in geometry(80).items() if not name.endswith("_theory")}
    assert len(heatmaps(parts, 80).axes) == 4  # three matrices and a colour bar
    nothing = {name: np.zeros((10, 10)) for name in ("HTH", "WWT", "WH", "HTH_theory", "WWT_theory", "WH_theory")}
    heatmaps(nothing, 80).savefig("/dev/null", format="png")


def test_the_animation_goes_through_the_checkpoints_on_fixed_scales(tmp_path):
    """The last frame shows the last epoch, on colour scales that cover the entries of all epochs."""
    path = tmp_path / "animation.gif"
    write_animation(path, settings_of(RECORDED)[0])
    gif = Image.open(path)
    frames = []
    for number in range(gif.n_frames):
        gif.seek(number)
        frames.append(np.asarray(gif.convert("RGB"), float))
    assert len(frames) == len(EPOCHS) and path.stat().st_size < 5e6

    def largest(rows):
        return max(np.abs(array / np.linalg.norm(array)).max() for array in rows)

    names = ("HTH", "WWT", "WH")
    parts = [geometry(epoch) for epoch in EPOCHS]
    matrices = largest(part[name + end] for part in parts for name in names for end in ("", "_theory"))
    differences = max(
        np.abs(part[n] / np.linalg.norm(part[n]) - part[f"{n}_theory"] / np.linalg.norm(part[f"{n}_theory"])).max()
        for part in parts
        for n in names
    )
    heatmaps(dict(parts[-1]), 80, limits=(matrices, differences)).savefig(tmp_path / "last.png", dpi=110)
    last = np.asarray(Image.open(tmp_path / "last.png").convert("RGB"), float)
    assert np.abs(frames[-1] - last).mean() < 2 < np.abs(frames[0] - last).mean()


# ---------------------------------------------------------------------------------------------------------
# On paper
# ---------------------------------------------------------------------------------------------------------


COLOUR_BLIND = (  # linear RGB as seen without red or green cones: Viénot, Brettel and Mollon, 1999
    [[0.1124, 0.8876, 0], [0.1124, 0.8876, 0], [0.004, -0.004, 1]],
    [[0.2928, 0.7072, 0], [0.2928, 0.7072, 0], [-0.0223, 0.0223, 1]],
)


def shown(figure):
    """The texts on the page, without the labels of ticks outside their axis."""
    figure.draw_without_rendering()
    hidden = set()
    for axis in (each for axes in figure.axes for each in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        hidden |= {id(tick.label1) for tick in ticks if not low <= tick.get_loc() <= high}
        hidden |= {id(tick.label2) for tick in ticks if not low <= tick.get_loc() <= high}
    return [text for text in texts(figure) if id(text) not in hidden]


def with_layers(folder):
    """Add layers.csv of two measurements of three layers to a run."""
    rows = [
        {"epoch": epoch, "layer": layer, "split": split, "NC1": value, "CDNV": value, "NCM_acc1": 90 + value}
        for epoch in (1, 80)
        for value, layer in enumerate(("layers.0", "layers.2", "fc"), 1)
        for split in ("train", "test")
    ]
    write_table(folder / "nc_layers.csv", pd.DataFrame(rows))


@pytest.mark.parametrize("case", ["three seeds", "ten settings", "names"])
def test_texts_are_readable_and_nothing_overlaps(tmp_path, case):
    """All text is at 8 points or more at print size and inside the page; texts and legends are clear of each other."""
    folders = [recorded(tmp_path / "run")] if case == "names" else three_seeds(tmp_path)
    count = 10 if case == "ten settings" else 1
    folders += [recorded(tmp_path / f"{n}", n, lr=n, weight_decay=0.1, loss="MSE") for n in range(2, count + 1)]
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for folder in folders:
        with_layers(folder)
        write_accuracies(folder, [3.3, 3.1, 7, 6, 37, 15, 28, 23, 57, 51])
        set_config(folder, **{"class_names": names} if case == "names" else {})
    settings = settings_of(*folders)
    figures = [curves(NC_PANELS, settings), curves(TRAINING_PANELS, settings), theorem(settings)]
    figures += [class_accuracy(settings), layers(settings)]
    parts, names = settings[0].geometries[0], settings[0].class_names
    figures.append(heatmaps(parts, 80, settings[0].note, names=names))
    figures.append(heatmaps({name: array for name, array in parts.items() if not name.endswith("_theory")}, 80))
    for figure in figures:
        found = shown(figure)
        width, height = figure.get_size_inches()
        assert width <= 6.75
        page = figure.get_tightbbox()
        assert page.x0 >= 0 and page.y0 >= 0 and page.x1 <= width and page.y1 <= height
        assert min(text.get_fontsize() for text in found) >= 8
        boxes = [(text, text.get_window_extent()) for text in found]
        for (one, box), (other, of_other) in combinations(boxes, 2):
            assert not box.overlaps(of_other), (one, other)
        for legend in figure.legends:
            assert not any(legend.get_window_extent().overlaps(axis.get_tightbbox()) for axis in figure.axes)


def test_ten_settings_look_different(tmp_path):
    """Each has its own colour, marker and line; the colours differ for red-blind and green-blind readers, too."""
    settings = settings_of(*(recorded(tmp_path / f"{n}", lr=n) for n in range(1, 11)))
    lines = curves(NC_PANELS, settings).axes[0].lines
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == len({(line.get_color(), line.get_marker()) for line in lines}) == 10
    linear = np.array([to_rgb(f"#{colour.lstrip('#')}") for colour in COLOURS]) ** 2.2
    for seen in COLOUR_BLIND:  # distances in RGB from 0 to 1
        colours = np.clip(linear @ np.array(seen).T, 0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(colours[:, None] - colours, axis=2)[~np.eye(len(colours), dtype=bool)]
        assert distances.min() > 0.1


def test_images_of_a_class_on_a_logarithmic_axis_are_numbers(tmp_path):
    counts = [1, 2, 4, 7, 13, 21, 36, 61, 101, 170]
    run = recorded(tmp_path / "run", counts=counts)
    for path in (run / "geometry").iterdir():
        change_geometry(path, lambda name, array: np.array(counts) if name == "class_counts" else array)
    axis = theorem(settings_of(run)).axes[0]
    assert axis.get_xscale() == "log"
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "2", "5", "10", "20", "50", "100"]


def test_figures_name_their_theory_and_statistics(tmp_path, monkeypatch):
    run, titles = recorded(tmp_path / "run"), []
    (run / "nc_metrics.csv").rename(run / "nc_metrics_bn_nominal.csv")
    (run / "geometry").rename(run / "geometry_bn_nominal")
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: titles.append(figure.get_suptitle()))
    paths = draw_runs([read_measured_run(run, "nominal", "training_set")], tmp_path / "figures")
    assert len(paths) == len(titles) >= 8 and all(path.stem.endswith("_bn_nominal") for path in paths)
    assert all("theory nominal, training-set BatchNorm statistics" in title for title in titles)
