"""The policies, and random weights for those that need some."""

import numpy as np

from fkv import policies

WEIGHTED = "kvzap", "kvzap, linear", "triattention", "trimkv", "trimkv, rg2", "trimkv, rg3"
# Made by a name alone.
BY_NAME = sorted(
    set(policies.names())
    - {"full", "forced", "foresight", "uneven"}
    - {name.split(",")[0] for name in WEIGHTED}
)


def weighted(name, config, seed=0, hidden=5):
    """A policy of `WEIGHTED` for a model of this config."""
    y, k, h, d, m = config.layers, config.kv_heads, config.heads, config.head_dim, config.width
    rng = np.random.default_rng(seed)
    name, _, form = name.partition(", ")

    def draw(*shape):
        return (rng.normal(size=(y, *shape)) * 2 / shape[0] ** 0.5).astype(np.float32)

    if name == "triattention":
        mean = draw(h, d)
        norm = np.hypot(*np.split(mean, 2, axis=-1)) * rng.uniform(1, 2, size=(y, h, d // 2))
        return policies.TriAttention({"mean": mean, "norm": norm.astype(np.float32)})
    if name == "kvzap":
        if form == "linear":
            return policies.KVzap({"w1": draw(m, k), "b1": draw(k)})
        params = {"w1": draw(m, hidden), "b1": draw(hidden), "w2": draw(hidden, k), "b2": draw(k)}
        return policies.KVzap(params)
    inputs = 2 * k * d if form else m
    params = {"w1": draw(inputs, hidden), "b1": draw(hidden), "w2": draw(hidden, k)}
    if form == "rg3":
        params = {"gate": draw(inputs, hidden), "up": draw(inputs, hidden), "down": draw(hidden, k)}
    return policies.TrimKV(params | {"b2": 3 + draw(k)}, form or "rg")
