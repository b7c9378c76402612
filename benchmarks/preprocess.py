"""Rows a second from an instruction file to token ids and labels: finerank and LLaMA-Factory on the same rows.

    python benchmarks/preprocess.py --rows alpaca.json --tokenizer FOLDER --num-rows 50000 --workers 2
        --peer-python peer/bin/python --results benchmarks/results/preprocess.json

The rows are repeated to `--num-rows`. Both tokenise with the Qwen template at 2,048 tokens with the same number of
worker processes and no cache. The peer runs in its own virtual environment (see `PEER` for what it does); times count
reading, conversion and tokenisation, not imports. Runs alternate, and the best of `--repeat` counts. Ids and labels of
both are compared for the rows that neither cuts.

    python benchmarks/preprocess.py --rows alpaca.json --tokenizer FOLDER --workers 2 --sizes 10000 100000 2600000

measures finerank alone on JSON arrays of so many rows, all different: rows a second and the most resident memory of
the main process and of a worker. 2,600,000 rows of the Alpaca file are about 2 GB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PEER = r"""
import importlib.machinery, importlib.util, json, os, sys, time, types
folder, tokenizer_path, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
if importlib.util.find_spec("torchaudio") is None:  # imported there for sound, which no row here has
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
os.environ.update(HF_DATASETS_CACHE=folder + "/cache", DISABLE_VERSION_CHECK="1", HF_HUB_OFFLINE="1")
from transformers import AutoTokenizer, Seq2SeqTrainingArguments
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments, ModelArguments
tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
data = DataArguments(template="qwen", dataset="rows", dataset_dir=folder, cutoff_len=2048,
                     preprocessing_num_workers=workers, overwrite_cache=True)
template = get_template_and_fix_tokenizer(tokenizer, data)
training = Seq2SeqTrainingArguments(output_dir=folder + "/out", do_train=True, use_cpu=True, report_to=[])
start = time.perf_counter()
made = get_dataset(template, ModelArguments(model_name_or_path=tokenizer_path), data, training, "sft",
                   tokenizer=tokenizer)
rows = made["train_dataset"]
seconds = time.perf_counter() - start
first = [{"ids": rows[i]["input_ids"], "labels": rows[i]["labels"]} for i in range(200)]
print("RESULT " + json.dumps({"seconds": seconds, "rows": len(rows), "first": first}))
"""

OURS = r"""
import json, os, resource, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from finerank.data.receipt import Receipt
from finerank.data.row_cache import rows_dataset
from finerank.data.settings import DataSettings
from finerank.data.templates import load_template
path, tokenizer_path, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
settings = DataSettings(data_path=[path], prompt_type="qwen_lf", workers=workers, data_cache=False)
tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
start = time.perf_counter()
rows = rows_dataset(settings, [path], load_template(settings, tokenizer), Receipt())
seconds = time.perf_counter() - start
first = [{"ids": rows.ids(i).tolist(), "labels": rows.labels(i).tolist()} for i in range(200)]
peaks = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print("RESULT " + json.dumps({"seconds": seconds, "rows": len(rows), "first": first, "peak_mib": peaks}))
"""


def measure(python: str, code: str, *arguments: str) -> dict[str, Any]:
    """Run one side in its own process; returns its result with the CPU seconds it took, imports and all."""
    before = os.times()
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, check=False)
    after = os.times()
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"The run failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    children = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    return {**result, "cpu_seconds": children}


def same_share(ours: dict[str, Any], peer: dict[str, Any]) -> float:
    """Share of the first rows with equal ids and labels."""
    pairs = list(zip(ours["first"], peer["first"], strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def measure_sizes(rows: list[dict[str, Any]], sizes: list[int], tokenizer: str, workers: str) -> None:
    """One line for each size; the rows are numbered, so that none is a copy."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        for size in sizes:
            with path.open("w", encoding="utf-8") as file:
                for i in range(size):
                    row = {**rows[i % len(rows)], "instruction": f"{i}. {rows[i % len(rows)]['instruction']}"}
                    file.write(("[" if i == 0 else ",\n") + json.dumps(row))
                file.write("]")
            result = measure(sys.executable, OURS, str(path), tokenizer, workers)
            told = {
                "num_rows": size,
                "megabytes": round(path.stat().st_size / 1e6),
                "seconds": round(result["seconds"], 2),
                "rows_per_second": round(result["rows"] / result["seconds"]),
                "peak_mib_main": result["peak_mib"][0],
                "peak_mib_worker": result["peak_mib"][1],
            }
            print(json.dumps(told), flush=True)


def main() -> None:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--num-rows", type=int, default=50_000)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer-python", help="python of a virtual environment with llamafactory; none: only finerank")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of rows to measure finerank alone on")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    if options.sizes:
        return measure_sizes(rows, options.sizes, options.tokenizer, options.workers)
    rows = (rows * (options.num_rows // len(rows) + 1))[: options.num_rows]
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        (Path(folder) / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}', encoding="utf-8")
        sides = {"finerank": (sys.executable, OURS, str(Path(folder) / "rows.json"))}
        if options.peer_python:
            sides["LLaMA-Factory"] = (options.peer_python, PEER, folder)
        for _ in range(options.repeat):
            for name, (python, code, data) in sides.items():
                result = measure(python, code, data, options.tokenizer, options.workers)
                print(f"{name}: {result['rows'] / result['seconds']:.0f} rows a second", file=sys.stderr, flush=True)
                if name not in best or result["seconds"] < best[name]["seconds"]:
                    best[name] = result
    table = {
        name: {"rows_per_second": round(r["rows"] / r["seconds"]), "seconds": round(r["seconds"], 2), "rows": r["rows"]}
        for name, r in best.items()
    }
    summary: dict[str, Any] = {"num_rows": options.num_rows, "workers": int(options.workers), "sides": table}
    if options.peer_python:
        ours, peer = best["finerank"], best["LLaMA-Factory"]
        summary["times_faster"] = round(peer["seconds"] / ours["seconds"] * ours["rows"] / peer["rows"], 2)
        summary["equal_rows"] = same_share(ours, peer)
    summary["date"] = time.strftime("%Y-%m-%d")
    print(json.dumps(summary, indent=1))
    if options.results:
        options.results.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
