"""Scorers of a run as safetensors with a card, or in the layout of the released PyTorch code."""

from launch import app


def main(config, workdir):
    from fkv.jobs import export

    export.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
