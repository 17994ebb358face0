"""ForesightKV: eviction by trained scorers."""

import dataclasses
import os

import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence, said_budget
from fkv.errors import UserError
from fkv.models import ModelConfig
from fkv.policies import scorer
from fkv.policies.base import Policy, View, name_of, register, row_by_row, setting

ACTIONS = ("top", "sample", "multinomial")


@dataclasses.dataclass(frozen=True)
class Trained:
    """The origin of scorers and what they were trained for; empty or 0 where unknown.

    All records compare equal, so that scorers of one shape share compiled programs.

    Attributes:
      source: the directory or hub id they were loaded from.
      model, revision: of the language model.
      budget, interval, protect_prompt: of `Cadence`, in training.
    """

    source: str = dataclasses.field(default="", compare=False)
    model: str = dataclasses.field(default="", compare=False)
    revision: str = dataclasses.field(default="", compare=False)
    budget: int = dataclasses.field(default=0, compare=False)
    interval: int = dataclasses.field(default=0, compare=False)
    protect_prompt: int = dataclasses.field(default=0, compare=False)

    def __post_init__(self):
        kinds.check_fields("", self, source=kinds.TEXT, model=kinds.TEXT, revision=kinds.TEXT)
        size = kinds.whole(0)
        kinds.check_fields("", self, budget=size, interval=size, protect_prompt=size)

    def __repr__(self) -> str:
        known = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return f"Trained({', '.join(f'{name}={value!r}' for name, value in known if value)})"

    def at(self, interval: int) -> str:
        """The budget in training, and its interval if it differs, as tables show it."""
        budget = said_budget(self.budget, self.protect_prompt)
        if self.budget and self.interval not in (0, interval):
            return f"{budget}, L = {self.interval}"
        return budget

    def other_model(self, model: str, revision: str | None) -> str:
        """A warning that names both models if they differ; else empty."""
        ours, theirs = _place(self.model, self.revision), _place(model, revision)
        if not self.model or ours == theirs:
            return ""
        return f"{self.source or 'these scorers'}: trained for model {ours}, and used with {theirs}"


def _place(model: str, revision: str | None) -> str:
    """A model and its revision; a directory or file has none."""
    path = os.path.expanduser(model)
    if os.path.exists(path):
        return os.path.realpath(path)
    return model if revision in (None, "", "main") else f"{model}@{revision}"


def _is_a(cls: type) -> kinds.Kind:
    return kinds.Kind(f"a {cls.__name__}", lambda value: isinstance(value, cls))


TRAINED = _is_a(Trained)


@register("foresight")
class Foresight(Policy):
    """Drops the candidates that the scorers find least important (arXiv 2602.03203).

    Attributes:
      params: scorer parameters of all layers, stacked.
      config: architecture and features of the scorers.
      action: `top` drops the `L` least important; `sample`, as in the paper, draws them without
        replacement from the `2L` least important, with probability
        softmax(-importance / temperature); `multinomial` draws from all candidates.
      temperature: of the draw.
      trained: what the scorers were trained for.
      any_interval: allows an interval other than that in training.
    """

    params: dict
    config: scorer.ScorerConfig = setting(_is_a(scorer.ScorerConfig))
    action: str = setting(kinds.one_of(ACTIONS), "top")
    temperature: float = setting(kinds.number(0, above=True), 1.0)
    trained: Trained = setting(TRAINED, Trained())
    any_interval: bool = setting(kinds.SWITCH, False)

    statistics = property(lambda self: self.config.statistics)

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        """Refuses scorers of another shape or interval, and numbers that are not finite."""
        where = self.trained.source or name_of(self)
        scorer.check_params(f"{where}: params", self.params, self.config.hidden)
        ours, theirs = (
            f"{layers} layers x {heads} KV heads with {size} features"
            for layers, heads, size in (
                self.params["w1"].shape[:3],
                scorer.shapes(config, self.config)["w1"][:3],
            )
        )
        if ours != theirs:
            raise UserError(
                f"{where}: scorers of {ours} don't fit a model of {theirs} "
                f"(scorer.inputs = {self.config.inputs!r})"
            )
        super().check(config, cadence)
        if self.action == "sample":
            cadence.check_protected(2)
        trained, interval = self.trained.interval, cadence.interval
        if trained and trained != interval and not self.any_interval:  # the budget may differ
            raise UserError(
                f"{where}: trained at interval = {trained}, not {interval}: set interval to "
                f"{trained}, or any_interval to True (of load_scorer, evaluate or generate)"
            )

    def score(self, view: View) -> Array:
        def one(view):
            return scorer.apply(self.config, self.params, scorer.features(self.config, view))

        heads, features = self.params["w1"].shape[-3:-1]
        importance = row_by_row(one, view, 4 * heads * view.capacity * features)
        if self.action != "top":
            pool = 2 * view.interval if self.action == "sample" else importance.shape[-1]
            importance = perturb(importance / self.temperature, view, pool)
        return jnp.pad(importance, ((0, 0), (0, 0), (0, view.interval)))

    def pool(self, importance_bkn: Array, view: View) -> Array:
        """The pool [b, k, 2L] that `sample` draws from, from the importances of the candidates.

        The slots that `evict` drops come first, in the order of the draw.
        """
        drawn = perturb(importance_bkn / self.temperature, view, 2 * view.interval)
        newest = ((0, 0), (0, 0), (0, view.interval))
        drawn = jnp.pad(drawn, newest, constant_values=jnp.inf)
        return kv.choose(drawn, view.cache.position_bks, 2 * view.interval)


def perturb(importance_bkn: Array, view: View, pool: int) -> Array:
    """Perturbed importances, whose `L` lowest sample the `pool` lowest (Gumbel top-k)."""
    score = jnp.where(view.candidate_bkn, -importance_bkn, -jnp.inf)  # an eviction score
    border = jax.lax.top_k(score, min(pool, score.shape[-1]))[0][..., -1:]
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, score.shape[1:]))(view.random_b)
    return jnp.where(score >= border, -(score + gumbel), jnp.inf)
