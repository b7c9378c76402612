"""Turn instruction rows into Megatron indexed files (.bin/.idx) that tune trains from.

    finerank preprocess --input alpaca.json --output-prefix data/alpaca --handler-name AlpacaStyleInstructionHandler
        --tokenizer-name-or-path smollm2-135m --prompt-type qwen --workers 2
    finerank tune --data-path data/alpaca ...

The files are those of MindSpeed-LLM's preprocess_data.py, and its command lines work. What became of each row is
printed and written to PREFIX_receipt.json; PREFIX_finerank.json says with which template the ids were made.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from finerank.config import setting
from finerank.data.settings import RowSettings
from finerank.errors import ConfigError
from finerank.models.settings import SourceSettings, VocabularySettings

if TYPE_CHECKING:
    from finerank.data.megatron import IndexedOptions
    from finerank.data.templates import Template

_IGNORED = """
--tokenizer-type --cache-dir --overwrite-cache --streaming --n-subs --make-vocab-size-divisible-by --pad-vocab-size-to
--pad-to-multiple-of --seed --dataset-impl --vocab-file --merge-file
"""

_WEIGHTS = "preprocess each file by itself, and give their prefixes to tune --data-path with --data-weights"
_FILES = "give the files themselves with --input, and rename their columns with --map-keys"
_REPLACED = {
    "--merge-group-keys": "indexed files need not be merged; give all their prefixes to tune --data-path",
    "--interleave-probs": _WEIGHTS,
    "--mix-strategy": f"the files of --input follow one another; to mix them otherwise, {_WEIGHTS}",
    "--dataset-dir": f"no dataset_info.json is read; {_FILES}",
    "--hf-datasets-params": f"no data set is fetched; {_FILES}",
    "--script-data-dir": f"no data set script is run; {_FILES}",
    "--dataset-additional-keys": "the columns of a form of rows are fixed; rename yours with --map-keys",
    "--max-samples": "all rows are prepared; give --max-samples to tune",
    "--prompt-type-path": "templates are part of finerank; name one with --prompt-type, or give --hf-chat-template",
    "--split-sentences": "a text is a document; --sample-by line or paragraph cuts plain text",
    "--tokenizer-not-use-fast": "the fast tokenizer is taken where there is one; leave the flag out",
}


@dataclass(kw_only=True)
class Settings(SourceSettings, VocabularySettings, RowSettings):
    """All settings of preprocess."""

    IGNORED_FLAGS: ClassVar[tuple[str, ...]] = tuple(_IGNORED.split())
    REPLACED_FLAGS: ClassVar[dict[str, str]] = _REPLACED

    input: list[str] = setting(
        [], help="rows: files (json jsonl csv parquet arrow txt, also .gz .zst) or a folder", flags=("--data-path",)
    )
    output_prefix: str = setting(help="where the .bin and .idx files go, without their endings")
    seq_length: int | None = setting(  # type: ignore[assignment]
        None,
        help="longest sample in tokens; a packed row has exactly this length",
        flags=("--cutoff-len", "--max-seq-length"),
    )
    pack: bool = setting(False, help="put several samples into each row of --seq-length tokens")
    neat_pack: bool = setting(False, help="with --pack: number the samples of a row in the attention mask")
    json_keys: str = setting("text", help="column of plain text for continued pretraining")
    log_interval: int = setting(
        10_000, help="rows between progress lines, where there is no terminal for a bar; 0: neither"
    )

    def __post_init__(self) -> None:
        for name, least in (("seq_length", 2), ("workers", 1), ("log_interval", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, not {value}.")
        if not self.input:
            raise ConfigError("There is nothing to preprocess; give --input with a file or folder of rows.")


def run(settings: Settings) -> int:
    """Preprocess; see the module's docstring. Returns the exit status."""
    from finerank.data.megatron import write_indexed
    from finerank.data.pipeline import choose_handler
    from finerank.data.progress import RowProgress
    from finerank.data.readers import input_files
    from finerank.data.samples import SampleMaker, SampleRules
    from finerank.data.templates import load_template
    from finerank.models.tokenizer import load_tokenizer

    files = input_files(settings.input)
    map_keys = dict(settings.map_keys or {})
    if settings.json_keys != "text":
        map_keys["text"] = settings.json_keys
    choose = choose_handler(settings.handler_name, map_keys=map_keys or None, mask_history=settings.mask_history)
    kind = _kind_of_rows(files, choose)
    tokenizer = load_tokenizer(settings, new_tokens=settings.add_tokens)
    template = load_template(settings, tokenizer)
    rules = SampleRules(
        seq_length=settings.seq_length,
        overlong=settings.overlong,
        train_on_prompt=settings.train_on_prompt,
        append_eod=settings.append_eod,
        megatron=True,
        neat_pack=settings.neat_pack,
        pairwise=kind == "pairwise",
    )
    started = time.monotonic()
    with RowProgress(files, interval=settings.log_interval) as progress:
        options = _options(settings, kind, template, on_rows=progress.show)
        receipt = write_indexed(files, SampleMaker(template, rules), choose, options)
    rate = receipt.to_dict()["rows_read"] / max(time.monotonic() - started, 1e-9)
    print(receipt.table())
    print(f"{settings.output_prefix}: {kind} rows, {rate:.0f} rows a second")
    return 0


def _kind_of_rows(files: list[Path], choose: Callable[..., Any]) -> str:
    """The one kind that all files hold: instruction, pairwise or text. Raises ConfigError for a mixture."""
    import itertools

    from finerank.data.pipeline import LOOK_AHEAD
    from finerank.data.readers import read_rows

    kinds = {}
    for path in files:
        rows = list(itertools.islice(read_rows(path), LOOK_AHEAD))
        if any(isinstance(row, dict) for _, row in rows):
            kinds[path] = choose(path, rows).kind
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{path} ({kind})" for path, kind in kinds.items())
        raise ConfigError(f"One output prefix holds rows of one kind, and these differ: {listed}; run them apart.")
    return next(iter(kinds.values()), "instruction")


def _options(
    settings: Settings, kind: str, template: "Template", *, on_rows: Callable[[int], None]
) -> "IndexedOptions":
    import dataclasses

    from finerank.data.megatron import IndexedOptions
    from finerank.data.settings import TemplateSettings

    tokenizer = template.encoder.tokenizer
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id or 0
    note = {
        "template": template.name,
        "template_digest": template.digest if kind != "text" else None,
        "template_settings": {f.name: getattr(settings, f.name) for f in dataclasses.fields(TemplateSettings)},
        "tokenizer_digest": template.encoder.digest,
        "seq_length": settings.seq_length,
    }
    return IndexedOptions(
        output_prefix=Path(settings.output_prefix),
        kind=kind,
        pack=settings.pack,
        neat_pack=settings.neat_pack,
        pad_token_id=int(pad),
        vocab_size=len(tokenizer),
        workers=settings.workers,
        strict=settings.strict,
        deduplicate=settings.deduplicate,
        sample_by=settings.sample_by,
        note=note,
        on_rows=on_rows,
    )
