"""What figures and the report show, with its values computed from settings: panels of curves, of classes, and matrices.

`analysis.figures` draws it with Matplotlib, and `analysis.report` with Plotly. A panel added to NC_PANELS or
TRAINING_PANELS appears in both. Labels are in Matplotlib's mathtext.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.settings import ABSCISSAE, Setting, listed
from nc_theory import SHARES, class_curve, collapse_count

WIDE = 20  # n_max / n_min above which an axis of n_k is logarithmic
FRAMES = 60  # largest number of epochs at which matrices are shown
DISTANCE = "distance to the theorem"
MATRICES = {"HTH": r"$H^{\!\top}\!H$", "WWT": r"$WW^{\!\top}$", "WH": r"$WH$"}


@dataclass(frozen=True)
class Theory:
    """The theory's values of a setting at `x`; if not `is_curve`, they are known nowhere else."""

    x: np.ndarray
    y: np.ndarray
    is_curve: bool = True


@dataclass(frozen=True)
class Series:
    """Values of a setting at `x` (P,): their mean over its seeds, the least and the largest, each (P,)."""

    setting: Setting
    label: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    theory: Theory | None = None


@dataclass(frozen=True)
class Panel:
    """A panel: its definition and, from xlabel on, what `curve_panels` or `class_panels` add."""

    title: str
    ylabel: str
    columns: dict  # {column of the rows or the log, or array of values of the classes: label}
    yscale: str = "log"
    xlabel: str = ""
    xscale: str = "linear"
    series: list = ()  # of `Series`

    @property
    def name(self):
        """The column of a panel with only one."""
        (name,) = self.columns
        return name


NC_PANELS = [
    Panel("NC1", "variability within classes", {"NC1": r"tr$(\Sigma_W\Sigma_B^\dagger)/K$"}),
    Panel("NC2", DISTANCE, {"NC2_H": MATRICES["HTH"], "NC2_WWT": MATRICES["WWT"], "NC2_W": r"$W$ against $H$"}),
    Panel("NC3", DISTANCE, {"NC3_WH": MATRICES["WH"]}),
]
NC_COLUMNS = [column for panel in NC_PANELS for column in panel.columns]
GAPS = {f"gap_{share}": label for share, (label, _) in SHARES.items()}
TRAINING_PANELS = [
    Panel("loss", "", {"loss": "objective", "ce": "cross entropy", "mse": "MSE"}),
    Panel("accuracy", "%", {"train_acc1": "training", "test_acc1": "test"}, "linear"),
    Panel("learning rate", "", {"lr": ""}),
    Panel("optimality gap", "share, in units of the loss", GAPS),
]
THEOREM_PANELS = [
    Panel(r"margin $M_k$", "", {"margins": ""}, "linear"),
    Panel(r"class-mean norm $\|\mu_k\|^2$", "", {"mean_norms_sq": ""}, "linear"),
]
LAYER_PANELS = {  # column: title and scale
    "NC1": ("NC1", "log"),
    "CDNV": ("CDNV", "log"),
    "NCM_acc1": ("nearest class mean (%)", "linear"),
}
ACCURACY_PANELS = [Panel("test accuracy", "%", {"test_accuracy": ""}, "linear")]


def over_seeds(setting, label, x, values, theory=None, yscale="linear"):
    """Return the `Series` of values (S, P) of S seeds; the mean is geometric if `yscale` is "log"."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.exp(np.log(values).mean(0)) if yscale == "log" else values.mean(0)
    return Series(setting, label, x, mean, values.min(0), values.max(0), theory)


# ---------------------------------------------------------------------------------------------------------
# Against the epoch, the step, or minutes of training
# ---------------------------------------------------------------------------------------------------------


def curve_panels(panels, settings, x="epoch", split=True):
    """Return panels with their values against `x`, a key of ABSCISSAE, without those for which there are no data.

    split: return a panel for each column that has values.
    """
    if split:
        panels = [
            replace(panel, title=listed(panel.title, label), columns={column: label})
            for panel in panels
            for column, label in panel.columns.items()
            if any(len(setting.series(column, x)[0]) for setting in settings)
        ]
    run = settings[0].runs[0]
    known = [panel for panel in panels if split or not panel.columns.keys().isdisjoint([*run.rows, *run.log])]
    return [replace(panel, xlabel=ABSCISSAE[x], series=curves(panel, settings, x)) for panel in known]


def training_panels(settings):
    """Return TRAINING_PANELS, with the data terms of the settings' own losses under their names."""
    loss, *others = TRAINING_PANELS
    own = [setting.runs[0].config.get("data_column") for setting in settings]
    named = {name: name for name in own if name and name not in loss.columns}
    return [replace(loss, columns=loss.columns | named), *others]


def curves(panel, settings, x):
    """Return the series of a panel's columns; the theory of the loss is the least loss, at the penalties' scale."""
    found = []
    for column, label in panel.columns.items():
        for setting in settings:
            ends, values = setting.series(column, x)
            least = setting.least_losses(x) if column == "loss" else None
            theory = None if least is None else Theory(*least)
            found.append(over_seeds(setting, label, ends, values, theory, panel.yscale))
    return found


# ---------------------------------------------------------------------------------------------------------
# Against n_k
# ---------------------------------------------------------------------------------------------------------


def class_panels(panels, settings, to_threshold=True):
    """Return panels with their values against n_k, without those for which there are no data.

    to_threshold: extend the theory's curve to the threshold of collapse if that is near the class sizes.
    """
    found = []
    for panel in panels:
        series = [
            over_seeds(setting, panel.title, setting.class_counts, values, theory_of(setting, panel.name, to_threshold))
            for setting in settings
            if (values := setting.class_values(panel.name)) is not None
        ]
        if series:
            counts = np.concatenate([each.x for each in series])
            xscale = "log" if max(counts) > WIDE * min(counts) else "linear"
            found.append(replace(panel, xlabel="training images of the class $n_k$", xscale=xscale, series=series))
    return found


def theory_of(setting, name, to_threshold):
    """Return the `Theory` of margins or mean_norms_sq of a setting; None without one.

    A closed form gives a curve over all class sizes, because a class depends on the others only through K and N.
    Without a closed form, for example with a bias, the theory is known only at the n_k.
    """
    geometry, counts, run = setting.geometries[0], setting.class_counts, setting.runs[0]
    if f"{name}_theory" not in geometry:
        return None
    threshold, is_near = collapse_threshold(setting)
    span = [*counts, threshold] if to_threshold and is_near else counts
    sizes = np.geomspace(max(1, 0.9 * min(span)), min(1.05 * max(span), counts.sum()), 100)
    formula, problem = "released" if run.theory == "released" else "exact", run.comparison.problem
    curves = class_curve(problem, sizes, formula) if problem else None
    if curves is None:
        return Theory(counts, geometry[f"{name}_theory"], is_curve=False)
    return Theory(sizes, curves[("margins", "mean_norms_sq").index(name)].numpy())


def collapse_threshold(setting):
    """Return the n_k up to which classes collapse at the optimum, or None, and whether it is near the class sizes."""
    run, counts = setting.runs[0], setting.class_counts
    problem = run.comparison.problem if run.theory != "released" else None
    threshold = collapse_count(problem) if problem else None
    return threshold, threshold is not None and min(counts) / 10 < threshold < 2 * max(counts)


def count_ticks(counts):
    """Return the ticks of a logarithmic axis of numbers of images: powers of ten and, up to three of them, 2 and 5."""
    low, high = np.log10([min(counts), max(counts)])
    digits = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [digit * 10**power for power in range(int(low), int(high) + 1) for digit in digits]
    return [tick for tick in ticks if min(counts) <= 1.1 * tick and tick <= 1.1 * max(counts)]


def means_at_equal_counts(series):
    """Return the distinct n_k of a series against n_k, and the mean over the classes with each of them."""
    means = pd.Series(series.mean).groupby(series.x).mean()
    return means.index, means


# ---------------------------------------------------------------------------------------------------------
# Matrices
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrices:
    """MATRICES of an epoch, each divided by its Frobenius norm; a zero matrix stays zero."""

    rows: dict  # {title: matrices}; the titles are "measured" and, if there is a theory, "theory" and "difference"

    @classmethod
    def of(cls, geometry):
        """Return those of {name: array}: MATRICES (K, K) and, if there is a theory, the same with suffix _theory."""
        rows = {}
        for title, suffix in (("measured", ""), ("theory", "_theory")):
            if f"HTH{suffix}" in geometry:
                matrices = [geometry[name + suffix] for name in MATRICES]
                rows[title] = [matrix / (np.linalg.norm(matrix) or 1) for matrix in matrices]
        if "theory" in rows:
            rows["difference"] = [a - b for a, b in zip(*rows.values(), strict=True)]
        return cls(rows)

    @property
    def limits(self):
        """The largest absolute values of the matrices and of the differences."""
        largest = {title: np.abs(matrices).max() for title, matrices in self.rows.items()}
        return max(largest["measured"], largest.get("theory", 0)) or 1, largest.get("difference", 0) or 1

    @property
    def distances(self):
        """The Frobenius norms of the differences: NC2_H, NC2_WWT and NC3_WH."""
        return [np.linalg.norm(matrix) for matrix in self.rows.get("difference", [])]
