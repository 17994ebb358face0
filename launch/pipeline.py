"""All stages in one directory: supervised scorers, reinforcement, answers of every policy."""

from . import app


def main(config, workdir):
    from fkv.jobs import pipeline

    pipeline.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
