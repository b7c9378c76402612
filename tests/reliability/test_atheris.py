"""The parsers of `test_fuzz`, fed by atheris, which follows the branches that an input takes.

Each parser runs in a process of its own, since atheris ends its process; `FINERANK_ATHERIS_RUNS` sets how many inputs
(100,000). Skipped where atheris is not installed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_fuzz

HARNESS = """
import sys, warnings
from pathlib import Path
import atheris
with atheris.instrument_imports(include=["finerank"]):
    import test_fuzz
    from finerank.errors import FinerankError
name, folder, runs = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
warnings.simplefilter("ignore")
parser = test_fuzz.PARSERS[name]
parser.make(folder)
path = folder / parser.file
corpus = folder / "corpus"
corpus.mkdir()
(corpus / "sample").write_bytes(path.read_bytes())
siblings = {p: p.read_bytes() for p in path.parent.iterdir() if p != path and p.is_file()}

def one_input(content):
    for sibling, before in siblings.items():
        if not sibling.is_file() or sibling.stat().st_size != len(before):
            sibling.write_bytes(before)
    path.write_bytes(content)
    try:
        parser.read(path)
    except FinerankError:
        pass

options = [f"-runs={runs}", "-rss_limit_mb=0", "-timeout=60", "-max_len=16384"]
atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
with test_fuzz.limited_memory():  # instead of libFuzzer's limit, which is looked at once a second
    atheris.Fuzz()
"""


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", test_fuzz.PARSERS)
def test_guided_inputs_raise_only_our_errors(tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (pip install atheris)")
    runs = os.environ.get("FINERANK_ATHERIS_RUNS", "100000")
    here = Path(__file__).parent
    search = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, name, str(tmp_path), runs],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
