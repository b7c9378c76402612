"""Flags of Megatron's and MindSpeed-LLM's training programs that tune does not have: what to do instead of each."""

_RECOMPUTE = "activations are not recomputed; where memory is short, lower --micro-batch-tokens"
_ONE_DEVICE = "a run has one device, and checkpoints of any split are read; leave it out"
_SHAPE = "the shape of the model is in its own files; give its folder with --load"
_ROWS = "what kind of rows there are is told from them; --stage says what is trained"
_START = "a run starts anew unless --resume is given; leave it out"

REPLACED: dict[str, str] = {
    "--recompute-granularity": _RECOMPUTE,
    "--recompute-method": _RECOMPUTE,
    "--recompute-num-layers": _RECOMPUTE,
    "--tensor-model-parallel-size": _ONE_DEVICE,
    "--pipeline-model-parallel-size": _ONE_DEVICE,
    "--num-layers-per-virtual-pipeline-stage": _ONE_DEVICE,
    "--context-parallel-size": _ONE_DEVICE,
    "--expert-model-parallel-size": _ONE_DEVICE,
    "--sequence-parallel": _ONE_DEVICE,
    "--num-layers": _SHAPE,
    "--hidden-size": _SHAPE,
    "--ffn-hidden-size": _SHAPE,
    "--num-attention-heads": _SHAPE,
    "--group-query-attention": _SHAPE,
    "--num-query-groups": _SHAPE,
    "--rotary-base": _SHAPE,
    "--normalization": _SHAPE,
    "--swiglu": _SHAPE,
    "--untie-embeddings-and-output-weights": _SHAPE,
    "--position-embedding-type": _SHAPE,
    "--is-instruction-dataset": _ROWS,
    "--is-pairwise-dataset": _ROWS,
    "--finetune": _START,
    "--no-load-optim": _START,
    "--no-load-rng": _START,
    "--ref-model": "the reference is the model that the run starts from; leave it out",
    "--neat-pack": "packed rows never attend to each other; leave it out",
    "--padded-samples": "the last batch of an epoch may be short; leave it out",
    "--no-cut-token": "rows are cut at --seq-length unless --overlong says otherwise",
    "--fp16": "half precision is bf16; give --dtype bf16",
}
"""Flag -> the rest of the sentence `finerank tune has no FLAG: ...`."""
