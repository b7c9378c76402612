"""Contestant: `finerank tune` itself, whose plan of batches waits until the benchmark asks for a step."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from protocol import Contestant, Stopped, data_settings, held_out_loss, parse


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
    task, own = parse(
        __doc__ or "", dtype="bf16", bits=16, fused=1, share_prompts=1, at_once=0, tokens=2048, adapters=""
    )

    from finerank.adapters.files import save_adapter
    from finerank.recipes._prepare import prepare
    from finerank.recipes.tune import Settings, make_loop

    settings = Settings(
        **dataclasses.asdict(data_settings(task))
        | {"load": task.model, "dtype": own.dtype, "load_4bit": own.bits == 4, "load_8bit": own.bits == 8}
        | {"lora_r": task.rank, "lora_alpha": 2.0 * task.rank, "lr": task.lr, "lr_decay_style": "constant"}
        | {"fused": bool(own.fused), "share_prompts": bool(own.share_prompts), "train_iters": task.num_steps}
        | {"micro_batches_at_once": own.at_once or None, "micro_batch_tokens": own.tokens, "seed": task.seed}
        | {"save_interval_minutes": 0.0, "log_interval": 10**6}
    )
    contestant = Contestant()
    with tempfile.TemporaryDirectory() as folder:
        parts = prepare(settings, Path(folder), say=print)
        held_out, model = parts.splits.valid, parts.loaded.model
        plan: Any = SteppedPlan(parts.plan, contestant)
        without_evaluation = dataclasses.replace(parts.splits, valid=None)
        loop = make_loop(dataclasses.replace(parts, plan=plan, splits=without_evaluation))

        def keep_adapter(name: str) -> None:
            if own.adapters:
                save_adapter(parts.trained, Path(own.adapters) / name, base_model_name=task.model)  # type: ignore[arg-type]

        keep_adapter("start")
        contestant.ready()
        with contextlib.suppress(Stopped):
            loop.run()
        keep_adapter("finerank")
    model.set_attn_implementation("sdpa")
    contestant.end(held_out_loss=held_out_loss(model, held_out))


if __name__ == "__main__":
    main()
