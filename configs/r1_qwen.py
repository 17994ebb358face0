"""DeepSeek-R1-Distill-Qwen-7B with the paper's hyper-parameters.

Not run at full size yet. Times and memory are for one H100 and traces of 32,768 tokens, as
--config.dry_run=True --config.target=h100 estimates them; more devices divide the times.
python -m launch.traces --config=r1_qwen --workdir=data/r1_qwen_train   and _eval
python -m launch.sft --config=r1_qwen       scorers; 11 h, 39 s a step, 19.0 GB
python -m launch.grpo --config=r1_qwen      better scorers; 90 h, 22 min a step, 27.0 GB
python -m launch.evaluate --config=r1_qwen  AIME 2024, 32 samples per problem

`--config=r1_qwen:2k` and `:4k` set the budget, `:long` is for traces beyond 12,000 tokens.
"""

from ml_collections import ConfigDict

from configs import paper


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; see `configs.paper.recipe`."""
    return paper.recipe(
        "r1_qwen",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        "916b56a44061fd5cd7d6a8fb632557ed4f724f60",
        arg,
    )
