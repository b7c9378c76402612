"""Write one HTML page about a run, or about several side by side.

finerank report runs/first --output report.html
finerank report runs/lora runs/lu_lora --output compare.html
"""

from dataclasses import dataclass
from pathlib import Path

from finerank.config import setting
from finerank.errors import ConfigError


@dataclass(kw_only=True)
class Settings:
    """All settings of report."""

    runs: list[str] = setting([], help="run folders", positional=True)
    output: str | None = setting(None, help="the page to write; default: report.html in the first run folder")


def run(settings: Settings) -> None:
    """Write the page; see the module's docstring."""
    from finerank import config
    from finerank.recipes import tune
    from finerank.report.collect import read_run
    from finerank.report.document import write_report

    if not settings.runs:
        raise ConfigError("Name at least one run folder: finerank report runs/first.")
    runs = [read_run(Path(folder)) for folder in settings.runs]
    output = Path(settings.output) if settings.output else runs[0].folder / "report.html"
    write_report(runs, output, defaults=config.to_dict(tune.Settings()))
    print(f"report: {output}")
