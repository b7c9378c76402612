"""Settings: one name everywhere, strict values, YAML under flags, nothing swallowed."""

import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from finerank import config
from finerank.config import setting
from finerank.errors import ConfigError


@dataclass(kw_only=True)
class Low:
    """Lower settings."""

    lr: float = setting(2e-4, help="rate", flags=("--learning-rate",))
    steps: int | None = setting(None, help="steps")
    pack: bool = setting(True, help="pack", flags=("--no-padding",))


@dataclass(kw_only=True)
class Settings(Low):
    """Own settings."""

    IGNORED_FLAGS: ClassVar[tuple[str, ...]] = ("--spec",)

    paths: list[str] = setting([], help="paths")
    stop: list[str] = setting([], help="texts", split=False)
    ranks: dict[str, int] = setting({}, help="rank by name")
    thinking: str = setting("none", choices=("true", "false", "none"), help="100% thinking")
    name: str | None = setting(None, help="name")


def parse(*argv: str) -> Settings:
    return config.parse(Settings, argv, verb="try").settings


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_win_over_yaml_which_wins_over_defaults(tmp_path: Path):
    path = written(tmp_path, "lr: 1e-3\nsteps: 5\n")
    assert parse("--config", path, "--steps", "7") == Settings(lr=1e-3, steps=7)


@pytest.mark.parametrize(
    "argv", [["--learning-rate", "0.1"], ["--learning_rate=0.1"], ["--lr=1e-1"], ["--lr", "0.1", "--learning-rate=0.1"]]
)
def test_a_setting_has_several_spellings(argv: list[str]):
    assert parse(*argv).lr == 0.1


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--pack"], True),
        (["--no-pack"], False),
        (["--pack", "false"], False),
        (["--pack=False"], False),
        (["--no-padding"], True),
        (["--pack", "--pack", "true"], True),
    ],
)
def test_switches(argv: list[str], value: bool):
    assert parse(*argv).pack is value


@pytest.mark.parametrize(
    "argv",
    [["a", "b"], ["a,b"], ["[a,b]"], ["['a', 'b']"]],
)
def test_lists_in_every_spelling(argv: list[str]):
    assert parse("--paths", *argv).paths == ["a", "b"]


def test_free_text_keeps_its_commas_and_spaces(tmp_path: Path):
    assert parse("--stop", ", ", "a,b").stop == [", ", "a,b"]
    assert parse("--config", written(tmp_path, 'stop: [", "]\npaths: ["a,b"]\n')) == Settings(
        stop=[", "], paths=["a,b"]
    )


def test_a_files_name_may_hold_a_comma(tmp_path: Path):
    path = tmp_path / "a,b.json"
    path.touch()
    assert parse("--paths", str(path)).paths == [str(path)]


@pytest.mark.parametrize("argv", [["q=8", "v=4"], ["q=8,v=4"], ['{"q": 8, "v": 4}']])
def test_mappings_in_every_spelling(argv: list[str]):
    assert parse("--ranks", *argv).ranks == {"q": 8, "v": 4}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--learnig-rate", "1"], "--learning-rate"),
        (["--lr", "fast"], "--lr needs a number, not 'fast'"),
        (["--lr", "nan"], "--lr needs a number"),
        (["--lr"], "--lr"),
        (["--steps", "1.5"], "--steps needs a whole number"),
        (["--steps", "1e3"], "--steps needs a whole number"),
        (["--pack=maybe"], "--pack needs true or false"),
        (["--no-pack", "false"], "takes no value"),
        (["--thinking", "yes"], "Known: false, none, true"),
        (["--ranks", "q"], "key=value"),
        (["--ranks", "{q: 1"], "not JSON"),
        (["--ranks", "q=big"], "--ranks needs a whole number"),
        (["stray"], "cannot place 'stray'"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--lr", "1", "--learning-rate", "2"], "--lr 1 and --learning-rate 2"),
        (["--paths", "a", "--paths", "b"], "--paths a and --paths b"),
        (["--pack", "--no-pack"], "--pack True and --no-pack False"),
    ],
)
def test_wrong_flags_are_one_sentence_with_the_fix(argv: list[str], said: str):
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lrr: 1", "Did you mean 'lr'"),
        ("lr: 1\nlr: 2", "lr is given twice"),
        ("lr: 1\nlearning-rate: 2", "lr is given twice"),
        ("- a\n- b", "not a list"),
        ("lr: [1", "not valid YAML"),
        ("lr: [1]", "--lr: [1] is not one value"),
        ("lr:", "--lr needs a value"),
        ("paths: [null]", "--paths"),
        ("paths: [[a]]", "--paths"),
        ("ranks: {q: null}", "--ranks"),
        ("ranks: {q: 1, q: 2}", "q is given twice"),
        ("name: no", "write it in quotes"),
        ("steps: 2026-01-01", "--steps needs a whole number"),
        ("? [a]\n: 1", "not valid YAML"),
        ("lr: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("lr: 1" + "0" * 400, "--lr needs a number"),
    ],
)
def test_wrong_yaml_is_one_sentence_naming_the_file_or_setting(tmp_path: Path, text: str, said: str):
    with pytest.raises(ConfigError) as error:
        parse("--config", written(tmp_path, text))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_words_that_are_booleans_choose_among_text_choices(tmp_path: Path):
    assert parse("--config", written(tmp_path, "thinking: true")).thinking == "true"


def test_a_missing_setting_is_named():
    @dataclass(kw_only=True)
    class Needs:
        """Needs one."""

        to: str = setting(help="where")

    with pytest.raises(ConfigError, match="Missing --to"):
        config.parse(Needs, [], verb="try")


def test_flags_of_other_programs_are_skipped_with_a_warning(capsys: pytest.CaptureFixture[str]):
    assert parse("--spec", "a", "b", "--steps", "3").steps == 3
    assert "--spec changes nothing" in capsys.readouterr().err


def test_help_groups_the_flags_by_the_class_that_owns_them(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        parse("--help")
    shown = capsys.readouterr().out
    assert done.value.code == 0
    assert shown.index("Own settings:") < shown.index("--paths") < shown.index("Lower settings:") < shown.index("--lr")
    assert "100% thinking (true, false, none) [none]" in shown


def test_defaults_are_not_shared_between_instances():
    one, two = Settings(), Settings()
    one.paths.append("a")
    assert two.paths == [] and Settings().ranks is not Settings().ranks


def test_a_value_of_a_plain_dataclass_field_is_taken_too():
    @dataclass
    class Plain:
        """Plain."""

        sizes: list[int] = field(default_factory=list)

    assert config.build(Plain, {"sizes": "1,2"}) == Plain([1, 2])


texts = st.text(string.printable + "中文é", max_size=12)
words = texts.filter(lambda t: t.lower() not in ("none", "null"))


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lr=st.floats(allow_nan=False, allow_infinity=False),
    steps=st.none() | st.integers(),
    pack=st.booleans(),
    paths=st.lists(texts, max_size=3),
    ranks=st.dictionaries(texts, st.integers(), max_size=3),
    name=st.none() | words,
)
def test_saved_settings_come_back_unchanged(tmp_path: Path, **values: object):
    before = Settings(**values)  # type: ignore[arg-type]
    path = written(tmp_path, config.to_yaml(before))
    assert parse("--config", path) == before


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=60)
    | st.text("lr:[]{}&*!|>'\"%@`-?, \n\t01", max_size=40).map(str.encode)
    | st.dictionaries(
        st.sampled_from(["lr", "steps", "pack", "paths", "ranks", "name", "x"]),
        st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | texts | st.dates(), st.lists),
        max_size=3,
    ).map(lambda d: yaml.safe_dump(d, allow_unicode=True).encode())
)
def test_any_settings_file_gives_settings_or_a_config_error(tmp_path: Path, data: bytes):
    path = tmp_path / "s.yaml"
    path.write_bytes(data)
    try:
        result = parse("--config", str(path))
    except ConfigError as error:
        assert str(error)
    else:
        assert isinstance(result.lr, float) and isinstance(result.pack, bool)
        assert all(isinstance(p, str) for p in result.paths)
