"""A run's own checkpoints: state that resumes exactly, in folders that cannot be torn.

    checkpoint-120/
      state.safetensors     every tensor of the state: trained parameters, optimizer moments
      state.json            step, counters, best-so-far, what the run was made of
      adapter_config.json, adapter_model.safetensors   the adapter at this step, to be used like a finished one
      manifest.json         {"files": {name: {"bytes": n, "sha256": hex}}}, sorted

The folder is written aside, flushed and renamed (`finerank.files.replace_folder`); the manifest proves that what is
read is what was written. There is no pickle in it, and no time: the same state gives the same bytes.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from finerank.checkpoints.checksums import difference, files_below, fingerprints
from finerank.checkpoints.safetensors_file import SafetensorsWriter
from finerank.checkpoints.weights import TensorInfo
from finerank.errors import CheckpointError
from finerank.files import discard_folder, leftovers_of_replacing, remove_leftovers, replace_folder, storage_errors

FORMAT = 1
"""Number of this layout; a reader refuses other ones."""
_STATE, _TENSORS, _MANIFEST = "state.json", "state.safetensors", "manifest.json"
_NAME = re.compile(r"checkpoint-(\d{1,18})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def step(self) -> int:
        """Optimizer steps finished when it was saved."""
        return int(self.state["step"])


def beside(folder: Path, name: str) -> Path:
    """A run's file by the folder of its adapter: that of the run, or of one of its checkpoints, which lie in it."""
    if not (folder / name).exists() and folder.name.startswith("checkpoint-"):
        return folder.parent / name
    return folder / name


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in a run folder."""
    return run / f"checkpoint-{step}"


def save_checkpoint(
    folder: Path,
    *,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write a whole checkpoint, or nothing.

    Args:
        folder: where it appears; an existing checkpoint there is replaced.
        state: JSON values with at least `step`.
        tensors: on any device; stored sorted.
        write_more: writes further files into the given folder; the manifest covers them.

    Raises:
        StorageError: the disk is full, read-only or gone. What was at `folder` before is still there.
    """
    with replace_folder(folder) as aside:
        _write_tensors(aside / _TENSORS, tensors)
        _write_json(aside / _STATE, {"format": FORMAT, **state})
        if write_more is not None:
            write_more(aside)
        files = fingerprints(aside, files_below(aside))
        _write_json(aside / _MANIFEST, {"files": files, "format": FORMAT})


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking it whole. Raises CheckpointError naming what is wrong."""
    folder = Path(folder)
    if problem := damage(folder):
        raise CheckpointError(f"{folder} cannot be resumed: {problem}; use --resume auto or another checkpoint.")
    state = _read_json(folder / _STATE)
    if not isinstance(state.get("step"), int) or state.get("format") != FORMAT:
        raise CheckpointError(f"{folder} was not written by this version of finerank; resume it with the one that did.")
    try:
        tensors = safetensors.torch.load_file(folder / _TENSORS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / _TENSORS} is damaged ({error}); use another checkpoint.") from error
    return Checkpoint(folder=folder, state=state, tensors=tensors)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when every file is as the manifest says."""
    if not folder.is_dir():
        return "it does not exist"
    try:
        files = _read_json(folder / _MANIFEST).get("files")
    except CheckpointError as error:
        return str(error).rstrip(".")
    if not isinstance(files, dict) or not {_STATE, _TENSORS} <= set(files):
        return f"{_MANIFEST} lists no state"
    return difference(folder, files, listed_in=_MANIFEST)


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything in a run folder that is named like a checkpoint, oldest first; not checked."""
    if not run.is_dir():
        return []
    named = [(_NAME.fullmatch(p.name), p) for p in run.iterdir() if p.is_dir()]
    return sorted((int(m.group(1)), p) for m, p in named if m)


def newest_whole(run: Path, *, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint of a run; `say` is told of each that was skipped, and why."""
    for step, folder in reversed(checkpoints(run)):
        problem = damage(folder) or _misnamed(step, folder)
        if problem is None:
            return folder
        say(f"skipped {folder.name}: {problem}")
    return None


def _misnamed(step: int, folder: Path) -> str | None:
    """A copy under another name would be taken for a later state than it is."""
    try:
        saved = _read_json(folder / _STATE).get("step")
    except CheckpointError as error:
        return str(error).rstrip(".")
    return None if saved == step else f"it holds step {saved}, not what its name says"


def tidy_after_kill(run: Path) -> None:
    """Put a checkpoint back that a kill left without its name, and remove what else was left half written.

    Only for a folder that no other process writes to. Raises StorageError.
    """
    with storage_errors(run):
        for target, aside in leftovers_of_replacing(run):
            if _NAME.fullmatch(target.name) and not target.exists() and damage(aside) is None:
                os.rename(aside, target)
        remove_leftovers(run)


def prune(run: Path, *, newest: int, keep_last: int, keep_steps: Iterable[int | None] = ()) -> None:
    """Remove all checkpoints up to step `newest` but the last `keep_last` (at least 1) and those of `keep_steps`.

    What is named after a later step is not this run's, so it is neither counted nor touched.
    """
    found = [(step, folder) for step, folder in checkpoints(run) if step <= newest]
    kept = {step for step, _ in found[-max(keep_last, 1) :]} | set(keep_steps)
    for step, folder in found:
        if step not in kept:
            discard_folder(folder)


def drop_newer(run: Path, step: int) -> list[int]:
    """Remove the checkpoints after `step`, which a run resumed from `step` writes again; returns their steps."""
    newer = [(s, folder) for s, folder in checkpoints(run) if s > step]
    for _, folder in newer:
        discard_folder(folder)
    return [s for s, _ in newer]


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One after the other from where they lie: making the whole file in memory first would hold training up."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that all are aligned
    entries = {name: TensorInfo(tuple(tensors[name].shape), tensors[name].dtype) for name in names}
    with SafetensorsWriter(path, entries) as file:
        for name in names:
            file.write(name, tensors[name])


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} holds no JSON object.")
    return value
