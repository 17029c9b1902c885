# SPDX-License-Identifier: Apache-2.0
"""Batches from sequences of unequal length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
"""The target of positions that carry no loss."""


def padded(rows: Sequence[Sequence[int] | NDArray[np.int64]], fill: int) -> Tensor:
    """Return an int64 tensor (rows, longest), filled up on the right.

    >>> padded([[1], [2, 3]], 0).tolist()
    [[1, 0], [2, 3]]
    """
    stacked = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for into, row in zip(stacked, rows, strict=True):
        into[: len(row)] = row
    return torch.from_numpy(stacked)


def model_inputs(encoded: Sequence[Mapping[str, Sequence[int]]], tokenizer: Any) -> dict[str, Tensor]:
    """Stack tokenised texts; the attention mask is left out where nothing is padded."""
    fills = {"input_ids": tokenizer.pad_token_id, "token_type_ids": 0, "attention_mask": 0}
    inputs = {name: padded([row[name] for row in encoded], fill) for name, fill in fills.items() if name in encoded[0]}
    if bool(inputs["attention_mask"].all()):
        del inputs["attention_mask"]
    return inputs
