"""Contestant: PEFT's LoRA under transformers' Trainer; with --bits 4 or 8 over a base in bitsandbytes' linears."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from protocol import Contestant, Stopped, held_out_loss, load_rows, parse


def quantized(folder: Any, bits: int) -> Any:
    """As transformers loads it with bitsandbytes; nothing is recomputed and norms stay in bf16, which is fastest."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(load_in_4bit=True, **four) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )


def main() -> None:
    task, own = parse(__doc__ or "", dtype="fp32", micro_batch=8, attention="sdpa", bits=16, adapters="")

    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from torch.utils.data import Dataset, SequentialSampler
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from finerank.models.load import load_model
    from finerank.models.settings import ModelSettings

    loaded = load_model(ModelSettings(load=task.model, dtype=own.dtype))
    base = loaded.model if own.bits == 16 else quantized(loaded.source.path, own.bits)
    base.set_attn_implementation(own.attention)
    train, held_out, plan = load_rows(task, loaded.tokenizer)
    config = LoraConfig(
        r=task.rank, lora_alpha=2 * task.rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    torch.manual_seed(task.seed)
    if own.adapters:  # begin as finerank has begun
        model = PeftModel.from_pretrained(base, Path(own.adapters) / "start", is_trainable=True)
    else:
        model = get_peft_model(base, config)
    contestant = Contestant()

    order = [row for step in range(task.num_steps) for row in plan.rows(step)]

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(order)

        def __getitem__(self, i: int) -> dict[str, list[int]]:
            row = order[i]
            return {"input_ids": train.ids(row).tolist(), "labels": train.labels(row).tolist()}

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            contestant.wait_for_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            contestant.step_done()

    class OrderedTrainer(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        trainer = OrderedTrainer(
            model=model,
            args=TrainingArguments(
                folder,
                per_device_train_batch_size=own.micro_batch,
                gradient_accumulation_steps=task.global_batch_size // own.micro_batch,
                max_steps=task.num_steps,
                learning_rate=task.lr,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                seed=task.seed,
            ),
            train_dataset=Rows(),
            data_collator=DataCollatorForSeq2Seq(loaded.tokenizer, pad_to_multiple_of=8, label_pad_token_id=-100),
            callbacks=[Steps()],
        )
        contestant.ready()
        with contextlib.suppress(Stopped):
            trainer.train()
    if own.adapters:
        model.save_pretrained(Path(own.adapters) / "peft")
    contestant.end(held_out_loss=held_out_loss(model, held_out))


if __name__ == "__main__":
    main()
