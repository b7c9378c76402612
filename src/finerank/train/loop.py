"""The training loop: one optimizer step after the other, each a function of the state before it.

    loop = TrainLoop(model, adapters, plan, settings, folder=run, origin=origin, adapter_files=..., held_out=...)
    loop.restore(checkpoint)          # to go on with a run
    state = loop.run()

A step is: the micro-batches of the step's rows, forward and backward one by one, the gradient norm, AdamW, and then
what is due: evaluation, a metrics row, a checkpoint. The loss of a step is the mean over all trained tokens of the
global batch, however it was split, because each micro-batch contributes its sum divided by the batch's count. (A loss
over pairs of answers counts pairs instead.)

A stop is obeyed after any micro-batch: a half-accumulated gradient is dropped, and the state saved is that of the last
finished step, from which the same micro-batches follow again.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from finerank.checkpoints.native import Checkpoint, damage, drop_newer, read_checkpoint
from finerank.data.batch import Batch
from finerank.errors import CheckpointError, DataError, NumericsError, StorageError
from finerank.train.given import LocalUpdate, Plan, Trainable
from finerank.train.held_out import (
    LossFunction,
    batch_loss_sum,
    begin_measuring,
    count_of,
    evaluate_loss,
    measures_of,
)
from finerank.train.memory import OutOfMemoryError, out_of_memory, peak_memory_bytes
from finerank.train.metrics import FILE_NAME, Metrics, open_trackers, read_metrics
from finerank.train.micro_batches import Backward, in_turn
from finerank.train.nonfinite import find_nonfinite, write_replay
from finerank.train.optim import (
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from finerank.train.progress import RunProgress, Stopwatch
from finerank.train.saver import Saver
from finerank.train.schedule import Schedule, local_schedule
from finerank.train.settings import TrainSettings
from finerank.train.state import TrainState, load_parameters, parameters_of, seed_everything
from finerank.train.stop import Signals, StopSignal


def evaluation_steps(num_steps: int, interval: int | None) -> frozenset[int]:
    """Steps after which the held-out loss is taken: start, end, and every `interval`, or ten times between."""
    if interval is not None:
        between = range(interval, num_steps, interval)
    else:
        between = [round(num_steps * k / 11) for k in range(1, 11)]  # type: ignore[assignment]
    return frozenset({0, num_steps, *between})


class TrainLoop:
    """One run, from its first or a restored step to its last."""

    def __init__(
        self,
        model: nn.Module,
        adapters: Trainable,
        plan: Plan,
        settings: TrainSettings,
        *,
        folder: Path,
        origin: Mapping[str, Any],
        adapter_files: Callable[[], Mapping[str, bytes]],
        held_out: Callable[[], Iterable[Batch]] | None = None,
        loss_function: LossFunction = batch_loss_sum,
        lr_ratios: Mapping[Tensor, float] | None = None,
        local: LocalUpdate | None = None,
        after_write: Callable[[], None] = lambda: None,
        around_step: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext(),
        backward: Backward = in_turn,
    ):
        """
        Args:
            model: with the adapters inside; its device is where everything happens.
            adapters: whose parameters are trained.
            plan: the rows and micro-batches of each step.
            settings: optimizer, length, evaluation and checkpoints.
            folder: run folder, which this process holds.
            origin: what the run is made of, stored in each checkpoint (see `train.resume`).
            adapter_files: the adapter at this moment as files by name, for checkpoints.
            held_out: makes the held-out batches anew; None without held-out rows.
            loss_function: sum of the loss over a micro-batch's trained tokens, or a MeasuredLoss.
            lr_ratios: learning rate of a parameter over the run's, where it is not 1.
            local: learns beside the optimizer, once a step; its parameters are among the adapters', without gradient.
            after_write: called when trained parameters have new values, e.g. to round them into a bf16 model.
            around_step: entered for the forward, backward and update of a step (counted from 0), e.g. to profile it.
            backward: how the micro-batches of a step are gone through.
        """
        self.model, self.plan, self.settings, self.folder, self.origin = model, plan, settings, folder, origin
        self.adapter_files, self.held_out, self.loss_function = adapter_files, held_out, loss_function
        self.named_parameters = dict(adapters.named_parameters())
        trained = {name: p for name, p in self.named_parameters.items() if p.requires_grad}
        self.parameters, self.local, self.after_write = list(trained.values()), local, after_write
        self.around_step, self.backward = around_step, backward
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(
            trained.items(), settings, lr_ratios=lr_ratios, local=local.parameters if local else ()
        )
        self.learning_rate = Schedule.of(settings, num_steps=plan.num_steps)
        self.local_learning_rate = local_schedule(settings, local, num_steps=plan.num_steps)
        self.eval_steps = evaluation_steps(plan.num_steps, settings.eval_interval)
        self.state = TrainState(pending={"step": 0})
        self.history: list[dict[str, Any]] = []
        self._last_save = time.monotonic()
        self._restored: tuple[int, bool] | None = None

    # --- state in and out -------------------------------------------------------------------------------------------

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises CheckpointError when it does not fit this model."""
        groups: dict[str, dict[str, Tensor]] = {"parameter": {}, "optimizer": {}}
        for name, tensor in checkpoint.tensors.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = tensor
        load_parameters(self.named_parameters, groups["parameter"])
        self.after_write()
        load_optimizer_tensors(self.optimizer, self.named_parameters.items(), groups["optimizer"])
        self.state = TrainState.from_dict(checkpoint.state["train"])
        patience = self.settings.early_stopping_patience  # perhaps another one than then
        self.state.stopped_early = patience is not None and self.state.num_evals_without_better >= patience
        done = self.state.step - (self.state.pending is not None)
        rows = read_metrics(self.folder / FILE_NAME) or read_metrics(checkpoint.folder.parent / FILE_NAME)
        self.history = [row for row in rows if row["step"] <= done]
        # they come after the resumed step, and this run writes its own
        drop_newer(self.folder, self.state.step)
        if checkpoint.folder.parent.resolve() == self.folder.resolve():
            self._restored = self._key()

    def load_best(self) -> None:
        """Put the weights of the lowest held-out loss into the model. Raises CheckpointError when not kept."""
        if self.state.best_step is None:
            raise CheckpointError("There is no best checkpoint: --final-adapter best needs held-out rows.")
        best_folder = self.folder / f"checkpoint-{self.state.best_step}"
        if problem := damage(best_folder):
            raise CheckpointError(
                f"The best weights were in {best_folder}, but {problem}; add --resume auto --final-adapter last to "
                "leave with the last ones."
            )
        load_parameters(self.named_parameters, parameters_of(read_checkpoint(best_folder).tensors))
        self.after_write()

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> TrainState:
        """Train to the end. Raises Interrupted (state saved), NumericsError (state saved), StorageError."""
        settings = self.settings
        trackers = open_trackers(settings.report_to, self.folder, first_step=self.state.step)
        self.metrics = Metrics(self.folder / FILE_NAME, history=self.history, trackers=trackers)
        self.progress = RunProgress(
            num_steps=self.plan.num_steps, first_step=self.state.step, log_interval=settings.log_interval
        )
        self.saver = Saver(
            self.folder,
            keep_last=settings.keep_last,
            background=settings.async_save,
            say=self.progress.say,
            before_each=lambda: self._keep_going(self.metrics.flush_to_disk),
        )
        if self._restored is not None:
            self.saver.saved.append(self._restored)
        try:
            with Signals(grace_seconds=settings.grace_seconds) as self.signals:
                self._run()
        finally:
            self.saver.wait()
            self.progress.close()
            self._keep_going(self.metrics.close)
        return self.state

    def _run(self) -> None:
        try:
            if self.state.step > 0 and self._restored is None:
                self._save()  # from another folder: from here on this one is enough to resume from
            while True:
                if self.state.pending is not None:
                    self._finish_step(self.state.pending)
                if self.state.step >= self.plan.num_steps or self.state.stopped_early:
                    break
                self.signals.check()
                with self.around_step(self.state.step):
                    self._train_step()
            self._save()
            self.saver.wait()
        except StopSignal:
            self._save_now()
            raise self.signals.interrupted(
                f"stopped after step {self.state.step} of {self.plan.num_steps}; {self._where_to_resume()}"
            ) from None
        except (NumericsError, OutOfMemoryError):
            self._save_now()
            raise

    def _train_step(self) -> None:
        state, watch = self.state, Stopwatch()
        rows = self.plan.rows(state.step)
        with record_function("finerank::data"):
            batches = self.plan.micro_batches(state.step)
        tokens, trained_tokens = sum(b.num_tokens for b in batches), sum(b.num_trained_tokens for b in batches)
        if trained_tokens == 0:
            raise DataError(f"No token is trained in step {state.step + 1} (rows {_listed(rows)}); correct those rows.")
        lr, local_lr = self.learning_rate(state.step), self.local_learning_rate(state.step)
        self.model.train()
        if self.local is not None:
            num_rows = [len(batch.rows) for batch in batches]
            self.local.begin_step(state.step, sampled=[batch.is_sample for batch in batches], num_rows=num_rows)
        try:
            loss = self._accumulate(batches)
            with record_function("finerank::optimizer"):
                norm = clip_gradients(self.parameters, self.settings.clip_grad).item()
            is_finite = math.isfinite(loss) and math.isfinite(norm)
            if is_finite:
                set_learning_rate(self.optimizer, lr, local_lr=local_lr)
                self.optimizer.step()
                self.after_write()
                if self.local is not None:
                    self.local.apply_local_update(lr_factor=local_lr / self.settings.lr if self.settings.lr else 0.0)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        if not is_finite:
            self._skip_or_stop(loss, norm, batches)
        seconds = watch.lap()
        row: dict[str, Any] = {
            "step": state.step + 1,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "step_seconds": seconds,
            "tokens": tokens,
            "trained_tokens": trained_tokens,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        if not is_finite:
            row |= {"loss": None, "grad_norm": None, "skipped": True}
        else:
            row |= measures_of(self.loss_function)
        # one assignment, so that a stop never sees a half-updated state
        self.state = replace(
            state,
            step=state.step + 1,
            pending=row,
            rows=state.rows + len(rows),
            tokens=state.tokens + tokens,
            trained_tokens=state.trained_tokens + trained_tokens,
            seconds=state.seconds + seconds,
            last_loss=loss if is_finite else state.last_loss,
            num_skipped_steps=state.num_skipped_steps + (not is_finite),
            num_skipped_in_a_row=0 if is_finite else state.num_skipped_in_a_row + 1,
        )

    def _accumulate(self, batches: list[Batch]) -> float:
        """Backward over all micro-batches; returns the step's loss."""
        count = sum(count_of(self.loss_function, batch) for batch in batches)
        begin_measuring(self.loss_function)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with contextlib.closing(self.backward(batches, self._forward, count)) as losses:
            for batch, loss in zip(batches, losses, strict=False):
                if loss is None:
                    raise out_of_memory(self.model, batch, device=self.device)
                total += loss.double()
                self.signals.check()
        return total.item() / count

    def _forward(self, i: int, batch: Batch) -> Tensor:
        seed_everything(*self._seed(i))
        if self.local is not None:
            self.local.begin_micro_batch(i)
        return self.loss_function(self.model, batch.to(self.device))

    def _seed(self, micro_batch: int) -> tuple[int, int, int]:
        return (self.settings.seed, self.state.step, micro_batch)

    def _finish_step(self, row: dict[str, Any]) -> None:
        """What is due after a step: evaluation, the metrics row, a checkpoint."""
        state, is_better = self.state, False
        if self.held_out is not None and row["step"] in self.eval_steps:
            watch = Stopwatch()
            eval_loss = evaluate_loss(
                self.model, self.held_out(), loss_function=self.loss_function, before_each=self.signals.check
            )
            state, is_better = self._judge(state, eval_loss)
            state = replace(state, seconds=state.seconds + watch.lap())
            row = {**row, "eval_loss": eval_loss, **measures_of(self.loss_function, "eval_")}
        rows = 0 if row["step"] == 0 else len(self.plan.rows(row["step"] - 1))
        self.state = replace(state, pending=None)
        if len(row) > 1:  # without held-out rows there is nothing to say about step 0
            self._keep_going(lambda: self.metrics.write(row))
            self.progress.step(row, rows=rows)
        if (is_better and self.settings.keep_best) or self._save_is_due():
            self._save()

    def _judge(self, state: TrainState, eval_loss: float) -> tuple[TrainState, bool]:
        """Best so far and early stopping."""
        state = replace(state, last_eval_loss=eval_loss)
        if state.step == 0:  # before training: a measure to compare with, not a candidate
            return replace(state, first_eval_loss=eval_loss), False
        if state.best_eval_loss is None or eval_loss < state.best_eval_loss:
            return replace(state, best_eval_loss=eval_loss, best_step=state.step, num_evals_without_better=0), True
        worse = state.num_evals_without_better + 1
        patience = self.settings.early_stopping_patience
        stop = patience is not None and worse >= patience
        if stop:
            self.progress.say(f"early stop at step {state.step}: {worse} evaluations without a better loss")
        return replace(state, num_evals_without_better=worse, stopped_early=stop), False

    # --- saving -----------------------------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        s, step = self.settings, self.state.step
        minutes = (time.monotonic() - self._last_save) / 60
        asked = self.signals.take_save_request()
        by_steps = s.save_interval is not None and step > 0 and step % s.save_interval == 0
        return asked or by_steps or 0 < s.save_interval_minutes <= minutes

    def _key(self) -> tuple[int, bool]:
        return (self.state.step, self.state.pending is None)

    def _save(self) -> None:
        """Save the state as it is."""
        state = {"step": self.state.step, "train": self.state.to_dict(), "origin": self.origin}
        tensors = {f"parameter/{name}": p for name, p in self.named_parameters.items()}
        moments = optimizer_tensors(self.optimizer, self.named_parameters.items())
        tensors |= {f"optimizer/{name}": t for name, t in moments.items()}
        self.saver.save(
            self._key(),
            state=state,
            tensors=tensors,
            files=self.adapter_files(),
            keep_steps=[self.state.best_step] if self.settings.keep_best else [],
        )
        self._last_save = time.monotonic()

    def _save_now(self) -> None:
        """The last save of this process, within the grace time: by this thread, which has the full priority."""
        self.saver.background = False
        self._save()
        self.saver.wait()

    def _where_to_resume(self) -> str:
        if self._key() in self.saver.saved:
            return f"go on with --resume auto (from {self.folder / f'checkpoint-{self.state.step}'})"
        return "its state could not be saved; go on with --resume auto from the newest whole checkpoint"

    def _keep_going(self, write: Callable[[], None]) -> None:
        """A full disk must not end a run that can still finish."""
        try:
            write()
        except StorageError as error:
            self.progress.say(f"warning: {error} Training goes on.")

    # --- numbers that go wrong --------------------------------------------------------------------------------------

    def _skip_or_stop(self, loss: float, norm: float, batches: list[Batch]) -> None:
        """Return to skip the step; raise NumericsError to stop. The weights are as before the step."""
        state, step = self.state, self.state.step + 1
        what = f"the loss ({loss})" if not math.isfinite(loss) else f"the gradient norm ({norm})"
        seeds = [self._seed(i) for i in range(len(batches))]
        finding = find_nonfinite(self.model, batches, loss_function=self.loss_function, seeds=seeds)
        where = (
            f"first seen in {finding.place}, rows {_listed(finding.rows)}" if finding else "not seen in a second try"
        )
        replay = self.folder / f"nonfinite-step-{step}.safetensors"
        self._keep_going(
            lambda: write_replay(replay, step=step, batches=batches, seeds=seeds, parameters=self.named_parameters)
        )
        message = f"Step {step}: {what} is not finite; {where}."
        allowed = self.settings.max_nonfinite
        if self.settings.on_nonfinite == "skip" and state.num_skipped_in_a_row < allowed:
            self.progress.say(f"warning: {message} The step is skipped; the batch is in {replay}.")
            return
        many = f" {allowed} steps in a row were skipped before." if self.settings.on_nonfinite == "skip" else ""
        raise NumericsError(
            f"{message}{many} See it again with finerank tune --config {self.folder / 'config.yaml'} "
            f"--replay {replay}; lower --lr, correct those rows, or use --on-nonfinite skip."
        )


def _listed(rows: Iterable[int], most: int = 16) -> str:
    rows = list(rows)
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(map(str, rows[:most])) + more
