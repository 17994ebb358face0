"""What the recipes of real models share: the paper's hyper-parameters (arXiv 2602.03203).

Not a recipe itself: `r1_qwen`, `qwen3_4b`, `qwen3_1p7b` and `r1_llama` are.
"""

from ml_collections import ConfigDict

from configs import tiny
from fkv.errors import UserError

RULES = ("rkv", "snapkv", "h2o", "streaming_llm")


def recipe(name: str, model: str, revision: str, arg: str) -> ConfigDict:
    """The paper's recipe for a model.

    Args:
      name: of the config file.
      arg: `1k` (B = 1024, L = 256, the default), `2k` or `4k`; `long` is what the paper takes for
        traces longer than 12,000 tokens in the reinforcement stage: B = 2048, L = 512.

    Raises:
      UserError: there is no such variant.
    """
    sizes = {"1k": (1024, 256), "2k": (2048, 256), "4k": (4096, 256), "long": (2048, 512)}
    if (arg or "1k") not in sizes:
        raise UserError(f"--config=configs/{name}.py:{arg}: use one of {', '.join(sizes)}")
    run = (
        f"{name}_{arg}" if arg else name
    )  # as launch names run directories: scorers fit one cadence
    config = tiny.get_config().unlock()
    del config.pretrain, config.task, config.pipeline.changes.grpo
    config.model, config.revision, config.dtype = model, revision, "bfloat16"
    config.budget, config.interval = sizes[arg or "1k"]

    # Traces: the model's own long answers to math questions.
    config.traces.questions = "RUC-AIBOX/STILL-3-Preview-RL-Data"
    config.traces.question = "question"
    config.traces.count = 4000
    config.traces.new_tokens = 32_768
    config.traces.batch = 32
    config.data.path = f"data/{name}_train"
    config.data.eval_path = f"data/{name}_eval"
    config.data.prompt_column = "prompt_tokens"
    config.data.traces = 4000
    config.data.buckets = 4

    config.scorer.hidden = 16
    config.scorer.inputs = "both"
    config.scorer.norm = "none"
    config.scorer.form = "windowed"

    config.sft.steps = 1000
    config.sft.batch = 4
    config.sft.at_once = 1
    config.sft.learning_rate = 1e-2
    config.sft.warmup = 10
    config.sft.margin = 0.01
    config.sft.weighting = "plain"
    config.sft.checkpoint_every = 50

    config.grpo.scorer = f"runs/sft_{run}"
    config.grpo.steps = 250
    config.grpo.traces = 32
    config.grpo.traces_at_once = 1
    config.grpo.rollouts = 32
    config.grpo.rollouts_at_once = 4
    config.grpo.learning_rate = 3e-4
    config.grpo.temperature = 1.0
    config.grpo.eta = 1.5
    config.grpo.kl_weight = 0.05
    config.grpo.kl_steps = 100
    config.grpo.checkpoint_every = 10
    config.grpo.answers = 0

    config.export.scorer = f"runs/grpo_{run}"

    config.eval.budgets = (1024, 2048)
    config.eval.traces = 16
    config.eval.batch = 1
    config.eval.policies = RULES

    config.evaluate.scorers = (f"supervised=runs/sft_{run}", f"grpo=runs/grpo_{run}")
    config.evaluate.action = "sample"
    config.evaluate.action_temperature = 1.0
    config.evaluate.policies = ("full", *RULES)
    config.evaluate.budgets = (1024, 2048, 4096)
    config.evaluate.benchmark = "aime24"
    config.evaluate.problems = 0
    config.evaluate.samples = 32
    config.evaluate.new_tokens = 32_768
    config.evaluate.batch = 32
    config.evaluate.traces = 0
    config.pipeline.changes.evaluate = ConfigDict()

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
    config.benchmark.peer_prompt = 1024
    config.benchmark.peer_tokens = 1024
    config.generate.policy = "rkv"
    config.generate.new_tokens = 4096
    config.generate.chat = True
    return tiny.locked(config)
