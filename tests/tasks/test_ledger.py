"""The ledger walk, against a solver that knows nothing but the words of the prompt."""

import collections
import dataclasses

import numpy as np
import pytest

from fkv.tasks import ledger

SPECS = {
    "default": ledger.Spec(),
    "small": ledger.Spec(facts=(1, 5), hops=(1, 7), remarks=(0, 1), marks=(0, 3), fillers=(0, 2)),
    "all nodes": ledger.Spec(facts=(36, 36), hops=(30, 36), remarks=(0, 9), fillers=(1, 1)),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


@dataclasses.dataclass
class Ledger:
    """What a prompt says: facts by their source (target, mark or None, carrier), and the rest."""

    facts: dict
    fees: dict
    remarks: int
    start: str


def parse(prompt):
    """Reads a prompt word by word; refuses one in which a look-up has two answers."""
    assert prompt[0] == "<bos>" and prompt[-3] == "start" and prompt[-1] == "<think>"
    read, entry = Ledger({}, {}, 0, prompt[-2]), []
    for word in prompt[1:-3]:
        if word != ";":
            entry.append(word)
            continue
        match entry:
            case ["note", _, _]:
                read.remarks += 1
            case [carrier, "=", fee]:
                assert carrier in ledger.CARRIERS and carrier not in read.fees
                read.fees[carrier] = int(fee)
            case [source, target, *mark, carrier]:
                assert source in ledger.NODES and carrier in ledger.CARRIERS
                assert source not in read.facts
                assert mark == [] or (len(mark) == 1 and mark[0] in ledger.MARKS)
                read.facts[source] = (target, mark[0] if mark else None, carrier)
            case _:
                raise AssertionError(entry)
        entry = []
    assert not entry
    return read


def solve(prompt):
    """The chain of thought without fillers, a list of words per hop, and the answer."""
    read = parse(prompt)
    hops, recall, node, total = [], [], read.start, 0
    while node != "home":
        target, mark, carrier = read.facts[node]
        total = (total + read.fees[carrier]) % 10
        words = [node, target, *([mark] if mark else []), carrier, str(read.fees[carrier])]
        hops.append([*words, str(total), *([mark, str(total)] if mark else [])])
        recall += [mark, str(total)] if mark else []
        node = target
    return hops, ["</think>", *recall, "total", str(total), "<eos>"]


def sampled(spec, count=150):
    return ledger.problems(0, "train", 0, count, spec)


@specs
def test_a_plain_solver_finds_thought_and_answer(spec):
    for problem in sampled(spec):
        hops, answer = solve(problem.prompt)
        said = [word for word in problem.thought if word not in ledger.FILLERS]
        assert said == [word for hop in hops for word in hop]
        assert list(problem.answer) == answer


@specs
def test_fillers_stand_before_hops_and_nowhere_else(spec):
    least, most = spec.fillers
    for problem in sampled(spec):
        words = list(problem.thought)
        for hop in solve(problem.prompt)[0]:
            count = next(i for i, word in enumerate(words) if word not in ledger.FILLERS)
            assert least <= count <= most
            assert words[count : count + len(hop)] == hop
            words = words[count + len(hop) :]
        assert not words


@specs
def test_sizes_are_those_of_the_spec_and_cover_it(spec):
    seen = collections.defaultdict(set)
    for problem in sampled(spec):
        read, (hops, _) = parse(problem.prompt), solve(problem.prompt)
        marks = [mark for _, mark, _ in read.facts.values() if mark]
        least, most = spec.hops
        assert min(least, len(read.facts)) <= len(hops) <= min(most, len(read.facts))
        least, most = spec.marks
        assert min(least, len(hops)) <= len(marks) <= min(most, len(hops))
        assert set(read.fees) == set(ledger.CARRIERS)
        assert len(problem.tokens) <= spec.max_tokens()
        seen["facts"].add(len(read.facts))
        seen["remarks"].add(read.remarks)
        seen["hops"].add(len(hops))
        seen["marks"].add(len(marks))
    for name in ("facts", "remarks"):
        least, most = getattr(spec, name)
        assert seen[name] == set(range(least, most + 1))
    if spec.hops[1] <= spec.facts[0]:  # no draw is cut
        for name in ("hops", "marks"):
            least, most = getattr(spec, name)
            assert seen[name] == set(range(least, most + 1))


def test_the_bound_on_the_length_is_reached():
    spec = ledger.Spec((9, 9), (7, 7), (2, 2), (3, 3), (2, 2))
    assert {len(p.tokens) for p in sampled(spec, 5)} == {spec.max_tokens()}


@specs
def test_every_node_is_left_once_and_entered_once(spec):
    for problem in sampled(spec):
        read = parse(problem.prompt)  # which refuses a source that comes twice
        targets = [target for target, _, _ in read.facts.values()]
        assert len(set(targets)) == len(targets)
        assert targets.count("home") == 1
        assert set(targets) <= {*ledger.NODES, "home"}


@specs
def test_path_facts_are_used_once_and_marks_recalled_in_order(spec):
    for problem in sampled(spec):
        read, (hops, _) = parse(problem.prompt), solve(problem.prompt)
        sources = [hop[0] for hop in hops]
        assert len(set(sources)) == len(sources)
        # Every mark is on the path, and the thought meets m1, then m2, then m3.
        listed = {mark for _, mark, _ in read.facts.values() if mark}
        on_path = [read.facts[source][1] for source in sources if read.facts[source][1]]
        assert on_path == list(ledger.MARKS[: len(listed)])
        assert list(problem.answer[1:-3:2]) == on_path


def test_path_facts_lie_anywhere_in_the_ledger():
    # The order of the entries must not give the path away.
    places = []
    for problem in sampled(SPECS["default"], 200):
        order = list(parse(problem.prompt).facts)
        path = [hop[0] for hop in solve(problem.prompt)[0]]
        places.append(order.index(path[0]) / (len(order) - 1))
    assert abs(np.mean(places) - 0.5) < 0.1
    assert min(places) == 0 and max(places) == 1


def test_same_arguments_same_problem_and_other_arguments_another():
    spec = SPECS["default"]
    one = ledger.problem(3, "eval", 5, spec)
    assert ledger.problem(3, "eval", 5, spec) == one
    assert ledger.problems(3, "eval", 4, 3, spec)[1] == one
    others = [(4, "eval", 5), (3, "train", 5), (3, "eval", 6)]
    assert len({one, *(ledger.problem(*args, spec) for args in others)}) == 4
    many = [*ledger.problems(0, "train", 0, 300, spec), *ledger.problems(0, "eval", 0, 300, spec)]
    assert len(set(many)) == 600


def test_correct():
    # `next` picks a problem with two marks at least, so that a recall can go missing.
    reference = next(p for p in sampled(SPECS["small"]) if len(p.answer) >= 8)
    thought, answer = list(reference.thought), list(reference.answer)

    def correct(words):
        return ledger.correct(ledger.encode(words), reference)

    assert correct([*thought, *answer])
    assert correct(answer)  # only the answer counts, not the way to it
    assert correct([*thought, *answer, "<pad>", "so"])  # nothing after <eos> is read
    total = answer[-2]
    wrong = str((int(total) + 1) % 10)
    assert not correct([*thought, *answer[:-2], wrong, "<eos>"])
    assert not correct([*thought, *answer[:-1]])  # no <eos>
    assert not correct([*thought, "</think>", *answer[3:]])  # the first recall is missing
    assert not correct([*thought, "</think>", *answer[3:5], *answer[1:3], *answer[5:]])  # order
    assert not correct([*thought, *answer[:-1], "so", "<eos>"])
    assert not correct([*thought, "</think>", "so", *answer[1:]])
    assert not correct([*thought, *answer[1:]])  # no </think>
    assert not correct([*thought, *answer[1:-1], "</think>", "<eos>"])
    assert not correct([*thought, "</think>", *answer])  # the first </think> ends the thought
    assert not correct([])


def test_encode_and_decode_are_inverse():
    assert len(set(ledger.VOCABULARY)) == len(ledger.VOCABULARY)
    ids = ledger.encode(ledger.VOCABULARY)
    assert ids.dtype == np.int32 and sorted(ids) == list(range(len(ledger.VOCABULARY)))
    assert tuple(ledger.decode(ids)) == ledger.VOCABULARY
    problem = sampled(SPECS["small"], 1)[0]
    words = [*problem.prompt, *problem.thought, *problem.answer]
    assert ledger.decode(problem.tokens) == words
    assert problem.tokens.dtype == np.int32 and problem.tokens[-1] == ledger.EOS
    with pytest.raises(KeyError):
        ledger.encode(["cow"])


def test_pad():
    ids, length = ledger.pad([np.array([5, 6, 7]), np.array([], int), np.array([8])], 4)
    assert ids.dtype == length.dtype == np.int32
    p = ledger.ID["<pad>"]
    assert ids.tolist() == [[5, 6, 7, p], [p, p, p, p], [8, p, p, p]]
    assert length.tolist() == [3, 0, 1]
    with pytest.raises(ValueError):  # never cut in silence
        ledger.pad([np.array([5, 6, 7])], 2)
