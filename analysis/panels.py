"""The values that figures and the report show, computed once from settings: panels of curves, of classes, and matrices.

`analysis.figures` draws them with Matplotlib, and `analysis.report` with Plotly. An entry added to NC_PANELS or
TRAINING_PANELS appears in both. Labels are Matplotlib's mathtext.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.settings import ABSCISSAE, Setting, thinned
from nc_theory import class_curve

WIDE = 20  # n_max / n_min above which an axis of n_k is logarithmic
FRAMES = 60  # largest number of epochs whose matrices an animation shows
DISTANCE = "distance to the theorem"
CLASS_VALUES = {"margins": r"margin $M_k$", "mean_norms_sq": r"class-mean norm $\|\mu_k\|^2$"}
MATRICES = {"HTH": r"$H^{\!\top}\!H$", "WWT": r"$WW^{\!\top}$", "WH": r"$WH$"}


@dataclass(frozen=True)
class PanelSpec:
    """Definition of a panel of curves."""

    title: str
    ylabel: str
    yscale: str  # "log" or "linear"
    columns: dict  # {column of the rows or the log: label of its curve}

    def split(self):
        """Return a definition for each column alone."""
        return [replace(self, title=f"{self.title}, {label}", columns={c: label}) for c, label in self.columns.items()]


NC_PANELS = [
    PanelSpec("NC1", "variability within classes", "log", {"NC1": r"tr$(\Sigma_W\Sigma_B^\dagger)/K$"}),
    PanelSpec(
        "NC2", DISTANCE, "log", {"NC2_H": MATRICES["HTH"], "NC2_WWT": MATRICES["WWT"], "NC2_W": r"$W$ against $H$"}
    ),
    PanelSpec("NC3", DISTANCE, "log", {"NC3_WH": MATRICES["WH"]}),
]
TRAINING_PANELS = [
    PanelSpec("loss", "", "log", {"loss": "objective", "ce": "cross entropy", "mse": "MSE"}),
    PanelSpec("accuracy", "%", "linear", {"train_acc1": "training", "test_acc1": "test"}),
    PanelSpec("optimizer", "", "log", {"lr": "learning rate"}),
    PanelSpec(
        "optimality gap",
        "relative",
        "log",
        {"gap_within": "within classes", "gap_head": "head", "gap_means": "class means"},
    ),
]
NC_COLUMNS = [column for spec in NC_PANELS for column in spec.columns]


@dataclass(frozen=True)
class Series:
    """Values of a setting at `x` (P,): their mean over its seeds, the least and the largest, each (P,)."""

    setting: Setting
    label: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    joined: bool = True  # False: the values between those at `x` are not known

    def thinned(self, most):
        """Return the series at `most` values of x at most."""
        kept = thinned(range(len(self.x)), most)
        return replace(self, **{name: getattr(self, name)[kept] for name in ("x", "mean", "low", "high")})


@dataclass(frozen=True)
class Panel(PanelSpec):
    """The values of a panel."""

    xlabel: str
    xscale: str
    measured: list  # of `Series`
    theory: list  # of `Series`: the values at the optimum, of the settings for which they are known


def over_seeds(setting, label, x, values, yscale="linear"):
    """Return the `Series` of values (S, P) of S seeds; the mean is geometric if `yscale` is "log"."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.exp(np.log(values).mean(0)) if yscale == "log" else values.mean(0)
    return Series(setting, label, x, mean, values.min(0), values.max(0))


# ---------------------------------------------------------------------------------------------------------
# Against the epoch, the step, or minutes of training
# ---------------------------------------------------------------------------------------------------------


def curve_panels(specs, settings, x="epoch", split=True):
    """Return the panels of `specs` against `x`, a key of ABSCISSAE, without those for which there are no data.

    split: return a panel for each column that has values, instead of one for each of `specs`.
    """
    if split:
        panels = [curve_panel(spec, settings, x) for whole in specs for spec in whole.split()]
        return [panel for panel in panels if any(len(series.x) for series in panel.measured)]
    run = settings[0].runs[0]
    specs = [spec for spec in specs if not spec.columns.keys().isdisjoint([*run.rows, *run.log])]
    return [curve_panel(spec, settings, x) for spec in specs]


def curve_panel(spec, settings, x):
    measured, theory = [], []
    for column, label in spec.columns.items():
        for setting in settings:
            curve = over_seeds(setting, label, *setting.series(column, x), spec.yscale)
            measured.append(curve)
            if column == "loss" and setting.least_loss is not None:
                ends, least = curve.x[[0, -1]] if len(curve.x) else curve.x, np.full(2, setting.least_loss)
                theory.append(Series(setting, "optimum", ends, least, least, least))
    return Panel(**vars(spec), xlabel=ABSCISSAE[x], xscale="linear", measured=measured, theory=theory)


# ---------------------------------------------------------------------------------------------------------
# Against n_k
# ---------------------------------------------------------------------------------------------------------


def theorem_panels(settings, to_threshold=True):
    """Return the panels of CLASS_VALUES against n_k; [] if no setting has a geometry.

    to_threshold: extend the theory's curve to the threshold of collapse where `visible_threshold` is one.
    """
    settings = [setting for setting in settings if setting.epoch]
    theories = [theory_of(setting, to_threshold) for setting in settings if "margins_theory" in setting.geometries[0]]
    return [
        class_panel(
            label,
            "",
            [(setting, np.array([geometry[name] for geometry in setting.geometries])) for setting in settings],
            [theory[name] for theory in theories],
        )
        for name, label in CLASS_VALUES.items()
        if settings
    ]


def accuracy_panels(settings):
    """Return the panel of each class's test accuracy against n_k in a list; [] if no setting has test accuracies."""
    values = [(setting, setting.test_accuracy) for setting in settings if setting.epoch]
    values = [(setting, accuracy) for setting, accuracy in values if accuracy is not None]
    return [class_panel("test accuracy", "%", values)] if values else []


def class_panel(title, ylabel, values, theory=()):
    """Return a panel against n_k of pairs (setting, values (S, K) of S seeds and K classes)."""
    counts = np.concatenate([setting.class_counts for setting, _ in values])
    xscale = "log" if max(counts) > WIDE * min(counts) else "linear"
    measured = [over_seeds(setting, title, setting.class_counts, of_setting) for setting, of_setting in values]
    return Panel(title, ylabel, "linear", {}, "training images of the class $n_k$", xscale, measured, theory)


def theory_of(setting, to_threshold):
    """Return the theory's values of a setting, {name in CLASS_VALUES: Series}.

    A closed form gives a curve over all class sizes, because a class depends on the others only through K and N.
    Without a closed form, for example with a bias, the theory is known only at the n_k.
    """
    geometry, counts, run = setting.geometries[0], setting.class_counts, setting.runs[0]
    threshold = visible_threshold(setting) if to_threshold else None
    span = [*counts, threshold] if threshold is not None else counts
    sizes = np.geomspace(max(1, 0.9 * min(span)), min(1.05 * max(span), counts.sum()), 100)
    formula, problem = "released" if run.theory == "released" else "exact", run.comparison.problem
    curves = class_curve(problem, sizes, formula) if problem else None
    known = curves is not None
    x, values = (sizes, curves) if known else (counts, [geometry[f"{name}_theory"] for name in CLASS_VALUES])
    values = zip(CLASS_VALUES, map(np.asarray, values), strict=True)
    return {name: Series(setting, "theory", x, y, y, y, joined=known) for name, y in values}


def visible_threshold(setting):
    """Return the setting's threshold of collapse if it is near the class sizes, else None."""
    threshold, counts = setting.threshold, setting.class_counts
    return threshold if threshold is not None and min(counts) / 10 < threshold < 2 * max(counts) else None


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
        """Return those of {name: array}: HTH, WWT, WH (K, K) and, if there is a theory, the same with suffix _theory."""
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
