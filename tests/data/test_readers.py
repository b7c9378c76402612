"""Readers: the same rows from every format, damaged files, and memory that stays flat."""

import csv
import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finerank.data import readers
from finerank.data.rows import BadRow
from finerank.errors import DataError

ROWS = [{"instruction": f'Say {i}, 你好\n"x"', "input": "", "output": f"{i}"} for i in range(20)]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    if kind == "json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif kind == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + lines + b"\n\n")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":
        path.write_bytes(zstandard.compress(lines))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "arrow":
        table = pyarrow.Table.from_pylist(ROWS)
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    elif kind == "feather":
        table = pyarrow.Table.from_pylist(ROWS)
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as out:
            out.write_table(table)
    return path


KINDS = ["json", "jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet", "arrow", "feather"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path):
    assert list(readers.read_rows(write(tmp_path, kind))) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_gives_a_prefix_or_one_clear_error(kind: str, tmp_path: Path):
    whole = write(tmp_path, kind).read_bytes()
    for cut in range(0, len(whole), max(1, len(whole) // 40)):
        path = tmp_path / f"cut.{kind}"
        path.write_bytes(whole[:cut])
        try:
            rows = list(readers.read_rows(path))
        except DataError as error:
            assert str(path) in str(error)
            continue
        good = [row for _, row in rows if isinstance(row, dict)]
        assert [n for n, _ in rows] == list(range(1, len(rows) + 1))
        if kind != "csv":  # a cut cell of CSV is a shorter cell
            assert good == ROWS[: len(good)]
        assert len(rows) - len(good) <= 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from([*KINDS, "txt"]))
def test_random_bytes_never_give_another_error(tmp_path: Path, content: bytes, kind: str):
    path = tmp_path / f"random.{kind}"
    path.write_bytes(content)
    try:
        for number, row in readers.read_rows(path):
            assert number >= 1 and isinstance(row, dict | BadRow)
    except DataError:
        pass


def test_a_broken_line_is_one_bad_row(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n{"a": "\\ud800"}\n{"a": NaN}\n')
    kinds = [row.reason if isinstance(row, BadRow) else "row" for _, row in readers.read_rows(path)]
    assert kinds == ["row", "broken JSON", "the row is not an object", "row", "row"]


def test_rows_that_take_no_bytes_are_refused_before_they_are_counted(tmp_path: Path):
    path = tmp_path / "rows.arrow"
    table = pyarrow.table({"instruction": pyarrow.nulls(12345)})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    content = path.read_bytes().replace(struct.pack("<q", 12345), struct.pack("<q", 10**12))
    path.write_bytes(content)
    with pytest.raises(DataError, match="claims 1000000000000 rows in 0 bytes"):
        list(readers.read_rows(path))


def test_a_damaged_array_keeps_the_rows_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": 1}, {"a": 2}, {"a": oops}, {"a": 4}]')
    rows = list(readers.read_rows(path))
    assert rows[:2] == [(1, {"a": 1}), (2, {"a": 2})]
    assert len(rows) == 3 and "broken JSON" in rows[2][1].reason


def test_streaming_an_array_equals_parsing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, "json")
    monkeypatch.setattr("finerank.data.readers.json.WHOLE_BYTES", 100)
    assert list(readers.read_rows(path)) == list(enumerate(ROWS, start=1))


def test_an_object_is_refused_with_the_name_of_its_list(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": ROWS}, indent=1), encoding="utf-8")
    with pytest.raises(DataError, match="'data'"):
        list(readers.read_rows(path))


def test_a_folder_gives_its_most_frequent_kind(tmp_path: Path):
    for name in ("a.jsonl", "b.jsonl", "c.csv", "notes.md"):
        (tmp_path / name).write_text("", encoding="utf-8")
    assert [p.name for p in readers.input_files([str(tmp_path)])] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match=r"no known extension"):
        readers.input_files([str(tmp_path / "notes.md")])
    with pytest.raises(DataError, match=r"no file or folder"):
        readers.input_files([str(tmp_path / "absent.json")])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
def test_a_large_array_is_read_in_little_memory(tmp_path: Path):
    path = tmp_path / "large.json"
    row = orjson.dumps({"instruction": "x" * 2000, "output": "y" * 2000})
    with path.open("wb") as file:
        file.write(b"[" + row)
        for _ in range(40_000):
            file.write(b"," + row)
        file.write(b"]")
    assert path.stat().st_size > 150 << 20
    code = (
        "import pathlib, re, sys; from finerank.data import readers\n"
        "n = sum(1 for _ in readers.read_rows(pathlib.Path(sys.argv[1])))\n"
        "print(n, re.search(r'VmHWM:\\s*([0-9]+)', pathlib.Path('/proc/self/status').read_text())[1])"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    rows, peak_kib = map(int, out.split())
    assert rows == 40_001 and peak_kib < 300 << 10, peak_kib
