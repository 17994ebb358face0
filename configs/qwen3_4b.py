"""Qwen3-4B with the paper's hyper-parameters.

python -m launch.sft --config=qwen3_4b       the scorers
python -m launch.grpo --config=qwen3_4b      reinforcement after it
python -m launch.evaluate --config=qwen3_4b  AIME 2024, 32 samples a problem

`--config=qwen3_4b:2k` and `:4k` set the budget, `:long` is for traces beyond 12,000 tokens.
Traces: directories data/qwen3_4b_train and data/qwen3_4b_eval, which launch.traces writes.
Not run at full size yet. Computed by --config.dry_run=True for traces of 32,768 tokens, on one H100
at 40 % of its peak: 15.6 GB and 10 s a supervised step, 2.8 h in all; 27.6 GB and 26 min a step of
the reinforcement stage, 107 h in all, and as many times less as there are devices.
"""

from ml_collections import ConfigDict

from configs import paper


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; see `configs.paper.recipe`."""
    return paper.recipe(
        "qwen3_4b", "Qwen/Qwen3-4B", "1cfa9a7208912126459214e8b04321603b3df60c", arg
    )
