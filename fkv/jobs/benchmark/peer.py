"""A peer of the benchmark: greedy answers by PyTorch `transformers` or `kvpress`.

Runs in an environment of its own, started by path: it imports nothing of fkv. Requests and answers
are JSON, a line each: first what to load, then one decoding after another.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import time

# Whether an arm of `decode` has a cache of fixed size.
ARMS = {"dynamic": False, "static": True, "static_compiled": True, "snapkv": False, "knorm": False}


def load(request: dict):
    """The model of a Hugging Face directory, and the versions that it runs under."""
    import torch
    import transformers

    torch.set_num_threads(request["threads"])
    device = "cuda" if request["device"] == "gpu" and torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=getattr(torch, request["dtype"])
    )
    packages = {"torch", "transformers", request["peer"]}
    versions = {name: importlib.metadata.version(name) for name in sorted(packages)}
    about = {"versions": versions, "device": device, "threads": torch.get_num_threads()}
    return model.eval().to(device), about


def press_of(request: dict):
    """The press of a kvpress arm, at our budget and interval."""
    import kvpress

    window = {"window_size": request["window"], "kernel_size": request["kernel"]}
    snapkv = request["arm"] == "snapkv"
    return kvpress.DecodingPress(
        base_press=kvpress.SnapKVPress(**window) if snapkv else kvpress.KnormPress(),
        compression_interval=request["interval"],
        target_size=request["budget"],
        hidden_states_buffer_size=request["interval"],
    )


def decode(model, forward, request: dict) -> dict:
    """Decodes `new_tokens` greedily, past stop tokens; prompts are equally long."""
    import torch
    from transformers import DynamicCache, StaticCache

    def now():
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    token = torch.tensor(request["prompts"], device=model.device)
    length, new = token.shape[1], request["new_tokens"]
    kvpress, static = request["peer"] == "kvpress", ARMS[request["arm"]]
    press = press_of(request)(model) if kvpress else contextlib.nullcontext()
    cache = DynamicCache(config=model.config)
    if static:
        cache = StaticCache(config=model.config, max_cache_len=length + new)
    with torch.inference_mode(), press:
        position = torch.arange(length, device=model.device)
        start = now()
        out = model(
            input_ids=token, past_key_values=cache, position_ids=position[None],
            cache_position=position, logits_to_keep=1,
        )  # fmt: skip
        drawn = [out.logits[:, -1].argmax(-1)]
        first = now()
        for i in range(length, length + new - 1):
            at = torch.tensor([i], device=model.device)
            given = {"position_ids": at[None]}
            if not kvpress:  # which uses positions in its own, shorter cache
                given["cache_position"] = at
            out = forward(input_ids=drawn[-1][:, None], past_key_values=cache, **given)
            drawn.append(out.logits[:, -1].argmax(-1))
        end = now()
    return {
        "prefill_s": first - start,
        "decode_s": end - first,
        "steps": new - 1,
        "tokens": torch.stack(drawn, 1).tolist(),
        "held": length + new if static else cache.get_seq_length(),
    }


def answer(model, request: dict) -> dict:
    """Answers requests greedily by continuous batching, past stop tokens, each to its limit."""
    import transformers

    limits, found = request["limits"], {}
    config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(limits)
    )
    # By default its cache takes nearly all memory; this is room for the longest, and a page more.
    longest = max(len(prompt) + n for prompt, n in zip(request["prompts"], limits, strict=True))
    page, rows = 256, request["rows"]
    batching = transformers.ContinuousBatchingConfig(
        page_size=page, max_requests_per_batch=rows, max_batch_tokens=1024,
        num_blocks=rows * (-(-longest // page) + 1),
    )  # fmt: skip
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=batching, block=True
    ) as manager:
        start = time.perf_counter()
        asked = zip(request["prompts"], limits, strict=True)
        ids = [manager.add_request(prompt, max_new_tokens=n) for prompt, n in asked]
        while len(found) < len(ids):
            if not manager.is_running():
                raise RuntimeError("continuous batching has ended")
            one = manager.get_result(timeout=1)
            if one is not None and one.is_finished():
                found[one.request_id] = one
        seconds = time.perf_counter() - start
    if failed := [one.error for one in found.values() if one.error]:
        raise RuntimeError(failed[0])
    return {"seconds": seconds, "tokens": [found[id].generated_tokens for id in ids]}


def compiled(model):
    """Compiled as `generate` does: on a GPU with CUDA graphs."""
    import torch

    mode = "reduce-overhead" if model.device.type == "cuda" else None
    return torch.compile(model.forward, mode=mode, dynamic=False, fullgraph=True)


def main() -> None:
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(found: dict) -> None:
        print(json.dumps(found), file=answers, flush=True)

    model, about = load(json.loads(sys.stdin.readline()))
    say(about)
    forwards = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["arm"] == "static_compiled" and not forwards:
                forwards["static_compiled"] = compiled(model)
            if request["arm"] == "paged":
                say(answer(model, request))
            else:
                say(decode(model, forwards.get(request["arm"], model), request))
        except Exception as error:  # an arm that fails is a result, too
            text = f"{type(error).__name__}: {error}".strip()
            say({"error": " ".join(text.split())[:300]})


if __name__ == "__main__":
    main()
