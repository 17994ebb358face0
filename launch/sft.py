"""Supervised stage: train scorers on golden evictions, then compare all policies."""

from fkv.jobs import sft
from launch import flags


def main(config, workdir):
    sft.run(config, workdir)


if __name__ == "__main__":
    flags.run(main)
