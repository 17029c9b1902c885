# SPDX-License-Identifier: Apache-2.0
"""Several processes of one script (``torchrun``): rank 0 talks to Hansa, the others are told what it heard.

| case | result |
|---|---|
| one process, or ``torch.distributed`` not up yet | nothing is shared; a value is what it was |
| several, the process group is up | :func:`share` and :func:`share_trees` are collective: every rank calls them |
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from hansa.core import tree as trees
from hansa.core.tree import Array, Parts


def own(rank: str | int | None = None) -> int:
    """Return this process's rank: ``rank`` if given, else what the launcher set (RANK, LOCAL_RANK), else 0."""
    told = rank if rank is not None else os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    return int(told)


def world() -> int:
    """Return how many processes are joined in torch's process group; 1 where there is none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return int(torch.distributed.get_world_size())


def share(value: Any) -> Any:
    """Return rank 0's ``value``, which JSON can hold."""
    if world() == 1:
        return value
    import torch.distributed as dist

    first = dist.get_rank() == 0
    data = np.frombuffer(json.dumps(value).encode(), np.uint8).copy() if first else np.zeros(0, np.uint8)
    length = _broadcast(np.array([len(data)], np.int64))
    data = _broadcast(data if first else np.zeros(int(length[0]), np.uint8))
    return json.loads(data.tobytes())


def share_trees(parts: Parts) -> dict[str, dict[str, Array]]:
    """Return rank 0's ``parts``, tensor by tensor; what the other ranks give is not looked at."""
    if world() == 1:
        return {part: dict(tree) for part, tree in parts.items()}
    layout: Mapping[str, Mapping[str, Any]] = share(
        {p: {n: (leaf.dtype.name, leaf.shape) for n, leaf in tree.items()} for p, tree in parts.items()}
    )
    import torch.distributed as dist

    first = dist.get_rank() == 0
    result: dict[str, dict[str, Array]] = {}
    for part, tree in layout.items():
        result[part] = {}
        for name, (dtype, shape) in tree.items():
            leaf = parts[part][name] if first else np.zeros(shape, trees.dtype_of(dtype))
            flat = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
            result[part][name] = _broadcast(flat).view(trees.dtype_of(dtype)).reshape(shape)
    return result


def _broadcast(array: Array) -> Array:
    import torch
    import torch.distributed as dist

    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)
    dist.broadcast(tensor, src=0)
    return tensor.cpu().numpy()
