"""The embedded reasoner: 0.45 M parameters, the ledger walk, everything on a laptop.

python -m launch.sft --config=configs/tiny.py        the scorers and the table, about 2 minutes
python -m launch.pretrain --config=configs/tiny.py   the reasoner itself, which is shipped
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The recipe; B = `budget`, L = `interval`."""
    config = ConfigDict()
    config.seed = 0
    config.model = "embedded"  # or a Hugging Face directory
    config.budget = 64
    config.interval = 16

    config.task = ConfigDict()  # inclusive ranges, see fkv.tasks.ledger.Spec
    config.task.facts = (16, 28)
    config.task.hops = (12, 20)
    config.task.remarks = (2, 6)
    config.task.marks = (2, 3)
    config.task.fillers = (1, 3)

    config.data = ConfigDict()
    config.data.path = ""  # a .parquet or .jsonl file of traces; empty for the embedded task
    config.data.eval_path = ""  # held-out traces, likewise
    config.data.column = "input_ids"
    config.data.traces = 2048

    config.scorer = ConfigDict()
    config.scorer.hidden = 16
    config.scorer.inputs = "both"
    config.scorer.norm = "rms"
    config.scorer.form = "windowed"

    config.sft = ConfigDict()
    config.sft.steps = 400
    config.sft.batch = 8
    config.sft.learning_rate = 3e-3
    config.sft.warmup = 10
    config.sft.clip = 1.0
    config.sft.margin = 1.0
    config.sft.weighting = "plain"
    config.sft.log_every = 10
    config.sft.checkpoint_every = 100

    config.eval = ConfigDict()
    config.eval.budgets = (48, 64, 96)
    config.eval.traces = 64
    config.eval.batch = 32
    config.eval.policies = ("rkv", "snapkv", "h2o", "streaming_llm", "random")
    return config
