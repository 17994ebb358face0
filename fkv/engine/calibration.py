"""Statistics of a model on text, which some policies need before they run."""

import jax
import jax.numpy as jnp
from jax import Array

from fkv import models
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.models import LM
from fkv.policies import triattention


@jax.jit
def query_statistics(lm: LM, batch: Batch) -> dict[str, Array]:
    """`triattention.statistics` of all layers [y, ...], over all tokens of a batch.

    The queries are those of a pass with the full cache, before their rotation.
    """
    position, config = batch.position_bt, lm.config

    def layer(hidden, weights):
        _, q, k, v = models.unrotated(config, weights, hidden)
        found = triattention.statistics(q, (position >= 0).astype(jnp.float32))
        rotated = (models.rotate(x, position, config) for x in (q, k))
        out, _, _ = replay.full_pass(config, (*rotated, v), position)
        return models.finish(config, weights, hidden, out), found

    return jax.lax.scan(layer, models.embed(lm, batch.token_bt), models.stacked(lm))[1]
