"""Write the pinned requirements from the running environment.

    python tools/make_lock.py requirements.lock

No hashes: a machine may have its own build of torch (CPU only, or for its CUDA version), which carries the same
version number with a local suffix; the suffix is dropped here for the same reason.
"""

import importlib.metadata
import re
import sys
from pathlib import Path

LEFT_OUT = {"finerank", "pip"}
HEADER = "# Pinned versions for `make quickstart` and `make test` (Python 3.11). Written by `make lock`.\n"


def main(path: str) -> int:
    pins = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name not in LEFT_OUT:
            pins[name] = distribution.version.split("+")[0]
    Path(path).write_text(HEADER + "".join(f"{n}=={v}\n" for n, v in sorted(pins.items())), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
