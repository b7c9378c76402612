"""Tune a base model with a low-rank adapter, or whole: on instruction rows, plain text or pairs of answers.

    finerank tune --load smollm2-135m --data-path rows.json --val-set-size 0.1 --output-dir runs/first
    finerank tune --load smollm2-135m --stage dpo --data-path pairs.json --lr 5e-6 --output-dir runs/preferred
    finerank tune --load smollm2-135m --method full --data-path rows.json --lr 2e-5 --output-dir runs/whole

The run folder then holds the adapter in PEFT's format (of `--method full` the model, in its folder `model`), the model
card, the metrics of each step and checkpoints from which `--resume auto` goes on exactly. Ctrl-C and SIGTERM save and
leave with exit code 130 or 143.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from finerank.adapters.initial import check_initial
from finerank.adapters.settings import AdapterSettings
from finerank.config import setting
from finerank.data.settings import DataSettings
from finerank.errors import ConfigError
from finerank.models.settings import ModelSettings, VocabularySettings
from finerank.recipes._megatron_flags import REPLACED
from finerank.train.settings import TrainSettings, check_method, check_preference_settings, check_train_settings

if TYPE_CHECKING:
    from finerank.recipes._prepare import Parts
    from finerank.train.loop import TrainLoop
    from finerank.train.state import TrainState

_IGNORED = """
--use-mcore-models --spec --transformer-impl --use-flash-attn --use-fused-rmsnorm --use-fused-swiglu
--use-fused-rotary-pos-emb --use-rotary-position-embeddings --no-masked-softmax-fusion --attention-softmax-in-fp32
--no-gradient-accumulation-fusion --manual-gc --manual-gc-interval --distributed-backend --jit-compile
--overlap-grad-reduce --overlap-param-gather --overlap-p2p-communication --swap-attention
--recompute-activation-function --recompute-activation-function-num-layers --enable-recompute-layers-per-pp-rank
--context-parallel-algo --tokenizer-kwargs
"""


@dataclass(kw_only=True)
class Settings(ModelSettings, VocabularySettings, DataSettings, AdapterSettings, TrainSettings):
    """All settings of tune."""

    IGNORED_FLAGS: ClassVar[tuple[str, ...]] = tuple(_IGNORED.split())
    REPLACED_FLAGS: ClassVar[dict[str, str]] = REPLACED

    qlora_save_dequantize: bool = setting(
        False, help="with --load-4bit or --load-8bit: write the dequantised base into the run folder at the end"
    )
    replay: str | None = setting(None, help="run the batch of a nonfinite-step file once more, and nothing else")

    def __post_init__(self) -> None:
        check_train_settings(self)
        if self.qlora_save_dequantize and not (self.load_4bit or self.load_8bit):
            raise ConfigError("--qlora-save-dequantize needs a quantised base: add --load-4bit or --load-8bit.")
        check_preference_settings(self, stage=self.stage)
        check_initial(self)
        check_method(self)


def run(settings: Settings) -> int:
    """Tune; see the module's docstring. Returns the exit status."""
    from finerank.models.runtime import set_threads, tune_runtime
    from finerank.train.stop import ignore_save_requests

    ignore_save_requests()  # first of all: loading takes a while
    if settings.tune_runtime:
        tune_runtime(num_threads=settings.threads)
    set_threads(settings.threads)
    if settings.replay is not None:
        return _replay(settings, Path(settings.replay))
    from finerank.checkpoints.native import tidy_after_kill
    from finerank.recipes._leave import leave
    from finerank.recipes._prepare import prepare
    from finerank.train import run_folder
    from finerank.train.stop import run_lock

    folder = Path(settings.output_dir)
    with run_lock(folder):
        tidy_after_kill(folder)
        run_folder.check_free(folder, resume=settings.resume is not None, overwrite=settings.overwrite_output_dir)
        run_folder.check_model_folder(folder, settings)
        parts = prepare(settings, folder, say=_say)
        loop = make_loop(parts)
        _start_or_resume(loop, parts)
        _announce(parts)
        state = _train(loop, parts)
        leave(parts, state)
    return 0


def make_loop(parts: "Parts") -> "TrainLoop":
    """The loop over what `prepare` found, before its first step."""
    from finerank.adapters.files import adapter_files
    from finerank.train import start
    from finerank.train.loop import TrainLoop
    from finerank.train.micro_batches import backward_of
    from finerank.train.origin import origin_of_run
    from finerank.train.whole_model import WholeModel

    settings, loaded, trained = parts.settings, parts.loaded, parts.trained

    def files() -> dict[str, bytes]:
        """The adapter of a checkpoint; a whole model's is in its state already."""
        name = loaded.source.name
        return {} if isinstance(trained, WholeModel) else adapter_files(trained, base_model_name=name)

    return TrainLoop(
        loaded.model,
        trained,
        parts.plan,
        settings,
        folder=parts.folder,
        origin=origin_of_run(settings, loaded, parts.template, parts.splits),
        adapter_files=files,
        held_out=start.held_out_batches(settings, parts.splits, parts.pad_token_id),
        loss_function=parts.loss_function,
        lr_ratios=trained.lr_ratios,
        local=parts.local,
        backward=backward_of(trained.parameters(), at_once=settings.micro_batches_at_once or 1),
        after_write=trained.after_write if isinstance(trained, WholeModel) else lambda: None,
    )


def _start_or_resume(loop: "TrainLoop", parts: "Parts") -> None:
    """Restore what `--resume` names, or clear the place; then write down what this run is."""
    from finerank.recipes._leave import describe
    from finerank.train import resume, run_folder

    settings, folder, checkpoint = parts.settings, parts.folder, parts.checkpoint
    if checkpoint is not None:
        resume.check_origin(checkpoint, loop.origin, anyway=settings.resume_anyway, say=_say)
        resume.check_place(checkpoint, folder, num_steps=loop.plan.num_steps, say=_say)
        loop.restore(checkpoint)
        resume.take_over(checkpoint, folder, loop.state, keep_best=settings.keep_best, say=_say)
        _say(f"resuming {checkpoint.folder} after step {loop.state.step} of {loop.plan.num_steps}")
    else:
        run_folder.clear(folder)
    describe(parts)


def _announce(parts: "Parts") -> None:
    model, splits = parts.loaded.model, parts.splits
    dtype = str(model.dtype).removeprefix("torch.")
    all_trained = ", all trained" if parts.settings.method == "full" else ""
    held_out = len(splits.valid) if splits.valid is not None else 0
    size = f"{parts.num_base_weights / 1e6:.1f} M parameters in {dtype} on {model.device}{all_trained}"
    _say(f"{parts.loaded.source.name}: {size}")
    rows = parts.settings.global_batch_size
    _say(f"{len(splits.train)} rows, {held_out} held out; {parts.plan.num_steps} steps of {rows} rows")


def _train(loop: "TrainLoop", parts: "Parts") -> "TrainState":
    """All steps; the state of the weights that the run is to leave."""
    from finerank.recipes._leave import write_profile
    from finerank.train.boundary_cache import start_boundary_cache
    from finerank.train.profile import StepProfiler

    settings, digest = parts.settings, parts.loaded.source.digest
    cache = start_boundary_cache(settings, loop, parts.local, parts.splits.train, base_digest=digest, say=_say)
    profiler = StepProfiler.of_loop(loop, num_steps=settings.profile_steps) if settings.profile else None
    state = loop.run()
    if profiler is not None:
        write_profile(profiler, parts.folder)
    if cache is not None:
        cache.remove()
    if settings.final_adapter == "best":
        loop.load_best()
        state = dataclasses.replace(state, last_eval_loss=state.best_eval_loss)
    return state


def _replay(settings: Settings, path: Path) -> int:
    """Run the micro-batches of a replay file again and say where they go wrong; exit status 4 when they do."""
    from finerank.adapters.adapter_set import AdapterSet
    from finerank.adapters.initial import shape_adapters
    from finerank.errors import NumericsError
    from finerank.models.attention import use_packed_attention
    from finerank.models.forward import verified_head
    from finerank.models.fused.fuse import fuse
    from finerank.recipes._prepare import load_base
    from finerank.train.nonfinite import find_nonfinite, read_replay
    from finerank.train.start import choose_loss, make_trained
    from finerank.train.state import load_parameters

    replay = read_replay(path)
    loaded = load_base(settings)
    if any(batch.cu_seqlens is not None for batch in replay.batches):
        use_packed_attention(loaded.model)
    if settings.fused:
        fuse(loaded.model)
    trained = make_trained(loaded, settings, say=_say)
    verified_head(loaded.model)
    if isinstance(trained, AdapterSet):
        shape_adapters(trained, settings, replay.parameters)
    load_parameters(dict(trained.named_parameters()), replay.parameters)
    if not isinstance(trained, AdapterSet):
        trained.after_write()
    loaded.model.train()
    finding = find_nonfinite(loaded.model, replay.batches, loss_function=choose_loss(settings), seeds=replay.seeds)
    rows = sum(len(batch.rows) for batch in replay.batches)
    if finding is None:
        print(f"step {replay.step}: all numbers of its {rows} rows are finite this time")
        return 0
    listed = ", ".join(map(str, finding.rows))
    print(f"step {replay.step}: not finite, first seen in {finding.place}, rows {listed}")
    return NumericsError.exit_code


def _say(message: str) -> None:
    from finerank.train.progress import say

    say(message)
