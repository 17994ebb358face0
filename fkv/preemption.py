"""Ending well when the machine is taken away: SIGTERM is noted, and heeded where work can be saved.

Schedulers (Slurm, Kubernetes, spot machines) send it some seconds before they kill.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Preempted(SystemExit):
    """A job ended early, with everything saved; the process exits with code 143.

    That is what a process ended by SIGTERM has in a shell, and not 0: a scheduler must not take the
    job for done, but start it again.
    """

    def __init__(self, message: str):
        """Args: message: one line on what was saved."""
        print(f"ended by SIGTERM: {message}; run the same command again to go on", flush=True)
        super().__init__(128 + signal.SIGTERM)


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Notes SIGTERM within; yields a function that says whether it has come to this process.

    Outside the main thread, where Python takes no signals, it never comes. A signal that nobody
    heeded within, since the work came to its end, is raised again afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if came:
        signal.raise_signal(signal.SIGTERM)
