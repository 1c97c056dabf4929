"""Bars of what `bench.schedule` and `bench.simulate` found, as a PNG (matplotlib comes with the extra `bench`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eejax.core import ConfigError

PANELS = (("requests_per_s", "requests/s"), ("latency_mean_s", "mean latency, s"))


def require_matplotlib() -> None:
    """Raise `ConfigError` where matplotlib is missing, before anything has been measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("drawing needs matplotlib: pip install 'eejax[bench]'")


def plot_schedule(result: Mapping[str, Any], file: Path) -> None:
    """Requests/s and mean latency of each row, one colour for each mode, a line of panels for each regime."""
    titles = {name: f"{name} ({found['num_pages']} pages)" for name, found in result["regimes"].items()}
    plot_bars({titles[name]: found["modes"] for name, found in result["regimes"].items()}, file)


def plot_bars(groups: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]], file: Path) -> None:
    """Grouped bars of the figures in `groups[group][series][row]`, a line of panels for each group.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), len(PANELS), squeeze=False)
    for line, (group, series) in zip(axes, groups.items(), strict=True):
        for axis, (key, label) in zip(line, PANELS, strict=True):
            height = 0.8 / len(series)
            for i, (name, rows) in enumerate(series.items()):
                places = [place + (i - (len(series) - 1) / 2) * height for place in range(len(rows))]
                bars = axis.barh(places, [row[key] for row in rows.values()], height, label=name.replace("_", " "))
                axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=6)
            names = list(next(iter(series.values())))
            axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{group}: {label}", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=len(labels))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(str(file))
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error}") from error
