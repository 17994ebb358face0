"""No eviction."""

import flax.struct

from fkv.policies.base import Policy, View, register


@register("full")
@flax.struct.dataclass
class Full(Policy):
    """Keeps everything: the engine runs the full cache."""

    evicts = False

    def score(self, view: View):
        raise AssertionError("the full cache is never scored")
