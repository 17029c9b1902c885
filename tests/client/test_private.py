# SPDX-License-Identifier: Apache-2.0
"""DP-SGD in scripts of one's own: the recipe's bits, what is drawn and clipped, and what a script must not do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import load_file
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler, Subset, TensorDataset, WeightedRandomSampler

from hansa.client import hf, lightning
from hansa.client import script as client
from hansa.client import torch as local
from hansa.client.script import Assignment, FLModel, ParamsType, Session
from hansa.client.steps import prepare
from hansa.core.config import PrivacySection, parse
from hansa.errors import FitError, JobError, ModelError, PrivacyError, QuorumError
from hansa.privacy.draws import Secret
from hansa.privacy.plan import Terms
from hansa.privacy.steps import NoisySteps
from hansa.recipes import script
from hansa.recipes import tabular_classification as tabular
from hansa.simulation.run import run

pytestmark = pytest.mark.timeout(120)

N = 40
CLIP = 1.5


@pytest.fixture(autouse=True)
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_session", None)


def noisy(*, noise: float = 0.0, rate: float = 0.2, count: int = 10, examples: int = N, key: int = 1) -> NoisySteps:
    section = PrivacySection(mechanism="dp-sgd", clip=CLIP, noise_multiplier=1.0, delta=1e-3)
    section = section.model_copy(update={"noise_multiplier": noise})
    return NoisySteps(Terms(section, count, rate), examples, count, Secret(bytes([key]) * 32))


def session(
    monkeypatch: pytest.MonkeyPatch, drawn: NoisySteps, received: dict[str, Any], task: str = "train"
) -> Session:
    """Return a session that has a task at hand."""
    made = Session(None, {"site": "site-1"})
    monkeypatch.setattr(client, "_session", made)
    monkeypatch.setattr(NoisySteps, "told", classmethod(lambda cls, message: drawn))
    give(made, received, 1, task)
    return made


def give(made: Session, received: dict[str, Any], number: int, task: str = "train") -> None:
    made.assignment = Assignment(number, task, "j", number, 3, {}, None, {})
    made.received = {name: leaf.copy() for name, leaf in received.items()}
    made._answered = False


def data(dimension: int = 4, count: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = 3 * torch.randn(count, dimension, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def state(model: nn.Module) -> dict[str, Any]:
    return local.copy_out(dict(model.named_parameters()))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(monkeypatch: pytest.MonkeyPatch, drawn: NoisySteps, **options: Any) -> tuple[Session, nn.Module, list[int]]:
    """Train a pass; return the examples of each draw, in order, too."""
    model = net()
    made = session(monkeypatch, drawn, state(model))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    model, sgd, loader = prepare(model, sgd, DataLoader(data(), batch_size=7, shuffle=True))
    seen = []
    for batch in loader:
        assert len(batch[0]) == 1
        seen.append(int((data().tensors[0] == batch[0]).all(1).nonzero()[0, 0]))
        sgd.zero_grad()
        loss(model, batch).backward()
        sgd.step()
    return made, model, seen


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.01}])
def test_a_loop_makes_the_steps_of_dp_sgd(monkeypatch, options):
    """Against true gradients of single examples, clipped and added up by hand, and the same optimiser."""
    drawn = noisy(noise=0.7, count=5)
    _, model, seen = trained(monkeypatch, drawn, **options)
    assert seen == [row for batch in drawn.batches() for row in batch]
    hand = net()
    sgd = torch.optim.SGD(hand.parameters(), lr=0.1, **options)
    x, y = data().tensors
    clips = 0
    for step, rows in enumerate(drawn.batches()):
        total = {name: np.zeros(p.shape, np.float32) for name, p in hand.named_parameters()}
        for row in rows:
            grads = torch.autograd.grad(loss(hand, (x[row][None], y[row][None])), list(hand.parameters()))
            norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
            clips += norm > CLIP
            for (name, _), grad in zip(hand.named_parameters(), grads, strict=True):
                total[name] += (grad * min(1.0, CLIP / norm)).numpy()
        found = drawn.noised(step, total)
        for name, p in hand.named_parameters():
            p.grad = torch.from_numpy(found[name])
        sgd.step()
    assert 0 < clips < len(seen)
    for name, leaf in state(hand).items():
        np.testing.assert_allclose(state(model)[name], leaf, rtol=1e-5, atol=1e-6)


def test_batches_are_drawn_by_poisson(monkeypatch):
    """Their sizes are Binomial(n, q)'s by a chi-squared test, which also rejects a fixed size and another rate."""
    sizes, drawn = [], noisy(count=4000)
    seen = np.zeros(N)
    for step in range(drawn.count):
        rows = drawn.batch(step)
        sizes.append(len(rows))
        seen[rows] += 1

    def p_of(rate: float) -> float:
        edges = [4, 6, 7, 8, 9, 11]
        below = stats.binom(N, rate).cdf(edges)
        expected = np.diff([0.0, *below, 1.0]) * len(sizes)
        found = np.histogram(sizes, [-1, *[e + 0.5 for e in edges], N + 1])[0]
        return float(stats.chisquare(found, expected).pvalue)

    assert p_of(0.2) > 1e-3
    assert p_of(0.22) < 1e-6
    assert np.all(np.abs(seen / len(sizes) - 0.2) < 5 * math.sqrt(0.16 / len(sizes)))


def test_the_noise_of_a_step_is_normal_and_of_the_right_size(monkeypatch):
    drawn, wide = noisy(noise=1.3, rate=0.02, count=1, key=3), nn.Linear(4, 4000)
    made = session(monkeypatch, drawn, state(wide))
    sgd = torch.optim.SGD(wide.parameters(), lr=1.0)
    _, _, loader = prepare(wide, sgd, DataLoader(data()))
    for _ in loader:
        pass
    moved = np.concatenate([(state(wide)[n] - made.received[n]).ravel() for n in made.received])
    std = 1.3 * CLIP / (0.02 * N)
    assert stats.kstest(moved, stats.norm(0, std).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(moved, stats.norm(0, wrong * std).cdf).pvalue < 1e-9


def test_an_empty_batch_is_a_step_of_noise(monkeypatch):
    drawn = noisy(noise=1.0, rate=1 / N, count=30)
    empty = sum(not len(rows) for rows in drawn.batches())
    assert empty > 3
    made, model, _ = trained(monkeypatch, drawn)
    assert made.private is not None
    assert made.private.check_sent(state(model), ParamsType.FULL) == 30
    assert made.stepping is not None
    assert made.stepping.taken()["count"] == 30


def test_steps_are_counted_and_one_too_many_is_refused_before_it_is_made(monkeypatch):
    model = net()
    made = session(monkeypatch, noisy(count=8), state(model))
    wanted = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    model.load_state_dict(net(seed=1).state_dict())
    model, sgd, loader = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data()))
    assert len(loader) == 40, "known before the model is loaded"
    model.load_state_dict(wanted)

    def one_pass() -> None:
        for batch in loader:
            loss(model, batch).backward()
            sgd.step()

    one_pass()
    assert made.private._made == 5, "an epoch"
    one_pass()
    assert made.private._made == 8, "what was left"
    kept = state(model)
    with pytest.raises(PrivacyError, match="accounts for 8 steps a round, and all are made"):
        one_pass()
    np.testing.assert_equal(state(model), kept)
    give(made, kept, 2)
    one_pass()
    assert made.private.check_sent(state(model), ParamsType.FULL) == 5, "fewer will do"


def test_random_numbers_come_from_the_secret(monkeypatch):
    def drawn_by_torch(key: int) -> float:
        model = net()
        session(monkeypatch, noisy(key=key), state(model))
        _, _, loader = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data()))
        torch.manual_seed(0)
        next(iter(loader))
        return float(torch.rand(()))

    assert drawn_by_torch(1) == drawn_by_torch(1) != drawn_by_torch(2)


def test_a_round_that_only_evaluates_gives_nothing_to_train_on(monkeypatch):
    model = net()
    session(monkeypatch, noisy(), state(model), task="evaluate")
    _, _, loader = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data()))
    assert list(loader) == []


def broken(model: nn.Module, sgd: Any, loader: Any, how: str) -> None:
    """A loop that does what it must not."""
    for i, batch in enumerate(loader):
        if how == "gathers":
            loss(model, batch).backward()
            continue
        if how == "another loader":
            loss(model, batch).backward()
            sgd.step()
            loss(model, next(iter(DataLoader(data(), batch_size=4)))).backward()
        if how == "own steps" and i == 1:
            with torch.no_grad():
                next(model.parameters()).add_(0.01)
        if how == "two passes" and i == 1:
            next(iter(loader))
        loss(model, batch).backward()
        sgd.step()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("gathers", "gradients must not be gathered"),
        ("another loader", "without a new example of the loader"),
        ("own steps", "was changed between two steps"),
        ("two passes", "Another pass"),
    ],
)
def test_a_loop_that_breaks_the_promise_is_refused(monkeypatch, how, message):
    model = net()
    session(monkeypatch, noisy(), state(model))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, loader = prepare(model, sgd, DataLoader(data()))
    with pytest.raises(PrivacyError, match=message):
        broken(model, sgd, loader, how)


def test_a_model_that_does_not_begin_as_received_is_refused(monkeypatch):
    model = net()
    session(monkeypatch, noisy(), state(net(seed=1)))
    _, _, loader = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data()))
    with pytest.raises(PrivacyError, match="does not begin as it was received"):
        next(iter(loader))


def test_only_what_the_steps_gave_may_be_sent(monkeypatch):
    made, model, _ = trained(monkeypatch, noisy(count=2))
    right = state(model)
    assert made._check_private(right, ParamsType.FULL) == 2
    diff = {name: leaf - made.received[name] for name, leaf in right.items()}
    assert made._check_private(diff, ParamsType.DIFF) == 2
    wrong = {**right, "0.bias": right["0.bias"] + np.float32(1e-6)}
    with pytest.raises(PrivacyError, match=r"'0.bias' that is sent is not what the steps"):
        made._check_private(wrong, ParamsType.FULL)
    give(made, right, 2)
    with pytest.raises(PrivacyError, match="no step was made in this round"):
        made._check_private(right, ParamsType.FULL)
    made.private = None
    with pytest.raises(PrivacyError, match="must have been trained with"):
        made._check_private(right, ParamsType.FULL)


class Own(SequentialSampler):
    """A sampler of one's own."""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: DataLoader(Subset(data(), range(39))), "has 39 examples, and the job says that site-1 has 40"),
        (lambda: DataLoader(data(), sampler=WeightedRandomSampler([1.0] * N, N)), "draws by a WeightedRandomSampler"),
        (lambda: DataLoader(data(), sampler=Own(data())), "draws by a Own"),
        (lambda: None, "needs a torch DataLoader"),
        (lambda: [(torch.zeros(1, 4), torch.zeros(1).long())], "needs a torch DataLoader"),
    ],
)
def test_a_loader_that_cant_be_drawn_from_is_refused(monkeypatch, given, message):
    model = net()
    session(monkeypatch, noisy(), state(model))
    with pytest.raises(PrivacyError, match=message):
        next(iter(prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), given())[2]))


def test_models_that_it_does_not_fit_are_refused(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    made = session(monkeypatch, noisy(), state(model))
    with pytest.raises(ModelError, match="BatchNorm1d"):
        prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data()))
    plain, head = net(), nn.Linear(2, 2)
    give(made, state(plain), 1)
    with pytest.raises(PrivacyError, match="moves tensors that are not shared"):
        prepare(plain, torch.optim.SGD([*plain.parameters(), *head.parameters()], lr=0.1), DataLoader(data()))
    with pytest.raises(PrivacyError, match="L-BFGS"):
        prepare(plain, torch.optim.LBFGS(plain.parameters()), DataLoader(data()))
    whole = nn.Sequential(plain, head)
    _, _, loader = prepare(whole, torch.optim.SGD(whole.parameters(), lr=0.1), DataLoader(data()))
    with pytest.raises(PrivacyError, match=r"'0\.0\.bias', which is not shared"):
        next(iter(loader))


def test_an_adapter_is_trained_alone(monkeypatch):
    model = get_peft_model(net(), LoraConfig(target_modules=["0", "2"], r=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    received = local.copy_out(get_peft_model_state_dict(model))
    made = session(monkeypatch, noisy(noise=0.5, count=3), received)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    _, _, loader = prepare(model, adam, DataLoader(data()))
    for batch in loader:
        adam.zero_grad()
        loss(model, batch).backward()
        adam.step()
    sent = local.copy_out(get_peft_model_state_dict(model))
    assert made._check_private(sent, ParamsType.FULL) == 3
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_same_optimizer_prepared_again_or_for_an_open_job(monkeypatch):
    """Once a round is no different; a job without dp-sgd has the optimiser's own steps back."""
    model = net()
    made = session(monkeypatch, noisy(count=2), state(model))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in (1, 2):
        give(made, state(model), number)
        _, _, loader = prepare(model, sgd, DataLoader(data()))
        scheduler = torch.optim.lr_scheduler.StepLR(sgd, 1)
        for batch in loader:
            loss(model, batch).backward()
            sgd.step()
        scheduler.step()
        assert made._check_private(state(model), ParamsType.FULL) == 2
    made.assignment = Assignment(3, "train", "j", 3, 3, {}, None)
    before = state(model)
    raw = DataLoader(data())
    assert prepare(model, sgd, raw)[2] is raw
    loss(model, next(iter(raw))).backward()
    sgd.step()
    assert not np.array_equal(before["0.bias"], state(model)["0.bias"])


# Whole runs

MODEL = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
"""

SCRIPT = """
import os, sys
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset
import hansa.client as flare
from model import make

flare.init()
held = np.load(os.environ["HANSA_TRAIN"])
data = TensorDataset(torch.from_numpy(held["features"]).float(), torch.from_numpy(held["label"].astype(int)))
model = make()
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
model, optimizer, loader = flare.prepare(model, optimizer, DataLoader(data, batch_size=5, shuffle=True))
while flare.is_running():
    received = flare.receive()
    model.load_state_dict(received.params)
    optimizer.state.clear()
    for x, y in loader:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        flare.log("loss", loss.item(), "SCALAR")
    if "wrong" in sys.argv and flare.get_site_name() == "site-1":
        print("the secret of row 3", flush=True)
        raise SystemExit(1)
    if "wrong" in sys.argv:
        with torch.no_grad():
            model[0].weight += 1
    flare.send(flare.FLModel(params=model.state_dict(), metrics={"accuracy": 0.5}, meta={"num_examples": 7}))
"""

PRIVATE = {"mechanism": "dp-sgd", "clip": 0.5, "noise_multiplier": 0.8, "delta": 1e-3}
SIZES = {"site-1": 30, "site-2": 20}


def a_job(folder: Path, recipe: dict[str, Any], sizes: dict[str, int], **values: Any) -> Any:
    (folder / "model.py").write_text(MODEL)
    (folder / "train.py").write_text(SCRIPT)
    drawn = np.random.default_rng(0)
    files = {}
    for site, count in sizes.items():
        x = drawn.normal(size=(count, 6))
        files[site] = str(folder / f"{site}.npz")
        np.savez(files[site], features=x, label=(np.abs(x[:, 0]) * 1.4).clip(0, 2).astype(int).astype(str))
    return parse(
        {
            "name": "own",
            "rounds": 2,
            "recipe": recipe,
            "data": {"train": files, "test": files, **({} if "path" in recipe else {"labels": ["0", "1", "2"]})},
            "train": {"optimizer": "sgd", "lr": 0.2, "momentum": 0.5, "batch_size": 10, "epochs": 1},
            "privacy": PRIVATE,
            "evaluation": {"every": 2, "metric": "loss"},
            "baselines": {"base": False, "local": False},
            "output": {"dir": str(folder / "runs")},
            "directory": str(folder),
            **values,
        }
    )


OWN = {"name": "script", "path": "train.py", "steps": "prepared", "examples": SIZES}


def same_draws(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Have the draws of a site of n examples depend on n alone."""
    found = module.noisy_steps

    def fixed(job: Any) -> Any:
        begin = found(job)

        def again(examples: int) -> NoisySteps:
            drawn = begin(examples)
            return NoisySteps(drawn.terms, examples, drawn.count, Secret(bytes([examples]) * 32))

        return again

    monkeypatch.setattr(module, "noisy_steps", fixed)


def model_of(done: Any) -> dict[str, Any]:
    return load_file(done.directory / "model" / "model.safetensors")


def test_a_script_ends_with_the_model_of_the_same_recipe(tmp_path, monkeypatch):
    """With the same draws; what it logs and measures in training does not leave, and n is its weight, not its word."""
    same_draws(monkeypatch, script)
    same_draws(monkeypatch, tabular)
    recipe = {"name": "tabular-classification", "inputs": 6, "hidden": [5]}
    expected = run(a_job(tmp_path, recipe, {"site-1": 30}))
    start = {"factory": str(expected.directory / "initial.safetensors")}
    done = run(a_job(tmp_path, OWN, {"site-1": 30}, model=start))
    found, right = model_of(done), model_of(expected)
    assert found.keys() == right.keys()
    for name, leaf in right.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=1e-6)
    assert np.abs(right["0.weight"] - load_file(start["factory"])["0.weight"]).max() > 0.05
    first = (done.directory / "metrics.jsonl").read_text().splitlines()[0]
    assert "accuracy" not in first
    assert "loss" not in first
    assert "the metrics that came with the update stay here" in (done.directory / "work" / "sites.log").read_text()
    told = json.loads((done.directory / "report.json").read_text())["privacy"]
    assert told["claims"] == json.loads((expected.directory / "report.json").read_text())["privacy"]["claims"]


def test_a_script_that_fails_or_sends_something_else_sends_nothing(tmp_path):
    """Nor does what it has printed leave its site."""
    asked = a_job(tmp_path, {**OWN, "args": ["wrong"]}, SIZES, model={"factory": "model.py:make"}, rounds=1)
    with pytest.raises(QuorumError, match="under dp-sgd stays there") as refused:
        run(asked)
    assert "row 3" not in str(refused.value)
    (done,) = (tmp_path / "runs").iterdir()
    log = (done / "work" / "sites.log").read_text()
    assert "site-1: the secret of row 3" in log
    assert "'0.weight' that is sent is not what the steps of dp-sgd gave" in log


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ({"steps": "own"}, FitError, "recipe.steps = 'prepared'"),
        ({"examples": None}, JobError, "set recipe.examples to a number"),
        ({"examples": {"site-1": 30}}, JobError, "'site-2'"),
        ({"examples": 0}, JobError, "above 0"),
    ],
)
def test_a_job_that_can_not_keep_the_promise_is_refused_at_once(tmp_path, recipe, error, message):
    with pytest.raises(error, match=message):
        run(a_job(tmp_path, {**OWN, **recipe}, SIZES, model={"factory": "model.py:make"}))


def test_trainers_are_refused(monkeypatch):
    """They fetch ahead, so that a step could not be told from the next one's examples."""
    model = net()
    made = session(monkeypatch, noisy(), state(model))
    made.assignment = Assignment(1, "train", "j", 1, 3, {"seed": 1}, None, {})
    made._model = FLModel(params=model.state_dict())
    with pytest.raises(PrivacyError, match=r"hansa.client.prepare\(model, optimizer, loader\)"):
        lightning.FLCallback(made, True, True, True).on_fit_start(
            SimpleNamespace(strategy=SimpleNamespace(model=None)), model
        )
    trainer = SimpleNamespace(train=None, evaluate=None)
    with pytest.raises(PrivacyError, match=r"hansa.client.prepare\(model, optimizer, loader\)"):
        hf._Rounds(made, trainer, True, True).train()


def test_fedprox_acts_on_what_is_noised(monkeypatch):
    """Its term is added after clip and noise, so the second step differs by -ημ (w₁ - w₀)."""

    def ended(count: int, correction: Any = None) -> Any:
        model = net()
        made = session(monkeypatch, noisy(noise=0.5, count=count), state(model))
        made.assignment = Assignment(1, "train", "j", 1, 3, {}, correction, {})
        made.context = {"start": state(model)}
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        _, _, loader = prepare(model, sgd, DataLoader(data()))
        for batch in loader:
            sgd.zero_grad()
            loss(model, batch).backward()
            sgd.step()
        return state(model)["0.weight"]

    start, first = state(net())["0.weight"], ended(1)
    moved = ended(2, {"name": "fedprox", "options": {"mu": 3.0}}) - ended(2)
    assert np.abs(first - start).max() > 0.01
    np.testing.assert_allclose(moved, -0.1 * 3.0 * (first - start), rtol=1e-4, atol=1e-6)
