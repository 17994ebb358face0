"""ForesightKV: the trained scorers choose."""

import dataclasses
import os

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.models import ModelConfig
from fkv.policies import scorer
from fkv.policies.base import Policy, View, name_of, register, row_by_row

ACTIONS = ("top", "sample", "multinomial")


@dataclasses.dataclass(frozen=True)
class Trained:
    """Where scorers are from and what they were trained for; empty or 0 where that is not known.

    All records are equal, so that programs compiled for scorers of one shape serve all of them.

    Attributes:
      source: the directory or hub id that they were loaded from.
      model, revision: of the language model.
      budget, interval: B and L of the training.
    """

    source: str = dataclasses.field(default="", compare=False)
    model: str = dataclasses.field(default="", compare=False)
    revision: str = dataclasses.field(default="", compare=False)
    budget: int = dataclasses.field(default=0, compare=False)
    interval: int = dataclasses.field(default=0, compare=False)

    def __post_init__(self):
        kinds.check_fields("", self, source=kinds.TEXT, model=kinds.TEXT, revision=kinds.TEXT)
        kinds.check_fields("", self, budget=kinds.whole(0), interval=kinds.whole(0))

    def at(self, interval: int) -> str:
        """At which budget, and interval where it is another, as tables say it."""
        other = self.interval and self.interval != interval
        if not self.budget:
            return ""
        return f"{self.budget}, L = {self.interval}" if other else str(self.budget)

    def other_model(self, model: str, revision: str | None) -> str:
        """A warning that names both, where the model to run is another; else empty."""
        if not self.model:
            return ""
        ours, theirs = (_place(self.model, self.revision), _place(model, revision))
        if ours == theirs:
            return ""
        return (
            f"{self.source or 'these scorers'}: trained for model {_said(*ours)}, and used with "
            f"{_said(*theirs)}"
        )


def _place(model: str, revision: str | None) -> tuple[str, str]:
    """A model and its revision; a directory has none."""
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return os.path.realpath(path), ""
    return model, "" if revision in (None, "main") else revision


def _said(model: str, revision: str) -> str:
    return f"{model}@{revision}" if revision else model


_CONFIG = kinds.Kind("a ScorerConfig", lambda value: isinstance(value, scorer.ScorerConfig))
_TRAINED = kinds.Kind("a Trained", lambda value: isinstance(value, Trained))


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
      trained: what the scorers were trained for.
      any_interval: lets them run at another interval than that of their training.
    """

    params: dict
    config: scorer.ScorerConfig = flax.struct.field(pytree_node=False)
    action: str = flax.struct.field(pytree_node=False, default="top")
    temperature: float = flax.struct.field(pytree_node=False, default=1.0)
    trained: Trained = flax.struct.field(pytree_node=False, default=Trained())
    any_interval: bool = flax.struct.field(pytree_node=False, default=False)

    def __post_init__(self):
        kinds.check_fields(
            f"{name_of(self)}: ",
            self,
            config=_CONFIG,
            action=kinds.one_of(ACTIONS),
            temperature=kinds.number(0, above=True),
            trained=_TRAINED,
            any_interval=kinds.SWITCH,
        )

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        """Refuses scorers of another shape or interval, or of numbers that are not finite."""
        where = self.trained.source or name_of(self)
        scorer.check_params(f"{where}: params", self.params, self.config.hidden)
        layers, heads, size, _ = self.params["w1"].shape
        theirs = (config.layers, config.kv_heads, scorer.feature_size(config, self.config))
        if (layers, heads, size) != theirs:
            raise UserError(
                f"{where}: scorers of {layers} layers x {heads} KV heads with {size} features "
                f"don't fit a model of {theirs[0]} layers x {theirs[1]} KV heads with {theirs[2]} "
                f"features (scorer.inputs = {self.config.inputs!r})"
            )
        super().check(config, cadence)
        trained, interval = self.trained.interval, cadence.interval
        if trained and trained != interval and not self.any_interval:  # another budget is normal
            raise UserError(
                f"{where}: trained at interval = {trained}, not {interval}: set interval to "
                f"{trained}, or any_interval to True (of load_scorer, evaluate or generate) to use "
                "them all the same"
            )

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
