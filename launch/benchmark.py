"""Decoding speed against what has been generated, policy by policy."""

from fkv.jobs import benchmark
from launch import flags


def main(config, workdir):
    benchmark.run(config, workdir)


if __name__ == "__main__":
    flags.run(main)
