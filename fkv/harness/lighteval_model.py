"""A model under eviction for lighteval, as its `custom` backend takes it: a file with one class.

lighteval custom "Qwen/Qwen3-1.7B@policy=snapkv@budget=1024" fkv/harness/lighteval_model.py TASKS

The name of the model says everything, so that results bear it: what `fkv.load` takes, then
`@field=value` for any of `Settings`.
"""

import ast
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from lighteval.models.abstract_model import LightevalModel
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.prompt_manager import PromptManager
from lighteval.tasks.requests import Doc, SamplingMethod
from lighteval.utils.cache_management import SampleCache, cached

import fkv
from fkv import kinds, policies
from fkv.api import Model
from fkv.cache.cadence import Cadence
from fkv.engine.sampling import Sampling
from fkv.errors import UserError, suggest
from fkv.harness import prompts
from fkv.harness.asking import Reading, Subject, Writing, reading
from fkv.models import texts
from fkv.runs import provenance


@dataclasses.dataclass(frozen=True)
class Settings(kinds.Settings):
    """What the name of a model may set.

    Attributes:
      policy: one of `fkv.policies.names()`.
      scorer: what `fkv.load_scorer` takes, in place of `policy`.
      budget, interval, protect_prompt: of evictions, in tokens.
      dtype, revision: of the model; empty for the stored one, and the newest.
      rows: requests at a time.
      max_length: tokens of a prompt and its answer, 0 for the model's context length.
      chat: apply the chat template; -1 where the tokenizer has one.
      system: prompt of the chat template.
      seed: of all draws.
      temperature, top_k, top_p, min_p: of answers; of several samples the temperature must not
        be 0.
    """

    policy: str = kinds.setting(kinds.TEXT, "full")
    scorer: str = kinds.setting(kinds.TEXT, "")
    budget: int = kinds.setting(kinds.whole(1), 1024)
    interval: int = kinds.setting(kinds.whole(1), 256)
    protect_prompt: int = kinds.setting(kinds.whole(0), 0)
    dtype: str = kinds.setting(kinds.TEXT, "")
    revision: str = kinds.setting(kinds.TEXT, "")
    rows: int = kinds.setting(kinds.whole(1), 16)
    max_length: int = kinds.setting(kinds.whole(0), 0)
    chat: int = kinds.setting(kinds.whole(-1, 1), -1)
    system: str = kinds.setting(kinds.TEXT, "")
    seed: int = kinds.setting(kinds.whole(0, 2**32 - 1), 0)
    temperature: float = kinds.setting(kinds.number(0), 0.0)
    top_k: int = kinds.setting(kinds.whole(0), 0)
    top_p: float = kinds.setting(kinds.number(0, 1, above=True), 1.0)
    min_p: float = kinds.setting(kinds.number(0, 1), 0.0)


def parse(name: str) -> tuple[str, Settings]:
    """A model and its settings, from `MODEL@field=value@...`.

    Raises:
      UserError: a field is not known, or has a wrong value.
    """
    model, *entries = name.split("@")
    known, given = Settings.kinds(), {}
    for entry in entries:
        field, equals, value = entry.partition("=")
        if field not in known or not equals:
            raise UserError(
                f"{name}: {entry!r} must be field=value, of {', '.join(known)}"
                f"{suggest(field, list(known))}"
            )
        given[field] = value
        if known[field] is not kinds.TEXT:
            try:
                given[field] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pass  # refused, with its field
    return model, Settings(**given)


class EvictedModel(LightevalModel):
    """Requests of lighteval, answered under a policy.

    Args:
      config: of lighteval; its `model_name` is read by `parse`.
    """

    def __init__(self, config: Any):
        self.config = config
        name, self._settings = parse(config.model_name)
        s = self._settings
        model = fkv.load(name, s.dtype or None, s.revision or None)
        if model.tokenizer is None:
            raise UserError(f"model {name} has no tokenizer: tasks are texts")
        if s.scorer and s.policy != "full":
            raise UserError(f"{config.model_name}: give policy or scorer, not both")
        policy = fkv.load_scorer(s.scorer) if s.scorer else policies.get(s.policy)
        cadence = Cadence(s.budget, s.interval, s.protect_prompt)
        policies.check(policy, model.config, cadence)
        self._subject = Subject(model, policy, cadence, s.rows, s.seed)
        self._chat = bool(model.tokenizer.chat_template) if s.chat < 0 else bool(s.chat)
        self.prompt_manager = PromptManager(self._chat, model.tokenizer, s.system or None)
        self._sampling = Sampling(s.temperature, s.top_k, s.top_p, s.min_p)
        # lighteval keys its cache by the name alone, and scorers at a path may be trained further.
        known = f"@{provenance.of_arrays(policy.params)}" if s.scorer else ""
        named = config.model_copy(update={"model_name": config.model_name + known})
        self._cache = SampleCache(named)

    @property
    def _model(self) -> Model:
        return self._subject.model

    @property
    def tokenizer(self) -> Any:
        return self._model.tokenizer

    @property
    def add_special_tokens(self) -> bool:
        return not self._chat

    @property
    def max_length(self) -> int:
        return self._settings.max_length or self._model.config.max_positions

    def tok_encode(self, str_to_encode: str | list[str], add_special_tokens: bool | None = None):
        """Token ids, of one text or of several."""
        if not isinstance(str_to_encode, str):
            return [self.tok_encode(one, add_special_tokens) for one in str_to_encode]
        special = self.add_special_tokens if add_special_tokens is None else add_special_tokens
        return texts.tokenize(self.tokenizer, str_to_encode, continued=special)

    @cached(SamplingMethod.GENERATIVE)
    def greedy_until(self, docs: list[Doc]) -> list[ModelResponse]:
        """Answers, several of a document that asks for so many."""
        asked = [self._writing(doc, i) for doc in docs for i in range(doc.num_samples)]
        replies = dict(self._subject.write(asked))
        found, start = [], 0
        for doc in docs:
            some = range(start, start + doc.num_samples)
            start = some.stop
            found.append(
                ModelResponse(
                    input=self.prompt_manager.prepare_prompt(doc),
                    input_tokens=asked[some.start].prompt.tolist(),
                    text=[replies[i].text for i in some],
                    output_tokens=[replies[i].ids.tolist() for i in some],
                    truncated_tokens_count=asked[some.start].cut,
                )
            )
        return found

    def _writing(self, doc: Doc, number: int) -> Writing:
        what = f"task {doc.task_name}, document {doc.id}"
        if doc.num_samples > 1 and not self._sampling.temperature:
            raise UserError(f"{what} asks for {doc.num_samples} samples: set @temperature=")
        prompt = self.tok_encode(self.prompt_manager.prepare_prompt(doc))
        # As in lighteval's own models: rather a short answer than a cut prompt.
        room = max(self.max_length - len(prompt), 1)
        limit = room if doc.generation_size is None else min(doc.generation_size, room)
        until = () if self._chat else tuple(x for x in doc.stop_sequences or () if x)
        ends = prompts.Ends(max(limit, 1), self._sampling, until)
        one = prompts.writing(self._model, prompt, ends, self.max_length, what)
        return dataclasses.replace(one, number=number)

    @cached(SamplingMethod.LOGPROBS)
    def loglikelihood(self, docs: list[Doc]) -> list[ModelResponse]:
        """Log-probabilities of each choice after the prompt."""
        asked, inputs, outputs = [], [], []
        for doc in docs:
            what = f"task {doc.task_name}, document {doc.id}"
            context = self.prompt_manager.prepare_prompt(doc)
            contexts, choices = self.tok_encode_pair(context, doc.choices, pairwise=True)
            for before, after in zip(contexts, choices, strict=True):
                before = before or [prompts.prefix(self._model)]
                asked.append(reading([*before, *after], len(before), self.max_length, what))
            inputs.append(contexts[0] if contexts else [])
            outputs.append(choices)
        return self._read(docs, asked, inputs, outputs)

    # Not cached: lighteval (0.13) drops what it has cached of this kind, and the task with it.
    def loglikelihood_rolling(self, docs: list[Doc]) -> list[ModelResponse]:
        """The log-probability of each whole text, in windows of the model's length."""
        first, most = prompts.prefix(self._model), self.max_length
        asked, outputs = [], []
        for doc in docs:
            tokens = self.tok_encode(doc.query)
            outputs.append([tokens])
            asked.append(Reading(tuple(prompts.windows(tokens, first, most))))
        return self._read(docs, asked, [[first]] * len(docs), outputs)

    def _read(
        self, docs: Sequence[Doc], asked: Sequence[Reading], inputs: Sequence, outputs: Sequence
    ) -> list[ModelResponse]:
        replies = dict(self._subject.read(asked))
        found, start = [], 0
        for before, after in zip(inputs, outputs, strict=True):
            some = [replies[i] for i in range(start, start + len(after))]
            start += len(after)
            found.append(
                ModelResponse(
                    input_tokens=np.asarray(before).tolist(),
                    output_tokens=after,
                    logprobs=[one.logprob for one in some],
                    argmax_logits_eq_gold=[one.greedy for one in some],
                    truncated_tokens_count=max((one.cut for one in some), default=0),
                )
            )
        return found
