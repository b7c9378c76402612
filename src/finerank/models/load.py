"""Load a base model: unmodified transformers classes, frozen, in evaluation mode, in one precision, on one device.

    loaded = load_model(ModelSettings(load="smollm2-135m"))
    loaded.model, loaded.tokenizer, loaded.source.name

What `--load` may name is told in `models/find.py`. Without `--load`, `--model-config` starts a model from random
weights, which is said loudly. Weight files are memory-mapped; nothing is unpickled but by torch's weights-only reader.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from finerank.errors import ConfigError, FinerankError, ModelError, first_line
from finerank.models.device import pick_device, pick_dtype
from finerank.models.find import (
    config_folder,
    find_model,
    read_config_json,
    read_safetensors_header,
    weight_files,
)
from finerank.models.quantized import quantization_config
from finerank.models.settings import ModelSettings, SourceSettings
from finerank.models.tokenizer import add_tokens, load_tokenizer, read_tokenizer
from finerank.models.vocabulary import grow_vocabulary

__all__ = ["LoadedModel", "ModelSource", "load_model", "pick_device", "pick_dtype"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Which base model this is."""

    name: str
    """What an adapter names as its base: a hub id, or the folder's absolute path."""
    path: Path | None
    """The folder it was loaded from; None for a model that started from random weights."""
    digest: str
    """Hex SHA-256 over config, weight headers and samples of the weights; equal for equal models."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    new_token_ids: tuple[int, ...] = ()
    """Ids of the tokens that were asked for beside the base's."""


def load_model(
    settings: ModelSettings, *, seed: int = 1234, new_tokens: Sequence[str] = (), may_grow: bool = False
) -> LoadedModel:
    """The base model and its tokenizer: evaluation mode, no gradients, `--dtype` on `--device`.

    Args:
        settings: what to load and where to put it.
        seed: of the random weights when there is no `--load`; global random state is left alone.
        new_tokens: tokens to add to the tokenizer, and rows for them to the model.
        may_grow: give the model rows for all of the tokenizer's ids, instead of refusing a tokenizer that has more.

    Raises:
        ConfigError: settings contradict each other, or the device is not there.
        ModelError: the model or its tokenizer is missing, damaged, or no causal language model.
    """
    device = pick_device(settings)
    dtype = pick_dtype(settings, device)
    if settings.load is None:
        if settings.load_4bit or settings.load_8bit:
            raise ConfigError("--load-4bit and --load-8bit quantise weights that are read; name a model with --load.")
        model, source = _initialise(settings, dtype, seed)
        tokenizer = load_tokenizer(settings)
    else:
        if settings.model_config is not None:
            raise ConfigError("--load and --model-config are both given; keep one of them.")
        found = find_model(settings)
        config = _read_config(found.folder, settings.load, settings)
        model = _read_weights(found.folder, settings.load, config, dtype, settings)
        source = ModelSource(found.name, found.folder, model_digest(found.folder))
        elsewhere = settings.tokenizer_name_or_path is not None
        tokenizer = load_tokenizer(settings) if elsewhere else read_tokenizer(found.folder, settings.load, settings)
    if may_grow and len(tokenizer) > (rows := _num_rows(model)):
        grow_vocabulary(model, len(tokenizer), num_known=rows)
    _check_vocabulary(model, tokenizer)
    model.requires_grad_(False)
    ids: list[int] = []
    if new_tokens:
        num_known = len(tokenizer)
        ids = add_tokens(tokenizer, new_tokens)
        grow_vocabulary(model, max([len(tokenizer), *(i + 1 for i in ids)]), num_known=num_known)
    return LoadedModel(model.eval().to(device), tokenizer, source, tuple(ids))


def _read_config(folder: Path, name: str, settings: SourceSettings) -> Any:
    """The transformers config, refused unless it is a causal language model's."""
    stored = read_config_json(folder, name)
    kind = stored["model_type"]
    if kind not in CONFIG_MAPPING and not settings.trust_remote_code:
        if "auto_map" in stored:
            raise ModelError(f"{name} ('{kind}') brings its own Python code; read it, then give --trust-remote-code.")
        raise ModelError(f"{name} is of type '{kind}', which transformers does not know; update transformers.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'} cannot be used: {first_line(error)}; correct it.") from error
    remote = settings.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise ModelError(f"{name} is of type '{kind}', which is no causal language model; give one that writes text.")
    return config


def _read_weights(folder: Path, name: str, config: Any, dtype: torch.dtype, settings: ModelSettings) -> PreTrainedModel:
    quantization = quantization_config(settings)
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=settings.trust_remote_code,
                output_loading_info=True,
                quantization_config=quantization,
                ignore_mismatched_sizes=True,  # they are refused below, by name and shape
            )
    except Exception as error:
        if isinstance(error, FinerankError):
            raise
        if quantization is not None and quantization.refused:
            raise ModelError(f"{name}, {quantization.refused[0]}") from error
        raise ModelError(f"Cannot load the weights of {name}: {first_line(error)}; restore the folder.") from error
    model, report = loaded
    if mismatched := sorted(report["mismatched_keys"]):
        tensor, stored, wanted = mismatched[0]
        raise ModelError(
            f"{name}: {len(mismatched)} tensors do not fit config.json, e.g. {tensor} is {list(stored)}, not "
            f"{list(wanted)}; the config belongs to another model."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} of its model's tensors, e.g. {missing[0]}; the folder is incomplete or its "
            "config.json belongs to another model."
        )
    if unexpected := sorted(report["unexpected_keys"]):
        logger.warning("%s holds %d tensors the model does not use, e.g. %s", name, len(unexpected), unexpected[0])
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and load report: what is wrong is said by us, in one sentence."""
    bar = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _initialise(settings: ModelSettings, dtype: torch.dtype, seed: int) -> tuple[PreTrainedModel, ModelSource]:
    folder = config_folder(settings)
    name = str(settings.model_config)
    config = _read_config(folder, name, settings)
    logger.warning("RANDOM WEIGHTS: no --load is given, so the model of %s starts from noise (seed %d)", name, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    digest = hashlib.sha256((folder / "config.json").read_bytes() + f" seed {seed}".encode()).hexdigest()
    return model, ModelSource(str(folder.resolve()), None, digest)


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = _num_rows(model)
    if len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} ids, the model only {rows} embeddings; they do not belong together: "
            "name the right one with --tokenizer-name-or-path."
        )


def _num_rows(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.size(0)  # type: ignore[operator, union-attr]


def model_digest(folder: Path) -> str:
    """SHA-256 that tells models apart without reading them whole.

    Over config.json and, for each weight file, its name, size, header and 256 evenly spread samples of 4 KiB. Two
    different trainings of one architecture differ in nearly every sample.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder, str(folder)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        if path.suffix == ".safetensors":
            digest.update(read_safetensors_header(path))
        with open(path, "rb") as file:
            for step in range(256):
                file.seek(min(step * (size // 256), max(size - 4096, 0)), os.SEEK_SET)
                digest.update(file.read(4096))
    return digest.hexdigest()
