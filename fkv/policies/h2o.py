"""H2O: heavy hitters, by the total attention an entry has received."""

from jax import Array

from fkv.policies.base import Policy, View, register


@register("h2o")
class H2O(Policy):
    """Keeps entries with large cumulative attention, mean over the group (arXiv 2306.14048)."""

    statistics = "sums"

    def score(self, view: View) -> Array:
        return view.cumulative_bksg.mean(-1)
