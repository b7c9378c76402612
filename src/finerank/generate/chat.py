"""A conversation that remembers: turns, the system turn, and what is forgotten when the context is full."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from finerank.data.types import Message
from finerank.errors import DataError
from finerank.generate.engine import AnswerStream, Generator
from finerank.generate.settings import SamplingSettings


@dataclass
class Chat:
    """Turns with one model. A turn is a question and its answer."""

    generator: Generator
    sampling: SamplingSettings
    system: str | None = None
    history_turns: int = 20
    """Most earlier turns the model is shown."""
    turns: list[tuple[str, str]] = field(default_factory=list)
    num_asked: int = 0

    def reset(self) -> None:
        """Forget all turns; the system turn stays. The same questions then get the same answers again."""
        self.turns.clear()
        self.num_asked = 0

    def ask(self, question: str) -> AnswerStream:
        """The answer, as it is made; give what came of it to `remember`. Raises DataError for too long a question.

        The oldest turns are forgotten until question and longest answer fit into the model's context.
        """
        del self.turns[: max(0, len(self.turns) - self.history_turns)]
        while self.turns and not self._fits(question):
            del self.turns[0]
        sampling = replace(self.sampling, seed=self.sampling.seed + self.num_asked)
        stream = self.generator.stream(self._messages(question), sampling)
        self.num_asked += 1
        return stream

    def remember(self, question: str, answer: str) -> None:
        """Keep a turn for the questions to come."""
        self.turns.append((question, answer))

    def _fits(self, question: str) -> bool:
        limit = self.generator.context_length
        try:
            length = len(self.generator.prompt_ids(self._messages(question)))
        except DataError:
            return False
        return limit is None or length + self.sampling.max_new_tokens <= limit

    def _messages(self, question: str) -> tuple[Message, ...]:
        return tuple(self._all_messages(question))

    def _all_messages(self, question: str) -> Iterator[Message]:
        if self.system:
            yield Message(role="system", content=self.system)
        for asked, answered in self.turns:
            yield Message(role="user", content=asked)
            yield Message(role="assistant", content=answered)
        yield Message(role="user", content=question)
