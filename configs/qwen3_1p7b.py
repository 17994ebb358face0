"""Qwen3-1.7B with the paper's hyper-parameters.

python -m launch.sft --config=qwen3_1p7b       the scorers
python -m launch.grpo --config=qwen3_1p7b      reinforcement after it
python -m launch.evaluate --config=qwen3_1p7b  AIME 2024, 32 samples a problem

`--config=qwen3_1p7b:2k` and `:4k` set the budget, `:long` is for traces beyond 12,000 tokens.
Traces: directories data/qwen3_1p7b_train and data/qwen3_1p7b_eval, which launch.traces writes.
Not run at full size yet. Computed by --config.dry_run=True for traces of 32,768 tokens, on one H100
at 40 % of its peak: 8.4 GB and 3.9 s a supervised step, 1.1 h in all; 16.5 GB and 11 min a step of
the reinforcement stage, 44 h in all, and as many times less as there are devices.
"""

from ml_collections import ConfigDict

from configs import paper


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; see `configs.paper.recipe`."""
    return paper.recipe(
        "qwen3_1p7b", "Qwen/Qwen3-1.7B", "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e", arg
    )
