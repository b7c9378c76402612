"""Turns to one sample: labels, and what is cut when the sample is too long.

A turn is what the model reads (source) and what it answers (target). A sample longer than the limit loses the end of
sources and targets turn by turn, so that some of the answer is always left to train on:

    newer rule   2t < C: all of the target; else 2s < C: all of the source; else the target's share int(C t / (s + t))
    older rule   always the target's share, at least 1 token; the source gets the rest

with `s`, `t` the turn's lengths and `C` what is left of the limit. The newer rule is the one used; the older one is
what MindSpeed-LLM's preprocessing does for its older templates, kept so that its files can be made again byte for byte.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from finerank.data.types import IGNORE_INDEX, Rendered


@dataclass(frozen=True)
class EncodedTurn:
    """Ids of what the model reads and of what it answers; `trained` says whether the loss counts the answer."""

    source: list[int]
    target: list[int]
    trained: bool = True


Rule = Callable[[int, int, int], tuple[int, int]]


def newer_rule(source: int, target: int, limit: int) -> tuple[int, int]:
    """(kept source, kept target) lengths; LLaMA-Factory's `infer_seqlen`."""
    if target * 2 < limit:
        most = limit
    elif source * 2 < limit:
        most = limit - source
    else:
        most = int(limit * (target / (source + target)))
    kept = min(most, target)
    return min(max(limit - kept, 0), source), kept


def older_rule(source: int, target: int, limit: int) -> tuple[int, int]:
    """(kept source, kept target) lengths; the rule of LLaMA-Factory 0.8."""
    most = max(int(limit * (target / (source + target))), 1)
    return min(limit - min(most, target), source), min(most, target)


def fit(turns: Sequence[EncodedTurn], limit: int, rule: Rule = newer_rule) -> tuple[list[EncodedTurn], bool]:
    """Turns cut to `limit` tokens in all, and whether anything was cut."""
    if sum(len(t.source) + len(t.target) for t in turns) <= limit:
        return list(turns), False
    kept: list[EncodedTurn] = []
    for turn in turns:
        if limit <= 0:
            break
        if not turn.source and not turn.target:
            continue
        source, target = rule(len(turn.source), len(turn.target), limit)
        kept.append(EncodedTurn(turn.source[:source], turn.target[:target], turn.trained))
        limit -= source + target
    return kept, True


def join(
    turns: Sequence[EncodedTurn],
    *,
    train_on_prompt: bool = False,
    efficient_eos: int | None = None,
    append_eod: int | None = None,
) -> Rendered:
    """One sample of all turns.

    Args:
        turns: what `fit` left.
        train_on_prompt: count the loss on every token.
        efficient_eos: for templates without an end token in each answer: the id that follows the last answer, and that
            the first token of each later turn is trained to predict.
        append_eod: an end-of-text id to put after everything, and to train on.
    """
    ids: list[int] = []
    labels: list[int] = []
    for i, turn in enumerate(turns):
        ids += turn.source
        if train_on_prompt:
            labels += turn.source
        elif efficient_eos is not None and i > 0 and turn.source and turns[i - 1].trained:
            labels += [efficient_eos] + [IGNORE_INDEX] * (len(turn.source) - 1)
        else:
            labels += [IGNORE_INDEX] * len(turn.source)
        ids += turn.target
        labels += turn.target if turn.trained or train_on_prompt else [IGNORE_INDEX] * len(turn.target)
    if efficient_eos is not None:
        ids.append(efficient_eos)
        labels.append(efficient_eos if (turns and turns[-1].trained) or train_on_prompt else IGNORE_INDEX)
    if append_eod is not None:
        ids.append(append_eod)
        labels.append(append_eod)
    return Rendered(ids, labels)


def cut_sample(ids: np.ndarray, labels: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """A stored sample cut to `limit` tokens by the newer rule; its turns are found from the runs of -100."""
    if len(ids) <= limit:
        return ids, labels
    is_target = labels != IGNORE_INDEX
    starts = np.flatnonzero(is_target[:-1] & ~is_target[1:]) + 1  # where a source follows a target
    turns = []
    for span in np.split(np.arange(len(ids)), starts):
        num_source = int((~is_target[span]).sum())
        turns.append(EncodedTurn(span[:num_source].tolist(), span[num_source:].tolist()))
    kept = [i for turn in fit(turns, limit)[0] for i in (*turn.source, *turn.target)]
    return ids[kept], labels[kept]
