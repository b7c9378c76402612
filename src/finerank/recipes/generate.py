"""Answer one prompt, or a file of prompts, with a base model, an adapter or a merged model.

    finerank generate --load smollm2-135m "What is the capital of France?"
    finerank generate --load runs/first --input prompts.jsonl --output answers.jsonl

`--load` takes a base model, a merged model, or the folder of an adapter or run, whose base is then loaded too. One
prompt streams to the screen; answers to a file become JSON lines: the prompt's row with `answer` and `finish_reason`.
Without a prompt, one is read from standard input.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finerank.config import setting
from finerank.errors import ConfigError, Interrupted
from finerank.generate.settings import GeneratorSettings

if TYPE_CHECKING:
    from finerank.generate.engine import Answer, Generator
    from finerank.generate.prompts import Prompt


@dataclass(kw_only=True)
class Settings(GeneratorSettings):
    """All settings of generate."""

    prompt: str | None = setting(None, help="the prompt", positional=True)
    input: str | None = setting(None, help="file of prompts: .jsonl, or text with one a line")
    output: str | None = setting(None, help="JSONL file for the answers; default: standard output")
    system: str | None = setting(None, help="system turn before each prompt that has none")
    batch_size: int = setting(8, help="prompts of a file computed side by side")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.input is not None:
            raise ConfigError("A prompt and --input are both given; keep one of them.")
        if self.output is not None and self.input is None:
            raise ConfigError("--output is for the answers to --input FILE; a single answer goes to standard output.")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size must be at least 1, not {self.batch_size}.")


def run(settings: Settings) -> None:
    """Answer; see the module's docstring."""
    from finerank.generate.load import load_generator
    from finerank.generate.prompts import make_messages, read_prompts

    prompts = read_prompts(Path(settings.input), system=settings.system) if settings.input else []
    messages = () if prompts else make_messages(settings.prompt or _from_stdin(), settings.system)
    generator = load_generator(settings)
    if messages:
        _answer_one(generator, messages, settings)
    else:
        _answer_file(generator, prompts, settings)


def _from_stdin() -> str:
    if sys.stdin.isatty():
        raise ConfigError('No prompt: give one ("..."), a file with --input, or a text on standard input.')
    text = sys.stdin.read().strip()
    if not text:
        raise ConfigError("Standard input holds no prompt; give some text.")
    return text


def _answer_one(generator: "Generator", messages: Any, settings: Settings) -> None:
    stream = generator.stream(messages, settings)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    assert stream.answer is not None
    if stream.answer.finish_reason == "length":
        _say(f"the answer was cut after {stream.answer.num_new_tokens} tokens; --max-new-tokens allows more")


def _answer_file(generator: "Generator", prompts: "list[Prompt]", settings: Settings) -> None:
    """Answers in the order of the prompts; the seed of each is `--seed` plus its place, so equal prompts differ."""
    answers: list[Answer] = []
    start = time.monotonic()
    interrupted = False
    try:
        for first in range(0, len(prompts), settings.batch_size):
            batch = prompts[first : first + settings.batch_size]
            seeds = [settings.seed + first + i for i in range(len(batch))]
            new = generator.answer_all([prompt.messages for prompt in batch], settings, seeds=seeds)
            answers += new
            if settings.output is None:
                print(_lines(batch, new), end="", flush=True)
            _say(f"{len(answers)} of {len(prompts)} answers")
    except KeyboardInterrupt:
        interrupted = True
    if settings.output is not None and answers:
        from finerank.files import write_text

        write_text(Path(settings.output), _lines(prompts[: len(answers)], answers))
    where = f" in {settings.output}" if settings.output and answers else ""
    if interrupted:
        raise Interrupted(f"interrupted; the first {len(answers)} of {len(prompts)} answers are done{where}.")
    tokens = sum(answer.num_new_tokens for answer in answers)
    cut = sum(answer.finish_reason == "length" for answer in answers)
    speed = tokens / (time.monotonic() - start)
    _say(f"{len(answers)} answers{where}, {cut} cut at --max-new-tokens, {tokens} tokens, {speed:.1f} tokens a second")


def _lines(prompts: "list[Prompt]", answers: "list[Answer]") -> str:
    rows = [
        {**prompt.row, "answer": answer.text, "finish_reason": answer.finish_reason}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
