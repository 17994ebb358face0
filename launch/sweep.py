"""Runs all points of a config's sweep(), and tabulates the results.

In sequence, or on TPU pods (--backend). --config.key=value sets a field in every point. Points of
the supervised stage that can learn from one golden pass (see sft.variants) run as one job.
Rerun to resume: finished points are kept. A config without a sweep() is a sweep of one job.
"""

import argparse
import json
import sys
from pathlib import Path

from fkv import commands, files, recipes
from fkv.errors import UserError
from fkv.evaluation import sweeps
from fkv.jobs import common, variants
from fkv.runs import pods, rundir, sweep

from . import app, flags

MAIN_JOB = "sft"
BACKENDS = ("local", "xpk", "tpu-vm")
OPTIONS = (
    *flags.OPTIONS, "--job", "--points", "--together", "--show", "--summary", "--dry_run",
    "--backend", "--tpu_type", "--num_slices", "--image", "--bucket", "--cluster", "--project",
    "--zone",
)  # fmt: skip


def main(argv):
    try:
        options, rest = _parser().parse_known_args(argv[1:])
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (see --help)") from error
    if options.config is None:
        raise flags.no_config(rest)
    shared = [f"--config={options.config}", *rest]
    path, _ = recipes.find(options.config)
    where = [] if options.workdir is None else [f"--workdir={options.workdir}"]
    root = options.workdir or flags.parse([argv[0], *shared, *where], options=OPTIONS)[1]
    root = str(files.expand(root)) if root.startswith("~") else root
    points = sweep.check(_points(options, path), common.JOBS)
    configs = {}
    for point in points:  # all checked before the first runs
        try:
            config, _ = flags.parse(point.arguments(root, shared), options=OPTIONS)
            configs[point.name] = config
            if Path(root, point.name, sweep.DONE).exists():  # with this config?
                rundir.check_run(Path(root, point.name), config, common.other_jobs(point.job))
        except UserError as error:
            raise UserError(f"sweep point {point.name!r}: {error}") from None
    some = sweep.choose(points, options.points.split(","), root) if options.points else points
    passes = _passes({point.name: configs[point.name] for point in some if point.job == "sft"})
    if options.together:
        _together(argv, some, root, configs, passes)
    elif options.summary:
        print(sweeps.write_summary(points, root))
    elif options.backend != "local":
        _on_pods(options, some, root, shared, path.stem)
    elif options.dry_run:
        jobs = sweep.jobs(some, passes)
        print("\n".join(sweep.command(job, root, shared) for job in jobs))
    else:
        alone = some is points
        failed = sweep.run_local(some, root, shared, options.show, alone, passes)
        if some is points:  # others may be running the rest
            print(f"\n{sweeps.write_summary(points, root)}")
        if failed:
            where = "above" if options.show else f"their log.txt in {root}"
            raise UserError(
                f"{len(failed)} of {len(some)} points did not finish "
                f"({', '.join(p.name for p in failed)}): see {where}, then rerun"
            )


def _parser():
    parser = argparse.ArgumentParser(
        prog=commands.command("sweep"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--config", metavar="configs/x.py", help="with a sweep(), or the recipe of one job")
    add("--job", help=f"of a config without a sweep() (default: {MAIN_JOB})")
    add("--workdir", help="directory of the sweep (default: runs/sweep_<config>)")
    add("--points", metavar="NAME,NAME", help="only these; others may run elsewhere")
    add(
        "--together",
        action="store_true",
        help="run --points in this process, as one job; sweeps start it by themselves",
    )
    add(
        "--show",
        action="store_true",
        help="print the output of points instead of keeping it in log.txt",
    )
    add("--summary", action="store_true", help="run nothing; tabulate finished points")
    add("--dry_run", action="store_true", help="print commands or manifests only")
    add("--backend", choices=BACKENDS, default=BACKENDS[0], help="tpu-vm only prints commands")
    pod = parser.add_argument_group("on pods")
    pod.add_argument("--tpu_type", default="v6e-4", help="v5litepod-16, v6e-4 (default)...")
    pod.add_argument("--num_slices", type=int, default=1, help="per workload")
    pod.add_argument("--image", default="", help="Docker image with this clone in /fkv")
    pod.add_argument("--bucket", default="", help="of Cloud Storage, mounted at /fkv/runs")
    pod.add_argument("--cluster", default="", help="of GKE, for xpk")
    pod.add_argument("--project", default="", help="default: that of gcloud config")
    pod.add_argument("--zone", default="", help="default: that of gcloud config")
    return parser


def _points(options, path):
    module = recipes.load_module(path)
    if not hasattr(module, "sweep"):
        job = options.job or MAIN_JOB
        return [sweep.Point(job, job, {})]
    if options.job:
        raise UserError(f"--job={options.job}: {path} has a sweep(), which says what to run")
    return module.sweep()


def _passes(configs):
    """What the runs that may learn from one pass have in common, as text, by name of the point."""
    return {
        name: json.dumps(variants.shared(config))
        for name, config in configs.items()
        if not (config.sft.variants or config.dry_run)
    }


def _together(argv, points, root, configs, passes):
    """Runs points that share a pass."""
    shared = {passes.get(point.name) for point in points}
    if len(shared) > 1 or None in shared:
        raise UserError("--together: these --points can't run as one job")
    from fkv.jobs import sft

    app.begin(argv)
    sft.together({f"{root}/{point.name}": configs[point.name] for point in points}, root)


def _on_pods(options, points, root, shared, label):
    # A dry run needs no cluster.
    stand_in = "my-{}".format if options.dry_run else lambda _: ""
    cluster = pods.Cluster(
        tpu_type=options.tpu_type,
        image=options.image or stand_in("image"),
        bucket=options.bucket or ("" if Path(root).is_absolute() else stand_in("bucket")),
        name=options.cluster or stand_in("cluster"),
        project=options.project,
        zone=options.zone,
        slices=options.num_slices,
    )
    pods.check(cluster, options.backend, root)
    if cluster.machines * cluster.slices > 1:
        shared = [*shared, "--distributed"]
    again = [*shared, *([f"--job={options.job}"] if options.job else [])]
    found = pods.workloads(points, root, again, label, cluster.bucket)
    if options.backend == "tpu-vm":
        print(pods.render_gcloud(found, root, shared, cluster))
    elif options.dry_run:
        print(pods.render(found, root, shared, cluster))
    else:
        pods.submit(found, cluster)


if __name__ == "__main__":
    app.guard(main, sys.argv)
