"""`finerank preprocess` as a user sees it: progress, Ctrl-C, killed workers, plain text, notes, and its files."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finerank import cli
from finerank.data.handlers import Handler, make_handler
from finerank.data.indexed import IndexedFile
from finerank.data.pipeline import choose_handler, make_samples
from finerank.data.receipt import Receipt
from finerank.data.samples import SampleMaker, SampleRules
from finerank.data.settings import TemplateSettings
from finerank.data.templates import load_template
from finerank.errors import DataError
from tiny import tiny_tokenizer

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads the processes from /proc")


def rows_file(folder: Path, num: int = 30, **more: Any) -> Path:
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(num):
            file.write(json.dumps({"instruction": f"Say {i}.", "output": f"{i} " * (1 + i % 7), **more}) + "\n")
    return path


def preprocess(base: Path, rows: Path, prefix: Path, *flags: str) -> int:
    words = ["preprocess", "--input", str(rows), "--output-prefix", str(prefix), "--tokenizer-name-or-path", str(base)]
    return cli.main([*words, *flags])


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_lines_without_a_terminal(tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    rows = rows_file(tmp_path, 1500)
    assert preprocess(tiny_folder, rows, tmp_path / "out" / "a", "--log-interval", "500") == 0
    said = capfd.readouterr()
    counts = [int(n) for n in re.findall(r"^(\d+) rows, \d+ rows a second$", said.err, re.MULTILINE)]
    assert counts == [512, 1024, 1500] and "\r" not in said.err
    assert re.search(r"1500 +1500 +0 .*rows\.jsonl \(alpaca\)", said.out)
    assert preprocess(tiny_folder, rows, tmp_path / "out" / "a", "--log-interval", "0") == 0
    assert "rows a second" not in capfd.readouterr().err


class Terminal:
    """A process whose standard error is a terminal."""

    def __init__(self, *words: str):
        self.ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "finerank", *words]
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stderr=theirs,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,
            # a job in the background of a shell ignores it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)
        self.text = ""

    def read(self, until: str | None = None, seconds: float = 120) -> str:
        """What was written up to a text, or to the end."""
        end = time.monotonic() + seconds
        while until is None or until not in self.text:
            assert time.monotonic() < end, self.text[-2000:]
            try:
                piece = os.read(self.ours, 65536)
            except OSError:  # Linux's way to say that the other end was closed
                break
            if not piece:
                break
            self.text += piece.decode("utf-8", "replace")
        return self.text

    def children(self) -> list[int]:
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(n) for n in listed]


def words_of(base: Path, rows: Path, prefix: Path, *flags: str) -> list[str]:
    words = ["preprocess", "--input", str(rows), "--output-prefix", str(prefix), "--tokenizer-name-or-path", str(base)]
    return [*words, *flags]


@LINUX
def test_a_bar_on_a_terminal_reaches_its_end(tiny_folder: Path, tmp_path: Path):
    terminal = Terminal(*words_of(tiny_folder, rows_file(tmp_path, 3000), tmp_path / "a"))
    said = terminal.read()
    assert terminal.process.wait(60) == 0
    assert "━" in said and re.search(r"3000\s+\d+ rows a second", said) and "\x1b[?25h" in said  # the cursor is back


@LINUX
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_nothing_behind(tiny_folder: Path, tmp_path: Path, workers: int):
    out = tmp_path / "out"
    rows = rows_file(tmp_path, 200_000)
    terminal = Terminal(*words_of(tiny_folder, rows, out / "a", "--workers", str(workers)))
    terminal.read("rows a second")
    os.killpg(terminal.process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    said = terminal.read()
    assert terminal.process.wait(60) == 130
    assert said.rstrip().endswith("finerank: interrupted") and "Traceback" not in said
    assert "\x1b[?25h" in said and not names(out)


@LINUX
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_killed_process_ends_all_of_them(tiny_folder: Path, tmp_path: Path, victim: str):
    out = tmp_path / "out"
    rows = rows_file(tmp_path, 200_000)
    terminal = Terminal(*words_of(tiny_folder, rows, out / "a", "--workers", "2"))
    terminal.read("rows a second")
    workers = terminal.children()
    assert len(workers) == 2
    os.kill(workers[0] if victim == "worker" else terminal.process.pid, signal.SIGKILL)
    said = terminal.read()
    status = terminal.process.wait(60)
    if victim == "worker":
        assert status == 2 and "finerank: The rows are not prepared: a worker process was ended" in said
        assert "Traceback" not in said and not names(out)
    end = time.monotonic() + 30
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < end, "a worker outlived its parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


class Dying(SampleMaker):
    """Ends the process that works with it, unless it is the one that made it."""

    parent = os.getpid()

    def __call__(self, handler: Handler, rows: Any) -> Any:
        if os.getpid() != self.parent:
            os._exit(9)
        return super().__call__(handler, rows)


def test_a_worker_that_dies_is_an_error_and_not_a_wait(tmp_path: Path):
    template = load_template(TemplateSettings(), tiny_tokenizer())
    maker = Dying(template, SampleRules())
    with pytest.raises(DataError, match=r"a worker process was ended.*fewer --workers"):
        list(make_samples([rows_file(tmp_path)], maker, choose_handler(None), Receipt(), workers=2))


def test_plain_text_is_preprocessed_and_tuned(tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = tmp_path / "book.txt"
    lines = [f"The quick brown fox number {i} jumps over the lazy dog." for i in range(40)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    prefix = tmp_path / "book"
    flags = ["--handler-name", "GeneralPretrainHandler", "--append-eod"]
    assert preprocess(tiny_folder, path, prefix, *flags) == 0
    assert names(tmp_path) == {
        "book.txt",
        "book_text_document.bin",
        "book_text_document.idx",
        "book_receipt.json",
        "book_finerank.json",
    }
    tokenizer = tiny_tokenizer()
    file = IndexedFile(tmp_path / "book_text_document")
    assert file.values.dtype == np.dtype("<u2")  # as Megatron chooses for a vocabulary this small
    assert [file[i].tolist() for i in range(len(file))] == [[*tokenizer.encode(line), 2] for line in lines]
    usual = [
        "--load",
        str(tiny_folder),
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--train-iters",
        "2",
        "--no-tune-runtime",
    ]
    for data in (prefix, f"{prefix}_text_document"):  # the second as Megatron's commands have it
        run = tmp_path / f"run-{Path(data).name}"
        assert cli.main(["tune", *usual, "--data-path", str(data), "--output-dir", str(run)]) == 0
        receipt = json.loads((run / "receipt.json").read_text(encoding="utf-8"))
        assert receipt["tokens"] == len(file.values) and receipt["trained_tokens"] == len(file.values) - len(lines)
    assert "loss" in capfd.readouterr().err


def test_a_prefix_of_another_kind_is_not_mixed_up(tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert preprocess(tiny_folder, rows_file(tmp_path), tmp_path / "a") == 0
    text = tmp_path / "book.txt"
    text.write_text("words\n")
    before = names(tmp_path)
    assert preprocess(tiny_folder, text, tmp_path / "a") == 2
    assert "holds instruction rows already, and these are text rows" in capfd.readouterr().err
    assert names(tmp_path) == before


NOTED = [
    (None, {}, None),
    (None, {"system": "Be short."}, None),
    (None, {"id": 7, "lang": "en"}, "rows.jsonl: columns that are not used: id, lang"),
    ("AlpacaStyleInstructionHandler", {"system": "", "history": []}, None),
    (
        "AlpacaStyleInstructionHandler",
        {"system": "Be short.", "history": [["a", "b"]]},
        "rows.jsonl: these rows can have history, system, which are not read; add --map-keys history=history "
        "system=system",
    ),
]


@pytest.mark.parametrize(("handler", "more", "note"), NOTED)
def test_the_receipt_says_what_is_not_read(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], handler: str | None, more: Any, note: str
):
    flags = ["--handler-name", handler] if handler else []
    assert preprocess(tiny_folder, rows_file(tmp_path, **more), tmp_path / "a", *flags) == 0
    notes = re.findall(r"^note: (.*)$", capfd.readouterr().out, re.MULTILINE)
    assert notes == ([note] if note else [])
    stored = json.loads((tmp_path / "a_receipt.json").read_text(encoding="utf-8"))
    assert [f"rows.jsonl: {n}" for n in stored["files"][0]["notes"]] == notes
    assert Receipt.from_dict(stored).to_dict() == stored


def test_unread_columns_are_judged_by_rows_that_convert():
    rows = [{"instruction": 3, "output": "x", "z": 1}, {"conversations": []}, [1], None]
    assert make_handler("alpaca").unread(rows) == []
    assert make_handler("sharegpt").unread([{"conversations": [], "w": 1}]) == []


def test_inspect_takes_a_packed_row_apart(tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    rows = rows_file(tmp_path, 6)
    flags = ("--pack", "--neat-pack", "--seq-length", "128")
    assert preprocess(tiny_folder, rows, tmp_path / "a", *flags) == 0
    capfd.readouterr()
    look = ["inspect", str(tmp_path / "a"), "--row", "1", "--tokenizer-name-or-path", str(tiny_folder), "--no-ids"]
    assert cli.main(look) == 0
    said = capfd.readouterr().out
    numbers = IndexedFile(tmp_path / "a_packed_attention_mask_document")[0]
    assert numbers.max() > 1 and numbers[-1] == 0
    lengths = [int(n) for n in re.findall(r"^sample \d+: (\d+) tokens", said, re.MULTILINE)]
    assert lengths == [int((numbers == n).sum()) for n in range(1, numbers.max() + 1)]
    assert said.count("⟦") == len(lengths)  # each has its one answer, and the padding is not shown


def test_rows_inside_an_object_are_pointed_at(tmp_path: Path):
    choose = choose_handler(None)
    with pytest.raises(DataError, match=r"columns: 'data'.* under 'data'\? Then make that list the file\.$"):
        choose(tmp_path / "a.json", [(1, {"data": [{"instruction": "a", "output": "b"}]})])
    with pytest.raises(DataError, match=r"columns with --map-keys\.$"):
        choose(tmp_path / "a.json", [(1, {"data": []}), (2, {"data": []})])
