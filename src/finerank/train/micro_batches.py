"""The backward passes of a step: its micro-batches in turn, or some of them side by side, each in its own thread.

    settings = dataclasses.replace(settings, micro_batches_at_once=choose_at_once(settings, model, ...))
    backward = SideBySide(parameters, at_once=2)                       # or in_turn
    with contextlib.closing(backward(batches, forward, count)) as losses:
        for loss in losses: ...                                        # gradients are added to parameters' .grad

Two threads that share each product wait for each other thousands of times a step, and for the Python between products.
Two that work on a micro-batch of their own wait once. The gradients are added in the order of the micro-batches, so
the result does not depend on which thread was faster.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finerank.data.batch import Batch
from finerank.errors import ConfigError
from finerank.train.memory import if_it_fits

Forward = Callable[[int, Batch], Tensor]
"""(number of the micro-batch in its step, micro-batch) -> sum of its loss."""
Backward = Callable[[Sequence[Batch], Forward, float], Generator[Tensor | None, None, None]]
"""(micro-batches, forward, count) -> the loss of each in turn, when its gradient over `count` has been added to the
parameters'. None instead of a loss that memory had no room for, and nothing after it."""

_GROWING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that change with the longest position seen: what one thread changes, the other would use."""


def in_turn(batches: Sequence[Batch], forward: Forward, count: float) -> Generator[Tensor | None, None, None]:
    """One micro-batch after the other, each with all threads."""

    def backward(i: int, batch: Batch) -> Tensor:
        loss = forward(i, batch)
        (loss / count).backward()
        return loss.detach()

    for i, batch in enumerate(batches):
        loss = if_it_fits(backward, i, batch)
        yield loss
        if loss is None:
            return


class SideBySide:
    """Some micro-batches at once, each with its share of the CPU threads."""

    def __init__(self, parameters: Sequence[Tensor], *, at_once: int):
        """
        Args:
            parameters: that get gradients.
            at_once: micro-batches in work.
        """
        self.parameters, self.num_threads = list(parameters), max(1, torch.get_num_threads() // at_once)
        self._pool = ThreadPoolExecutor(
            at_once, "micro-batch", initializer=torch.set_num_threads, initargs=(self.num_threads,)
        )

    def __call__(
        self, batches: Sequence[Batch], forward: Forward, count: float
    ) -> Generator[Tensor | None, None, None]:
        def gradients(i: int, batch: Batch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            loss = forward(i, batch)
            return loss.detach(), torch.autograd.grad(loss / count, self.parameters, allow_unused=True)

        all_threads = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)  # MKL's number is that of the process
        work: list[Future[tuple[Tensor, tuple[Tensor | None, ...]] | None]] = []
        try:
            work += [self._pool.submit(if_it_fits, gradients, i, batch) for i, batch in enumerate(batches)]
            for future in work:
                found = future.result()
                if found is None:
                    yield None
                    return
                for parameter, gradient in zip(self.parameters, found[1], strict=True):
                    if gradient is not None:  # a new sum: two parameters may have got the same tensor
                        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                yield found[0]
        finally:
            for future in work:
                future.cancel()
            wait(work)
            torch.set_num_threads(all_threads)


def backward_of(parameters: Iterable[Tensor], *, at_once: int) -> Backward:
    """How micro-batches are gone through when `at_once` of them are computed at once."""
    return in_turn if at_once == 1 else SideBySide([p for p in parameters if p.requires_grad], at_once=at_once)


class AtOnceSettings(Protocol):
    """The settings that decide how many."""

    micro_batches_at_once: int | None
    micro_batch_size: int | Literal["auto"] | None
    micro_batch_tokens: int
    pack: bool
    method: str
    lora_dropout: float
    profile: bool


def choose_at_once(settings: AtOnceSettings, model: PreTrainedModel, *, longest: int) -> int:
    """The value of `--micro-batches-at-once`, or the best one where it is not given.

    Args:
        settings: of the run.
        model: what is trained.
        longest: tokens of the longest sample; one over the budget is to be alone.

    Raises:
        ConfigError: more than one asked for, and not possible.
    """
    wanted = settings.micro_batches_at_once
    if wanted is not None and wanted < 1:
        raise ConfigError(f"--micro-batches-at-once must be at least 1, not {wanted}.")
    if wanted == 1:
        return 1
    obstacle = _obstacle(settings, model)
    if wanted is not None:
        if obstacle:
            raise ConfigError(f"--micro-batches-at-once {wanted} is not possible: {obstacle}; leave it out.")
        return wanted
    has_room = longest <= settings.micro_batch_tokens
    return 2 if obstacle is None and has_room and torch.get_num_threads() >= 2 else 1


def _obstacle(settings: AtOnceSettings, model: PreTrainedModel) -> str | None:
    text_config = model.config.get_text_config()
    rope: dict[str, object] = getattr(text_config, "rope_parameters", None) or {}
    kinds = [rope.get("rope_type"), *(own.get("rope_type") for own in rope.values() if isinstance(own, dict))]
    found = {
        f"the model is on {model.device.type}, not on the CPU": model.device.type != "cpu",
        "with --no-pack micro-batches have no budget": not settings.pack,
        "--micro-batch-size auto gives one micro-batch all memory": settings.micro_batch_size == "auto",
        "dropout draws its random numbers in one order": settings.lora_dropout > 0
        or getattr(text_config, "attention_dropout", 0.0) > 0,
        "with --method full backward itself hands gradients to the weights' masters": settings.method == "full",
        "--profile watches one thread": settings.profile,
        "the model's rotary embedding changes with the positions it has seen": any(k in _GROWING_ROPE for k in kinds),
    }
    return next((words for words, is_so in found.items() if is_so), None)
