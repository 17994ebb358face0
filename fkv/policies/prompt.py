"""The prompt stays, whatever policy chooses among the rest."""

import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.policies import base
from fkv.policies.base import Policy, View, defines, register, setting
from fkv.policies.wrapper import Wrapper


@register("prompt")
class Prompt(Wrapper):
    """Never evicts the first `tokens` of a prompt; `policy` chooses among the rest.

    For one policy of a table: `Cadence.protect_prompt` does so for all of them, and for golden
    eviction.

    Attributes:
      tokens: at most; 0 for half of the budget.
      on_top: whether they come on top of the budget: a head then keeps `B + min(prompt, tokens)`
        entries, and memory is allocated for `B + tokens`. Otherwise they are part of the budget.
    """

    tokens: int = setting(kinds.whole(0), 0)
    on_top: bool = setting(kinds.SWITCH, False)

    around = "a policy that evicts, and not another prompt"

    def fits(self, policy: Policy) -> bool:
        own = isinstance(policy, Policy) and (isinstance(policy, Prompt) or defines(policy, "drop"))
        return isinstance(policy, Policy) and policy.evicts and not own

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        super().check(config, cadence)
        if not self.on_top:  # with what is left of the budget
            kept = max(self._number(cadence.budget), cadence.protect_prompt)
            inside = Cadence(cadence.budget, cadence.interval, kept)
            base.check(self.policy, config, inside)

    def limits(self, config: ModelConfig, cadence: Cadence) -> dict[str, float]:
        return {} if self.on_top else {"tokens": cadence.budget - cadence.interval}

    def _number(self, budget: int) -> int:
        return self.tokens or budget // 2

    def _seen(self, view: View) -> View:
        kept = max(self._number(view.budget), view.protect_prompt)
        return view.replace(protect_prompt=kept)

    def score(self, view: View) -> Array:
        return self.policy.score(self._seen(view))

    def importance(self, view: View) -> Array:
        return self.policy.importance(self._seen(view))

    def evict(self, view: View) -> Array:
        return self.policy.evict(self._seen(view))

    def capacity(self, budget: int) -> int:
        return self.policy.capacity(budget) + (self._number(budget) if self.on_top else 0)

    def keep(self, view: View, importance_bks: Array) -> Array:
        keep = self.policy.keep(self._seen(view), importance_bks)
        if not self.on_top:
            return keep
        return keep + jnp.minimum(view.prompt_b, self._number(view.budget))[:, None]
