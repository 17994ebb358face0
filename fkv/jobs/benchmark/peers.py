"""Decoding beside other implementations, each a process in its own environment: see `peer.py`."""

import contextlib
import dataclasses
import functools
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE

import numpy as np

from fkv import files, models, policies
from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from fkv.jobs import common
from fkv.jobs.benchmark import device
from fkv.jobs.benchmark.base import Bench, Unmeasured, measure, spread
from fkv.jobs.benchmark.device import timed
from fkv.runs import parallel

ARMS = {
    "transformers": ("dynamic", "static", "static_compiled"),
    "kvpress": ("snapkv", "knorm"),
}
GREEDY = Sampling(temperature=0.0)
RUNNER = Path(__file__).with_name("peer.py")


class Peer:
    """Another implementation, in a process that serves requests.

    Attributes:
      about: its versions, device and threads.
    """

    def __init__(self, name: str, python: str, model: str, dtype: str):
        """Starts the process, which loads the model.

        Args:
          name: one of `ARMS`.
          python: the interpreter of its environment.
          model: a Hugging Face directory.
        """
        self.name, self.field = name, f"benchmark.peers.{name} = {python!r}"
        self._errors = tempfile.TemporaryFile("w+")
        try:
            # Isolated: neither this directory nor PYTHONPATH may shadow its imports.
            self._process = subprocess.Popen(
                [str(files.expand(python)), "-I", str(RUNNER)],
                stdin=PIPE, stdout=PIPE, stderr=self._errors, text=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"{self.field}: {error.strerror}; give the Python of an environment with {name}"
            ) from None
        where = {"device": parallel.platform(), "threads": device.cores()}
        self.about = self._ask(model=model, dtype=dtype, **where)

    def ask(self, arm: str, **request) -> dict:
        """What it finds for one request, see `peer.py`.

        Raises:
          Unmeasured: the peer fails.
        """
        found = self._ask(arm=arm, **request)
        if "error" in found:
            raise Unmeasured(found["error"])
        return found

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):  # unread requests
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _ask(self, **request) -> dict:
        with contextlib.suppress(BrokenPipeError):  # its end is noticed below
            self._process.stdin.write(json.dumps({"peer": self.name, **request}) + "\n")
            self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["no message"]
            self.close()
            raise UserError(f"{self.field}: the peer ended: {said[-1]}")
        return json.loads(line)


@dataclasses.dataclass(frozen=True)
class Arm:
    """Greedy decoding by `fkv` or a peer; `arm` is the policy, or how the peer caches."""

    who: str
    arm: str
    batch: int
    prompt: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.who} {self.arm}, batch {self.batch}"


def peers(bench: Bench) -> list[dict]:
    """Decoding here and by the peers, with the same weights, prompts, lengths, dtype and cores."""
    with contextlib.ExitStack() as stack:
        others = start(bench, stack)
        return [r for batch in bench.settings.peer_batches for r in _beside(bench, others, batch)]


def start(bench: Bench, stack: contextlib.ExitStack, names: Sequence[str] = ()) -> list[Peer]:
    """Starts the peers that the config has, of these names if there are any; `stack` ends them."""
    s, config, place, others = bench.settings, bench.config, None, []
    wanted = {name: python for name, python in s.peers.items() if python}
    if names:
        wanted = {name: python for name, python in wanted.items() if name in names}
    if wanted and not s.random_weights:
        place = models.find(common.model_path(config), common.revision(config))
    if wanted and (place is None or place.is_file()):  # random weights, or of a GGUF file
        place = bench.path / "model"
        models.save(place, bench.lm)
    for name, python in wanted.items():
        common.say(f"  starting {name}")
        others.append(Peer(name, python, str(place), config.dtype))
        stack.callback(others[-1].close)
        common.say(f"    {others[-1].about}")
    return others


def _beside(bench: Bench, others: Sequence[Peer], batch: int) -> list[dict]:
    """Records of all arms at one batch."""
    s, sizes = bench.settings, (batch, bench.settings.peer_prompt, bench.settings.peer_tokens)
    prompts, snapkv = bench.tokens(batch, s.peer_prompt), policies.get("snapkv")
    request = {
        "prompts": prompts.tolist(), "new_tokens": s.peer_tokens, "budget": bench.config.budget,
        "interval": bench.interval, "window": min(snapkv.window, bench.interval),
        "kernel": snapkv.kernel,
    }  # fmt: skip
    own = {Arm("fkv", name, *sizes): bench.policy(name) for name in s.peer_policies}
    calls = {arm: functools.partial(_decode, bench, arm, prompts) for arm in own}
    for peer in others:
        for name in ARMS[peer.name]:
            call = functools.partial(peer.ask, name, **request)
            calls[Arm(peer.name, name, *sizes)] = call

    def prepare(arm):
        first = calls[arm]()  # compiles, and is not counted
        return calls[arm], {"first_call_s": first["prefill_s"] + first["decode_s"]}

    def steps(results):
        return np.array([r["decode_s"] / r["steps"] for r in results])

    def record(arm, found):
        results, step, row = found[arm], steps(found[arm]), {}
        # Times are compared with our first policy that evicts, tokens with our full cache.
        ours = next((found[a] for a in own if own[a].evicts and found[a]), None)
        full = next((found[a] for a in own if not own[a].evicts and found[a]), None)
        if ours:  # in the same repeat, so minutes apart at most
            pairs = zip(step, steps(ours), strict=False)
            row |= spread("ours_is_faster", [theirs / mine for theirs, mine in pairs])
        if full and (arm.arm == "full" or arm.who == "transformers"):
            same = np.equal(results[-1]["tokens"], full[-1]["tokens"])
            row["same_tokens"] = float(same.mean())
        return {
            **row,
            **spread("tokens_per_s", batch / step),
            "ms_per_step": 1e3 * float(np.median(step)),
            "prefill_s": float(np.median([r["prefill_s"] for r in results])),
            "held": results[-1]["held"],
        }

    return measure(bench, calls, prepare, record)


def _decode(bench: Bench, arm: Arm, prompts: np.ndarray) -> dict:
    """Greedy decoding here; returns what a peer does."""
    plan = dataclasses.replace(bench.plan(bench.config.budget), sampling=GREEDY)
    new, found, held = arm.new_tokens, [[] for _ in prompts], [0] * len(prompts)
    batcher = bench.batcher(arm.arm, plan, (*prompts.shape, new))
    bench.submit(batcher, plan, prompts, new)
    batcher.wait()

    def read():
        while batcher.waiting:
            batcher.read()
        batcher.wait()

    def write():
        steps = 0
        while batcher.live:
            for event in batcher.step():
                found[event.id] += event.tokens.tolist()
                held[event.id] = event.entries
            steps += bench.interval
        return steps

    reading, _ = timed(read)
    writing, steps = timed(write)
    return {
        "prefill_s": reading, "decode_s": writing, "steps": steps, "tokens": found,
        "held": max(held),
    }  # fmt: skip
