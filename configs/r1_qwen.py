"""DeepSeek-R1-Distill-Qwen-7B with the paper's hyper-parameters.

python -m launch.sft --config=r1_qwen       the scorers
python -m launch.grpo --config=r1_qwen      reinforcement after it
python -m launch.evaluate --config=r1_qwen  AIME 2024, 32 samples a problem

`--config=r1_qwen:2k` and `:4k` set the budget, `:long` is for traces beyond 12,000 tokens.
Traces: directories data/r1_qwen_train and data/r1_qwen_eval, which launch.traces writes.
Not run at full size yet. Computed by --config.dry_run=True for traces of 32,768 tokens, on one H100
at 40 % of its peak: 27.1 GB and 12 s a supervised step, 3.4 h in all; 48.3 GB and 42 min a step of
the reinforcement stage, 173 h in all, and as many times less as there are devices.
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
