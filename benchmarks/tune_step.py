"""How fast a LoRA step is, beside PEFT with transformers' Trainer: the same rows in the same order, by turns.

    python benchmarks/tune_step.py --data alpaca_en_demo.json                  8 steps of 16 rows, three contestants
    python benchmarks/tune_step.py --data rows.json --steps 60 --contestants finerank trainer-tuned
    python benchmarks/tune_step.py --data rows.json --quick                    does everything run?

Every contestant is a process of its own. All load first; then each takes its first step, then each its second, and so
on, so that whatever else happens on the machine happens to all of them. The ratio is taken step by step over the same
rows, and its median reported; steps of warm-up are not counted. After the last step each one computes the loss on the
same held-out rows with transformers alone. Prints a table, and writes it with all single times to --output.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))

from finerank.models.runtime import FOR_TORCH, KEPT_BY_GLIBC, NAMES, best_environment  # noqa: E402

ENVIRONMENT = best_environment()

LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


@dataclass(frozen=True)
class Setup:
    """One contestant: a program, its options, its environment."""

    words: str
    program: str
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


SETUPS = {
    "finerank": Setup("finerank, bf16, as installed", "finerank_tune.py", environment=ENVIRONMENT),
    "trainer-default": Setup(
        "PEFT + HF Trainer, default (fp32, micro-batch 8, padded)",
        "hf_trainer.py",
        ("--dtype", "fp32", "--micro-batch", "8"),
    ),
    "trainer-tuned": Setup(
        "PEFT + HF Trainer, hand-tuned (bf16 weights, micro-batch 1, large pages)",
        "hf_trainer.py",
        ("--dtype", "bf16", "--micro-batch", "1"),
        LARGE_PAGES,
    ),
    "trainer-tuned-allocator": Setup(
        "PEFT + HF Trainer, hand-tuned, with finerank's allocator settings",
        "hf_trainer.py",
        ("--dtype", "bf16", "--micro-batch", "1"),
        ENVIRONMENT,
    ),
    "trainer-best": Setup(
        "PEFT + HF Trainer, hand-tuned, with finerank's allocator settings and eager attention",
        "hf_trainer.py",
        ("--dtype", "bf16", "--micro-batch", "1", "--attention", "eager"),
        ENVIRONMENT,
    ),
    "trainer-best-glibc": Setup(
        "PEFT + HF Trainer, hand-tuned, with eager attention and glibc told to keep its memory",
        "hf_trainer.py",
        ("--dtype", "bf16", "--micro-batch", "1", "--attention", "eager"),
        FOR_TORCH | KEPT_BY_GLIBC,
    ),
    "trainer-fp32": Setup(
        "PEFT + HF Trainer, fp32, micro-batch 1, large pages",
        "hf_trainer.py",
        ("--dtype", "fp32", "--micro-batch", "1"),
        LARGE_PAGES,
    ),
    "finerank-fp32": Setup("finerank, fp32", "finerank_tune.py", ("--dtype", "fp32"), ENVIRONMENT),
    "finerank-in-turn": Setup(
        "finerank, bf16, --micro-batches-at-once 1", "finerank_tune.py", ("--at-once", "1"), ENVIRONMENT
    ),
    "finerank-halves": Setup(
        "finerank, bf16, --micro-batch-tokens 1024", "finerank_tune.py", ("--tokens", "1024"), ENVIRONMENT
    ),
    "finerank-apart": Setup(
        "finerank, bf16, --no-share-prompts", "finerank_tune.py", ("--share-prompts", "0"), ENVIRONMENT
    ),
    "finerank-unfused": Setup("finerank, bf16, --no-fused", "finerank_tune.py", ("--fused", "0"), ENVIRONMENT),
    "finerank-glibc": Setup(
        "finerank, bf16, without mimalloc", "finerank_tune.py", environment=FOR_TORCH | KEPT_BY_GLIBC
    ),
    "finerank-untuned": Setup("finerank, bf16, --no-tune-runtime", "finerank_tune.py"),
}


class Runner:
    """A contestant's process."""

    def __init__(self, name: str, task: list[str], *, threads: int, log: Path):
        self.name, self.setup = name, SETUPS[name]
        self.seconds: list[float] = []
        self.result: dict[str, Any] = {}
        environment = {k: v for k, v in os.environ.items() if k not in NAMES}
        environment |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **self.setup.environment}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "src"), environment.get("PYTHONPATH", "")])
        self._log_path = log / f"{name}.log"
        self._log = open(self._log_path, "w")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "peers" / self.setup.program), *task, *self.setup.options],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def wait_ready(self) -> None:
        self._listen()

    def step(self) -> float:
        self._tell("step")
        self.seconds.append(self._listen()["seconds"])
        return self.seconds[-1]

    def end(self) -> None:
        self._tell("end")
        self.result = self._listen()
        self._process.wait()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _listen(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended early; its last words:\n{self._log_path.read_text()[-2000:]}")
        return json.loads(line)


def options(description: str | None, contestants: list[str]) -> argparse.ArgumentParser:
    """The options of a benchmark of steps, with the contestants it takes by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("FINERANK_SHARED") or HERE.parents[1] / "shared")
    parser.add_argument("--data", type=Path, default=shared / "data" / "alpaca_en_demo.json", help="instruction rows")
    parser.add_argument("--model", default="smollm2-135m", help="what --load of finerank takes")
    parser.add_argument("--contestants", nargs="+", choices=SETUPS, default=contestants)
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after those of warm-up")
    parser.add_argument("--warm-up", type=int, default=1, help="steps in which a process gets its memory")
    parser.add_argument("--global-batch-size", type=int, default=16, help="rows a step")
    parser.add_argument("--seq-length", type=int, default=512, help="longest row in tokens")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; alpha is twice the rank")
    parser.add_argument("--lr", type=float, default=2e-4, help="constant learning rate")
    parser.add_argument("--held-out", type=int, default=50, help="rows kept apart for the loss at the end")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--seed", type=int, default=1234, help="of the order of rows")
    parser.add_argument("--quick", action="store_true", help="2 steps of 4 short rows, to see that everything runs")
    parser.add_argument("--output", type=Path, help="where results go as .json and .md; without: only printed")
    return parser


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line by these options."""
    args = parser.parse_args()
    if args.quick:
        args.steps, args.global_batch_size, args.held_out, args.seq_length = 2, 4, 4, 128
        args.contestants = [name for name in args.contestants if name != "trainer-default"]
    if not args.data.is_file():
        parser.error(f"there is no {args.data}; give --data FILE with instruction rows")
    return args


def race(args: argparse.Namespace, log: Path) -> list[Runner]:
    """All contestants' times; they load one after the other, then step by turns."""
    micro_batch = 8 if "trainer-default" in args.contestants else 1
    if args.global_batch_size % micro_batch:
        sys.exit(f"--global-batch-size must be a multiple of {micro_batch} for these contestants")
    # one step more than are taken: there each contestant waits until the others are done
    num_steps = args.warm_up + args.steps
    task = [
        "--model", args.model, "--data", str(args.data), "--num-steps", str(num_steps + 1),
        "--seq-length", str(args.seq_length), "--global-batch-size", str(args.global_batch_size),
        "--held-out", str(args.held_out), "--rank", str(args.rank), "--lr", str(args.lr), "--seed", str(args.seed),
    ]  # fmt: skip
    runners: list[Runner] = []
    try:
        for name in args.contestants:
            runners.append(Runner(name, task, threads=args.threads, log=log))
            runners[-1].wait_ready()
            print(f"{name} is ready", file=sys.stderr, flush=True)
        for step in range(num_steps):
            times = [f"{runner.name} {runner.step():.2f} s" for runner in runners]
            print(
                f"step {step}{' (warm-up)' if step < args.warm_up else ''}: {', '.join(times)}",
                file=sys.stderr,
                flush=True,
            )
        for runner in runners:
            runner.end()
    finally:
        for runner in runners:
            runner.stop()
    return runners


def summarise(runners: list[Runner], args: argparse.Namespace) -> dict[str, Any]:
    """Medians, spread and ratios as JSON values."""
    first = runners[0]
    rows = []
    for runner in runners:
        timed = runner.seconds[args.warm_up :]
        ratios = [theirs / ours for theirs, ours in zip(timed, first.seconds[args.warm_up :], strict=True)]
        rows.append(
            {
                "contestant": runner.name,
                "setup": runner.setup.words,
                "median_step_seconds": statistics.median(timed),
                "fastest_step_seconds": min(timed),
                "slowest_step_seconds": max(timed),
                "rows_per_second": args.global_batch_size / statistics.median(timed),
                "times_the_first": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "peak_memory_gib": runner.result["peak_memory_bytes"] / 2**30,
                "held_out_loss": runner.result["held_out_loss"],
                "step_seconds": runner.seconds,
            }
        )
    told = {name: value.name if isinstance(value, Path) else str(value) for name, value in vars(args).items()}
    return {"machine": machine(args.threads), "arguments": told, "rows": rows}


def cpu_name() -> str:
    """The processor as Linux names it, or what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "peft", "accelerate")
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| contestant | s/step (median, range) | rows/s | x the first | peak GiB | held-out loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in summary["rows"]:
        low, high = row["ratio_range"]
        lines.append(
            f"| {row['setup']} | {row['median_step_seconds']:.2f} "
            f"({row['fastest_step_seconds']:.2f}-{row['slowest_step_seconds']:.2f}) | {row['rows_per_second']:.2f} | "
            f"{row['times_the_first']:.2f} ({low:.2f}-{high:.2f}) | {row['peak_memory_gib']:.2f} | "
            f"{row['held_out_loss']:.4f} |"
        )
    m = summary["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in m["versions"].items())
    lines += ["", f"{m['cpu']}, {m['threads']} threads, Python {m['python']}, {versions}, {m['date']}."]
    return "\n".join(lines)


def publish(summary: dict[str, Any], title: str, output: Path | None) -> None:
    """Print the table; write it, and all numbers, where --output says."""
    text = table(summary)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")
        command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        output.with_suffix(".md").write_text(f"# {title}\n\n    {command}\n\n{text}\n")


def main() -> None:
    import tempfile

    args = arguments(options(__doc__, list(SETUPS)[:3]))
    with tempfile.TemporaryDirectory() as log:
        summary = summarise(race(args, Path(log)), args)
    publish(summary, "The tuning step", args.output)


if __name__ == "__main__":
    main()
