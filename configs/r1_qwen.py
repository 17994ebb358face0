"""DeepSeek-R1-Distill-Qwen-7B with the paper's hyper-parameters.

python -m launch.sft --config=configs/r1_qwen.py       the scorers
python -m launch.grpo --config=configs/r1_qwen.py      reinforcement after it
python -m launch.evaluate --config=configs/r1_qwen.py  AIME 2024, 32 samples a problem

`configs/r1_qwen.py:2k` and `:4k` set the budget, `:long` is for traces beyond 12,000 tokens.
Traces: directories data/r1_qwen_train and data/r1_qwen_eval, which launch.traces writes.
Not run at full size yet: no times or memory are known.
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
