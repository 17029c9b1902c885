# SPDX-License-Identifier: Apache-2.0
"""DP-SGD inside a site: Abadi et al. 2016, "Deep learning with differential privacy", arXiv:1607.00133, Algorithm 1.

    B  each of the site's n examples by itself with probability q = min(1, batch_size / n)
    g  (Σ_{i ∈ B} g_i · min(1, C / ‖g_i‖) + N(0, (σC)² I)) / (q n)

then the job's optimiser, which sees g alone: momentum, Adam, weight decay, FedProx's term and SCAFFOLD's controls act
on what is noised already, and change nothing of the promise. C = ``privacy.clip`` bounds an example's gradient over all
trained tensors together; σ is the noise multiplier.

Guarantees, each held by a test:

- batches and noise come from a secret of the operating system's, made afresh for every (round, site); so does the seed
  of dropout: masks that follow from a public seed and a row's place in its batch would differ for all later rows once
  an example is added;
- q and σ are those of :class:`hansa.privacy.plan.Terms` for this site's own n, so the ε shown is that of what ran;
- the denominator is fixed: how many examples a batch has shows nowhere.

| case | result |
|---|---|
| an empty batch | a step of noise alone |
| ``batch_size`` above n | q = 1: every example in every batch, denominator n |
| an example's gradient is NaN or infinite | it counts as zero, and nobody is told: a failure would tell of it |
| a trained tensor of half precision | ModelError |
| ``train.max_seconds`` runs out | fewer steps than were accounted for |

n itself is public: a site sends it as its weight. Training losses are not sent. Scripts of one's own make these steps
through :mod:`hansa.client.private`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hansa.core.config import Job, PrivacySection
from hansa.core.tree import Array
from hansa.errors import ModelError
from hansa.privacy.draws import Secret
from hansa.privacy.plan import Terms, steps_of


@dataclass(frozen=True)
class NoisySteps:
    """The draws of one round of DP-SGD at one site.

    Attributes:
        terms: clip, noise and rate.
        examples: n.
        count: how many steps the round has.
        secret: what is drawn from.
    """

    terms: Terms
    examples: int
    count: int
    secret: Secret = field(default_factory=Secret.fresh)

    @classmethod
    def told(cls, message: Mapping[str, Any]) -> NoisySteps:
        """Return the draws that :meth:`tell` told of."""
        section = PrivacySection.model_validate(message["section"])
        secret = Secret(bytes.fromhex(message["secret"]))
        return cls(Terms(section, message["releases"], message["rate"]), message["examples"], message["steps"], secret)

    def tell(self) -> dict[str, Any]:
        """Return the draws as JSON types, for another process of this site: the secret is in it, the noise known."""
        found = {"noise_multiplier": self.terms.noise_multiplier, "epsilon": None}
        return {
            "section": self.terms.section.model_copy(update=found).model_dump(mode="json"),
            "releases": self.terms.rounds,
            "rate": self.terms.rate,
            "examples": self.examples,
            "steps": self.count,
            "secret": self.secret.key.hex(),
        }

    @property
    def clip(self) -> float:
        """The largest norm of an example's gradient, C."""
        return self.terms.section.clip

    @property
    def seed(self) -> int:
        """A seed for whatever else the round draws, dropout above all."""
        return int(self.secret.generator("seed").integers(1 << 63))

    @property
    def per_epoch(self) -> int:
        """How many steps an epoch has."""
        return math.ceil(self.examples / round(self.terms.rate * self.examples))

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the row numbers of a step's batch, in order: each row with the rate's probability, by itself."""
        drawn = self.secret.generator("batch", step).random(self.examples)
        return np.flatnonzero(drawn < self.terms.rate)

    def batches(self) -> Iterator[NDArray[np.int64]]:
        """Yield the batches of all steps."""
        return map(self.batch, range(self.count))

    def noised(self, step: int, sums: Mapping[str, Array]) -> dict[str, Array]:
        """Return the gradient of a step.

        Args:
            step: its number, from 0; a number is for one step only.
            sums: name -> the sum of its batch's clipped gradients.

        Raises:
            ModelError: a tensor is of half precision.
        """
        std = self.terms.noise_multiplier * self.clip
        expected = self.terms.rate * self.examples
        noised = {}
        for name, total in sums.items():
            if total.dtype not in (np.float32, np.float64):
                raise ModelError(
                    f"Tensor {name!r} is {total.dtype}; dp-sgd trains float32 only, so that no sum is rounded past the "
                    "clip. Set model.dtype = 'float32', or train an adapter."
                )
            noise = self.secret.generator("noise", step, name).standard_normal(total.shape)
            noised[name] = ((total + std * noise) / expected).astype(total.dtype)
        return noised


def noisy_steps(job: Job) -> Callable[[int], NoisySteps] | None:
    """Return what draws a round of DP-SGD at a site with so many examples; None for a job without dp-sgd.

    Where the job gives an ε, the noise multiplier is looked for at the site, once for each n, which takes seconds;
    PrivacyError if no noise meets it.
    """
    section = job.privacy
    if section is None or section.mechanism != "dp-sgd":
        return None

    def begin(examples: int) -> NoisySteps:
        count = steps_of(job, examples)
        rate = min(1.0, job.train.batch_size / examples)
        return NoisySteps(Terms(section, job.rounds * count, rate), examples, count)

    return begin
