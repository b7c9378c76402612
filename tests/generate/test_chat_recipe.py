"""finerank chat: memory, commands, a piped session, Ctrl-C in a real terminal."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from test_engine import make

from finerank import cli
from finerank.generate.chat import Chat
from finerank.generate.settings import SamplingSettings
from finerank.recipes.chat import obey

GREEDY = SamplingSettings(greedy=True, max_new_tokens=12)


def say(chat, question):
    answer = "".join(chat.ask(question))
    chat.remember(question, answer)
    return answer


def test_the_model_sees_earlier_turns_until_reset():
    chat = Chat(make(), GREEDY)
    first = say(chat, "Hi")
    assert say(chat, "Hi") != first
    chat.reset()
    assert say(chat, "Hi") == first


def test_sampled_sessions_repeat():
    chat = Chat(make(), SamplingSettings(temperature=1.5, max_new_tokens=12))
    first = [say(chat, "Hi"), say(chat, "Hi")]
    chat.reset()
    assert [say(chat, "Hi"), say(chat, "Hi")] == first


def test_history_turns_bounds_what_is_shown():
    chat = Chat(make(), GREEDY, history_turns=0)
    assert say(chat, "Hi") == say(chat, "Hi")
    chat.history_turns = 2
    for number in range(5):
        say(chat, f"Number {number}")
    chat.ask("Hi")
    assert [question for question, _ in chat.turns] == ["Number 3", "Number 4"]


def test_the_oldest_turns_give_way_when_the_context_is_full():
    chat = Chat(make(max_position_embeddings=120), GREEDY)
    for number in range(8):
        say(chat, f"Number {number}")
    assert 1 <= len(chat.turns) < 8 and chat.turns[-1][0] == "Number 7"


def test_commands(capsys):
    chat = Chat(make(), GREEDY, system="Be short.")
    say(chat, "Hi")
    assert obey(chat, "/system") and chat.system == "Be short." and chat.turns
    assert obey(chat, "/system Be long.") and chat.system == "Be long." and not chat.turns
    assert obey(chat, "/system -") and chat.system is None
    assert obey(chat, "/help") and obey(chat, "/rest") and not obey(chat, "/quit")
    printed = capsys.readouterr().err
    assert "Did you mean '/reset'?" in printed and "leave" in printed and "System: Be long." in printed


def test_a_piped_session(tiny_folder, capsys, monkeypatch):
    flags = ["--load", str(tiny_folder), "--device", "cpu", "--dtype", "fp32", "--greedy", "--max-new-tokens", "12"]

    def session(text):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        assert cli.main(["chat", *flags]) == 0
        return capsys.readouterr()

    once = session(b"Hi\n").out
    assert session(b"Hi\n/reset\n\nHi\n/quit\nnever asked\n").out == once * 2
    broken = session(b"\xff\xfe moon\n")
    assert broken.out and "Traceback" not in broken.err
    too_long = session(b"word " * 600 + b"\nHi\n")
    assert "shorten it" in too_long.err and too_long.out == once, "the session goes on"


def test_wrong_history_turns_is_one_sentence(capsys):
    assert cli.main(["chat", "--load", "x", "--history-turns", "-1"]) == 2
    assert "--history-turns must be 0 or more" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(tmp_path):
    """In a terminal: the answer is cut, the session goes on, and the end of input ends it with status 0."""
    from tiny import save_tiny

    folder = save_tiny(tmp_path / "model", max_position_embeddings=100_000)
    ours, theirs = pty.openpty()
    flags = ["--load", str(folder), "--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "90000"]
    command = [sys.executable, "-m", "finerank", "chat", *flags, "--top-k", "1"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = ""

    def wait_for(text, after=0, every_second=lambda: None):
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen[after:]:
            assert time.monotonic() < deadline, seen[-2000:]
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 65536).decode(errors="replace")
            else:
                every_second()
        return len(seen)

    def press_ctrl_c():
        os.kill(process.pid, signal.SIGINT)

    try:
        place = wait_for("> ")
        os.write(ours, b"Tell me a story\n")
        wait_for("story", place)
        place = len(seen)
        deadline = time.monotonic() + 60
        while len(seen) < place + 40:  # some of the answer
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 0.5)[0]:
                seen += os.read(ours, 65536).decode(errors="replace")
        press_ctrl_c()
        place = wait_for("(stopped)", place)
        wait_for("> ", place - 20)
        # a signal between the prompt and the read is only noticed with the next key or signal: so once more
        wait_for("Ctrl-D or /quit leaves", place, every_second=press_ctrl_c)
        os.write(ours, b"\x04")
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)
