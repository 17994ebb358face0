"""What the tests of the models share: small random PyTorch models and an attention oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import models
from fkv.models import LM
from fkv.models.decoder import param_shapes

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def torch_model(family, **settings):
    """A small model of `transformers` whose parameters all matter (norms and biases too)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config_class = {
        "qwen3": transformers.Qwen3Config,
        "qwen2": transformers.Qwen2Config,
        "llama": transformers.LlamaConfig,
    }[family]
    model = transformers.AutoModelForCausalLM.from_config(config_class(**SMALL | settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            random = 1 + 0.3 * random
        elif "bias" in name:
            random = 0.5 * random
        elif "embed" not in name:
            random = random * parameter.shape[1] ** -0.5
        parameter.data = random
    return model.eval()


def random_params(config, dtype=np.float32):
    """Parameters of a model, all random, without compiling an initialiser for every shape."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(dtype), param_shapes(config)
    )


def tokens(length, vocab_size=SMALL["vocab_size"]):
    """Two rows of random tokens."""
    return np.random.default_rng(1).integers(vocab_size, size=(2, length))


def torch_logits(model, token_bt):
    """Logits of a PyTorch model, computed in float32."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model.float()(torch.tensor(token_bt)).logits.numpy()


def random_lm(config, dtype=np.float32):
    """A model with random parameters."""
    return LM(random_params(config, dtype), config)


@jax.jit
def full_logits(lm, token_bt):
    """Logits with plain T x T causal attention."""
    config, t = lm.config, token_bt.shape[1]
    position = jnp.broadcast_to(jnp.arange(t)[None], token_bt.shape)
    future = jnp.triu(jnp.ones((t, t), bool), 1)[None, None]

    def layer(hidden, weights):
        q, k, v = models.project(config, weights, hidden, position)
        k, v = (jnp.repeat(x, config.group_size, axis=2) for x in (k, v))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / config.head_dim**0.5
        weight = jax.nn.softmax(jnp.where(future, -jnp.inf, logits.astype(jnp.float32)))
        out = jnp.einsum("bhqk,bkhd->bqhd", weight.astype(v.dtype), v)
        return models.finish(config, weights, hidden, out), None

    hidden, _ = jax.lax.scan(layer, models.embed(lm, token_bt), models.stacked(lm))
    return models.unembed(lm, hidden)
