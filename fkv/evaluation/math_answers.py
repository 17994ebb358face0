"""Whether the answer to a mathematics problem is right, by math-verify.

Text written by a language model is untrusted and can make a parser run for ever, so math-verify
runs in a process of its own that is killed at a deadline and started anew.
"""

import decimal
import json
import logging
import multiprocessing
import os
import re
import signal
import threading
import unicodedata
from collections.abc import Sequence

from fkv.errors import UserError

RIGHT, WRONG, NO_ANSWER, TIMEOUT, FAILED = "right", "wrong", "no answer", "timeout", "failed"


_THINK = re.compile(r"</?think>")
# A run of backslashes, with the box or the brace that it belongs to; or a brace alone.
_BRACES = re.compile(r"(\\++)(?:(boxed\s*+\{)|([{}]))?|([{}])")


def opens_thought(prompt: str, question: str = "") -> bool:
    """Whether the answer to a prompt begins within a thought that the prompt has opened.

    Args:
      prompt: all of it, special tokens included.
      question: what the user wrote of it; tags in there open nothing, but at the very end.
    """
    _, found, after = prompt.rpartition(question) if question else ("", "", "")
    tags = _THINK.findall(after) if found else []
    return (tags[-1] == "<think>") if tags else prompt.rstrip().endswith("<think>")


def answered(text: str, opened: bool = False) -> list[str]:
    """The parts of a text outside of its thoughts, in order.

    A thought lasts from `<think>`, or from the start, to `</think>`; one that is not ended lasts to
    the end of the text. A `</think>` that ends none makes a thought of all before it.

    Args:
      opened: whether the prompt has opened a thought, as `opens_thought` says.
    """
    parts, start, thinking = [], 0, opened
    for tag in _THINK.finditer(text):
        if tag[0] == "<think>":
            if not thinking:
                parts.append(text[start : tag.start()])
            thinking = True
        else:
            if not thinking:
                parts.clear()
            thinking, start = False, tag.end()
    return parts if thinking else [*parts, text[start:]]


def last_boxed(text: str, opened: bool = False) -> str | None:
    r"""What is in the last complete `\boxed{...}` that is not in a thought; None without one.

    Of boxes in one another the inner counts. `\{` and `\}` are no braces, `\\}` is one. Neither
    `\boxed 5` nor `\fbox{5}` is a box. It takes time linear in the length of the text.

    Args:
      opened: whether the prompt has opened a thought, as `opens_thought` says.
    """
    for part in reversed(answered(text, opened)):
        if (found := _last_boxed(part)) is not None:
            return found
    return None


def _last_boxed(text: str) -> str | None:
    # Starts of what braces enclose, -1 for those that are no box's.
    opened, last = [], None
    for token in _BRACES.finditer(text):
        slashes, box, escaped, brace = token.groups()
        if escaped and len(slashes) % 2 == 0:  # the backslashes are escaped, not the brace
            brace = escaped
        if box:
            opened.append(token.end())
        elif brace == "{":
            opened.append(-1)
        elif brace == "}" and opened:
            start = opened.pop()
            if start >= 0 and (last is None or start > last[0]):
                last = start, token.end() - 1
    return None if last is None else text[slice(*last)].strip()


# What dresses a letter up: commands with and without an argument, blanks, mathematics, Markdown.
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
# What makes the letter a part of a list or of a formula, if it comes next.
_MORE = re.compile(
    r"[,;/&|^_'=*]|\+(?!\d)|-(?! ?\d)|\\(?:cdot|times|land|lor|wedge|vee|to|[Rr]ightarrow)\b"
    r"|(?:and|or)\b|[(\[]? ?[A-Za-z] ?[)\]]*$",
    re.IGNORECASE,
)


def chosen(answer: str) -> str | None:
    r"""The letter, upper case, of the choice that an answer names; None unless it names just one.

    `C`, `(C)`, `C.`, `C) 4 J`, `\text{C}`, `**C**`, `$C$` and `Option C` do; what only begins with
    a letter, such as a formula (`C_2H_4`), a word or a list (`A, B`), does not.
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
    """As `Checker.check`, where the answer is the letter of a choice; see `chosen`."""
    answer = last_boxed(text, opened)
    if answer is None:
        return NO_ANSWER, None
    return (RIGHT if chosen(answer) == reference else WRONG), answer


# Decimals, in scientific notation or not: `1.6e-19`, `1.6 \times 10^{-19}`, `10^6`.
_EXPONENT = r"[+-]?[0-9]{1,4}"
_POWER = rf"10 ?\^ ?(?:({_EXPONENT})|\{{ ?({_EXPONENT}) ?\}})"
_NUMBER = re.compile(
    rf"([+-]?) ?(?:{_POWER}|([0-9]*+)(?:\.([0-9]*+))?(?: ?(?:\\times|\\cdot|\*|×) ?{_POWER}"
    rf"|[eE]({_EXPONENT}))?)"
)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,(?:\\!)?|\\[, ;])(?=[0-9]{3}(?![0-9]))")
_CLOSE = decimal.Decimal("1e-5")


def _number(text: str) -> tuple[str, str, int] | None:
    """Sign, digits and power of ten of a text that is a number and nothing else."""
    found = _NUMBER.fullmatch(re.sub(r"\s+", " ", _THOUSANDS.sub("", text)))
    if found is None:
        return None
    sign, *powers, whole, fraction, times, times_braced, e = found.groups()
    exponent = int(next(filter(None, (*powers, times, times_braced, e)), 0))
    if any(powers):
        whole = "1"
    fraction = fraction or ""
    if not whole and not fraction:
        return None
    return sign, (whole + fraction).lstrip("0") or "0", exponent - len(fraction)


def _far_apart(pair: Sequence[str]) -> bool | None:
    """Whether two numbers differ by more than rounding can; None if it is for math-verify to say.

    To it decimals are equal if six places are, and so are all small powers of ten.
    """
    numbers = [_number(text) for text in pair]
    if None in numbers:
        return None
    one, two = (decimal.Decimal(f"{sign}{digits}e{power}") for sign, digits, power in numbers)
    if one == two:
        return False
    with decimal.localcontext(prec=30, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX):
        return True if abs(one - two) > _CLOSE * max(abs(one), abs(two)) else None


def _tidy(text: str) -> str:
    r"""The text as math-verify reads it right.

    To it `1e-5` is e - 5, decimals are equal if six places are, `42\\` and `42.` no numbers.
    """
    text = text.strip().strip("$").rstrip("\\").strip()
    if text.endswith(".") and not text.endswith(r"\right."):
        text = text[:-1].rstrip()
    number = _number(text)
    if number is None:
        return text.replace(r"\degree", r"^\circ")
    sign, digits, power = number
    small = digits != "0" and len(digits) + power < -2
    if not small and set(text) <= set("+-.0123456789"):
        return text
    return rf"{sign}{digits} \times 10^{{{power}}}"


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

    def check(self, text: str, reference: str, opened: bool = False) -> tuple[str, str | None]:
        """The verdict on a text, and the answer found in it.

        Args:
          opened: whether the prompt has opened a thought, as `opens_thought` says.

        Returns:
          `right`, `wrong`, `no answer` (nothing boxed), `timeout` or `failed` (the parser raised),
          and what was boxed.
        """
        answer = last_boxed(text, opened)
        if answer is None:
            return NO_ANSWER, None
        pair = [_tidy(answer), _tidy(reference)]
        if pair[0] == pair[1]:
            return RIGHT, answer
        if (far := _far_apart(pair)) is not None:
            return (WRONG if far else RIGHT), answer
        with self._lock:
            # A scheduler's SIGTERM ends the process, too: only what crashes it twice has failed.
            for _ in range(2):
                if self._process is not None and not self._process.is_alive():
                    self.close()
                if self._process is None:
                    self._start()
                try:
                    self._ours.send_bytes(json.dumps(pair).encode())
                    if not self._ours.poll(self.deadline):
                        self.close()
                        return TIMEOUT, answer
                    verdict = self._ours.recv_bytes()
                except (EOFError, BrokenPipeError, ConnectionResetError):  # it crashed
                    self.close()
                else:
                    return {b"true": RIGHT, b"false": WRONG}.get(verdict, FAILED), answer
        return FAILED, answer
