"""Qwen3-1.7B with the paper's hyper-parameters.

python -m launch.sft --config=configs/qwen3_1p7b.py       the scorers
python -m launch.grpo --config=configs/qwen3_1p7b.py      reinforcement after it
python -m launch.evaluate --config=configs/qwen3_1p7b.py  AIME 2024, 32 samples a problem

`configs/qwen3_1p7b.py:2k` and `:4k` set the budget, `:long` is for traces beyond 12,000 tokens.
Traces: directories data/qwen3_1p7b_train and data/qwen3_1p7b_eval, which launch.traces writes.
Not run at full size yet: no times or memory are known.
"""

from ml_collections import ConfigDict

from configs import paper


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; see `configs.paper.recipe`."""
    return paper.recipe(
        "qwen3_1p7b", "Qwen/Qwen3-1.7B", "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e", arg
    )
