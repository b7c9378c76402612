"""Contestant: finerank's own training loop, as `finerank tune` runs it."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from protocol import Contestant, Stopped, held_out_loss, load_rows, parse


class SteppedPlan:
    """finerank's plan of batches, handed out when the benchmark asks for a step."""

    def __init__(self, plan: Any, contestant: Contestant):
        self.plan, self.contestant, self.num_steps = plan, contestant, plan.num_steps

    def rows(self, step: int) -> list[int]:
        return self.plan.rows(step)

    def micro_batches(self, step: int) -> Any:
        if step > 0:  # the loop has finished everything of the step before
            self.contestant.step_done()
        self.contestant.wait_for_step()
        return self.plan.micro_batches(step)


def main() -> None:
    task, own = parse(__doc__ or "", dtype="bf16", bits=16, fused=1, share_prompts=1)

    from finerank.adapters.files import adapter_files
    from finerank.adapters.inject import inject_adapters
    from finerank.adapters.settings import AdapterSettings
    from finerank.models.attention import use_packed_attention
    from finerank.models.forward import verified_head
    from finerank.models.fused.fuse import fuse
    from finerank.models.load import load_model
    from finerank.models.settings import ModelSettings
    from finerank.train.loop import TrainLoop
    from finerank.train.settings import TrainSettings

    bits = {"load_4bit": own.bits == 4, "load_8bit": own.bits == 8}
    loaded = load_model(ModelSettings(load=task.model, dtype=own.dtype, **bits))
    use_packed_attention(loaded.model)
    if own.fused:
        fuse(loaded.model)
    _, held_out, plan = load_rows(task, loaded.tokenizer)
    plan.settings = dataclasses.replace(plan.settings, share_prompts=bool(own.share_prompts))
    adapters = inject_adapters(loaded.model, AdapterSettings(lora_r=task.rank, lora_alpha=2.0 * task.rank), seed=1)
    verified_head(loaded.model)
    contestant = Contestant()
    contestant.ready()
    settings = TrainSettings(lr=task.lr, lr_decay_style="constant", save_interval_minutes=0.0, log_interval=10**6)
    with tempfile.TemporaryDirectory() as folder:
        loop = TrainLoop(
            loaded.model,
            adapters,
            SteppedPlan(plan, contestant),
            settings,
            folder=Path(folder),
            origin={"settings": {}, "digests": {}, "environment": {}},
            adapter_files=lambda: adapter_files(adapters, base_model_name=loaded.source.name),
        )
        with contextlib.suppress(Stopped):
            loop.run()
    loaded.model.set_attn_implementation("sdpa")
    contestant.end(held_out_loss=held_out_loss(loaded.model, held_out))


if __name__ == "__main__":
    main()
