"""Show a row as the model will see it: text with the trained parts marked, ids and mask.

    finerank inspect alpaca.json --row 17 --load smollm2-135m
    finerank inspect data/alpaca --row 3 --tokenizer-name-or-path smollm2-135m       (an indexed prefix)

On a terminal the trained parts are green; elsewhere they stand between ⟦ and ⟧. Rows count from 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finerank.config import setting
from finerank.data.settings import RowSettings
from finerank.errors import ConfigError, DataError
from finerank.models.settings import SourceSettings, VocabularySettings

if TYPE_CHECKING:
    from finerank.data.types import Rendered


@dataclass(kw_only=True)
class Settings(SourceSettings, VocabularySettings, RowSettings):
    """All settings of inspect."""

    data: str | None = setting(None, help="file of rows, or an indexed prefix", positional=True)
    row: int = setting(1, help="number of the row, from 1")
    ids: bool = setting(True, help="list the token ids with their mask")
    color: bool | None = setting(None, help="colours instead of brackets; default: on a terminal")

    def __post_init__(self) -> None:
        if self.data is None:
            raise ConfigError("There is nothing to inspect; give a file of rows or an indexed prefix.")
        if self.row < 1:
            raise ConfigError(f"--row counts from 1, not {self.row}.")


def run(settings: Settings) -> int:
    """Inspect one row; see the module's docstring. Returns the exit status."""
    from finerank.data import prefixes
    from finerank.models.tokenizer import load_tokenizer

    assert settings.data is not None
    tokenizer = load_tokenizer(settings, new_tokens=settings.add_tokens)
    if prefixes.kind_of(settings.data) is not None:
        title, samples = _of_prefix(settings.data, settings.row)
    else:
        title, samples = _of_rows(settings, tokenizer)
    color = sys.stdout.isatty() if settings.color is None else settings.color
    print(title)
    for name, sample in samples.items():
        trained = sum(sample.loss_mask[1:])
        print(f"\n{name}: {len(sample.ids)} tokens, {trained} trained")
        print(marked_text(sample, tokenizer, color=color))
        if settings.ids:
            print(id_table(sample, tokenizer))
    return 0


def marked_text(sample: "Rendered", tokenizer: Any, *, color: bool) -> str:
    """The sample's text with its trained parts in green or between brackets."""
    opening, closing = ("\x1b[32m", "\x1b[0m") if color else ("⟦", "⟧")
    parts = []
    at = 0
    mask = sample.loss_mask
    while at < len(mask):
        end = at
        while end < len(mask) and mask[end] == mask[at]:
            end += 1
        text = tokenizer.decode(sample.ids[at:end], skip_special_tokens=False)
        parts.append(f"{opening}{text}{closing}" if mask[at] else text)
        at = end
    return "".join(parts)


def id_table(sample: "Rendered", tokenizer: Any) -> str:
    """One line for each token: position, id, whether it is trained, and its text."""
    lines = [f"{'at':>6} {'id':>8} trained  text"]
    for at, (token, label) in enumerate(zip(sample.ids, sample.labels, strict=True)):
        text = tokenizer.decode([token], skip_special_tokens=False)
        note = f"  (as {label})" if label not in (-100, token) else ""
        lines.append(f"{at:>6} {token:>8} {'yes' if label != -100 else '-':<7}  {text!r}{note}")
    return "\n".join(lines)


def _of_rows(settings: Settings, tokenizer: Any) -> tuple[str, "dict[str, Rendered]"]:
    import itertools

    from finerank.data.pipeline import LOOK_AHEAD, choose_handler
    from finerank.data.readers import input_files, read_rows
    from finerank.data.samples import SampleMaker, SampleRules
    from finerank.data.templates import load_template
    from finerank.data.types import Rendered

    assert settings.data is not None
    [path, *others] = input_files([settings.data])
    if others:
        raise ConfigError(f"{settings.data} holds {len(others) + 1} files; name one of them, e.g. {path}.")
    rows = read_rows(path)
    head = list(itertools.islice(rows, LOOK_AHEAD))
    found = next(((n, row) for n, row in itertools.chain(head, rows) if n == settings.row), None)
    if found is None:
        raise DataError(f"{path} has no row {settings.row}; rows count from 1.")
    choose = choose_handler(settings.handler_name, map_keys=settings.map_keys, mask_history=settings.mask_history)
    handler = choose(path, head)
    rules = SampleRules(
        seq_length=settings.seq_length,
        overlong=settings.overlong,
        train_on_prompt=settings.train_on_prompt,
        append_eod=settings.append_eod,
        pairwise=handler.kind == "pairwise",
    )
    result = SampleMaker(load_template(settings, tokenizer), rules)(handler, [found])
    if result.reasons:
        raise DataError(f"{path} row {settings.row} cannot be used: {result.reasons[0]}.")
    samples: dict[str, Rendered] = {}
    names = list(result.flat)
    for ids_name, labels_name in zip(names[::2], names[1::2], strict=True):
        at = 0
        for number, length in enumerate(result.lengths[ids_name].tolist(), start=1):
            ids, labels = (result.flat[name][at : at + length].tolist() for name in (ids_name, labels_name))
            part = f" {number}" if result.num_samples[0] > 1 else ""
            samples[ids_name.removesuffix("input_ids").rstrip("_") + part or "sample"] = Rendered(ids, labels)
            at += length
    cut = ", cut to --seq-length" if result.truncated[0] else ""
    return f"{path} row {settings.row} ({handler.name}{cut})", samples


def _of_prefix(prefix: str, row: int) -> tuple[str, "dict[str, Rendered]"]:
    from finerank.data import prefixes
    from finerank.data.indexed import IndexedFile
    from finerank.data.types import Rendered

    kind = prefixes.kind_of(prefix)
    pairs = {"sample": ("input_ids", "labels")}
    if kind == "pairwise":
        pairs = {side: (f"{side}_input_ids", f"{side}_labels") for side in ("chosen", "rejected")}
    samples = {}
    for name, (ids_name, labels_name) in pairs.items():
        if kind == "text":
            ids = labels = IndexedFile(prefixes.text_prefix(prefix))
        else:
            ids, labels = (IndexedFile(prefixes.field_prefix(prefix, field)) for field in (ids_name, labels_name))
        if row > min(len(ids), len(labels)):
            raise DataError(f"{prefix} has {len(ids)} samples, no number {row}; samples count from 1.")
        bounds = prefixes.segments(prefix, row - 1) if kind == "instruction" else [(0, int(ids.lengths[row - 1]))]
        for number, (start, end) in enumerate(bounds, start=1):
            part = f"{name} {number}" if len(bounds) > 1 else name
            samples[part] = Rendered(ids[row - 1][start:end].tolist(), labels[row - 1][start:end].tolist())
    return f"{Path(prefix)} sample {row}", samples
