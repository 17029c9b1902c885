# SPDX-License-Identifier: Apache-2.0
"""The batched engine equals the local one within float tolerance."""

import numpy as np
import pytest
from torch import nn
from torch.nn.functional import cross_entropy

import toys
from hansa.client.functional import Examples, FunctionalProgram, accuracy, of_torch
from hansa.client.torch import seeded
from hansa.core.config import parse
from hansa.core.values import Absence, Model, Plan, Snapshot, Update
from hansa.errors import FitError
from hansa.simulation import batched
from hansa.simulation.batched import Batched
from hansa.simulation.local import Local
from hansa.workers.memory import MemoryPacks
from hansa.workers.runner import Course
from hansa.workflows import cyclic, scatter_gather

RNG = np.random.default_rng(0)
SIZES = {"a": 30, "b": 7, "c": 1, "d": 64, "e": 33, "f": 30}
DATA = {
    site: Examples(
        (RNG.normal(size=(n, 6)).astype(np.float32), RNG.integers(0, 3, n)),
        (RNG.normal(size=(n // 2, 6)).astype(np.float32), RNG.integers(0, 3, n // 2)),
    )
    for site, n in SIZES.items()
}


def functional():
    with seeded(0, "test"):
        module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return of_torch(module, cross_entropy, {"accuracy": accuracy})


def job_for(strategy="fedavg", train=None, **values):
    train = {"optimizer": "sgd", "lr": 0.1, "batch_size": 8, "epochs": 1.5, **(train or {})}
    return parse({"name": "job", "recipe": "test", "rounds": 3, "train": train, "strategy": strategy, **values})


def program_for(job, data=DATA):
    return FunctionalProgram(functional(), data, job.train)


async def records(kind, job, directory, data=DATA, start=None, workflow=scatter_gather.workflow):
    directory.mkdir(exist_ok=True)
    async with kind(job, directory, program_for(job, data)) as engine:
        course = Course(job.name, tuple(engine.sites), job.strategy, tuple(job.filters))
        strategy, _ = course.pieces()
        if start is None:
            model = Model.start(await engine.initial())
            start = Snapshot(0, model, strategy.init(model))
        flow = workflow()
        return [r async for r in flow.rounds(job, strategy, engine.cohort(course), engine.peers, start, directory)]


CASES = {
    "fedavg": ("fedavg", {}),
    "fedprox": ({"name": "fedprox", "mu": 0.5}, {}),
    "scaffold": ("scaffold", {}),
    "scaffold-steps": ("scaffold", {"epochs": None, "steps": 19}),
    "adamw": ("fedavg", {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}),
    "momentum-clip": ("fedavgm", {"momentum": 0.9, "clip_grad": 0.3, "weight_decay": 0.1}),
}


@pytest.mark.parametrize(
    ("case", "chunk_bytes"), [("scaffold", 1), *((c, 8_000) for c in CASES), *((c, 1 << 25) for c in CASES)]
)
async def test_it_equals_local(case, chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(batched, "CHUNK_BYTES", chunk_bytes)
    strategy, train = CASES[case]
    job = job_for(strategy, train)
    ours = await records(Batched, job, tmp_path / "batched")
    theirs = await records(Local, job, tmp_path / "local")
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.accepted == other.accepted == tuple(SIZES)
        for name, leaf in other.model.params.items():
            np.testing.assert_allclose(mine.model.params[name], leaf, atol=2e-6)
        for part, tree in other.state.items():
            for name, leaf in tree.items():
                np.testing.assert_allclose(mine.state[part][name], leaf, atol=2e-5)
        assert mine.metrics == pytest.approx(other.metrics, abs=1e-5)
        assert mine.site_metrics.keys() == other.site_metrics.keys()
        for site, values in other.site_metrics.items():
            wanted = {k: v for k, v in values.items() if "seconds" not in k}
            assert {k: v for k, v in mine.site_metrics[site].items() if k in wanted} == pytest.approx(wanted, abs=1e-5)
    moved = theirs[-1].model.params["0.weight"] - functional().params["0.weight"]
    assert abs(moved).max() > 1e-2, "training must have moved the model for the comparison to mean anything"


@pytest.mark.parametrize("chunk_bytes", [1, 8_000, 1 << 25])
def test_chunks_keep_the_order_of_names(chunk_bytes, monkeypatch):
    monkeypatch.setattr(batched, "CHUNK_BYTES", chunk_bytes)
    job = job_for()
    program = program_for(job)
    plan = Plan("job", 1, "train", 0, program.initial())
    found = list(batched.chunks(program, plan, sorted(SIZES)))
    assert [site for chunk in found for site in chunk] == sorted(SIZES)
    assert {1: 6, 8_000: 3, 1 << 25: 1}[chunk_bytes] == len(found), [len(chunk) for chunk in found]


async def test_a_sampled_cohort_goes_on_from_older_controls(tmp_path):
    job = job_for("scaffold", rounds=8, cohort={"sample": 2}, evaluation={"every": 0})
    ours = await records(Batched, job, tmp_path / "batched")
    theirs = await records(Local, job, tmp_path / "local")
    assert len({record.accepted for record in theirs}) > 3
    for name, leaf in theirs[-1].model.params.items():
        np.testing.assert_allclose(ours[-1].model.params[name], leaf, atol=1e-5)


async def test_another_process_goes_on_with_the_controls_on_disk(tmp_path):
    job = job_for("scaffold", rounds=4)
    whole = await records(Batched, job, tmp_path / "whole")
    part = await records(Batched, job.model_copy(update={"rounds": 2}), tmp_path / "part")
    last = part[-1]
    start = Snapshot(last.round, last.model, last.state, last.acknowledged)
    rest = await records(Batched, job, tmp_path / "part", start=start)
    for name, leaf in whole[-1].model.params.items():
        np.testing.assert_array_equal(rest[-1].model.params[name], leaf)
    forgetful = await records(Batched, job, tmp_path / "fresh", start=start)
    assert (forgetful[-1].model.params["0.weight"] != whole[-1].model.params["0.weight"]).any()


async def test_old_controls_are_deleted(tmp_path):
    await records(Batched, job_for("scaffold", rounds=6), tmp_path)
    kept = sorted(path.name[:6] for path in (tmp_path / "memory" / "job" / "packs").iterdir())
    assert kept == ["000005", "000006"]


def test_packs_keep_what_an_absent_site_may_come_back_to(tmp_path):
    packs = MemoryPacks(tmp_path)

    def memory(value):
        return {"strategy": {"control": {"w": np.full(2, value)}}, "0.topk": {"rest": {"w": np.full(1, -value)}}}

    packs.save("job", 1, {"a..b": memory(1.0), "c": memory(2.0)}, {})
    packs.save("job", 2, {"a..b": memory(3.0)}, {"a..b": 1})
    packs.save("job", 3, {"a..b": memory(4.0)}, {"a..b": 2})
    packs.forget("job")
    found = packs.load("job", {"a..b": 2, "c": 1})
    assert found["a..b"]["strategy"]["control"]["w"].tolist() == [3.0, 3.0]
    assert found["c"]["strategy"]["control"]["w"].tolist() == [2.0, 2.0]
    assert found["c"]["0.topk"]["rest"]["w"].tolist() == [-2.0]
    packs.save("job", 4, {"c": memory(5.0)}, {"a..b": 3, "c": 3})
    packs.forget("job")
    assert packs.load("job", {"a..b": 2, "c": 1}) == {}
    assert packs.load("job", {}) == {}


async def test_one_bad_site_does_not_cost_its_chunk(tmp_path):
    x, y = DATA["a"].train
    data = {**DATA, "b": Examples((x[:0], y[:0])), "d": Examples((x * 1e30, y))}
    job = job_for(rounds=1, evaluation={"every": 0})
    ours = await records(Batched, job, tmp_path / "batched", data)
    theirs = await records(Local, job, tmp_path / "local", data)
    assert ours[0].accepted == theirs[0].accepted == ("a", "c", "e", "f")
    assert {a.site: a.kind for a in ours[0].absent} == {"b": "refused", "d": "refused"}


async def test_a_defect_loses_the_chunk_and_leaves_a_traceback(tmp_path):
    def broken(outputs, targets):
        raise ValueError("no such loss")

    job = job_for()
    program = FunctionalProgram(of_torch(nn.Linear(6, 3), broken), DATA, job.train)
    async with Batched(job, tmp_path, program) as engine:
        cohort = engine.cohort(Course("job", tuple(engine.sites), job.strategy))
        plan = Plan("job", 1, "train", 0, program.initial())
        replies = [reply async for reply in cohort.ask(plan, engine.sites)]
    assert {reply.kind for reply in replies} == {"lost"}
    assert all("no such loss" in reply.reason for reply in replies)
    assert "Traceback" in next((tmp_path / "errors").iterdir()).read_text()


async def test_evaluation_is_the_local_one(tmp_path):
    job = job_for(train={"eval_batch_size": 5})
    program = program_for(job, {**DATA, "g": Examples(DATA["a"].train), "h": Examples(())})
    plan = Plan("job", 1, "evaluate", 0, program.initial())
    replies = batched.evaluate_many(program, plan, ["a", "b", "c", "g", "h"])
    assert isinstance(replies[-1], Absence)
    for reply in replies[:-1]:
        assert isinstance(reply, Update)
        assert reply.sums == pytest.approx(dict(program.evaluate(reply.site, plan)), rel=1e-5)
    diverged = Plan("job", 1, "evaluate", 0, {n: leaf * np.nan for n, leaf in program.initial().items()})
    assert "diverged" in batched.evaluate_many(program, diverged, ["a"])[0].reason


async def test_sites_that_pass_the_model_on_take_turns(tmp_path):
    job = job_for(workflow="cyclic", rounds=2)
    ours = await records(Batched, job, tmp_path / "batched", workflow=cyclic.workflow)
    theirs = await records(Local, job, tmp_path / "local", workflow=cyclic.workflow)
    for name, leaf in theirs[-1].model.params.items():
        np.testing.assert_array_equal(ours[-1].model.params[name], leaf)


async def test_a_program_that_is_not_functional_is_refused(tmp_path):
    job = toys.job(engine={"name": "batched"})
    with pytest.raises(FitError, match=r"pure function.*engine 'local'"):
        async with Batched(job, tmp_path):
            pass
    other = toys.Quadratics()
    other.traits = frozenset()
    with pytest.raises(FitError, match="no FunctionalProgram"):
        async with Batched(job, tmp_path, other):
            pass
    timed = job_for(train={"max_seconds": 1.0})
    with pytest.raises(FitError, match="can stop by itself"):
        async with Batched(timed, tmp_path, program_for(timed)):
            pass


async def test_a_program_of_its_own_is_closed(tmp_path):
    job = parse({**job_for().model_dump(), "recipe": f"{__name__}:build"})
    async with Batched(job, tmp_path) as engine:
        assert tuple(engine.sites) == tuple(SIZES)
        assert (await engine.inspect("a")).counts == {"train": 30, "test": 15}
        assert await engine.show({}) == {}
        await engine.export(await engine.initial(), tmp_path)
    assert (tmp_path / "model" / "model.safetensors").exists()


def build(job):
    return program_for(job)
