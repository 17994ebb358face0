"""What TRIM-KV's public code keeps of random tokens, for `test_public_code.py`.

Runs in an environment of its own (transformers 4.57), started by path, on a clone of
github.com/ngocbh/trimkv; it imports nothing of fkv. Empty modules stand for two of the clone's,
whose kernels need a GPU and which nothing here calls.

Saves a random Qwen3 and random gates, and loads them by the code's own `from_pretrained`. Writes an
npz: the ids; of each form of gates the log retention of every entry, [y, k, t]; and what is kept.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from peer_models import randomise
from transformers import Qwen3Config, Qwen3ForCausalLM

LAYERS, KV_HEADS = 3, 2
SIZES = dict(
    vocab_size=211, hidden_size=32, intermediate_size=24, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=KV_HEADS, head_dim=8, rope_theta=1e4,
)  # fmt: skip
NO_BUDGET = 10**6


def import_theirs(clone: str):
    """The caches of the clone, and the configuration and class of its model."""
    for name, kernel in (
        ("trimkv.triton", "update_flatten_view_triton"),
        ("trimkv.attn.flash_attn", "dynamic_kv_budget_attention_forward"),
    ):
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], kernel, None)
    sys.path.insert(0, str(Path(clone) / "src"))
    from trimkv import cache_utils
    from trimkv.models.qwen3 import TrimKVQwen3Config, TrimKVQwen3ForCausalLM

    return cache_utils, TrimKVQwen3Config, TrimKVQwen3ForCausalLM


def write(path: Path, gate: str, config_of, model_of):
    """A model's directory and one of gates, in the layouts of their release."""
    base, gates = path.with_name("base"), path.with_name(gate)
    if not base.exists():
        model = randomise(Qwen3ForCausalLM(Qwen3Config(**SIZES)))
        model.save_pretrained(base)
    own = dict(
        retention_gate=gate, retention_gate_intermediate_size=12, trainable_params="retention_gate"
    )
    config = config_of(**SIZES, **own)
    weights = {
        name: torch.randn(x.shape) * (1.0 if x.ndim == 1 else 0.8 / x.shape[-1] ** 0.5)
        for name, x in model_of(config).state_dict().items()
        if "retention_gate" in name
    }
    for name in weights:
        if name.endswith("retention_gate.bias"):
            weights[name] += 4.0  # entries of all ages stay
    gates.mkdir()
    torch.save(weights, gates / "trimkv_weights.pth")
    config = config.to_dict() | {"base_model": str(base)}
    (gates / "config.json").write_text(json.dumps(config))
    model = model_of.from_pretrained(gates, download_from="local").eval()
    # Their `is_causal` lets a lone query of PyTorch's attention see the first key only.
    model.config._attn_implementation = "attn_eager"
    return model


@torch.inference_mode()
def main(clone: str, path: str, tokens: int, budget: int, interval: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    caches, config_of, model_of = import_theirs(clone)
    ids = torch.randperm(SIZES["vocab_size"])[None, :tokens]  # equal ones have keys of equal norm
    found = {"ids": ids[0].numpy()}
    for gate in ("rg", "rg2", "rg3"):
        model = write(Path(path), gate, config_of, model_of)

        def run(pieces, budget, strategy="alpha", window=0, model=model):
            """The cache, and the positions that it held after each piece that was compressed."""
            cache, seen = caches.TrimKVCache(device="cpu"), []
            cache.sliding_window_size = window
            model.config.compress_strategy = strategy
            model.config.memory_size, model.config.buffer_size = budget, interval
            for piece in torch.split(ids, pieces, dim=1):
                held, new = cache.get_cache_length(), piece.shape[1]
                mask = torch.full((1, 1, new, held + new), -torch.inf).triu(held + 1)
                model(piece, {"full_attention": mask}, past_key_values=cache)
                if cache.get_cache_length() < held + new:
                    seen.append(np.stack([x[0].numpy() for x in cache.kv_positions]))
            return cache, seen

        full, none = run([tokens], NO_BUDGET)
        assert not none
        found[f"retention {gate}"] = np.stack([x[0].numpy() for x in full.retention_weights])
        one_by_one = [interval] + [1] * (tokens - interval)
        for name, settings in {
            "alpha": {}, "knorm_alpha": {"strategy": "knorm_alpha"}, "window": {"window": 3},
        }.items():  # fmt: skip
            found[f"decoding {gate} {name}"] = np.stack(run(one_by_one, budget, **settings)[1])
            found[f"end {gate} {name}"] = run([tokens], budget, **settings)[1][0]
        for name in ("layer_wise_alpha", "layer_wise_knorm_alpha", "alpha_threshold"):
            uneven = caches.DynamicBudgetTrimKVCache(device="cpu")
            for layer in range(LAYERS):
                entries = (x[layer] for x in (full.key_cache, full.value_cache))
                rest = full.retention_weights[layer], full.kv_positions[layer]
                uneven.update(*entries, *rest, layer)
            uneven.compress(name, budget, interval, alpha_threshold=found.setdefault("at", 0.3))
            masks = np.zeros((LAYERS, KV_HEADS, tokens), bool)
            for layer, at in enumerate(uneven.kv_positions):
                ends = uneven.cu_seqlens_k[layer].tolist()
                for head in range(KV_HEADS):
                    masks[layer, head, at[ends[head] : ends[head + 1], 0].numpy()] = True
            found[f"uneven {gate} {name}"] = masks
    np.savez(path, **found)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
