"""One answer with a bounded cache, printed as it is written."""

from fkv.jobs import generate
from launch import flags


def main(config, workdir):
    generate.run(config, workdir)


if __name__ == "__main__":
    flags.run(main)
