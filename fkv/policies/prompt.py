"""The prompt stays, whatever policy chooses among the rest."""

import dataclasses

from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.policies import base
from fkv.policies.base import Policy, View, register, setting
from fkv.policies.wrapper import Wrapper


@register("prompt")
class Prompt(Wrapper):
    """Never evicts the first `tokens` of a prompt; `policy` chooses among the rest.

    They are part of the budget. For one policy of a table; `Cadence.protect_prompt` protects the
    prompt from all of them, and from golden eviction.

    Attributes:
      tokens: at most; 0 for half of the budget.
    """

    tokens: int = setting(kinds.whole(0), 0)

    around = "a policy that evicts, and not another prompt"

    def fits(self, policy: Policy) -> bool:
        return isinstance(policy, Policy) and policy.evicts and not isinstance(policy, Prompt)

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        super().check(config, cadence)
        base.check(self.policy, config, self._protecting(cadence))

    def limits(self, config: ModelConfig, cadence: Cadence) -> dict[str, float]:
        return {"tokens": cadence.budget - cadence.interval}

    def _protecting(self, cadence: Cadence) -> Cadence:
        tokens = max(self.tokens or cadence.budget // 2, cadence.protect_prompt)
        return dataclasses.replace(cadence, protect_prompt=tokens)

    def _seen(self, view: View) -> View:
        return view.replace(cadence=self._protecting(view.cadence))

    def score(self, view: View) -> Array:
        return self.policy.score(self._seen(view))

    def importance(self, view: View) -> Array:
        return self.policy.importance(self._seen(view))

    def evict(self, view: View) -> Array:
        return self.policy.evict(self._seen(view))

    def capacity(self, budget: int) -> int:
        return self.policy.capacity(budget)

    def keep(self, view: View, importance_bks: Array) -> Array:
        return self.policy.keep(self._seen(view), importance_bks)

    def drop(self, view: View) -> Array:
        return self.policy.drop(self._seen(view))
