"""What TriAttention's public code keeps of random tokens, for `test_public_code.py`.

Runs in an environment of its own (transformers 5.2), started by path, on a clone of
github.com/WeianMao/triattention; it imports nothing of fkv.

Saves a random Qwen3 and random statistics of its queries, patches the model as the code does for
generation, and decodes token by token. Writes an npz: the ids; of each way of pruning the positions
that stay after each round, [e, y, k, B]; those that were scored, [e, y, k, n], and the scores that
query heads gave them, [e, y, h, n].
Their calibration measures a random Qwen2, which has no norm of queries, in float32.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
from peer_models import randomise
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

LAYERS, HEADS, KV_HEADS, DIM = 3, 4, 2, 8
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
WAYS = {
    "near": {"offset_max_length": 100},
    "far": {},
    "prompt": {"offset_max_length": 100, "allow_prefill_compression": False},
    "yarn": {"offset_max_length": 100},
}


def save_random(path: Path, family: str, scaling: dict) -> None:
    config_of, model_of = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)
    }[family]  # fmt: skip
    sizes = {"head_dim": DIM} if family == "qwen3" else {}
    config = config_of(
        vocab_size=211, hidden_size=32, intermediate_size=24, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, **sizes,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"} | scaling,
    )  # fmt: skip
    model = randomise(model_of(config))
    model.save_pretrained(path)


class Float32:
    """PyTorch, whose bfloat16 is float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


def calibrate(clone: str, model: Path, ids: torch.Tensor, output: Path) -> None:
    place = Path(clone, "scripts", "calibrate.py")
    spec = importlib.util.spec_from_file_location("calibrate", place)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.torch = Float32()
    tokenizer = types.SimpleNamespace(encode=lambda text, **_: ids)
    script.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)
    text = output.with_name("text.txt")
    text.write_text("the ids stand for it")
    script.calibrate(str(model), str(text), str(output), device="cpu", attn_implementation="sdpa")


def write_statistics(path: Path, pruning) -> None:
    places = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    stats = {}
    for place in places:
        mean = torch.complex(*torch.randn(2, DIM // 2))
        norm = mean.abs() * torch.empty(DIM // 2).uniform_(1, 2)
        stats[place] = pruning.HeadFrequencyStats(mean, norm)
    metadata = {"head_dim": DIM, "rope_style": "half"}
    pruning.save_head_frequency_stats(path, places, stats, metadata)


def record(pruner) -> list[dict[str, np.ndarray]]:
    """What query heads score in every round to come, and which positions."""
    rounds, layers = [], []
    inner, choose = pruner._compute_layer_head_scores, pruner._select_per_layer_perhead_independent

    def score(key, at, layer, start_index=0, positions_per_kv_head=None):
        out = inner(key, at, layer, start_index, positions_per_kv_head)
        heads = positions_per_kv_head or [at] * KV_HEADS
        layers.append((out.numpy(), np.stack([x.numpy() for x in heads])))
        return out

    def select(*rest):
        layers.clear()  # of a first scoring that selects nothing
        out = choose(*rest)
        scores, scored = map(np.stack, zip(*layers, strict=True))
        rounds.append({"scores": scores, "scored": scored})
        return out

    pruner._compute_layer_head_scores = score
    pruner._select_per_layer_perhead_independent = select
    return rounds


@torch.inference_mode()
def main(clone: str, path: str, tokens: int, budget: int, interval: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sys.path.insert(0, clone)
    from triattention.methods import pruning_utils, triattention

    statistics = Path(path).with_name("statistics.pt")
    write_statistics(statistics, pruning_utils)
    ids = torch.randint(211, (1, tokens))
    found = {"ids": ids[0].numpy()}
    plain = Path(path).with_name("plain")
    save_random(plain, "qwen2", {})
    calibrate(clone, plain, ids, Path(path).with_name("calibrated.pt"))
    for name, way in WAYS.items():
        folder = Path(path).with_name("yarn" if name == "yarn" else "base")
        if not folder.exists():
            save_random(folder, "qwen3", YARN if name == "yarn" else {})
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        triattention.apply_triattention_patch(
            model, stats_path=statistics, model_path=folder, kv_budget=budget,
            divide_length=interval, pruning_seed=None, normalize_scores=True,
            count_prompt_tokens=True, use_slack_trigger=True, per_layer_perhead_pruning=True,
            **{"allow_prefill_compression": True} | way,
        )  # fmt: skip
        pruner = model._triattention_compressor
        rounds = record(pruner)
        cache = None
        for piece in torch.split(ids, [interval] + [1] * (tokens - interval), dim=1):
            before = len(rounds)
            cache = model(piece, past_key_values=cache, use_cache=True).past_key_values
            if len(rounds) > before:
                at = pruner.cache_positions_per_layer_perhead
                rounds[-1]["kept"] = np.array(
                    [[at[layer, head] for head in range(KV_HEADS)] for layer in range(LAYERS)]
                )
        for what in ("kept", "scores", "scored"):
            found[f"{what} {name}"] = np.stack([one[what] for one in rounds])
    np.savez(path, **found)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
