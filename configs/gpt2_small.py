"""A decoder of GPT-2 small's shape on the standard library and every installed package, for one GPU of the Hopper class.

    python -m trainer --config configs/gpt2_small.py

85 M parameters on bytes, 124 M with a tied vocabulary of 50 k. Cost: 4,000 steps of 0.5 M bytes, 1.2 EFLOP, about 50
minutes at 40 % of an H200's dense bfloat16 peak. Not yet run on such a machine: `--dry_run` prints what it would do, and
`python -m benchmarks.gpu_mfu --config configs/gpt2_small.py` measures its speed.

The text is bytes, so that nothing has to be prepared; a tokenizer trained by `python -m trainer.data tokenizer` is named with
`--config.data.tokenizer=FILE`.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    del arg
    config = ConfigDict()
    config.data = dict(name="python_source", which="all", sequence_length=1024, batch_size=512, workers=2)
    config.model = dict(width=768, layers=12, heads=12, ffn=dict(name="relu2"))
    config.optimizer = dict(
        direction=dict(
            name="muon", learning_rate=0.02, weight_decay=0.01, rest=dict(name="adamw", learning_rate=3e-3, weight_decay=0.0)
        ),
        schedule=dict(name="wsd", warmup=100, decay=0.3),
    )
    config.train = dict(steps=4000, accumulation=8, precision="bfloat16")
    config.evaluate = dict(every=250, batches=1)
    config.checkpoint = dict(every=250, keep_every=1000)
    return config
