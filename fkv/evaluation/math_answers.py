"""Whether the answer to a mathematics problem is right, by math-verify.

Text written by a language model is untrusted and can make a parser run for ever, so math-verify
runs in a process of its own that is killed at a deadline and started anew.
"""

import json
import logging
import multiprocessing
import os
import re
import signal
import threading

from fkv.errors import UserError

RIGHT, WRONG, NO_ANSWER, TIMEOUT, FAILED = "right", "wrong", "no answer", "timeout", "failed"


def last_boxed(text: str) -> str | None:
    r"""What is in the last complete `\boxed{...}` after `</think>`; None when there is none.

    Without a `</think>` the whole text is searched.
    """
    text = text.rsplit("</think>", 1)[-1]
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i in range(start, len(text)):
            if text[i - 1] == "\\" and text[i] in "{}":
                continue
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start:i].strip()
    return None


def check_choice(text: str, reference: str) -> tuple[str, str | None]:
    """As `Checker.check`, where the answer is a letter: `C`, `(C)`, `C) 4 J` or `\\text{C}`."""
    answer = last_boxed(text)
    if answer is None:
        return NO_ANSWER, None
    letter = re.match(r"(?:\\\w+\s*\{)?\s*\(?([A-Za-z])(?![A-Za-z])", answer)
    right = letter is not None and letter[1].upper() == reference
    return (RIGHT if right else WRONG), answer


def _serve(connection, deadline: float) -> None:
    """Answers (answer, reference) with whether they are equal, until the pipe is closed."""
    os.setsid()  # Ctrl-C is the other's to heed
    import math_verify

    # It warns that timeouts are off; they are ours, those of math-verify rest on signals.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # JSON, as unpickling what comes from a process that reads untrusted text would be trusting it.
    connection.send_bytes(b"ready")
    while True:
        try:
            answer, reference = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # Should the other have been killed meanwhile, nobody else is there to end this.
        signal.setitimer(signal.ITIMER_REAL, deadline + 10)
        try:
            gold = math_verify.parse(f"\\boxed{{{reference}}}", parsing_timeout=None)
            found = math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
            equal = bool(math_verify.verify(gold, found, timeout_seconds=None))
        except Exception:  # whatever the parser of untrusted text raises
            equal = None
        connection.send_bytes(json.dumps(equal).encode())
        signal.setitimer(signal.ITIMER_REAL, 0)


class Checker:
    """Checks answers in a process that outlives no deadline; close it, or use `with`."""

    def __init__(self, deadline: float = 10.0):
        """Args: deadline: seconds for one comparison."""
        self.deadline = deadline
        self._context = multiprocessing.get_context("spawn")
        self._process = None
        self._lock = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _start(self) -> None:
        self._ours, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_serve, args=(theirs, self.deadline), daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            started = self._ours.poll(120) and self._ours.recv_bytes() == b"ready"
        except EOFError:
            started = False
        if not started:
            self.close()
            raise UserError("math-verify can't be started: pip install math-verify")

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._ours.close()
            self._process = None

    def check(self, text: str, reference: str) -> tuple[str, str | None]:
        """The verdict on a text, and the answer found in it.

        Returns:
          `right`, `wrong`, `no answer` (nothing boxed), `timeout` or `failed` (the parser raised),
          and what was boxed.
        """
        answer = last_boxed(text)
        if answer is None:
            return NO_ANSWER, None
        if answer == reference.strip():
            return RIGHT, answer
        with self._lock:
            # A scheduler's SIGTERM ends the process, too: only what crashes it twice has failed.
            for _ in range(2):
                if self._process is not None and not self._process.is_alive():
                    self.close()
                if self._process is None:
                    self._start()
                try:
                    self._ours.send_bytes(json.dumps([answer, reference]).encode())
                    if not self._ours.poll(self.deadline):
                        self.close()
                        return TIMEOUT, answer
                    verdict = self._ours.recv_bytes()
                except (EOFError, BrokenPipeError, ConnectionResetError):  # it crashed
                    self.close()
                else:
                    return {b"true": RIGHT, b"false": WRONG}.get(verdict, FAILED), answer
        return FAILED, answer
