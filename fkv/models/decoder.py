"""One decoder for Qwen3, Qwen2 and Llama, as pure functions over a parameter pytree.

The parameters are a dictionary. Those of the layers (`_LAYER`, `_OPTIONAL`) are held in one of two
forms, see `LM`. The last letters of a name are its axes: v vocabulary, m width, h query heads, k KV
heads, d head dim, f MLP width. Activations also have b batch and t tokens.
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fkv.errors import UserError
from fkv.keys import fold
from fkv.models.config import ModelConfig
from fkv.models.numerics import einsum_f32, in_pieces, linear, once

Params = dict
MODEL = "model"  # the mesh axis over which a replica of the model is sharded
_LAYER = (
    "attn_norm_m", "q_hdm", "k_kdm", "v_kdm", "o_hdm", "mlp_norm_m", "gate_mf", "up_mf", "down_fm",
)  # fmt: skip
# Their width last, as in checkpoints: what TPUs and GPUs multiply without laying them out anew.
WIDTH_LAST = ("q_hdm", "k_kdm", "v_kdm")
# What the others are called whose outputs are first, again as in checkpoints: separate layers on a
# CPU, which multiplies these up to twice as fast.
OUTPUTS_FIRST = {
    "o_hdm": "o_mhd", "gate_mf": "gate_fm", "up_mf": "up_fm", "down_fm": "down_mf",
}  # fmt: skip
_OPTIONAL = {  # by the field of the config
    "qk_norm": ("q_norm_d", "k_norm_d"),
    "qkv_bias": ("q_bias_hd", "k_bias_kd", "v_bias_kd"),
    "out_bias": ("o_bias_m",),
    "mlp_bias": ("gate_bias_f", "up_bias_f", "down_bias_m"),
}


@flax.struct.dataclass
class LM:
    """A language model.

    Attributes:
      params: `embed_vm`, `final_norm_m`, maybe `head_vm`, and `layers`: stacked, a dictionary of
        arrays [layers, ...], over which replay and training scan; or separate, a tuple of one
        dictionary per layer, which decoding reads in place; on a CPU with the matrices of
        `OUTPUTS_FIRST`. Everything takes either form, but the wrong one is copied while a program
        runs; `fkv.models.forms` converts without a copy.
      config: static under `jit`.
    """

    params: Params
    config: ModelConfig = flax.struct.field(pytree_node=False)

    if TYPE_CHECKING:  # flax has it

        def replace(self, **changes: Any) -> Self: ...

    def __repr__(self) -> str:
        c, arrays = self.config, jax.tree.leaves(self.params)
        dtypes = " and ".join(sorted({str(getattr(x, "dtype", "?")) for x in arrays}))
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(c)))
        size = f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} B"
        held = f"in {dtypes}" if arrays else "not loaded"
        heads = f"{c.layers} layers of {c.kv_heads} KV heads"
        cached = f", {c.cache_dtype} cache" if c.cache_dtype else ""
        return f"LM({c.family}, {size} parameters {held}, {heads}{cached})"


def param_shapes(config: ModelConfig, separate: bool = False, on_cpu: bool = False) -> dict:
    """Shapes of every parameter, as a pytree of `jax.ShapeDtypeStruct` (float32).

    Args:
      separate: the form of the layers, see `LM`.
      on_cpu: where separate ones are.
    """
    c = config
    sizes = dict(v=c.vocab_size, m=c.width, h=c.heads, k=c.kv_heads, d=c.head_dim, f=c.mlp_width)

    def leaves(names, *lead):
        axes = {name: [sizes[letter] for letter in name.rpartition("_")[2]] for name in names}
        return {n: jax.ShapeDtypeStruct((*lead, *shape), jnp.float32) for n, shape in axes.items()}

    optional = (name for field, names in _OPTIONAL.items() if getattr(c, field) for name in names)
    head = () if c.tied_embeddings else ("head_vm",)
    names = (*_LAYER, *optional)
    if separate and on_cpu:
        names = [OUTPUTS_FIRST.get(name, name) for name in names]
    layers = (leaves(names),) * c.layers if separate else leaves(names, c.layers)
    return {"layers": layers, **leaves(("embed_vm", "final_norm_m", *head))}


def sharding(name: str, shape: Sequence[int], mesh: Mesh | None) -> NamedSharding | None:
    """How a parameter is sharded over the devices of a mesh that share a replica of the model.

    Args:
      name: its last letters name its last axes.

    Raises:
      UserError: the KV heads don't divide evenly.
    """
    if mesh is None:
        return None
    parts = mesh.shape[MODEL]
    letters = name.rpartition("_")[2]
    axes = [None] * len(shape)
    for i, letter in enumerate(letters, len(shape) - len(letters)):
        if letter == "k" and shape[i] % parts:
            raise UserError(
                f"model_axis = {parts} must divide the {shape[i]} KV heads of the language model"
            )
        if letter in "hkfv" and shape[i] % parts == 0:
            axes[i] = MODEL
    return NamedSharding(mesh, PartitionSpec(*axes))


@functools.partial(jax.jit, static_argnames=("config", "qk_gain"))
def init(key: Array, config: ModelConfig, qk_gain: float = 1.0) -> Params:
    """Random parameters: normal with std `fan_in ** -0.5`, norms at one, biases at zero.

    Args:
      key: PRNG key.
      qk_gain: initial gain of the QK-norm. With RMS-normalised queries and keys the logits can't
        exceed `gain_q * gain_k * sqrt(head_dim)`: small head dims need more than 1 for sharp
        attention.
    """
    inputs = {"o_hdm": config.heads * config.head_dim, "down_fm": config.mlp_width}
    leaves, treedef = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    params = []
    for i, (path, leaf) in enumerate(leaves):
        name, shape = path[-1].key, leaf.shape
        if "norm" in name:
            params.append(jnp.full(shape, qk_gain if name in ("q_norm_d", "k_norm_d") else 1.0))
        elif "bias" in name:
            params.append(jnp.zeros(shape))
        else:
            std = inputs.get(name, config.width) ** -0.5
            if name in inputs:  # the residual stream is the sum of 2 * layers of these
                std /= (2 * config.layers) ** 0.5
            if name in WIDTH_LAST:  # drawn with the width first
                x = jax.random.normal(fold(key, i), (*shape[:-3], shape[-1], *shape[-3:-1]))
                params.append(std * jnp.moveaxis(x, -3, -1))
            else:
                params.append(std * jax.random.normal(fold(key, i), shape))
    return jax.tree_util.tree_unflatten(treedef, params)


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """RMSNorm over the last axis, computed in float32, returned in the dtype of `x`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * gain.reshape((1,) * (x.ndim - 1) + gain.shape)


def rotate(x_bthd: Array, position_bt: Array, config: ModelConfig) -> Array:
    """Rotary embedding at the absolute positions (`rotate_half` layout of Hugging Face)."""
    inv, scale = config.inv_frequencies()
    angle = position_bt[..., None].astype(jnp.float32) * jnp.asarray(inv, jnp.float32)[None, None]

    def cos_sin(angle):
        return jnp.cos(angle) * scale, jnp.sin(angle) * scale

    cos, sin = (x[:, :, None].astype(x_bthd.dtype) for x in once(cos_sin, angle))
    low, high = jnp.split(x_bthd, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def embed(lm: LM, token_bt: Array) -> Array:
    """Token embeddings [b, t, m]."""
    return lm.params["embed_vm"][token_bt]


def project(
    config: ModelConfig, layer: Params, hidden_btm: Array, position_bt: Array
) -> tuple[Array, Array, Array]:
    """Queries [b, t, h, d], keys and values [b, t, k, d] of a layer; queries and keys rotated."""
    b, t, _ = hidden_btm.shape
    chex.assert_shape(hidden_btm, (b, t, config.width))
    chex.assert_shape(position_bt, ({1, b}, t))
    return in_pieces(functools.partial(_project, config, layer), hidden_btm, position_bt)


def _project(config, layer, hidden_btm, position_bt):
    _, q, k, v = unrotated(config, layer, hidden_btm)
    return rotate(q, position_bt, config), rotate(k, position_bt, config), v


def unrotated(
    config: ModelConfig, layer: Params, hidden_btm: Array
) -> tuple[Array, Array, Array, Array]:
    """The input of a layer after its norm [b, t, m], and what `project` gives, before rotation."""
    x = rms_norm(hidden_btm, layer["attn_norm_m"], config.rms_eps)
    q = linear("btm,hdm->bthd", x, layer["q_hdm"])
    k = linear("btm,kdm->btkd", x, layer["k_kdm"])
    v = linear("btm,kdm->btkd", x, layer["v_kdm"])
    if config.qkv_bias:
        q = q + layer["q_bias_hd"][None, None]
        k = k + layer["k_bias_kd"][None, None]
        v = v + layer["v_bias_kd"][None, None]
    if config.qk_norm:
        q = rms_norm(q, layer["q_norm_d"], config.rms_eps)
        k = rms_norm(k, layer["k_norm_d"], config.rms_eps)
    return x, q, k, v


def _multiply(layer: Params, name: str, x_bt: Array, given: str) -> Array:
    """The product of activations, with these letters, and a weight, whichever axes come first."""
    name = OUTPUTS_FIRST[name] if OUTPUTS_FIRST[name] in layer else name
    letters = name.rpartition("_")[2]
    return linear(f"{given},{letters}->bt{letters.strip(given)}", x_bt, layer[name])


def finish(config: ModelConfig, layer: Params, hidden_btm: Array, attended_bthd: Array) -> Array:
    """The rest of a layer after attention: output projection, residuals and the gated MLP."""
    return in_pieces(functools.partial(_finish, config, layer), hidden_btm, attended_bthd)


def _finish(config, layer, hidden_btm, attended_bthd):
    out = _multiply(layer, "o_hdm", attended_bthd, "bthd")
    if config.out_bias:
        out = out + layer["o_bias_m"][None, None]
    hidden = hidden_btm + out
    x = rms_norm(hidden, layer["mlp_norm_m"], config.rms_eps)
    gate, up = (_multiply(layer, name, x, "btm") for name in ("gate_mf", "up_mf"))
    if config.mlp_bias:
        gate, up = gate + layer["gate_bias_f"][None, None], up + layer["up_bias_f"][None, None]
    out = _multiply(layer, "down_fm", jax.nn.silu(gate) * up, "btf")
    if config.mlp_bias:
        out = out + layer["down_bias_m"][None, None]
    return hidden + out


def unembed(lm: LM, hidden_btm: Array) -> Array:
    """Logits [b, t, v], float32."""
    x = rms_norm(hidden_btm, lm.params["final_norm_m"], lm.config.rms_eps)
    head = lm.params["embed_vm" if lm.config.tied_embeddings else "head_vm"]
    return linear("btm,vm->btv", x, head, einsum_f32)
