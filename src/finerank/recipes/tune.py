"""Tune a base model with a low-rank adapter: on instruction rows, plain text or pairs of answers.

    finerank tune --load smollm2-135m --data-path rows.json --val-set-size 0.1 --output-dir runs/first
    finerank tune --load smollm2-135m --stage dpo --data-path pairs.json --lr 5e-6 --output-dir runs/preferred

The run folder then holds the adapter in PEFT's format, its model card, the metrics of each step and checkpoints from
which `--resume auto` goes on exactly. Ctrl-C and SIGTERM save and leave with exit code 130 or 143.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from finerank.adapters.initial import check_initial
from finerank.adapters.settings import AdapterSettings
from finerank.config import setting
from finerank.data.settings import DataSettings, TemplateSettings
from finerank.errors import ConfigError
from finerank.models.settings import ModelSettings, VocabularySettings
from finerank.train.settings import TrainSettings, check_preference_settings, check_train_settings

if TYPE_CHECKING:
    from finerank.adapters.inject import AdapterSet
    from finerank.checkpoints.native import Checkpoint
    from finerank.data.dataset import Splits
    from finerank.data.loader import BatchPlan
    from finerank.data.templates import Template
    from finerank.models.load import LoadedModel
    from finerank.train.loop import TrainLoop
    from finerank.train.profile import StepProfiler
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


def run(settings: Settings) -> int:
    """Tune; see the module's docstring. Returns the exit status."""
    from finerank.models.runtime import set_threads, tune_runtime
    from finerank.train.stop import ignore_save_requests

    ignore_save_requests()  # first of all: loading takes a while
    if settings.tune_runtime:
        tune_runtime(num_threads=settings.threads)
    set_threads(settings.threads)
    from finerank.adapters.files import adapter_files
    from finerank.adapters.lora_plus import speed_up_B
    from finerank.checkpoints.native import tidy_after_kill
    from finerank.data.dataset import load_splits
    from finerank.data.loader import BatchPlan
    from finerank.data.templates import load_template
    from finerank.models.attention import use_packed_attention
    from finerank.models.forward import verified_head
    from finerank.models.fused.fuse import fuse
    from finerank.train import run_folder, start
    from finerank.train.boundary_cache import start_boundary_cache
    from finerank.train.fit import choose_split
    from finerank.train.held_out import batch_loss_sum, evaluate_loss
    from finerank.train.loop import TrainLoop
    from finerank.train.origin import origin_of_run
    from finerank.train.profile import StepProfiler
    from finerank.train.sharing import choose_sharing
    from finerank.train.state import use_deterministic_kernels
    from finerank.train.stop import run_lock

    if settings.replay is not None:
        return _replay(settings, Path(settings.replay))
    folder = Path(settings.output_dir)
    with run_lock(folder):
        tidy_after_kill(folder)
        run_folder.check_free(folder, resume=settings.resume is not None, overwrite=settings.overwrite_output_dir)
        loss_function = start.choose_loss(settings)
        loaded = _load(settings)
        pad = loaded.tokenizer.pad_token_id or 0  # never attended to nor trained, so any id does
        if settings.deterministic:
            use_deterministic_kernels(loaded.model.device)
        if settings.pack:
            use_packed_attention(loaded.model)
        settings = dataclasses.replace(settings, share_prompts=choose_sharing(settings, loaded.model))
        if settings.fused:
            fuse(loaded.model)
        checkpoint = _checkpoint(settings, folder)
        template = load_template(settings, loaded.tokenizer)
        splits = load_splits(settings, loaded.tokenizer, template, seed=settings.seed)
        base_loss = None
        if settings.lora_load and loss_function is batch_loss_sum:
            held_out = start.held_out_batches(_without_auto(settings), splits, pad)
            base_loss = evaluate_loss(loaded.model, held_out()) if held_out else None
        adapters = start.make_trained(loaded, settings, say=_say)
        # before weights are restored: the head is chosen by comparing outputs, and a resumed run must choose the same
        verified_head(loaded.model)
        if settings.micro_batch_size == "auto":
            own: dict[str, Any] = {"folder": folder, "pad_token_id": pad, "loss_function": loss_function, "say": _say}
            found = choose_split(settings, loaded.model, splits.train, checkpoint, **own)
            settings = dataclasses.replace(settings, **found)
        splits = start.with_references(splits, settings, loaded, adapters, loss_function, pad_token_id=pad, say=_say)
        plan = BatchPlan(splits.train, settings, seed=settings.seed, **_length(settings), pad_token_id=pad)
        local = start.begin(adapters, settings, plan, checkpoint)
        speed_up_B(adapters, settings, lr=settings.lr)
        loop = TrainLoop(
            loaded.model,
            adapters,
            plan,
            settings,
            folder=folder,
            origin=origin_of_run(settings, loaded, template, splits),
            adapter_files=lambda: adapter_files(adapters, base_model_name=loaded.source.name),
            held_out=start.held_out_batches(settings, splits, pad),
            loss_function=loss_function,
            lr_ratios=adapters.lr_ratios,
            local=local,
        )
        _start_or_resume(loop, settings, folder, checkpoint, template, splits)
        _announce(settings, loaded, adapters, plan, splits)
        digest = loaded.source.digest
        cache = start_boundary_cache(settings, loop, local, splits.train, base_digest=digest, say=_say)
        profiler = StepProfiler.of_loop(loop, num_steps=settings.profile_steps) if settings.profile else None
        state = loop.run()
        if profiler is not None:
            _write_profile(profiler, folder)
        if cache is not None:
            cache.remove()
        if settings.final_adapter == "best":
            loop.load_best()
            state = dataclasses.replace(state, last_eval_loss=state.best_eval_loss)
        _leave(
            settings,
            folder,
            loaded=loaded,
            adapters=adapters,
            template=template,
            splits=splits,
            state=state,
            base_eval_loss=base_loss,
        )
    return 0


def _write_profile(profiler: "StepProfiler", folder: Path) -> None:
    from finerank.report.figures import step_parts
    from finerank.train import run_folder

    if sentence := profiler.write(folder):
        run_folder.write_files(folder, lambda aside: step_parts(folder / "profile.json", aside / "profile.png"))
        _say(sentence)
    else:
        _say("warning: --profile saw no step after its warm-up; give it a longer run")


def _length(settings: Settings) -> dict[str, Any]:
    if settings.train_iters is not None:
        return {"num_steps": settings.train_iters}
    return {"num_epochs": 1.0 if settings.num_epochs is None else settings.num_epochs}


def _load(settings: Settings) -> "LoadedModel":
    """The base model, with new tokens where they are asked for, or those that the starting adapter brings."""
    from finerank.adapters.files import brings_tokens
    from finerank.models.load import load_model

    if settings.lora_load is None or not brings_tokens(Path(settings.lora_load)):
        return load_model(settings, seed=settings.seed, new_tokens=settings.add_tokens)
    if settings.add_tokens:
        raise ConfigError("--add-tokens has no effect: the adapter of --lora-load brings its own tokens; leave it out.")
    own = dataclasses.replace(settings, tokenizer_name_or_path=settings.tokenizer_name_or_path or settings.lora_load)
    return load_model(own, seed=settings.seed, may_grow=True)


def _checkpoint(settings: Settings, folder: Path) -> "Checkpoint | None":
    """What `--resume` names."""
    from finerank.train import resume

    return resume.find_checkpoint(settings.resume, folder, say=_say) if settings.resume else None


def _without_auto(settings: Settings) -> Settings:
    """For the forward passes before the split is found: small ones."""
    if settings.micro_batch_size != "auto":
        return settings
    return dataclasses.replace(settings, micro_batch_size=None)


def _start_or_resume(
    loop: "TrainLoop",
    settings: Settings,
    folder: Path,
    checkpoint: "Checkpoint | None",
    template: "Template",
    splits: "Splits",
) -> None:
    """Restore what `--resume` names, or clear the place; then write down what this run is."""
    from finerank.train import resume, run_folder

    if checkpoint is not None:
        resume.check_origin(checkpoint, loop.origin, anyway=settings.resume_anyway, say=_say)
        resume.check_place(checkpoint, folder, num_steps=loop.plan.num_steps, say=_say)
        loop.restore(checkpoint)
        resume.take_over(checkpoint, folder, loop.state, keep_best=settings.keep_best, say=_say)
        _say(f"resuming {checkpoint.folder} after step {loop.state.step} of {loop.plan.num_steps}")
    else:
        run_folder.clear(folder)
    _describe(settings, folder, template, splits)


def _describe(settings: Settings, folder: Path, template: "Template", splits: "Splits") -> None:
    """What this run is: its settings, rows and template."""
    from finerank.train import run_folder

    run_folder.write_config(folder, settings)
    run_folder.write_json(folder / "receipt.json", splits.receipt)
    kept = {f.name: getattr(settings, f.name) for f in dataclasses.fields(TemplateSettings)}
    run_folder.write_json(
        folder / "template.json", {"name": template.name, "digest": template.digest, "settings": kept}
    )


def _announce(
    settings: Settings, loaded: "LoadedModel", adapters: "AdapterSet", plan: "BatchPlan", splits: "Splits"
) -> None:
    from finerank.models.quantized import num_weights

    dtype = str(loaded.model.dtype).removeprefix("torch.")
    total = num_weights(loaded.model)
    held_out = len(splits.valid) if splits.valid is not None else 0
    _say(f"{loaded.source.name}: {total / 1e6:.1f} M parameters in {dtype} on {loaded.model.device}")
    _say(f"{len(splits.train)} rows, {held_out} held out; {plan.num_steps} steps of {settings.global_batch_size} rows")


def _leave(
    settings: Settings,
    folder: Path,
    *,
    loaded: "LoadedModel",
    adapters: "AdapterSet",
    template: "Template",
    splits: "Splits",
    state: "TrainState",
    base_eval_loss: float | None,
) -> None:
    """The finished run: adapter, tokenizer, template, card and curve, then results.json, which says it is whole."""
    from finerank.adapters.files import save_adapter
    from finerank.files import sha256_file, write_text
    from finerank.report.figures import loss_curve
    from finerank.train import run_folder
    from finerank.train.metrics import FILE_NAME, measures_at, read_metrics

    name = loaded.source.name
    left_with = state.best_step if settings.final_adapter == "best" and state.best_step is not None else state.step
    _describe(settings, folder, template, splits)  # once more, should someone have removed the folder meanwhile
    run_folder.write_files(folder, lambda aside: save_adapter(adapters, aside, base_model_name=name))
    run_folder.write_files(folder, loaded.tokenizer.save_pretrained)
    results = run_folder.results_of(
        state,
        base_eval_loss=base_eval_loss,
        adapter_sha256=sha256_file(folder / "adapter_model.safetensors"),
        base_model=name,
        base_model_digest=loaded.source.digest,
        base_dtype=str(loaded.model.dtype).removeprefix("torch."),
        template_digest=template.digest,
        data_digest=splits.train.digest,
        final_adapter=settings.final_adapter,
        stage=settings.stage,
        loss_unit="per pair" if settings.stage == "dpo" else run_folder.NATS,
        eval_measures=measures_at(read_metrics(folder / FILE_NAME), left_with),
        trained_parameters=adapters.num_parameters,
    )
    write_text(folder / "README.md", run_folder.model_card(settings, results, receipt=splits.receipt))
    run_folder.write_files(folder, lambda aside: loss_curve(folder / FILE_NAME, aside / "training_loss.png"))
    if settings.qlora_save_dequantize:
        _save_dequantized(settings, folder, loaded)
    run_folder.write_json(folder / run_folder.RESULTS, results)
    for line in run_folder.summary(folder, results):
        print(line)


def _save_dequantized(settings: Settings, folder: Path, loaded: "LoadedModel") -> None:
    from finerank.checkpoints.quantized_base import save_dequantized

    assert settings.load is not None
    saved = save_dequantized(folder, settings.load, 4 if settings.load_4bit else 8, loaded.model.dtype)
    size = sum(path.stat().st_size for path in saved.iterdir())
    _say(f"the dequantised base is in {saved} ({size / 1e6:.1f} MB)")


def _replay(settings: Settings, path: Path) -> int:
    """Run the micro-batches of a replay file again and say where they go wrong; exit status 4 when they do."""
    from finerank.adapters.initial import shape_adapters
    from finerank.errors import NumericsError
    from finerank.models.attention import use_packed_attention
    from finerank.models.forward import verified_head
    from finerank.models.fused.fuse import fuse
    from finerank.train.nonfinite import find_nonfinite, read_replay
    from finerank.train.start import choose_loss, make_trained
    from finerank.train.state import load_parameters

    replay = read_replay(path)
    loaded = _load(settings)
    if any(batch.cu_seqlens is not None for batch in replay.batches):
        use_packed_attention(loaded.model)
    if settings.fused:
        fuse(loaded.model)
    adapters = make_trained(loaded, settings, say=_say)
    verified_head(loaded.model)
    shape_adapters(adapters, settings, replay.parameters)
    load_parameters(dict(adapters.named_parameters()), replay.parameters)
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
