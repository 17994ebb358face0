"""Trains the embedded reasoner from scratch."""

from . import app


def main(config, workdir):
    from fkv.jobs import pretrain

    pretrain.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
