"""A sweep on TPU pods: what to submit, as `xpk` commands, as Kubernetes manifests, or for `gcloud`.

Nothing here talks to a cluster but `submit`, which runs xpk (Google's tool for GKE clusters).
Points that need each other go into one workload, which works them off as `launch.sweep` does on a
laptop; workloads run at the same time. A workload has the clone in `/fkv` of its image and the
bucket mounted at `/fkv/runs`, so that paths mean the same there as here.
"""

import dataclasses
import hashlib
import re
import shlex
import subprocess
import unicodedata
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from fkv.errors import UserError
from fkv.runs import sweep

HOME = PurePosixPath("/fkv")
RUNS = "runs"
TOPOLOGIES = {  # chips of a slice
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
FAMILIES = {  # what GKE calls the chip, the runtime of its TPU VMs, the smallest slice for xpk
    "v5litepod": ("tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", 8),
    "v6e": ("tpu-v6e-slice", "v2-alpha-tpuv6e", 1),
}
RESTARTS = 3  # of a workload whose machines were taken away: it goes on where it stopped
RESTART_ON = (42, *range(127, 256))  # exit codes, as xpk has them
LONGEST = 40  # name that xpk takes


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where to run; an empty project or zone is what `gcloud config` says.

    Attributes:
      tpu_type: of a slice, named by its chips: `v5litepod-16` (v5e), `v6e-4`.
      image: Docker image with the clone in /fkv.
      bucket: of Cloud Storage, mounted at /fkv/runs; empty if `--workdir` lies on a disk that all
        pods have.
      name: of the GKE cluster, for xpk.
      slices: of each workload.
    """

    tpu_type: str
    image: str
    bucket: str = ""
    name: str = ""
    project: str = ""
    zone: str = ""
    slices: int = 1

    @property
    def family(self) -> str:
        return self.tpu_type.partition("-")[0]

    @property
    def chips(self) -> int:
        return int(self.tpu_type.partition("-")[2])

    @property
    def machines(self) -> int:
        """Of a slice in GKE, four chips each; each runs a process."""
        return max(1, self.chips // 4)

    def where(self) -> list[str]:
        """Options of xpk and gcloud alike."""
        return [
            f"--{name}={value}"
            for name, value in (("project", self.project), ("zone", self.zone))
            if value
        ]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Points that one slice, or several together, work off one after the other.

    Attributes:
      name: unique in a cluster, and the same whenever the sweep is submitted again.
      arguments: to run in /fkv.
    """

    name: str
    points: tuple[sweep.Point, ...]
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """For a shell that is somewhere else."""
        return f"cd {HOME} && exec {shlex.join(self.arguments)}"  # signals are for Python


def check(cluster: Cluster, backend: str, root: str) -> None:
    """Refuses what can't run.

    Args:
      backend: `xpk` or `tpu-vm`.
      root: directory of the sweep.

    Raises:
      UserError: names the option that is wrong or missing.
    """
    words = {"workdir": root, "cluster": cluster.name} | {
        name: getattr(cluster, name) for name in ("tpu_type", "image", "bucket", "project", "zone")
    }
    for name, value in words.items():
        _check_printable(f"--{name}", value)
    known = [
        f"{family}-{chips}"
        for family, (_, _, smallest) in FAMILIES.items()
        for chips in TOPOLOGIES
        if backend != "xpk" or chips >= smallest
    ]
    if cluster.tpu_type not in known:
        raise UserError(f"--tpu_type={cluster.tpu_type}: {backend} has {', '.join(known)}")
    needed = {"image": cluster.image} | ({"cluster": cluster.name} if backend == "xpk" else {})
    if missing := [name for name, value in needed.items() if not value]:
        raise UserError(f"--backend={backend} needs --{' and --'.join(missing)}")
    if cluster.slices < 1 or (backend == "tpu-vm" and cluster.slices > 1):
        raise UserError(f"--num_slices={cluster.slices}: 1 or, with --backend=xpk, more")
    path = PurePosixPath(root)
    if cluster.bucket:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+[a-z0-9]", cluster.bucket):
            raise UserError(f"--bucket={cluster.bucket}: give its name alone, without gs://")
        if path.is_absolute() or ".." in path.parts or path.parts[:1] != (RUNS,):
            raise UserError(
                f"--workdir={root}: with --bucket, which is mounted at {HOME / RUNS}, use "
                f"{RUNS}/<name>"
            )
    elif not path.is_absolute():
        raise UserError(
            f"--backend={backend} needs --bucket, or a --workdir=/on/a/disk that all pods have: "
            "what they write elsewhere is lost with them"
        )


def _is_control(char: str) -> bool:
    """Whether it may break a line, which ends a comment, or is none that YAML may hold."""
    # Control, surrogate, line and paragraph separator; what is no character at all.
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in "\ufffe\uffff"


def _check_printable(name: str, value: str) -> None:
    if found := next(filter(_is_control, value), None):
        raise UserError(
            f"{name}={value!a} has a control character ({found!a}): there can be none in what is "
            "submitted"
        )


def _comment(text: str) -> str:
    """The text as one line of a comment, its control characters as Python writes them."""
    return "# " + "".join(ascii(char)[1:-1] if _is_control(char) else char for char in text)


# ---- what runs where


def chains(points: Sequence[sweep.Point]) -> list[list[sweep.Point]]:
    """Points that need each other, directly or not, together; the order within stays."""
    groups: list[list[sweep.Point]] = []
    for point in points:
        needs = set(point.needs())
        joined = [group for group in groups if needs & {p.name for p in group}]
        groups = [group for group in groups if group not in joined]
        groups.append([*(p for group in joined for p in group), point])
    place = {point.name: i for i, point in enumerate(points)}
    groups = [sorted(group, key=lambda p: place[p.name]) for group in groups]
    return sorted(groups, key=lambda group: place[group[0].name])


def workloads(
    points: Sequence[sweep.Point], root: str, common: Sequence[str], label: str, bucket: str = ""
) -> list[Workload]:
    """One workload a chain.

    Args:
      points: as `sweep.check` returns them.
      root: directory of the sweep, there.
      common: options of `launch.sweep` for all points, `--config=...` among them.
      label: of the sweep, such as its config's name.
      bucket: tells sweeps in different buckets from each other.

    Raises:
      UserError: an option has a line break, which xpk does not survive, or another control
        character.
    """
    found = []
    for chain in chains(points):
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


# ---- xpk, on GKE


def attach_command(cluster: Cluster) -> list[str]:
    """Makes the bucket known to the cluster, once and for all."""
    return [
        *("xpk", "storage", "attach", _slug(cluster.bucket), f"--cluster={cluster.name}"),
        *cluster.where(),
        *("--type=gcsfuse", f"--bucket={cluster.bucket}", f"--mount-point={HOME / RUNS}"),
        # The size is a formality; a bucket has none.
        *("--auto-mount=false", "--readonly=false", "--size=100"),
    ]


def xpk_command(workload: Workload, cluster: Cluster) -> list[str]:
    """`xpk workload create`, as xpk 1.16 takes it."""
    return [
        *("xpk", "workload", "create", f"--workload={workload.name}", f"--cluster={cluster.name}"),
        *cluster.where(),
        *(f"--tpu-type={cluster.tpu_type}", f"--num-slices={cluster.slices}"),
        *(f"--docker-image={cluster.image}", f"--max-restarts={RESTARTS}"),
        *([f"--storage={_slug(cluster.bucket)}"] if cluster.bucket else []),
        f"--command={workload.command}",
    ]


def manifest(workload: Workload, cluster: Cluster) -> dict[str, Any]:
    """The JobSet that this command makes; xpk's own is what counts."""
    accelerator, _, _ = FAMILIES[cluster.family]
    label = {"xpk.google.com/workload": workload.name}
    mounts = [{"name": "dshm-2", "mountPath": "/dev/shm"}]
    volumes: list[dict] = [{"name": "dshm-2", "emptyDir": {"medium": "Memory"}}]
    pod_metadata: dict[str, Any] = {"labels": label}
    pod: dict[str, Any] = {}
    if cluster.bucket:
        storage = _slug(cluster.bucket)
        claim = {"claimName": f"{storage}-pvc", "readOnly": False}
        volumes.append({"name": f"{storage}-pv", "persistentVolumeClaim": claim})
        mounts.append({"name": f"{storage}-pv", "mountPath": str(HOME / RUNS), "readOnly": False})
        limits = {f"gke-gcsfuse/{x}-limit": "0" for x in ("cpu", "memory", "ephemeral-storage")}
        pod_metadata["annotations"] = {"gke-gcsfuse/volumes": "true", **limits}
        pod["serviceAccountName"] = "xpk-sa"
    container = {
        "name": "jax-tpu",
        "image": cluster.image,
        "securityContext": {"privileged": True},
        "command": ["bash", "-c", _Block(_SCRIPT.replace("COMMAND", workload.command))],
        "resources": {"limits": {"google.com/tpu": cluster.chips // cluster.machines}},
        "volumeMounts": mounts,
    }
    pod |= {
        "schedulerName": "default-scheduler",
        "restartPolicy": "Never",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": TOPOLOGIES[cluster.chips],
        },
        "priorityClassName": "medium",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": 30,
        "containers": [container],
        "tolerations": [{"operator": "Exists", "key": "google.com/tpu"}],
        "volumes": volumes,
    }
    # A job that failed for good ends the workload; one whose machine went away starts again.
    fatal = {
        "action": "FailJob",
        "onPodConditions": [],
        "onExitCodes": {
            "containerName": "jax-tpu",
            "operator": "NotIn",
            "values": _Row(RESTART_ON),
        },
    }
    rule = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": workload.name,
            "labels": {"kueue.x-k8s.io/queue-name": "multislice-queue", **label},
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "ttlSecondsAfterFinished": 12 * 3600,
            "failurePolicy": {"rules": [rule], "maxRestarts": RESTARTS},
            "replicatedJobs": [
                {
                    "name": "slice-job",
                    "replicas": cluster.slices,
                    "template": {
                        "spec": {
                            "parallelism": cluster.machines,
                            "completions": cluster.machines,
                            "backoffLimit": 0,
                            "podFailurePolicy": {"rules": [fatal]},
                            "template": {"metadata": pod_metadata, "spec": pod},
                        }
                    },
                }
            ],
        },
    }


# What xpk wraps a command in: it passes signals on, and the exit code.
_SCRIPT = """\
echo XPK Start: $(date);
_sigterm() (kill -SIGTERM $! 2>/dev/null;);
trap _sigterm SIGTERM;
(COMMAND) & PID=$!;
while kill -0 $PID 2>/dev/null;
    do sleep 5;
done;
wait $PID;
EXIT_CODE=$?;
echo XPK End: $(date);
echo EXIT_CODE=$EXIT_CODE;
exit $EXIT_CODE
"""


class _Block(str):
    """Text that YAML shows as it is."""


class _Row(list):
    """Numbers that YAML shows side by side."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


_Dumper.add_representer(
    _Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
)
_Dumper.add_representer(
    _Row,
    lambda dumper, row: dumper.represent_sequence("tag:yaml.org,2002:seq", row, flow_style=True),
)


def render(found: Sequence[Workload], root: str, common: Sequence[str], cluster: Cluster) -> str:
    """Everything for xpk as one YAML stream: the manifests, and in comments the commands."""
    lines = [_comment(f"directory of the sweep: {root}")]
    if cluster.bucket:
        lines += ["# once for the cluster:", _comment(shlex.join(attach_command(cluster)))]
    for workload in found:
        lines += ["---", _comment(shlex.join(xpk_command(workload, cluster)))]
        lines += _what_runs(workload, root, common)
        document = manifest(workload, cluster)
        lines.append(yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000).rstrip())
    return "\n".join(lines)


def _what_runs(workload, root, common):
    commands = [_comment(f"  {point.command(root, common)}") for point in workload.points]
    return [f"# {workload.name} runs:", *commands]


def submit(found: Sequence[Workload], cluster: Cluster) -> None:
    """Runs `xpk workload create` for every workload; xpk asks before it replaces one.

    Raises:
      UserError: xpk is missing, or refused; workloads before that one are submitted.
    """
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
                f"xpk ended with code {code} at workload {workload.name}: see above; "
                f"{i} of {len(found)} are submitted"
            )


# ---- TPU VMs, without Kubernetes


def gcloud_commands(workload: Workload, cluster: Cluster, root: str) -> list[list[str]]:
    """Creates a TPU VM, starts the workload on all its machines, follows it and deletes the VM."""
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    _, runtime, _ = FAMILIES[cluster.family]

    def on(worker, command):
        options = [*cluster.where(), f"--worker={worker}", f"--command={command}"]
        return [*tpu, "ssh", workload.name, *options]

    volume = f"/mnt/{RUNS}:{HOME / RUNS}" if cluster.bucket else f"{root}:{root}"
    docker = [
        *("sudo", "docker", "run", "--detach", "--name=fkv", "--privileged", "--net=host"),
        *(f"--volume={volume}", f"--workdir={HOME}", cluster.image, *workload.arguments),
    ]
    host = cluster.image.partition("/")[0]
    registry = f"sudo gcloud auth configure-docker {host} --quiet && "
    private = host.endswith(("pkg.dev", "gcr.io"))
    return [
        [
            *(*tpu, "create", workload.name, *cluster.where()),
            *(f"--accelerator-type={cluster.tpu_type}", f"--version={runtime}"),
            "--scopes=https://www.googleapis.com/auth/cloud-platform",
        ],
        *([on("all", _MOUNT.replace("BUCKET", cluster.bucket))] if cluster.bucket else []),
        on("all", f"{registry if private else ''}{shlex.join(docker)}"),
        on("0", "sudo docker logs --follow fkv; exit $(sudo docker wait fkv)"),
        [*tpu, "delete", workload.name, *cluster.where(), "--quiet"],
    ]


# TPU VMs come without gcsfuse.
_MOUNT = (
    'echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] '
    'https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" '
    "| sudo tee /etc/apt/sources.list.d/gcsfuse.list && "
    "curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg "
    "| sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null && "
    "sudo apt-get update && sudo apt-get install -y gcsfuse && "
    f"sudo mkdir -p /mnt/{RUNS} && sudo gcsfuse --implicit-dirs BUCKET /mnt/{RUNS}"
)


def render_gcloud(
    found: Sequence[Workload], root: str, common: Sequence[str], cluster: Cluster
) -> str:
    """The same for TPU VMs, as a shell script; the VM is deleted whatever became of it."""
    lines = [
        _comment(f"directory of the sweep: {root}"),
        "# Where `create` finds no machine, `gcloud compute tpus queued-resources create` waits",
        "# for one: its options are --node-id, --accelerator-type and --runtime-version.",
    ]
    for workload in found:
        *commands, delete = map(shlex.join, gcloud_commands(workload, cluster, root))
        lines += ["", *_what_runs(workload, root, common), " &&\n".join(commands), delete]
    return "\n".join(lines)
