"""Kills jobs again and again, and compares the result with an uninterrupted run.

    python -m tests.kill --kills=50 --stages=pretrain,sft,grpo,traces,evaluate --dir=DIR

Each stage runs once undisturbed, at a tiny size with a checkpoint every other step. Then the same
command is killed with SIGKILL, at random moments and during saves, until all kills are used; when a
run finishes, another one begins. After some kills a bit of the newest checkpoint is flipped, too.
Results are compared byte by byte: checkpoints (arrays, as Orbax gives its files random names, and
`info.json`) and all files but TensorBoard's, which holds the time. Metrics are logged at every
step, so they show the order of the data.
"""

import argparse
import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from fkv import files, models
from fkv.evaluation import tables
from fkv.models import ModelConfig
from fkv.runs import checkpoint
from fkv.tasks import ledger

REPOSITORY = Path(__file__).parents[1]
STAGES = ("pretrain", "sft", "variants", "grpo", "traces", "evaluate")
# Sizes of everything; a stage takes some seconds beside the start of Python and JAX.
TASK = ("task.facts=(4, 6)", "task.hops=(3, 4)", "task.remarks=(0, 1)", "task.marks=(0, 1)")
SMALL = (
    *TASK, "budget=16", "interval=8", "data.traces=16", "eval.budgets=(16,)", "eval.traces=4",
    "eval.batch=4", "eval.policies=('random',)",
)  # fmt: skip
SIZES = {
    "pretrain": (
        *TASK, "pretrain.model.width=16", "pretrain.model.layers=2", "pretrain.model.heads=2",
        "pretrain.model.kv_heads=1", "pretrain.model.head_dim=8", "pretrain.model.mlp_width=16",
        "pretrain.cycles=(60, 60)", "pretrain.warmup=2", "pretrain.log_every=1",
        "pretrain.checkpoint_every=2", "pretrain.eval_problems=8", "pretrain.eval_batch=8",
        *(f"pretrain.stages.{name}.{field}" for name in "abcd" for field in (
            "steps=30", "batch=4", "facts=(4, 6)", "hops=(3, 4)", "remarks=(0, 1)", "marks=(0, 1)",
        )),
    ),
    "sft": (
        *SMALL, "sft.steps=120", "sft.batch=2", "sft.warmup=1", "sft.log_every=1",
        "sft.checkpoint_every=2",
    ),
    "variants": (
        *SMALL, "sft.steps=120", "sft.batch=2", "sft.warmup=1", "sft.log_every=1",
        "sft.checkpoint_every=2",
        "sft.variants=('a', 'b:scorer.inputs=kv,sft.margin=1', 'c:sft.scorer_seed=1')",
    ),
    "grpo": (
        *SMALL, "grpo.steps=80", "grpo.traces=2", "grpo.rollouts=3", "grpo.log_every=1",
        "grpo.checkpoint_every=2", "grpo.eta=1e-4", "grpo.answers=4", "evaluate.new_tokens=24",
    ),
    "traces": (*SMALL, "traces.count=160", "traces.batch=4", "traces.new_tokens=48"),
    "evaluate": (
        *SMALL, "evaluate.policies=('full', 'streaming_llm')", "evaluate.budgets=(16,)",
        "evaluate.problems=500", "evaluate.batch=4", "evaluate.new_tokens=48", "evaluate.traces=4",
    ),
}  # fmt: skip


@dataclasses.dataclass
class Count:
    """Counts of one stage."""

    stage: str
    runs: int = 0
    kills: int = 0
    early: int = 0
    saving: int = 0
    damaged: int = 0
    compared: int = 0
    differ: int = 0


class Stage:
    """The command of one stage, in a directory of its own."""

    def __init__(self, name: str, home: Path, overrides: Sequence[str] = ()):
        self.name, self.home = name, home
        fields = [*SIZES[name], *overrides]
        if name != "pretrain":
            fields.append(f"model={home / 'model'}")
        if name == "grpo":
            fields.append(f"grpo.scorer={home / 'supervised' / 'run'}")
        if name == "evaluate":
            fields.append(f"evaluate.scorers=('foresight={home / 'supervised' / 'run'}',)")
        config, job = REPOSITORY / "configs" / "tiny.py", "sft" if name == "variants" else name
        self.command = [
            sys.executable, "-m", f"launch.{job}", f"--config={config}", "--workdir=run",
            *(f"--config.{field}" for field in fields),
        ]  # fmt: skip

    def start(self, where: Path) -> subprocess.Popen:
        """A process with `where` as its directory: its run is `where/run`, the same for all."""
        where.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            # As users have it: what has been compiled once is not compiled again.
            "JAX_COMPILATION_CACHE_DIR": os.environ.get(
                "JAX_COMPILATION_CACHE_DIR", str(self.home / "jax")
            ),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with (where / "log.txt").open("a") as log:
            return subprocess.Popen(
                self.command, cwd=where, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def finish(self, where: Path) -> None:
        """Runs it to its end."""
        self.check(self.start(where).wait(), where)

    def check(self, code: int, where: Path) -> None:
        """Exits if a process failed on its own."""
        if code:
            log = (where / "log.txt").read_text(errors="replace")
            sys.exit(f"{self.name} failed with code {code} in {where}:\n{log[-3000:]}")

    def progress(self, where: Path) -> int:
        """Grows when a step or part is done."""
        run = where / "run"
        if self.name == "traces":
            return len(list(run.glob("*.parquet")))
        name = "samples.jsonl" if self.name == "evaluate" else "metrics.jsonl"
        return sum(path.stat().st_size for path in run.rglob(name))


def prepare(home: Path, stages: Sequence[str]) -> None:
    """Makes what stages start from: a random decoder, and scorers of two steps."""
    config = ModelConfig(
        "qwen3", len(ledger.VOCABULARY), 16, 2, 2, 1, 8, 16, qk_norm=True, tied_embeddings=True
    )
    params = jax.device_get(models.init(jax.random.key(0), config))
    models.save(home / "model", models.LM(params, config))
    ledger.tokenizer().save_pretrained(home / "model")
    if {"grpo", "evaluate"} & set(stages):
        Stage("sft", home, ["sft.steps=2"]).finish(home / "supervised")


def kill_one(
    stage: Stage, where: Path, chance: random.Random, count: Count, patience: float
) -> bool:
    """Starts the command and kills it; False if it finished before."""
    kind = chance.choices(("early", "saving", "any"), (1, 6, 5))[0]
    before, left_over = stage.progress(where), unfinished(where / "run")
    process = stage.start(where)
    if kind == "early":
        wait(process, chance.uniform(0.5, 4.0))
    else:
        while process.poll() is None and stage.progress(where) <= before:
            time.sleep(0.002)
        wait(process, chance.uniform(0.0, patience))
        # Answers are appended in one go; what evaluation saves otherwise comes at its end.
        if kind == "saving" and (stage.name != "evaluate" or chance.random() < 0.2):
            while process.poll() is None and not unfinished(where / "run") - left_over:
                time.sleep(0.0003)
            wait(process, chance.uniform(0.0, 0.05) if chance.random() < 0.7 else 0.0)
    if process.poll() is not None:
        stage.check(process.returncode, where)
        return False
    process.kill()
    process.wait()
    count.kills += 1
    # What had been trained before is read from the file, which a run that starts trims.
    count.early += stage.progress(where) <= before
    count.saving += bool(unfinished(where / "run") - left_over)
    return True


def wait(process: subprocess.Popen, seconds: float) -> None:
    """Sleeps, but not longer than the process lives."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def unfinished(run: Path) -> set[tuple[str, int]]:
    """Names and times of unfinished files."""
    found = set()
    for path in [*run.glob("*.tmp"), *run.rglob("checkpoints/*.tmp"), *run.glob("model/*.tmp")]:
        try:
            found.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:  # saved meanwhile
            pass
    return found


def damage(run: Path, chance: random.Random) -> bool:
    """Flips a bit of the newest checkpoint, if an older one is intact."""
    root = chance.choice(sorted(run.rglob("checkpoints")) or [run / "checkpoints"])
    steps = sorted((int(p.name) for p in root.glob("*") if p.name.isdigit()), reverse=True)
    intact = [step for step in steps if not checkpoint._damage(root / str(step))]
    if len(intact) < 2 or intact != steps:
        return False
    path = chance.choice(sorted(p for p in (root / str(steps[0])).rglob("*") if p.is_file()))
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return True


def contents(run: Path) -> dict[str, bytes]:
    """The content of a run directory, as bytes by name."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        parts = path.relative_to(run).parts
        # Times differ from run to run.
        if path.is_file() and not {"tb", "checkpoints", "times.jsonl", "finished.json"} & {*parts}:
            found[name] = path.read_bytes()
    for root in sorted(run.rglob("checkpoints")):
        # A process killed while it deletes older ones leaves what is left of them.
        steps = sorted(int(p.name) for p in root.glob("*") if p.name.isdigit())
        for path in (root / str(step) for step in steps[-2:]):
            where = path.relative_to(run)
            found[f"{where}/info.json"] = (path / "info.json").read_bytes()
            state = checkpoint.load(root.parent, int(path.name)).state
            for key, leaf in jax.tree.leaves_with_path(state):
                name = f"{where}/{jax.tree_util.keystr(key)} {leaf.dtype}{leaf.shape}"
                found[name] = np.ascontiguousarray(leaf).tobytes()
    return found


def differing(one: bytes, two: bytes) -> int:
    """The number of bytes that differ, or that only one has."""
    n = min(len(one), len(two))
    a, b = (np.frombuffer(x[:n], np.uint8) for x in (one, two))
    return int((a != b).sum()) + abs(len(one) - len(two))


def compare(straight: Path, broken: Path, count: Count) -> None:
    """Adds to the count what was compared, and what differs, by name."""
    one, two = contents(straight / "run"), contents(broken / "run")
    for name in sorted({*one, *two}):
        count.compared += len(one.get(name, b""))
        if wrong := differing(one.get(name, b""), two.get(name, b"")) or (name in one) != (
            name in two
        ):
            print(f"{broken}: {name}: {wrong} bytes differ", flush=True)
            count.differ += int(wrong)


def torture(stage: Stage, kills: int, chance: random.Random, patience: float) -> Count:
    """Runs a stage undisturbed, then with so many kills, and compares."""
    count, root = Count(stage.name), stage.home / stage.name
    stage.finish(root / "straight")
    while count.kills < kills:
        where = root / f"broken_{count.runs}"
        while count.kills < kills and kill_one(stage, where, chance, count, patience):
            print(f"{stage.name}: kill {count.kills} of {kills}", flush=True)
            if chance.random() < 0.25:
                count.damaged += damage(where / "run", chance)
        stage.finish(where)
        compare(root / "straight", where, count)
        count.runs += 1
    return count


def run(
    stages: Sequence[str],
    kills: int,
    seed: int,
    home: Path,
    overrides: Sequence[str] = (),
    patience: float = 1.5,
) -> list[Count]:
    """Kills stages, `kills` times in all.

    Args:
      overrides: fields that are set in each.
      patience: a process is killed within this many seconds of its first step.
    """
    home.mkdir(parents=True, exist_ok=True)
    prepare(home, stages)
    found = []
    for i, name in enumerate(stages):
        share = kills // len(stages) + (i < kills % len(stages))
        stage = Stage(name, home, overrides)
        found.append(torture(stage, share, random.Random(f"{seed} {name}"), patience))
    return found


def table(found: Sequence[Count]) -> str:
    """In Markdown, with the sums."""
    head = ["stage", "runs", "kills", "before another step was done", "in a save",
            "checkpoints damaged", "bytes compared", "bytes that differ"]  # fmt: skip
    rows = [list(map(str, dataclasses.astuple(count))) for count in found]
    columns = [dataclasses.astuple(count)[1:] for count in found]
    sums = [str(sum(column)) for column in zip(*columns, strict=True)]
    return tables.markdown(head, [*rows, ["all", *sums]])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50, help="in all stages together")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--dir", type=files.expand, required=True, help="a new directory for the runs"
    )
    options = parser.parse_args()
    stages = options.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}: there are {', '.join(STAGES)}")
    if options.dir.exists():
        parser.error(f"{options.dir} exists already")
    print(f"seed {options.seed}", flush=True)
    found = run(stages, options.kills, options.seed, options.dir.absolute())
    print(f"\n{table(found)}")
    if any(count.differ for count in found):
        sys.exit("bytes differ")
    shutil.rmtree(options.dir)


if __name__ == "__main__":
    main()
