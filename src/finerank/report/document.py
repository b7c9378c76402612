"""One self-contained HTML page about one run or several: no script, no file beside it, nothing loaded from a network.

    write_report([read_run(folder)], Path("report.html"), defaults={"lora_r": 16})

All text from outside (settings, rows, answers) is escaped. Pictures are embedded.
"""

import base64
import html
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finerank.files import write_text
from finerank.report.collect import Run
from finerank.report.figures import compare_curves, loss_curve

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; display: block; overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid #8884; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.text { white-space: pre-wrap; min-width: 14rem; }
img { max-width: 100%; background: white; border-radius: 4px; }
code { font-size: .92em; } .quiet { opacity: .7; font-size: .9rem; }
"""

_RESULTS = {
    "base_eval_loss": "held-out loss of the base model",
    "after_eval_loss": "held-out loss after tuning",
    "best_eval_loss": "best held-out loss",
    "loss_unit": "losses are",
    "steps": "optimizer steps",
    "rows": "rows trained",
    "trained_tokens": "tokens trained",
    "seconds": "seconds",
    "rows_per_second": "rows per second",
    "trained_parameters": "trained parameters",
    "adapter_sha256": "SHA-256 of the adapter",
    "model_sha256": "SHA-256 of the model",
}


_RECEIPT_KEYS = [
    "handler",
    "rows_read",
    "rows_kept",
    "rows_dropped",
    "truncated",
    "duplicates",
    "tokens",
    "trained_tokens",
]


def write_report(runs: Sequence[Run], path: Path, *, defaults: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all; settings equal to `defaults` are folded away. Raises StorageError."""
    write_text(path, render(runs, defaults=defaults))


def render(runs: Sequence[Run], *, defaults: Mapping[str, Any]) -> str:
    """The page as text. With several runs, their results and curves stand side by side first."""
    title = "finerank: " + ", ".join(run.name for run in runs)
    parts = [f"<h1>{_text(title)}</h1>"]
    if len(runs) > 1:
        parts.append(_comparison(runs))
    for run in runs:
        parts += _about_one(run, defaults, heading=len(runs) > 1)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{_text(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def _about_one(run: Run, defaults: Mapping[str, Any], *, heading: bool) -> Iterable[str]:
    if heading:
        yield f"<h1>{_text(run.name)}</h1>"
    shown = [(label, run.results[key]) for key, label in _RESULTS.items() if run.results.get(key) is not None]
    unfinished = "<p>This run has not finished: its folder holds no results.json yet.</p>"
    yield "<h2>Result</h2>" + (_table(("what", "value"), shown) if shown else unfinished)
    curve = run.folder / "metrics.jsonl"
    yield "<h2>Loss</h2>" + _picture(
        lambda png: loss_curve(curve, png, unit=run.loss_unit), f"loss by step of {run.name}"
    )
    if run.answers:
        yield _answers(run.answers)
    if run.receipt:
        yield "<h2>What became of the rows</h2>" + _receipt(run.receipt)
    if run.settings:
        yield _settings(run.settings, defaults)
    if versions := run.results.get("versions"):
        listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        yield f'<p class="quiet">{_text(listed)}</p>'


def _comparison(runs: Sequence[Run]) -> str:
    rows = [
        (label, *(run.results.get(key) for run in runs))
        for key, label in _RESULTS.items()
        if any(key in run.results for run in runs)
    ]
    names = _distinct_names(runs)
    units = {run.loss_unit for run in runs}
    unit = units.pop() if len(units) == 1 else "of each run in its own unit"
    metrics = {n: r.metrics for n, r in zip(names, runs, strict=True)}
    picture = _picture(lambda png: compare_curves(metrics, png, unit=unit), "loss of the runs")
    return "<h2>Side by side</h2>" + _table(("what", *names), rows) + picture


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return [n if names.count(n) == 1 else str(run.folder) for n, run in zip(names, runs, strict=True)]


def _answers(answers: Sequence[Mapping[str, Any]]) -> str:
    models = list(dict.fromkeys(key for row in answers for key in row if key != "prompt"))
    rows = [(row.get("prompt"), *(row.get(model) for model in models)) for row in answers]
    return "<h2>The same prompts, before and after</h2>" + _table(("prompt", *models), rows, text=True)


def _receipt(receipt: Mapping[str, Any]) -> str:
    """One line a file of rows, then why rows were dropped, then what else was noticed."""
    files = [file for file in receipt.get("files", []) if isinstance(file, dict)]
    head = ("file", "form", "rows", "kept", "dropped", "cut", "copies", "tokens", "trained")
    rows = [(Path(str(f.get("path"))).name, *(_count(f.get(key)) for key in _RECEIPT_KEYS)) for f in files]
    reasons = [
        (Path(str(f.get("path"))).name, reason, _count(what), _first_rows(what))
        for f in files
        for reason, what in (f.get("dropped") or {}).items()
    ]
    parts = [_table(head, rows)] if rows else []
    if reasons:
        parts.append(_table(("file", "why rows were dropped", "rows", "first of them"), reasons))
    parts += [f"<p>{_text(note)}</p>" for note in receipt.get("notes", [])]
    return "".join(parts)


def _count(what: Any) -> Any:
    return what.get("count") if isinstance(what, dict) else what


def _first_rows(what: Any) -> str:
    return ", ".join(map(str, what.get("first_rows", []))) if isinstance(what, dict) else ""


def _settings(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """What was chosen, in sight; the rest folded away."""

    def rows(names: Iterable[str]) -> list[tuple[str, str]]:
        return [(f"<code>{_text(name)}</code>", _value(settings[name])) for name in names]

    chosen = [name for name in settings if name not in defaults or settings[name] != defaults[name]]
    rest = [name for name in settings if name not in chosen]
    parts = ["<h2>Settings that differ from the defaults</h2>", _table(("setting", "value"), rows(chosen), code=True)]
    if rest:
        table = _table(("setting", "value"), rows(rest), code=True)
        parts.append(f"<details><summary>{len(rest)} settings at their defaults</summary>{table}</details>")
    return "".join(parts)


def _value(value: Any) -> str:
    """As it would be written in YAML, in one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _picture(draw: Callable[[Path], None], alt: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        png = Path(folder) / "picture.png"
        draw(png)
        data = base64.b64encode(png.read_bytes()).decode("ascii")
    return f'<img alt="{_text(alt)}" src="data:image/png;base64,{data}">'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, text: bool = False, code: bool = False) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        first = f"<td>{row[0] if code else _text(row[0])}</td>"
        lines.append("<tr>" + first + "".join(_cell(value, text=text) for value in row[1:]) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _cell(value: Any, *, text: bool) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f'<td class="{"text" if text else ""}">{_text("" if value is None else value)}</td>'
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return f'<td class="number">{shown}</td>'


def _text(value: Any) -> str:
    return html.escape(str(value))
