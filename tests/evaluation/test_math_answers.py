"""What counts as an answer, and a checker that nothing in an answer can stop."""

import json
import multiprocessing
import os
import signal
import sys
import time

import pytest

from fkv.errors import UserError
from fkv.evaluation import math_answers
from fkv.evaluation.math_answers import Checker, check_choice, last_boxed

TOWER = r"\boxed{9^{9^{9^{9}}}}"  # no computer writes this number out


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{3}.", "3"),
        (r"\boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a^{2}}{b}}} and then }", r"\sqrt{\frac{a^{2}}{b}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{[0, 1\}} x", r"[0, 1\}"),
        (r"first \boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed {4}", "4"),
        ("\\boxed\n{4}", "4"),
        (r"\boxed{}", ""),
        # The last complete one, since an answer may be cut off anywhere.
        (r"\boxed{1} but \boxed{2", "1"),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{\boxed{5}}", "5"),
        # What is thought is not answered.
        (r"<think>\boxed{1}</think> it is \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> it is 2", None),
        (r"\boxed{1}</think>\boxed{2}</think>\boxed{3}", "3"),
        (r"<think>\boxed{1}", "1"),
        ("it is 3", None),
        (r"\boxed 3", None),
        (r"boxed{3}", None),
        ("", None),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


def children():
    return {p.pid for p in multiprocessing.active_children()}


@pytest.fixture(scope="module")
def checker():
    with Checker(deadline=60.0) as checker:  # the machine may be busy; nothing here takes long
        yield checker


@pytest.mark.parametrize(
    "answer, reference",
    [
        ("1/2", r"\frac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        (r"\dfrac12", "1/2"),
        (r"\frac{1}{2}", "0.5"),
        ("x^2 + 2x + 1", "(x+1)^2"),
        ("1,234", "1234"),
        ("1234", "1,234"),
        ("033", "33"),
        ("33.0", "33"),
        (r"\{2, 1\}", r"\{1, 2\}"),
        (r"\text{A}", "A"),
        (r"3\text{ apples}", "3"),
        ("3", " 3 "),
    ],
)
def test_equal_in_another_form_is_right(checker, answer, reference):
    assert checker.check(rf"so \boxed{{{answer}}}", reference) == ("right", answer)


@pytest.mark.parametrize(
    "answer, reference",
    [("3", "2"), ("1/3", "0.5"), ("(1,2)", "(2,1)"), ("B", "A"), ("x+1", "x-1"), ("", "3")],
)
def test_another_value_is_wrong(checker, answer, reference):
    assert checker.check(rf"so \boxed{{{answer}}}", reference) == ("wrong", answer)


def test_no_box_is_no_answer(checker):
    assert checker.check("so it is 3", "3") == ("no answer", None)
    assert checker.check(r"\boxed{3}</think> so it is 3", "3") == ("no answer", None)


@pytest.mark.parametrize(
    "answer",
    [
        r"%%% \frac{}{} \\\\ & ^ _",
        "(" * 30 + "1",
        r"\left( \begin{matrix} 1 & 2 \\",
        "\x00\x01 \ud800 \N{SNOWMAN}",
        r"\undefined{x}_{_{_}}",
        r"\text{" + "word " * 200 + "}",
        "__import__('os').abort()",
    ],
)
def test_garbage_is_never_right_and_never_raises(checker, answer):
    text = r"\boxed{" + answer + "}"
    verdict, found = checker.check(text, "3")
    assert verdict in ("wrong", "failed", "no answer") and found == last_boxed(text)
    assert checker.check(r"\boxed{6/2}", "3")[0] == "right"


def test_an_answer_that_takes_for_ever_is_given_up():
    before = children()
    with Checker(deadline=60.0) as checker:
        assert checker.check(r"\boxed{6/2}", "3") == ("right", "6/2")  # it is up
        (pid,) = children() - before
        checker.deadline = 1.0
        start = time.monotonic()
        assert checker.check(TOWER, "3") == ("timeout", "9^{9^{9^{9}}}")
        assert 1 <= time.monotonic() - start < 5
        assert not os.path.exists(f"/proc/{pid}") or sys.platform != "linux"  # not left computing
        # A new process takes its place.
        checker.deadline = 60.0
        assert checker.check(r"\boxed{6/2}", "3") == ("right", "6/2")
        (other,) = children() - before
        assert other != pid
    assert children() == before


def test_a_crash_is_survived():
    before = children()
    with Checker(deadline=60.0) as checker:
        checker.check(r"\boxed{1/3}", "3")
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        assert checker.check(r"\boxed{6/2}", "3") == ("right", "6/2")
        assert checker.check(r"\boxed{6/2}", "3") == ("right", "6/2")
        assert checker.check(r"\boxed{6/2}", "4") == ("wrong", "6/2")
    assert children() == before


def test_a_signal_is_not_taken_for_a_wrong_answer(monkeypatch):
    """One that comes while the answer is being checked; but what crashes it twice has failed."""
    before, times = children(), []
    with Checker(deadline=60.0) as checker:
        checker.check(r"\boxed{1/3}", "3")
        poll = checker._ours.poll.__func__

        def killed_once(ours, seconds):
            if len(times) < 1:
                times.append(seconds)
                checker._process.terminate()
                checker._process.join()
            return poll(ours, seconds)

        monkeypatch.setattr(type(checker._ours), "poll", killed_once)
        assert checker.check(r"\boxed{6/2}", "4") == ("wrong", "6/2") and times

        def killed(ours, seconds):
            if seconds == checker.deadline:  # and not while it starts
                checker._process.terminate()
                checker._process.join()
            return poll(ours, seconds)

        monkeypatch.setattr(type(checker._ours), "poll", killed)
        assert checker.check(r"\boxed{6/2}", "3") == ("failed", "6/2")
    assert children() == before


def test_it_does_not_outlive_a_killed_parent():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=math_answers._serve, args=(theirs, -9.0), daemon=True)
    process.start()
    theirs.close()
    assert ours.recv_bytes() == b"ready"
    assert os.getpgid(process.pid) != os.getpgid(0)  # Ctrl-C goes to a group of processes
    ours.send_bytes(json.dumps(["6/2", "3"]).encode())
    assert ours.recv_bytes() == b"true"
    ours.send_bytes(json.dumps(["9^{9^{9^{9}}}", "3"]).encode())  # for ever, and nobody waits
    process.join(30)
    process.kill()
    assert process.exitcode == -signal.SIGALRM


def test_no_process_before_it_is_needed_and_none_after():
    before = children()
    with Checker() as checker:
        assert checker.check(r"\boxed{3}", "3") == ("right", "3")  # the same text
        assert checker.check("3", "3") == ("no answer", None)
        assert children() == before
    checker.close()  # twice is no error


def test_math_verify_that_cannot_be_loaded(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('none here')")
    monkeypatch.syspath_prepend(tmp_path)
    before = children()
    with pytest.raises(UserError, match="pip install math-verify"):
        Checker().check(r"\boxed{1/3}", "3")
    assert children() == before


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{C}", ("right", "C")),
        (r"\boxed{c}", ("right", "c")),
        (r"\boxed{(C)}", ("right", "(C)")),
        (r"\boxed{C) 4 J}", ("right", "C) 4 J")),
        (r"\boxed{\text{C}}", ("right", r"\text{C}")),
        (r"\boxed{\textbf{(C)}}", ("right", r"\textbf{(C)}")),
        (r"\boxed{B}", ("wrong", "B")),
        (r"\boxed{Carbon}", ("wrong", "Carbon")),
        (r"\boxed{4 C}", ("wrong", "4 C")),
        (r"\boxed{}", ("wrong", "")),
        ("It is C.", ("no answer", None)),
    ],
)
def test_letters_of_choices(text, found):
    assert check_choice(text, "C") == found
