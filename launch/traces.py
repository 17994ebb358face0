"""Writes traces as Parquet: the model's answers to questions, given answers, or plain text."""

from . import app


def main(config, workdir):
    from fkv.jobs import traces

    traces.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
