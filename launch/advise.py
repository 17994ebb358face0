"""Advises on budgets: the smallest that keep the full cache's loss on your own traces."""

from . import app


def main(config, workdir):
    from fkv.jobs import advise

    advise.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
