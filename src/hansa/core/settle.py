# SPDX-License-Identifier: Apache-2.0
"""From what a strategy's rules say to a model and a state that exist.

Rules see large trees as :class:`hansa.core.lazy.Leaf`; here their results are computed, a block at a time, into files
in the form of a checkpoint, and mapped. So memory is a few blocks, and a checkpoint takes the files over as they are.

| case | result |
|---|---|
| a tree of at most ``trees.LARGE`` bytes | in memory, no file |
| a tree whose tensors are arrays already, mapped or not | stays as it is, no file |
| the disk is full | StorageError; no file is left, and the model before is as it was |
| no folder is given | mapped all the same, from files that have no name any more |
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hansa.core import storage, wire
from hansa.core import tree as trees
from hansa.core.strategy import Notes, Strategy
from hansa.core.tree import Parts, Tree
from hansa.core.values import Aggregate, Model

MODEL = "model.safetensors"
STATE = "state.hansa"


@dataclass(frozen=True)
class Settled:
    """A model and a strategy's state, and those of the files :data:`MODEL` and :data:`STATE` that hold them."""

    model: Model
    state: Parts
    files: Mapping[str, Path]

    def forget(self) -> None:
        """Delete the files' names; what is mapped stays."""
        for path in self.files.values():
            path.unlink(missing_ok=True)


def start(strategy: Strategy, params: Tree, directory: Path | None = None) -> tuple[Model, Parts]:
    """Return version 0 of a model that starts at ``params`` (native dtypes), and the strategy's first state."""
    model = Model.start(trees.lazily(params))
    settled = settle(model, strategy.init(model), directory)
    settled.forget()
    return settled.model, settled.state


def step(
    strategy: Strategy, model: Model, state: Parts, aggregate: Aggregate, directory: Path | None = None
) -> tuple[Settled, Notes]:
    """Return what ``strategy.step`` says, settled; the aggregate is not needed any more.

    Raises:
        StorageError: the disk is full.
    """
    new, state, notes = strategy.step(
        replace(model, params=trees.lazily(model.params)),
        _lazily(state),
        replace(aggregate, sums=_lazily(aggregate.sums)),
    )
    return settle(new, state, directory), notes


def settle(model: Model, state: Parts, directory: Path | None = None) -> Settled:
    """Compute the leaves of ``model`` and ``state``: into files in ``directory`` where they are large.

    Raises:
        StorageError: the disk is full or the folder can't be written.
    """
    with contextlib.ExitStack() as stack:
        folder = directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hansa-model-")))
        files = {}
        try:
            if _is_to_compute([model.params]):
                files[MODEL] = _fresh(folder / MODEL)
                storage.save_tree(files[MODEL], model.params, durable=True)
                mapped = storage.load_tree(files[MODEL])
                model = replace(model, params={name: mapped[name] for name in model.params})
            if _is_to_compute(state.values()):
                files[STATE] = _fresh(folder / STATE)
                save_state(files[STATE], state)
                _, state = wire.open_parts(files[STATE])
        except BaseException:  # no half-written model stays on disk, Ctrl-C included
            for path in files.values():
                path.unlink(missing_ok=True)
            raise
        model = replace(model, params=_whole(model.params))
        return Settled(model, {part: _whole(tree) for part, tree in state.items()}, files if directory else {})


def save_state(path: Path, state: Parts) -> None:
    """Write a strategy's state.

    Raises:
        StorageError: the disk is full or the folder can't be written.
    """
    try:
        with storage.rewritten(path) as file:
            wire.write(file, "state", {}, state)
    except OSError as error:
        raise storage.full(path, error) from error


def _fresh(path: Path) -> Path:
    """Return ``path`` without the file that had this name, which may still be mapped; with a spare one, if any."""
    path.unlink(missing_ok=True)
    storage.Spares(path.parent / storage.SPARES).take(path)
    return path


def _lazily(parts: Parts) -> Parts:
    return {part: trees.lazily(tree) for part, tree in parts.items()}


def _is_to_compute(found: Iterable[Tree]) -> bool:
    """Say whether the trees are large and not all there already."""
    held = [trees.arrays(tree) for tree in found]
    return sum(map(trees.num_bytes, held)) > trees.LARGE and any(isinstance(tree, trees.Lazy) for tree in held)


def _whole(tree: Tree) -> Tree:
    """Return ``tree`` with arrays for leaves; those of a file stay there."""
    return tree if isinstance(tree, trees.Lazy) else {name: np.asarray(leaf) for name, leaf in tree.items()}
