"""Create the virtual environment, with pip, also where Debian ships Python without `ensurepip`.

    python3 tools/make_venv.py .venv

Where `ensurepip` is missing (a Debian or Ubuntu without the package python3-venv), the environment is made without pip
and the pip wheel beside this file installs itself into it, so nothing has to be installed by hand.
"""

import importlib.util
import subprocess
import sys
import venv
from pathlib import Path

SUPPORTED = ((3, 11), (3, 13))  # of the pinned packages; finerank itself runs on 3.10 too


def main(folder: str) -> int:
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        found = ".".join(map(str, sys.version_info[:2]))
        print(f"the pinned packages need Python 3.11 to 3.13, not {found}: run make with PYTHON=/path/to/python3.11,")
        print("or, with Python 3.10, install finerank with pip: pip install .")
        return 1
    python = Path(folder) / "bin" / "python"
    if python.exists() and subprocess.call([python, "-m", "pip", "--version"], stdout=subprocess.DEVNULL) == 0:
        return 0  # a working environment is kept: something may be running from it
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    print(f"creating {folder} with Python {sys.version.split()[0]} ...", flush=True)
    venv.EnvBuilder(with_pip=has_ensurepip, clear=True, symlinks=True).create(folder)
    if has_ensurepip:
        return 0
    wheel = next(Path(__file__).parent.glob("pip-*.whl"))
    return subprocess.call([python, f"{wheel}/pip", "install", "--quiet", "--no-index", str(wheel)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
