"""Token data sets: samples on disk, mapped into memory, and how rows or indexed files become one.

    splits = load_splits(settings, tokenizer, template, seed=1234, output_dir=folder)
    splits.train.ids(0), splits.train.labels(0)

Rows (`--data-path rows.json`) are turned into ids once and kept under the cache folder; the key is made of the contents
of the rows, the tokenizer, the template and every setting that changes ids, so that a changed template can never meet
old ids. An indexed prefix (`--data-path PREFIX`, from `finerank preprocess` or MindSpeed-LLM) is used as it is.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finerank.data import pair_prefixes, prefixes, row_cache
from finerank.data.pairs import Samples
from finerank.data.receipt import Receipt
from finerank.data.settings import DataSettings
from finerank.data.stages import check_kind, check_stage
from finerank.data.templates import Template
from finerank.data.tokens import TokenDataset
from finerank.errors import ConfigError, DataError
from finerank.files import write_text

__all__ = ["Splits", "TokenDataset", "load_splits"]


@dataclass(frozen=True)
class Splits:
    """What is trained on, what is held out, and what became of the rows (`receipt.json` as a dict)."""

    train: Samples
    valid: Samples | None
    receipt: dict[str, Any]


def load_splits(
    settings: DataSettings, tokenizer: Any, template: Template, *, seed: int, output_dir: Path | None = None
) -> Splits:
    """The data of a training run; prints the receipt and writes it to `output_dir/receipt.json`.

    Raises:
        ConfigError: settings that exclude each other or fit no data.
        DataError: files that cannot be read, rows that cannot be used (`--strict`), or no sample left.
    """
    _check(settings)
    receipt = Receipt()
    parts = _load(settings, settings.data_path, template, receipt, by_path=bool(settings.data_weights))
    data = _join(parts)
    held_out = _load(settings, settings.valid_data_path, template, receipt) if settings.valid_data_path else None
    _say_and_save(receipt, output_dir)
    _require_samples(data, receipt, "--data-path")
    if held_out is not None:
        valid = _join(held_out)
        _require_samples(valid, receipt, "--valid-data-path")
        train = np.arange(len(data))
    else:
        train, valid_indices = split_indices(len(data), settings, seed=seed)
        valid = data.subset(valid_indices)
    if settings.max_samples is not None:
        train = train[: settings.max_samples]
    if settings.data_weights:
        train = _weighted(train, [len(part) for part in parts], settings.data_weights, seed=seed)
    return Splits(data.subset(train), valid if len(valid) else None, receipt.to_dict())


def split_indices(num: int, settings: DataSettings, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the training and the held-out samples.

    `--val-set-size` draws at random from the seed; `--split 949,50,1` cuts in order, as Megatron does, and leaves the
    third part out. Raises ConfigError when nothing is left to train on.
    """
    everything = np.arange(num)
    if settings.split is not None:
        first, second, _ = split_boundaries(settings.split, num)
        train, valid = everything[:first], everything[first:second]
    elif settings.val_set_size:
        size = settings.val_set_size
        count = int(size) if size >= 1 else max(1, round(size * num))
        drawn = np.random.default_rng([seed, 0x7A1]).permutation(num)
        valid = np.sort(drawn[:count])
        train = np.sort(drawn[count:])
    else:
        return everything, everything[:0]
    if not len(train):
        raise ConfigError(
            f"No sample of {num} is left to train on; lower --val-set-size or change --split {settings.split or ''}."
        )
    return train, valid


def split_boundaries(split: str, num: int) -> list[int]:
    """Ends of train, valid and test in order; Megatron's rule: `949,50,1` of 20 -> [19, 20, 20]. Raises ConfigError."""
    try:
        weights = [float(part) for part in split.replace("/", ",").split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"--split needs up to three numbers like 949,50,1, not {split!r}.") from error
    weights = [*weights, 0.0, 0.0, 0.0][: max(3, len(weights))]
    if len(weights) != 3 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise ConfigError(f"--split needs up to three numbers like 949,50,1, not {split!r}.")
    ends = [0]
    for weight in weights:
        ends.append(ends[-1] + round(weight / sum(weights) * num))
    over = ends[-1] - num
    return [end - over for end in ends[1:]]


def _check(settings: DataSettings) -> None:
    if not settings.data_path:
        raise ConfigError("There is no data to train on; give --data-path with a file of rows.")
    check_stage(settings)
    given = [
        name
        for name, value in (
            ("--val-set-size", settings.val_set_size),
            ("--split", settings.split),
            ("--valid-data-path", settings.valid_data_path),
        )
        if value
    ]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other; give one of them.")
    if not settings.val_set_size >= 0 or (settings.val_set_size > 1 and not float(settings.val_set_size).is_integer()):
        raise ConfigError(f"--val-set-size is a count of samples or a share below 1, not {settings.val_set_size}.")
    if settings.seq_length < 2:
        raise ConfigError(f"--seq-length must be at least 2, not {settings.seq_length}.")
    if settings.max_samples is not None and settings.max_samples < 1:
        raise ConfigError(f"--max-samples must be at least 1, not {settings.max_samples}.")
    if settings.workers < 1:
        raise ConfigError(f"--workers must be at least 1, not {settings.workers}.")
    weights = settings.data_weights
    if weights and (len(weights) != len(settings.data_path) or not all(0 < w < float("inf") for w in weights)):
        raise ConfigError(
            f"--data-weights needs one positive number for each of the {len(settings.data_path)} --data-path."
        )


def _load(
    settings: DataSettings, paths: Sequence[str], template: Template, receipt: Receipt, *, by_path: bool = False
) -> list[Samples]:
    """Data sets of paths in order; neighbouring files of rows make one, unless each needs a weight of its own."""
    groups: list[list[str]] = []
    for path in paths:
        is_rows = prefixes.kind_of(path) is None
        if groups and is_rows and not by_path and prefixes.kind_of(groups[-1][0]) is None:
            groups[-1].append(path)
        else:
            groups.append([path])
    loaded: list[Samples] = []
    for group in groups:
        kind = prefixes.kind_of(group[0])
        if kind is None:
            loaded.append(row_cache.rows_dataset(settings, group, template, receipt))
        else:
            check_kind(group[0], kind, settings.stage)
            read = pair_prefixes.pair_dataset if kind == "pairwise" else prefixes.prefix_dataset
            loaded.append(read(settings, group[0], template, receipt))
    return loaded


def _join(parts: Sequence[Samples]) -> Samples:
    kind = type(parts[0])
    assert all(type(part) is kind for part in parts)
    return kind.concat(parts)  # type: ignore[arg-type]


def _require_samples(data: Samples, receipt: Receipt, flag: str) -> None:
    if len(data):
        return
    reasons = {reason: c.count for file in receipt.files for reason, c in file.dropped.items()}
    why = "; ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items(), key=lambda x: -x[1])[:3])
    raise DataError(f"{flag} has no sample to use" + (f": {why}." if why else ": there are no rows; give other data."))


def _weighted(train: np.ndarray, sizes: Sequence[int], weights: Sequence[float], *, seed: int) -> np.ndarray:
    """Indices in which each path has its weight's share of as many samples as there are; whole passes, then a draw."""
    ends = np.cumsum(sizes)
    drawn = []
    for i, (end, size, weight) in enumerate(zip(ends, sizes, weights, strict=True)):
        own = train[(train >= end - size) & (train < end)]
        count = round(weight / sum(weights) * len(train))
        if count and not len(own):
            raise ConfigError(f"--data-path number {i + 1} has a weight and no sample to train on; leave it out.")
        passes, rest = divmod(count, max(len(own), 1))
        extra = np.random.default_rng([seed, 0x3E1, i]).permutation(own)[:rest]
        drawn.append(np.concatenate([np.tile(own, passes), np.sort(extra)]))
    return np.concatenate(drawn)


def _say_and_save(receipt: Receipt, output_dir: Path | None) -> None:
    print(receipt.table(), file=sys.stderr, flush=True)
    if output_dir is not None:
        write_text(Path(output_dir) / "receipt.json", receipt.to_json())
