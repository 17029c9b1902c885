# SPDX-License-Identifier: Apache-2.0
"""Large models: what a step says is computed into files, whole or not at all, and memory stays small."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hansa.core import settle, wire
from hansa.core import tree as trees
from hansa.core.values import Aggregate, Model, RoundRecord
from hansa.errors import StorageError, WireError
from hansa.sinks.checkpoint import Checkpoints
from hansa.strategies.fedavgm import fedavgm
from hansa.strategies.scaffold import scaffold

PARAMS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.full(5, 0.1, trees.dtype_of("bfloat16")),
    "count": np.array([7]),
    "scale": np.array(2.0),
}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "LARGE", 0)


def aggregate(model: Model, *parts: str) -> Aggregate:
    sums = {name: np.full_like(leaf, 0.5) for name, leaf in trees.floating(model.params).items()}
    return Aggregate(dict.fromkeys(parts, sums), dict.fromkeys(parts, True), 2.0, 2.0, 2)


def bits(*found: Any) -> list[tuple[str, bytes]]:
    return [(name, leaf.tobytes()) for tree in found for name, leaf in tree.items()]


def record(settled: settle.Settled, number: int = 1) -> RoundRecord:
    return RoundRecord(
        "job", number, (), (), (), {"loss": 1.0}, {}, {}, 0, 0, 0.0, settled.model, settled.state, {}, settled.files
    )


@pytest.mark.usefixtures("large")
def test_a_checkpoint_takes_the_files_over_as_they_are(tmp_path: Path) -> None:
    strategy = fedavgm()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, "loss", "min")
    model, state = settle.start(strategy, PARAMS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}
    settled, _ = settle.step(strategy, model, state, aggregate(model, "delta"), tmp_path)
    inodes = {name: path.stat().st_ino for name, path in settled.files.items()}
    assert {*inodes} == {settle.MODEL, settle.STATE}
    checkpoints.write(record(settled))
    settled.forget()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}
    folder = tmp_path / "checkpoints" / "000001"
    assert {name: (folder / name).stat().st_ino for name in inodes} == inodes
    loaded = checkpoints.load()
    assert loaded is not None
    assert dict(bits(loaded.model.params)) == dict(bits(settled.model.params))
    assert dict(bits(loaded.state["momentum"])) == dict(bits(settled.state["momentum"]))
    assert [*settled.model.params] == [*PARAMS]


@pytest.mark.usefixtures("large")
def test_files_are_only_named_while_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle.tempfile, "tempdir", str(tmp_path))
    strategy = fedavgm()
    model, state = settle.start(strategy, PARAMS)
    settled, _ = settle.step(strategy, model, state, aggregate(model, "delta"))
    assert not settled.files
    assert not [*tmp_path.iterdir()]
    assert settled.model.params["w"][0, 1] == 1.25


def test_small_models_leave_no_file(tmp_path: Path) -> None:
    model, state = settle.start(fedavgm(), PARAMS, tmp_path)
    settled, _ = settle.step(fedavgm(), model, state, aggregate(model, "delta"), tmp_path)
    assert not settled.files
    assert not [*tmp_path.iterdir()]
    assert type(settled.model.params["w"]) is np.ndarray


@pytest.mark.usefixtures("large")
def test_the_model_before_stays_readable_while_its_successor_takes_its_name(tmp_path: Path) -> None:
    strategy = scaffold()
    model, state = settle.start(strategy, PARAMS, tmp_path)
    first, _ = settle.step(strategy, model, state, aggregate(model, "delta", "control"), tmp_path)
    before = bits(first.model.params, first.state["control"])
    sums = aggregate(first.model, "delta", "control")
    second, _ = settle.step(strategy, first.model, first.state, sums, tmp_path)
    assert bits(first.model.params, first.state["control"]) == before
    assert bits(second.model.params, second.state["control"]) != before


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from hansa.core import settle, tree
from hansa.core.values import Aggregate, RoundRecord
from hansa.errors import StorageError
from hansa.sinks.checkpoint import Checkpoints
from hansa.strategies.fedavgm import fedavgm
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tree.LARGE = 0
folder = Path(sys.argv[1])
strategy = fedavgm()
checkpoints = Checkpoints(folder / "checkpoints", 1, "loss", "min")
model, state = settle.start(strategy, {"w": np.ones(100_000, np.float32)}, folder)
ones = {"w": np.ones(100_000, np.float32)}
def step(model, state):
    return settle.step(strategy, model, state, Aggregate({"delta": ones}, {"delta": True}, 1.0, 1.0, 1), folder)[0]
done = step(model, state)
checkpoints.write(RoundRecord("job", 1, (), (), (), {}, {}, {}, 0, 0, 0.0, done.model, done.state, {}, done.files))
done.forget()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    step(done.model, done.state)
except StorageError as error:
    print(error)
print(done.model.params["w"][0], checkpoints.load().model.params["w"][-1], checkpoints.load().state["momentum"]["w"][5])
"""


@pytest.mark.parametrize("limit", [50_000, 400_100], ids=["model", "state"])
def test_a_full_disk_leaves_the_checkpoint_before_and_no_half_a_file(limit: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert "Can't write" in done.stdout
    assert "output.dir" in done.stdout
    assert done.stdout.endswith("2.0 2.0 -1.0\n")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}


@pytest.mark.usefixtures("large")
def test_a_damaged_state_is_found_when_it_is_read(tmp_path: Path) -> None:
    settle.save_state(tmp_path / "state", {"momentum": {"a": np.ones(1000), "b": np.ones(1000)}})
    raw = bytearray((tmp_path / "state").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "state").write_bytes(raw)
    _, state = wire.open_parts(tmp_path / "state")
    assert state["momentum"]["a"].sum() == 1000
    with pytest.raises(WireError, match="damaged"):
        trees.norm(state["momentum"])
    strategy = fedavgm()
    model = Model.start({"a": np.ones(1000), "b": np.ones(1000)})
    with pytest.raises(WireError, match="damaged"):
        settle.step(strategy, model, state, aggregate(model, "delta"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["state"], "no half a model is left"
    with pytest.raises(StorageError):
        wire.open_parts(tmp_path / "missing")


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from hansa import registry
from hansa.client.work import perform
from hansa.core import fold, settle, tree, wire
from hansa.core.fold import Fold
from hansa.core.lazy import Leaf
from hansa.core.ports import Work
from hansa.core.strategy import Steps
from hansa.core.values import Plan, RoundRecord
from hansa.filters.clip import clip
from hansa.filters.weigh import weigh
from hansa.sinks.checkpoint import Checkpoints

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

class Program:
    def train(self, site, plan, correction):
        return Work(tree.Lazy(tree.scale(tree.lazily(plan.params), 1.5)), 1024.0, Steps(1, 0.1), {})

folder = Path(sys.argv[1])
strategy = registry.build("strategies", sys.argv[2], {})
settle.start(strategy, {"w": np.ones(3)})  # what is imported late is not counted
size = 3 << 20
tree.LARGE = fold.MAP_BYTES = 8 << 20
leaf = Leaf((size,), np.dtype(np.float32), lambda start, stop, memo: np.ones(stop - start, np.float32))
before = peak = anonymous()

def seen():
    global peak
    peak = max(peak, anonymous())

original = wire.digest_of
def digest_of(data):  # called for every block that is written or read
    seen()
    return original(data)
wire.digest_of = digest_of
checkpoints = Checkpoints(folder / "checkpoints", 1, "loss", "min")
model, state = settle.start(strategy, tree.Lazy({f"w{i}": leaf for i in range(4)}), folder)
sites = [f"s{i}" for i in range(int(sys.argv[3]))]
for number in (1, 2):
    plan = Plan("job", number, "train", number - 1, model.native(), strategy.sent(state))
    with (folder / "plan").open("wb") as file:
        wire.write_plan(file, plan)
    layout = tree.layout_of(plan.params)
    folding = Fold(sites, dict.fromkeys(strategy.weighed, layout), strategy.weighed, len(sites), folder)
    for site in sites:
        plan = wire.open_plan(folder / "plan")
        update, memory, _ = perform(Program(), strategy, [clip(1.0), weigh()], plan, site, {})
        folding.add(wire.spool(update, folder / site))
        seen()
    settled, _ = settle.step(strategy, model, state, folding.close(), folder)
    folding.discard()
    model, state = settled.model, settled.state
    entry = RoundRecord("job", number, (), (), (), {}, {}, {}, 0, 0, 0.0, model, state, {}, settled.files)
    checkpoints.write(entry)
    settled.forget()
    seen()
loaded = checkpoints.load()
assert loaded.model.version == 2
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell RssAnon")
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "scaffold"])
def test_two_rounds_of_a_large_model_need_a_few_blocks_of_memory(strategy: str, tmp_path: Path) -> None:
    """48 MiB in four tensors, site and server in one process; the checkpoints and every state are as large."""
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", MEMORY, folder, strategy, str(sites)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
        )
        for sites, folder in ((1, fresh(tmp_path / "few")), (3, fresh(tmp_path / "many")))
    )
    block = resource.getpagesize() * 256
    assert few < 32 * block, "two thirds of the model"
    assert many < few + 8 * block


def fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder
