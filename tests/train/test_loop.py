"""The loop: right gradients whatever the split, exact resume from any instant, stops, skips and full disks."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch

import train_fakes as fakes
from finerank.checkpoints import checksums, native
from finerank.errors import Interrupted, NumericsError
from finerank.train import loop as loop_module
from finerank.train.loop import OutOfMemoryError, TrainLoop, evaluation_steps
from finerank.train.metrics import read_metrics
from finerank.train.nonfinite import read_replay

TIMED = ("step_seconds", "peak_memory_bytes")


def untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(folder / "metrics.jsonl")]


def same_weights(a: TrainLoop, b: TrainLoop) -> bool:
    return all(torch.equal(x, y) for x, y in zip(fakes.weights(a).values(), fakes.weights(b).values(), strict=True))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> TrainLoop:
    loop = fakes.make_loop(tmp_path_factory.mktemp("unbroken"))
    loop.run()
    return loop


def test_one_step_is_the_mean_over_all_trained_tokens(tmp_path: Path) -> None:
    def first_step(name: str, micro_batch: int) -> tuple[float, dict[str, torch.Tensor]]:
        net = fakes.Net()
        net.dropout.p = 0.0
        plan = fakes.Plan(1, micro_batch=micro_batch)
        loop = fakes.make_loop(tmp_path / name, plan=plan, net=net, clip_grad=0.0)
        loop.run()
        return read_metrics(tmp_path / name / "metrics.jsonl")[1]["loss"], fakes.weights(loop)

    whole_loss, whole = first_step("whole", 6)
    net = fakes.Net()
    net.eval()
    batch = fakes.batch_of(fakes.Plan(1).rows(0))
    mean = fakes.loss_sum(net, batch) / batch.num_trained_tokens
    assert whole_loss == pytest.approx(mean.item(), rel=1e-6)
    for split in (1, 2, 4):  # 4 + 2: micro-batches of different sizes must weigh by their tokens
        loss, after = first_step(f"split{split}", split)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        for name, tensor in whole.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_run_learns_and_reports_each_step_once(unbroken: TrainLoop) -> None:
    rows = read_metrics(unbroken.folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(13))
    assert rows[0]["loss"] is None and rows[0]["eval_loss"] == unbroken.state.first_eval_loss
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert all(r["grad_norm"] > 0 and r["tokens"] == 42 and r["trained_tokens"] == 36 for r in rows[1:])


def test_two_fresh_runs_are_bit_equal(tmp_path: Path, unbroken: TrainLoop) -> None:
    again = fakes.make_loop(tmp_path)
    again.run()
    assert same_weights(again, unbroken) and untimed(tmp_path) == untimed(unbroken.folder)
    last = native.folder_of(tmp_path, 12) / "state.safetensors"
    assert last.read_bytes() == (native.folder_of(unbroken.folder, 12) / "state.safetensors").read_bytes()


class Stopper:
    """Sends a signal at the n-th call of the loss."""

    def __init__(self, at: int, number: int = signal.SIGTERM):
        self.left, self.number = at, number

    def __call__(self, model, batch):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return fakes.loss_sum(model, batch)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 9, 13, 27, 40, 58, 59])
def test_stopped_at_any_call_and_resumed_is_bit_equal(
    tmp_path: Path, unbroken: TrainLoop, at: int, background: bool
) -> None:
    first = fakes.make_loop(tmp_path, async_save=background)
    first.loss_function = Stopper(at)
    with pytest.raises(Interrupted, match="--resume auto") as caught:
        first.run()
    assert caught.value.exit_code == 143
    second = fakes.make_loop(tmp_path, async_save=background)
    newest = native.newest_whole(tmp_path, say=pytest.fail)
    assert newest is not None
    second.restore(native.read_checkpoint(newest))
    assert second.state.step == first.state.step
    second.run()
    assert same_weights(second, unbroken)
    assert untimed(tmp_path) == untimed(unbroken.folder)
    assert {k: v for k, v in second.state.to_dict().items() if k != "seconds"} == {
        k: v for k, v in unbroken.state.to_dict().items() if k != "seconds"
    }


def test_ctrl_c_has_its_own_exit_code(tmp_path: Path) -> None:
    loop = fakes.make_loop(tmp_path)
    loop.loss_function = Stopper(10, signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        loop.run()
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigusr1_saves_and_goes_on(tmp_path: Path, unbroken: TrainLoop) -> None:
    loop = fakes.make_loop(tmp_path, keep_last=99)
    loop.loss_function = Stopper(2 + 3 * 2 + 2, signal.SIGUSR1)  # in step 3
    loop.run()
    assert 3 in [s for s, _ in native.checkpoints(tmp_path)] and same_weights(loop, unbroken)


@pytest.mark.parametrize("keep_best", [True, False])
def test_intervals_and_pruning(tmp_path: Path, keep_best: bool) -> None:
    loop = fakes.make_loop(tmp_path, save_interval=5, keep_last=2, keep_best=keep_best, eval_interval=4, lr=3.0)
    loop.run()
    kept = {s for s, _ in native.checkpoints(tmp_path)}
    best = {loop.state.best_step} if keep_best else set()
    assert loop.state.best_step in (4, 8, 12) and {12} | best <= kept <= {10, 12, 8, 4, 5} and len(kept - best) <= 2


def test_early_stop_after_patience(tmp_path: Path) -> None:
    loop = fakes.make_loop(tmp_path, num_steps=50, lr=5.0, eval_interval=1, early_stopping_patience=3)
    state = loop.run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    losses = [r["eval_loss"] for r in rows[1:]]
    assert state.stopped_early and state.step < 50
    assert min(losses) == losses[-4] == state.best_eval_loss and state.best_step == state.step - 3
    loop.load_best()
    assert loop_module.evaluate_loss(loop.model, loop.held_out(), loss_function=fakes.loss_sum) == min(losses)


def test_a_full_disk_ends_no_run(tmp_path: Path, unbroken: TrainLoop, monkeypatch, capsys) -> None:
    real = checksums.sha256_file

    def full(path: Path) -> str:
        if "checkpoint-2." in path.as_posix():  # the folder aside of step 2
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path)

    monkeypatch.setattr(checksums, "sha256_file", full)
    loop = fakes.make_loop(tmp_path)
    loop.run()
    said = capsys.readouterr().err
    assert "checkpoint of step 2 was not saved; checkpoint-1 stays" in said and "free space" in said
    assert same_weights(loop, unbroken)
    assert not list(tmp_path.glob("*aside*"))


class Poison:
    """Makes the n-th training step's loss NaN through a module's output."""

    def __init__(self, net: fakes.Net, rows: set[int]):
        self.rows = rows
        self.now: tuple[int, ...] = ()
        net.base.register_forward_hook(lambda m, i, o: o * float("nan") if self.rows & set(self.now) else None)

    def __call__(self, model, batch):
        self.now = batch.rows
        return fakes.loss_sum(model, batch)


def test_nan_stops_and_names_step_rows_and_module(tmp_path: Path) -> None:
    net = fakes.Net()
    loop = fakes.make_loop(tmp_path, net=net, plan=fakes.Plan(12, num_rows=72))
    loop.loss_function = Poison(net, {27})
    with pytest.raises(NumericsError, match=r"Step 5: the loss \(nan\).*the output of base, rows 26, 27\.") as caught:
        loop.run()
    assert "--replay" in str(caught.value)
    replay = read_replay(tmp_path / "nonfinite-step-5.safetensors")
    assert replay.step == 5 and [b.rows for b in replay.batches] == [(24, 25), (26, 27), (28, 29)]
    assert all(torch.equal(replay.parameters[n], p) for n, p in loop.named_parameters.items())
    assert native.newest_whole(tmp_path, say=pytest.fail) == native.folder_of(tmp_path, 4)


def test_nan_is_skipped_counted_and_changes_no_weight(tmp_path: Path) -> None:
    net = fakes.Net()
    loop = fakes.make_loop(tmp_path, net=net, plan=fakes.Plan(12, num_rows=72), on_nonfinite="skip")
    loop.loss_function = Poison(net, {27, 33})
    state = loop.run()
    assert state.num_skipped_steps == 2 and state.step == 12
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if r.get("skipped")] == [5, 6] and rows[5]["loss"] is None


def test_too_many_skips_in_a_row_stop(tmp_path: Path) -> None:
    net = fakes.Net()
    loop = fakes.make_loop(tmp_path, net=net, plan=fakes.Plan(12, num_rows=72), on_nonfinite="skip", max_nonfinite=2)
    loop.loss_function = Poison(net, {27, 33, 37})
    with pytest.raises(NumericsError, match=r"Step 7.*2 steps in a row were skipped"):
        loop.run()


def test_a_bad_gradient_is_traced_on_the_way_back(tmp_path: Path) -> None:
    class Blow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    net = fakes.Net()
    net.dropout.register_forward_hook(lambda m, i, o: o)
    inner = torch.nn.Identity()
    net.inner = inner
    plain = fakes.Net.forward
    net.forward = lambda ids: inner(Blow.apply(plain(net, ids)))  # type: ignore[method-assign]
    loop = fakes.make_loop(tmp_path, net=net)
    with pytest.raises(NumericsError, match=r"Step 1: the gradient norm.*gradient"):
        loop.run()


@pytest.mark.parametrize("evaluates", [False, True])
def test_out_of_memory_says_what_to_lower(tmp_path: Path, evaluates: bool) -> None:
    loop = fakes.make_loop(tmp_path)
    if not evaluates:
        loop.held_out = None

    def too_much(model, batch):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    loop.loss_function = too_much
    with pytest.raises(OutOfMemoryError, match=r"[23] x 7 tokens.*--micro-batch-size"):
        loop.run()
    assert native.newest_whole(tmp_path, say=pytest.fail) == native.folder_of(tmp_path, 0)


def test_evaluation_steps() -> None:
    assert evaluation_steps(110, None) == frozenset(range(0, 111, 10))
    assert evaluation_steps(5, None) == frozenset(range(6))
    assert evaluation_steps(10, 4) == {0, 4, 8, 10}
