"""Reinforcement stage: GRPO over eviction traces, from the scorers of a supervised run."""

from . import app


def main(config, workdir):
    from fkv.jobs import grpo

    grpo.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
