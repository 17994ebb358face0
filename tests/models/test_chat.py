"""Chat messages, templates and thoughts."""

import pytest

pytest.importorskip("transformers")

from fkv.errors import UserError
from fkv.models import chat
from tests.models.test_texts import CHAT, IDS, make, refusal


@pytest.mark.parametrize("template", [CHAT, "<s> " + CHAT, "<s>" + CHAT])
def test_a_template_that_writes_bos_is_not_given_another(template):
    tokenizer = make(template, "<s> $A")
    for text in ("one", "<s> one", " <s>one"):
        shown = chat.render(tokenizer, text, "x")
        assert shown.count("<s>") == (template is not CHAT or "<s>" in text)
        assert "one" in shown and shown.endswith("<bot>")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "model x has no chat template"),
        ("", "model x has no chat template"),
        ("{% for", "its chat template fails (TemplateSyntaxError: "),
        ("{{ raise_exception('not\nthis') }}", "its chat template fails (TemplateError: not this)"),
        ("{{ messages[0].text.nobody }}", "its chat template fails (UndefinedError: "),
        ("{{ messages[0].content + 1 }}", "its chat template fails (TypeError: "),
        ("{{ 1 / 0 }}", "its chat template fails (ZeroDivisionError: "),
        ("null", "its output does not contain the message"),
        (
            {"tools": CHAT, "rag": CHAT},
            "none of its chat templates (tools, rag) is named 'default'",
        ),
    ],
)
def test_templates_that_fail(template, says):
    assert says in refusal(chat.render, make(template), "one", "x")


@pytest.mark.parametrize("write", ["upper", "tojson", "replace('*', 'x')", "title"])
def test_a_template_may_write_a_message_in_its_own_way(write):
    shown = chat.render(make("{{ messages[0].content | " + write + " }}"), 'is "3 * 4" 12', "x")
    assert "3" in shown and shown != 'is "3 * 4" 12'


def test_the_date_in_a_prompt_is_the_same_tomorrow():
    """As in Llama 3.2's: another prompt would be another run, and a resumed one be refused."""
    dated = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}Today Date: {{ date_string }} {{ messages[0].content }}"
    )
    assert chat.render(make(dated), "one", "x") == "Today Date: 26 Jul 2024 one"


def test_named_templates_have_a_default():
    tokenizer = make({"tools": "{{ 1 / 0 }}", "default": CHAT})
    assert chat.render(tokenizer, "one", "x") == "<user> one <eot> <bot>"


# ---- what ends an answer

LLAMA = (
    "<s>{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }} <eot>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "stop", "talk", "end"),
    [
        (LLAMA, ("</s>", "<eot>"), True, "<eot>"),  # as Llama 3 Instruct
        (LLAMA, ("</s>", "<eot>"), False, "</s>"),
        (LLAMA, ("</s>",), True, "</s>"),  # a stop token that is not the template's
        (LLAMA, ("<user>", "two"), True, "<user>"),  # nor the tokenizer's
        (LLAMA, (), True, None),
        # More than one of them: the first after the answer.
        (LLAMA.replace("<eot>", "\n<eot> </s>"), ("</s>", "<eot>"), True, "<eot>"),
        # Nothing but the text, and answers that are refused.
        ("{{ messages[-1].content }}", ("<eot>", "</s>"), True, "</s>"),
        ("{{ raise_exception('no') }}", ("<eot>", "</s>"), True, "</s>"),
        ({"tools": LLAMA}, ("<eot>", "</s>"), True, "</s>"),
        (None, ("<eot>", "</s>"), True, "</s>"),
        # The prompt opens a thought, and earlier answers are shown without theirs.
        (LLAMA.replace("<|assistant|>\n\n{% endif", "<bot> <think>\n{% endif"),
         ("</s>", "<eot>"), True, "<eot>"),
    ],
)  # fmt: skip
def test_an_answer_ends_as_the_template_ends_it(template, stop, talk, end):
    ids = tuple(IDS[x] for x in stop)
    assert chat.end_of_answer(make(template), ids, talk) == (None if end is None else IDS[end])


@pytest.mark.parametrize(
    ("before", "answer", "rest"),
    [
        ("<bot><think>\n", "<think>\none", "one"),
        ("<bot><think>\n", "<think>one", "one"),
        ("<bot><think>", "<think>\none", "\none"),
        ("<bot><think>\n", " \n<think>\n\none", "\none"),
        ("<bot><think>\n\n", "<think>\none", "one"),
        ("<bot><think>\n", "<think>\n\n</think>\n\none", "\n</think>\n\none"),
        ("<bot><think>\n", "one <think> two", "one <think> two"),
        ("<bot>", "<think>\none", "<think>\none"),
        ("<bot><think>\n\n</think>\n\n", "<think>\none", "<think>\none"),
        ("<think> is a word", "<think>\none", "<think>\none"),
    ],
)
def test_a_thought_is_opened_once(before, answer, rest):
    assert chat.continues_thought(before, answer) == rest


# ---- messages


def said(*contents, role="user"):
    return [{"role": role, "content": x} for x in contents]


def test_messages_are_what_clients_send():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    given = [
        {"role": "developer", "content": "six", "name": "me"},
        {"role": "user", "content": parts, "tool_calls": None},
        {"role": "assistant", "content": "two", "reasoning_content": "hm", "refusal": None},
        {"role": "user", "content": ""},
    ]
    assert chat.checked(given) == [
        {"role": "system", "content": "six"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "two", "reasoning_content": "hm"},
        {"role": "user", "content": ""},
    ]
    shown = chat.render(make(CHAT), chat.checked(given), "x")
    assert (
        shown
        == "<system> six <eot> <user> one\ntwo <eot> <assistant> two <eot> <user>  <eot> <bot>"
    )


NO_MESSAGES = {
    "none": ([], "at least one message"),
    "text": ("one", "must be a list"),
    "one": ({"role": "user", "content": "one"}, "must be a list"),
    "a text among them": (["one"], r"[0] = 'one' must be an object"),
    "blank": (said(" ", ""), "is empty: no message has a text"),
    "no role": ([{"content": "one"}], "[0].role = None must be one of system,"),
    "a role of its own": (said("one", role="root"), "[0].role = 'root' must be one of"),
    "a role that is no text": (said("one", role=["user"]), "[0].role = ['user'] must be one of"),
    "a tool": (said("one", role="tool"), "[0].role = 'tool' must be"),
    "no content": ([{"role": "user"}], "[0].content = None must be text, or a list of parts"),
    "a number": (said("one", 3), "[1].content = 3 must be text"),
    "no parts": (said([]), "[0].content = [] must be text"),
    "a picture": (said([{"type": "image_url", "image_url": "x"}]), "must be of the type 'text'"),
    "a part without text": (said([{"type": "text"}]), "[0].content[0].text = None must be text"),
    "a call": ([{"role": "user", "content": "x", "tool_calls": [1]}], "tool_calls is not"),
    "a user's thought": ([{"role": "user", "content": "x", "reasoning_content": ""}], "[0].reason"),
    "a thought that is no text": ([{"role": "assistant", "content": "x", "reasoning_content": 3}],
                                  "[0].reasoning_content = 3 must be text"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_MESSAGES)
def test_what_is_no_message_is_refused_by_its_place(name):
    messages, says = NO_MESSAGES[name]
    message = refusal(chat.checked, messages)
    assert message.startswith("messages") and says in message


def test_values_for_the_template_are_its_variables():
    template = "{{ messages[0].content }}{% if enable_thinking is false %} off{% endif %}"
    tokenizer = make(template)
    assert chat.render(tokenizer, "one", "x") == "one"
    assert chat.render(tokenizer, "one", "x", {"enable_thinking": False}) == "one off"
    for name in ("tokenize", "chat_template", "messages", "add_generation_prompt", 3):
        with pytest.raises(UserError, match="is an argument of apply_chat_template"):
            chat.render(tokenizer, "one", "x", {name: True})


# ---- thoughts

SPLIT = [
    (False, "one two", ("", "one two")),
    (False, " one", ("", " one")),
    (False, "<think>\nhm\n</think>\n\none", ("hm", "one")),
    (False, "\n<think>hm </think>one", ("hm", "one")),
    (False, "<think>\n\n</think>\n\none </think>", ("", "one </think>")),
    (False, "<think> hm <", ("hm <", "")),
    (False, "<think> hm  m \n", ("hm  m", "")),
    (False, "<thin", ("", "<thin")),
    (False, "one <think> two </think>", ("", "one <think> two </think>")),
    (True, "hm\n</think>\none", ("hm", "one")),
    (True, "\n<think>\nhm</think>one", ("hm", "one")),
    (True, "hm", ("hm", "")),
    (True, " \n", ("", "")),
    (True, "hm</think> ", ("hm", "")),
]


@pytest.mark.parametrize(("opened", "answer", "want"), SPLIT)
def test_thoughts_are_split_off_wherever_pieces_end(opened, answer, want):
    for size in range(1, len(answer) + 1):
        split, got = chat.Thoughts(opened), ["", ""]
        pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
        for piece in pieces:
            for i, part in enumerate(split.add(piece)):
                got[i] += part
        for i, part in enumerate(split.add("", last=True)):
            got[i] += part
        assert tuple(got) == want, size
