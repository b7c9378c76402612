"""Talk with a base model, an adapter or a merged model in the terminal.

    finerank chat --load runs/first

The model sees the earlier turns. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves. With standard input
from a pipe, each line is a question and each answer goes to standard output.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from finerank.config import setting
from finerank.errors import ConfigError, DataError, unknown_name
from finerank.generate.settings import GeneratorSettings, SamplingSettings

if TYPE_CHECKING:
    from finerank.generate.chat import Chat

COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "show the system turn; /system TEXT sets it and forgets the conversation; /system - removes it",
    "/help": "this list",
    "/quit": "leave",
}


@dataclass(kw_only=True)
class Settings(GeneratorSettings):
    """All settings of chat."""

    system: str | None = setting(None, help="system turn")
    history_turns: int = setting(20, help="most earlier turns (question and answer) the model is shown")
    max_new_tokens: int = setting(512, help="longest answer in tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history_turns < 0:
            raise ConfigError(f"--history-turns must be 0 or more, not {self.history_turns}.")


def run(settings: Settings) -> None:
    """Talk; see the module's docstring."""
    from finerank.generate.chat import Chat
    from finerank.generate.load import load_generator

    sampling = SamplingSettings(**{f.name: getattr(settings, f.name) for f in fields(SamplingSettings)})
    chat = Chat(load_generator(settings), sampling, settings.system, settings.history_turns)
    interactive = sys.stdin.isatty()
    if interactive:
        _say("Type a question. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    for line in _lines(interactive=interactive):
        if not line:
            continue
        if line.startswith("/") and not line.startswith("//"):
            if not obey(chat, line):
                return
            continue
        try:
            answer(chat, line.removeprefix("/") if line.startswith("//") else line, interactive=interactive)
        except DataError as error:
            _say(str(error))


def _lines(*, interactive: bool) -> Iterator[str]:
    """Questions without the spaces around them, until the end of input. Ctrl-C at the prompt only clears the line."""
    if not interactive:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        for line in sys.stdin:
            yield line.strip()
        return
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401  lends `input` line editing and a history

    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            _say("\n(Ctrl-D or /quit leaves)")
        except EOFError:
            _say("")
            return


def obey(chat: "Chat", line: str) -> bool:
    """Carry out a command; False when it was to leave."""
    command, _, rest = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        chat.reset()
        _say("The conversation is forgotten.")
    elif command == "/system":
        if rest.strip():
            chat.system = None if rest.strip() == "-" else rest.strip()
            chat.reset()
        _say(f"System: {chat.system or 'none'}")
    elif command == "/help":
        for name, meaning in COMMANDS.items():
            _say(f"{name:<9}{meaning}")
        _say("//text   sends a text that begins with /")
    else:
        _say(unknown_name("command", command, COMMANDS) + " Write // to begin a text with /.")
    return True


def answer(chat: "Chat", question: str, *, interactive: bool) -> None:
    """Print the answer as it is made, and remember it, also when Ctrl-C cut it short."""
    num_turns = len(chat.turns)
    stream = chat.ask(question)
    if forgotten := num_turns - len(chat.turns):
        _say(f"({forgotten} earlier turn{'s' * (forgotten > 1)} no longer shown to the model)")
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not interactive:
            raise
        _say(" (stopped)")
    else:
        assert stream.answer is not None
        print()
        if stream.answer.finish_reason == "length":
            _say(f"(cut after {stream.answer.num_new_tokens} tokens; --max-new-tokens allows more)")
    chat.remember(question, stream.text)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
