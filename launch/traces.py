"""Writes the model's own answers to questions, or given answers, as traces in Parquet."""

from . import app


def main(config, workdir):
    from fkv.jobs import traces

    traces.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
