"""The paper's ablations on the embedded reasoner, three seeds each.

python -m launch.sweep --config=tiny_ablations   an hour and a half on two CPU cores

Supervised stage: inputs and hidden size of the scorers. Reinforcement stage: the main recipe, and
every reward with a fifth of its rollouts. All are evaluated by loss and by answers, the main recipe
also under the three actions. The summary has means over seeds per group, policy and budget.

In the supervised stage a seed is that of the scorers' initial parameters: all learn from the same
traces in the same order, so one job trains the fifteen of them from one golden pass. Elsewhere it
is that of all random numbers: problems, their order, rollouts and answers.
"""

from configs import tiny
from fkv.runs.sweep import Point, grid

SEEDS = (0, 1, 2)
SCORERS = {
    "both16": {},
    "attention16": {"scorer.inputs": "attention"},
    "kv16": {"scorer.inputs": "kv"},
    "both4": {"scorer.hidden": 4},
    "both64": {"scorer.hidden": 64},
}
REWARDS = ("all", "low", "high", "low_large", "low_large_squared")
TIGHT = 48


def get_config():
    """The recipe `tiny` without the baselines, which do not depend on the seed."""
    config = tiny.get_config()
    config.eval.policies = ()
    config.grpo.answers = 0  # the sweep has points for them
    config.evaluate.policies = ("full",)
    config.evaluate.budgets = (TIGHT, 64)
    config.evaluate.traces = 0
    return config


def sweep():
    """The points, most important first."""
    for seed in SEEDS:
        yield Point("sft", f"sft_both16_{seed}", {"sft.scorer_seed": seed}, "sft_both16")
        yield Point("grpo", f"grpo_{seed}", _grpo(seed), "grpo")
        scorers = (f"supervised={{sweep}}/sft_both16_{seed}", f"grpo={{sweep}}/grpo_{seed}")
        values = {"seed": seed, "evaluate.scorers": scorers}
        yield Point("evaluate", f"answers_{seed}", values, "answers")
    for action in ("sample", "multinomial"):
        for seed in SEEDS:
            values = {
                "seed": seed,
                "evaluate.scorers": (f"grpo={{sweep}}/grpo_{seed}",),
                "evaluate.action": action,
                "evaluate.policies": (),
            }
            yield Point("evaluate", f"answers_{action}_{seed}", values, f"answers_{action}")

    for name, values in SCORERS.items():
        for seed in SEEDS:
            if values:
                point = f"sft_{name}_{seed}"
                yield Point("sft", point, {"sft.scorer_seed": seed, **values}, f"sft_{name}")
    for row in grid(reward=REWARDS, seed=SEEDS):
        reward, seed = row["reward"], row["seed"]
        short = {"grpo.steps": 40, "grpo.rollouts": 8, "grpo.reward": reward}
        yield Point("grpo", f"{reward}_{seed}", {**_grpo(seed), **short}, f"reward_{reward}")
    for seed in SEEDS:
        scorers = [f"{name}={{sweep}}/sft_{name}_{seed}" for name in SCORERS if name != "both16"]
        scorers += [f"{reward}={{sweep}}/{reward}_{seed}" for reward in REWARDS]
        values = {
            "seed": seed,
            "evaluate.scorers": tuple(scorers),
            "evaluate.policies": (),
            "evaluate.budgets": (TIGHT,),
        }
        yield Point("evaluate", f"answers_ablations_{seed}", values, "answers")


def _grpo(seed):
    return {"seed": seed, "budget": TIGHT, "grpo.scorer": f"{{sweep}}/sft_both16_{seed}"}
