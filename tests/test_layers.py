"""Imports point downwards only: each package may import the packages below it, never one above or beside it."""

import ast
import re
from pathlib import Path

import finerank

ROOT = Path(finerank.__file__).parent

BASE = {"errors", "registry", "files", "config"}
ALLOWED = {
    "errors": set(),
    "registry": {"errors"},
    "files": {"errors"},
    "flags": {"errors"},
    "config": {"errors", "flags"},
    "models": BASE,
    "data": BASE,
    "adapters": BASE | {"models"},
    "parallel": BASE | {"models"},
    "checkpoints": BASE | {"models", "adapters"},
    "report": BASE,
    "generate": BASE | {"models", "data", "adapters", "parallel", "checkpoints"},
    "train": BASE | {"models", "data", "adapters", "parallel", "checkpoints"},
    "evaluate": BASE | {"models", "data", "adapters", "parallel", "checkpoints", "generate"},
    "recipes": BASE
    | {"models", "data", "adapters", "parallel", "checkpoints", "generate", "train", "evaluate", "report"},
    "cli": BASE | {"recipes"},
    "__main__": {"cli"},
    "__init__": set(),
}


def imported(path: Path) -> set[str]:
    """Top-level parts of finerank that a file imports."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            parts |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("finerank.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "finerank":
            if node.module == "finerank":
                parts |= {alias.name for alias in node.names if alias.name != "__version__"}
            else:
                parts.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: write imports in full, not relative")
    return parts


def test_imports_point_downwards_only():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        upwards = imported(path) - ALLOWED[part] - {part}
        wrong += [f"{path.relative_to(ROOT)} imports finerank.{name}" for name in sorted(upwards)]
    assert not wrong, "\n".join(wrong)


def test_every_part_has_a_place_in_the_order():
    parts = {
        p.name.removesuffix(".py") for p in ROOT.iterdir() if p.name != "py.typed" and not p.name.startswith("__p")
    }
    assert parts <= set(ALLOWED), parts - set(ALLOWED)


def test_reports_need_no_torch():
    for path in (ROOT / "report").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) (torch|transformers)", path.read_text(encoding="utf-8"), re.M), path
