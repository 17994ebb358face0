"""Serves a model under eviction policies to clients of OpenAI's API."""

from . import app


def main(config, workdir):
    from fkv.jobs import serve

    serve.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
