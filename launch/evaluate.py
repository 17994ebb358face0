"""Evaluates every policy at every budget, by answers and by loss."""

from . import app


def main(config, workdir):
    from fkv.jobs import evaluate

    evaluate.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
