"""The program as a user meets it: verbs, help, one-sentence errors, exit codes, and nothing touched by --dry-run."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finerank import __version__, cli, registry
from finerank.flags import flag_name

VERBS = registry.names(cli.RECIPES)


def example(verb: str) -> list[str]:
    """The arguments of the first example in a recipe's docstring."""
    docstring = (registry.load(cli.RECIPES, verb, "verb").__doc__ or "").replace("\\\n", " ")
    line = next(line for line in docstring.splitlines() if line.strip().startswith(f"finerank {verb}"))
    return shlex.split(line.split("   # ")[0].strip().split("    ")[0])[2:]


def finerank(*argv: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "finerank", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_the_verbs_of_the_first_release_are_there():
    assert {"tune", "generate", "chat", "merge", "convert", "export", "report", "quickstart"} <= set(VERBS)


def test_usage_lists_every_verb_with_its_first_line(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    for verb in VERBS:
        line = next(line for line in shown.splitlines() if line.split()[:1] == [verb])
        assert line.rstrip().endswith(".") and len(line.split()) > 3, line


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"finerank {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_shows_its_docstring_and_flags(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        cli.main([verb, "--help"])
    shown = capsys.readouterr().out
    assert done.value.code == 0
    assert "--dry-run" in shown and "--config" in shown and cli._first_line(verb) in shown
    longest = max(shown.splitlines(), key=len)
    assert len(longest) <= 120, longest


@pytest.mark.parametrize("verb", VERBS)
def test_dry_run_prints_settings_that_give_themselves_back_and_touches_nothing(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("FINERANK_HOME", str(tmp_path / "home"))
    argv = example(verb)
    assert cli.main([verb, *argv, "--dry-run"]) == 0
    first = capsys.readouterr().out
    assert yaml.safe_load(first)
    assert tree(tmp_path) == {"work"}
    (tmp_path / "again.yaml").write_text(first, encoding="utf-8")
    assert cli.main([verb, "--dry-run", "--config", str(tmp_path / "again.yaml")]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_flag_of_each_verb_is_one_sentence(verb: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([verb, *example(verb), "--confg", "x"]) == 2
    said = capsys.readouterr().err
    assert "--config" in said and said.count("\n") == 1 and "Traceback" not in said


REPLACED = [
    (verb, flag)
    for verb in ("preprocess", "tune")
    for flag in registry.load(cli.RECIPES, verb, "verb").Settings.REPLACED_FLAGS
]


@pytest.mark.parametrize(("verb", "flag"), REPLACED)
def test_a_flag_of_another_program_says_what_to_use_instead(verb: str, flag: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([verb, *example(verb), flag, "0.5"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"finerank: finerank {verb} has no {flag}: ") and said.count("\n") == 1
    settings = [registry.load(cli.RECIPES, verb, "verb").Settings for verb in ("preprocess", "tune")]
    known = {flag_name(field.name) for own in settings for field in dataclasses.fields(own)}
    assert set(re.findall(r"--[a-z0-9-]+", said)) - {flag} <= known


@pytest.mark.parametrize("argv", [["tnue"], ["../cli"], ["--foo"], [""], ["tune.py"]])
def test_an_unknown_verb_is_one_sentence(argv: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("finerank: Unknown verb") and "tune" in said and said.count("\n") == 1


def test_a_misspelt_verb_is_told_the_nearest(capsys: pytest.CaptureFixture[str]):
    cli.main(["tnue"])
    assert "Did you mean 'tune'?" in capsys.readouterr().err


def test_flag_errors_and_help_load_no_torch(tmp_path: Path):
    code = (
        "import sys; from finerank import cli; cli.main(['tune', '--lorar', '8']); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["tune", "--lora-r", "none"], "--lora-r"),
        (["tune", "--config", "."], "settings file"),
        (["report", "absent"], "absent"),
        (["report"], "at least one run folder"),
        (["merge", "absent", "--save-dir", "out"], "absent"),
        (["generate", "--input", "absent.txt", "--load", "absent"], "absent"),
        (["tune", "--load", "absent", "--data-path", "rows.json"], "absent"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_output(argv: list[str], said: str, tmp_path: Path):
    done = finerank(*argv, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("finerank: ")
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs" / "latest" / "results.json").exists()


def test_a_reader_that_goes_away_ends_the_program_quietly(tmp_path: Path):
    command = f"{sys.executable} -m finerank tune --help | head -n 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (0, 141) and done.stderr == ""


def test_an_error_of_the_operating_system_names_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(argv: list[str]) -> int:
        raise PermissionError(13, "Permission denied", "rows.json")

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main([]) == 5
    assert capsys.readouterr().err.startswith("finerank: rows.json: permission denied;")


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    def fail(argv: list[str]) -> int:
        raise AssertionError("a bug")

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(AssertionError, match="a bug"):
        cli.main([])


def test_ctrl_c_is_said_and_has_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "finerank: interrupted\n"


def test_chinese_text_survives_a_terminal_that_cannot_show_it(tmp_path: Path):
    done = finerank("tune", "--dry-run", "--output-dir", "运行", cwd=tmp_path, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and "output_dir: \\u8fd0\\u884c" in done.stdout
