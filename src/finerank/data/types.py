"""The types that flow from rows to samples: Conversation -> Rendered; a training step's `Batch` is in `data.batch`."""

from dataclasses import dataclass

IGNORE_INDEX = -100
"""Label of a position that is not trained."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. `role` is system, user, assistant, tool (an observation) or function (a call made by the assistant)."""

    role: str
    content: str
    trained: bool = False
    """Whether the loss counts this turn's text and its end token; only ever true for assistant and function turns."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a handler makes of a row: turns (a system turn first, if any) and, for pairwise rows, the worse answer."""

    messages: tuple[Message, ...]
    rejected: Message | None = None
    """For pairwise rows: the worse final answer; the better one is the last of `messages`."""
    tools: str | None = None
    """Tool descriptions as JSON text."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of one sample and their labels, unshifted as Megatron stores them: the id where trained, else -100.

    A label is not always the id beside it: templates that end an answer with the next turn's first token train that
    position on the end-of-text token instead.
    """

    ids: list[int]
    labels: list[int]

    @property
    def loss_mask(self) -> list[bool]:
        """For each token, whether the loss counts its prediction."""
        return [label != IGNORE_INDEX for label in self.labels]
