# SPDX-License-Identifier: Apache-2.0
"""A federation over ``regression`` in plain NumPy float64, each mechanism written down once more and naively.

Who was asked, and who answered, is taken from the records of a run, and protective draws from the secret that the run
had; all else is computed here. Whatever a job turns on has to come to the same models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np

import regression
from hansa.core.config import Job
from hansa.core.values import RoundRecord
from hansa.privacy.draws import Secret
from hansa.privacy.matrix import coefficients, factorised, inverse
from hansa.privacy.plan import SLACK

SITES = tuple(regression.ROWS)
SCALE = 1024.0


def bounded(vector, most):
    length = np.linalg.norm(vector)
    return vector if length <= most else vector * (most / length)


class ByHand:
    """The models of ``job`` after each of its rounds.

    Args:
        job: what is turned on.
        records: of the run; its models are not looked at.
        secret: of the server's draws, and of every site's.
        noisy: whether what sites draw is to be found again; else their noise is too small to matter.
    """

    def __init__(self, job: Job, records: Sequence[RoundRecord], secret: Secret, noisy: bool) -> None:
        self.job, self.secret, self.noisy = job, secret, noisy
        self.private = job.privacy
        self.mechanism = job.privacy.mechanism if job.privacy else None
        self.w = np.zeros(regression.SIZE)
        self.clip = job.privacy.clip if job.privacy else math.inf
        self.control = np.zeros_like(self.w)
        self.own = {site: np.zeros_like(self.w) for site in SITES}
        self.momentum, self.squares = np.zeros_like(self.w), np.zeros_like(self.w)
        self.late: dict[str, tuple[int, np.ndarray]] = {}
        self.models = [self._round(number, record) for number, record in enumerate(records)]

    def _round(self, number: int, record: RoundRecord):
        if self.job.workflow.name == "cyclic":
            for site in record.asked:
                self.w = self._trained(self.w, site, number)
            return self.w.copy()
        start, moves = self.w.copy(), {}
        late, self.late = self.late, {}
        controls = {}
        for site in sorted({*record.asked, *record.accepted}):
            if site not in record.asked:
                age, move = late[site]
                moves[site] = (number - age, move)
                continue
            before = self.own[site]
            move = self._trained(start, site, number) - start
            if self.job.strategy.name == "scaffold":
                steps = self._count() * self.job.train.lr
                after = before - self.control - move / steps
                if site in record.accepted:
                    controls[site] = after - before
                    self.own[site] = after
            if site in record.accepted:
                moves[site] = (0, move)
            else:
                self.late[site] = (number, move)
        self._step(number, self._mean(number, moves))
        if self.job.strategy.name == "scaffold":
            known = self._everyones(record)
            for site, moved in controls.items():
                self.control = self.control + regression.ROWS[site] * self._filtered(moved, site) / known
        return self.w.copy()

    def _everyones(self, record: RoundRecord) -> float:
        """Return all weights as the server knows them: of as many sites as there are, of the mean weight so far."""
        self.seen = [*getattr(self, "seen", []), *(regression.ROWS[site] for site in record.accepted)]
        known = len(SITES) * np.mean(self.seen)
        previous = getattr(self, "known", known)
        self.control = self.control * (previous / known)
        self.known = known
        return known

    def _count(self) -> int:
        return 1 if self.job.train.max_seconds else self.job.train.steps

    def _trained(self, start, site: str, number: int):
        """Return where a site's local steps end, all of its rows in every batch."""
        train, w = self.job.train, start.copy()
        inputs, targets = regression.rows(site) if site in SITES else everybodys()
        first, second = np.zeros_like(w), np.zeros_like(w)
        for step in range(self._count()):
            each = inputs * (inputs @ w - targets)[:, None]
            if self.mechanism == "dp-sgd":
                total = sum(bounded(row, self.clip) for row in each)
                if self.noisy:
                    drawn = self.secret.generator("noise", step, "w").standard_normal(w.shape)
                    total = total + self.private.noise_multiplier * self.clip * drawn
                gradient = total / len(each)
            else:
                gradient = each.mean(0)
            if train.clip_grad:
                gradient = gradient * min(1.0, train.clip_grad / (np.linalg.norm(gradient) + 1e-6))
            if self.job.strategy.name == "fedprox":
                gradient = gradient + 0.01 * (w - start)
            if self.job.strategy.name == "scaffold":
                gradient = gradient - self.own[site] + self.control
            if train.optimizer == "adamw":
                first = 0.9 * first + 0.1 * gradient
                second = 0.999 * second + 0.001 * gradient**2
                scaled = np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
                w = w - train.lr * first / (1 - 0.9 ** (step + 1)) / scaled
            else:
                first = train.momentum * first + gradient
                w = w - train.lr * first
        return w

    def alone(self, site: str, rounds: int):
        """Return where ``rounds`` of local steps end, nothing being shared."""
        w = np.zeros_like(self.w)
        for _ in range(rounds):
            w = self._trained(w, site, 0)
        return w

    def _filtered(self, move, site: str):
        """Return what the filters make of a weighed update, over its weight: a cast is the only one after weighing."""
        if not any(item.name == "cast" for item in self.job.filters):
            return move
        weight = self._weight(site)
        return (weight * move).astype(ml_dtypes.bfloat16).astype(float) / weight

    def _weight(self, site: str) -> float:
        counts_once = self.private is not None and self.mechanism != "dp-sgd"
        return 1.0 if counts_once or self.job.strategy.robust else regression.ROWS[site] / SCALE

    def _sent(self, move, site: str):
        """Return a site's update as the server gets it, over its weight."""
        robust = self.job.strategy.robust
        if robust is not None and robust.max_norm is not None:
            move = bounded(move, robust.max_norm)
        for item in self.job.filters:
            if item.name == "clip":
                move = bounded(move, item.options["max_norm"])
        if self.private is not None and self.mechanism != "dp-sgd":
            move = bounded(move, self.clip)
        if self.mechanism == "local" and self.noisy:
            std = self.private.noise_multiplier * self.clip * SLACK
            move = move + np.asarray(self.secret.gaussian(move.shape, move.dtype, std, "delta", "w"))
        return self._filtered(move, site)

    def _mean(self, number: int, moves):
        sent = {site: self._sent(move, site) for site, (_, move) in moves.items()}
        if self.job.strategy.robust is not None:
            return RULES[self.job.strategy.robust.rule](np.stack([sent[site] for site in sorted(sent)]))
        if self.mechanism in ("central", "dp-ftrl", "distributed"):
            return self._noised(number, sent, moves)
        weights = {site: self._weight(site) * (1 + age) ** -0.5 for site, (age, _) in moves.items()}
        return sum(weights[site] * move for site, move in sent.items()) / sum(weights.values())

    def _noised(self, number: int, sent, moves):
        private, shape = self.private, self.w.shape
        total = sum(sent.values(), np.zeros(shape))
        if self.mechanism == "distributed":
            return total / math.ceil(self.job.cohort.sample * len(SITES))
        multiplier, std = private.noise_multiplier, private.noise_multiplier * self.clip * SLACK
        if self.mechanism == "dp-ftrl":
            made = factorised(self.job.rounds, private.participations, private.separation)
            column = inverse(coefficients(made.bands, self.job.rounds))
            draws = [
                np.asarray(self.secret.gaussian(shape, total.dtype, std * made.sensitivity, "delta", "w", past))
                for past in range(number + 1)
            ]
            noise = sum(column[number - past] * drawn for past, drawn in enumerate(draws))
            return (total + noise) / (len(SITES) / private.separation)
        expected = self.job.cohort.sample * len(SITES)
        if private.adaptive_clip is not None:
            count = private.adaptive_clip.noise
            std *= (multiplier**-2 - (2 * count) ** -2) ** -0.5 / multiplier
            halves = sum(0.5 if self._within(move) else -0.5 for _, move in moves.values())
            share = (halves + self.secret.generator(number, "unclipped").normal(0, count)) / expected + 0.5
        noise = np.asarray(self.secret.gaussian(shape, total.dtype, std, number, "delta", "w"))
        if private.adaptive_clip is not None:
            self.clip *= math.exp(-private.adaptive_clip.lr * (share - private.adaptive_clip.quantile))
            if self.job.masks is not None:
                self.clip = min(self.clip, self.job.masks.range / SLACK)
        return (total + noise) / expected

    def _within(self, move) -> bool:
        for item in self.job.filters:
            if item.name == "clip":
                move = bounded(move, item.options["max_norm"])
        return float(np.linalg.norm(move)) <= self.clip

    def _step(self, number: int, mean) -> None:
        name, gradient = self.job.strategy.name, -mean
        if name in ("fedavg", "fedprox", "scaffold"):
            self.w = self.w + mean
        elif name == "fedavgm":
            self.momentum = 0.9 * self.momentum + mean
            self.w = self.w + self.momentum
        else:
            beta, lr = {"fedadam": (0.9, 1e-2), "fedyogi": (0.9, 1e-2), "fedadagrad": (0.0, 1e-1)}[name]
            square = gradient**2
            self.momentum = beta * self.momentum + (1 - beta) * gradient
            self.squares = {
                "fedadam": 0.99 * self.squares + 0.01 * square,
                "fedyogi": self.squares - 0.01 * square * np.sign(self.squares - square),
                "fedadagrad": self.squares + square,
            }[name]
            self.w = self.w - lr * self.momentum / (np.sqrt(self.squares) + 1e-3)


def scores(updates, near):
    squares = ((updates[:, None] - updates[None]) ** 2).sum(-1)
    return np.sort(squares, axis=1)[:, 1 : near + 1].sum(1)


def multi_krum(updates):
    order = np.argsort(scores(updates, len(updates) - 3), kind="stable")
    return updates[order[: len(updates) - 1]].mean(0)


def geometric_median(updates):
    centre = updates.mean(0)
    for _ in range(2000):
        weights = 1 / np.maximum(1e-6, np.linalg.norm(updates - centre, axis=1))
        centre = weights @ updates / weights.sum()
    return centre


RULES = {  # for one site that may lie
    "mean": lambda updates: updates.mean(0),
    "median": lambda updates: np.median(updates, axis=0),
    "trimmed-mean": lambda updates: np.sort(updates, axis=0)[1:-1].mean(0),
    "krum": lambda updates: updates[np.argmin(scores(updates, len(updates) - 3))],
    "multi-krum": multi_krum,
    "geometric-median": geometric_median,
}


def everybodys():
    """Return the rows of all sites."""
    return tuple(map(np.concatenate, zip(*map(regression.rows, SITES), strict=True)))


def loss(w) -> float:
    """Return the loss of a model over all rows of all sites."""
    inputs, targets = everybodys()
    return float(((inputs @ w - targets) ** 2 / 2).mean())
