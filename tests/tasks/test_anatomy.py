"""What words are for, against a problem written by hand and against drawn ones."""

import pytest

from fkv.tasks import anatomy, ledger

# a-b-c: two hops, one mark, a fact that is never used and a carrier that never drives.
BY_HAND = ledger.Problem(
    tuple(
        "<bos> nal tel ox ; note so well ; ban dal m1 ox ; dal home mule ; "
        "ox = 3 ; mule = 9 ; cart = 1 ; boat = 2 ; start ban <think>".split()
    ),
    tuple("so ban dal m1 ox 3 3 m1 3 hmm now dal home mule 9 2".split()),
    tuple("</think> m1 3 total 2 <eos>".split()),
)


def test_roles_by_hand():
    counted = [
        ("frame", 1), ("idle fact", 4), ("remark", 4), ("fact", 9), ("fee", 16), ("frame", 3),
        ("filler", 1), ("hop", 6), ("mark", 2), ("filler", 2), ("hop", 5), ("answer", 6),
    ]  # fmt: skip
    assert list(anatomy.roles(BY_HAND)) == [role for role, n in counted for _ in range(n)]


def test_every_word_of_a_drawn_problem_has_a_role():
    for problem in ledger.problems(0, "anatomy", 0, 20, ledger.Spec()):
        words = (*problem.prompt, *problem.thought, *problem.answer)
        role = anatomy.roles(problem)
        assert len(role) == len(words) and set(role) <= set(anatomy.COLOURS)
        hops = sum(r == "hop" and w in ledger.CARRIERS for r, w in zip(role, words, strict=True))
        assert hops == sum(r == "fact" and w == ";" for r, w in zip(role, words, strict=True))
        marks = [w for r, w in zip(role, words, strict=True) if r == "mark"]
        assert tuple(marks) == problem.answer[1:-3]


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("ban dal m1 ox 3 3 m1 3 dal home mule 9 2 </think> m1 3 total 2 <eos>", None),
        ("next ban dal m1 ox 3 3 hmm m1 3 dal home mule 9 2 </think> m1 3 total 2 <eos>", None),
        ("ban dal m1 ox 3 3 m1 3 dal home ox 3 6 </think> m1 3 total 6 <eos>", 10),
        ("ban dal m1 ox 3 3", 6),
        ("ban dal m1 ox 3 3 m1 3 dal home mule 9 2 </think> m1 3 so total 2 <eos>", 16),
        ("ban dal m1 ox 3 3 m1 3 dal home mule 9 2 </think> m1 3 total 2 <eos> 2", 19),
    ],
)
def test_the_first_error(words, wrong):
    words = words.split()
    assert anatomy.first_error(words, BY_HAND) == wrong
    # What stands before the answer does not make it wrong there, nor what comes after its end.
    correct = ledger.correct(ledger.encode(words), BY_HAND)
    assert correct == (wrong in (None, 19))
    shown = anatomy.verdict("a <name>", words, BY_HAND)
    assert "a &lt;name&gt;" in shown and shown.count("#fb6a4a") == (wrong not in (None, 6))
    assert shown.count("#c7e9c0") == (len(words) if wrong is None else wrong)


def test_a_story_has_every_word():
    shown = anatomy.story(BY_HAND)
    words = (*BY_HAND.prompt, *BY_HAND.thought, *BY_HAND.answer)
    assert shown.count("<span") == len(words) + len(anatomy.COLOURS)
    assert "&lt;think&gt;" in shown and "<think>" not in shown
