"""Scorers of a run as safetensors with a card, or in the layout of the released PyTorch code."""

from fkv.jobs import export
from launch import flags


def main(config, workdir):
    export.run(config, workdir)


if __name__ == "__main__":
    flags.run(main)
