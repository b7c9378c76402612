"""A folder is a registry: what a package offers is the modules in its folder.

    names("finerank.data.templates")                 -> ["alpaca", "chatml", ...]
    load("finerank.data.templates", "chatml", "template")  -> the module finerank/data/templates/chatml.py

To add a thing, add a file. Names may be written with hyphens; files have underscores. Modules that begin with an
underscore, and those without a public docstring, are helpers and are not listed.
"""

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from finerank.errors import ConfigError, unknown_name


def names(package: str) -> list[str]:
    """Names of the public modules directly inside `package`, sorted. Imports none of them."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, package
    return sorted(m.name for m in pkgutil.iter_modules(spec.submodule_search_locations) if not m.name.startswith("_"))


def load(package: str, name: str, kind: str) -> ModuleType:
    """The module `name` of `package`. Raises ConfigError with the nearest `kind` names when there is none."""
    module = name.replace("-", "_")
    if module not in names(package):
        raise ConfigError(unknown_name(kind, name, names(package)))
    return importlib.import_module(f"{package}.{module}")
