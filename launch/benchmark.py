"""What everything costs: decoding, reading, labels, steps, against the device and others."""

from launch import app


def main(config, workdir):
    from fkv.jobs import benchmark

    benchmark.run(config, workdir)


if __name__ == "__main__":
    app.run(main)
