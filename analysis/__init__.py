"""Finished runs: figures, tables and the report, made from the files of runs alone."""


def draw_heatmaps(geometry, epoch):
    """Return the figure `analysis.figures.heatmaps`; Matplotlib is imported by the first call."""
    from analysis.figures import heatmaps

    return heatmaps(geometry, epoch)
