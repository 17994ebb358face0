"""Trains the embedded reasoner from scratch."""

from fkv.jobs import pretrain
from launch import flags


def main(config, workdir):
    pretrain.run(config, workdir)


if __name__ == "__main__":
    flags.run(main)
