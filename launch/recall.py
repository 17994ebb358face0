"""What policies still find: agreement with the full cache's continuations, and look-ups."""

from . import app


def main(config, workdir):
    from fkv.jobs import recall

    recall.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
