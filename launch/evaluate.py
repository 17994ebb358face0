"""Evaluation by answers and by loss, of every policy at every budget."""

from fkv.jobs import evaluate
from launch import flags


def main(config, workdir):
    evaluate.run(config, workdir)


if __name__ == "__main__":
    flags.run(main)
