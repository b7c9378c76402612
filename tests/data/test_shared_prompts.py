"""Shared prompts: the segments put together again are the sequences, and nothing that is trained is shared."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finerank.data.loader import packed_batch
from finerank.data.shared_prompts import LEAST_SAVED, Segment, common_prompt, share_prompts


def path(segments: list[Segment], i: int) -> list[Segment]:
    """From the first ancestor to segment `i`."""
    parts = [segments[i]]
    while parts[0].parent >= 0:
        parts.insert(0, segments[parts[0].parent])
    return parts


# few different tokens, and sequences that begin with one of three prompts
SEQUENCES = st.lists(
    st.tuples(
        st.sampled_from([[], [1] * 12, [1] * 12 + [2] * 9]), st.lists(st.integers(0, 2), min_size=1, max_size=12)
    ).map(lambda parts: parts[0] + parts[1]),
    min_size=1,
    max_size=8,
)


@given(SEQUENCES, st.data())
def test_segments_are_the_sequences(sequences: list[list[int]], data: st.DataObject):
    ids = [np.array(sequence) for sequence in sequences]
    first_trained = [data.draw(st.integers(0, len(sequence))) for sequence in sequences]
    segments = share_prompts(ids, first_trained)
    inner, own = segments[: len(segments) - len(ids)], segments[len(segments) - len(ids) :]
    assert [segment.sequence for segment in own] == list(range(len(ids)))
    assert all(segment.parent < i for i, segment in enumerate(segments))
    users = Counter(part for i in range(len(ids)) for part in path(segments, len(inner) + i))
    for i, sequence in enumerate(sequences):
        parts = path(segments, len(inner) + i)
        assert [t for p in parts for t in sequences[p.sequence][p.start : p.end]] == sequence
        assert [p.end for p in parts[:-1]] == [p.start for p in parts[1:]] and parts[0].start == 0
        assert own[i].start <= min(first_trained[i], len(sequence) - 1)
    for segment in inner:
        assert (users[segment] - 1) * (segment.end - segment.start) >= LEAST_SAVED
    assert users.total() - len(own) == sum(users[segment] for segment in inner)


def test_a_system_prompt_and_the_prompts_of_pairs():
    system, prompts = list(range(10)), [[20 + i] * 15 for i in range(3)]
    ids = [np.array(system + prompt + [answer, 99]) for prompt in prompts for answer in (50, 60)]
    segments = share_prompts(ids, [24] * 6)  # position 24 predicts the answer's first token
    assert segments[0] == Segment(0, 0, 10, -1)
    assert sorted((s.start, s.end, s.parent) for s in segments[1:4]) == [(10, 24, 0)] * 3
    assert [(s.start, s.end) for s in segments[4:]] == [(24, 27)] * 6
    assert common_prompt(ids, [24] * 6) == 10


def test_what_is_trained_is_never_shared():
    ids = [np.arange(30)] * 3
    assert share_prompts(ids, [0, 0, 0]) == [Segment(i, 0, 30, -1) for i in range(3)]
    assert share_prompts(ids, [12, 29, 30])[0] == Segment(0, 0, 12, -1)


class Rows:
    """Two sequences a row, with one prompt."""

    def sequences(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        prompt = np.arange(12)
        answers = (np.array([40 + i, 2]), np.array([50 + i, 60, 2]))
        return [(np.append(prompt, a), np.append(np.full(12, -100), a)) for a in answers]


@pytest.mark.parametrize("share", [False, True])
def test_batches_count_the_same_tokens(share: bool):
    batch = packed_batch(Rows(), [0, 1], share=share)  # type: ignore[arg-type]
    assert batch.num_tokens == 2 * (14 + 15) and batch.num_trained_tokens == 2 * (2 + 3)
    assert batch.input_ids.numel() == (58 - 3 * 11 if share else 58)
    trained = batch.target_ids[batch.target_ids != -100].tolist()
    assert trained == [40, 2, 50, 60, 2, 41, 2, 51, 60, 2]
    ends = batch.cu_seqlens[1:][batch.is_sequence].tolist() if batch.cu_seqlens is not None else []
    assert [int(batch.input_ids[0, end - 2]) for end in ends] == [40, 60, 41, 60]
    assert len(ends) == 4
