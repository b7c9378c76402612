"""The program starts itself anew once, with the same command line."""

import os
import subprocess
import sys

import pytest

from finerank.errors import ConfigError
from finerank.models import runtime

PROGRAM = """
import sys
from finerank.models.runtime import tune_runtime
tune_runtime()
import os
print(sys.argv[1:], os.environ.get("MALLOC_MMAP_MAX_"), os.environ.get("THP_MEM_ALLOC_ENABLE"))
"""
WHICH_ALLOCATOR = """
import sys
from finerank.models.runtime import tune_runtime
tune_runtime()
import os
with open("/proc/self/maps") as maps:
    print("mimalloc" in maps.read(), os.environ.get("MIMALLOC_PURGE_DELAY"), os.environ.get("MALLOC_MMAP_MAX_"))
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems are left alone")


@pytest.fixture
def start(tmp_path):
    """Runs the program under a name, with arguments and environment."""

    def run(*argv, name="finerank", program=PROGRAM, check=True, **environment):
        script = tmp_path / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(program)
        clean = {k: v for k, v in os.environ.items() if k not in runtime.NAMES}
        command = [sys.executable, str(script), *argv]
        return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=check)

    return run


@linux
@pytest.mark.parametrize("name", ["finerank", "finerank/__main__.py"])
def test_starts_anew_once_with_the_same_arguments(start, name):
    done = start("a b", "--c=d", name=name)
    assert done.stdout.strip() == "['a b', '--c=d'] None 1"
    assert done.stderr.count("runtime:") == 1 and "--no-tune-runtime" in done.stderr


@linux
def test_the_exit_status_survives(start):
    assert start(program=PROGRAM + "sys.exit(7)", check=False).returncode == 7


@linux
def test_another_program_is_not_started_anew(start):
    assert start(name="my_script.py").stdout.strip() == "[] None None"


@linux
def test_after_torch_nothing_happens(start):
    program = "import sys, types; sys.modules['torch'] = types.ModuleType('torch')" + PROGRAM
    assert start(program=program).stdout.strip() == "[] None None"


@linux
def test_the_allocator_is_mimalloc(start):
    assert start(program=WHICH_ALLOCATOR).stdout.strip() == "True -1 None"


@linux
@pytest.mark.parametrize("path", [None, "/a b/libmimalloc.so", "/there/is/no/libmimalloc.so"])
def test_without_mimalloc_glibc_keeps_its_memory(start, path):
    """The package is not installed, lies where LD_PRELOAD cannot name it, or has lost its library."""
    program = f"""
import importlib.metadata, types
path = {path!r}
def files(name):
    if path is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return [types.SimpleNamespace(name="libmimalloc.so", locate=lambda: path)]
importlib.metadata.files = files
{WHICH_ALLOCATOR}"""
    assert start(program=program).stdout.strip() == "False None 0"


@linux
def test_what_the_user_has_set_stays(start):
    done = start(**dict.fromkeys((*runtime.FOR_TORCH, *runtime.KEPT_BY_GLIBC), "1"))
    assert done.stdout.strip() == "[] 1 1" and "runtime:" not in done.stderr
    assert start(MALLOC_MMAP_MAX_="5", program=WHICH_ALLOCATOR).stdout.strip() == "False None 5"


@linux
def test_what_the_user_preloads_stays():
    def allocator(preloaded):
        changes = runtime.wanted_environment({"LD_PRELOAD": preloaded})
        return {"LD_PRELOAD", *runtime.KEPT_BY_MIMALLOC, *runtime.KEPT_BY_GLIBC} & changes.keys()

    assert allocator("/usr/lib/libjemalloc.so.2") == set()
    assert allocator("/usr/lib/libfaketime.so.1") == set(runtime.KEPT_BY_GLIBC)
    assert allocator("") == {"LD_PRELOAD", *runtime.KEPT_BY_MIMALLOC}


@linux
def test_threads_are_set_when_asked_for():
    assert runtime.wanted_environment({}, num_threads=3)["OMP_NUM_THREADS"] == "3"
    assert runtime.wanted_environment({"OMP_NUM_THREADS": "8"}, num_threads=3)["OMP_NUM_THREADS"] == "3"
    assert runtime.wanted_environment({runtime.MARK: "1"}, num_threads=3) == {}


@pytest.mark.parametrize(
    "files, cpus",
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota_counts(tmp_path, files, cpus, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert runtime.usable_cpus(tmp_path) == (64 if cpus is None else cpus)


def test_threads_below_one_are_refused():
    with pytest.raises(ConfigError, match="--threads is 0"):
        runtime.set_threads(0)
    runtime.tune_runtime(num_threads=0)


def test_threads_are_used(start):
    program = (
        "from finerank.models.runtime import set_threads\nset_threads(1)\nimport torch; print(torch.get_num_threads())"
    )
    assert start(program=program).stdout.strip() == "1"
