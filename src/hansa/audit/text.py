# SPDX-License-Identifier: Apache-2.0
"""Text recovery: which tokens a site trained on, and in which order, read off its update.

rows    An embedding's gradient has a row for each token that was read, and zeros elsewhere (Melis et al. 2019,
        arXiv:1805.04049, §4.1). Under weight decay a row that was not read points along itself, so what goes
        another way is looked at. Where the embedding is also the head, rows of likely next tokens move too, less.
span    Petrov et al. 2024, "DAGER", arXiv:2405.15586: a linear layer's gradient is ∂W = δᵀ X, so its rows lie in the
        span of its inputs X. The first attention layer's input is a function of token (and position) alone: every token
        of the vocabulary is held against that span, for query, key and value together. An adapter's A has the same
        span; while its B is zero A has no gradient, and B's rows lie in the span of A X.
order   Where positions are embedded, the best token for each position. Else, in a model that reads from left to right,
        token by token: the second layer's input at the end of what was read so far, held against that layer's span.

The attacker is told how long the text is and how many tokens it has, which a real one reads off the spectrum. The
strongest case is one text and one step; then a round with the job's own local steps, whose texts span everything where
they hold more tokens than the model is wide: rows then tell more.

| case | result |
|---|---|
| no attention layer by a known name is trained, and no embedding | skipped |
| more tokens than dimensions | the span holds all tokens, and tells none |
| adaptive local steps (Adam) | an update is no gradient: the span is blurred; rows that were not read stay still |
| one layer, and a head that reads one position | the span is of one or two dimensions a head, and tells little |
| a new model's first updates, in float32 | attention's gradient may be lost in rounding, and the span with it |
| dropout before the first layer | its inputs are not quite those that the attacker works out: the span is blurred |
| padding | it is read like any token, and counted |
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hansa.audit import uploads
from hansa.audit.finding import Finding, Measure, Picture, Skipped
from hansa.audit.membership import auc
from hansa.audit.subject import Subject
from hansa.core.tree import Array, Tree
from hansa.recipes.finetune import FineTune
from hansa.runs.progress import Progress

NAME = "text recovery"
IDS = "input_ids"

TRIES = 10
AT_ONCE = 8192
"""Tokens of the vocabulary, at as many positions as are tried, that are put through the model together."""
NEW = 1e-3
"""How far from what was explained already an input lies at least that explains more."""
STILL = 1e-6
"""Of the row that moved most: what moved less was not read; if there are such rows, and only reading moves them, they
tell all."""
SHOWN, WIDTH = 3, 78
FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("c_attn",),
    ("qkv_proj",),
    ("query_key_value",),
    ("Wqkv",),
    ("q", "k", "v"),
)
"""What the layers that an attention layer's input goes through are called, in the models of transformers."""

Values = NDArray[np.float64]


def attack(subject: Subject, generator: np.random.Generator, progress: Progress) -> Finding | Skipped:
    """Recover texts from updates of the job, as they leave the sites."""
    begun = time.perf_counter()
    program = subject.program
    if not isinstance(program, FineTune):
        return Skipped(NAME, "Nothing is known of tokens in a program that is no recipe of transformers.")
    if IDS not in program.batch(subject.sites[0], np.arange(1)):
        return Skipped(NAME, "The model takes no tokens.")
    reader = Reader.of(program, subject.params)
    if reader is None:
        return Skipped(NAME, "Neither an embedding nor a known attention layer is trained.")
    progress.stage(NAME, TRIES + 2)
    strongest = uploads.alone(subject)
    tried = uploads.single_uploads(strongest, TRIES, generator, progress)
    if not tried:
        return Skipped(NAME, "No site was asked, in many rounds, and none sent an update.")
    texts = {site: _texts(program, site) for site in uploads.program_sites(subject)}
    single = [_single(reader, upload, pool, texts[upload.site]) for upload, pool in tried]
    chance = [
        reader.found(uploads.noise(subject.params, generator), [texts[upload.site][upload.rows[0]]])
        for upload, _ in tried
    ]
    own = _own_round(subject, program, reader, texts, generator)
    progress.advance()
    picture = _picture(strongest, reader, tried, single, texts)
    progress.advance()
    return _finding(
        subject, single, chance, own, picture, min(len(pool) for _, pool in tried), time.perf_counter() - begun
    )


def _texts(program: FineTune, site: str) -> list[NDArray[np.int64]]:
    """Return the tokens of each of a site's training examples."""
    return [program.batch(site, np.array([row]))[IDS][0] for row in range(program.count(site))]


# --- the attack


@dataclass(frozen=True)
class Space:
    """A trained matrix whose update's rows lie in the span of an attention layer's input, or of its image.

    Attributes:
        name: of the tensor.
        turned: whether inputs stand along its first axis.
        image: (r, width), what inputs are multiplied by before; None for the inputs themselves.
    """

    name: str
    turned: bool = False
    image: Values | None = None

    def rows(self, delta: Tree) -> Array:
        """Return the update, a row an output, of length 1 as a whole."""
        found = np.asarray(delta[self.name], np.float64)
        found = found.T if self.turned else found
        return found / max(float(np.linalg.norm(found)), 1e-300)


@dataclass(frozen=True)
class Layer:
    """An attention layer: the module that its input goes into first, and what is trained of it."""

    entry: nn.Module
    whole: tuple[Space, ...]
    images: tuple[Space, ...]

    def bases(self, delta: Tree, rank: int) -> list[tuple[Values | None, Values]]:
        """Return (image, orthonormal rows) of the spans that an update shows, of at most ``rank`` dimensions."""
        stacked = [space.rows(delta) for space in self.whole]
        if stacked and any(rows.any() for rows in stacked):
            return [(None, _leading(np.concatenate(stacked), rank))]
        return [
            (space.image, _leading(rows, rank)) for space in self.images for rows in [space.rows(delta)] if rows.any()
        ]


def _leading(rows: Array, rank: int) -> Values:
    """Return the directions that rows go in the most; one fewer than there are, or all would lie in them."""
    _, _, directions = np.linalg.svd(rows, full_matrices=False)
    return np.asarray(directions[: min(rank, rows.shape[1] - 1)])


def distances(inputs: Array, bases: Sequence[tuple[Values | None, Values]]) -> Values:
    """Return how far inputs (count, width) lie from the spans, from 0 (inside) to 1 (at right angles)."""
    found = np.zeros(len(inputs))
    for image, directions in bases:
        seen = inputs if image is None else inputs @ image.T
        lengths = np.maximum(np.linalg.norm(seen, axis=1), 1e-300)
        inside = np.linalg.norm(seen @ directions.T, axis=1) / lengths
        found += np.sqrt(np.clip(1 - inside**2, 0.0, 1.0)) / len(bases)
    return found


@dataclass(frozen=True)
class Found:
    """What was read off one update.

    Attributes:
        rows, span: the AUC of telling the text's tokens from all others, by each way; None where it can't be tried.
        tokens: the likeliest ones, as many as there are.
        recall: the share of the text's tokens among them.
        order: the text, token by token; None where order can't be told, or there were several texts.
        placed: the share of positions that it has right.
    """

    rows: float | None
    span: float | None
    tokens: frozenset[int]
    recall: float
    order: tuple[int, ...] | None
    placed: float | None

    @property
    def best(self) -> float:
        """The better of the two AUCs."""
        return max(area for area in (self.rows, self.span) if area is not None)


@dataclass(frozen=True)
class Reader:
    """A model, from the outside: all that whoever knows the job has.

    Attributes:
        model: in evaluation mode, at the parameters that updates start from.
        processor: its tokenizer.
        vocabulary: how many tokens it embeds.
        embedding: the trained embedding's name and its weights; None where it is frozen.
        tied: whether the embedding is the head as well.
        layers: its attention layers, in order, as far as they are trained.
        causal: whether it reads from left to right.
    """

    model: Any
    processor: Any
    vocabulary: int
    embedding: tuple[str, Array] | None
    tied: bool
    layers: tuple[Layer, ...]
    causal: bool

    @classmethod
    def of(cls, program: FineTune, params: Tree) -> Reader | None:
        """Return the reader of a program's model; None where nothing that tells of tokens is trained."""
        model, shared, processor = program.opened(params)
        names = {id(tensor): name for name, tensor in shared.items()}
        every: Any = model
        weight = every.get_input_embeddings().weight
        name = names.get(id(weight))
        embedding = None if name is None else (name, np.array(params[name], np.float64))
        layers = tuple(_layers(model, names, params))
        if embedding is None and not layers:
            return None
        causal = type(every.get_base_model() if hasattr(every, "get_base_model") else every).__name__.endswith(
            "CausalLM"
        )
        head = every.get_output_embeddings()
        tied = head is not None and getattr(head, "weight", None) is weight
        return cls(
            model, processor, int(weight.shape[0]), embedding, tied, layers, causal or bool(every.config.is_decoder)
        )

    def found(self, delta: Tree, texts: Sequence[NDArray[np.int64]]) -> Found:
        """Attack one update that came of these texts."""
        text = np.concatenate(texts)
        truth, kinds = _membership(text, self.vocabulary), len(set(text.tolist()))
        rows = self.by_rows(delta)
        far = self.by_span(delta, len(text), kinds, max(map(len, texts)))
        still = rows is not None and not self.tied and float(rows.min()) < STILL * float(rows.max())
        score = rows if far is None or still else -far.min(1)
        assert score is not None, "there is one of the two"
        tokens = np.argsort(-score, kind="stable")[:kinds]
        order = None if far is None or len(texts) > 1 else self._ordered(delta, far, tokens, len(text))
        return Found(
            None if rows is None else auc(rows, truth),
            None if far is None else auc(-far.min(1), truth),
            frozenset(tokens.tolist()),
            float(truth[tokens].mean()),
            None if order is None else tuple(order),
            None if order is None else float((np.array(order) == text).mean()),
        )

    def by_rows(self, delta: Tree) -> Values | None:
        """Return how far each token's row of the embedding moved otherwise than along itself, (vocabulary,)."""
        if self.embedding is None:
            return None
        name, weight = self.embedding
        moved = np.asarray(delta[name], np.float64)
        unit = weight / np.maximum(np.linalg.norm(weight, axis=1, keepdims=True), 1e-300)
        return np.asarray(np.linalg.norm(moved - (moved * unit).sum(1, keepdims=True) * unit, axis=1))

    def by_span(self, delta: Tree, count: int, kinds: int, longest: int) -> Values | None:
        """Return each token's distance, at each position, from the first layer's span: (vocabulary, longest or 1).

        Args:
            delta: the update.
            count: the tokens of all texts, each as often as it was read.
            kinds: how many different ones there are.
            longest: the tokens of the longest text.
        """
        if not self.layers:
            return None
        first, apart = self.layers[0], self._positions_differ
        bases = first.bases(delta, count if apart else kinds)
        if not bases:
            return None
        positions = longest if apart else 1
        found = np.empty((self.vocabulary, positions))
        step = max(1, AT_ONCE // positions)
        for start in range(0, self.vocabulary, step):
            ids = np.arange(start, min(start + step, self.vocabulary))
            seen = self._inputs(first, np.repeat(ids[:, None], positions, axis=1))
            found[ids] = distances(seen.reshape(-1, seen.shape[-1]), bases).reshape(len(ids), positions)
        return found

    @property
    def _positions_differ(self) -> bool:
        seen = self._inputs(self.layers[0], np.zeros((1, 2), np.int64))
        return not np.allclose(seen[0, 0], seen[0, 1], rtol=1e-4, atol=1e-6)

    def _ordered(self, delta: Tree, far: Values, tokens: NDArray[np.int64], length: int) -> list[int] | None:
        if far.shape[1] == length:
            return [int(token) for token in tokens[far[tokens].argmin(0)]]
        if not self.causal or len(self.layers) < 2:
            return None
        second = self.layers[1]
        bases = second.bases(delta, length)
        if not bases:
            return None
        order: list[int] = []
        explained = np.empty((0, 0))
        for _ in range(length):
            tried = np.concatenate([np.tile(np.array(order, np.int64), (len(tokens), 1)), tokens[:, None]], axis=1)
            last = self._inputs(second, tried)[:, -1]
            far = distances(last, bases)
            if order:  # the first token again and again has the same input throughout: each is to explain something new
                far = np.where(distances(last, [(None, explained)]) < NEW, 2.0, far)
            best = int(far.argmin())
            order.append(int(tokens[best]))
            seen = last[best : best + 1] if len(order) == 1 else np.concatenate([explained, last[best : best + 1]])
            explained = np.linalg.qr(seen.T)[0].T
        return order

    def _inputs(self, layer: Layer, ids: NDArray[np.int64]) -> Values:
        """Return an attention layer's input, (texts, positions, width); the model is not run any further."""
        found: list[Tensor] = []

        def seen(_module: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0].detach())
            raise _EnoughError

        handle = layer.entry.register_forward_pre_hook(seen)
        try:
            with torch.inference_mode():
                self.model(input_ids=torch.from_numpy(ids).to(next(self.model.parameters()).device))
        except _EnoughError:
            pass
        finally:
            handle.remove()
        return np.asarray(found[0].double().cpu())


class _EnoughError(Exception):
    """What was looked for has been seen."""


def _membership(text: NDArray[np.int64], vocabulary: int) -> NDArray[np.bool_]:
    truth = np.zeros(vocabulary, np.bool_)
    truth[text] = True
    return truth


def _layers(model: nn.Module, names: Mapping[int, str], params: Tree) -> Iterator[Layer]:
    """Yield the attention layers of which something is trained."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        stem, _, last = name.rpartition(".")
        family = next((family for family in FAMILIES if family[0] == last), None)
        if family is None:
            continue
        whole: list[Space] = []
        images: list[Space] = []
        for each in family:
            part = modules.get(f"{stem}.{each}")
            for space in [] if part is None else _spaces(part, names, params):
                (whole if space.image is None else images).append(space)
        if whole or images:
            yield Layer(module, tuple(whole), tuple(images))


def _spaces(module: nn.Module, names: Mapping[int, str], params: Tree) -> Iterator[Space]:
    """Yield what is trained of one linear layer, whole or by an adapter."""
    every: Any = module
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and id(weight) in names:
        yield Space(names[id(weight)], turned=type(module).__name__ == "Conv1D")
    for kind, down in getattr(every, "lora_A", {}).items():
        up = every.lora_B[kind]
        if id(down.weight) in names and id(up.weight) in names:
            image = names[id(down.weight)]
            yield Space(image)
            yield Space(names[id(up.weight)], image=np.asarray(params[image], np.float64))


# --- what it finds


def _single(
    reader: Reader, upload: uploads.Upload, pool: NDArray[np.int64], texts: Sequence[NDArray[np.int64]]
) -> tuple[Found, bool]:
    """Return what was found of one text, and whether it was named among those it could be."""
    row = int(upload.rows[0])
    found = reader.found(upload.delta, [texts[row]])
    likeness = [len(found.tokens & set(texts[i].tolist())) / len(found.tokens | set(texts[i].tolist())) for i in pool]
    alike = np.flatnonzero(np.isclose(likeness, max(likeness)))
    same = [i for i in alike if np.array_equal(texts[pool[i]], texts[row])]
    return found, len(same) == len(alike)


def _own_round(
    subject: Subject,
    program: FineTune,
    reader: Reader,
    texts: Mapping[str, Sequence[NDArray[np.int64]]],
    generator: np.random.Generator,
) -> list[tuple[str, float, float]]:
    """Return (what was attacked, AUC, AUC of noise) of a round as the job would have it."""
    rows = {site: np.arange(len(each)) for site, each in texts.items()}
    seen = uploads.one_round(subject, rows)
    program.opened(subject.params)  # the reader's model has been trained meanwhile
    if not seen.uploads:
        return []
    first = seen.uploads[0].site
    attacked = [("an upload", seen.uploads[0].delta, texts[first])]
    if subject.job.secret_sums is not None:
        attacked.append(("the sum", seen.total, [text for upload in seen.uploads for text in texts[upload.site]]))
    nothing = uploads.noise(subject.params, generator)
    return [
        (what, reader.found(delta, those).best, reader.found(nothing, those).best) for what, delta, those in attacked
    ]


def _finding(
    subject: Subject,
    single: Sequence[tuple[Found, bool]],
    chance: Sequence[Found],
    own: Sequence[tuple[str, float, float]],
    picture: Picture,
    among: int,
    seconds: float,
) -> Finding:
    tries = len(single)
    found = [each for each, _ in single]
    measures = [
        Measure("one text: tokens found", _mean([f.recall for f in found]), _mean([f.recall for f in chance])),
    ]
    for name, kind in (("rows of the embedding", "rows"), ("span of attention", "span")):
        areas = [[getattr(f, kind) for f in every] for every in (found, chance)]
        if None not in areas[0] and None not in areas[1]:
            measures.append(Measure(f"one text: AUC of its tokens, by {name}", _mean(areas[0]), _mean(areas[1])))
    placed = [[f.placed for f in every if f.placed is not None] for every in (found, chance)]
    if placed[0]:
        measures.append(Measure("one text: tokens in their place", _mean(placed[0]), _mean(placed[1])))
    right = sum(named for _, named in single)
    measures += uploads.named(right, tries, among, subject)
    measures += [Measure(f"the job's round: AUC of its tokens, from {what}", area, none) for what, area, none in own]
    upload = uploads.is_better(np.array([f.best for f in found]), np.array([f.best for f in chance]))
    total = any(area > max(0.6, none + 0.1) for what, area, none in own if what == "the sum")
    verdict = uploads.verdict(subject, upload, total, any(measure.is_broken for measure in measures))
    says = (
        f"Where a site trains on one text, {measures[0].value:.0%} of its tokens are read off its update (guessing: "
        f"{measures[0].baseline:.0%}); the right text was named {right} of {tries} times, of {among}."
    )
    if not upload:
        says = (
            f"Of one text in an update the server reads no more than it reads in noise (the right one of {among} named "
            f"{right} of {tries} times)."
        )
    if total:
        says += " The round's sum, which the server learns, tells which tokens the sites have."
    if verdict == "holds" and upload:
        says += " That is within the ε that is promised."
    return Finding(
        NAME,
        "the server",
        f"{tries} updates of one text and one step, then a round of the job's own; {subject.protection}",
        tuple(measures),
        verdict,
        says,
        (picture,),
        seconds,
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _picture(
    subject: Subject,
    reader: Reader,
    tried: Sequence[tuple[uploads.Upload, NDArray[np.int64]]],
    single: Sequence[tuple[Found, bool]],
    texts: Mapping[str, Sequence[NDArray[np.int64]]],
) -> Picture:
    """Show texts, what their plain update gives, and what the update that leaves gives."""
    plain = uploads.unprotected(subject) if uploads.is_protected(subject) else None
    lines: list[tuple[str, str]] = []
    for (upload, _), (found, _) in list(zip(tried, single, strict=True))[:SHOWN]:
        text = texts[upload.site][upload.rows[0]]
        lines.append(("text", _shown(reader, text)))
        if plain is not None:
            rows = {site: upload.rows if site == upload.site else np.arange(1) for site in texts}
            deltas = {each.site: each.delta for each in uploads.one_round(plain, rows).uploads}
            lines.append(("plain", _read(reader, reader.found(deltas[upload.site], [text]))))
        lines.append(("protected" if plain is not None else "read", _read(reader, found)))

    def draw(axes: Any) -> None:
        for place, (kind, shown) in enumerate(lines):
            weight = "bold" if kind == "text" else "normal"
            axes.text(0.0, -place, kind, va="center", fontsize=7.5, weight=weight)
            axes.text(0.13, -place, shown, va="center", fontsize=7.5)
        axes.set_xlim(0, 1)
        axes.set_ylim(-len(lines) + 0.4, 0.6)
        axes.axis("off")

    ordered = single[0][0].order is not None
    note = "In the order that was found." if ordered else "The likeliest tokens, in the order of the vocabulary."
    return Picture(
        "What the server can read of a text", f"{note} {WIDTH} characters are shown.", draw, 0.3 + 0.24 * len(lines)
    )


def _read(reader: Reader, found: Found) -> str:
    if found.order is not None:
        return _shown(reader, np.array(found.order))
    return " ".join(_shown(reader, np.array([token])) for token in sorted(found.tokens))[:WIDTH]


def _shown(reader: Reader, ids: NDArray[np.int64]) -> str:
    text: str = reader.processor.decode(ids.tolist())
    return "".join(
        letter if letter.isprintable() and letter != "\N{REPLACEMENT CHARACTER}" else "·" for letter in text
    )[:WIDTH]
