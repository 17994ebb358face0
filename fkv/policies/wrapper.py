"""Wrappers share the budget unevenly over layers or heads, whatever policy scores the entries."""

from jax import Array

from fkv import kinds
from fkv.policies.base import Policy, View, defines, name_of
from fkv.policies.snapkv import SnapKV


class Wrapper(Policy):
    """Scores as `policy` does; subclasses define by `capacity` and `keep` how many entries stay."""

    policy: Policy = SnapKV()

    around = (
        "a policy that scores each head by itself and shares the budget evenly "
        "(only ada wraps pyramid)"
    )

    def __post_init__(self):
        super().__post_init__()
        kind = kinds.Kind(self.around, self.fits)
        kinds.check(f"{name_of(self)}: policy", self.policy, kind)

    def fits(self, policy: Policy) -> bool:
        """Whether this can wrap the policy."""
        chooses = isinstance(policy, Policy) and defines(policy, "evict", "drop", "keep")
        return isinstance(policy, Policy) and policy.evicts and not chooses

    statistics = property(lambda self: self.policy.statistics)
    arrive = property(lambda self: self.policy.arrive)
    trained = property(lambda self: self.policy.trained)
    all_queries = property(lambda self: self.policy.all_queries)

    def score(self, view: View) -> Array:
        return self.policy.score(view)

    def protected(self, view: View) -> int:
        return self.policy.protected(view)

    def importance(self, view: View) -> Array:
        return self.policy.importance(view)
