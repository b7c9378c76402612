"""Every reader of outside bytes, fed with broken ones: our own errors or a right answer, never another exception.

Each parser has a valid sample. The inputs are: arbitrary bytes, the sample cut, with bytes changed, inserted or
repeated, and (for JSON and YAML) arbitrary values in its place. Hypothesis draws some of them itself and for the others
the seeds of `mutate`. The default run tries 400 of each parser, the marked one 100,000. A few bytes that make a reader
take gigabytes are an error like any other:

    pytest -m long tests/reliability/test_fuzz.py -k "100_000 and idx"
"""

import contextlib
import functools
import gzip
import json
import random
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutate import broken_bytes, broken_value
from torch import nn

from finerank import config
from finerank.adapters.files import load_adapter, read_adapter_config, save_adapter
from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.checkpoints import megatron, native
from finerank.checkpoints.checksums import fingerprints
from finerank.checkpoints.formats import hf, mcore
from finerank.checkpoints.safetensors_file import SafetensorsReader
from finerank.data.batch import Batch
from finerank.data.indexed import IndexedFile, IndexedWriter
from finerank.data.readers import read_rows
from finerank.errors import FinerankError
from finerank.generate.prompts import read_prompts
from finerank.models.gguf_file import GGUFFile, damage_named
from finerank.models.gguf_file import read_config as read_gguf_config
from finerank.models.gguf_tokenizer import build_tokenizer
from finerank.recipes.tune import Settings
from finerank.train.metrics import read_metrics
from finerank.train.nonfinite import read_replay, write_replay
from tiny import tiny_model


@dataclass(frozen=True)
class Parser:
    """A file that is read, the sample that is broken, and how it is read."""

    file: str
    read: Callable[[Path], object]
    make: Callable[[Path], None]
    text: str | None = None
    """json or yaml: then whole values are drawn, too."""


@functools.cache
def _model_and_its_modules() -> tuple[nn.Module, list[tuple[nn.Module, dict]]]:
    model = tiny_model("llama")
    return model, [(module, dict(module._modules)) for module in model.modules()]


def plain_model() -> nn.Module:
    """A tiny model without adapters: always the same one, because making it takes longer than all else here."""
    model, places = _model_and_its_modules()
    for module, children in places:
        module._modules.clear()
        module._modules.update(children)
    return model


def make_adapter(folder: Path) -> None:
    adapters = inject_adapters(tiny_model("llama"), AdapterSettings(lora_r=2, lora_target_modules=["q_proj"]), seed=1)
    save_adapter(adapters, folder, base_model_name="base")


def make_checkpoint(folder: Path) -> None:
    native.save_checkpoint(folder / "checkpoint-1", state={"step": 1, "train": {}}, tensors={"a": torch.ones(2)})


def make_state(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.ones(1, 3)}, path, metadata={"format": "pt"})


def make_replay(folder: Path) -> None:
    ids = torch.arange(4)[None]
    batch = Batch(input_ids=ids, target_ids=ids, position_ids=ids, rows=(1, 2))
    write_replay(folder / "replay.safetensors", step=3, batches=[batch], seeds=[(1, 2, 3)], parameters={"a": ids})


def read_config(path: Path) -> object:
    return config.build(Settings, config.read_yaml(path, Settings))


def make_config(folder: Path) -> None:
    """A setting of each kind: all of them would mostly measure how slow the parser of YAML is."""
    values = config.to_dict(Settings(map_keys={"prompt": "question"}, lora_rank_pattern={"q_proj": 4}))
    kinds = ("load", "map_keys", "data_path", "lora_target_modules", "lora_rank_pattern", "lr", "seed", "pack")
    optional = ("num_epochs", "micro_batch_size", "share_prompts", "pref_beta")
    (folder / "config.yaml").write_text(yaml.safe_dump({name: values[name] for name in kinds + optional}))


def read_state(path: Path) -> object:
    """A checkpoint whose file was changed by someone who mended the manifest as well."""
    folder = path.parent
    files = fingerprints(folder, (p for p in folder.iterdir() if p.name != "manifest.json"))
    (folder / "manifest.json").write_text(json.dumps({"files": files, "format": native.FORMAT}))
    return native.read_checkpoint(folder)


def make_rows(name: str) -> Callable[[Path], None]:
    """A file of rows in the format of its ending."""

    def make(folder: Path) -> None:
        rows = [{"instruction": f"say {i}", "output": "é" * i} for i in range(3)]
        path, table = folder / name, pa.Table.from_pylist(rows)
        match path.suffix:
            case ".jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            case ".json":
                path.write_text(json.dumps(rows))
            case ".csv":
                path.write_text("instruction,output\n" + "".join(f'say {i},"a ""b"""\n' for i in range(3)))
            case ".parquet":
                pyarrow.parquet.write_table(table, path)
            case ".arrow":
                with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table)
            case ".gz":
                path.write_bytes(gzip.compress(b'{"instruction": "say", "output": "a"}\n', mtime=0))
            case _:
                path.write_text("one\ntwo\n")

    return make


def make_indexed(folder: Path) -> None:
    with IndexedWriter(folder / "pair") as writer:
        writer.add(np.arange(10), np.array([4, 6]))


def read_indexed(path: Path) -> object:
    file = IndexedFile(path.with_suffix(""))
    return [file.values[s : s + n].sum() for s, n in zip(file.starts, file.lengths, strict=True)]


def make_gguf(folder: Path) -> None:
    """A llama of one layer with a vocabulary of four and a quantised matrix."""
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for name, value in (("context_length", 16), ("embedding_length", 32), ("feed_forward_length", 32)):
        getattr(writer, f"add_{name}")(value)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", np.ones((5, 32), np.float32))
    packed = gguf.quantize(np.ones((32, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> object:
    file = GGUFFile(path)
    with damage_named(path):  # as conversion does
        described = read_gguf_config(file), build_tokenizer(file)
    return described, [file.read(name) for name in file.names()]


def make_megatron(folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder / "hf")
    mcore.write(hf.read(folder / "hf"), folder / "mg", target=megatron.Target(tp=2))


def read_megatron(iteration: Path) -> object:
    if not mcore.matches(iteration):
        return None
    weights = mcore.read(iteration).weights
    return [weights[name] for name in weights]


def read_safetensors(path: Path) -> object:
    with SafetensorsReader(path) as file:
        return [file.read(name) for name in file.entries]


def make_prompts(folder: Path) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    (folder / "prompts.jsonl").write_text(json.dumps({"messages": turns}) + "\n")


RANK = "mg/iter_0000001/mp_rank_00/model_optim_rng.pt"

ROW_FILES = ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.arrow", "rows.txt", "rows.jsonl.gz")

PARSERS = {
    **{name: Parser(name, lambda p: list(read_rows(p)), make_rows(name)) for name in ROW_FILES},
    "idx": Parser("pair.idx", read_indexed, make_indexed),
    "bin": Parser("pair.bin", read_indexed, make_indexed),
    "adapter with its config": Parser(
        "adapter_config.json", lambda p: load_adapter(plain_model(), p.parent), make_adapter, "json"
    ),
    "config": Parser("config.yaml", read_config, make_config, "yaml"),
    "metrics": Parser(
        "metrics.jsonl", read_metrics, lambda f: (f / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n'), "json"
    ),
    "manifest": Parser(
        "checkpoint-1/manifest.json", lambda p: native.read_checkpoint(p.parent), make_checkpoint, "json"
    ),
    "state": Parser("checkpoint-1/state.json", read_state, make_checkpoint, "json"),
    "state tensors": Parser("checkpoint-1/state.safetensors", read_state, make_checkpoint),
    "gguf": Parser("model.gguf", read_gguf, make_gguf),
    "megatron rank": Parser(RANK, lambda p: read_megatron(p.parents[2]), make_megatron),
    "megatron tracker": Parser(
        "mg/latest_checkpointed_iteration.txt", lambda p: read_megatron(p.parent), make_megatron
    ),
    "safetensors": Parser("state.safetensors", read_safetensors, lambda f: make_state(f / "state.safetensors")),
    "prompts": Parser("prompts.jsonl", read_prompts, make_prompts, "json"),
    "replay": Parser("replay.safetensors", read_replay, make_replay),
    "adapter config": Parser("adapter_config.json", lambda p: read_adapter_config(p.parent), make_adapter, "json"),
    "adapter tensors": Parser(
        "adapter_model.safetensors", lambda p: load_adapter(plain_model(), p.parent), make_adapter
    ),
}

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


def mutations(sample: bytes) -> st.SearchStrategy[bytes]:
    """The sample with one to three pieces replaced, removed or repeated."""
    place = st.integers(0, len(sample))
    piece = st.tuples(place, place, st.binary(max_size=6) | st.sampled_from([b"{", b"[", b'"', b"\x00", b"9" * 30]))

    def apply(pieces: list[tuple[int, int, bytes]]) -> bytes:
        content = sample
        for a, b, new in pieces:
            content = content[: min(a, b)] + new + content[max(a, b) if abs(a - b) < 40 else min(a, b) + 1 :]
        return content

    return st.lists(piece, min_size=1, max_size=3).map(apply)


def edited_values(sample: bytes, kind: str) -> st.SearchStrategy[bytes]:
    """The sample's mapping with some keys set to arbitrary values, or another value altogether."""
    load = json.loads if kind == "json" else yaml.safe_load
    dump = json.dumps if kind == "json" else yaml.safe_dump
    original = load(sample)
    keys = st.sampled_from(sorted(original)) | st.text(max_size=8)
    edits = st.dictionaries(keys, VALUES, min_size=1, max_size=3)
    return (VALUES | edits.map(lambda e: {**original, **e})).map(lambda v: dump(v).encode("utf-8", "surrogatepass"))


MOST_BYTES = 2 << 30
"""What a reader may take for a sample of a few kilobytes, allocator and libraries included."""


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Inside, a reader that takes too much gets a MemoryError instead of the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with warnings.catch_warnings(), limited_memory():
        warnings.simplefilter("ignore")
        yield tmp_path


def more_inputs(parser: Parser, sample: bytes, seed: int, number: int) -> Iterator[bytes]:
    """So many further inputs from one seed: edits of bytes and, where the file holds values, of values."""
    rng = random.Random(seed)
    load = json.loads if parser.text == "json" else yaml.safe_load
    value = None if parser.text is None else load(sample)
    for _ in range(number):
        if parser.text is None or rng.random() < 0.4:
            yield broken_bytes(sample, rng)
        else:  # JSON is YAML as well, and is written faster
            yield json.dumps(broken_value(value, rng)).encode()


def fuzz(parser: Parser, folder: Path, examples: int, inputs_per_example: int) -> None:
    parser.make(folder)
    path = folder / parser.file
    sample = path.read_bytes()
    parser.read(path)  # the sample itself is right
    siblings = {p: p.read_bytes() for p in path.parent.iterdir() if p != path and p.is_file()}
    values = sample.splitlines()[0] if parser.file.endswith("jsonl") else sample
    inputs = st.binary(max_size=64) | mutations(sample)
    if parser.text is not None:
        inputs |= edited_values(values, parser.text)
    tried = 0

    def try_one(content: bytes) -> None:
        nonlocal tried
        tried += 1
        for sibling, before in siblings.items():
            if not sibling.is_file() or sibling.stat().st_size != len(before):
                sibling.write_bytes(before)
        path.write_bytes(content)
        try:
            parser.read(path)
        except FinerankError as error:
            assert str(error).strip()
        except Exception as error:
            raise AssertionError(f"{parser.file}: {type(error).__name__} of {content!r}") from error

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(inputs, st.integers(0, 2**63))
    def run(content: bytes, seed: int) -> None:
        try_one(content)
        for other in more_inputs(parser, values if parser.text else sample, seed, inputs_per_example - 1):
            try_one(other)

    run()
    assert tried >= examples * inputs_per_example


@pytest.mark.parametrize("name", PARSERS)
def test_broken_bytes_raise_only_our_errors(folder: Path, name: str) -> None:
    fuzz(PARSERS[name], folder, 40, 10)


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", PARSERS)
def test_100_000_broken_inputs_raise_only_our_errors(folder: Path, name: str) -> None:
    fuzz(PARSERS[name], folder, 2_000, 50)
