"""All points of a config's sweep(), one after the other, and a table of what came out.

--config.key=value sets a field in every point. Run it again to go on: points that are done stay.
"""

import argparse
import sys
from pathlib import Path

from fkv import sweep
from fkv.errors import UserError
from fkv.jobs import common
from launch import flags


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m launch.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="configs/x.py", required=True, help="has a sweep()")
    parser.add_argument("--workdir", help="directory of the sweep (default: runs/sweep_<config>)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    options, rest = parser.parse_known_args(argv[1:])

    path = Path(options.config.partition(":")[0])
    module = flags.load_module(path)
    if not hasattr(module, "sweep"):
        raise UserError(f"config file {path} has no sweep()")
    shared = [f"--config={options.config}", *rest]
    root = options.workdir or flags.parse([argv[0], *shared])[1]
    points = sweep.check(module.sweep(), common.JOBS)
    for point in points:  # what is wrong with the last is found out before the first runs
        try:
            flags.parse(point.arguments(root, shared))
        except UserError as error:
            raise UserError(f"sweep point {point.name!r}: {error}") from None
    if options.dry_run:
        for point in points:
            print(point.command(root, shared))
        return
    failed = sweep.run_local(points, root, shared)
    print(
        f"\n{sweep.write_summary(points, root)}\n\nwritten to {root}: "
        "results.csv, summary.(csv txt md png)"
    )
    if failed:
        raise UserError(
            f"{len(failed)} of {len(points)} points did not finish "
            f"({', '.join(p.name for p in failed)}): see their log.txt in {root}, then run again"
        )


if __name__ == "__main__":
    flags.guard(main, sys.argv)
