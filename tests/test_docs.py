"""What the documents say is true: commands parse, settings files load, links lead somewhere, the tree is the tree."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from finerank import cli

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("examples/**/*.md")])
CONFIGS = sorted([*REPO.glob("configs/**/*.yaml"), *REPO.glob("examples/**/*.yaml")])


def commands(text: str) -> list[str]:
    """Lines `finerank VERB ...` of code blocks, indented or fenced; continued lines joined, remarks cut."""
    found, fenced = [], False
    for line in re.sub(r" *\\\n\s*", " ", text).splitlines():
        fenced ^= line.startswith("```")
        if (fenced or line.startswith("    ")) and (match := re.match(r"\s*(finerank [a-z].*)", line)):
            found.append(re.split(r"\s{2,}|\s+#|\s\.\.\.|\s*[|>]", match.group(1))[0])
    return found


COMMANDS = [
    pytest.param(command, id=f"{page.relative_to(REPO)}-{number}")
    for page in PAGES
    for number, command in enumerate(commands(page.read_text(encoding="utf-8")))
]


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [REPO / line for line in done.stdout.splitlines() if (REPO / line).is_file()]


def test_the_documents_hold_commands_and_settings_files():
    assert len(COMMANDS) >= 15 and len(CONFIGS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_documents_parses(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("configs", "examples", "src"):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("load: smollm2-135m\n")  # as the command before leaves it
    monkeypatch.chdir(tmp_path)
    assert cli.main([*shlex.split(command)[1:], "--dry-run"]) == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(REPO)))
def test_each_settings_file_loads_with_the_command_on_top_of_it(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPO)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# finerank ") and str(path.relative_to(REPO)) in first
    assert cli.main([*shlex.split(first[2:])[1:], "--dry-run"]) == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(REPO)))
def test_settings_files_hold_only_what_differs_from_the_defaults(path: Path):
    from finerank import config, registry

    verb = path.read_text(encoding="utf-8").split()[2]
    settings_class = registry.load(cli.RECIPES, verb, "verb").Settings
    chosen = config.read_yaml(path, settings_class)
    defaults = config.to_dict(settings_class())
    resolved = config.to_dict(config.build(settings_class, chosen))
    same = [name for name in chosen if resolved[name] == defaults[name]]
    assert not same, f"{path.name} repeats the defaults of {same}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_links_between_the_documents_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_page_of_docs_is_in_the_index():
    index = (REPO / "docs" / "index.md").read_text(encoding="utf-8")
    names = [str(p.relative_to(REPO / "docs")) for p in REPO.glob("docs/**/*.md")]
    missing = [name for name in names if name != "index.md" and f"]({name})" not in index]
    assert not missing


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md"])
def test_the_annotated_tree_is_the_tree(name: str):
    text = (REPO / name).read_text(encoding="utf-8")
    block = text[text.index("    src/finerank/" if name == "README.md" else "src/finerank/\n") :]
    block = re.split(r"\n\n|```", block)[0]
    inside, package = [], REPO / "src" / "finerank"
    parent = REPO
    for line in block.splitlines():
        entry = line.split()[0]
        depth = len(line) - len(line.lstrip())
        base = len(block) - len(block.lstrip())
        if entry == "src/finerank/":
            continue
        parent = package if depth > base else REPO
        found = (parent / entry).exists() or bool(list(package.glob(f"*/{entry}")))
        assert found, f"{name} lists {entry}, which is not there"
        inside.append(entry.rstrip("/"))
    there = {p.name for p in package.iterdir() if not p.name.startswith(("_", ".")) and p.suffix in ("", ".py")}
    assert there <= set(inside), f"{name} lacks {there - set(inside)}"


def test_no_tracked_text_names_a_machine():
    """No absolute path of somebody's machine and no private address."""
    named = re.compile(r"(?<![\w.])/(?:root|tmp/w|work/(?:main|shared)|home/(?!some)[a-z]+)/|\b10\.\d+\.\d+\.\d+\b")
    wrong = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{path.relative_to(REPO)}: {match.group()}" for match in named.finditer(text)]
    assert not wrong, "\n".join(wrong)


def test_the_lock_names_no_index_and_pins_every_dependency():
    lines = (REPO / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line) for line in pins)
    assert "torch==2.13.0" in pins
    project = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.search(r"^dependencies = \[(.*?)^\]", project, flags=re.M | re.S)
    assert wanted is not None
    names = {re.split(r"[>=<]", w)[0].lower().replace("_", "-") for w in re.findall(r'"([^"]+)"', wanted.group(1))}
    assert names <= {line.split("==")[0] for line in pins}


def test_every_dependency_has_its_reason():
    project = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    reasons = (REPO / "docs" / "dependencies.md").read_text(encoding="utf-8")
    block = project[project.index("\ndependencies = [") : project.index("[project.optional-dependencies]")]
    missing = [n for w in re.findall(r'"([^"]+)"', block) if (n := re.split(r"[>=<]", w)[0]) not in reasons]
    assert not missing
