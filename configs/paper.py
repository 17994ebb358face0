"""What the recipes of real models share: the paper's settings (arXiv 2602.03203) at full size.

Not a recipe itself: `r1_qwen`, `qwen3_4b`, `qwen3_1p7b` and `r1_llama` are. The hyper-parameters of
the paper are the defaults of `configs.base`.
"""

from ml_collections import ConfigDict

from configs import base
from fkv.errors import UserError

# Budget and interval; `long` is the paper's for traces beyond 12,000 tokens in reinforcement.
SIZES = {"1k": (1024, 256), "2k": (2048, 256), "4k": (4096, 256), "long": (2048, 512)}


def recipe(name: str, model: str, revision: str, arg: str) -> ConfigDict:
    """The paper's recipe for a model.

    Args:
      name: of the config file.
      arg: one of `SIZES`, by default `1k`.

    Raises:
      UserError: no such variant.
    """
    if (arg or "1k") not in SIZES:
        raise UserError(f"--config=configs/{name}.py:{arg}: use one of {', '.join(SIZES)}")
    run = f"{name}_{arg}" if arg else name  # as launch names run directories
    config = base.recipe(
        "data", "traces", "scorer", "sft", "grpo", "eval", "evaluate", "recall", "harness",
        "leaderboard", "advise", "pipeline", "benchmark", "export", "generate", "serve",
    )  # fmt: skip
    config.model, config.revision, config.dtype = model, revision, "bfloat16"
    config.budget, config.interval = SIZES[arg or "1k"]

    # Traces: the model's own long answers to math problems.
    config.traces.questions = "RUC-AIBOX/STILL-3-Preview-RL-Data"
    config.traces.question = "question"
    config.traces.count = config.data.traces = 4000
    config.traces.new_tokens = config.evaluate.new_tokens = 32_768
    config.traces.batch = config.evaluate.batch = 32
    config.data.path = f"data/{name}_train"
    config.data.eval_path = f"data/{name}_eval"
    config.data.prompt_column = "prompt_tokens"
    config.data.buckets = 4

    config.sft.at_once = 1
    config.grpo.scorer = f"runs/sft_{run}"
    config.grpo.traces_at_once = 1
    config.grpo.rollouts_at_once = 4
    config.eval.traces = 16
    config.eval.batch = 1
    config.export.scorer = f"runs/grpo_{run}"

    config.evaluate.scorers = (f"supervised=runs/sft_{run}", f"grpo=runs/grpo_{run}")
    config.evaluate.benchmark = "aime24"
    config.evaluate.problems = 0
    config.evaluate.samples = 32
    config.evaluate.traces = 0
    config.pipeline.changes.evaluate = {}

    config.benchmark.policies = ("full", "snapkv", "h2o", "rkv")
    config.benchmark.budgets = (1024, 2048, 4096)
    config.benchmark.batches = (1, 64)
    config.benchmark.lengths = (8192, 16_384, 32_768)
    config.benchmark.new_tokens = 1024
    config.benchmark.prefill_lengths = (2048, 8192, 32_768)
    config.benchmark.growth_tokens = 32_768
    config.benchmark.label_lengths = (2048, 4096, 8192, 16_384, 32_768)
    config.benchmark.step_length = 8192
    config.benchmark.largest_limit = 4096
    config.benchmark.peer_prompt = config.benchmark.peer_tokens = 1024

    config.generate.policy = "rkv"
    config.generate.new_tokens = 4096
    config.generate.chat = True

    config.serve.policies, config.serve.budgets = ("rkv",), (config.budget,)
    config.serve.length = 32_768
    return config
