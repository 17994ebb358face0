"""One table of every policy at every budget: answers, losses, attention retained and costs."""

from . import app


def main(config, workdir):
    from fkv.jobs import leaderboard

    leaderboard.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
