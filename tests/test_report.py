"""The report: its content and size, and the page in a real headless Chromium."""

import base64
import gzip
import io
import json
import re
import sys
from html import unescape

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis.panels import GAPS
from analysis.report import POINTS, write_report
from analysis.settings import read_measured_run
from engine.run import Run
from engine.tables import write_table
from tests.browser import CHROMIUM, chromium
from tests.conftest import TINY
from tests.recorded import (
    EPOCHS,
    LOG,
    ROWS,
    change_geometry,
    change_rows,
    geometry,
    recorded,
    set_config,
    three_seeds,
    write_accuracies,
)

go = pytest.importorskip("plotly.graph_objects", reason="Plotly is not installed")
MATRICES = ("HTH", "WWT", "WH")


def unpacked(page, name):
    text = re.search(f'<script id="{name}" type="application/gzip">(.*?)</script>', page)[1]
    return gzip.decompress(base64.b64decode(text)).decode()


def page_of(runs, folder):
    """The page of runs, and its data."""
    page = write_report(runs, folder / "report.html").read_text(encoding="utf-8")
    return page, json.loads(unpacked(page, "data"))


NC1 = "NC1, tr(Σ<sub>W</sub>Σ<sub>B</sub><sup>†</sup>)/K"


def report_of(*folders):
    return page_of([read_measured_run(folder) for folder in folders], folders[0].parent)


def traces_of(data, title):
    (panel,) = (p for panels in data["panels"].values() for p in panels if p["layout"]["title"]["text"] == title)
    return panel["data"]


def tables(page):
    """The tables of a page, each as {head: [cell of each row]}."""
    found = []
    for table in re.findall("<table.*?</table>", page, re.S):
        cells = [
            unescape(cell.replace("<br>", " ").replace("<wbr>", "")) for cell in re.findall("<t[hd]>(.*?)</t", table)
        ]
        width = table.count("<th>")
        found.append({head: cells[width + column :: width] for column, head in enumerate(cells[:width])})
    return found


def normalised(matrix):
    return matrix / np.linalg.norm(matrix)


def without_plotly():
    sys.modules["plotly"] = None
    without_figures()


def without_figures():
    """Have validate draw no figures but the report."""
    import analysis.figures

    analysis.figures.draw_runs = lambda runs, folder, *options: [folder / "none.pdf"]


# ---------------------------------------------------------------------------------------------------------
# Content
# ---------------------------------------------------------------------------------------------------------


def test_the_script_writes_one_file_that_needs_no_other(run_script, tmp_path):
    recorded(tmp_path / "run")
    out, _ = run_script("report.py", "run", "--out", "new/page.html")
    assert out == "new/page.html\n"
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert len(page) < 2.5e6 and page.count('<script id="plotly"') == 1 and "plotly.js v" in unpacked(page, "plotly")
    assert not re.search(r"(src|href)\s*=\s*.?http", page)
    assert "<h1>Neural collapse: run</h1>" in page and "<li><b>width</b> 256</li>" in page
    assert "least loss 0.957966" in page and "<b>torch</b>" in page


def test_panels_of_a_run_are_its_columns(tmp_path):
    write_accuracies(recorded(tmp_path / "run"), range(60, 70))
    _, data = report_of(tmp_path / "run")
    assert NC1 in [panel["layout"]["title"]["text"] for panel in data["panels"]["curves"]]
    titles = [NC1, "NC2, HᵀH", "NC2, WWᵀ", "NC2, W against H", "NC3, WH", "accuracy, test"]
    columns = ("NC1", "NC2_H", "NC2_WWT", "NC2_W", "NC3_WH", "test_acc1")
    for title, column in zip(titles, columns, strict=True):
        (trace,) = traces_of(data, title)
        assert trace["x"] == EPOCHS and trace["mode"] == "lines+markers"
        np.testing.assert_allclose(trace["y"], ROWS[column], rtol=1e-3)
    loss, optimum = traces_of(data, "loss, objective")
    np.testing.assert_allclose(loss["y"], [line["loss"] for line in LOG], rtol=1e-3)
    assert optimum["line"]["dash"] == "dot" and optimum["y"] == pytest.approx([0.958] * 2, abs=1e-3)
    parts = geometry(80)
    for title, name in (("margin M<sub>k</sub>", "margins"), ("class-mean norm ‖μ<sub>k</sub>‖²", "mean_norms_sq")):
        line, points = traces_of(data, title)
        assert points["x"] == list(parts["class_counts"])
        np.testing.assert_allclose(points["y"], parts[name], rtol=1e-3)
        at_counts = np.interp(parts["class_counts"], line["x"], line["y"])
        np.testing.assert_allclose(at_counts, parts[f"{name}_theory"], rtol=5e-3)
    assert traces_of(data, "test accuracy")[0]["y"] == list(range(60, 70))
    for panel in data["panels"]["classes"]:  # with the threshold of collapse
        (line,) = panel["layout"]["shapes"]
        assert line["x0"] == line["x1"] == pytest.approx(1020**2 * 0.01 * 0.0005 * 10 / 9)


def test_seeds_are_mean_and_range_and_the_table_has_their_deviation(tmp_path):
    """Seeds at 1, 2 and 4 times the recorded values: geometric mean 2, arithmetic mean 7/3."""
    page, data = report_of(*three_seeds(tmp_path))
    mean, band = traces_of(data, NC1)
    np.testing.assert_allclose(mean["y"], 2 * ROWS["NC1"], rtol=1e-3)
    np.testing.assert_allclose(band["y"], [*ROWS["NC1"], *4 * ROWS["NC1"][::-1]], rtol=1e-3)
    assert mean["text"][-1] == f"<br>{ROWS['NC1'][-1]:.3g} to {4 * ROWS['NC1'][-1]:.3g} over the seeds"
    points = traces_of(data, "margin M<sub>k</sub>")[1]
    np.testing.assert_allclose(points["error_y"]["array"], (4 - 7 / 3) * geometry(80)["margins"], rtol=1e-3)
    runs, metrics, _ = tables(page)
    assert runs["seed"][0] == "1, 2, 3"
    values = ROWS["NC2_H"][-1] * np.array([1, 2, 4])
    assert metrics["NC2_H"][0] == f"{values.mean():.2g} ± {values.std(ddof=1):.1g}"


def test_settings_are_numbered_and_a_table_says_how_they_differ(tmp_path):
    folders = [*three_seeds(tmp_path), recorded(tmp_path / "other", lr=0.01, run_name="<b>mine</b>")]
    page, data = report_of(*folders)
    runs, metrics, _ = tables(page)
    assert runs["setting"] == ["1", "2"] and runs["lr"] == ["0.001", "0.01"]
    assert set(runs) == {"setting", "lr", "seed"} and "<li><b>width</b> 256</li>" in page
    assert metrics["setting"][1] == "2: <b>mine</b>" and "2: &lt;b&gt;mine&lt;/b&gt;</button>" in page
    for panels in data["panels"].values():
        for panel in panels:
            assert {trace["legendgroup"] for trace in panel["data"]} == {"0", "1"}
            assert len({trace["line"]["color"] for trace in panel["data"]}) == 2


def test_matrices_are_the_theory_and_the_differences_of_each_epoch(tmp_path):
    _, data = report_of(recorded(tmp_path / "run"))
    (entry,) = data["heatmaps"]
    assert entry["epochs"] == EPOCHS and entry["classes"] == [*range(10)]
    for epoch, frame, distances in zip(EPOCHS, entry["frames"], entry["distances"], strict=True):
        parts = geometry(epoch)
        whole = [normalised(parts[name]) - normalised(parts[f"{name}_theory"]) for name in MATRICES]
        np.testing.assert_allclose(distances, np.linalg.norm(whole, axis=(1, 2)), rtol=1e-3)
        for name, theory, difference in zip(MATRICES, entry["theory"], frame, strict=True):
            np.testing.assert_allclose(theory, normalised(parts[f"{name}_theory"]), rtol=1e-3)
            np.testing.assert_allclose(np.add(theory, difference), normalised(parts[name]), rtol=2e-3, atol=1e-4)


def test_of_many_classes_some_are_shown_and_all_are_counted(tmp_path):
    folder = recorded(tmp_path / "run")
    for path in (folder / "geometry").iterdir():
        change_geometry(path, lambda name, array: np.pad(array, (0, 990), constant_values=int(name == "class_counts")))
    set_config(folder, class_counts=[1] * 1000, problems={})
    _, data = report_of(folder)
    (entry,) = data["heatmaps"]
    assert len(entry["classes"]) == 100 and entry["classes"][:3] == [0, 10, 20] and entry["classes"][-1] == 999
    assert np.shape(entry["theory"]) == (3, 100, 100) and "100 of 1000 classes" in entry["label"]
    parts = geometry(80)
    whole = [normalised(parts[name]) - normalised(parts[f"{name}_theory"]) for name in MATRICES]
    np.testing.assert_allclose(entry["distances"][-1], np.linalg.norm(whole, axis=(1, 2)), rtol=1e-3)


def test_what_a_run_lacks_is_left_out(tmp_path):
    """Without a config and a theory, what was measured is shown; without geometry, the curves alone."""
    bare = recorded(tmp_path / "bare")
    for name in ("config.json", "train_log.jsonl"):
        (bare / name).unlink()
    theory, _ = traces_of(report_of(bare)[1], "margin M<sub>k</sub>")  # no curve without a known problem
    assert theory["mode"] == "markers" and len(theory["x"]) == 10
    for path in (bare / "geometry").iterdir():
        change_geometry(path, lambda name, array: None if name.endswith("_theory") else array)
    _, data = report_of(bare)
    (entry,) = data["heatmaps"]
    assert entry["theory"] == []
    np.testing.assert_allclose(entry["frames"][-1][2], normalised(geometry(80)["WH"]), rtol=1e-2)
    assert len(traces_of(data, "margin M<sub>k</sub>")) == 1
    titles = [panel["layout"]["title"]["text"] for panel in data["panels"]["training"]]
    assert titles == ["accuracy, training", "accuracy, test"]
    (curves_only := recorded(tmp_path / "curves") / "geometry").rename(tmp_path / "gone")
    _, data = report_of(curves_only.parent)
    assert data["heatmaps"] == data["panels"]["classes"] == [] and len(data["panels"]["curves"]) == 5


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_columns_without_a_finite_value_have_no_curve(tmp_path, value):
    change_rows(recorded(tmp_path / "a"), lambda column: column * (value if column.name in ("NC1", "NC2_H") else 1))
    page, data = report_of(tmp_path / "a")
    assert tables(page)[1]["NC1"] == ["inf" if value == np.inf else "-"]
    assert {panel["layout"]["title"]["text"] for panel in data["panels"]["curves"]} == {
        "NC2, WWᵀ",
        "NC2, W against H",
        "NC3, WH",
    }


def test_plotly_knows_every_attribute(tmp_path):
    _, data = report_of(*three_seeds(tmp_path), recorded(tmp_path / "other", lr=0.01))
    for panels in data["panels"].values():
        for panel in panels:
            go.Figure(panel)  # raises ValueError otherwise


def test_ten_runs_of_a_hundred_classes_take_less_than_8_mb(tmp_path):
    """Matrices of noise, which do not compress, and curves of 2,000 epochs."""
    folder, generator, epochs = recorded(tmp_path / "run"), np.random.default_rng(0), np.arange(1, 2001)
    noise = {name: generator.random(2000) for name in ROWS.dtype.names}
    write_table(folder / "nc_metrics.csv", pd.DataFrame(noise | {"epoch": epochs}))
    lines = pd.DataFrame({name: noise["NC1"] for name in LOG[0]} | {"epoch": epochs})
    lines.to_json(folder / "train_log.jsonl", orient="records", lines=True)
    set_config(folder, class_counts=[9] * 100, problems={})
    for path in (folder / "geometry").iterdir():
        arrays = {name: generator.normal(size=(100, 100)) for name in MATRICES}
        arrays |= {name: generator.random(100) for name in ("margins", "mean_norms_sq")}
        np.savez(path, class_counts=[9] * 100, **arrays, **{f"{name}_theory": a[::-1] for name, a in arrays.items()})
    runs = [read_measured_run(folder) for _ in range(10)]
    for number, run in enumerate(runs):
        run.config["training_flags"]["width"] = number + 1
    page, data = page_of(runs, tmp_path)
    assert len(page) < 8e6
    assert len(traces_of(data, NC1)[9]["x"]) == POINTS
    assert len(data["heatmaps"]) == 10 and all(entry["epochs"][-1] == 80 for entry in data["heatmaps"])
    assert len(data["heatmaps"][9]["frames"]) >= 4


# ---------------------------------------------------------------------------------------------------------
# The scripts that write it, and their errors
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing"], "nothing: no such folder"),
        (["empty"], "empty: no rows in nc_metrics.csv; run validate_NC_unbalanced.py first"),
        (["run", "--theory", "nominal"], "run: no rows in nc_metrics_nominal.csv"),
    ],
)
def test_missing_files_are_a_one_line_error(run_script, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    recorded(tmp_path / "run")
    _, error = run_script("report.py", *flags, status=2)
    assert message in error and error.count("\n") == 1


def test_without_plotly_one_line_says_how_to_install_it(run_script, tmp_path):
    recorded(tmp_path / "run")
    _, error = run_script("report.py", "run", before=without_plotly, status=2)
    assert error == "report.py: error: the report needs Plotly; install it with: pip install plotly\n"
    assert not (tmp_path / "report.html").exists()


def test_validate_writes_it_where_plotly_is_installed(train, validate, tmp_path):
    flags = [*TINY, "--epochs", 1, "--save_path", "run"]
    train(*flags)
    out, _ = validate(*flags, before=without_plotly)
    assert "report in" not in out and not (tmp_path / "run" / "report.html").exists()
    out, _ = validate(*flags, before=without_figures)
    assert "report in  run/report.html\n" in out
    assert "<h1>Neural collapse: run</h1>" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    Run(tmp_path / "run").delete()
    assert not (tmp_path / "run" / "report.html").exists()


ODD_NAMES = ["<b>bold</b>", "cat & dog", "%{x}", "$x_1$", "n" * 200, "a", "b", "c", "d", "e"]


def test_names_of_classes_are_escaped_and_cut(tmp_path):
    folder = recorded(tmp_path / "run")
    set_config(folder, class_names=ODD_NAMES)
    page, data = report_of(folder)
    assert "<b>bold" not in page and "&lt;b&gt;bold&lt;/b&gt;, cat &amp; dog, %{x}, $x_1$, nnn" in page
    assert "n" * 40 not in page
    (points,) = (trace for trace in traces_of(data, "margin M<sub>k</sub>") if "customdata" in trace)
    assert points["customdata"][:2] == [" (&lt;b&gt;bold&lt;/b&gt;)", " (cat &amp; dog)"]
    assert points["hovertemplate"].startswith("class %{pointNumber}%{customdata}, ")
    assert data["heatmaps"][0]["names"][:2] == ["0 &lt;b&gt;bold&lt;/b&gt;", "1 cat &amp; dog"]
    assert data["heatmaps"][0]["names"][4] == f"4 {'n' * 11}…"


# ---------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The file of a report on two settings, one of three seeds."""
    folder = tmp_path_factory.mktemp("report")
    folders = [*three_seeds(folder), recorded(folder / "other", 0.5, lr=0.01)]
    for run in folders:
        write_accuracies(run, range(60, 70))
    return write_report([read_measured_run(run) for run in folders], folder / "report.html")


@pytest.fixture
def page(browser, report):
    """The report, open in the browser."""
    browser.open(report)
    browser.wait_for("!document.getElementById('wait')")
    yield browser
    assert browser.errors == []


def visible(page, group):
    """The visibilities of the traces of a group, of all panels."""
    return page.evaluate(
        "[...document.querySelectorAll('.panels > div')].flatMap(plot => plot.data"
        f".filter(trace => trace.legendgroup === '{group}').map(trace => trace.visible !== false))"
    )


def test_each_figure_has_its_traces_on_the_screen(page):
    drawn = page.evaluate(
        "[...document.querySelectorAll('.js-plotly-plot')].map(plot => [plot.data.length,"
        " plot.querySelectorAll('.scatterlayer .trace').length, plot.querySelectorAll('.hm image').length])"
    )
    scatter = [3] * 5, [4, 4, 2], [5, 3, 3, 3, 3]  # means and a band; points and theory; two optima of the loss
    curves, classes, training = ([[count, count, 0] for count in counts] for counts in scatter)
    assert drawn == [*curves, *classes, [9, 0, 9], *training]


def test_a_click_on_the_legend_hides_a_setting_everywhere_and_a_second_one_shows_it(page):
    page.click('nav button[value="1"]')
    assert not any(visible(page, 1)) and all(visible(page, 0))
    page.click('nav button[value="1"]')
    assert all(visible(page, 1))


def test_the_slider_changes_the_heatmaps(page):
    image = "document.querySelector('#heatmaps .hm image').getAttribute('href')"
    state = f"[document.querySelector('output').value, {image}, document.getElementById('heatmaps').data[0].z[0][1]]"
    page.wait_for(image)
    epoch, picture, value = page.evaluate(state)
    page.click("#controls input", across=0.01)
    page.wait_for("document.querySelector('output').value === '1'")
    page.wait_for(f"{image} !== '{picture}'")
    assert epoch == "80" and page.evaluate(state)[2] == pytest.approx(normalised(geometry(1)["HTH"])[0, 1], rel=1e-2)
    assert value == pytest.approx(normalised(geometry(80)["HTH"])[0, 1], rel=1e-2)
    page.evaluate("(select => { select.value = 1; select.onchange(); })(document.querySelector('select'))")
    assert page.evaluate("document.querySelector('output').value") == "80"


def test_values_are_shown_under_the_mouse(page):
    page.mouse("#classes .panels .points path", "mouseMoved")
    page.wait_for("document.querySelector('.hoverlayer .hovertext')")
    text = page.evaluate("document.querySelector('.hoverlayer .hovertext').textContent")
    assert "1: lr 0.001" in text and "over the seeds" in text


def test_names_of_classes_are_ticks_of_the_matrices(browser, tmp_path):
    folder = recorded(tmp_path / "run")
    set_config(folder, class_names=ODD_NAMES)
    browser.open(write_report([read_measured_run(folder)], tmp_path / "report.html"))
    browser.wait_for("!document.getElementById('wait')")
    ticks = browser.evaluate("[...document.querySelectorAll('#heatmaps .ytick text')].map(tick => tick.textContent)")
    assert {"0 <b>bold</b>", "1 cat & dog", "2 %{x}", "3 $x_1$"} & set(ticks) and f"4 {'n' * 11}…" in ticks


OVERLAPS = """[...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => {
  const boxes = [...plot.querySelectorAll('text, .modebar')].filter(text => text.classList.contains('modebar')
    || text.textContent.trim()).map(text => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([text, a], i) => boxes.slice(i + 1).filter(([, b]) => a.width && b.width
    && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3).map(([other]) => `${text} | ${other}`));
})"""  # 3: lines are higher than their letters


@pytest.mark.parametrize("width", [1400, 700])
def test_texts_of_the_figures_do_not_overlap(browser, tmp_path, width):
    """With the names of classes, gaps, and values within less than a power of ten."""
    folder = recorded(tmp_path / "run")
    set_config(folder, class_names=["airplane", "automobile", *"cdefghij"])
    gaps = {name: np.linspace(1e-2, 2e-3, len(ROWS)) for name in GAPS}
    rows = pd.read_csv(folder / "nc_metrics.csv").assign(**gaps, NC2_H=np.linspace(0.9, 0.3, len(ROWS)))
    write_table(folder / "nc_metrics.csv", rows)
    browser.open(write_report([read_measured_run(folder)], tmp_path / "report.html"), width)
    browser.wait_for("!document.getElementById('wait')")
    assert browser.evaluate(OVERLAPS) == []
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.parametrize("width", [1400, 700])
def test_a_screenshot_is_not_blank_and_nothing_scrolls_sideways(page, report, width):
    page.open(report, width)
    page.wait_for("!document.getElementById('wait')")
    image = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    parts = np.array_split(image, 8)
    assert all((part < 200).mean() > 0.001 and part.std() > 5 for part in parts)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
