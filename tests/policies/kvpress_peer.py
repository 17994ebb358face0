"""What presses of kvpress keep of a prefill by a random model, for `test_kvpress.py`.

Runs in an environment of its own, started by path; it imports nothing of fkv. Writes an
npz: the ids; of each layer the rotated keys and the values [k, t, d], and the queries before
their rotation [h, t, d]; and of each press the positions that it keeps, [y, k, ...] as a mask
over t. The model and the surrogates of KVzap are saved beside it.
"""

import contextlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    DMSPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzapPress,
    LagKVPress,
    PyramidKVPress,
    SnapKVPress,
)
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
from kvpress.utils import get_prerope_query_states
from peer_models import randomise
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM


def kvzap(form: str, folder: Path, ratio: float = 0.0) -> KVzapPress:
    """A press with random surrogates, saved and loaded by their own class."""
    hidden = 6 if form == "mlp" else None
    sizes = KVzapConfig(input_dim=32, output_dim=2, hidden_dim=hidden, n_modules=3)
    if not folder.exists():
        model = KVzapModel(sizes)
        for x in model.parameters():
            torch.nn.init.normal_(x, std=0.5)
        model.save_pretrained(folder)
    press = KVzapPress(ratio, model_type=form)
    press.kvzap_model = KVzapModel.from_pretrained(folder)
    press.kvzap_model_name = f"nvidia/KVzap-{form}-"  # so that it loads none by name
    return press


def main(path: str, tokens: int, kept: int, threshold: float, window: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=211, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_theta=1e4,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = randomise(Qwen3ForCausalLM(config))
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
    folders = {form: Path(path).with_name(f"kvzap_{form}") for form in ("linear", "mlp")}
    for form, folder in folders.items():
        presses[f"kvzap {form}"] = kvzap(form, folder, ratio)
        press = DMSPress(kvzap(form, folder), threshold=threshold, sliding_window_size=window)
        prefill(press)
        masks = np.ones((3, 2, tokens), bool)
        for layer, mask in zip(model.model.layers, masks, strict=True):
            _, head, at = layer.self_attn.masked_key_indices
            mask[head.numpy(), at.numpy()] = False
        found[f"kept threshold(kvzap {form})"] = masks
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
    main(sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4]), int(sys.argv[5]))
