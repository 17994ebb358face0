"""Time and memory of decoding, prefill, labels and training steps, against roofline and peers."""

from . import app


def main(config, workdir):
    from fkv.jobs import benchmark

    benchmark.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
