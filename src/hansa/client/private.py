# SPDX-License-Identifier: Apache-2.0
"""DP-SGD for a script's own loop: what ``prepare(model, optimizer, loader)`` does in a job under ``dp-sgd``.

    model, optimizer, loader = flare.prepare(model, optimizer, loader)
    for batch in loader:                       # one example, collated as the loader's own batches are
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()                       # g_i is clipped and added up; no tensor moves
    flare.send(flare.FLModel(params=model.state_dict()))

The loader draws the batch of each step itself (:class:`~hansa.privacy.steps.NoisySteps`) and gives its examples one by
one: so what ``backward`` leaves is an example's gradient whatever the loss and the layers are, a mean over tokens, tied
weights and adapters included. Where the last example of a batch has been given, noise is added and the script's
optimiser makes its step, with FedProx's or SCAFFOLD's correction if the job has one. It costs a backward pass an
example.

| case | result |
|---|---|
| one pass over the loader | an epoch, n / batch_size steps, or what is left of the round's steps |
| ... where nothing is left of them | PrivacyError, before anything is drawn; fewer steps are fine |
| an empty batch | a step of noise, which the script does not see |
| ``train.batch_size``, ``train.steps``, ``train.epochs`` | are the job's; the loader's own batch size does not count |
| the round only evaluates | a pass gives nothing |
| ``optimizer.step()`` is left out for an example, and there is no gradient | it counts as zero; so does a NaN |
| ... and there is a gradient; ``step`` twice for one; without one of this loader | PrivacyError |
| the loop is left in the middle of a batch | that step is not made; the next pass draws the same batch |
| a pass is begun while another goes on | PrivacyError when the first goes on |
| a tensor was changed other than by these steps, before, between or after them | PrivacyError, nothing is sent |
| the model does not begin as it was received; what is sent is not what the steps gave | PrivacyError |
| metrics, and numbers that are logged, in training; a weight of the script's own | do not leave; n is the weight |
| the data set has another length than the job says; a sampler of the loader's own | PrivacyError |
| BatchNorm; tensors of half precision | ModelError (:mod:`hansa.client.clipped`, :mod:`hansa.privacy.steps`) |
| the optimizer moves a tensor that is not shared, L-BFGS, several processes | PrivacyError |
| random numbers | torch and ``meta["seed"]`` are seeded from a secret, not from the job's seed |

The promise is as good as the script: one that computes a loss from other examples than the batch that it was given,
sends metrics of its training data when it is to evaluate, or fails or stops early because of what it has seen, tells
what no noise hides. Nothing here can see that; who signed the script answers for it (docs/threat-model.md).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, SequentialSampler

from hansa.client import models, ranks
from hansa.client.clipped import check, clipped
from hansa.client.script import ParamsType, Session
from hansa.client.torch import to_array, to_tensor
from hansa.core.tree import Array
from hansa.errors import PrivacyError
from hansa.privacy.steps import NoisySteps

_SAMPLERS = (SequentialSampler, RandomSampler)

_OWN_STEP = "_step_before_prepare"
"""The attribute of an optimiser that keeps its own ``step``."""


def restore(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimiser its own ``step`` back."""
    own = vars(optimizer).pop(_OWN_STEP, None)
    if own is not None:
        optimizer.step = own  # type: ignore[method-assign]


def refuse(session: Session, what: str) -> None:
    """Raise PrivacyError if the task at hand is under dp-sgd, which ``what`` can't keep."""
    if session.assignment is not None and session.assignment.private is not None:
        raise PrivacyError(
            f"The job is under dp-sgd, and {what}. Write the loop yourself, with the model, optimizer and loader that "
            "hansa.client.prepare(model, optimizer, loader) returns; or use a recipe of Hansa's."
        )


class PrivateSteps:
    """A model and its optimiser under DP-SGD, from task to task.

    Args:
        session: says which task is at hand.
        model: what is trained.
        optimizer: what moves it; from now on its ``step()`` takes an example's gradient.
        loader: a DataLoader over a data set that has a length and is indexed.

    Raises:
        PrivacyError, ModelError: see the table above.
    """

    def __init__(self, session: Session, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        if ranks.world() > 1:
            refuse(session, "several processes would each draw batches and noise")
        if isinstance(optimizer, torch.optim.LBFGS):
            refuse(session, "L-BFGS looks at its loss several times a step")
        check(model)
        names = models.parameters(model)
        moved = [p for group in optimizer.param_groups for p in group["params"]]
        known = {id(p) for p in names.values()}
        if any(id(p) not in known for p in moved):
            refuse(session, "this optimizer moves tensors that are not shared, whose own gradients would tell")
        self.tensors = {n: p for n, p in names.items() if any(p is other for other in moved) and p.requires_grad}
        self.loader = PoissonLoader(self, loader)
        self._session = session
        self._step = vars(optimizer).setdefault(_OWN_STEP, optimizer.step)

        def step(_: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            return self._take(closure)

        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        self._noisy: NoisySteps | None = None
        self._task = 0
        self._made = 0
        self._pass = 0
        self._sums: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}
        self._open = False
        session.private = self

    @property
    def drawn(self) -> NoisySteps:
        """The draws of the task at hand."""
        assignment = self._session.assignment
        if self._session.task is None or assignment is None or assignment.private is None:
            raise PrivacyError(
                "The prepared loader and optimizer belong between receive() and send(), in a job under dp-sgd. Call "
                "prepare() again if this process has gone on to another job."
            )
        if self._noisy is None or self._task != assignment.number:
            self._noisy, self._task, self._made = NoisySteps.told(assignment.private), assignment.number, 0
            self._held = {}
        return self._noisy

    def _begin(self, noisy: NoisySteps) -> None:
        """Check what a round starts from."""
        received = self._session.received
        if strange := sorted(self.tensors.keys() - received.keys()):
            raise PrivacyError(f"The optimizer moves {strange[0]!r}, which is not shared, so its gradients would tell.")
        held = {name: to_tensor(received[name]).to(p.device, p.dtype) for name, p in self.tensors.items()}
        self._check_same(held, "does not begin as it was received")
        if (found := len(self.loader.dataset)) != noisy.examples:
            raise PrivacyError(
                f"The loader's data set has {found} examples, and the job says that {self._session.site} has "
                f"{noisy.examples}: the noise is measured for that. Mend recipe.examples."
            )
        torch.manual_seed(noisy.seed)
        self._held = held

    def rows(self) -> Iterator[int]:
        """Yield the rows of a pass; a step is made when the first row of the next one is asked for, or the end.

        Raises:
            PrivacyError: no step is left of those that were accounted for; see also the table above.
        """
        noisy = self.drawn
        self._pass = now = self._pass + 1
        if self._session.task != "train":
            return
        if not self._held:
            self._begin(noisy)
        left = noisy.count - self._made
        if left <= 0:
            raise PrivacyError(
                f"The privacy plan accounts for {noisy.count} steps a round, and all are made. Let the script make "
                "fewer, or raise train.steps or train.epochs in the job."
            )
        for _ in range(min(left, noisy.per_epoch)):
            self._sums = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}
            for row in noisy.batch(self._made):
                self._forget()
                self._open = True
                yield int(row)
                self._close()
                if self.drawn is not noisy or self._pass != now:
                    raise PrivacyError("Another pass over the prepared loader has begun. Use one at a time.")
            self._make(noisy)

    def _close(self) -> None:
        """The script asks for the next example."""
        if self._open and any(p.grad is not None and bool(p.grad.any()) for p in self.tensors.values()):
            raise PrivacyError(
                "The script made a gradient and did not call optimizer.step(): under dp-sgd each example is a step of "
                "the loop, and gradients must not be gathered over several."
            )
        self._open = False

    def check_sent(self, params: Mapping[str, Array], kind: ParamsType | str | None) -> int:
        """Return how many steps made the parameters that are about to be sent.

        Raises:
            PrivacyError: they are not what the steps gave, or there was no step.
        """
        assignment = self._session.assignment
        if assignment is None or self._task != assignment.number or not self._made:
            raise PrivacyError(
                "The job is under dp-sgd, and no step was made in this round with the prepared optimizer and loader."
            )
        received = self._session.received
        trained = {**received, **{name: to_array(leaf) for name, leaf in self._held.items()}}
        for name in params.keys() & trained.keys():  # another is refused by whom it is sent to
            leaf = trained[name] - received[name] if kind == ParamsType.DIFF else trained[name]
            if not np.array_equal(leaf, params[name]):
                raise PrivacyError(
                    f"The tensor {name!r} that is sent is not what the steps of dp-sgd gave: something else has "
                    "changed it, and no noise covers that. Send the prepared model's state_dict() as it is."
                )
        return self._made

    def _take(self, closure: Callable[[], Any] | None) -> Any:
        """Stand in the place of ``optimizer.step``: clip the example's gradient and add it up."""
        noisy = self.drawn
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if not self._open:
            raise PrivacyError(
                "optimizer.step() was called without a new example of the loader that prepare() returned: one step an "
                "example, and no batches of another loader."
            )
        grads = {n: (torch.zeros_like(p) if p.grad is None else p.grad)[None] for n, p in self.tensors.items()}
        for name, total in clipped(grads, noisy.clip).items():
            self._sums[name] += total
        self._open = False
        return value

    def _make(self, noisy: NoisySteps) -> None:
        """Add noise to what was added up, and make the optimiser's own step."""
        self._check_same(self._held, "was changed between two steps")
        noised = noisy.noised(self._made, {name: to_array(total) for name, total in self._sums.items()})
        for name, tensor in self.tensors.items():
            tensor.grad = to_tensor(noised[name]).to(tensor.device)
        self._step()
        self._made += 1
        self._forget()
        self._held = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def _check_same(self, wanted: Mapping[str, Tensor], how: str) -> None:
        for name, tensor in self.tensors.items():
            held = wanted[name]
            if held.shape != tensor.shape or not torch.allclose(tensor.detach(), held, rtol=0, atol=0, equal_nan=True):
                raise PrivacyError(
                    f"The tensor {name!r} {how}: under dp-sgd only the prepared optimizer changes it, from the model "
                    "that was received."
                )

    def _forget(self) -> None:
        for tensor in self.tensors.values():
            tensor.grad = None


class PoissonLoader:
    """The examples of the batches of DP-SGD, one by one, each collated as a batch of one.

    Attributes:
        dataset: what the examples come from; all of it counts.
    """

    def __init__(self, steps: PrivateSteps, loader: Any) -> None:
        self.dataset: Any = getattr(loader, "dataset", None)
        self.collate_fn: Any = getattr(loader, "collate_fn", None)
        if not callable(self.collate_fn) or not isinstance(self.dataset, Sized):
            raise PrivacyError(
                "The job is under dp-sgd: prepare(model, optimizer, loader) needs a torch DataLoader over a data set "
                "with a length, to draw batches from it."
            )
        if type(loader.sampler) not in _SAMPLERS:
            raise PrivacyError(
                f"The loader draws by a {type(loader.sampler).__name__}, and under dp-sgd batches are drawn as the "
                "accountant assumes. Leave the sampler out; torch.utils.data.Subset gives a part of a data set."
            )
        self._steps = steps

    def __len__(self) -> int:
        """Return how many examples a pass has on average."""
        noisy = self._steps.drawn
        return max(1, round(min(noisy.count, noisy.per_epoch) * noisy.terms.rate * noisy.examples))

    def __iter__(self) -> Iterator[Any]:
        assert callable(self.collate_fn)
        for row in self._steps.rows():
            yield self.collate_fn([self.dataset[row]])
