"""Pretraining of the embedded reasoner: next-token loss on the chain of thought."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fkv import kinds, models
from fkv.cache import attention
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.kinds import setting
from fkv.learning import fit
from fkv.models import LM
from fkv.tasks import ledger


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the curriculum: `steps` on problems of these sizes."""

    steps: int
    batch: int
    spec: ledger.Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(fit.Fit):
    """The pretraining.

    Attributes:
      qk_gain: initial gain of the QK-norm, see `models.init`.
      learning_rate, warmup, cycles: of AdamW; each of `cycles` counts the steps of a linear
        warm-up and the cosine decay after it, to a fiftieth of the rate.
      clip: of the gradient's global norm.
      weight_decay: decoupled from the gradient.
      eval_problems, eval_batch, temperature: of the final evaluation.
      stages: the curriculum.
      config: of the reasoner.
    """

    group: ClassVar[str] = "pretrain"
    qk_gain: float = setting(kinds.POSITIVE)
    learning_rate: float = setting(kinds.POSITIVE)
    clip: float = setting(kinds.POSITIVE)
    warmup: int = setting(kinds.whole(0))
    cycles: tuple[int, ...] = setting(kinds.SIZES)
    weight_decay: float = setting(kinds.number(0))
    eval_problems: int = setting(kinds.whole(1))
    eval_batch: int = setting(kinds.whole(1))
    temperature: float = setting(kinds.number(0))
    stages: tuple[Stage, ...]
    config: models.ModelConfig

    def __post_init__(self):
        super().__post_init__()
        longest = max(stage.spec.max_tokens() for stage in self.stages)
        if longest > self.config.max_positions:
            raise UserError(
                f"pretrain.model.max_positions = {self.config.max_positions}, but problems can "
                f"have {longest} tokens"
            )
        if sum(self.cycles) != self.steps or min(self.cycles) <= self.warmup:
            raise UserError(
                f"pretrain.cycles = {self.cycles} must add up to the {self.steps} steps of the "
                f"stages, each longer than warmup = {self.warmup}"
            )

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> int:
        """Index of the stage of a step."""
        ends = np.cumsum([stage.steps for stage in self.stages])
        return int(np.searchsorted(ends, step, side="right"))

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """AdamW after clipping."""
        rate = self.learning_rate
        cosines = [
            optax.warmup_cosine_decay_schedule(0.0, rate, self.warmup, steps, 0.02 * rate)
            for steps in self.cycles
        ]
        schedule = optax.join_schedules(cosines, np.cumsum(self.cycles[:-1]).tolist())
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(schedule, b2=0.98, weight_decay=self.weight_decay),
        )


def logits(lm: LM, batch: Batch) -> Array:
    """Full-cache logits [b, t, v] of right-padded rows; attention is one block of T x T."""
    position = batch.position_bt

    def layer(hidden, weights):
        q, k, v = models.project(lm.config, weights, hidden, position)
        k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
        out, _ = attention.attend(q, k, v, attention.visible(position, position[:, None]))
        return models.finish(lm.config, weights, hidden, out), None

    # Unrolled: on a CPU a third faster than a loop over three small layers.
    inputs = models.embed(lm, batch.token_bt), lm.params["layers"]
    hidden, _ = jax.lax.scan(layer, *inputs, unroll=True)
    return models.unembed(lm, hidden)


def loss(params: models.Params, config: models.ModelConfig, batch: Batch) -> tuple[Array, Array]:
    """Mean negative log-likelihood of the tokens after the prompt, in nats, and accuracy."""
    x = logits(LM(params, config), batch)[:, :-1]
    target, weight = batch.token_bt[:, 1:], batch.counted_bt()
    nll = optax.softmax_cross_entropy_with_integer_labels(x, target)
    hit = x.argmax(-1) == target
    return (nll * weight).sum() / weight.sum(), (hit * weight).sum() / weight.sum()


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def train_step(plan: Plan, state: dict, batch: Batch) -> tuple[dict, dict]:
    """One update.

    Args:
      state: `params` of the reasoner and the optimiser's `opt_state`.

    Returns:
      The new state, and loss and token accuracy.
    """
    (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(
        state["params"], plan.config, batch
    )
    updates, opt_state = plan.optimiser.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state}, {"loss": value, "accuracy": accuracy}
