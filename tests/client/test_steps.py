# SPDX-License-Identifier: Apache-2.0
"""``prepare``: a script's own steps under FedProx and SCAFFOLD, against a federation computed by hand."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hansa import registry
from hansa.client import script as client
from hansa.client import torch as local
from hansa.client.steps import prepare
from hansa.client.work import begin
from hansa.core.config import TrainSection, parse
from hansa.core.ports import Correction
from hansa.core.values import Plan
from hansa.errors import FitError, JobError, QuorumError, SiteError
from hansa.recipes import script
from hansa.simulation.run import run

pytestmark = pytest.mark.timeout(120)

SITES = ("site-1", "site-2")
LR = 0.05

MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

def batches(site, number, count=4):
    generator = torch.Generator().manual_seed(100 * int(site[-1]) + number)
    for _ in range(count + int(site[-1])):
        x = torch.randn(6, 4, generator=generator)
        yield x, (x[:, 0] * int(site[-1]) > 0.2).long()

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""

SCRIPT = """
import sys
import torch
import hansa.client as flare
from model import batches, loss, make

flare.init()
model = make()
once = "once" in sys.argv
optimizer = torch.optim.SGD(model.parameters(), lr=LR)
if once:
    flare.prepare(model, optimizer)
while flare.is_running():
    received = flare.receive()
    model.load_state_dict(received.params)
    if not once:
        model, optimizer = flare.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
    for batch in batches(flare.get_site_name(), received.current_round + 1):
        optimizer.zero_grad()
        if "closure" in sys.argv:
            def closure():
                value = loss(model, batch)
                value.backward()
                return value
            optimizer.step(closure)
        else:
            loss(model, batch).backward()
            optimizer.step()
    flare.send(flare.FLModel(params=model.state_dict(), meta={"num_examples": int(flare.get_site_name()[-1])}))
""".replace("LR", str(LR))


def a_job(folder, code=SCRIPT, *, strategy, rounds=3, recipe=None, **sections):
    (folder / "model.py").write_text(MODEL)
    (folder / "train.py").write_text(textwrap.dedent(code))
    options = {"name": "script", "path": "train.py", "sites": 2, "steps": "prepared", **(recipe or {})}
    return parse(
        {
            "name": "own",
            "rounds": rounds,
            "recipe": options,
            "model": {"factory": "model.py:make"},
            "strategy": strategy,
            "train": {"optimizer": "sgd", "lr": LR},
            "evaluation": {"every": 0, "metric": "loss"},
            "baselines": {"base": False, "local": False},
            "output": {"dir": str(folder / "runs")},
            "directory": str(folder),
            **sections,
        }
    )


def model_space():
    names: dict = {}
    exec(MODEL, names)
    return names


def by_hand(strategy_name, options, rounds=3):
    """Return the parameters of a federation computed with :func:`hansa.client.torch.train` and plain NumPy."""
    names = model_space()
    strategy = registry.build("strategies", strategy_name, options)
    model = names["make"]()
    params = {n: v.astype(np.float64) for n, v in local.copy_out(dict(model.named_parameters())).items()}
    control = {n: np.zeros_like(v) for n, v in params.items()}
    own = {site: dict(control) for site in SITES}
    weights = {site: int(site[-1]) for site in SITES}
    total = sum(weights.values())
    for number in range(1, rounds + 1):
        start = {n: v.astype(np.float32) for n, v in params.items()}
        moves = {}
        for site in SITES:
            local.copy_in(dict(model.named_parameters()), start)
            single = {n: v.astype(np.float32) for n, v in control.items()}
            kept = {n: v.astype(np.float32) for n, v in own[site].items()}
            plan = Plan("own", number, "train", number - 1, start, {"control": single})
            context = begin(strategy, plan, {"strategy": {"control": kept}})
            correction = Correction(context, strategy.rule.adjust) if strategy.rule.adjust else None
            feed = list(names["batches"](site, number))
            section = TrainSection(optimizer="sgd", lr=LR)
            done = local.train(
                model,
                dict(model.named_parameters()),
                feed,
                lambda m, batch: (names["loss"](m, batch), {}),
                section,
                len(feed),
                correction,
            )
            end = local.copy_out(dict(model.named_parameters()))
            moves[site] = {n: end[n].astype(np.float64) - start[n] for n in end}
            if strategy_name == "scaffold":
                own[site] = {n: own[site][n] - control[n] - moves[site][n] / done.steps.lr_sum for n in moves[site]}
        if strategy_name == "scaffold":
            control = {n: sum(weights[s] * own[s][n] for s in SITES) / total for n in control}
        params = {n: params[n] + sum(weights[s] * moves[s][n] for s in SITES) / total for n in params}
    return params


def trained(done):
    return load_file(done.directory / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("strategy", "options", "way"),
    [("fedprox", {"mu": 0.5}, ""), ("scaffold", {}, ""), ("scaffold", {}, "once closure")],
)
def test_a_prepared_script_is_the_algorithm(tmp_path, strategy, options, way):
    job = a_job(tmp_path, strategy={"name": strategy, **options}, recipe={"args": way.split()})
    got, expected = trained(run(job)), by_hand(strategy, options)
    plain = by_hand("fedavg", {})
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-6)
        assert np.abs(leaf - plain[name]).max() > 1e-4, "the correction does something"


@pytest.mark.parametrize(("strategy", "part"), [({"name": "fedprox", "mu": 0.1}, "start"), ("scaffold", "correction")])
def test_a_script_is_sent_only_what_its_steps_need(tmp_path, strategy, part):
    code = """
    import hansa.client as flare
    from hansa.client.script import current
    flare.init()
    flare.receive()
    raise SystemExit(f"the parts are {sorted(current().context)}")
    """
    job = a_job(tmp_path, code, strategy=strategy, recipe={"sites": 1})
    with pytest.raises(QuorumError, match=rf"the parts are \['{part}'\]"):
        run(job)


def test_one_site_under_fedavg_is_plain_training(tmp_path):
    got = trained(run(a_job(tmp_path, strategy="fedavg", recipe={"sites": 1})))
    names = model_space()
    model = names["make"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for number in (1, 2, 3):
        for batch in names["batches"]("site-1", number):
            optimizer.zero_grad()
            names["loss"](model, batch).backward()
            optimizer.step()
    for name, leaf in model.state_dict().items():
        np.testing.assert_allclose(got[name], leaf.numpy(), atol=1e-6)


def refused(folder, code, strategy, words):
    """Check that the script's answer is refused with ``words``."""
    program = script.build(a_job(folder, code, strategy=strategy, recipe={"sites": 1}))
    built = registry.build("strategies", program._job.strategy.name, program._job.strategy.options)
    start = program.initial()
    zero = {n: np.zeros_like(v) for n, v in start.items()}
    plan = Plan("own", 1, "train", 0, start, {"control": zero})
    try:
        with pytest.raises(SiteError) as caught:
            program.train("site-1", plan, Correction(begin(built, plan, {}), built.rule.adjust))
        assert words in caught.value.message
    finally:
        program.close()


SGD = "torch.optim.SGD(model.parameters(), lr=0.05)"


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (lambda net: torch.optim.Adam(net.parameters()), "Adam takes others. Use torch.optim.SGD without momentum"),
        (lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), "this SGD has momentum"),
        (lambda net: torch.optim.SGD(net.parameters(), lr=0.1, maximize=True), "this SGD maximises"),
        (
            lambda net: torch.optim.SGD(
                [{"params": net[0].parameters(), "lr": 1}, {"params": net[2].parameters()}], lr=0.1
            ),
            "several learning rates",
        ),
        (lambda net: torch.optim.LBFGS(net.parameters()), "L-BFGS's inner steps"),
        (
            lambda net: torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1),
            "has no tensor that this optimiser moves",
        ),
    ],
    ids=["adam", "momentum", "maximize", "rates", "lbfgs", "another model's"],
)
@pytest.mark.parametrize("when", ["at prepare", "in a later task"])
def test_scaffold_refuses_other_optimisers(monkeypatch, optimizer, words, when):
    """As soon as its task is known, and before anything has moved."""
    names = model_space()
    model = names["make"]()
    start = local.copy_out(dict(model.named_parameters()))
    session = client.Session(None, {"site": "site-1"})
    monkeypatch.setattr(client, "_session", session)

    def task(number, correction):
        session.assignment = client.Assignment(number, "train", "own", number, 3, {}, correction)
        session.context = {"correction": {name: np.zeros_like(leaf) for name, leaf in start.items()}}

    scaffold = {"name": "scaffold", "options": {}}
    task(1, scaffold if when == "at prepare" else None)
    with pytest.raises(JobError) as caught:  # noqa: PT012
        _, moving = prepare(model, optimizer(model))
        task(2, scaffold)
        moving.step(lambda: names["loss"](model, next(names["batches"]("site-1", 1))))
    assert words in caught.value.message
    np.testing.assert_equal(local.copy_out(dict(model.named_parameters())), start)


def test_a_refused_optimiser_ends_the_task(tmp_path):
    code = """
    import torch
    import hansa.client as flare
    from model import make
    flare.init()
    flare.receive()
    model = make()
    flare.prepare(model, torch.optim.AdamW(model.parameters()))
    """
    refused(tmp_path, code, "scaffold", "AdamW takes others")


def test_the_first_fsdp_is_refused_where_gradients_are_corrected(tmp_path):
    """With its tensors' own names, too: each process has a stretch of a flat one, whatever the names say."""
    code = """
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel
    import hansa.client as flare
    from model import make
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    flare.init()
    flare.receive()
    model = FullyShardedDataParallel(make(), device_id=torch.device("cpu"), use_orig_params=True)
    flare.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    """
    refused(tmp_path, code, "scaffold", "makes one flat one of them. Use torch.distributed.fsdp.fully_shard (FSDP2)")


def test_an_update_from_a_script_that_did_not_prepare_is_refused(tmp_path):
    code = SCRIPT.replace("flare.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))", f"model, {SGD}")
    refused(tmp_path, code, "scaffold", "Call hansa.client.prepare(model, optimizer, loader) or patch(trainer)")


def test_scripts_that_do_not_say_prepared_are_refused_before_they_start(tmp_path):
    with pytest.raises(FitError, match="hands over finished updates only"):
        run(a_job(tmp_path, strategy="scaffold", recipe={"steps": "own"}))


def test_the_loader_tells_the_weight(tmp_path):
    code = """
    import torch
    import hansa.client as flare
    from model import make
    flare.init()
    model = make()
    while flare.is_running():
        model.load_state_dict(flare.receive().params)
        rows = torch.utils.data.TensorDataset(torch.zeros(10, 4))
        loader = torch.utils.data.DataLoader(rows, batch_size=4)
        model, optimizer, loader = flare.prepare(model, torch.optim.SGD(model.parameters(), lr=0.25), loader)
        for (x,) in loader:
            model(x).sum().backward()
            optimizer.step()
        flare.send(flare.FLModel(params=model.state_dict()))
    """
    program = script.build(a_job(tmp_path, code, strategy="fedavg"))
    work = program.train("site-1", Plan("own", 1, "train", 0, program.initial()), None)
    program.close()
    assert (work.num_examples, work.steps.count, work.steps.lr_sum) == (10, 3, 0.75)
