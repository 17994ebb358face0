"""Sweeps on TPU pods: as `xpk` commands, as Kubernetes manifests, or for `gcloud`.

Only `submit` talks to a cluster, through xpk, Google's tool for GKE. Points that depend on each
other form one workload, which runs them as `launch.sweep` does on a laptop; workloads run in
parallel. The clone is in `/fkv` of the image and the bucket at `/fkv/runs`, so paths are the same
everywhere.
"""

import dataclasses
import hashlib
import json
import re
import shlex
import string
import subprocess
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fkv.errors import UserError
from fkv.runs import sweep

HOME = PurePosixPath("/fkv")
RUNS = "runs"
TOPOLOGIES = {  # chips of a slice
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
FAMILIES = {  # GKE's name of the chip, the runtime of its TPU VMs, xpk's smallest slice
    "v5litepod": ("tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", 8),
    "v6e": ("tpu-v6e-slice", "v2-alpha-tpuv6e", 1),
}
RESTARTS = 3  # of a preempted workload, which resumes
RESTART_ON = (42, *range(127, 256))  # exit codes, as in xpk
LONGEST = 40  # longest name that xpk accepts


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where to run; project and zone default to those of `gcloud config`."""

    tpu_type: str  # of a slice, by its chips: `v5litepod-16` (v5e), `v6e-4`
    image: str  # Docker image with the clone in /fkv
    bucket: str = ""  # of Cloud Storage; empty if `--workdir` is on a disk shared by all pods
    name: str = ""  # of the GKE cluster, for xpk
    project: str = ""
    zone: str = ""
    slices: int = 1  # per workload

    @property
    def family(self) -> str:
        return self.tpu_type.partition("-")[0]

    @property
    def chips(self) -> int:
        return int(self.tpu_type.partition("-")[2])

    @property
    def machines(self) -> int:
        """Machines of a slice in GKE, four chips each; each runs a process."""
        return max(1, self.chips // 4)

    def where(self) -> list[str]:
        """Options shared by xpk and gcloud."""
        found = {"project": self.project, "zone": self.zone}
        return [f"--{name}={value}" for name, value in found.items() if value]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Points that one slice, or several together, run in sequence, in /fkv."""

    name: str  # unique in a cluster, and the same when the sweep is resubmitted
    points: tuple[sweep.Point, ...]
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """The shell command, for any directory."""
        return f"cd {HOME} && exec {shlex.join(self.arguments)}"  # so that Python gets the signals


def check(cluster: Cluster, backend: str, root: str) -> None:
    """Refuses options that don't work with a backend, `xpk` or `tpu-vm`; errors name the option.

    Args:
      root: directory of the sweep.
    """
    on_gke, words = backend == "xpk", dataclasses.asdict(cluster) | {"workdir": root}
    words["cluster"] = words.pop("name")
    slices = words.pop("slices")
    for name, value in words.items():
        _check_printable(f"--{name}", value)
    known = [
        f"{family}-{chips}"
        for family, (_, _, smallest) in FAMILIES.items()
        for chips in TOPOLOGIES
        if not on_gke or chips >= smallest
    ]
    if cluster.tpu_type not in known:
        raise UserError(f"--tpu_type={cluster.tpu_type}: {backend} has {', '.join(known)}")
    needed = ("image", "cluster") if on_gke else ("image",)
    if missing := [name for name in needed if not words[name]]:
        raise UserError(f"--backend={backend} needs --{' and --'.join(missing)}")
    if slices < 1 or (slices > 1 and not on_gke):
        raise UserError(f"--num_slices={slices} must be 1, or more with --backend=xpk")
    path = PurePosixPath(root)
    if not cluster.bucket:
        if not path.is_absolute():
            raise UserError(
                f"--backend={backend} needs --bucket, or a --workdir=/on/a/disk that all pods "
                "share: anything written elsewhere is lost with them"
            )
        return
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+[a-z0-9]", cluster.bucket):
        raise UserError(f"--bucket={cluster.bucket}: give its name only, without gs://")
    if path.is_absolute() or ".." in path.parts or path.parts[:1] != (RUNS,):
        mount = HOME / RUNS
        raise UserError(f"--workdir={root}: --bucket is mounted at {mount}: use {RUNS}/<name>")


def _is_control(char: str) -> bool:
    """Whether a character may break a line (ending a comment), or is not allowed in YAML."""
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in "\ufffe\uffff"


def _check_printable(name: str, value: str) -> None:
    if found := next(filter(_is_control, value), None):
        raise UserError(f"{name}={value!a} has a control character ({found!a}): remove it")


def _comment(text: str) -> str:
    """The text as a one-line comment, with control characters escaped."""
    return "# " + "".join(ascii(char)[1:-1] if _is_control(char) else char for char in text)


# ---- what runs where


def workloads(
    points: Sequence[sweep.Point], root: str, common: Sequence[str], label: str, bucket: str = ""
) -> list[Workload]:
    """One workload per group of points that depend on each other, directly or not.

    Args:
      points: as `sweep.check` returns them.
      root: directory of the sweep, on the pods.
      common: options of `launch.sweep` for all points, with `--config=...`.
      label: the sweep's, such as the name of its config.
      bucket: distinguishes sweeps in different buckets.
    """
    groups: list[list[sweep.Point]] = []
    for point in points:
        joined = [group for group in groups if {p.name for p in group} & set(point.needs())]
        groups = [group for group in groups if group not in joined]
        groups.append([*(p for group in joined for p in group), point])
    found = []
    groups = [sorted(group, key=points.index) for group in groups]
    for chain in sorted(groups, key=lambda group: points.index(group[0])):
        names = ",".join(point.name for point in chain)
        options = [*common, f"--workdir={root}", f"--points={names}", "--show"]
        for option in options:
            _check_printable(*option.partition("=")[::2])
        mark = hashlib.sha256(f"{bucket}:{root}/{chain[0].name}".encode()).hexdigest()[:6]
        name = _slug(f"fkv-{label}-{chain[0].name}")[: LONGEST - 7].rstrip("-")
        arguments = ("python", "-m", "launch.sweep", *options)
        found.append(Workload(f"{name}-{mark}", tuple(chain), arguments))
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _described(workload: Workload, root: str, common: Sequence[str]) -> list[str]:
    commands = [_comment(f"  {sweep.command([x], root, common)}") for x in workload.points]
    return [f"# {workload.name} runs:", *commands]


def _fill(template: str, cluster: Cluster, **values: Any) -> str:
    """A template next to this file, without its first line, filled in for a cluster."""
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    lines = [line.partition("  # bucket") for line in text.splitlines()[1:]]
    text = "\n".join(line for line, mark, _ in lines if cluster.bucket or not mark)
    known = dataclasses.asdict(cluster) | {"machines": cluster.machines}
    return string.Template(text).safe_substitute(known | values)


# ---- xpk, on GKE


def attach_command(cluster: Cluster) -> list[str]:
    """The command that attaches the bucket to the cluster, needed once."""
    return [
        *("xpk", "storage", "attach", _slug(cluster.bucket), f"--cluster={cluster.name}"),
        *cluster.where(),
        *("--type=gcsfuse", f"--bucket={cluster.bucket}", f"--mount-point={HOME / RUNS}"),
        *("--auto-mount=false", "--readonly=false", "--size=100"),  # a bucket has no size
    ]


def xpk_command(workload: Workload, cluster: Cluster) -> list[str]:
    """The `xpk workload create` command, for xpk 1.16."""
    return [
        *("xpk", "workload", "create", f"--workload={workload.name}", f"--cluster={cluster.name}"),
        *cluster.where(),
        *(f"--tpu-type={cluster.tpu_type}", f"--num-slices={cluster.slices}"),
        *(f"--docker-image={cluster.image}", f"--max-restarts={RESTARTS}"),
        *([f"--storage={_slug(cluster.bucket)}"] if cluster.bucket else []),
        f"--command={workload.command}",
    ]


def manifest(workload: Workload, cluster: Cluster) -> str:
    """The JobSet that this command creates, as YAML; xpk's own is authoritative."""
    return _fill(
        "jobset.yaml",
        cluster,
        name=workload.name,
        command=workload.command,
        image=json.dumps(cluster.image, ensure_ascii=False),
        chips=cluster.chips // cluster.machines,
        accelerator=FAMILIES[cluster.family][0],
        topology=TOPOLOGIES[cluster.chips],
        storage=_slug(cluster.bucket),
        mount=HOME / RUNS,
        restarts=RESTARTS,
        restart_on=list(RESTART_ON),
    )


def render(found: Sequence[Workload], root: str, common: Sequence[str], cluster: Cluster) -> str:
    """Everything for xpk as one YAML stream: manifests, with the commands as comments."""
    lines = [_comment(f"directory of the sweep: {root}")]
    if cluster.bucket:
        lines += ["# once for the cluster:", _comment(shlex.join(attach_command(cluster)))]
    for workload in found:
        lines += ["---", _comment(shlex.join(xpk_command(workload, cluster)))]
        lines += [*_described(workload, root, common), manifest(workload, cluster)]
    return "\n".join(lines)


def submit(found: Sequence[Workload], cluster: Cluster) -> None:
    """Runs `xpk workload create` for every workload; xpk asks before it replaces one."""
    for i, workload in enumerate(found):
        print(f"[{i + 1}/{len(found)}] {workload.name}", flush=True)
        try:
            code = subprocess.call(xpk_command(workload, cluster))
        except FileNotFoundError:
            raise UserError(
                "xpk is not installed: pip install xpk (it needs gcloud and kubectl, too), or use "
                "--dry_run and kubectl apply"
            ) from None
        if code:
            raise UserError(
                f"xpk exited with code {code} at workload {workload.name}: see above; "
                f"{i} of {len(found)} are submitted"
            )


# ---- TPU VMs, without Kubernetes


def render_gcloud(
    found: Sequence[Workload], root: str, common: Sequence[str], cluster: Cluster
) -> str:
    """The workloads for TPU VMs, as a shell script.

    It creates a VM, starts the workload on all its machines, follows its log, and deletes the VM in
    any case.
    """
    volume = f"/mnt/{RUNS}:{HOME / RUNS}" if cluster.bucket else f"{root}:{root}"
    docker = f"sudo docker run --detach --name=fkv --privileged --net=host --workdir={HOME}"
    options, host = [f"--volume={volume}", cluster.image], cluster.image.partition("/")[0]
    if host.endswith(("pkg.dev", "gcr.io")):  # a private registry
        docker = f"sudo gcloud auth configure-docker {shlex.quote(host)} --quiet && {docker}"
    lines = [
        _comment(f"directory of the sweep: {root}"),
        "# If `create` finds no machine, `gcloud compute tpus queued-resources create` waits for",
        "# one: its options are --node-id, --accelerator-type and --runtime-version.",
    ]
    for workload in found:
        script = _fill(
            "tpu_vm.sh",
            cluster,
            name=workload.name,
            where=shlex.join(cluster.where()),
            runtime=FAMILIES[cluster.family][1],
            start=shlex.quote(f"{docker} {shlex.join([*options, *workload.arguments])}"),
        )
        lines += ["", *_described(workload, root, common), script]
    return "\n".join(lines)
