"""DeepSeek-R1-Distill-Llama-8B with the paper's hyper-parameters.

python -m launch.sft --config=r1_llama       the scorers
python -m launch.grpo --config=r1_llama      reinforcement after it
python -m launch.evaluate --config=r1_llama  AIME 2024, 32 samples a problem

`--config=r1_llama:2k` and `:4k` set the budget, `:long` is for traces beyond 12,000 tokens.
Traces: directories data/r1_llama_train and data/r1_llama_eval, which launch.traces writes.
Not run at full size yet. Computed by --config.dry_run=True for traces of 32,768 tokens, on one H100
at 40 % of its peak: 26.7 GB and 14 s a supervised step, 3.9 h in all; 43.5 GB and 45 min a step of
the reinforcement stage, 187 h in all, and as many times less as there are devices.
"""

from ml_collections import ConfigDict

from configs import paper


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; see `configs.paper.recipe`."""
    return paper.recipe(
        "r1_llama",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "6a6f4aa4197940add57724a7707d069478df56b1",
        arg,
    )
