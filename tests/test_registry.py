"""A folder is a registry: what is in it is found, helpers are not, and a wrong name is told the nearest."""

import pytest

from finerank import registry
from finerank.errors import ConfigError, unknown_name


def test_public_modules_are_found_and_helpers_are_not():
    found = registry.names("finerank.recipes")
    assert "tune" in found and found == sorted(found) and not [n for n in found if n.startswith("_")]


def test_a_module_is_loaded_by_its_name_with_hyphens_too():
    assert registry.load("finerank.data.templates", "chatglm3-system", "template").__name__.endswith("chatglm3_system")


@pytest.mark.parametrize("name", ["tnue", "../cli", "os", "", "_private", "tune.x"])
def test_what_is_not_there_is_refused_with_what_is(name: str):
    with pytest.raises(ConfigError, match=r"Unknown verb .*(Known|Nearest): .*tune"):
        registry.load("finerank.recipes", name, "verb")


def test_many_names_are_shortened_to_the_nearest():
    said = unknown_name("flag", "--lrr", [f"--flag-{i}" for i in range(60)] + ["--lr"])
    assert "Did you mean '--lr'?" in said and said.count(",") == 7
