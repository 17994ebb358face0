"""No eviction."""

from fkv.policies.base import Policy, register


@register("full")
class Full(Policy):
    """Keeps everything: the engine runs the full cache."""

    evicts = False
