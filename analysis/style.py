"""The style of all figures: print size, and colours that colour-blind readers can tell apart."""

from pathlib import Path

import matplotlib

STYLE_FILE = Path(__file__).with_suffix(".mplstyle")
TEXT_WIDTH = 6.75  # inches: the width of a two-column page
COLOURS = matplotlib.rc_params_from_file(STYLE_FILE, use_default_template=False)["axes.prop_cycle"].by_key()["color"]
MARKERS = "os^Dv<>P"
LINES = ["-", "-.", ":"]  # the next one each time the colours repeat


def style_of(index):
    """Return the colour and marker of the index-th curve of a panel."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def line_style_of(index):
    """Return the colour, marker and line style of the index-th setting of a figure."""
    return style_of(index) | {"linestyle": LINES[index // len(COLOURS) % len(LINES)]}
