"""ForesightKV: the trained scorers choose."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import scorer
from fkv.errors import UserError
from fkv.policies.base import Policy, View, register, row_by_row

ACTIONS = ("top", "sample", "multinomial")


@register("foresight")
@flax.struct.dataclass
class Foresight(Policy):
    """Drops the candidates to which the scorers give the least importance (arXiv 2602.03203).

    Attributes:
      params: scorer parameters of all layers, stacked.
      config: what the scorers are made of.
      action: `top` drops the `L` least important; `sample`, as in the paper, draws them without
        replacement from the `2L` least important, with probability
        softmax(-importance / temperature); `multinomial` draws from all candidates.
      temperature: of the draw.
    """

    params: dict
    config: scorer.ScorerConfig = flax.struct.field(pytree_node=False)
    action: str = flax.struct.field(pytree_node=False, default="top")
    temperature: float = flax.struct.field(pytree_node=False, default=1.0)

    def __post_init__(self):
        if self.action not in ACTIONS:
            raise UserError(f"action = {self.action!r} must be one of {', '.join(ACTIONS)}")
        if not self.temperature > 0:
            raise UserError(f"temperature = {self.temperature} must be above 0")

    @property
    def statistics(self) -> str | None:
        return self.config.statistics

    def score(self, view: View) -> Array:
        def one(view):
            return scorer.apply(self.config, self.params, scorer.features(self.config, view))

        importance = row_by_row(one, view)
        if self.action != "top":
            pool = 2 * view.interval if self.action == "sample" else importance.shape[-1]
            importance = perturb(importance / self.temperature, view, pool)
        return jnp.pad(importance, ((0, 0), (0, 0), (0, view.interval)))


def perturb(importance_bkn: Array, view: View, pool: int) -> Array:
    """Importances whose `L` lowest are a sample of the `pool` lowest (Gumbel top-k)."""
    held = view.cache.position_bks[..., : view.capacity] >= 0
    score = jnp.where(held, -importance_bkn, -jnp.inf)  # for eviction
    border = jax.lax.top_k(score, min(pool, score.shape[-1]))[0][..., -1:]
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, score.shape[1:]))(view.random_b)
    return jnp.where(score >= border, -(score + gumbel), jnp.inf)
