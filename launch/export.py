"""Exports scorers as safetensors with a model card, or in the layout of the released code."""

from . import app


def main(config, workdir):
    from fkv.jobs import export

    export.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
