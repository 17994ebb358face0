"""The jobs that `launch` starts, each a function of (config, workdir); callable from a notebook."""

_MODEL = (
    "seed", "model", "revision", "dtype", "cache_dtype", "model_axis", "budget",
    "interval", "protect_prompt", "task",
)  # fmt: skip
# Fields, and groups of fields, that each job reads. The pipeline's stages read their own.
READS = {
    "pretrain": ("seed", "budget", "interval", "task", "pretrain"),
    "traces": (*_MODEL, "traces"),
    "sft": (*_MODEL, "data", "scorer", "sft", "eval", "grpo.high_fraction"),
    "grpo": (*_MODEL, "data", "scorer", "grpo", "eval", "evaluate"),
    "evaluate": (*_MODEL, "data", "eval", "evaluate", "grpo.high_fraction"),
    "recall": (
        *_MODEL,
        "data",
        "eval.baseline",
        "evaluate",
        "recall",
        "traces.text",
        "traces.text_column",
        "traces.held_out",
        "traces.dev",
    ),
    "leaderboard": (
        *_MODEL,
        "data",
        "eval",
        "evaluate",
        "leaderboard",
    ),
    "advise": (
        *_MODEL,
        "data",
        "eval.batch",
        "evaluate.scorers",
        "evaluate.any_interval",
        "evaluate.action",
        "evaluate.action_temperature",
        "advise",
    ),
    "harness": (
        *(name for name in _MODEL if name != "task"),
        "evaluate.scorers",
        "evaluate.any_interval",
        "evaluate.action",
        "evaluate.action_temperature",
        "evaluate.policies",
        "evaluate.budgets",
        "harness",
    ),
    "generate": (*_MODEL, "generate"),
    "serve": (*(name for name in _MODEL if name not in ("seed", "task")), "serve"),
    "export": ("model", "revision", "export"),
    "benchmark": (*_MODEL, "scorer", "benchmark"),
    "pipeline": ("pipeline.stages",),
}
