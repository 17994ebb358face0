"""Leaderboards: every policy that runs without weights of its own, and trained scorers.

python -m launch.leaderboard --config=configs/leaderboard.py:embedded   the embedded reasoner:
                              answers and losses, with the scorers in runs/sft_tiny
python -m launch.leaderboard --config=configs/leaderboard.py:pip        SmolLM2-135M-Instruct on
                              real text: losses, with the scorers in runs/sft_smollm2_pip

The scorers and the traces are made by launch.sft and launch.traces with `tiny` and
`configs/smollm2.py:pip`. KVzap and TRIM-KV join where weights are given:
--config.evaluate.scorers="('foresight=runs/sft_smollm2_pip', 'kvzap=DIR')"
"""

from ml_collections import ConfigDict

from configs import smollm2, tiny
from fkv.errors import UserError

POLICIES = (
    "full", "random", "random:sinks=4", "streaming_llm", "tova", "h2o", "snapkv", "rkv", "knorm",
    "keydiff", "expected_attention", "lagkv", "vase", "vase_dkv", "ada(snapkv)", "ada(h2o)",
    "pyramid(snapkv)", "threshold(snapkv):at=0.001",
)  # fmt: skip


def get_config(arg: str = "embedded") -> ConfigDict:
    """The recipe; see `configs.base` for what the fields mean.

    Args:
      arg: `embedded` or `pip`.

    Raises:
      UserError: another argument.
    """
    if arg == "embedded":
        config = tiny.get_config()
        config.evaluate.policies = (*POLICIES, tiny.TUNED_RKV, "prompt(random:sinks=4)")
        config.evaluate.budgets = (48, 64, 96, 128)
        config.evaluate.problems = 256
    elif arg == "pip":
        config = smollm2.get_config("pip")
        config.evaluate.policies = POLICIES
        config.evaluate.scorers = ("foresight=runs/sft_smollm2_pip",)
    else:
        raise UserError(f"--config=configs/leaderboard.py:{arg}: use :embedded or :pip")
    return config
