"""Data sets over mapped files: how much of them a process holds."""

from pathlib import Path

import numpy as np
import pytest

from finerank.data.indexed import IndexedWriter, bin_path
from finerank.data.prefixes import field_prefix, open_fields

NUM_SAMPLES, LENGTH = 20_000, 300


def resident_bytes(path: Path) -> int:
    """Of a mapped file, as the system counts it for this process."""
    held, is_own = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_own = line.endswith(str(path))
        elif is_own and line.startswith("Rss:"):
            held += int(line.split()[1]) * 1024
    return held


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="no /proc/self/smaps to read resident pages from")
def test_a_process_holds_little_of_the_data_that_it_went_through(tmp_path: Path):
    tokens = np.arange(NUM_SAMPLES * LENGTH, dtype=np.int32) % 1000
    for name in ("input_ids", "labels"):
        with IndexedWriter(field_prefix(tmp_path / "rows", name)) as writer:
            writer.add(tokens, np.full(NUM_SAMPLES, LENGTH))
    files = [bin_path(field_prefix(tmp_path / "rows", name)) for name in ("input_ids", "labels")]
    assert all(file.stat().st_size == 4 * len(tokens) for file in files)

    data = open_fields(tmp_path / "rows", longest=LENGTH)
    assert (data.trained_lengths == LENGTH - 1).all()
    counted = [resident_bytes(file) for file in files]
    order = np.random.default_rng(0).permutation(NUM_SAMPLES)
    most = 0
    for number, i in enumerate(order.tolist()):
        ids, labels = data.sequences(i)[0]
        assert ids[0] == tokens[i * LENGTH] and labels[-1] == tokens[(i + 1) * LENGTH - 1]
        if number % 500 == 499:
            most = max(most, *(resident_bytes(file) for file in files))
    assert max(counted) < 1 << 20
    assert 0 < most < 4 * len(tokens) // 2, "a share of the file at most, and it is the mapped file that was looked at"
