"""The lock file: exact pins from the package index alone, inside the declared bounds, without known weaknesses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)")


def pins() -> dict[str, Version]:
    """Version by canonical name; fails on a line that is no exact pin."""
    found: dict[str, Version] = {}
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        content = line.partition("#")[0].partition(";")[0].strip()
        if not content:
            continue
        match = PIN.fullmatch(content)
        assert match, f"no exact pin: {line!r}"
        name = canonicalize_name(match[1])
        assert name not in found, f"{name} is pinned twice"
        found[name] = Version(match[2])
    return found


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, extras that the lock serves (dev) included."""
    if sys.version_info < (3, 11):
        pytest.skip("reading pyproject.toml needs tomllib of Python 3.11")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]


def test_every_line_is_an_exact_pin() -> None:
    assert len(pins()) > 20
    assert "://" not in LOCK.read_text(encoding="utf-8")


def test_the_declared_bounds_admit_the_pins() -> None:
    locked = pins()
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        if name == "torch" and name not in locked:
            continue  # which build of torch is a choice of the machine's
        if name in locked:
            assert requirement.specifier.contains(locked[name], prereleases=True), f"{requirement}: {locked[name]}"


def test_every_declared_package_is_pinned() -> None:
    missing = {canonicalize_name(r.name) for r in declared()} - set(pins()) - OPTIONAL
    assert not missing


OPTIONAL = {"torch", "xllamacpp"}
"""Not pinned: the build of torch is the machine's, and the oracle of llama.cpp is left out where it has no wheel."""


AUDITS = {
    "weak": ({"name": "a", "version": "1", "vulns": [{"id": "X-1"}]}, ["a 1: X-1"], []),
    "clean": ({"name": "a", "version": "1", "vulns": []}, [], []),
    "not found": ({"name": "a", "skip_reason": "Dependency not found on PyPI"}, [], ["a"]),
}


@pytest.mark.parametrize("name", AUDITS)
def test_a_package_that_was_not_looked_up_is_not_taken_for_a_sound_one(name: str) -> None:
    entry, weak, unknown = AUDITS[name]
    assert judge({"dependencies": [entry]}) == (weak, unknown)


def judge(report: dict) -> tuple[list[str], list[str]]:
    """What pip-audit found, and the packages that its source knows nothing of."""
    packages = report["dependencies"]
    weak = [f"{p['name']} {p.get('version')}: {v['id']}" for p in packages for v in p.get("vulns", ())]
    return weak, [p["name"] for p in packages if "vulns" not in p]


def test_no_known_weakness() -> None:
    """pip-audit over the lock; `FINERANK_VULNERABILITY_SERVICE` names another source (pypi, osv).

    An index that mirrors packages but not their advisories answers "not found" for each: that is no proof of anything.
    """
    program = shutil.which("pip-audit") or shutil.which("pip-audit", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("pip-audit is not installed (pip install pip-audit)")
    source = os.environ.get("FINERANK_VULNERABILITY_SERVICE", "pypi")
    command = [program, "--requirement", str(LOCK), "--no-deps", "--disable-pip", "--format", "json", "-s", source]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        weak, unknown = judge(json.loads(done.stdout))
    except (subprocess.TimeoutExpired, ValueError) as error:
        pytest.skip(f"the vulnerability source {source} gives no answer here ({type(error).__name__})")
    assert not weak, "\n".join(weak)
    if unknown:
        pytest.skip(f"the vulnerability source {source} knows {len(unknown)} of {len(pins())} packages not at all")
