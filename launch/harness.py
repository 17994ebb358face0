"""Runs tasks of lm-evaluation-harness under every policy at every budget."""

from . import app


def main(config, workdir):
    from fkv.jobs import harness

    harness.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
