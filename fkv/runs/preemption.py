"""Preemption: signals are recorded, and handled where work can be saved.

Schedulers (Slurm, Kubernetes, spot machines) send SIGTERM some seconds before SIGKILL, Ctrl-C sends
SIGINT, and closing a terminal or ssh connection sends SIGHUP.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Preempted(SystemExit):
    """A job that ended early, with everything saved; the message says how to resume.

    The exit code is that of a process killed by the signal, 143 for SIGTERM: with 0 a scheduler
    would consider the job done.
    """

    def __init__(self, message: str):
        super().__init__(128 + signal.SIGTERM)
        self.message = message


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Records the signals above; yields a function that tells whether this process received one.

    A second Ctrl-C ends the process at once. Signals that were ignored, as under `nohup`, stay so,
    as do all outside the main thread. A signal not handled inside is raised again on exit.
    """
    came: list[int] = []

    def note(number, _):
        if number == signal.SIGINT in came:
            raise KeyboardInterrupt
        came.append(number)

    try:
        with handled(note):
            yield lambda: bool(came)
    except Preempted as ended:
        number = came[0] if came else signal.SIGTERM  # another process may have received it
        say(number, f"{ended.message}; ")
        ended.code = 128 + number
        raise
    if came:
        signal.raise_signal(came[0])


def say(number: int, done: str = "") -> None:
    """Prints which signal ended this process, unless the terminal is gone."""
    with contextlib.suppress(OSError):
        name = signal.Signals(number).name
        print(f"ended by {name}: {done}rerun the same command to resume", flush=True)


@contextlib.contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """Installs a handler (number, frame) for those of the signals above that are not ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in ASKING}
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


# Not `preexec_fn`, which forks: JAX has threads, and warns of deadlocks.
_FOLLOW = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, kept across execv
if os.getppid() != int(sys.argv[1]):  # the parent died already
    sys.exit(128 + signal.SIGTERM)
os.execv(sys.argv[2], sys.argv[2:])
"""


def following(command: Sequence[str]) -> list[str]:
    """Wraps the command of a child so that it gets SIGTERM when this process dies, even by SIGKILL.

    On Linux only; elsewhere the command is unchanged.
    """
    if sys.platform != "linux":
        return [*command]
    return [sys.executable, "-c", _FOLLOW, str(os.getpid()), *command]
