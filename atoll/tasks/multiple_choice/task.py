"""Multiple choice: trains a language model to answer a question with the right choice's text.

Loss: that of language modelling on the right choice's text and its end token. Metrics: whether the right
choice is the most likely one, by the sum of its tokens' log-probabilities, and by this sum divided by the
number of bytes of the choice's text, as the LM Evaluation Harness's `acc` and `acc_bytes` (Gao et al. 2024;
its `acc_norm` divides by characters, which is the same for ASCII); and whether the model writes the right
choice by greedy decoding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from atoll.backbones.encoder import Batch
from atoll.backbones.options import options_of
from atoll.backbones.resolve import Backbone
from atoll.data.classification import Table
from atoll.data.dataset import Dataset
from atoll.data.parsers import optional_text_cell
from atoll.data.schema import Schema
from atoll.data.shard import Shard, canonical_order
from atoll.data.texts import read_text_input
from atoll.errors import DataError
from atoll.job.job import DataSection, Job
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.tasks.language_modeling.data import ASSISTANT
from atoll.tasks.language_modeling.options import LanguageOptions
from atoll.tasks.language_modeling.task import LanguageModeling, user_message
from atoll.tasks.language_modeling.template import Rendered, Span, joined
from atoll.tasks.multiple_choice.data import LETTERS, QUESTIONS, choices_cell
from atoll.tasks.multiple_choice.model import Choice, ChoiceModel, prepared_question
from atoll.tasks.multiple_choice.options import ChoiceOptions

if TYPE_CHECKING:
    import pyarrow as pa
    from torchmetrics import MetricCollection


@dataclass(frozen=True)
class Question:
    """A question as tokens: its prompt, and its choices in the data's order."""

    prompt: tuple[int, ...]
    choices: tuple[Choice, ...]

    @property
    def fits(self) -> bool:
        """Whether no choice is cut off, and none starts at the first token, which has no prediction."""
        return not any(choice.tokens.is_cut or choice.scored[0] for choice in self.choices)


@dataclass(frozen=True)
class MultipleChoice(LanguageModeling):
    """Multiple choice; targets are those of language modelling, for the right choice alone."""

    info_fields = ()

    options_kind: ClassVar[type[LanguageOptions]] = ChoiceOptions
    model_kind = ChoiceModel
    schema: ClassVar[Schema] = QUESTIONS

    name: str = "multiple-choice"
    summary: str = (
        "one of several choices; Llama, GPT-2, Qwen, …; accuracy by likelihood and in words, unparsable rate"
    )
    primary_metric: str = "accuracy"
    options: ChoiceOptions = field(default_factory=ChoiceOptions)

    def records(self, options: Options) -> Schema:
        return replace(QUESTIONS, answers=options_of(options, ChoiceOptions).answers)

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        return self.schema.adopted(splits)

    def notes_on(
        self, source: Path, data: DataSection, options: Options, backbone: Backbone
    ) -> Sequence[str]:
        bound, table = self.of_options(options, backbone), self.read(source, data, options)
        parts = [part for part in (table.train, table.test) if part is not None]
        asked_all = [one for part in parts for one in bound.questions(part)]
        right = [
            question.choices[place].tokens
            for question, place in zip(
                asked_all, [place for part in parts for place in part["answer"][:]], strict=True
            )
        ]
        most = f"task.options.max_tokens = {bound.options.max_tokens}"
        return (
            f"{sum(len(one.ids) for one in right)} tokens of questions with their right choices,"
            f" of which {sum(sum(one.learnt) for one in right)} are learnt",
            f"{sum(not one.fits for one in asked_all)} of {len(asked_all)} questions don't fit with each of"
            f" their choices into {most}; they are measured as wrong",
        )

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order, answers, questions = canonical_order(keys), dataset["answer"][:], self.questions(dataset)
        inputs = []
        for row in order:
            question, right = questions[row], answers[row]
            places = [right, *(place for place in range(len(question.choices)) if place != right)]
            choices = [question.choices[place] for place in places]
            inputs.append(prepared_question(question.prompt, choices, places, fits=question.fits))
        targets = self.targets([questions[row].choices[answers[row]].tokens for row in order])
        return Shard(tuple(inputs), targets, tuple(keys[row] for row in order))

    def questions(self, dataset: Dataset) -> list[Question]:
        """Every row as tokens, in the order of the rows.

        Raises:
            DataError: the chat template refuses a row.
        """
        rows = zip(dataset["question"][:], dataset["choices"][:], strict=True)
        return [self._question(*row, f"question {number}") for number, row in enumerate(rows, start=1)]

    def _question(self, question: str, texts: Sequence[str], where: str) -> Question:
        prompt = self.prompt(question, texts)
        choices = []
        for text in texts:
            rendered, span = self._chosen(prompt, text, where)
            choices.append(Choice(text, self.coder.tokens(rendered), self.coder.writes(rendered, span)))
        return Question(tuple(self.prompt_tokens(prompt, where)), tuple(choices))

    def prompt(self, question: str, texts: Sequence[str]) -> str:
        """The prompt: the question, followed by one line for each choice if the job has `listed`.

        >>> MultipleChoice(options=ChoiceOptions(template="")).prompt("Where?", ["Here", "There"])
        'Where?\\nA. Here\\nB. There\\nAnswer:'
        """
        if not self.options.listed:
            return question
        lines = [f"{LETTERS[place]}. {text}" for place, text in enumerate(texts)]
        asks = ["Answer:"] if self.template is None else []
        return "\n".join(([question] if question else []) + lines + asks)

    def _chosen(self, prompt: str, text: str, where: str) -> tuple[Rendered, Span]:
        """(the prompt with a choice as answer, the characters whose likelihood counts as the choice's).

        Without a template the choice starts with a space, which is part of its first token.
        """
        if self.template is None:
            rendered = joined(prompt, f" {text}")
            return rendered, rendered.learnt[0]
        rendered = self.conversation([*user_message(prompt), {"role": ASSISTANT, "content": text}], where)
        ((begin, end),) = rendered.learnt
        place = rendered.text.find(text, begin, end)
        if place < 0:
            raise DataError(
                f"{where}: the chat template writes a choice in another way, expected it as it is"
            )
        return rendered, (place, place + len(text))

    def parse_input(self, line: str) -> Batch:
        """A question from a text or file: plain text, or a JSON object with `question` and `choices`.

        Raises:
            DataError: it can't be read, is empty, its choices are invalid, or the chat template refuses it.
        """
        text = read_text_input(line)
        if not text.lstrip().startswith("{"):
            return prepared_question(self.prompt_tokens(text, "the prompt"), (), (), fits=True)
        where = "the question"
        try:
            parsed_text = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where}: no JSON: {error}; expected question and choices") from None
        if not {"question", "choices"} <= parsed_text.keys():
            raise DataError(f"{where}: {', '.join(parsed_text) or 'nothing'}, expected question and choices")
        asked_of = optional_text_cell(parsed_text["question"], where)
        question = self._question(asked_of, choices_cell(parsed_text["choices"], where).texts, where)
        order = range(len(question.choices))
        return prepared_question(question.prompt, question.choices, order, fits=question.fits)

    def asked_and_said(self, held: Batch) -> tuple[torch.Tensor, str]:
        return held["prompt"], bytes(held["0.text"].tolist()).decode()

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import Metric, MetricCollection

        from atoll.tasks.multiple_choice import metrics

        by_name: dict[str, Metric | MetricCollection] = {
            "accuracy": metrics.LikelihoodAccuracy(),
            "accuracy_per_byte": metrics.ByteLikelihoodAccuracy(),
        }
        if self.options.generated:
            by_name |= {
                "accuracy_generated": metrics.GeneratedAccuracy(),
                "unparsable_rate": metrics.UnparsableRate(),
            }
        return MetricCollection(by_name, compute_groups=False)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """(log-likelihoods and bytes of choices, both [n, choices]; written choice [n]; `fits` [n])."""
        most = max(len(answer["texts"]) for answer in predictions)
        likelihood = torch.full((len(predictions), most), -torch.inf, dtype=torch.float64)
        size = torch.ones((len(predictions), most), dtype=torch.int64)
        for row, answer in enumerate(predictions):
            likelihood[row, : len(answer["texts"])] = answer["likelihood"]
            size[row, : len(answer["texts"])] = torch.tensor([len(text.encode()) for text in answer["texts"]])
        generated = torch.tensor([answer.get("said", -1) for answer in predictions])
        return likelihood, size, generated, torch.tensor([answer["fits"] for answer in predictions])

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        return [_readable(answer) for answer in predictions]


def _readable(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer for `atoll predict`: the most likely choice, all log-likelihoods, and what was written."""
    written = {"written": answer["written"]} if "written" in answer else {}
    if not answer["texts"]:
        return {"label": answer["written"]}
    if not answer["fits"]:
        return {"label": "", "fits": False}
    likelihood = dict(zip(answer["texts"], answer["likelihood"].tolist(), strict=True))
    generated = answer.get("said", -1)
    chosen = {"said": answer["texts"][generated] if generated >= 0 else None} if written else {}
    return (
        {"label": max(likelihood, key=likelihood.__getitem__), "log_likelihood": likelihood}
        | written
        | chosen
    )


MULTIPLE_CHOICE = MultipleChoice()
