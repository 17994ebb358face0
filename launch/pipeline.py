"""All stages in one directory: supervised scorers, reinforcement, answers of every policy."""

from fkv.jobs import pipeline
from launch import flags


def main(config, workdir):
    pipeline.run(config, workdir)


if __name__ == "__main__":
    flags.run(main)
