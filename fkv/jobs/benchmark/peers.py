"""The section about other implementations: each a process in its own environment.

What they do there is in `peer.py`.
"""

import contextlib
import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from fkv import files, models, policies
from fkv.cache.cadence import Cadence
from fkv.engine import decoding
from fkv.errors import UserError
from fkv.jobs import common
from fkv.jobs.benchmark import device
from fkv.jobs.benchmark.base import Bench, random_tokens
from fkv.runs import parallel

ARMS = {
    "transformers": ("dynamic", "static", "static_compiled"),
    "kvpress": ("snapkv", "knorm"),
}
RUNNER = Path(__file__).with_name("peer.py")


class Peer:
    """One other implementation, waiting for requests.

    Attributes:
      about: versions, device and threads, as it says itself.
    """

    def __init__(self, name: str, python: str, model: str, dtype: str):
        """Starts it and lets it load the model.

        Args:
          name: one of `ARMS`.
          python: the interpreter of its environment.
          model: a Hugging Face directory.
        """
        self.name, self.field = name, f"benchmark.peers.{name} = {python!r}"
        self._errors = tempfile.TemporaryFile("w+")
        try:
            # Isolated: neither this directory nor PYTHONPATH may shadow what it imports.
            self._process = subprocess.Popen(
                [str(files.expand(python)), "-I", str(RUNNER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            raise UserError(
                f"{self.field}: {error.strerror}; give the Python of an environment with {name}"
            ) from None
        self.about = self._ask(
            {
                "peer": name,
                "model": model,
                "dtype": dtype,
                "device": parallel.platform(),
                "threads": device.cores(),
            }
        )

    def decode(self, arm: str, **request) -> dict:
        """One decoding; `error` says why there is none."""
        return self._ask({"peer": self.name, "arm": arm, **request})

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):  # of what it never read
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _ask(self, request: dict) -> dict:
        with contextlib.suppress(BrokenPipeError):  # that it ended is seen below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["nothing said"]
            self.close()
            raise UserError(f"{self.field}: the peer ended: {said[-1]}")
        return json.loads(line)


def peers(bench: Bench) -> list[dict]:
    """Decoding here and by others: the same weights, prompts, lengths, dtype and cores."""
    s = bench.settings
    if s.random_weights:
        directory = bench.path / "model"
        models.save(directory, bench.lm)
    else:
        directory = models.find(common.model_path(bench.config), common.revision(bench.config))
    others = []
    try:
        for name, python in s.peers.items():
            if python:
                common.say(f"  starting {name}")
                others.append(Peer(name, python, str(directory), bench.config.dtype))
                common.say(f"    {others[-1].about}")
        return [r for batch in s.peer_batches for r in _beside(bench, others, batch)]
    finally:
        for peer in others:
            peer.close()


def _beside(bench: Bench, others: Sequence[Peer], batch: int) -> list[dict]:
    """Records of all arms at one batch, interleaved over the repeats."""
    s, interval = bench.settings, bench.interval
    prompts = random_tokens(bench, batch, s.peer_prompt)
    snapkv = policies.get("snapkv")
    request = {
        "prompts": prompts.tolist(), "new_tokens": s.peer_tokens, "budget": bench.config.budget,
        "interval": interval, "window": min(snapkv.window, interval), "kernel": snapkv.kernel,
    }  # fmt: skip
    calls = {
        ("fkv", name): functools.partial(_own_decode, bench, name, prompts)
        for name in s.peer_policies
    }
    for peer in others:
        for arm in ARMS[peer.name]:
            calls[(peer.name, arm)] = functools.partial(peer.decode, arm, **request)
    found = {arm: [] for arm in calls}
    errors = {}
    for repeat in range(s.repeats + 1):  # the first compiles and is not counted
        for arm, call in calls.items():
            if arm not in errors:
                common.say(f"  repeat {repeat}: {' '.join(arm)}, batch {batch}")
                result = call()
                if "error" in result:
                    errors[arm] = result["error"]
                else:
                    found[arm].append(result)
    # What generation with eviction is compared by: the first policy of ours that evicts.
    ours = next((a for a in calls if a[0] == "fkv" and bench.policy(a[1]).evicts), None)
    full = next((a for a in calls if a[0] == "fkv" and not bench.policy(a[1]).evicts), None)
    step = {a: np.array([r["decode_s"] / r["steps"] for r in found[a][1:]]) for a in calls}
    records = []
    for arm in calls:
        record = {"who": arm[0], "arm": arm[1], "batch": batch, "prompt": s.peer_prompt,
                  "new_tokens": s.peer_tokens}  # fmt: skip
        if arm in errors:
            records.append({**record, "error": errors[arm]})
            continue
        keeps_all = arm[1] == "full" or arm[0] == "transformers"
        middle, results = float(np.median(step[arm])), found[arm]
        if ours:
            ratio = step[arm] / step[ours]  # of the same repeat, so minutes apart at most
            record |= {
                "ours_is_faster": float(np.median(ratio)),
                "ours_is_faster_low": float(ratio.min()),
                "ours_is_faster_high": float(ratio.max()),
            }
        if full and keeps_all:
            same = np.array(results[-1]["tokens"]) == np.array(found[full][-1]["tokens"])
            record["same_tokens"] = float(same.mean())
        records.append(
            {
                **record,
                "tokens_per_s": batch / middle,
                "tokens_per_s_low": batch / float(step[arm].max()),
                "tokens_per_s_high": batch / float(step[arm].min()),
                "ms_per_step": 1e3 * middle,
                "prefill_s": float(np.median([r["prefill_s"] for r in results[1:]])),
                "first_call_s": results[0]["prefill_s"] + results[0]["decode_s"],
                "held": results[-1]["held"],
            }
        )
    return records


def _own_decode(bench: Bench, name: str, prompts: np.ndarray) -> dict:
    """Greedy decoding here, with what a peer answers."""
    policy, new = bench.policy(name), bench.settings.peer_tokens
    cadence = Cadence(bench.config.budget, bench.interval)
    plan = decoding.Plan(cadence, decoding.Sampling(temperature=0.0))
    batch = decoding.left_pad(prompts, bench.interval)
    keys, limit = bench.row_keys(len(prompts)), np.full(len(prompts), new, np.int32)
    start = time.perf_counter()
    state = decoding.prefill(bench.lm, policy, plan, batch, keys, limit, new)
    state = jax.block_until_ready(state)
    first = time.perf_counter()
    out, state = decoding.decode(bench.lm, policy, plan, state, batch.token_bt.shape[1], new)
    tokens = np.asarray(out)
    end = time.perf_counter()
    return {
        "prefill_s": first - start,
        "decode_s": end - first,
        "steps": tokens.shape[1],  # a multiple of L
        "tokens": tokens[:, :new].tolist(),
        "held": int((state.caches[0].position_bks >= 0).sum(-1).max()),
    }
