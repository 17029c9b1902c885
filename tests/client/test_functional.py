# SPDX-License-Identifier: Apache-2.0
"""Training as a pure function of (params, batch): one site alone, in NumPy and in torch."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from hansa.client.batches import num_steps, shuffled
from hansa.client.functional import Examples, FunctionalProgram, accuracy, of_numpy, of_torch, optimizer_of
from hansa.core.config import TrainSection
from hansa.core.fit import Trait
from hansa.core.optimizer import sgd
from hansa.core.ports import EVERYONE, Correction
from hansa.core.values import Plan
from hansa.errors import DataError, JobError, ModelError, NonFiniteError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(23, 5)).astype(np.float32)
Y = RNG.integers(0, 3, 23)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def program(section=None, module=None, data=None, **options):
    functional = of_torch(module or mlp(), cross_entropy, {"accuracy": accuracy})
    return FunctionalProgram(functional, data or {"s": Examples((X, Y), (X[:9], Y[:9]))}, section or SGD, **options)


SGD = TrainSection(optimizer="sgd", lr=0.1, batch_size=4, epochs=2)


def plan_for(program, round=1):
    return Plan("job", round, "train", 0, program.initial(), seed=5)


def plainly(module, optimizer, section, clip=None):
    """Train ``module`` in an ordinary torch loop over the same batches."""
    steps = num_steps(section, len(Y))
    for rows, _ in zip(shuffled(len(Y), section.batch_size, 5, 1, "s", "batches"), range(steps), strict=False):
        optimizer.zero_grad()
        cross_entropy(module(torch.from_numpy(X[rows])), torch.from_numpy(Y[rows])).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(
    "section",
    [
        SGD,
        SGD.model_copy(update={"momentum": 0.9, "weight_decay": 0.1}),
        SGD.model_copy(update={"clip_grad": 0.2}),
        TrainSection(optimizer="adamw", lr=0.01, weight_decay=0.1, batch_size=4, steps=12),
    ],
)
def test_local_steps_are_those_of_torchs_own_optimisers(section):
    module = mlp()
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    more = {"momentum": section.momentum} if section.optimizer == "sgd" else {}
    own = kinds[section.optimizer](module.parameters(), lr=section.lr, weight_decay=section.weight_decay, **more)
    expected = plainly(module, own, section, section.clip_grad)
    trained = program(section)
    work = trained.train("s", plan_for(trained), None)
    for name, leaf in expected.items():
        np.testing.assert_allclose(work.params[name], leaf, atol=1e-6)
        assert abs(leaf - trained.initial()[name]).max() > 1e-3


def test_training_depends_on_its_arguments_alone():
    trained = program()
    plan = plan_for(trained)
    before = {name: leaf.copy() for name, leaf in trained.initial().items()}
    first, again = (trained.train("s", plan, None) for _ in range(2))
    other = trained.train("s", plan_for(trained, round=2), None)
    for name, leaf in first.params.items():
        np.testing.assert_array_equal(leaf, again.params[name])
        assert (leaf != other.params[name]).any(), "batches follow the round"
        np.testing.assert_array_equal(trained.initial()[name], before[name])


def test_the_correction_sees_the_gradient_last():
    section = SGD.model_copy(update={"steps": 1, "epochs": None, "clip_grad": 1e-6})
    trained = program(section)
    context = {"push": {name: np.ones_like(leaf) for name, leaf in trained.initial().items()}}
    correction = Correction(context, lambda c, params, grads: {n: g + c["push"][n] for n, g in grads.items()})
    work = trained.train("s", plan_for(trained), correction)
    for name, leaf in trained.initial().items():
        np.testing.assert_allclose(work.params[name], leaf - 0.1, atol=1e-5)


def test_sums_count_every_row_that_was_seen():
    trained = program(TrainSection(optimizer="sgd", lr=1e-9, batch_size=4, epochs=2))
    work = trained.train("s", plan_for(trained), None)
    assert work.steps.count == 12
    assert work.steps.lr_sum == pytest.approx(12e-9)
    assert work.num_examples == 23
    assert work.sums["examples"] == 46
    with torch.no_grad():
        outputs = mlp()(torch.from_numpy(X))
        loss = float(cross_entropy(outputs, torch.from_numpy(Y)))
        right = float((outputs.argmax(1) == torch.from_numpy(Y)).double().mean())
    metrics = trained.summarise(work.sums)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(right)


def test_evaluation_is_over_the_held_out_rows():
    trained = program(SGD.model_copy(update={"eval_batch_size": 4}))
    sums = trained.evaluate("s", plan_for(trained))
    with torch.no_grad():
        expected = cross_entropy(mlp()(torch.from_numpy(X[:9])), torch.from_numpy(Y[:9]), reduction="sum")
    assert sums["examples"] == 9
    assert sums["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_may_be_a_function_a_module_or_ones_own():
    for loss in (mse_loss, nn.MSELoss(), lambda out, y: ((out - y) ** 2).mean(1)):
        functional = of_torch(nn.Linear(5, 2), loss)
        params = {name: torch.from_numpy(leaf) for name, leaf in functional.params.items()}
        batch = (torch.from_numpy(X), torch.zeros(23, 2))
        with torch.no_grad():
            expected = (nn.functional.linear(batch[0], params["weight"], params["bias"]) ** 2).mean(1)
        np.testing.assert_allclose(functional.rows(params, batch)["loss"], expected, rtol=1e-5)


def test_a_loss_that_averages_over_rows_is_refused():
    functional = of_torch(mlp(), lambda out, y: cross_entropy(out, y))
    trained = FunctionalProgram(functional, {"s": Examples((X, Y))}, SGD)
    with pytest.raises(JobError, match="one value a row"):
        trained.train("s", plan_for(trained), None)


def test_batch_norm_is_refused_and_dropout_is_trained_a_site_at_a_time():
    with pytest.raises(ModelError, match="BatchNorm1d"):
        of_torch(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), cross_entropy)
    dropping = program(module=nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)))
    assert Trait.STEPWISE in dropping.traits
    assert Trait.STEPWISE not in program().traits
    first, again = (dropping.train("s", plan_for(dropping), None) for _ in range(2))
    np.testing.assert_array_equal(first.params["0.weight"], again.params["0.weight"])


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 5, bias=False)
            self.second = nn.Linear(5, 5, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    functional = of_torch(Tied(), mse_loss)
    assert list(functional.params) == ["first.weight"]
    eye = {"first.weight": torch.eye(5)}
    np.testing.assert_allclose(functional.rows(eye, (torch.from_numpy(X), torch.from_numpy(X)))["loss"], 0)


def test_time_runs_out_after_at_least_one_step():
    hasty = program(SGD.model_copy(update={"max_seconds": 1e-9}))
    work = hasty.train("s", plan_for(hasty), None)
    assert work.steps.count == 1
    assert work.completed == pytest.approx(1 / 12)
    assert Trait.TIMED in hasty.traits


def test_a_loss_that_is_not_finite_names_the_step():
    wild = program(SGD.model_copy(update={"lr": 1e38}))
    with pytest.raises(NonFiniteError, match=r"step [2-9]") as caught:
        wild.train("s", plan_for(wild), None)
    assert (caught.value.site, caught.value.round) == ("s", 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((X[:0], Y[:0]), "no examples"),
        ((X, Y[:5]), r"\[23, 5\], \[5\]"),
        ((X,), "inputs and targets"),
        ((np.where(np.arange(23)[:, None] == 4, np.nan, X), Y), "Row 4"),
    ],
)
def test_broken_data_are_named_before_training(arrays, message):
    broken = program(data={"bremen": Examples(arrays)})
    with pytest.raises(DataError, match=message) as caught:
        broken.inspect("bremen")
    assert caught.value.site == "bremen"


def test_inspection_counts_rows_and_labels():
    report = program(labels=["a", "b", "c"]).inspect("s")
    assert report.counts == {"train": 23, "test": 9}
    assert report.labels == {name: int((i == Y).sum()) for i, name in enumerate("abc")}


def test_everyone_is_all_sites_in_one():
    data = {"a": Examples((X[:10], Y[:10]), (X[:3], Y[:3])), "b": Examples((X[10:], Y[10:]))}
    pooled = program(data=data)
    np.testing.assert_array_equal(pooled.examples(EVERYONE).train[0], X)
    assert pooled.evaluate(EVERYONE, plan_for(pooled))["examples"] == 3
    assert pooled.evaluate("b", plan_for(pooled)) == {}
    with pytest.raises(DataError, match="Did you mean"):
        pooled.examples("aa")


def test_an_export_can_be_loaded_into_the_module(tmp_path):
    from safetensors.torch import load_file

    trained = program()
    trained.export(trained.initial(), tmp_path)
    mlp().load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))


def test_numpy_evaluates_by_its_loss_or_by_what_it_is_given():
    def gradient(params, batch):
        error = params["w"] - batch[-1].mean()
        return float(error**2), {"w": 2 * error}

    data = {"s": Examples((X, X[:, 0]), (X[:4], X[:4, 0]))}
    plan = Plan("job", 1, "evaluate", 0, {"w": np.zeros(())})
    alone = FunctionalProgram(of_numpy(plan.params, gradient), data, SGD, sgd(0.1))
    assert alone.evaluate("s", plan)["loss"] == pytest.approx(4 * float(X[:4, 0].mean()) ** 2)
    rows = of_numpy(plan.params, gradient, lambda params, batch: {"loss": batch[-1] * 0 + 2.0, "off": batch[-1]})
    given = FunctionalProgram(rows, data, SGD, sgd(0.1))
    assert given.summarise(given.evaluate("s", plan)) == pytest.approx({"loss": 2.0, "off": float(X[:4, 0].mean())})


def test_the_jobs_optimisers():
    assert optimizer_of(SGD).plain
    assert not optimizer_of(SGD.model_copy(update={"momentum": 0.5})).plain
    assert not optimizer_of(TrainSection()).plain
