"""Qwen3-1.7B with the paper's hyper-parameters.

Not run at full size yet. Times and memory are for one H100 and traces of 32,768 tokens, as
--config.dry_run=True --config.target=h100 estimates them; more devices divide the times.
python -m launch.traces --config=qwen3_1p7b --workdir=data/qwen3_1p7b_train   and _eval
python -m launch.sft --config=qwen3_1p7b       scorers; 6.9 h, 25 s a step, 4.9 GB
python -m launch.grpo --config=qwen3_1p7b      better scorers; 47 h, 11 min a step, 8.0 GB
python -m launch.evaluate --config=qwen3_1p7b  AIME 2024, 32 samples per problem

`--config=qwen3_1p7b:2k` and `:4k` set the budget, `:long` is for traces beyond 12,000 tokens.
"""

from ml_collections import ConfigDict

from configs import paper


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; see `configs.paper.recipe`."""
    return paper.recipe(
        "qwen3_1p7b", "Qwen/Qwen3-1.7B", "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e", arg
    )
