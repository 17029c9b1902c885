# SPDX-License-Identifier: Apache-2.0
"""Gradient inversion: a site's images or rows of numbers, read off its update.

analytic   Through the first fully connected layer. Of one example x its gradient is ∂W = δ xᵀ, ∂b = δ, so that
           x = ∂Wᵀ∂b / ‖∂b‖² to the last bit (Phong et al. 2018, eprint 2017/715; Geiping et al. 2020, arXiv:2003.14053,
           Prop. 3.1). Of several examples every unit that only one of them excites gives that one: x = ∂W_j / ∂b_j.
optimised  For models without such a layer (convolutions, transformers): the input whose gradient points where the
           update does, by signed Adam steps on 1 − cos + α·TV (Geiping et al. 2020, §4; TV is total variation).
labels     The class whose bias in the last layer grew: ∂b_c = p_c − [c = y] is negative for the label alone (Zhao et
           al. 2020, iDLG, arXiv:2001.02610).

Both use the update's direction alone, so neither a learning rate, a weight nor a clip is in the way. The strongest
case, one example and one step, is attacked first, then a round with the job's own local steps, taken for one gradient.

| case | result |
|---|---|
| adaptive local steps (Adam) | a first step shows the sign of the input, which is attacked as it is |
| one example at every site, under masks | uploads are attacked, and only in the job's own round the sum |
| inputs that are tokens, or numbers and more | skipped |
| a model with no such layer whose gradient torch can't differentiate | skipped |
| images | the attacker knows their range; where an input is optimised it is told the labels too |
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hansa.audit import uploads
from hansa.audit.finding import Finding, Measure, Picture, Skipped, Verdict
from hansa.audit.subject import Rows, Subject, Transparent
from hansa.client.torch import to_array, to_tensor
from hansa.core import tree as trees
from hansa.core.tree import Array, Tree
from hansa.runs.progress import Progress

NAME = "gradient inversion"
TARGETS = "targets"

ANALYTIC_TRIES, OPTIMISED_TRIES = 32, 10
MOST_AT_ONCE = 4
"""Examples that an optimised attack on the job's own round looks for at once."""
MOST_TRUE = 256
"""Examples of a round that recovered ones are held against, at most."""
SAME = 0.99
"""An input is recovered if some guess has this cosine to it, a relative error of about an eighth."""
STEPS, STEP, SMOOTH = 150, 0.1, 1e-3
SHOWN = 6

Guess = Callable[[Tree, Array], Array]
"""From an update's direction, and the labels of the examples looked for, to guesses (count, elements)."""


@dataclass(frozen=True)
class Way:
    """How a model is attacked.

    Attributes:
        name: ``analytic`` or ``optimised``.
        guess: see :data:`Guess`.
        tries: how many single examples are attacked.
        at_once: how many examples of the job's own round are looked for.
    """

    name: str
    guess: Guess
    tries: int
    at_once: int


def attack(subject: Subject, generator: np.random.Generator, progress: Progress) -> Finding | Skipped:
    """Invert updates of the job, as they leave the sites."""
    begun = time.monotonic()
    program = uploads.transparent(subject)
    if program is None:
        return Skipped(NAME, "A script's training examples can't be told apart.")
    first = program.batch(subject.sites[0], np.arange(1))
    key = _input(first)
    if key is None:
        return Skipped(NAME, "The model takes tokens; the attack on texts is for them.")
    way = _way(subject, program, key, first)
    if way is None:
        return Skipped(
            NAME, "The model's first layer is not fully connected, and torch can't differentiate its gradient."
        )
    progress.stage(NAME, way.tries + 2)
    strongest = uploads.alone(subject)
    tried = uploads.single_uploads(strongest, way.tries, generator, progress)
    if not tried:
        return Skipped(NAME, "No site was asked, in many rounds, and none sent an update.")
    single = _single(strongest, program, key, way, tried, generator)
    own, summed = _own_round(subject, program, key, way, generator)
    progress.advance()
    picture = _picture(strongest, program, key, way, tried[:SHOWN], single.guesses)
    progress.advance()
    return _finding(subject, way, single, own, summed, picture, time.monotonic() - begun)


# --- the attacks


def from_layer(weight: Array, bias: Array, count: int) -> Array:
    """Return the inputs that the gradient of a fully connected layer, or anything in its direction, tells of.

    Args:
        weight: (units, inputs).
        bias: (units,).
        count: how many examples it is of.

    Returns:
        (1, inputs) for one example; for more, a guess for every unit whose bias moved.

    >>> unit, x = np.array([0.5, -2.0]), np.array([1.0, 2.0, 3.0])
    >>> from_layer(np.outer(unit, x), unit, 1)
    array([[1., 2., 3.]])
    """
    whole = (weight.T @ bias) / max(float(bias @ bias), 1e-300)
    if count == 1:
        return whole[None]
    moved = bias != 0
    return np.concatenate([whole[None], weight[moved] / bias[moved, None]])


def label_of(bias: Array) -> int:
    """Return the class whose bias in the last layer grew the most."""
    return int(np.argmax(bias))


def optimised(
    gradient: Callable[[Tensor], Mapping[str, Tensor]],
    direction: Mapping[str, Tensor],
    shape: Sequence[int],
    low: float,
    high: float,
    generator: torch.Generator,
    steps: int,
) -> Tensor:
    """Return inputs, within bounds, whose gradient points along ``direction``.

    Args:
        gradient: ``inputs -> name -> gradient``, which torch can differentiate.
        direction: minus the update.
        shape: of the inputs.
        low, high: the smallest and largest element of any input.
        generator: what the first guess is drawn from.
        steps: of Adam, with the learning rate cut to a tenth after 3, 5 and 7 eighths of them.
    """
    drawn = torch.rand(tuple(shape), generator=generator)
    guess = (low + (high - low) * drawn).requires_grad_(True)
    stepper = torch.optim.Adam([guess], STEP * (high - low) / 2)
    marks = [steps * eighth // 8 for eighth in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(stepper, marks, 0.1)
    length = _norm(direction)
    for _ in range(steps):
        found = gradient(guess)
        along = torch.stack([(found[name] * direction[name]).sum() for name in direction]).sum()
        cost = 1 - along / (_norm(found) * length).clamp(min=1e-20) + SMOOTH * _variation(guess)
        guess.grad = torch.autograd.grad(cost, guess)[0].sign()
        stepper.step()
        schedule.step()
        with torch.no_grad():
            guess.clamp_(low, high)
    return guess.detach()


def _norm(tree: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(tensor**2).sum() for tensor in tree.values()]).sum().sqrt()


def _variation(images: Tensor) -> Tensor:
    """Return the mean step between neighbouring elements of the last two axes, of inputs that have them."""
    if images.ndim < 4:
        return images.new_zeros(())
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()


def _input(batch: Mapping[str, Array]) -> str | None:
    """Return which array of a batch is looked for; None unless one is, of numbers."""
    names = [name for name, array in batch.items() if name != TARGETS and trees.is_floating(array.dtype)]
    return names[0] if len(names) == 1 and set(batch) == {names[0], TARGETS} else None


def _way(subject: Subject, program: Transparent, key: str, first: Mapping[str, Array]) -> Way | None:
    shapes = {name: leaf.shape for name, leaf in subject.program.initial().items()}
    stem = next((stem for stem, shape in _layers(shapes) if shape[1] == first[key][0].size), None)
    if stem is not None:
        weight, bias = f"{stem}.weight", f"{stem}.bias"
        return Way(
            "analytic", lambda delta, labels: from_layer(delta[weight], delta[bias], len(labels)), ANALYTIC_TRIES, 2
        )
    differentiable: Any = getattr(program, "gradient", None)
    if differentiable is None:
        return None
    gradient = differentiable(subject.params)
    dtype = to_tensor(first[key]).dtype
    if not isinstance(next(iter(gradient({n: to_tensor(a) for n, a in first.items()}).values())), Tensor):
        return None
    site = subject.sites[0]
    known = program.batch(site, np.arange(min(program.count(site), MOST_TRUE)))[key]
    low, high = float(known.min()), float(known.max())
    shape = first[key].shape[1:]

    def guess(delta: Tree, labels: Array) -> Array:
        targets = torch.from_numpy(np.asarray(labels))
        direction = {name: -torch.from_numpy(np.asarray(leaf)).to(dtype) for name, leaf in delta.items()}
        found = optimised(
            lambda inputs: gradient({key: inputs.to(dtype), TARGETS: targets}),
            direction,
            (len(labels), *shape),
            low,
            high,
            torch.Generator().manual_seed(0),
            STEPS,
        )
        return to_array(found).reshape(len(labels), -1).astype(np.float64)

    return Way("optimised", guess, OPTIMISED_TRIES, MOST_AT_ONCE)


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    """Return the fully connected layers with a bias, in the model's order: stem and weight's shape."""
    return [
        (stem, shape)
        for name, shape in shapes.items()
        for stem in [name.removesuffix(".weight")]
        if stem != name and len(shape) == 2 and shapes.get(f"{stem}.bias") == shape[:1]
    ]


# --- what they find


@dataclass(frozen=True)
class Single:
    """What was found in the strongest case, a number a try.

    Attributes:
        guesses: (tries, elements).
        cosine, chance: of the guess to the example, and of what noise gives.
        error: ‖guess − example‖ / ‖example‖.
        named: whether the example has the largest cosine among ``among``.
        among: how many there were to choose from.
        labels, common: whether the label was read off, and how often the most frequent one is right; None where
            there is none.
    """

    guesses: Array
    cosine: NDArray[np.float64]
    chance: NDArray[np.float64]
    error: NDArray[np.float64]
    named: NDArray[np.bool_]
    among: int
    labels: NDArray[np.bool_] | None
    common: float


def _single(
    subject: Subject,
    program: Transparent,
    key: str,
    way: Way,
    tried: Sequence[tuple[uploads.Upload, Rows]],
    generator: np.random.Generator,
) -> Single:
    head = [stem for stem, _ in _layers({n: a.shape for n, a in subject.program.initial().items()})][-1:]
    guesses, cosine, chance, error, named, labels, common = [], [], [], [], [], [], []
    for upload, pool in tried:
        every = program.batch(upload.site, pool)
        flat = every[key].reshape(len(pool), -1).astype(np.float64)
        place = int(np.flatnonzero(pool == upload.rows[0])[0])
        told = every[TARGETS][place : place + 1]
        guesses.append(way.guess(upload.delta, told)[0])
        along = cosines(guesses[-1][None], flat)[0]
        cosine.append(along[place])
        named.append(int(np.argmax(along)) == place)
        error.append(np.linalg.norm(guesses[-1] - flat[place]) / np.linalg.norm(flat[place]))
        chance.append(cosines(way.guess(uploads.noise(subject.params, generator), told), flat[place : place + 1])[0, 0])
        if head and told.dtype.kind == "i":
            labels.append(label_of(upload.delta[f"{head[0]}.bias"]) == int(told[0]))
            common.append(float(np.bincount(every[TARGETS]).max() / len(pool)))
    return Single(
        np.array(guesses),
        np.array(cosine),
        np.array(chance),
        np.array(error),
        np.array(named),
        min(len(pool) for _, pool in tried),
        np.array(labels) if labels else None,
        float(np.mean(common)) if common else 0.0,
    )


def cosines(guesses: Array, truth: Array) -> Array:
    """Return the cosine of every guess to every true input, (guesses, inputs)."""
    lengths = np.linalg.norm(guesses, axis=1)[:, None] * np.linalg.norm(truth, axis=1)
    return np.asarray(guesses @ truth.T / np.maximum(lengths, 1e-300))


@dataclass(frozen=True)
class Round:
    """What was found in a round of the job's own: for each example, the best guess's cosine, and what noise gives."""

    cosine: NDArray[np.float64]
    chance: NDArray[np.float64]


def _own_round(
    subject: Subject, program: Transparent, key: str, way: Way, generator: np.random.Generator
) -> tuple[Round | None, Round | None]:
    """Attack the first upload of a round as the job would have it; and the sum, where only that is to be seen."""
    rows = {site: np.arange(program.count(site)) for site in uploads.program_sites(subject)}
    seen = uploads.one_round(subject, rows)

    def found(delta: Tree, sites: Sequence[str]) -> Round:
        batches = [program.batch(site, _some(rows[site], MOST_TRUE // len(sites), generator)) for site in sites]
        truth = np.concatenate([each[key].reshape(len(each[key]), -1) for each in batches]).astype(np.float64)
        labels = np.concatenate([each[TARGETS] for each in batches])[: way.at_once]
        labels = np.resize(labels, way.at_once)
        nothing = uploads.noise(subject.params, generator)
        return Round(*(cosines(way.guess(each, labels), truth).max(0) for each in (delta, nothing)))

    if not seen.uploads:
        return None, None
    own = found(seen.uploads[0].delta, [seen.uploads[0].site])
    if subject.job.secret_sums is None:
        return own, None
    return own, found(seen.total, [upload.site for upload in seen.uploads])


def _some(rows: Rows, most: int, generator: np.random.Generator) -> Rows:
    return rows if len(rows) <= most else np.sort(generator.choice(rows, max(1, most), replace=False))


def _finding(
    subject: Subject,
    way: Way,
    single: Single,
    own: Round | None,
    summed: Round | None,
    picture: Picture,
    seconds: float,
) -> Finding:
    tries = len(single.cosine)
    measures = [
        Measure("one example: cosine of guess and truth", float(single.cosine.mean()), float(single.chance.mean())),
        Measure("one example: relative error, median", float(np.median(single.error))),
        *uploads.named(int(single.named.sum()), tries, single.among, subject),
    ]
    if single.labels is not None:
        low, high = uploads.clopper_pearson(int(single.labels.sum()), tries)
        measures.append(Measure("label read off", float(single.labels.mean()), single.common, low, high))
    for what, each in (("an upload", own), ("the sum", summed)):
        if each is not None:
            name = f"the job's round: examples recovered from {what}"
            measures.append(Measure(name, recovered(each.cosine), recovered(each.chance)))
    alone = uploads.is_better(single.cosine, single.chance)
    upload = alone or (own is not None and _recovers(own))
    total = summed is not None and _recovers(summed)
    broken = any(measure.is_broken for measure in measures)
    verdict = uploads.verdict(subject, upload, total, broken)
    return Finding(
        NAME,
        "the server",
        f"{way.name} attack on {tries} updates of one example and one step, then on a round of the job's own; "
        f"{subject.protection}",
        tuple(measures),
        verdict,
        _says(subject, single, own, verdict, alone=alone, total=total),
        (picture,),
        seconds,
    )


def _recovers(found: Round) -> bool:
    """Say whether more than a twentieth of a round's examples is recovered, and more than from noise."""
    return recovered(found.cosine) > 0.05 + recovered(found.chance)


def recovered(cosine: NDArray[np.float64]) -> float:
    """Return the share of examples that some guess is the same as."""
    return float((cosine >= SAME).mean())


def _says(subject: Subject, single: Single, own: Round | None, verdict: Verdict, *, alone: bool, total: bool) -> str:
    right = f"{single.named.sum()} of {len(single.named)} times"
    if alone:
        says = (
            f"Where a site trains on one example, its update shows that example: of {single.among} the right one was "
            f"named {right}."
        )
    else:
        says = f"Of one example in an update the server reads no more than it reads in noise (named {right})."
    if own is not None:
        share = f"{recovered(own.cosine):.0%} of the examples"
        says += f" Of a round with the job's own steps, {share} can be recovered from an upload."
    if total:
        says += " From the round's sum, which the server learns, examples can be recovered."
    if verdict == "holds" and alone:
        says += " That is within the ε that is promised."
    return says


# --- how it looks


def _picture(
    subject: Subject,
    program: Transparent,
    key: str,
    way: Way,
    shown: Sequence[tuple[uploads.Upload, Rows]],
    guesses: Array,
) -> Picture:
    """Draw examples, what their plain update gives, and what the update that leaves gives."""
    truth, plain, hidden = [], [], list(guesses[: len(shown)])
    open_ = uploads.unprotected(subject) if uploads.is_protected(subject) else None
    for upload, _ in shown:
        batch = program.batch(upload.site, upload.rows)
        truth.append(batch[key][0])
        if open_ is not None:
            rows = {site: upload.rows if site == upload.site else np.arange(1) for site in uploads.program_sites(open_)}
            deltas = {each.site: each.delta for each in uploads.one_round(open_, rows).uploads}
            plain.append(way.guess(deltas[upload.site], batch[TARGETS])[0])
    strips = {"example": truth, "from a plain\nupdate": plain, "under the job's\nprotection": hidden}
    if open_ is None:
        strips = {"example": truth, "from the\nupdate": hidden}
    shaped = {name: [_scaled(_drawable(each, truth[0].shape)) for each in guesses] for name, guesses in strips.items()}

    def draw(axes: Any) -> None:
        for row, (name, tiles) in enumerate(shaped.items()):
            for column, tile in enumerate(tiles):
                axes.imshow(tile, extent=(column, column + 0.92, -row - 0.92, -row), cmap="gray", vmin=0, vmax=1)
            axes.text(-0.1, -row - 0.46, name, ha="right", va="center", fontsize=8.5)
        axes.set_xlim(-1.6, len(truth))
        axes.set_ylim(-len(shaped), 0)
        axes.set_aspect("equal")
        axes.axis("off")

    note = "Each column is one example, alone in a site's round; grey is scaled to each picture's own range."
    return Picture("What the server can see of an example", note, draw, 0.4 + 0.8 * len(shaped))


def _drawable(flat: Array, shape: tuple[int, ...]) -> Array:
    """Return an input as (height, width) or (height, width, 3): an image, or numbers laid out in rows."""
    if len(shape) == 3 and shape[0] in (1, 3):
        image = np.asarray(flat, np.float64).reshape(shape)
        return image[0] if shape[0] == 1 else image.transpose(1, 2, 0)
    values = np.asarray(flat, np.float64).reshape(-1)
    side = math.ceil(math.sqrt(values.size))
    padded = np.full(side * side, values.min())
    padded[: values.size] = values
    return padded.reshape(side, side)


def _scaled(image: Array) -> Array:
    return np.asarray((image - image.min()) / max(float(np.ptp(image)), 1e-300))
