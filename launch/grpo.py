"""Reinforcement stage: GRPO over eviction traces, from the scorers of a supervised run."""

from fkv.jobs import grpo
from launch import flags


def main(config, workdir):
    grpo.run(config, workdir)


if __name__ == "__main__":
    flags.run(main)
