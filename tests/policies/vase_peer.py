"""What VaSE's public code keeps of random tokens, for `test_public_code.py`.

Runs in an environment of its own (transformers 5), started by path, on a clone of
github.com/terarachang/VaSE; it imports nothing of fkv. Plain attention stands for the flash-attn
kernel that the patched model calls, which needs a GPU.

Decodes with a random Qwen3 token by token. Writes an npz: of each mode, for every eviction and
layer, the keys and values before it [k, s, d], their positions [k, s], the queries that it used
[h, L, d] and the positions that stay [k, B]; and what was random: of a sample its weights and the
exponential variates of the candidates [k, n], or the projection [d, r].
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch
from peer_models import randomise
from transformers import Qwen3Config, Qwen3ForCausalLM

MODES = {
    "smooth": ("range_sink_sample_attn", True),
    "sample": ("range_sink_sample_attn", False),
    "projected": ("cur_resample_gauss", False),
}


def attend(query, k_cache, v_cache, k, v, cache_seqlens, causal, softmax_scale, window_size):
    """[b, t, h, d] over the first entries of a cache, to which the new ones are written."""
    assert causal and window_size == (-1, -1)
    held, new = int(cache_seqlens[0]), k.shape[1]
    k_cache[:, held : held + new], v_cache[:, held : held + new] = k, v
    group = query.shape[2] // k.shape[2]
    keys, values = (
        x[:, : held + new].transpose(1, 2).repeat_interleave(group, 1) for x in (k_cache, v_cache)
    )
    mask = torch.ones(new, held + new, dtype=bool).tril(held)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, mask, scale=softmax_scale
    )
    return out.transpose(1, 2)


class Recorder:
    """PyTorch, with what was drawn last."""

    def __init__(self):
        self.drawn = {}

    def __getattr__(self, name):
        return getattr(torch, name)

    def randn(self, *shape, **rest):
        out = torch.randn(*shape, **rest)
        self.drawn = {"projection": out[0, 0] / shape[-1] ** 0.5}
        return out

    def multinomial(self, weights, number, replacement):
        assert not replacement
        state = torch.get_rng_state()
        out = torch.multinomial(weights, number, replacement=replacement)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        noise = torch.empty_like(weights).exponential_()  # as PyTorch draws on a CPU
        torch.set_rng_state(after)
        same = (weights / noise).topk(number).indices.sort().values == out.sort().values
        assert same.all()
        self.drawn = {"weights": weights, "noise": noise}
        return out


@torch.inference_mode()
def main(clone: str, path: str, tokens: int, budget: int, interval: int, large: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(clone, "eval", "reasoning_tasks")))
    sys.modules["flash_attn"] = types.ModuleType("flash_attn")
    sys.modules["flash_attn"].flash_attn_with_kvcache = attend
    from modified.transformers import cache_utils, modify_forward

    del sys.modules["flash_attn"]
    cache_utils.torch = recorder = Recorder()
    modify_forward.wrap_evict_attn_forward("Qwen3")
    config = Qwen3Config(
        vocab_size=211, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = randomise(Qwen3ForCausalLM(config))
    ids = torch.randperm(211)[None, :tokens]  # equal ones have equal values
    found = {}
    for name, (mode, smooth) in MODES.items():
        cache = cache_utils.EvictCache(
            config, budget, interval, mode, rkv_lambda=0.1, smooth=smooth, verbose=False,
            n_large=large,
        )  # fmt: skip
        seen = [[] for _ in cache.layers]
        for layer, evictions in zip(cache.layers, seen, strict=True):

            def evict(held, layer=layer, evictions=evictions, inner=layer._run_eviction):
                def entries(cached, number):
                    return cached[0, :number].transpose(0, 1).clone()

                key, value = (entries(x, held) for x in (layer.k_cache, layer.v_cache))
                before = evictions[-1]["kept"] if evictions else np.zeros((2, 0), int)
                new = held - before.shape[1]
                come = np.arange(layer.cumulative_length - new, layer.cumulative_length)
                position = np.concatenate([before, np.stack([come, come])], axis=1)
                inner(held)
                left = entries(layer.k_cache, budget)  # found by their keys; no two are equal
                slot = (left[:, :, None] == key[:, None]).all(-1).int().argmax(-1).numpy()
                one = {"key": key, "value": value, "position": position}
                one |= {"query": getattr(layer, "queries", torch.zeros(1, 4, interval, 8))[0]}
                one |= {"kept": np.take_along_axis(position, slot, axis=1)} | recorder.drawn
                evictions.append(
                    {what: torch.as_tensor(x).clone().numpy() for what, x in one.items()}
                )

            layer._run_eviction = evict
        for piece in torch.split(ids, [interval] + [1] * (tokens - interval), dim=1):
            model(piece, past_key_values=cache)
        for what in seen[0][0]:
            x = [[layer[e][what] for layer in seen] for e in range(len(seen[0]))]
            found[f"{what} {name}"] = np.array(x)
    np.savez(path, **found)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
