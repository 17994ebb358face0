"""Supervised stage: train scorers on golden evictions, then compare all policies."""

from . import app


def main(config, workdir):
    from fkv.jobs import sft

    sft.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
