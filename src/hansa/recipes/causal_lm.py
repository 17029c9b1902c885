# SPDX-License-Identifier: Apache-2.0
"""Causal language models: plain text, prompt and completion, or chats.

| ``data.columns`` names | form | what carries a loss |
|---|---|---|
| ``text`` (or nothing) | texts joined by an end token and cut into blocks of ``max_length`` | every token |
| ``prompt``, ``completion`` | one example a row, end token added | the completion |
| ``messages`` | one example a chat, in the tokenizer's chat template (or a plain one) | what the assistant says |

An update is weighed by n = the tokens of the site's training set that carry a loss.

Under dp-sgd a row is what is hidden, so texts are not joined: each is an example of its own, cut at ``max_length``
(``text_rows`` says what a row of a text file is), and n counts examples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from hansa import registry
from hansa.core.config import Job
from hansa.core.ports import Program
from hansa.errors import DataError, JobError, ModelError
from hansa.recipes import data, pretrained, tokenizers
from hansa.recipes.batching import IGNORED, padded
from hansa.recipes.finetune import Batch, Examples, FineTune
from hansa.recipes.tables import Table, TextRows

MAX_LOSS = 700.0
"""Perplexity is exp(loss), cut off here, where it would overflow."""


@dataclass(frozen=True)
class Example:
    """Token ids (length,), and for each position the id that should come next, or ``IGNORED``."""

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]


def build(job: Job) -> Program:
    """Return the causal-lm program of a job.

    Raises:
        JobError: an option or a column role is unknown or wrong.
    """
    options = Options(**registry.checked("recipe.causal-lm", Options, job.recipe.options))
    if options.max_length < 2:
        raise JobError(f"recipe.max_length must be at least 2, it is {options.max_length}.")
    hidden = job.privacy is not None and job.privacy.mechanism == "dp-sgd"
    return FineTune(job, CausalLM(_form(job), options, packed=not hidden))


@dataclass(frozen=True)
class Options:
    """What a job may set beside ``recipe.name``.

    Attributes:
        max_length: tokens of an example; longer ones are cut at the end.
        separator: what stands between prompt and completion.
        text_rows: what a row of a text file is: the whole file, a paragraph, or a line.
        prompts: what the report shows the model going on from.
        max_new_tokens: how far it goes on.
        temperature: 0 takes the likeliest token every time; above, tokens are drawn, the same ones for every model.
    """

    max_length: int = 256
    separator: str = "\n"
    text_rows: TextRows = "file"
    prompts: Sequence[str] = ()
    max_new_tokens: int = 64
    temperature: Annotated[float, Field(ge=0)] = 0.0


def _form(job: Job) -> str:
    named = set(job.data.columns) if job.data else set()
    pair = named & {"prompt", "completion"}
    forms = [form for form, used in (("text", "text" in named), ("pair", pair), ("chat", "messages" in named)) if used]
    if len(forms) > 1:
        raise JobError("data.columns: name text, or prompt and completion, or messages; they are three forms of data.")
    return forms[0] if forms else "text"


@dataclass(frozen=True)
class CausalLM:
    """The causal-lm task; ``form`` is ``text``, ``pair`` or ``chat``, a row of the module's table.

    Attributes:
        form: what the data are.
        options: what the job says.
        packed: whether texts are joined and cut into blocks, or are an example each.
    """

    form: str
    options: Options
    packed: bool = True

    auto_class = "AutoModelForCausalLM"
    adapter_task = "CAUSAL_LM"
    roles = ("text", "prompt", "completion", "messages")

    @property
    def text_rows(self) -> TextRows:
        """As the job sets it."""
        return self.options.text_rows

    @property
    def fields(self) -> Mapping[str, Any]:
        """No config fields: the head is the base's own."""
        return {}

    def processor(self, job: Job) -> Any:
        """Return the tokenizer, with a plain chat template if it has none."""
        tokenizer = pretrained.load_tokenizer(job)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizers.PLAIN_CHAT
        return tokenizer

    def load(self, job: Job, processor: Any) -> tuple[nn.Module, list[str]]:
        """Return the model, its vocabulary and length checked."""
        return pretrained.load_text_model(job, self.auto_class, self.fields, processor, self.options.max_length)

    def labels(self, table: Table) -> Mapping[str, int]:
        """Check that every row has text."""
        if self.form == "chat":
            for index, messages in enumerate(table.column("messages")):
                _check_messages(table, index, messages)
        else:
            for role in ("text",) if self.form == "text" else ("prompt", "completion"):
                data.texts(table, role)
        return {}

    def examples(self, table: Table, processor: Any) -> Examples:
        """Tokenise rows into examples."""
        self.labels(table)
        if self.form == "text":
            texts = data.texts(table, "text")
            return self._blocks(texts, processor) if self.packed else self._apart(texts, processor)
        rows = self._chats(table, processor) if self.form == "chat" else self._pairs(table, processor)
        found = [self._masked(text, spans, processor, special=self.form == "pair") for text, spans in rows]
        return [example for example in found if (example.targets != IGNORED).any()]

    def size(self, example: Example) -> int:
        """Return the number of tokens."""
        return len(example.ids)

    def num_trained(self, examples: Examples) -> float:
        """Return the number of tokens that carry a loss."""
        return float(sum(int((example.targets != IGNORED).sum()) for example in examples))

    def batch(self, examples: Examples, processor: Any) -> Batch:
        """Stack examples, padded on the right; a mask only where there is padding."""
        batch = {
            "input_ids": padded([example.ids for example in examples], processor.pad_token_id),
            "targets": padded([example.targets for example in examples], IGNORED),
        }
        if len({len(example.ids) for example in examples}) == 1:
            return batch
        return {**batch, "attention_mask": padded([np.ones_like(example.ids) for example in examples], 0)}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the mean negative log-likelihood of the batch's targets."""
        total, tokens, _ = _likelihood(model, batch)
        return total / max(1, tokens), {"loss_sum": float(total.detach()), "tokens": float(tokens)}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each example's mean negative log-likelihood over its targets."""
        logits, targets = _logits(model, batch), batch["targets"]
        each = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
        )
        return each.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, float]:
        """Return loss, token count, and how many targets are the likeliest token."""
        total, tokens, logits = _likelihood(model, batch)
        correct = (logits.argmax(-1) == batch["targets"]).sum()
        return {"loss_sum": float(total), "tokens": float(tokens), "correct": float(correct)}

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss (nats a token), perplexity, and token accuracy where it was summed."""
        tokens = sums.get("tokens", 0.0)
        if not tokens:
            return {}
        loss = sums["loss_sum"] / tokens
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, MAX_LOSS))}
        return {**metrics, "accuracy": sums["correct"] / tokens} if "correct" in sums else metrics

    def show(self, model: Any, processor: Any) -> Mapping[str, str]:
        """Return what the model makes of each prompt."""
        drawn = {"do_sample": True, "temperature": self.options.temperature, "top_k": 0}
        shown = {}
        for prompt in self.options.prompts:
            batch = processor(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                ids = model.generate(
                    **batch,
                    max_new_tokens=self.options.max_new_tokens,
                    pad_token_id=processor.pad_token_id,
                    **(drawn if self.options.temperature else {"do_sample": False}),
                )
            shown[prompt] = processor.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return shown

    def _blocks(self, texts: Sequence[str], tokenizer: Any) -> list[Example]:
        stream = np.fromiter(itertools.chain.from_iterable(_ended(texts, tokenizer)), np.int64)
        # Blocks overlap by one token, so that every token but the very first is some position's target.
        starts = range(0, len(stream) - 1, self.options.max_length)
        blocks = [stream[start : start + self.options.max_length + 1] for start in starts]
        return [Example(block[:-1], block[1:]) for block in blocks]

    def _apart(self, texts: Sequence[str], tokenizer: Any) -> list[Example]:
        rows = [np.asarray(ids[: self.options.max_length + 1], np.int64) for ids in _ended(texts, tokenizer)]
        return [Example(row[:-1], row[1:]) for row in rows if len(row) > 1]

    def _pairs(self, table: Table, tokenizer: Any) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        end = tokenizer.eos_token or ""
        prompts, completions = data.texts(table, "prompt"), data.texts(table, "completion")
        for prompt, completion in zip(prompts, completions, strict=True):
            head = prompt + self.options.separator
            text = head + completion + ("" if completion.endswith(end) else end)
            yield text, [(len(head), len(text))]

    def _chats(self, table: Table, tokenizer: Any) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        for index, messages in enumerate(table.column("messages")):
            yield _rendered(table, index, messages, tokenizer)

    def _masked(self, text: str, spans: list[tuple[int, int]], tokenizer: Any, *, special: bool) -> Example:
        found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(found["input_ids"], np.int64)
        offsets = np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2)
        trained = np.zeros(len(ids), bool)
        for begin, end in spans:
            trained |= (offsets[:, 1] > begin) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
        ids, trained = ids[: self.options.max_length + 1], trained[: self.options.max_length + 1]
        return Example(ids[:-1], np.where(trained, ids, IGNORED)[1:])


def _ended(texts: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """Yield the token ids of each text and an end token, if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    for ids in encoded:
        yield [*ids, *end]


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    # Prompt tuning puts virtual tokens before the text; their predictions have no targets.
    return logits[:, -batch["targets"].shape[1] :]


def _likelihood(model: nn.Module, batch: Batch) -> tuple[Tensor, int, Tensor]:
    logits, targets = _logits(model, batch), batch["targets"]
    total = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total, int((targets != IGNORED).sum()), logits


def _check_messages(table: Table, index: int, messages: Any) -> None:
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not good or not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{table.where(index)}: 'messages' must be a list of {{role, content}} with text in both and at least one "
            "message of role 'assistant', which is what is trained. Mend the row, or set data.columns.messages."
        )


def _rendered(
    table: Table, index: int, messages: Sequence[Mapping[str, str]], tokenizer: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return a chat as text, and the spans of what the assistant says."""

    def render(upto: int, *, ask: bool) -> str:
        if not upto and not ask:
            return ""
        rendered = tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=ask)
        return cast(str, rendered)

    text = render(len(messages), ask=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, ask=True), render(i + 1, ask=False)
        if not after.startswith(before) or not text.startswith(after):
            raise ModelError(
                f"{table.where(index)}: the tokenizer's chat template writes a message differently once others follow, "
                "so what the assistant says can't be told apart. Set another chat_template in the tokenizer's folder."
            )
        spans.append((len(before), len(after)))
    return text, spans
