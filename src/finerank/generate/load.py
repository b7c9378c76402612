"""From the settings to a model that answers: base, adapter and the prompt template the adapter was trained with.

    generator = load_generator(settings)

`--load` may name a base model, a merged model, or the folder of an adapter or run, whose base is then loaded too;
`--lora-load` puts an adapter on the base of `--load`. The adapter of a QLoRA run is put on a base in as many bits as it
was trained over, since it has learned to make up for their rounding too (`--base-precision original` does without). A
run folder's `template.json` says how its prompts were made:
the same template is used again, and another one is refused, because an adapter answers badly to prompts it never saw.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from finerank.adapters.files import brings_tokens, read_adapter_config
from finerank.checkpoints.combine import described_runs
from finerank.checkpoints.native import beside
from finerank.checkpoints.place import is_megatron, place_adapter
from finerank.checkpoints.quantized_base import bits_of_run
from finerank.data.settings import TemplateSettings
from finerank.data.templates import Template, load_template
from finerank.errors import AdapterError, ConfigError, DataError, MissingExtraError, ModelError
from finerank.generate.engine import Generator
from finerank.generate.settings import GeneratorSettings
from finerank.models.find import TOKENIZER_FILES, find_model
from finerank.models.load import LoadedModel, load_model, model_digest
from finerank.models.packed import bitsandbytes_functions

logger = logging.getLogger(__name__)

TEMPLATE_FILE = "template.json"


def load_generator(settings: GeneratorSettings) -> Generator:
    """The model of the settings with its adapter, tokenizer and template, ready to answer.

    Raises:
        ConfigError: two adapters are named, or a template other than the adapter's.
        ModelError, AdapterError: base or adapter is missing, damaged, or they do not fit.
    """
    adapter = find_adapter(settings)
    loaded = _load_base(settings, adapter)
    if adapter is not None:
        place_adapter(loaded.model, adapter)
        _warn_of_another_base(adapter, loaded)
    folders = [folder for folder in (adapter, loaded.source.path) if folder is not None]
    return Generator(loaded.model, loaded.tokenizer, stored_template(settings, loaded.tokenizer, folders))


def find_adapter(settings: GeneratorSettings) -> Path | None:
    """The adapter folder that `--lora-load` or `--load` names, if one does."""
    named = Path(settings.load).expanduser() if settings.load is not None else None
    if named is not None and (named / "adapter_config.json").is_file() and not (named / "config.json").is_file():
        if settings.lora_load is not None:
            raise ConfigError(f"--load {named} is an adapter already; give its base with --load, or no --lora-load.")
        return named
    if settings.lora_load is None:
        return None
    return Path(settings.lora_load).expanduser()


def _load_base(settings: GeneratorSettings, adapter: Path | None) -> LoadedModel:
    """The base model; with the adapter's own tokenizer, where it brings one and no other is named."""
    changes: dict[str, Any] = {}
    if adapter is None:
        return load_model(settings, seed=settings.seed)
    config = {} if is_megatron(adapter) else read_adapter_config(adapter)
    names_base = settings.load is None or Path(settings.load).expanduser() == adapter
    if names_base and settings.model_config is None:
        changes = {
            "load": config.get("base_model_name_or_path"),
            "revision": settings.revision or config.get("revision"),
        }
        if not changes["load"]:
            raise AdapterError(f"{adapter} names no base model; give --load BASE --lora-load {adapter}.")
    if settings.tokenizer_name_or_path is None and any((adapter / file).is_file() for file in TOKENIZER_FILES):
        changes["tokenizer_name_or_path"] = str(adapter)
    changes |= _bits(settings, adapter, is_own_base=names_base)
    try:
        own = dataclasses.replace(settings, **changes)
        return load_model(own, seed=settings.seed, may_grow=brings_tokens(adapter))
    except ModelError as error:
        if not names_base:
            raise
        raise ModelError(f"The base model that {adapter} names cannot be loaded: {error}") from error


def _bits(settings: GeneratorSettings, adapter: Path, *, is_own_base: bool) -> dict[str, bool]:
    """`load_4bit` or `load_8bit` where the adapter's run had it over this base, and nothing else is asked for."""
    if settings.load_4bit or settings.load_8bit or settings.base_precision == "original":
        return {}
    bits = bits_of_run(adapter)
    if bits is None or not (is_own_base or _is_trained_on(adapter, settings)):
        return {}
    try:
        bitsandbytes_functions()
    except MissingExtraError as error:
        raise MissingExtraError(
            f"{adapter} was trained over a base in {bits} bits, and bitsandbytes is missing; install it with: pip "
            "install 'finerank[quant]', or give --base-precision original."
        ) from error
    logger.info("the base is loaded in %d bits, as in training (--base-precision original: as it is)", bits)
    return {f"load_{bits}bit": True}


def _is_trained_on(adapter: Path, settings: GeneratorSettings) -> bool:
    """Whether `--load` names the weights that the run read, and not e.g. its dequantised base."""
    trained_on = described_runs([adapter])[0].base_digest
    return settings.load is not None and model_digest(find_model(settings).folder) == trained_on


def _warn_of_another_base(adapter: Path, loaded: LoadedModel) -> None:
    trained_on = described_runs([adapter])[0].base_digest
    if trained_on is not None and trained_on != loaded.source.digest:
        logger.warning("%s was trained on other base weights than those of %s", adapter, loaded.source.name)


def stored_template(settings: GeneratorSettings, tokenizer: Any, folders: list[Path]) -> Template:
    """The template the settings name, else the one stored in the first of `folders` that has one.

    Raises ConfigError when the two differ, unless `--template-anyway`.
    """
    stored: dict[str, Any] = {}
    place = Path()
    for folder in folders:
        place = beside(folder, TEMPLATE_FILE)
        if stored := _read_json(place):
            break
    if not stored:
        return load_template(settings, tokenizer)
    chosen: TemplateSettings = settings
    names = [field.name for field in dataclasses.fields(TemplateSettings)]
    if all(getattr(settings, name) == getattr(TemplateSettings(), name) for name in names):
        kept = stored.get("settings") or {}
        chosen = dataclasses.replace(settings, **{name: kept[name] for name in names if name in kept})
    template = load_template(chosen, tokenizer)
    if template.digest == stored.get("digest") or settings.template_anyway:
        return template
    raise ConfigError(
        f"The prompt template '{template.name}' is not the one in {place} ('{stored.get('name')}'), with which the "
        "adapter was trained; leave the template flags away, or give --template-anyway."
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no such file. Raises DataError for a damaged one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it or remove it.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object; restore it or remove it.")
    return content
