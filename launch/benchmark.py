"""What everything costs: decoding, reading, labels, steps, against the device and others."""

from fkv.jobs import benchmark
from launch import flags


def main(config, workdir):
    benchmark.run(config, workdir)


if __name__ == "__main__":
    flags.run(main)
