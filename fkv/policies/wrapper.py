"""Wrappers share the budget unevenly over layers or heads, whatever policy scores the entries."""

import flax.struct
from jax import Array

from fkv import kinds
from fkv.policies.base import Policy, View, defines, name_of
from fkv.policies.snapkv import SnapKV


@flax.struct.dataclass
class Wrapper(Policy):
    """Scores as `policy` does; a subclass says by `capacity` and `keep` how many entries stay.

    As text: `ada(h2o)`, or `ada(rkv:mix=0.05):room=1.5` with fields of both.
    """

    policy: Policy = SnapKV()

    def __post_init__(self):
        even = "a policy that scores each head by itself and shares the budget evenly"
        kind = kinds.Kind(f"{even} (only ada goes around pyramid)", self.fits)
        kinds.check(f"{name_of(self)}: policy", self.policy, kind)

    def fits(self, policy: Policy) -> bool:
        """Whether it goes around this policy."""
        return (
            isinstance(policy, Policy)
            and policy.evicts
            and not defines(policy, "evict", "drop", "keep")
        )

    @property
    def statistics(self) -> str | None:
        return self.policy.statistics

    @property
    def trained(self):
        return self.policy.trained

    def score(self, view: View) -> Array:
        return self.policy.score(view)

    def protected(self, view: View) -> int:
        return self.policy.protected(view)

    def importance(self, view: View) -> Array:
        return self.policy.importance(view)
