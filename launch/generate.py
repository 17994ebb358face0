"""Streams one answer, generated with a bounded cache."""

from . import app


def main(config, workdir):
    from fkv.jobs import generate

    generate.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
