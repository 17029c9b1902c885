# SPDX-License-Identifier: Apache-2.0
"""``patch`` for a Lightning trainer: one process, several rounds, and two processes under ``torchrun``."""

from __future__ import annotations

import json
import textwrap

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hansa.core.config import parse
from hansa.errors import QuorumError
from hansa.simulation.run import run

pytestmark = pytest.mark.timeout(240)

MODEL = """
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
import PACKAGE as L

class Net(L.LightningModule):
    def __init__(self, optimizer="sgd"):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.kind = optimizer
    def configure_model(self):  # called by validate and by each fit
        if self.device_mesh is not None and not isinstance(self.layer, FSDPModule):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])
    def training_step(self, batch, index):
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])
    def validation_step(self, batch, index):
        self.log("val_loss", nn.functional.mse_loss(self.layer(batch[0]), batch[1]), sync_dist=True)
    def configure_optimizers(self):
        if self.kind == "momentum":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return torch.optim.SGD(self.parameters(), lr=0.05)

def make():
    torch.manual_seed(1)
    return Net()

def rows(site):
    generator = torch.Generator().manual_seed(site)
    x = torch.randn(12, 3, generator=generator)
    return torch.utils.data.TensorDataset(x, x[:, :2] * site + x.sum(1, keepdim=True))
"""

SCRIPT = """
import json, os, sys, warnings
import torch
warnings.filterwarnings("ignore")
import PACKAGE as L
from PACKAGE.strategies import FSDPStrategy, ModelParallelStrategy
import hansa.client.lightning as flare
from model import Net, rows

KIND, KEEP, PROCESSES = sys.argv[1], sys.argv[2] == "keep", int(sys.argv[3])
net = Net(KIND)
if sys.argv[4] == "fsdp":
    strategy = FSDPStrategy(process_group_backend="gloo")
elif sys.argv[4] == "fsdp2":
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
else:
    strategy = sys.argv[4]
trainer = L.Trainer(max_epochs=2, accelerator="cpu", devices=PROCESSES, logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                    strategy=strategy, use_distributed_sampler=False)
flare.patch(trainer, restore_state=KEEP)
flare.patch(trainer)
site = int((flare.get_site_name() or "1")[-1])
data = torch.utils.data.Subset(rows(site), range(int(os.environ.get("RANK", 0)), 12, PROCESSES))
loader = lambda: torch.utils.data.DataLoader(data, batch_size=4 // PROCESSES, shuffle=False)
while flare.is_running():
    trainer.validate(net, loader(), verbose=False)
    before = trainer.global_step
    trainer.fit(net, loader())
    if hasattr(net.layer, "reshard"):
        net.layer.reshard()  # an evaluation leaves it whole
    weight = net.layer.weight
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    here = weight.to_local() if hasattr(weight, "to_local") else weight
    said = json.dumps([trainer.global_rank, here.numel(), trainer.global_step - before,
                       whole.flatten().tolist()])
    os.write(1, f"ROUND {said}\\n".encode())  # at once: ranks share the log
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def a_job(folder, args, package="lightning.pytorch", **sections):
    (folder / "model.py").write_text(MODEL.replace("PACKAGE", package))
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT.replace("PACKAGE", package)))
    recipe = {"name": "script", "path": "train.py", "sites": 2, "args": args, "steps": "prepared"}
    return parse(
        {
            "name": "own",
            "rounds": 3,
            "recipe": {**recipe, **sections.pop("recipe", {})},
            "model": {"factory": "model.py:make"},
            "train": {"optimizer": "sgd"},
            "evaluation": {"metric": "val_loss", "mode": "min"},
            "baselines": {"base": False, "local": False},
            "output": {"dir": str(folder / "runs")},
            "directory": str(folder),
            **sections,
        }
    )


def by_hand(rounds=3, momentum=0.0, keep=False, sites=(1, 2), scaffold=False, mu=0.0):
    """Return the federation's weights, computed in plain torch: two epochs of three batches a round."""
    names: dict = {}
    exec(MODEL.replace("PACKAGE", "lightning.pytorch"), names)
    state = names["make"]().state_dict()
    kept: dict = {}
    zero = {n: torch.zeros_like(v) for n, v in state.items()}
    control, own = dict(zero), {site: dict(zero) for site in sites}
    for _ in range(rounds):
        ends = []
        for site in sites:
            net = names["make"]()
            net.load_state_dict(state)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=momentum)
            if keep and site in kept:
                optimizer.load_state_dict(kept[site])
            for _ in range(2):
                for batch in torch.utils.data.DataLoader(names["rows"](site), batch_size=4):
                    optimizer.zero_grad()
                    net.training_step(batch, 0).backward()
                    for name, parameter in net.named_parameters():
                        parameter.grad += control[name] - own[site][name] + mu * (parameter.detach() - state[name])
                    optimizer.step()
            kept[site] = optimizer.state_dict()
            ends.append({n: v.clone() for n, v in net.state_dict().items()})
            if scaffold:
                own[site] = {n: own[site][n] - control[n] + (state[n] - ends[-1][n]) / (6 * 0.05) for n in state}
        if scaffold:
            control = {n: sum(own[s][n] for s in sites) / len(sites) for n in state}
        state = {n: sum(end[n] for end in ends) / len(ends) for n in state}
    return {n: v.numpy() for n, v in state.items()}


def check(done, expected):
    got = load_file(done.directory / "model" / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-5)


def told(done):
    log = (done.directory / "work" / "sites.log").read_text()
    return [json.loads(line.split("ROUND ")[1]) for line in log.splitlines() if "ROUND " in line]


@pytest.mark.parametrize("keep", [True, False])
def test_a_patched_trainer_is_plain_training_with_its_optimisers_kept_or_not(tmp_path, keep):
    done = run(a_job(tmp_path, ["momentum", "keep" if keep else "anew", "1", "auto"], recipe={"sites": 1}))
    check(done, by_hand(momentum=0.9, keep=keep, sites=(1,)))
    other = by_hand(momentum=0.9, keep=not keep, sites=(1,))["layer.weight"]
    assert np.abs(other - load_file(done.directory / "model" / "model.safetensors")["layer.weight"]).max() > 1e-3
    losses = [record["metrics"]["val_loss"] for record in done.records]
    assert losses[-1] < losses[0]
    steps = [count for _, _, count, _ in told(done)]
    assert sorted(set(steps)) == [0, 6], "evaluations make no step, trainings two epochs of three"


def test_scaffold_under_a_patched_trainer_of_the_older_package(tmp_path):
    job = a_job(tmp_path, ["sgd", "keep", "1", "auto"], "pytorch_lightning", strategy="scaffold")
    check(run(job), by_hand(scaffold=True))


LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize(("strategy", "weights"), [("ddp", 6), ("fsdp2", 3)])
def test_two_processes_of_which_rank_0_talks(tmp_path, strategy, weights):
    args = ["momentum", "keep", "2", strategy]
    done = run(a_job(tmp_path, args, recipe={"launch": LAUNCH, "sites": 1}, strategy={"name": "fedprox", "mu": 0.5}))
    check(done, by_hand(sites=(1,), momentum=0.9, keep=True, mu=0.5))
    rounds = told(done)
    assert {here for _, here, _, _ in rounds} == {weights}, "of 2 × 3 weights, what each rank holds"
    for rank in (0, 1):
        assert len([r for r in rounds if r[0] == rank]) == len(rounds) / 2
    first = [model for rank, _, _, model in rounds if rank == 0]
    assert first == [model for rank, _, _, model in rounds if rank == 1], "both ranks have the same model"


def test_lightnings_first_fsdp_is_for_gpus_only_and_says_so(tmp_path):
    with pytest.raises(QuorumError, match="The strategy `fsdp` requires a GPU accelerator"):
        run(a_job(tmp_path, ["sgd", "keep", "1", "fsdp"], recipe={"sites": 1}))
