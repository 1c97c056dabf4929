"""What agreement costs in speed: the best settings of `bench.exits`, and a picture of them all as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.plots import require_matplotlib
from eejax.core import ConfigError

AGREEMENT = 0.98
SPEEDUP = 1.25
"""The lines in the picture: answers that are to be told from full depth's seldom, and a speed-up worth having."""

LOOKS = {"rows": ("-", "o"), "all": (":", "x")}
"""Line and marker of each rule."""


def best_settings(settings: Sequence[Mapping[str, Any]], batch: int, rule: str) -> dict[str, Any] | None:
    """The fastest of the settings with an agreement of at least `AGREEMENT`; None where no setting has it."""
    good = [one for one in settings if one["quality"] is not None and one["quality"]["agreement"] >= AGREEMENT]
    if not good:
        return None
    best = max(good, key=lambda one: one["speed"][batch][rule]["measured_speedup"])
    return {
        "label": best["label"],
        "measure": best["measure"],
        "threshold": best["threshold"],
        "agreement": best["quality"]["agreement"],
        "measured_speedup": best["speed"][batch][rule]["measured_speedup"],
    }


def plot_frontier(result: Mapping[str, Any], file: Path) -> None:
    """Agreement against measured speed-up, a panel for the smallest and the largest batch.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = result["settings"]
    batches = list(result["full_depth"]["speed"])
    shown = sorted({min(batches), max(batches)})
    measures = list(dict.fromkeys(one["measure"] for one in settings))
    figure = Figure(figsize=(5.5 * len(shown), 4.6), layout="constrained")
    for axis, batch in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for number, measure in enumerate(measures):
            mine = [one for one in settings if one["measure"] == measure]
            agreements = [one["quality"]["agreement"] for one in mine]
            for rule in mine[0]["speed"][batch]:
                line, marker = LOOKS[rule]
                speedups = [one["speed"][batch][rule]["measured_speedup"] for one in mine]
                label = f"{measure}, {rule}"
                axis.plot(speedups, agreements, line, color=f"C{number}", marker=marker, markersize=4, label=label)
                if rule == next(iter(mine[0]["speed"][batch])):
                    for one, place in zip(mine, zip(speedups, agreements, strict=True), strict=True):
                        text = f"{one['threshold']:g}"
                        axis.annotate(text, place, textcoords="offset points", xytext=(4, 3), fontsize=6)
        axis.axhline(AGREEMENT, color="grey", linewidth=0.8)
        axis.axvline(SPEEDUP, color="grey", linewidth=0.8)
        axis.set_xlabel("decoding speed-up over full depth")
        axis.set_ylabel("agreement with full depth")
        axis.set_title(f"{result['model']['name']}, batch {batch}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=max(1, len(labels) // 2))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(str(file))
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error}") from error
