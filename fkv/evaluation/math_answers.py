"""Checks answers to mathematics problems, by math-verify.

Text written by a language model is untrusted and can make a parser hang, so math-verify runs in its
own process, which is killed at a deadline and restarted.
"""

import contextlib
import decimal
import json
import logging
import multiprocessing
import os
import re
import signal
import unicodedata
from collections.abc import Sequence

from fkv.errors import UserError

RIGHT, WRONG, NO_ANSWER, TIMEOUT, FAILED = "right", "wrong", "no answer", "timeout", "failed"
# A tag; a run of backslashes with the box or brace that follows; or a brace alone.
_TOKEN = re.compile(r"(</?think>)|(\\++)(?:(boxed\s*+\{)|([{}]))?|([{}])")


def opens_thought(prompt: str, question: str = "") -> bool:
    """Whether the prompt ends inside a thought, which the answer continues.

    Args:
      prompt: all of it, special tokens included.
      question: the user's part of it, in which tags are plain text.
    """
    after = prompt[prompt.rfind(question) + len(question) :] if question in prompt else ""
    opened, ended = after.rfind("<think>"), after.rfind("</think>")
    return opened > ended or (opened == ended and prompt.rstrip().endswith("<think>"))


def last_boxed(text: str, opened: bool = False) -> str | None:
    r"""Contents of the last complete `\boxed{...}` outside of thoughts, or None.

    A thought lasts from `<think>`, or from the start, to `</think>` or the end of the text. Of
    nested boxes the inner one counts. `\{` and `\}` are not braces, `\\}` is; `\boxed 5` and
    `\fbox{5}` are not boxes. Takes linear time.

    Args:
      opened: whether the prompt has opened a thought, see `opens_thought`.
    """
    # Where the contents of open braces start, -1 if they are not a box's.
    starts, last = [], None
    for token in _TOKEN.finditer(text):
        tag, slashes, box, escaped, brace = token.groups()
        if tag:
            if tag == "</think>" and not opened:  # everything before it is a thought
                last = None
            opened, starts = tag == "<think>", []
            continue
        if escaped and len(slashes) % 2 == 0:  # the backslashes are escaped, not the brace
            brace = escaped
        if opened or not (box or brace):
            continue
        if brace != "}":
            starts.append(token.end() if box else -1)
        elif starts and (start := starts.pop()) > (last[0] if last else -1):
            last = start, token.end() - 1
    return None if last is None else text[slice(*last)].strip()


# Decoration of a letter: commands with and without an argument, spaces, math mode, Markdown.
_DRESS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|it|rm|sf|tt)|boldsymbol|bm|pmb|mbox|hbox|fbox"
    r"|operatorname|emph|underline|left|right|[Bb]igg?[lr]?|bf|it|rm|sf|tt|displaystyle|large|Large"
    r")(?![A-Za-z])\s*|[{}$`]|\\[()\[\]]|\*\*"
)
_BLANK = re.compile(r"\\(?:q?quad(?![A-Za-z])|[ ,;:!\\])|[\s~]+")
_SAID = re.compile(
    r"(?:(?:(?:the|my|final|correct|right|best) )*(?:answer|option|choice|letter)\b(?: is\b)?"
    r" ?[:=]? ?)*+",
    re.IGNORECASE,
)
_LETTER = re.compile(
    r"(?:[(\[] ?([A-Za-z]) ?[)\]](?=[ .:,\d]|$)[.:]?"  # (C)
    r"|([A-Za-z])(?: ?\)|[.:](?= |$)|(?=[ .,;:!]*$)))"  # C), C. and C
    r" ?(.*)"
)
# What makes the letter part of a list or a formula, if it follows.
_MORE = re.compile(
    r"[,;/&|^_'=*]|\+(?!\d)|-(?! ?\d)|\\(?:cdot|times|land|lor|wedge|vee|to|[Rr]ightarrow)\b"
    r"|(?:and|or)\b|[(\[]? ?[A-Za-z] ?[)\]]*$",
    re.IGNORECASE,
)


def chosen(answer: str) -> str | None:
    r"""The upper-case letter of the choice that an answer names; None unless it names exactly one.

    `C`, `(C)`, `C.`, `C) 4 J`, `\text{C}`, `**C**`, `$C$` and `Option C` do; formulas (`C_2H_4`),
    words and lists (`A, B`), which only begin with a letter, do not.
    """
    text = unicodedata.normalize("NFKC", answer).replace(r"\{", "[").replace(r"\}", "]")
    text = _BLANK.sub(" ", _DRESS.sub("", text)).strip()
    for _ in range(2):
        if text[:1] + text[-1:] in ("**", "__", "''", '""', "‘’", "“”"):
            text = text[1:-1].strip()
    letter = _LETTER.match(text, _SAID.match(text).end())
    if letter is None:
        return None
    bracketed, bare, rest = letter.groups()
    rest = rest.rstrip(" .,;:!")
    return None if rest and _MORE.match(rest) else (bracketed or bare).upper()


def check_choice(text: str, reference: str, opened: bool = False) -> tuple[str, str | None]:
    """`Checker.check` for multiple choice, by the letter; see `chosen`."""
    answer = last_boxed(text, opened)
    if answer is None:
        return NO_ANSWER, None
    return (RIGHT if chosen(answer) == reference else WRONG), answer


# Decimals, in scientific notation or not: `1.6e-19`, `1.6 \times 10^{-19}`, `10^6`.
_EXPONENT = r"([+-]?[0-9]{1,4})"
_POWER = rf"10 ?\^ ?(?:{_EXPONENT}|\{{ ?{_EXPONENT} ?\}})"
_NUMBER = re.compile(
    rf"([+-]?) ?(?:{_POWER}|([0-9]*+)(?:\.([0-9]*+))?(?: ?(?:\\times|\\cdot|\*|×) ?{_POWER}"
    rf"|[eE]{_EXPONENT})?)"
)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,(?:\\!)?|\\[, ;])(?=[0-9]{3}(?![0-9]))")
_CLOSE = decimal.Decimal("1e-5")


def _number(text: str) -> decimal.Decimal | None:
    """The value of a text that is just a number, else None."""
    found = _NUMBER.fullmatch(re.sub(r"\s+", " ", _THOUSANDS.sub("", text)))
    if found is None:
        return None
    sign, *powers, whole, fraction, times, times_braced, e = found.groups()
    if any(powers):
        whole = "1"
    if not whole and not fraction:
        return None
    exponent = next(filter(None, (*powers, times, times_braced, e)), "0")
    return decimal.Decimal(f"{sign}{whole}.{fraction or ''}e{exponent}")


def _far_apart(pair: Sequence[str]) -> bool | None:
    """Whether two numbers differ by more than rounding; None to leave it to math-verify.

    It compares decimals to six places, so that all small powers of ten are equal.
    """
    one, two = map(_number, pair)
    if one is None or two is None:
        return None
    if one == two:
        return False
    with decimal.localcontext(prec=30, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX):
        return True if abs(one - two) > _CLOSE * max(abs(one), abs(two)) else None


def _tidy(text: str) -> str:
    r"""The text in a form that math-verify reads correctly.

    It reads `1e-5` as e - 5, and `42\\` and `42.` not as numbers, and compares six decimals.
    """
    text = text.strip().strip("$").rstrip("\\").strip()
    if text.endswith(".") and not text.endswith(r"\right."):
        text = text[:-1].rstrip()
    number = _number(text)
    if number is None:
        return text.replace(r"\degree", r"^\circ")
    if set(text) <= set("+-.0123456789") and (not number or number.adjusted() >= -3):
        return text
    sign, digits, power = number.as_tuple()
    return rf"{'-' * sign}{''.join(map(str, digits))} \times 10^{{{power}}}"


def _serve(connection, deadline: float) -> None:
    """Reads (answer, reference) and replies whether they are equal, until the pipe is closed."""
    os.setsid()  # leaves Ctrl-C to the parent
    import math_verify

    # It warns that its own signal-based timeouts are off: the parent has a deadline.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # JSON, as unpickling would trust a process that reads untrusted text.
    connection.send_bytes(b"ready")
    while True:
        try:
            answer, reference = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # Otherwise this process would outlive a parent that is killed meanwhile.
        signal.setitimer(signal.ITIMER_REAL, deadline + 10)
        try:
            gold = math_verify.parse(f"\\boxed{{{reference}}}", parsing_timeout=None)
            found = math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
            equal = bool(math_verify.verify(gold, found, timeout_seconds=None))
        except Exception:  # whatever the parser of untrusted text raises
            equal = None
        connection.send_bytes(json.dumps(equal).encode())
        signal.setitimer(signal.ITIMER_REAL, 0)


class Checker(contextlib.AbstractContextManager):
    """Checks answers in a process that is killed at the deadline (seconds); close it after use."""

    def __init__(self, deadline: float = 10.0):
        self.deadline = deadline
        self._process = None

    def __exit__(self, *_):
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.deadline), daemon=True)
        self._process.start()
        theirs.close()
        try:
            if self._ours.poll(120) and self._ours.recv_bytes() == b"ready":
                return
        except EOFError:
            pass
        self.close()
        raise UserError("math-verify can't be started: pip install math-verify")

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._ours.close()
            self._process = None

    def check(self, text: str, reference: str, opened: bool = False) -> tuple[str, str | None]:
        """The verdict on a text, and the answer found in it.

        Args:
          opened: whether the prompt has opened a thought, see `opens_thought`.

        Returns:
          `right`, `wrong`, `no answer` (nothing boxed), `timeout` or `failed` (the parser raised),
          and the contents of the box.
        """
        answer = last_boxed(text, opened)
        if answer is None:
            return NO_ANSWER, None
        pair = [_tidy(answer), _tidy(reference)]
        far = False if pair[0] == pair[1] else _far_apart(pair)
        if far is not None:
            return (WRONG if far else RIGHT), answer
        # A scheduler's SIGTERM ends the process, too: only a second crash counts as failed.
        return self._ask(pair) or self._ask(pair) or FAILED, answer

    def _ask(self, pair: Sequence[str]) -> str | None:
        """The process's verdict; None if it crashes."""
        if self._process is None or not self._process.is_alive():
            self.close()
            self._start()
        verdict = None
        try:
            self._ours.send_bytes(json.dumps(pair).encode())
            if self._ours.poll(self.deadline):
                return {b"true": RIGHT, b"false": WRONG}.get(self._ours.recv_bytes(), FAILED)
            verdict = TIMEOUT
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass
        self.close()
        return verdict
