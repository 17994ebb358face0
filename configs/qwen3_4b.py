"""Qwen3-4B with the paper's hyper-parameters.

Not run at full size yet. Times and memory are for one H100 and traces of 32,768 tokens, as
--config.dry_run=True --config.target=h100 estimates them; more devices divide the times. At 8,192
tokens an H100 reached 13 % of its peak in the supervised and 20 % in the reinforcement stage.
python -m launch.traces --config=qwen3_4b --workdir=data/qwen3_4b_train   and _eval
python -m launch.sft --config=qwen3_4b       scorers; 14 h, 51 s a step, 10.2 GB
python -m launch.grpo --config=qwen3_4b      better scorers; 92 h, 22 min a step, 14.9 GB
python -m launch.evaluate --config=qwen3_4b  AIME 2024, 32 samples per problem

`--config=qwen3_4b:2k` and `:4k` set the budget, `:long` is for traces beyond 12,000 tokens.
"""

from ml_collections import ConfigDict

from configs import paper


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; see `configs.paper.recipe`."""
    return paper.recipe(
        "qwen3_4b", "Qwen/Qwen3-4B", "1cfa9a7208912126459214e8b04321603b3df60c", arg
    )
