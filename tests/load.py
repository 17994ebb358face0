"""Puts the server under load: many clients, some of which leave, and bodies that are none.

    python -m tests.load --requests=500 --clients=64

Every answer must be the one that its request gets alone; nothing may be lost, no row stay taken,
and the server's memory must not grow.
"""

import argparse
import asyncio
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np

import fkv
from fkv.tasks import ledger

MALFORMED = (
    b"", b"{", b"[]", b"\xff\xfe", b"[" * 10_000, b'{"model": "embedded", "prompt": NaN}',
    b'{"model": "embedded", "prompt": 3}', b'{"model": "x", "prompt": "start"}',
    b'{"model": "embedded", "prompt": "start", "n": 1e99}',
    b'{"model": "embedded", "prompt": "start", "temperature": -1}',
    b'{"model": "embedded", "prompt": "\\ud800"}', b'{"model": "embedded", "messages": []}',
)  # fmt: skip


@dataclasses.dataclass
class Ask:
    """A request, and what became of it.

    Attributes:
      body: of it.
      leaves: the share of its tokens after which its client leaves; None for the end.
      text, tokens: what came.
      first, last: seconds to the first piece and to the end.
    """

    body: dict
    leaves: float | None
    text: str | None = None
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    refused: int = 0


def asks(count: int, models: list[str], seed: int) -> list[Ask]:
    """Requests of mixed lengths, a third of which are cut off half-way."""
    rng, found = random.Random(seed), []
    for i in range(count):
        problem = ledger.problem(seed, "eval", i, ledger.Spec())
        words = " ".join(problem.prompt).split()
        body = {
            "model": rng.choice(models),
            "prompt": " ".join(words[: rng.randint(1, len(words))]),
            "max_tokens": int(min(max(rng.lognormvariate(4.3, 0.9), 1), 400)),
            "seed": i,
            "stream": i % 3 == 0 or rng.random() < 0.5,
            "temperature": rng.choice([0, 0.6, 1.0]),
            "top_p": rng.choice([0.9, 1]),
        }
        found.append(Ask(body, 0.5 if i % 3 == 0 else None))
    return found


async def ask(client: httpx.AsyncClient, one: Ask) -> None:
    """Sends a request, again while the queue is full."""
    while True:
        since, text = time.perf_counter(), []
        async with client.stream("POST", "/v1/completions", json=one.body) as response:
            if response.status_code == 429:
                one.refused += 1
                await asyncio.sleep(float(response.headers["retry-after"]) * random.random())
                continue
            assert response.status_code == 200, await response.aread()
            if not one.body["stream"]:
                reply = json.loads(await response.aread())
                one.text, one.tokens = (
                    reply["choices"][0]["text"], reply["usage"]["completion_tokens"],
                )  # fmt: skip
                one.last = time.perf_counter() - since
                return
            pieces = 0
            async for line in response.aiter_lines():
                if not line:
                    continue
                one.first = one.first or time.perf_counter() - since
                if line == "data: [DONE]":
                    one.text, one.last = "".join(text), time.perf_counter() - since
                    return
                chunk = json.loads(line.removeprefix("data: "))
                text.append(chunk["choices"][0]["text"])
                pieces += 1
                if one.leaves is not None and 16 * pieces >= one.leaves * one.body["max_tokens"]:
                    return


async def malformed(client: httpx.AsyncClient, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = await client.post("/v1/completions", content=body, headers=headers)
    assert 400 <= response.status_code < 500 and "error" in response.json(), response.text


async def run(url: str, wanted: list[Ask], clients: int, bad: int) -> float:
    """Sends all requests, so many at a time, malformed bodies in between; returns the seconds."""
    todo: asyncio.Queue = asyncio.Queue()
    every = max(1, len(wanted) // bad) if bad else 0
    for i, one in enumerate(wanted):
        todo.put_nowait(one)
        if every and i % every == 0:
            todo.put_nowait(MALFORMED[i // every % len(MALFORMED)])
    limits = httpx.Limits(max_connections=None)
    since = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def work():
            while not todo.empty():
                one = todo.get_nowait()
                await (malformed if isinstance(one, bytes) else ask)(client, one)

        await asyncio.gather(*(work() for _ in range(clients)))
    return time.perf_counter() - since


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {x.rsplit(" ", 1)[0]: float(x.rsplit(" ", 1)[1]) for x in lines if x[0] != "#"}


def resident(process: subprocess.Popen) -> float:
    """Memory of a process in MB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmRSS"))


def start(options: argparse.Namespace) -> tuple[subprocess.Popen, str]:
    command = [
        sys.executable, "-m", "launch.serve", "--config=tiny", f"--workdir={options.dir}",
        "--config.serve.port=0", f"--config.serve.rows={options.rows}",
        f"--config.serve.queue={options.queue}", "--config.serve.policies=('snapkv', 'full')",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "serving " in line:
            return process, line.split(" at ")[1].split("/v1")[0]
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--malformed", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--queue", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", default="runs/load")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server ends, too
    process, url = start(options)
    try:
        report(options, process, url)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    print(f"after SIGTERM the server ended with {code}")
    assert code == 0


def report(options: argparse.Namespace, process: subprocess.Popen, url: str) -> None:
    models = [x["id"] for x in httpx.get(f"{url}/v1/models").json()["data"]]
    # Programs are compiled, and memory settles, before anything is measured.
    first = asks(max(1, options.requests // 2), models, options.seed + 1)
    asyncio.run(run(url, first, options.clients, 20))
    before, counted = resident(process), metrics(url)
    wanted = asks(options.requests, models, options.seed)
    seconds = asyncio.run(run(url, wanted, options.clients, options.malformed))
    after, now = resident(process), metrics(url)
    for _ in range(100):  # cancelled rows are free at the next step
        if not any(value for name, value in now.items() if name.startswith("fkv_rows_in_use")):
            break
        time.sleep(0.05)
        now = metrics(url)
    taken = [x for x in now if x.startswith(("fkv_rows_in_use", "fkv_queue"))]
    assert not any(now[x] for x in taken), {x: now[x] for x in taken}

    ended = [one for one in wanted if one.leaves is None]
    lost = [one for one in ended if one.text is None]
    assert not lost, f"{len(lost)} were lost"
    alone = [dataclasses.replace(one, text=None) for one in ended]
    asyncio.run(run(url, alone, 1, 0))
    mixed = [a for a, b in zip(ended, alone, strict=True) if a.text != b.text]
    assert not mixed, f"{len(mixed)} differ from what they get alone"
    check_library(ended[:: max(1, len(ended) // 12)])

    made = sum(now[x] - counted.get(x, 0) for x in now if x.startswith("fkv_tokens_total"))
    first = np.array([one.first for one in wanted if one.first])
    print(
        f"{len(wanted)} requests of {options.clients} clients in {seconds:.1f} s, "
        f"{len(wanted) - len(ended)} of them cut off, {options.malformed} malformed bodies between "
        f"them: {len(wanted) / seconds:.1f} requests/s, {made / seconds:.0f} tokens/s; "
        f"{sum(one.refused for one in wanted)} times the queue was full"
    )
    print(
        f"time to first token: {1e3 * np.percentile(first, 50):.0f} ms (p50), "
        f"{1e3 * np.percentile(first, 99):.0f} ms (p99)"
    )
    print(
        f"{len(ended)} answers, each as alone; memory {before:.0f} MB before, {after:.0f} after, "
        f"{resident(process):.0f} after those alone; no row is taken"
    )


def check_library(some: list[Ask]) -> None:
    """Compares texts with those of `fkv.generate`."""
    model = fkv.load(dtype="float32")
    for one in some:
        policy = "full" if one.body["model"].endswith("full") else "snapkv"
        [[same]] = fkv.generate(
            model, one.body["prompt"], policy, 64, 16, one.body["max_tokens"],
            temperature=one.body["temperature"], top_p=one.body["top_p"], seed=one.body["seed"],
        )  # fmt: skip
        assert same.text == one.text, (one.body, same.text, one.text)
    print(f"{len(some)} of them are those of fkv.generate")


if __name__ == "__main__":
    main()
