"""Pictures made from a run's metrics.

loss_curve(run / "metrics.jsonl", run / "training_loss.png")
step_parts(run / "profile.json", run / "profile.png")
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
from matplotlib.figure import Figure

from finerank.report.collect import read_metrics

_TRAIN, _HELD_OUT = "#4c78a8", "#d1495b"
_SMOOTHING_STEPS = 10


def loss_curve(metrics_path: Path, png_path: Path, *, unit: str) -> None:
    """Draw loss by optimizer step: each step's training loss, its running mean, and the held-out loss.

    The first held-out loss is also drawn as a level line: what the untuned model had.
    """
    rows = read_metrics(metrics_path)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    _training(axes, _points(rows, "loss"))
    _held_out(axes, _points(rows, "eval_loss"))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss ({unit})")
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "no step was logged", ha="center", transform=axes.transAxes)
    # no date or version inside, so that the same run gives the same bytes
    figure.savefig(png_path, format="png", metadata={"Software": None})


def step_parts(profile_path: Path, png_path: Path) -> None:
    """Draw where a step's time went, a bar for each part, from a run's profile.json."""
    found = json.loads(profile_path.read_text(encoding="utf-8"))
    parts = sorted(found["parts"].items(), key=lambda item: item[1])
    figure = Figure(figsize=(8, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([name for name, _ in parts], [seconds for _, seconds in parts], color=_TRAIN)
    axes.bar_label(bars, [f"{seconds / found['seconds']:.0%}" for _, seconds in parts], padding=3)
    axes.set_xlabel(f"seconds of a step ({found['seconds']:.2f}; {found['roofline_share']:.0%} of the roofline)")
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(png_path, format="png", metadata={"Software": None})


def compare_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], png_path: Path, *, unit: str) -> None:
    """Held-out loss (training loss where none was measured) of several runs in one picture, by step."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, rows in runs.items():
        points = _points(rows, "eval_loss")
        label = f"{name}: held-out"
        if not points:
            points, label = _running_mean(_points(rows, "loss")), f"{name}: training, running mean"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label) if points else None
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss ({unit})")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False)
    figure.savefig(png_path, format="png", metadata={"Software": None})


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _training(axes: Any, points: list[tuple[int, float]]) -> None:
    if not points:
        return
    axes.plot(*zip(*points, strict=True), color=_TRAIN, alpha=0.3, linewidth=1, label="training, each step")
    if len(points) > _SMOOTHING_STEPS:
        smooth = _running_mean(points)
        label = f"training, mean of {_SMOOTHING_STEPS} steps"
        axes.plot(*zip(*smooth, strict=True), color=_TRAIN, linewidth=1.8, label=label)


def _held_out(axes: Any, points: list[tuple[int, float]]) -> None:
    if not points:
        return
    axes.plot(*zip(*points, strict=True), color=_HELD_OUT, marker="o", markersize=4, linewidth=1.5, label="held-out")
    base = points[0][1]
    axes.axhline(base, color=_HELD_OUT, linestyle=":", linewidth=1)
    last_step, last = points[-1]
    # a white edge keeps the numbers readable where they cross a curve
    edge = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    for step, value, offset in ((points[0][0], base, (6, 6)), (last_step, last, (-4, 8))):
        align = "left" if offset[0] > 0 else "right"
        axes.annotate(
            f"{value:.3f}",
            (step, value),
            textcoords="offset points",
            xytext=offset,
            ha=align,
            color=_HELD_OUT,
            bbox=edge,
        )


def _running_mean(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    smooth = []
    for i, (step, _) in enumerate(points):
        window = [value for _, value in points[max(0, i + 1 - _SMOOTHING_STEPS) : i + 1]]
        smooth.append((step, sum(window) / len(window)))
    return smooth
