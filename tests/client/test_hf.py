# SPDX-License-Identifier: Apache-2.0
"""``patch`` for a ``transformers`` trainer and for ``trl``'s ``SFTTrainer``; gathering of sharded state."""

from __future__ import annotations

import json
import re
import textwrap

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hansa.core.config import parse
from hansa.simulation.run import run

pytestmark = pytest.mark.timeout(280)

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
    def forward(self, x, labels=None):
        out = self.layer(x)
        return {"loss": nn.functional.mse_loss(out, labels), "logits": out}

def make():
    torch.manual_seed(1)
    return Net()

def rows(site):
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(site))
    return [{"x": row, "labels": row.sum().reshape(1) * site} for row in x]
"""

SCRIPT = """
import sys
import torch
from transformers import Trainer, TrainingArguments
import hansa.client as flare
from model import make, rows

class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)

flare.init()
data = rows(int(flare.get_site_name()[-1]))
arguments = TrainingArguments("out", learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=0,
                              per_device_train_batch_size=4, num_train_epochs=2, report_to=[], save_strategy="no",
                              use_cpu=True, disable_tqdm=True)
net = make()
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9 if "m" in sys.argv[1] else 0.0)
trainer = InOrder(net, arguments, train_dataset=data, eval_dataset=data, optimizers=(optimizer, None))
flare.patch(trainer, restore_state="k" in sys.argv[1])
flare.patch(trainer)
while flare.is_running():
    trainer.evaluate()
    trainer.train()
"""


def a_job(folder, code, args=(), model=MODEL, recipe=None, **sections):
    (folder / "model.py").write_text(model)
    (folder / "train.py").write_text(textwrap.dedent(code))
    base = {"name": "script", "path": "train.py", "sites": 2, "args": list(args), "steps": "prepared"}
    return parse(
        {
            "name": "own",
            "rounds": 3,
            "recipe": {**base, **(recipe or {})},
            "model": {"factory": "model.py:make"},
            "train": {"optimizer": "sgd"},
            "evaluation": {"metric": "eval_loss", "mode": "min"},
            "baselines": {"base": False, "local": False},
            "output": {"dir": str(folder / "runs")},
            "directory": str(folder),
            **sections,
        }
    )


def by_hand(momentum=0.0, keep=False, scaffold=False, rounds=3, sites=(1, 2)):
    """Return the federation's weights in plain torch: two epochs of three batches a round."""
    names: dict = {}
    exec(MODEL, names)
    state = names["make"]().state_dict()
    kept: dict = {}
    control = {n: torch.zeros_like(v) for n, v in state.items()}
    own = {site: dict(control) for site in sites}
    for _ in range(rounds):
        ends = []
        for site in sites:
            net, rows = names["make"](), names["rows"](site)
            net.load_state_dict(state)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=momentum)
            if keep and site in kept:
                optimizer.load_state_dict(kept[site])
            for first in (0, 4, 8) * 2:
                batch = rows[first : first + 4]
                optimizer.zero_grad()
                net(*(torch.stack([row[key] for row in batch]) for key in ("x", "labels")))["loss"].backward()
                for name, parameter in net.named_parameters():
                    parameter.grad += control[name] - own[site][name]
                optimizer.step()
            kept[site] = optimizer.state_dict()
            ends.append({n: v.clone() for n, v in net.state_dict().items()})
            if scaffold:
                own[site] = {n: own[site][n] - control[n] + (state[n] - ends[-1][n]) / (6 * 0.05) for n in state}
        if scaffold:
            control = {n: sum(own[s][n] for s in sites) / len(sites) for n in state}
        state = {n: sum(end[n] for end in ends) / len(ends) for n in state}
    return {n: v.numpy() for n, v in state.items()}


def final(done):
    return load_file(done.directory / "model" / "model.safetensors")


@pytest.mark.parametrize(("way", "strategy", "sites"), [("mk", "fedavg", 1), ("m", "fedavg", 1), ("", "scaffold", 2)])
def test_a_patched_trainer_is_plain_training(tmp_path, way, strategy, sites):
    """One site is enough to see whether an optimiser is kept; controls are of two."""
    done = run(a_job(tmp_path, SCRIPT, [way], strategy=strategy, recipe={"sites": sites}))
    expected = by_hand(0.9 if "m" in way else 0.0, "k" in way, strategy == "scaffold", sites=range(1, sites + 1))
    got = final(done)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-5)
    losses = [record["metrics"]["eval_loss"] for record in done.records]
    assert losses[-1] < losses[0]
    assert not [name for name in done.records[0]["metrics"] if "runtime" in name or "per_second" in name]


LORA_MODEL = """
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

def bare():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32))

def tuned():
    return get_peft_model(bare(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian"))

def make():
    return get_peft_model_state_dict(tuned(), save_embedding_layers=False)
"""

LORA_SCRIPT = """
import sys
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
import hansa.client as flare
from model import tuned

flare.init()
words = {f"w{i}": i for i in range(30)} | {"<pad>": 30, "<eos>": 31}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), pad_token="<pad>",
                                    eos_token="<eos>", unk_token="w0")
data = Dataset.from_list([{"input_ids": [(i + j) % 30 for j in range(8)]} for i in range(8)])
arguments = SFTConfig("out", learning_rate=0.05, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                      save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False)
trainer = SFTTrainer(tuned(), arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
flare.patch(trainer)
while flare.is_running():
    trainer.evaluate()
    trainer.train()
"""


def test_of_an_sft_trainer_with_lora_only_the_adapter_travels(tmp_path):
    job = a_job(
        tmp_path, LORA_SCRIPT, model=LORA_MODEL, rounds=2, recipe={"sites": 1}, strategy={"name": "fedprox", "mu": 0.01}
    )
    done = run(job)
    got = final(done)
    assert len(got) == 4
    assert all("lora_" in name and ".default" not in name for name in got)
    assert all(np.abs(leaf).max() > 0 for leaf in got.values()), "B starts at zero and was trained"
    losses = [record["metrics"]["eval_loss"] for record in done.records]
    assert losses[-1] < losses[0]


SHARDED = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
import hansa.client as flare
from hansa.client import models
from model import make, rows

dist.init_process_group("gloo")
flare.init()
net = make()
if sys.argv[1] == "fsdp2":
    mesh = dist.init_device_mesh("cpu", (2,))
    fully_shard(net, mesh=mesh)
optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
net, optimizer = flare.prepare(net, optimizer)
data = rows(1)
while flare.is_running():
    received = flare.receive()
    models.load(net, received.params if received else {})
    for first in (0, 4, 8) * 2:
        batch = data[first + 2 * dist.get_rank() : first + 2 * dist.get_rank() + 2]
        optimizer.zero_grad()
        net(*(torch.stack([row[key] for row in batch]) for key in ("x", "labels")))["loss"].backward()
        optimizer.step()
    state = models.gathered(net)
    told = f"<{dist.get_rank()} {net.layer.weight.to_local().numel()} {len(state)} {received is None}>"
    print(told, flush=True)  # ranks share the log, and one's line may end in another's
    flare.send(flare.FLModel(params=state))
dist.destroy_process_group()
"""


def test_sharded_state_is_gathered_and_corrected_on_every_rank(tmp_path):
    wider = MODEL.replace("nn.Linear(3, 1)", "nn.Linear(3, 4)").replace("* site}", "* site * torch.ones(4)}")
    job = a_job(
        tmp_path,
        SHARDED,
        ["fsdp2"],
        model=wider,
        recipe={"launch": LAUNCH, "sites": 1},
        strategy={"name": "fedprox", "mu": 0.5},
        evaluation={"every": 0, "metric": "loss"},
    )
    done = run(job)
    log = (done.directory / "work" / "sites.log").read_text()
    assert set(re.findall(r"<(\d \d \d \w+)>", log)) == {"0 6 2 False", "1 6 0 True"}
    names: dict = {}
    exec(wider, names)
    net = names["make"]()
    data = names["rows"](1)
    for _ in range(3):
        start = {n: p.detach().clone() for n, p in net.named_parameters()}
        for first in (0, 4, 8) * 2:
            batch = data[first : first + 4]
            net.zero_grad()
            net(*(torch.stack([row[key] for row in batch]) for key in ("x", "labels")))["loss"].backward()
            with torch.no_grad():
                for name, p in net.named_parameters():
                    p -= 0.05 * (p.grad + 0.5 * (p - start[name]))
    for name, leaf in net.state_dict().items():
        np.testing.assert_allclose(final(done)[name], leaf.numpy(), atol=1e-5)


LLAMA_MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def make():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32))

def rows():
    return [{"input_ids": [(i + j) % 30 for j in range(8)], "labels": [(i + j) % 30 for j in range(8)]}
            for i in range(8)]
"""

LLAMA_SCRIPT = """
import json, os, sys
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
import hansa.client as flare
from model import make, rows

class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)

way = sys.argv[1]
fsdp = {"fsdp": "full_shard"} if way == "accelerate" else {}
arguments = TrainingArguments("out", learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=0,
                              per_device_train_batch_size=2, num_train_epochs=2, report_to=[], save_strategy="no",
                              use_cpu=True, disable_tqdm=True, **fsdp)
sharded = DistributedConfig(fsdp_size=2)
net = LlamaForCausalLM.from_pretrained("first", distributed_config=sharded) if way == "transformers" else make()
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
trainer = InOrder(net, arguments, train_dataset=rows(), eval_dataset=rows(), optimizers=(optimizer, None))
flare.patch(trainer)
while flare.is_running():
    trainer.evaluate()
    trainer.train()
    if flare.is_evaluate():
        continue
    weight = net.lm_head.weight
    here = weight.to_local() if hasattr(weight, "to_local") else weight
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    said = json.dumps([trainer.args.process_index, here.numel(), type(trainer.model_wrapped).__name__,
                       whole[0].tolist()])
    os.write(1, f"ROUND {said}\\n".encode())  # at once: ranks share the log
torch.distributed.destroy_process_group()
"""


def plain_llama(mu, rounds=3):
    """Return the model of one site in one process: two epochs of two batches of four rows a round."""
    names: dict = {}
    exec(LLAMA_MODEL, names)
    net = names["make"]()
    batch = {key: torch.tensor([row[key] for row in names["rows"]()]) for key in ("input_ids", "labels")}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(rounds):
        start = {n: p.detach().clone() for n, p in net.named_parameters()}
        for first in (0, 4) * 2:
            optimizer.zero_grad()
            net(**{key: rows[first : first + 4] for key, rows in batch.items()}).loss.backward()
            for name, p in net.named_parameters():
                p.grad += mu * (p.detach() - start[name])
            optimizer.step()
    return {name: leaf.numpy() for name, leaf in net.state_dict().items()}


@pytest.mark.parametrize(
    ("way", "held", "wrapped"),
    [
        ("transformers", 32 * 16 // 2, "FSDPLlamaForCausalLM"),
        ("accelerate", 32 * 16, "DistributedDataParallel"),  # without a GPU accelerate takes fsdp for DDP, silently
    ],
)
def test_a_sharded_trainer_is_plain_training_of_the_same_global_batch(tmp_path, way, held, wrapped):
    """In two processes, which share gradients though the script evaluates first."""
    names: dict = {}
    exec(LLAMA_MODEL, names)
    names["make"]().save_pretrained(tmp_path / "first")
    recipe = {"launch": LAUNCH, "sites": 1}
    strategy = {"name": "fedprox", "mu": 0.5}
    done = run(a_job(tmp_path, LLAMA_SCRIPT, [way], model=LLAMA_MODEL, recipe=recipe, strategy=strategy))
    got, expected = final(done), plain_llama(0.5)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-5)
    log = (done.directory / "work" / "sites.log").read_text()
    told = [json.loads(line.split("ROUND ")[1]) for line in log.splitlines() if "ROUND " in line]
    assert {(here, kind) for _, here, kind, _ in told} == {(held, wrapped)}
    ranks = [[row for rank, _, _, row in told if rank == number] for number in (0, 1)]
    assert ranks[0] == ranks[1], "both ranks have the same model"
    assert len(ranks[0]) == 3
