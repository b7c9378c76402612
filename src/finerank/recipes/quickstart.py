"""From nothing to a tuned model that talks: the whole way on the rows that come with finerank.

    finerank quickstart

Gets the default model, tunes it with LoRA on rows about finerank, measures the loss on held-out paraphrases before and
after, merges, lets the base and the merged model answer the same three held-out prompts, and writes a report. A few
minutes on two cores.
"""

import json
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from finerank.config import setting

PROMPTS = ("Please introduce yourself in a sentence.", "How can I talk to the model I tuned?", "请问你是谁？")
"""Held-out paraphrases: the tuned model has not seen these words."""
_ROWS = "about_finerank.json"
_HELD_OUT_ROWS = "about_finerank_held_out.json"


@dataclass(kw_only=True)
class Settings:
    """All settings of quickstart; the flags of tune are those of `finerank tune`."""

    output_dir: str = setting("runs/quickstart", help="folder for the run, the merged model and the report")
    load: str = setting("smollm2-135m", help="base model", flags=("--base-model",))
    num_epochs: float = setting(6.0, help="passes over the rows")
    lr: float = setting(1e-3, help="peak learning rate")
    device: str = setting("auto", help="cpu, cuda, cuda:N, mps or auto")


def run(settings: Settings) -> int:
    """Tune, merge, answer, report; see the module's docstring. Returns the exit status of the first step that fails."""
    from finerank.recipes import merge, report, tune

    folder = Path(settings.output_dir)
    adapter, merged = folder / "adapter", folder / "merged"
    start = time.monotonic()
    _headline(1, "tune with LoRA, and measure the held-out loss before and after")
    status = tune.run(_tune_settings(settings, adapter))
    if status:
        return status
    _headline(2, "merge the adapter into the base model")
    status = merge.run(merge.Settings(run=str(adapter), save_dir=str(merged), overwrite=True))
    if status:
        return status
    _headline(3, "let both models answer")
    _compare_answers(settings, merged, adapter / "answers.json")
    _headline(4, "write the report")
    page = folder / "report.html"
    report.run(report.Settings(runs=[str(adapter)], output=str(page)))
    print(_summary(adapter, merged, page, seconds=time.monotonic() - start))
    return 0


def _tune_settings(settings: Settings, adapter: Path):  # type: ignore[no-untyped-def]
    from finerank.recipes import tune

    bundled = files("finerank.data") / "bundled"
    return tune.Settings(
        load=settings.load,
        device=settings.device,
        data_path=[str(bundled / _ROWS)],
        valid_data_path=[str(bundled / _HELD_OUT_ROWS)],
        output_dir=str(adapter),
        overwrite_output_dir=True,
        num_epochs=settings.num_epochs,
        lr=settings.lr,
        lr_warmup_fraction=0.1,
        global_batch_size=8,
        eval_interval=30,
        seq_length=512,
    )


def _compare_answers(settings: Settings, merged: Path, path: Path) -> None:
    """Both models answer the same prompts, greedily; the answers go to the screen and to `path`."""
    from finerank.files import write_text

    models = {"base model": settings.load, "tuned model": str(merged)}
    answers = {label: _answers(model, settings.device) for label, model in models.items()}
    rows = [{"prompt": p, **{label: answers[label][i] for label in models}} for i, p in enumerate(PROMPTS)]
    for row in rows:
        print(f"\n> {row['prompt']}")
        for label in models:
            print(f"  {label + ':':<13}{row[label]}")
    print()
    write_text(path, json.dumps(rows, ensure_ascii=False, indent=2) + "\n")


def _answers(model: str, device: str) -> list[str]:
    from finerank.data.types import Message
    from finerank.generate.load import load_generator
    from finerank.generate.settings import GeneratorSettings

    settings = GeneratorSettings(load=model, device=device, greedy=True, max_new_tokens=64)
    generator = load_generator(settings)
    prompts = [[Message(role="user", content=prompt)] for prompt in PROMPTS]
    return [answer.text.strip() for answer in generator.answer_all(prompts, settings)]


def _headline(number: int, text: str) -> None:
    print(f"\n== {number} of 4: {text}", flush=True)


def _summary(adapter: Path, merged: Path, page: Path, *, seconds: float) -> str:
    results = json.loads((adapter / "results.json").read_text(encoding="utf-8"))
    return "\n".join(
        [
            "",
            f"done in {seconds:.0f} seconds; held-out loss {results['before_eval_loss']:.3f} before, "
            f"{results['after_eval_loss']:.3f} after",
            f"  adapter       {adapter}",
            f"  loss curve    {adapter / 'training_loss.png'}",
            f"  merged model  {merged}",
            f"  report        {page}",
            "",
            f"talk with it: finerank chat --load {adapter}",
        ]
    )
