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
        (r"<think>\boxed{1}", None),
        (r"\boxed{1} <think> or \boxed{2}", "1"),
        (r"<think>a</think>\boxed{1}<think> or \boxed{2}", "1"),
        (r"<think>a</think>\boxed{1}<think> or \boxed{2}</think> so", "1"),
        (r"<think>a</think>\boxed{1}<think> or \boxed{2}</think>\boxed{3}", "3"),
        (r"<think> <think> \boxed{1}</think> \boxed{2}</think> \boxed{3}", "3"),
        (r"<think>\boxed{1</think>}", None),
        (r"\boxed{1}</think>\boxed{2}</think>", None),
        (r"\boxed{1}<think>a</think>\boxed{2}</think> so", None),
        # A backslash that is escaped itself escapes no brace, and a box is one after a line break.
        (r"\boxed{42\\}", r"42\\"),
        (r"\boxed{42\\\}}", r"42\\\}"),
        (r"\boxed{\\{42}}", r"\\{42}"),
        (r"x\\\boxed{5}", "5"),
        (r"\\boxed{5}", "5"),
        ("```latex\n\\boxed{5}\n```", "5"),
        (r"} \boxed{5} }", "5"),
        (r"{ \boxed{5}", "5"),
        (r"\boxed{1 \boxed{2} 3}", "2"),
        (r"\boxed{1 \boxed{2 3}", "2 3"),
        ("it is 3", None),
        (r"\boxed 3", None),
        (r"\fbox{3}", None),
        (r"\boxed", None),
        (r"boxed{3}", None),
        ("", None),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{1} and so on", None),
        (r"<think>\boxed{1}", None),
        (r"\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),  # a template that opens it, and a model too
        (r"\boxed{1}</think> \boxed{2} <think> \boxed{3}", "2"),
        ("", None),
    ],
)
def test_a_thought_that_the_prompt_opens(text, answer):
    assert last_boxed(text, opened=True) == answer
    assert check_choice(text, "2", opened=True)[1] == answer
    with Checker() as checker:
        verdict = checker.check(text, answer or "1", opened=True)
    assert verdict == (("right", answer) if answer else ("no answer", None))


@pytest.mark.parametrize(
    "prompt, question, opens",
    [
        ("<user> 1 + 1? <answer><think>\n", "1 + 1?", True),
        ("<user> 1 + 1? <answer>", "1 + 1?", False),
        ("<user> 1 + 1? <answer><think>\n\n</think>\n\n", "1 + 1?", False),
        ("<user> 1 + 1? <answer><think>\nOkay, ", "1 + 1?", True),
        # Tags in the question are words.
        ("<user> What does <think> mean? <answer>", "What does <think> mean?", False),
        ("<user> What does </think> mean? <answer><think>\n", "What does </think> mean?", True),
        ("What does <think> mean?", "What does <think> mean?", False),
        # All of the prompt is the question, where there is no template.
        ("1 + 1? <think>\n", "1 + 1? <think>\n", True),
        ("1 + 1? <think>\n", "", True),
        ("", "", False),
        ("<user> 1+1? <answer><think>\n", "1 + 1?", True),  # not as it was written
    ],
)
def test_which_prompts_open_a_thought(prompt, question, opens):
    assert math_answers.opens_thought(prompt, question) is opens


LOOPS = {
    "boxes": r"\boxed{",
    "closed boxes": r"\boxed{5} ",
    "braces": "{",
    "backslashes": "\\",
    "escapes": r"\{",
    "boxes without braces": r"\boxed ",
    "open thoughts": "<think>",
    "ended thoughts": "</think>",
    "half of a tag": "<",
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_loops_of_a_model_take_linear_time(loop):
    """As it says the same for ever: half a million characters, for which squares take hours."""
    text, start = loop * (500_000 // len(loop)), time.monotonic()
    assert last_boxed(text) == ("5" if "5" in loop else None)
    text = f"{text}</think> {text.replace('<', '')}"
    assert last_boxed(rf"\boxed{{7}} {text} \boxed{{8}} x") == "8"
    assert math_answers.chosen(text) is None
    assert math_answers._tidy(text) is not None
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("loop", ["option ", "the ", '"', " ", ".", "C) ", "and ", r"\text"])
def test_loops_in_place_of_a_letter_take_linear_time(loop):
    start = time.monotonic()
    for text in (loop * 50_000, "C" + loop * 50_000 + "x", "C) " + loop * 50_000):
        math_answers.chosen(text)
    assert time.monotonic() - start < 15


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
        (r"42\\", "42"),
        ("42", r"42\\"),
        ("1e-5", "0.00001"),
        ("0.00001", "1e-05"),
        (r"-1.2 \times 10^{-4}", "-1.2E-4"),
        ("1e5", "100000"),
        (r"10^{-7}", "0.0000001"),
        (r"\text{Eve}", r"$\text{Eve}$"),
        ("$5$", "5"),
        ("5.", "5"),
        ("5", "5."),
        (r"\$5.", "5"),
        ("-0", "0"),
        (".5", "0.50"),
        (r"10,\!000", "10000"),
        (r"5\,000", "5000"),
        (r"6.02 \times 10^{23}", "6.02e23"),
        (r"6.02\cdot10^{23}", "602000000000000000000000"),
        ("6.02*10^23", "6.02e+23"),
        ("1.5e1", "15"),
        ("1.5e1", r"\frac{30}{2}"),
        (r"\frac{1}{3}", "0.333333333"),
        ("0.3333333", "0.3333333333333333"),
        (r"70\degree", r"70^\circ"),
        (r"\frac12", r"$$\frac{1}{2}$$"),
        (r"\frac12", r"\(\frac{1}{2}\)"),
    ],
)
def test_equal_in_another_form_is_right(checker, answer, reference):
    assert checker.check(rf"so \boxed{{{answer}}}", reference) == ("right", answer)


@pytest.mark.parametrize(
    "answer, reference",
    [
        ("3", "2"),
        ("-3", "3"),
        ("-1e-7", "1e-7"),
        ("1/3", "0.5"),
        ("(1,2)", "(2,1)"),
        ("B", "A"),
        ("x+1", "x-1"),
        ("", "3"),
        ("e-5", "1e-5"),
        ("0.0000001", "0.0000002"),
        (r"2 \times 10^{-7}", "1e-7"),
        (r"1.7 \times 10^{-19}", "1.6e-19"),
        (r"10^{-18}", "1e-19"),
        ("0", "1e-19"),
        ("9007199254740992", "9007199254740993.0"),
        ("1,23", "123"),
        (r"5.\right.", "5"),
    ],
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


@pytest.mark.parametrize("swapped", [False, True])
def test_the_deadline_holds_for_long_answers_and_references(checker, swapped):
    """Also while they are read: math-verify takes minutes for this box."""
    long, start = "(" * 300_000 + "1", time.monotonic()
    answer, reference = ("3", long) if swapped else (long, "3")
    assert checker.check(r"\boxed{6/2}", "3")[0] == "right"  # it is up
    before, checker.deadline = checker.deadline, 1.0
    try:
        verdict, _ = checker.check(rf"\boxed{{{answer}}}", reference)
    finally:
        checker.deadline = before
    assert verdict in ("timeout", "failed", "wrong") and time.monotonic() - start < 20


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
        send = checker._ours.send_bytes.__func__

        def killed(most):
            def send_and_kill(ours, message):
                if len(times) < most:
                    times.append(message)
                    # Halted first, as it might be quicker with its answer than the signal.
                    os.kill(checker._process.pid, signal.SIGSTOP)
                    send(ours, message)
                    checker._process.kill()
                    checker._process.join()
                else:
                    send(ours, message)

            monkeypatch.setattr(type(checker._ours), "send_bytes", send_and_kill)

        killed(1)
        assert checker.check(r"\boxed{6/2}", "4") == ("wrong", "6/2")
        killed(3)
        assert checker.check(r"\boxed{6/2}", "3") == ("failed", "6/2") and len(times) == 3
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


LETTERS = (
    "C", "c", "(C)", "( C )", "(c)", "[C]", "C)", "c)", "C )", "C.", "C:", " C ", "{C}", r"\{C\}",
    r"\text{C}", r"\text{ C }", r"\text{C}.", r"\textbf{C}", r"\textbf{(C)}", r"\mathbf{C}",
    r"\mathrm{C}", r"\boldsymbol{C}", r"\operatorname{C}", r"\mbox{C}", r"\fbox{C}",
    r"\underline{C}", r"{\bf C}", r"\rm C", r"\displaystyle C", r"C\,", r"\,C", r"C \quad", r"C\\",
    r"\left(C\right)", r"\left( C \right)", r"\big(C\big)", "$C$", "$$C$$", r"\(C\)", r"\[C\]",
    "**C**", "**(C)**", "*C*", "_C_", "__C__", "`C`", "'C'", '"C"', "\u201cC\u201d",
    "\uff08C\uff09", "\uff23", "Option C", "option C", "Option (C)", r"\text{Option C}",
    r"\text{Option }C",
    "**Option C**", "Answer: C", "answer is C", "The answer is C", "The correct answer is (C).",
    "Final answer: C", "Correct option: C", "Choice C", "Answer: Option C",
    "C) 4 J", "(C) 4 J", "C. 4 J", "C: 4 J", "C)\n4 J", "**C) 4 J**", "**C.** 4 J",
    "Option C: 4 J", "**Option C**: 4 J", r"\text{(C) } 4 J", r"\text{C) } 4 \text{ J}",
    r"\textbf{(C)}\ 10^{-4}\ \mathrm{eV}", r"C) \frac{1}{2}", r"(C) \sqrt{2}", "C) -4 J",
    "(C) -4 J", "C) > 5 J", "C) C_2H_4", "C) vitamin B.", "C) A and B",
)  # fmt: skip
NO_LETTERS = (
    "", "D", "Carbon", "4 C", "2C", "-C", "x", "a C", "None", "not C", "Cl", "C elegans",
    "C_2H_4", "CH_4", "C_1", "C^2", "C^{*}", "C*", "C'", "C''", "C\u2032", "C\xb2",
    "C\u2082H\u2084", "\xb0C", "C%", r"C\%", "C=5", "C = 5", "C+1", "C - 1", "C-1", "C.5",
    "C(x)", "C(t) = 5", "|C|", "e^C", r"\frac{C}{2}", r"\frac{C}{D}", r"\mathbb{C}", r"\mathcal{C}",
    r"\overline{C}", r"\vec{C}", r"\mathrm{C}_2\mathrm{H}_4", r"\mathrm{CH_4}", r"\text{C}_2",
    r"\text{C}^{2+}", r"C\cdot 2", "(C)^2", "(C)_2", "(C)H_4", r"(C) \cdot 2",
    "C, D", "C,D", "C; D", "C D", "CD", "C/D", "C|D", "C & D", "C+D", "C + D", "C - D", "C-D",
    "C:D", "C: D", "C > D", "C vs D", "C...D", "C\nD", r"C\\D", r"C\quad D", "C and D", "C or D",
    r"\text{C and D}", r"\text{C}\text{ and }\text{D}", r"C\text{ or }D", r"C \to D",
    r"C\times D", r"\{C, D\}", "(C, D)", "[C, D]", "(C or D)", "(C), (D)", "(C) and (D)", "(C)(D)",
    "(C) + (D)", "(C)/(D)", "C) and D)", "C) or D)", "C) D)", "C. D.", "C (D)", "C(D)",
    "Option C and D", "Options C and D", "Option C, D", "Choice C or D", "A) C", "C, because",
)  # fmt: skip


@pytest.mark.parametrize("answer", LETTERS)
def test_letters_of_choices(answer):
    assert check_choice(rf"So \boxed{{{answer}}}.", "C") == ("right", answer.strip())
    assert check_choice(rf"So \boxed{{{answer}}}.", "D") == ("wrong", answer.strip())


@pytest.mark.parametrize("answer", NO_LETTERS)
def test_what_only_begins_with_the_letter_or_has_more_than_one_is_wrong(answer):
    assert check_choice(rf"So \boxed{{{answer}}}.", "C") == ("wrong", answer.strip())


def test_a_choice_that_is_not_boxed_is_no_answer():
    assert check_choice("It is C.", "C") == ("no answer", None)
