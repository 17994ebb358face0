"""Plans of the stages with what a test does not care about filled in."""

from fkv.cache.cadence import Cadence
from fkv.learning import grpo, sft

CADENCE, LOSS = Cadence(16, 8), sft.LossConfig()


def sft_plan(rules, loss=LOSS, **changes):
    """A supervised plan; `changes` are its other fields."""
    fields = dict(steps=100, batch=1, at_once=0, learning_rate=1e-2, warmup=0, clip=1.0)
    fields |= dict(log_every=1, checkpoint_every=1)
    return sft.Plan(cadence=CADENCE, scorer=rules, loss=loss, **(fields | changes))


def grpo_plan(rules, settings, **changes):
    """A reinforcement plan, likewise."""
    fields = dict(steps=100, traces=2, traces_at_once=0, learning_rate=1e-2, warmup=0)
    fields |= dict(clip_norm=1.0, log_every=1, checkpoint_every=1)
    return grpo.Plan(cadence=CADENCE, scorer=rules, grpo=settings, **(fields | changes))
