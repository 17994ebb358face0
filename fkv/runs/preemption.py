"""Preemption: a signal is noted, and obeyed where work can be saved.

Schedulers (Slurm, Kubernetes, spot machines) send SIGTERM some seconds before they kill, Ctrl-C
sends SIGINT, and a terminal or an ssh connection that closes sends SIGHUP.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Preempted(SystemExit):
    """A job ended early, with everything saved, as the message says.

    The exit code is that of a process killed by the signal, 143 for SIGTERM: with 0 a scheduler
    would take the job for done.
    """

    def __init__(self, message: str):
        super().__init__(128 + signal.SIGTERM)
        self.message = message


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Notes the signals above; yields a function that says whether one came to this process.

    A second Ctrl-C ends the process at once. Signals ignored before, as under `nohup`, and all
    outside the main thread stay ignored. A signal not obeyed within is raised again afterwards.
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
        number = came[0] if came else signal.SIGTERM  # it may have come to another process
        say(number, f"{ended.message}; ")
        ended.code = 128 + number
        raise
    if came:
        signal.raise_signal(came[0])


def say(number: int, done: str = "") -> None:
    """Prints what ended this process, unless the terminal is gone."""
    with contextlib.suppress(OSError):
        name = signal.Signals(number).name
        print(f"ended by {name}: {done}rerun the same command to resume", flush=True)


@contextlib.contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """Installs a handler (number, frame) of the signals above that are not ignored."""
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


# Not by `preexec_fn`, which forks: JAX has threads, and warns of deadlocks.
_FOLLOW = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, which stays over execv
if os.getppid() != int(sys.argv[1]):  # it died before
    sys.exit(128 + signal.SIGTERM)
os.execv(sys.argv[2], sys.argv[2:])
"""


def following(command: Sequence[str]) -> list[str]:
    """The command of a child that gets SIGTERM when this process dies, even of SIGKILL.

    Only Linux can do this; elsewhere it is the command itself.
    """
    if sys.platform != "linux":
        return [*command]
    return [sys.executable, "-c", _FOLLOW, str(os.getpid()), *command]
