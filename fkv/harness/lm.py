"""A model under eviction for lm-evaluation-harness: an `LM` as its evaluator takes it.

import lm_eval
lm = EvictedLM(Subject(fkv.load("Qwen/Qwen3-1.7B"), policies.get("snapkv"), Cadence(1024, 256)))
lm_eval.simple_evaluate(model=lm, tasks=["wikitext", "gsm8k"])
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from fkv.errors import UserError
from fkv.harness import prompts
from fkv.harness.asking import Reading, Reply, Subject, Writing, reading
from fkv.models import texts
from fkv.models.named import decode

Asked = Writing | Reading


class EvictedLM(TemplateLM):
    """Requests of lm-eval, answered by a `Subject`.

    Tokens are those of lm-eval's `hf` model on the same tokenizer, so that with the full cache
    likelihoods and greedy answers are its, too. Under eviction the context is read first; then the
    continuation, given or drawn, evicts as any answer does.

    Args:
      subject: the model under a policy.
      max_length: tokens of a prompt and its answer, by default the model's context length. Longer
        prompts lose their beginning, as in `hf`; a text in windows gets one of so many tokens each.
      max_gen_toks: new tokens where a task names no limit.
      template: values for variables of the chat template.
      think_end: what ends a thought: only the text behind the last one is the answer.

    Raises:
      UserError: the model has no tokenizer.
    """

    def __init__(
        self,
        subject: Subject,
        max_length: int = 0,
        max_gen_toks: int = 256,
        template: Mapping[str, Any] | None = None,
        think_end: str = "",
    ):
        super().__init__()
        if subject.model.tokenizer is None:
            raise UserError(f"model {subject.model.name} has no tokenizer: tasks are texts")
        self.subject, self.tokenizer = subject, subject.model.tokenizer
        self.max_length = max_length or subject.model.config.max_positions
        self.max_gen_toks, self.batch_size = max_gen_toks, subject.rows
        self._template, self._think_end = dict(template or {}), think_end

    # ---- what lm-eval asks about the tokenizer

    @property
    def eot_token_id(self) -> int:
        end = self.tokenizer.eos_token_id
        return prompts.prefix(self.subject.model) if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What a text without context begins with."""
        return prompts.prefix(self.subject.model)

    @property
    def tokenizer_name(self) -> str:
        """Of a model at a revision, for the names of caches."""
        model = self.subject.model
        return f"{model.name}@{model.revision}".rstrip("@").replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return texts.tokenize(self.tokenizer, string, continued=add_special_tokens is not False)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return decode(self.subject.model, tokens, special=not skip_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        model = self.subject.model
        return prompts.rendered(model, chat_history, self._template, add_generation_prompt)

    # ---- requests

    def asked(self, requests: Sequence[Instance]) -> list[Asked]:
        """What requests of any kind ask of the model; the weights are not needed.

        Raises:
          UserError: names the first that can't be answered.
        """
        seen: dict[int, int] = {}
        found = []
        for request in requests:  # the same object several times: several samples
            number = seen[id(request)] = seen.get(id(request), -1) + 1
            found.append(self._asked(request, number))
        return found

    def _asked(self, request: Instance, number: int) -> Asked:
        what = f"task {request.task_name}, document {request.doc_id}"
        model, given = self.subject.model, request.args
        if request.request_type == "generate_until":
            end = prompts.ends(given[1], self.max_gen_toks, f"task {request.task_name}")
            tokens = self.tok_encode(given[0])
            one = prompts.writing(model, tokens, end, self.max_length, what)
            return dataclasses.replace(one, number=number)
        if request.request_type == "loglikelihood":
            tokens, context = prompts.pair(model, *given)
            return reading(tokens, context, self.max_length, what)
        tokens = self.tok_encode(given[0])
        return Reading(tuple(prompts.windows(tokens, self.prefix_token_id, self.max_length)))

    def replies(self, asked: Sequence[Asked], room: int = 0) -> Iterator[tuple[int, Reply]]:
        """Index and reply of each request, as they come; see `Subject.write`."""
        for kind, answer in (
            (Writing, lambda some: self.subject.write(some, room)), (Reading, self.subject.read),
        ):  # fmt: skip
            index = [i for i, one in enumerate(asked) if isinstance(one, kind)]
            for i, reply in answer([asked[i] for i in index]):
                yield index[i], reply

    def answer(self, request: Instance, reply: Reply) -> Any:
        """A reply as lm-eval wants it: a text, (logprob, greedy), or a logprob."""
        if request.request_type == "generate_until":
            text = reply.text
            return text.split(self._think_end)[-1].lstrip() if self._think_end else text
        if request.request_type == "loglikelihood":
            return reply.logprob, reply.greedy
        return reply.logprob

    def _answers(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        found: list[Any] = [None] * len(requests)
        for i, reply in self.replies(self.asked(requests)):
            found[i] = self.answer(requests[i], reply)
            self.cache_hook.add_partial(kind, requests[i].args, found[i])
        return found

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return self._answers("loglikelihood", requests)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        return self._answers("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._answers("generate_until", requests)

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        asked = [
            reading([*context, *rest], len(context), self.max_length, f"request {i}")
            for i, (_, context, rest) in enumerate(requests)
        ]
        replies = dict(self.replies(asked))
        return [(replies[i].logprob, replies[i].greedy) for i in range(len(asked))]


class Replayed(EvictedLM):
    """Answers that are known, as an `LM`: lm-eval's evaluator makes metrics of them.

    Args:
      known: answers by document, request of the document, and sample.
      lm: writes the prompts.
    """

    def __init__(self, known: Mapping[tuple[int, int, int], Any], lm: EvictedLM):
        super().__init__(lm.subject, lm.max_length, lm.max_gen_toks, lm._template, lm._think_end)
        self._known = known

    def _answers(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        return [self._known[name] for name in names(requests)]


def names(requests: Sequence[Instance]) -> list[tuple[int, int, int]]:
    """Document, request of the document, and sample of each request of a task."""
    seen: dict[tuple[int, int], int] = {}
    found = []
    for request in requests:
        key = request.doc_id, request.idx
        seen[key] = seen.get(key, -1) + 1
        found.append((*key, seen[key]))
    return found
