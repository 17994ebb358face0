"""The slow, obvious versions: numpy in float64, one row at a time, written from the definitions.

Nothing here is shared with `fkv` but the names of parameters and the rotary frequencies (and the
terms of the GRPO loss). A trace
is a plain [t] array without padding, a cache a Python list of positions that grows and shrinks.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fkv import models
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.engine import replay as engine
from fkv.engine.batch import Batch
from fkv.learning import surrogate
from fkv.models import LM, ModelConfig
from fkv.models.decoder import WIDTH_LAST, param_shapes


def make_model(family="qwen3", heads=4, kv_heads=2, layers=2, seed=0, **fields):
    """A tiny model of which every parameter matters, with attention sharp enough to miss entries.

    Returns:
      The config and its parameters.
    """
    sizes = dict(vocab_size=37, width=32, head_dim=8, mlp_width=24)
    config = ModelConfig(
        family=family,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        **{**sizes, **fields},
    )
    rng = np.random.default_rng(seed)

    def random(path, leaf):
        name = path[-1].key
        shape = leaf.shape
        if name in WIDTH_LAST:
            shape = (shape[0], shape[-1], *shape[1:-1])
        x = rng.normal(size=shape)
        if name in ("q_norm_d", "k_norm_d"):
            x = 1.5 + 0.2 * x
        elif "norm" in name:
            x = 1 + 0.2 * x
        elif "bias" in name:
            x = 0.3 * x
        elif name in ("q_hdm", "k_kdm"):
            x = 1.5 * x / config.width**0.5
        elif name not in ("embed_vm", "head_vm"):
            x = x / math.prod(shape[1:-1]) ** 0.5
        if name in WIDTH_LAST:
            x = np.moveaxis(x, 1, -1)
        return jnp.asarray(x, jnp.float32)

    return config, jax.tree_util.tree_map_with_path(random, param_shapes(config))


def make_lm(*args, **fields):
    """The same as one."""
    config, params = make_model(*args, **fields)
    return LM(params, config)


def make_tokens(config, lengths, seed=0):
    """Right-padded random traces: ids [b, t] and lengths [b]."""
    rng = np.random.default_rng(seed)
    token = rng.integers(config.vocab_size, size=(len(lengths), max(lengths)))
    return jnp.asarray(token, jnp.int32), jnp.asarray(lengths, jnp.int32)


def make_batch(config, lengths, seed=0):
    """The same as a batch, without prompts."""
    return Batch.of(*make_tokens(config, lengths, seed))


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


# ---- the model, one row


def rms_norm(x, gain, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def rotate(x_thd, config):
    frequencies, scale = config.inv_frequencies()
    angle = np.arange(len(x_thd))[:, None, None] * frequencies
    low, high = np.split(x_thd, 2, axis=-1)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def project(config, w, hidden_tm):
    x = rms_norm(hidden_tm, w["attn_norm_m"], config.rms_eps)
    q, k, v = (np.einsum("tm,hdm->thd", x, w[n]) for n in ("q_hdm", "k_kdm", "v_kdm"))
    if config.qkv_bias:
        q, k, v = q + w["q_bias_hd"], k + w["k_bias_kd"], v + w["v_bias_kd"]
    if config.qk_norm:
        q = rms_norm(q, w["q_norm_d"], config.rms_eps)
        k = rms_norm(k, w["k_norm_d"], config.rms_eps)
    return rotate(q, config), rotate(k, config), v


def finish(config, w, hidden_tm, out_thd):
    hidden = hidden_tm + np.einsum("thd,hdm->tm", out_thd, w["o_hdm"])
    x = rms_norm(hidden, w["mlp_norm_m"], config.rms_eps)
    gate = x @ w["gate_mf"]
    return hidden + (gate / (1 + np.exp(-gate)) * (x @ w["up_mf"])) @ w["down_fm"]


def run_model(config, params, token_t, attend):
    """Hidden states [t, m] after the last layer, with `attend(layer, q, k, v)` as attention."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    hidden = params["embed_vm"][np.asarray(token_t)]
    for layer in range(config.layers):
        w = {name: x[layer] for name, x in params["layers"].items()}
        hidden = finish(config, w, hidden, attend(layer, *project(config, w, hidden)))
    return hidden


def log_probabilities(config, params, hidden_tm):
    """Log-probabilities of the next token [t, v]."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    head = params["embed_vm" if config.tied_embeddings else "head_vm"]
    x = rms_norm(hidden_tm, params["final_norm_m"], config.rms_eps) @ head.T
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# ---- attention


def probabilities(q_qd, k_nd, query_positions, key_positions):
    """Attention of one head [q, n]: each query over the keys that are not later than itself."""
    x = q_qd @ k_nd.T / math.sqrt(q_qd.shape[-1])
    later = np.asarray(key_positions)[None] > np.asarray(query_positions)[:, None]
    return softmax(np.where(later, -np.inf, x))


def full_attention(q_thd, k_tkd, v_tkd):
    """Attended values [t, h, d] and the whole matrix [h, t, t]."""
    t, heads, _ = q_thd.shape
    group = heads // k_tkd.shape[1]
    p = np.stack(
        [probabilities(q_thd[:, h], k_tkd[:, h // group], range(t), range(t)) for h in range(heads)]
    )
    return np.stack([p[h] @ v_tkd[:, h // group] for h in range(heads)], axis=1), p


# ---- METHOD: cadence, statistics, golden eviction


class State:
    """An attention group when an eviction is due.

    Attributes:
      event: number of the eviction.
      positions: held, ascending; the last L are the newest.
      keys, values: of these, [n, d].
      p: attention of the last L queries on them, [g, q, n].
      queries: the last L queries, [q, g, d].
      cumulative, decayed: sums of attention [n, g].
    """

    def __init__(self, **fields):
        self.__dict__.update(fields)


def replay_group(q_tgd, k_td, v_td, budget, interval, evict):
    """One attention group of a trace: the first B tokens, then chunks of L.

    Args:
      evict: from a `State` to the positions to drop.

    Returns:
      Attended values [t, g, d].
    """
    t, group, _ = q_tgd.shape
    held, out, cumulative, decayed = [], [], {}, {}
    for event, start in enumerate([0, *range(budget, t, interval)], -1):
        queries = list(range(start, min(t, start + interval if start else budget)))
        held = held + queries
        p = np.stack(
            [probabilities(q_tgd[queries, g], k_td[held], queries, held) for g in range(group)]
        )
        out += list(np.einsum("gqn,nd->qgd", p, v_td[held]))
        for n, position in enumerate(held):
            gain = p[:, :, n].sum(1)
            cumulative[position] = cumulative.get(position, 0) + gain
            decayed[position] = 0.9 * decayed.get(position, 0) + gain
        if len(held) == budget + interval:
            state = State(
                event=event,
                positions=np.array(held),
                keys=k_td[held],
                values=v_td[held],
                p=p,
                queries=q_tgd[queries],
                cumulative=np.stack([cumulative[i] for i in held]),
                decayed=np.stack([decayed[i] for i in held]),
            )
            dropped = set(np.asarray(evict(state)).tolist())
            assert len(dropped) == interval and dropped <= set(held)
            held = [i for i in held if i not in dropped]
    return np.stack(out)


def replay(config, params, token_t, budget, interval, evict):
    """Hidden states of a trace under `evict(layer, kv_head, state)`."""

    def attend(layer, q, k, v):
        g = config.group_size
        return np.concatenate(
            [
                replay_group(
                    q[:, head * g : (head + 1) * g],
                    k[:, head],
                    v[:, head],
                    budget,
                    interval,
                    lambda state, head=head: evict(layer, head, state),
                )
                for head in range(config.kv_heads)
            ],
            axis=1,
        )

    return run_model(config, params, token_t, attend)


def full(config, params, token_t):
    """Hidden states of a trace with the full cache, and every layer's attention [h, t, t]."""
    seen = []

    def attend(layer, q, k, v):
        out, p = full_attention(q, k, v)
        seen.append(p)
        return out

    return run_model(config, params, token_t, attend), seen


def features(state, budget, form="windowed"):
    """Scorer inputs of the B candidates [n, f]."""
    p = state.p[:, :, :budget].transpose(2, 1, 0)  # [n, q, g]
    last = (lambda w: p[:, -w:]) if form == "windowed" else (lambda w: p)
    return np.concatenate(
        [
            state.keys[:budget],
            state.values[:budget],
            p.max(1),
            p.min(1),
            p.sum(1),
            last(16).sum(1),
            last(8).sum(1),
            last(32).sum(1),
            state.cumulative[:budget],
            state.decayed[:budget],
        ],
        axis=1,
    )


def mlp(params, layer, head, feature_nf):
    """Importance [n] by one scorer, with the exact GELU."""
    w = {name: np.asarray(x[layer, head], np.float64) for name, x in params.items()}
    x = feature_nf @ w["w1"] + w["b1"]
    x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x @ w["w2"] + w["b2"]


def block_scores(p_htt, kv_heads, interval):
    """Mean attention [k, key, block] of each block of L queries, also over the group's heads."""
    heads, t, _ = p_htt.shape
    padded = np.zeros((heads, -(-t // interval) * interval, t))
    padded[:, :t] = p_htt
    mean = padded.reshape(kv_heads, heads // kv_heads, -1, interval, t).mean((1, 3))
    return mean.transpose(0, 2, 1)


def golden(score_tj, budget, interval, kept=0):
    """Golden Eviction of one group; the first `kept` positions stay.

    Returns:
      For each eviction that a token follows: candidates, their future scores, and the positions
      to drop, lowest first.
    """
    t, events = len(score_tj), []
    candidates = list(range(budget))
    while t > budget + interval * (1 + len(events)):
        alpha = score_tj[candidates, 1 + budget // interval + len(events) :].max(1)
        order = sorted(range(budget), key=lambda n: (alpha[n], candidates[n]))
        order = [n for n in order if candidates[n] >= kept]
        drop = [candidates[n] for n in order[:interval]]
        events.append((candidates, alpha, drop))
        start = budget + interval * (len(events) - 1)
        candidates = [i for i in candidates if i not in drop] + list(range(start, start + interval))
    return events


def golden_of_model(config, params, token_t, budget, interval):
    """Golden Eviction of every layer and KV head: events[layer][head]."""
    _, attention = full(config, params, token_t)
    return [
        [golden(s, budget, interval) for s in block_scores(p, config.kv_heads, interval)]
        for p in attention
    ]


def is_lowest(chosen, positions, score, tie=1e-6):
    """Whether the chosen positions are those of lowest score; ties may go either way."""
    chosen = set(np.asarray(chosen).tolist())
    border = np.sort(score)[len(chosen) - 1]
    must = {p for p, s in zip(positions.tolist(), score, strict=True) if s < border - tie}
    may = {p for p, s in zip(positions.tolist(), score, strict=True) if s <= border + tie}
    return must <= chosen <= may


# ---- replay chunk by chunk, in JAX, as policies are


def replay_by_chunks(lm, batch, policy, cadence, key_b, observe=None):
    """`fkv.engine.replay.replay` without a beginning: a scan over all chunks from an empty cache.

    Heads of an even budget evict nothing before eviction 0, so what is observed before is cut off.

    Returns:
      Hidden states, and outputs of `observe` [layers, evictions, ...].
    """
    position, config, interval, of_all = batch.position_bt, lm.config, cadence.interval, policy
    b, t = position.shape
    chunks = -(-t // interval)

    def split(x, value=0):
        pad = [(0, 0), (0, chunks * interval - t), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, pad, constant_values=value)
        return jnp.moveaxis(x.reshape(b, chunks, interval, *x.shape[2:]), 1, 0)

    def layer(hidden, inputs):
        index, weights, policy = inputs
        site = engine.Site(config, cadence, index, key_b, batch.prompt_b)

        def step(cache, inputs):
            at, q, k, v, position, *arrived = inputs
            ring = cache.position_bks.shape[-1] - interval
            cache = kv.append(cache, ring, k, v, position, *arrived)
            seen = attention.visible(position, cache.position_bks)
            out, lse = attention.attend(q, cache.key_bksd, cache.value_bksd, seen)
            chunk = engine.Chunk(q, lse, position, at)
            view, evicted, cache = engine.evict(policy, cache, chunk, site)
            return cache, (out, observe(0, policy, view, evicted)[1] if observe else ())

        q, k, v, *arrived = engine.project(policy, config, index, weights, hidden, position)
        cache = engine.init_cache(of_all, b, config, cadence, hidden.dtype)
        inputs = (jnp.arange(chunks), *map(split, (q, k, v)), split(position, -1))
        inputs = (*inputs, *(jax.tree.map(split, x) for x in arrived))
        _, (out, observed) = jax.lax.scan(step, cache, inputs)
        out = jnp.moveaxis(out, 0, 1).reshape(b, -1, *out.shape[3:])[:, :t]
        return models.finish(config, weights, hidden, out), observed

    inputs = (jnp.arange(config.layers), lm.params["layers"], policy)
    hidden, observed = jax.lax.scan(layer, models.embed(lm, batch.token_bt), inputs)
    even = policy.capacity(cadence.budget) == cadence.budget
    first = min(cadence.fill_chunks if even else 0, chunks - 1)
    return hidden, jax.tree.map(lambda x: x[:, first:-1], observed)


# ---- the reinforcement stage, in JAX, as gradients are taken of it


def reward(evicted_nll_t, full_nll_t, counted_t, eta):
    """Minus the mean over the counted tokens of the squared losses larger than `eta` nats."""
    excess = evicted_nll_t - full_nll_t
    penalty = jnp.where(excess > eta, excess**2, 0.0)
    return -(penalty * counted_t).sum() / counted_t.sum()


def grpo_loss(new_x, old_x, reference_x, advantage_x, clip, kl_weight):
    """The mean PPO-clip loss plus the KL to the reference policy, and the mean KL, nats."""
    _, gain, kl = surrogate.terms(new_x, old_x, reference_x, advantage_x, clip)
    return -gain.mean() + kl_weight * kl.mean(), kl.mean()
