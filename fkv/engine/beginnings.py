"""Beginnings that several replays of the same traces share, such as rollouts or several policies.

Nothing is evicted before `B + L` tokens are held, so up to there all replays are equal: that part
is computed once per trace, not once per row.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import models
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.engine.replay import Chooser, Observer, Site, Staged
from fkv.keys import Purpose, key_of
from fkv.models import LM
from fkv.policies import base
from fkv.policies.base import Policy


@flax.struct.dataclass
class Begun:
    """The part of a replay before an eviction: before the first it does not depend on the policy.

    Attributes:
      hidden_btm: hidden states after the last layer, of these tokens.
      staged_y: all layers before that eviction, [layers, ...].
      cadence: of the evictions.
    """

    hidden_btm: Array
    staged_y: Staged
    cadence: Cadence = flax.struct.field(pytree_node=False)

    tokens = property(lambda self: self.hidden_btm.shape[1])


def begin(lm: LM, batch: Batch, policy: Policy, cadence: Cadence) -> Begun:
    """The part of a replay before the first eviction, for `replay_from`.

    It holds a cache of `B + L` tokens of every layer and trace.

    Args:
      policy: any of the same capacity and statistics as those that go on; see
        `policies.base.common_statistics` for those of several. One that defines `arrive` goes on
        itself.
    """
    base.check(policy, lm.config, cadence)
    first = replay.beginning(policy, cadence, batch.token_bt.shape[1])
    position = batch.position_bt[:, :first]

    def layer(hidden, inputs):
        index, weights, layer_policy = inputs
        qkv = replay.project(layer_policy, lm.config, index, weights, hidden, position)
        out, staged = replay.begin_layer(policy, lm.config, cadence, qkv, position)
        return models.finish(lm.config, weights, hidden, out), staged

    hidden = models.embed(lm, batch.token_bt[:, :first])
    inputs = (jnp.arange(lm.config.layers), models.stacked(lm), policy)
    hidden, staged = jax.lax.scan(layer, hidden, inputs)
    return Begun(hidden, staged, cadence)


def go_on(lm: LM, batch: Batch, begun: Begun, policy: Policy, key_b: Array | None = None) -> Begun:
    """A longer beginning, which ends before the eviction after the last token of the batch.

    Several continuations of the same context share it: the policy's evictions up to there do not
    depend on what comes.

    Args:
      batch: the traces of `begun`, of a multiple of `L` tokens each, padding included.
      policy: the one that goes on from here, too.
      key_b: see `replay`.
    """
    if batch.token_bt.shape[1] % begun.cadence.interval:
        raise ValueError(f"{batch.token_bt.shape[1]} tokens are no whole number of intervals")
    if batch.token_bt.shape[1] == begun.tokens:
        return begun
    hidden, staged, _ = _rest(lm, batch, begun, policy, key_b)
    return Begun(jnp.concatenate([begun.hidden_btm, hidden], axis=1), staged, begun.cadence)


def replay_from(
    lm: LM,
    batch: Batch,
    begun: Begun,
    policy: Policy,
    key_b: Array | None = None,
    observe: Observer | Chooser = replay.ignore,
    acc: Any = (),
) -> tuple[Array, Any, Any]:
    """The rest of a replay, of one or more rows per trace.

    The beginning of a trace is repeated for its rows one layer at a time.

    Args:
      batch: the rows: the traces of `begun` in their order, each as often as the others, its rows
        adjacent.
      begun: from `begin`, with another policy of the same capacity, or from `go_on` with this one.
        Statistics that it has and this one does not need are dropped.
      key_b, observe, acc: see `replay`.

    Returns:
      As `replay`, but hidden states [b, 1 + t - n, m] only from the last of the `begun.tokens` = n
      first tokens on: the earlier ones are those of `begun`. So
      `token_losses(lm, hidden, batch.token_bt[:, n - 1:])` are the losses from token n on.
    """
    hidden, _, found = _rest(lm, batch, begun, policy, key_b, (observe, acc))
    last = jnp.repeat(begun.hidden_btm[:, -1:], len(hidden) // len(begun.hidden_btm), axis=0)
    return jnp.concatenate([last, hidden], axis=1), *found


def _rest(lm, batch, begun, policy, key_b, observing=None):
    """Hidden states after `begun`, and either what `observing` sees or the layers at the end."""
    base.check(policy, lm.config, begun.cadence)
    rows, traces = len(batch.token_bt), len(begun.hidden_btm)
    if rows % traces:
        raise ValueError(f"{rows} rows are not a multiple of the {traces} traces begun")
    if key_b is None:
        key_b = replay.row_keys(key_of(0, Purpose.REPLAY), rows)
    position = batch.position_bt[:, begun.tokens :]

    def repeat(x):
        return jnp.repeat(x, rows // traces, axis=0) if rows > traces and x.ndim else x

    def layer(hidden, inputs):
        index, weights, layer_policy, staged = inputs
        qkv = replay.project(layer_policy, lm.config, index, weights, hidden, position)
        site = Site(lm.config, begun.cadence, index, key_b, batch.prompt_b)
        staged = jax.tree.map(repeat, staged)
        out, staged, *found = replay.pass_from(
            layer_policy, site, staged, qkv, position, *(observing or ())
        )
        kept = ((), found) if observing else (staged, ())  # several layers' caches are large
        return models.finish(lm.config, weights, hidden, out), kept

    inputs = (jnp.arange(lm.config.layers), models.stacked(lm), policy, begun.staged_y)
    hidden = models.embed(lm, batch.token_bt[:, begun.tokens :])
    hidden, (staged, found) = jax.lax.scan(layer, hidden, inputs)
    return hidden, staged, found
