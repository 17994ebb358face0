"""What presses of kvpress keep of a prefill by a random model, for `test_kvpress.py`.

Runs in an environment of its own, started by path; it imports nothing of fkv or its tests. Writes
an npz: the ids; of each layer the rotated keys and the values [k, t, d], and the queries before
their rotation [h, t, d]; and of each press the positions that it keeps, [y, k, ...] as a mask
over t. The model is saved beside it.
"""

import contextlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    PyramidKVPress,
    SnapKVPress,
)
from kvpress.utils import get_prerope_query_states
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM


def main(path: str, tokens: int, kept: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=211, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_theta=1e4,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    for name, x in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(x, 1.0, 3.0)  # attention that is not uniform
        elif "embed" in name or "proj" in name:
            torch.nn.init.normal_(x, std=0.3)
    ids = torch.randint(211, (1, tokens))
    model.save_pretrained(Path(path).with_name("model"))

    def prefill(press=None):
        cache = DynamicCache(config=config)
        with torch.inference_mode(), press(model) if press else contextlib.nullcontext():
            out = model.model(ids, past_key_values=cache, output_hidden_states=True)
        return cache, out

    cache, out = prefill()
    queries = []
    for layer, hidden in zip(model.model.layers, out.hidden_states, strict=False):
        with torch.inference_mode():
            normed = layer.input_layernorm(hidden)
            queries.append(get_prerope_query_states(layer.self_attn, normed)[0])
    found = {
        "ids": ids[0].numpy(),
        "version": importlib.metadata.version("kvpress"),
        "keys": np.stack([x.keys[0].numpy() for x in cache.layers]),
        "values": np.stack([x.values[0].numpy() for x in cache.layers]),
        "queries": np.stack([x.numpy() for x in queries]),
    }
    ratio = 1 - (kept + 0.5) / tokens  # int() of what is kept
    presses = {
        "keydiff": KeyDiffPress(ratio),
        "knorm": KnormPress(ratio),
        "expected_attention": ExpectedAttentionPress(ratio),
        "lagkv": LagKVPress(ratio, lag_size=8),
        "snapkv": SnapKVPress(ratio, window_size=8, kernel_size=5),
        "ada(keydiff)": AdaKVPress(KeyDiffPress(ratio), alpha_safeguard=0.2),
        "ada(knorm)": AdaKVPress(KnormPress(ratio), alpha_safeguard=0.6),
        "pyramid": PyramidKVPress(1 - kept / tokens, window_size=2, kernel_size=5, beta=10),
    }
    for name, press in presses.items():
        masks = np.zeros((3, 2, tokens), bool)

        def compress(module, hidden, keys, values, *rest, inner=press.compress, masks=masks):
            whole, layer = keys, module.layer_idx
            keys, values = inner(module, hidden, keys, values, *rest)
            dropped = getattr(module, "masked_key_indices", None)
            if dropped is not None:
                masks[layer] = True
                masks[layer][dropped[1].numpy(), dropped[2].numpy()] = False
            else:  # found by their keys, of which no two are equal
                same = (whole[0][:, :, None] == keys[0][:, None]).all(-1)
                masks[layer] = same.any(-1).numpy()
            return keys, values

        press.compress = compress
        prefill(press)
        found[f"kept {name}"] = masks
    np.savez(path, **found)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
