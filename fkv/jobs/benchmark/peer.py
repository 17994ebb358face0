"""A peer of the benchmark: greedy decoding by PyTorch `transformers` or `kvpress`.

Runs in an environment of its own, started by path: it imports nothing of fkv. One JSON object a
line comes in and one goes out: first what to load, then one decoding after another.
"""

import contextlib
import json
import os
import resource
import sys
import time

ARMS = ("dynamic", "static", "static_compiled", "snapkv", "knorm")


def load(request: dict):
    """The model of a Hugging Face directory, and the versions that it runs under."""
    import torch
    import transformers

    torch.set_num_threads(request["threads"])
    device = "cuda" if request["device"] == "gpu" and torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=getattr(torch, request["dtype"])
    )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if request["peer"] == "kvpress":
        import importlib.metadata

        versions["kvpress"] = importlib.metadata.version("kvpress")
    about = {"versions": versions, "device": device, "threads": torch.get_num_threads()}
    return model.eval().to(device), about


def press_of(request: dict):
    """The press of a kvpress arm, at our budget and interval."""
    import kvpress

    base = {
        "snapkv": lambda: kvpress.SnapKVPress(
            window_size=request["window"], kernel_size=request["kernel"]
        ),
        "knorm": kvpress.KnormPress,
    }[request["arm"]]()
    return kvpress.DecodingPress(
        base_press=base,
        compression_interval=request["interval"],
        target_size=request["budget"],
        hidden_states_buffer_size=request["interval"],
    )


def decode(model, forward, request: dict) -> dict:
    """Decodes `new_tokens` greedily, whatever they are; prompts are equally long."""
    import torch
    from transformers import DynamicCache, StaticCache

    def now():
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    token = torch.tensor(request["prompts"], device=model.device)
    length, new = token.shape[1], request["new_tokens"]
    press = contextlib.nullcontext()
    if request["peer"] == "kvpress":
        press = press_of(request)(model)
    if request["arm"] not in ARMS:
        raise ValueError(f"{request['arm']} is none of {', '.join(ARMS)}")
    if request["arm"].startswith("static"):
        cache = StaticCache(config=model.config, max_cache_len=length + new)
    else:
        cache = DynamicCache(config=model.config)
    drawn = []
    with torch.inference_mode(), press:
        position = torch.arange(length, device=model.device)
        start = now()
        out = model(
            input_ids=token, past_key_values=cache, position_ids=position[None],
            cache_position=position, logits_to_keep=1,
        )  # fmt: skip
        drawn.append(out.logits[:, -1].argmax(-1))
        first = now()
        for i in range(length, length + new - 1):
            at = torch.tensor([i], device=model.device)
            given = {"position_ids": at[None]}
            if request["peer"] != "kvpress":  # which takes the place in its own, shorter cache
                given["cache_position"] = at
            out = forward(input_ids=drawn[-1][:, None], past_key_values=cache, **given)
            drawn.append(out.logits[:, -1].argmax(-1))
        end = now()
    return {
        "prefill_s": first - start,
        "decode_s": end - first,
        "steps": new - 1,
        "tokens": torch.stack(drawn, 1).tolist(),
        "held": cache.get_seq_length() if not request["arm"].startswith("static") else length + new,
        # Of the process, its imports and all its arms so far.
        "peak_bytes": torch.cuda.max_memory_allocated()
        if model.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    model, about = load(json.loads(sys.stdin.readline()))
    answer(about)
    compiled = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            forward = model
            if request["arm"] == "static_compiled":
                import torch

                # On a GPU with CUDA graphs, as `generate` has it.
                compiled = compiled or torch.compile(
                    model.forward,
                    mode="reduce-overhead" if model.device.type == "cuda" else None,
                    dynamic=False,
                    fullgraph=True,
                )
                forward = compiled
            answer(decode(model, forward, request))
        except Exception as error:  # an arm that fails is a result, too
            text = f"{type(error).__name__}: {error}".strip()
            answer({"error": " ".join(text.split())[:300]})


if __name__ == "__main__":
    main()
