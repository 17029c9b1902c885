# SPDX-License-Identifier: Apache-2.0
"""What every strategy promises. A new one joins the list."""

import io
import itertools

import numpy as np
import pytest

from hansa.client import work
from hansa.client.functional import Examples, FunctionalProgram
from hansa.client.work import perform
from hansa.core import fold as folds
from hansa.core import settle, wire
from hansa.core import tree as trees
from hansa.core.config import TrainSection
from hansa.core.fold import Fold
from hansa.core.optimizer import adam, sgd
from hansa.core.ports import Work
from hansa.core.stack import Stack
from hansa.core.strategy import Steps
from hansa.core.tree import layout_of
from hansa.core.values import Aggregate, Model, Plan, Update
from hansa.filters.cast import cast
from hansa.filters.clip import clip
from hansa.filters.weigh import weigh
from hansa.robust.coordinates import median
from hansa.robust.defend import robust
from hansa.robust.geometric_median import geometric_median
from hansa.robust.krum import multi_krum
from hansa.strategies.fedavg import fedavg
from hansa.strategies.fedavgm import fedavgm
from hansa.strategies.fedopt import fedadagrad, fedadam, fedyogi
from hansa.strategies.fedprox import fedprox
from hansa.strategies.scaffold import scaffold
from hansa.workers.runner import Course, SiteRunner
from quadratics import data, functional

STRATEGIES = {
    "fedavg": fedavg,
    "fedavg-adam": lambda: fedavg(server_optimizer=adam()),
    "fedavgm": fedavgm,
    "diloco": lambda: fedavgm(0.7, 0.9, nesterov=True),
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "fedadagrad": fedadagrad,
    "fedprox": fedprox,
    "scaffold": scaffold,
    "robust-median": lambda: robust(fedavg(), median(1), 2.0),
    "robust-krum": lambda: robust(fedadam(), multi_krum(0)),
    "robust-geometric": lambda: robust(fedavgm(), geometric_median(1)),
    "scaffold-sites": lambda: scaffold(objective="sites"),
}
SITES = ("s0", "s1", "s2")
PARAMS = {
    "a": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32),
    "b": np.array([0.5], np.float32),
    "count": np.array([7]),
}


@pytest.fixture(params=sorted(STRATEGIES))
def strategy(request):
    return STRATEGIES[request.param]()


def moving(tree):
    return {name: leaf for name, leaf in tree.items() if name != "count"}


def updates(strategy, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Update(
            site=site,
            round=1,
            version=0,
            parts={
                part: {n: rng.normal(size=leaf.shape).astype(np.float32) for n, leaf in moving(PARAMS).items()}
                for part in strategy.weighed
            },
            weight=float(rng.uniform(0.5, 2)),
            sums={"loss": 1.0},
        )
        for site in SITES
    ]


def folded(strategy, arriving):
    expected = dict.fromkeys(strategy.weighed, layout_of(moving(PARAMS)))
    if strategy.combine is None:
        fold = Fold(SITES, expected, strategy.weighed, len(SITES))
    else:
        fold = Stack(strategy.combine, SITES, expected, len(SITES))
    for update in arriving:
        fold.add(update)
    return fold.close()


def zero(strategy):
    parts = {part: {n: np.zeros_like(leaf) for n, leaf in moving(PARAMS).items()} for part in strategy.weighed}
    return Aggregate(parts, strategy.weighed, 3.0, 3.0, 3)


def bits(model, state):
    found = {"model": model.params, **state}
    return {(part, name): leaf.tobytes() for part, tree in found.items() for name, leaf in tree.items()}


def walked(strategy, rounds=3):
    model = Model.start(PARAMS)
    state = strategy.init(model)
    for seed in range(rounds):
        model, state, _ = strategy.step(model, state, folded(strategy, updates(strategy, seed)))
    return model, state


def test_state_can_be_written_and_read_back(strategy):
    model, state = walked(strategy)
    for kept in (strategy.init(Model.start(PARAMS)), state):
        file = io.BytesIO()
        wire.write(file, "state", {}, kept)
        file.seek(0)
        read = wire.read_parts(file, wire.read_envelope(file))
        assert bits(model, read) == bits(model, kept)
    assert not set(strategy.sent(state)) & {"params"}


def test_a_step_reads_only_its_arguments_and_leaves_them_alone(strategy):
    model, state = walked(strategy)
    aggregate = folded(strategy, updates(strategy, 9))
    before = bits(model, state)
    sums = {part: {n: leaf.copy() for n, leaf in tree.items()} for part, tree in aggregate.sums.items()}
    first = strategy.step(model, state, aggregate)
    again = strategy.step(model, state, aggregate)
    assert bits(*first[:2]) == bits(*again[:2])
    assert bits(model, state) == before
    assert all((aggregate.sums[part][n] == leaf).all() for part, tree in sums.items() for n, leaf in tree.items())
    assert bits(*first[:2]) != before, "the step must have done something"


def test_a_large_model_takes_the_same_steps_to_the_bit(strategy, tmp_path, monkeypatch):
    """Whatever is computed a block at a time into files, and read back from them, is what arrays in memory give."""
    expected = bits(*walked(strategy))
    monkeypatch.setattr(trees, "LARGE", 0)
    monkeypatch.setattr(folds, "MAP_BYTES", 0)
    model, state = settle.start(strategy, PARAMS, tmp_path)
    for seed in range(3):
        settled, _ = settle.step(strategy, model, state, folded(strategy, updates(strategy, seed)), tmp_path)
        assert settle.MODEL in settled.files
        model, state = settled.model, settled.state
    assert bits(model, state) == expected


def test_a_site_sends_the_same_bits_of_a_large_model(strategy, tmp_path, monkeypatch):
    """The plan read from its file, the update and what the site remembers computed while they are written."""

    class Program:
        def train(self, site, plan, correction):
            grads = {name: np.full_like(leaf, 0.1) for name, leaf in moving(plan.params).items()}
            if correction:
                grads = correction.adjust(correction.context, plan.params, grads)
            end = {name: plan.params[name] - np.float32(0.3) * g for name, g in grads.items()}
            return Work({**plan.params, **end}, 100.0, Steps(2, 0.6), {})

    def rounds(folder):
        folder.mkdir()
        sent, memory = strategy.sent(walked(strategy)[1]), {}
        for number in (1, 2):
            with (folder / "plan").open("wb") as file:
                wire.write_plan(file, Plan("job", number, "train", 0, PARAMS, sent))
            plan = wire.open_plan(folder / "plan")
            update, memory, _ = perform(Program(), strategy, [clip(0.2), weigh(), cast()], plan, "s0", memory)
            with (folder / f"memory-{number}").open("wb") as file:
                wire.write(file, "memory", {}, memory.get("strategy", {}))
            memory = {"strategy": wire.open_parts(folder / f"memory-{number}")[1]} if memory else {}
            wire.spool(update, folder / f"update-{number}")
        return [(folder / name).read_bytes() for name in ("update-1", "update-2", "memory-2")]

    monkeypatch.setattr(work.time, "perf_counter", lambda: 0.0)
    expected = rounds(tmp_path / "small")
    monkeypatch.setattr(trees, "LARGE", 0)
    assert rounds(tmp_path / "large") == expected


def test_two_builds_of_it_do_the_same(strategy, request):
    other = STRATEGIES[request.node.callspec.params["strategy"]]()
    assert bits(*walked(strategy)) == bits(*walked(other))


def test_the_order_of_arrival_does_not_matter(strategy):
    model, state = walked(strategy, 1)
    ends = {
        tuple(sorted(bits(*strategy.step(model, state, folded(strategy, order))[:2]).items()))
        for order in itertools.permutations(updates(strategy, 1))
    }
    assert len(ends) == 1


def test_zero_updates_leave_a_new_model_as_it_is(strategy):
    model = Model.start(PARAMS)
    after, _, _ = strategy.step(model, strategy.init(model), zero(strategy))
    assert after.version == 1
    for name, leaf in model.params.items():
        np.testing.assert_array_equal(after.params[name], leaf)


def test_dtypes_shapes_and_integer_tensors_stay(strategy):
    model, _ = walked(strategy)
    assert layout_of(model.params) == layout_of(PARAMS)
    np.testing.assert_array_equal(model.params["count"], PARAMS["count"])


def test_every_part_that_is_sent_back_is_declared(strategy):
    model = Model.start(PARAMS)
    sent = strategy.sent(strategy.init(model))
    context = strategy.rule.begin(PARAMS, sent, {})
    end = {**PARAMS, "a": PARAMS["a"] + 1}
    parts, _ = strategy.rule.finish(context, PARAMS, end, Steps(2, 0.2))
    assert parts.keys() == strategy.weighed.keys()
    for tree in parts.values():
        assert layout_of(tree) == layout_of(moving(PARAMS))
    np.testing.assert_array_equal(parts["delta"]["a"], np.ones((2, 2)))


def test_a_site_goes_on_from_what_the_server_accepted_last(strategy, tmp_path):
    """Work that never counted leaves no trace: doing the round again gives the same update."""
    own = {site: Examples(arrays) for site, arrays in data().items()}
    program = FunctionalProgram(functional(), own, TrainSection(epochs=1, batch_size=1), sgd(0.05))
    runner = SiteRunner(program, tmp_path)
    course = Course("job", SITES, strategy)
    model = Model.start(program.initial())
    sent = strategy.sent(strategy.init(model))

    def update(round, accepted, params):
        acknowledged = {"s0": accepted} if accepted else {}
        plan = Plan("job", round, "train", 0, params, sent, acknowledged=acknowledged)
        reply = runner.run(course, plan, "s0")
        assert isinstance(reply, Update), reply
        return bits(model, reply.parts)

    moved = {"w": np.array(0.7)}
    update(1, None, model.native())
    second = update(2, 1, moved)
    assert update(3, 1, moved) == second, "round 2 was not accepted, so what it left is not used"
    assert update(2, 1, moved) == second
    fresh = update(4, None, moved)
    assert (fresh != second) == ("control" in strategy.weighed), "the memory must be what makes the difference"
