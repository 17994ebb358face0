"""Other implementations, beside which the benchmark runs: each a process in its own environment.

What they do there is in `fkv/evaluation/peer.py`.
"""

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path

from fkv import files
from fkv.errors import UserError
from fkv.evaluation import throughput
from fkv.runs import parallel

ARMS = {
    "transformers": ("dynamic", "static", "static_compiled"),
    "kvpress": ("snapkv", "knorm"),
}
RUNNER = Path(__file__).with_name("peer.py")


class Peer:
    """One other implementation, waiting for requests.

    Attributes:
      about: versions, device and threads, as it says itself.
    """

    def __init__(self, name: str, python: str, model: str, dtype: str):
        """Starts it and lets it load the model.

        Args:
          name: one of `ARMS`.
          python: the interpreter of its environment.
          model: a Hugging Face directory.
        """
        self.name, self.field = name, f"benchmark.peers.{name} = {python!r}"
        self._errors = tempfile.TemporaryFile("w+")
        try:
            # Isolated: neither this directory nor PYTHONPATH may shadow what it imports.
            self._process = subprocess.Popen(
                [str(files.expand(python)), "-I", str(RUNNER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            raise UserError(
                f"{self.field}: {error.strerror}; give the Python of an environment with {name}"
            ) from None
        self.about = self._ask(
            {
                "peer": name,
                "model": model,
                "dtype": dtype,
                "device": parallel.platform(),
                "threads": throughput.cores(),
            }
        )

    def decode(self, arm: str, **request) -> dict:
        """One decoding; `error` says why there is none."""
        return self._ask({"peer": self.name, "arm": arm, **request})

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):  # of what it never read
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _ask(self, request: dict) -> dict:
        with contextlib.suppress(BrokenPipeError):  # that it ended is seen below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["nothing said"]
            self.close()
            raise UserError(f"{self.field}: the peer ended: {said[-1]}")
        return json.loads(line)
