"""The model's own answers to questions, or answers that are there, as traces in Parquet."""

from fkv.jobs import traces
from launch import flags


def main(config, workdir):
    traces.run(config, workdir)


if __name__ == "__main__":
    flags.run(main)
