"""What docs/security.md says of the source as a whole: no pickle opened freely, no remote code by default."""

import ast
from pathlib import Path

import pytest

import finerank
from finerank.models.settings import ModelSettings

ROOT = Path(finerank.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """(dotted name, node) of each call in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.literal_eval(k.value) for k in call.keywords if k.arg == name), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_is_run_from_data(path: Path) -> None:
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "marshal.loads"}
    forbidden |= {"yaml.unsafe_load", "os.system", "joblib.load", "dill.loads", "jinja2.Template"}
    for name, call in calls(path):
        assert name not in forbidden, f"{path}:{call.lineno} calls {name}"
        if name in ("torch.load", "np.load", "numpy.load"):
            safe = keyword(call, "weights_only") is True or keyword(call, "allow_pickle") is False
            assert safe, f"{path}:{call.lineno} opens pickles: say weights_only=True or allow_pickle=False"
        if name == "yaml.load":
            loader = next(ast.unparse(k.value) for k in call.keywords if k.arg == "Loader")
            assert f"class {loader}(yaml.SafeLoader):" in path.read_text(encoding="utf-8"), f"{path}:{call.lineno}"
        if name.startswith("subprocess."):
            assert keyword(call, "shell") is not True, f"{path}:{call.lineno} runs a shell"


def test_remote_code_has_to_be_asked_for() -> None:
    assert ModelSettings().trust_remote_code is False
    for path in SOURCES:
        for name, call in calls(path):
            for k in call.keywords:
                if k.arg == "trust_remote_code":
                    given = ast.unparse(k.value)
                    assert given.endswith(".trust_remote_code") or given == "False", f"{path}: {name} gets {given}"
