"""DeepSeek-R1-Distill-Llama-8B with the paper's hyper-parameters.

Not run at full size yet. Times and memory are for one H100 and traces of 32,768 tokens, as
--config.dry_run=True --config.target=h100 estimates them; more devices divide the times.
python -m launch.traces --config=r1_llama --workdir=data/r1_llama_train   and _eval
python -m launch.sft --config=r1_llama       scorers; 13 h, 48 s a step, 19.3 GB
python -m launch.grpo --config=r1_llama      better scorers; 106 h, 25 min a step, 26.0 GB
python -m launch.evaluate --config=r1_llama  AIME 2024, 32 samples per problem

`--config=r1_llama:2k` and `:4k` set the budget, `:long` is for traces beyond 12,000 tokens.
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
