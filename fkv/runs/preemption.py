"""Ending well when asked to: a signal is noted, and heeded where work can be saved.

Schedulers (Slurm, Kubernetes, spot machines) send SIGTERM some seconds before they kill, Ctrl-C is
SIGINT, and a terminal or an ssh connection that goes away sends SIGHUP.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Preempted(SystemExit):
    """A job ended early, with everything saved; the process exits with code 143 for SIGTERM.

    That is what a process ended by the signal has in a shell, and not 0: a scheduler must not take
    the job for done, but start it again.
    """

    def __init__(self, message: str):
        """Args: message: one line on what was saved."""
        super().__init__(128 + signal.SIGTERM)
        self.message = message


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Notes the signals that ask to end; yields what says whether one has come to this process.

    A second Ctrl-C within ends the process at once. Signals that the process was started to ignore,
    as by `nohup`, stay ignored. Outside the main thread, where Python takes no signals, none comes.
    A signal that nobody heeded within, since the work came to its end, is raised again afterwards.
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
        # Of several processes, another may have been asked.
        number = came[0] if came else signal.SIGTERM
        say(number, f"{ended.message}; ")
        ended.code = 128 + number
        raise
    if came:
        signal.raise_signal(came[0])


def say(number: int, done: str = "") -> None:
    """Says what ended this process, unless the terminal is what went away."""
    with contextlib.suppress(OSError):
        name = signal.Signals(number).name
        print(f"ended by {name}: {done}run the same command again to go on", flush=True)


@contextlib.contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """Has a function (number, frame) called for the signals that ask to end, if not ignored."""
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
    """The command of a child to which SIGTERM comes when this process dies.

    Nothing else can be told of a SIGKILL. Only Linux has this; elsewhere it is the command itself.
    """
    if sys.platform != "linux":
        return [*command]
    return [sys.executable, "-c", _FOLLOW, str(os.getpid()), *command]
