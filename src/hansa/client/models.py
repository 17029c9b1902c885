# SPDX-License-Identifier: Apache-2.0
"""A model's shared tensors, in and out, however it is wrapped.

| case | result |
|---|---|
| a ``peft`` model | only the adapter travels, under the names of ``get_peft_model_state_dict`` |
| DDP, ``torch.compile`` | the bare module's names |
| FSDP, FSDP2 (``fully_shard``) | gathered to rank 0 on the CPU; only what is shared is gathered |
| FSDP2 left a module whole after an evaluation | it is sharded again: whole tensors are not the optimiser's |
| several processes | collective: every rank calls; what rank 0 received is sent to the others |
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from hansa.client import ranks
from hansa.errors import ModelError, nearest


def bare(model: nn.Module) -> nn.Module:
    """Return the module inside what DDP, FSDP and ``torch.compile`` wrap around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            inner = getattr(model, "_fsdp_wrapped_module", None)
        if inner is None:
            return model
        model = inner


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by their names in the shared model."""
    found = _named(model)
    names = _adapter(model, found)
    return found if names is None else {short: found[long] for short, long in names.items()}


def is_flat(model: nn.Module) -> bool:
    """Say whether a part of the model is under the first FSDP, which makes one flat tensor of many."""
    return any(isinstance(part, FullyShardedDataParallel) for part in model.modules())


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Return the shared tensors, whole and on the CPU; nothing on every rank but 0."""
    names = _adapter(model, _named(model))
    if ranks.world() == 1:
        state: Mapping[str, Any] = bare(model).state_dict()
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=names is not None)
        state = get_model_state_dict(model, options=options)
    if names is not None and state:
        state = {short: state[long] for short, long in names.items()}
    return {name: value.detach().cpu() for name, value in state.items() if isinstance(value, Tensor)}


def load(model: nn.Module, params: Mapping[str, Tensor], strict: bool = True) -> None:
    """Overwrite the shared tensors with rank 0's ``params``.

    Raises:
        ModelError: a tensor is missing (unless not ``strict``), unknown, or of another shape.
    """
    names = _adapter(model, _named(model))
    state: dict[str, Any] = dict(params)
    if names is not None:
        unknown = sorted(params.keys() - names.keys())
        if unknown:
            raise ModelError(
                f"The adapter has no tensor {unknown[0]!r}, which the shared model has.{nearest(unknown[0], names)} "
                "model.factory gives get_peft_model_state_dict(model)."
            )
        state = {names[short]: leaf for short, leaf in params.items()}
        strict = False
    try:
        if ranks.world() == 1:
            bare(model).load_state_dict(state, strict=strict)
        else:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
            set_model_state_dict(model, state, options=options)
    except RuntimeError as error:
        raise ModelError(f"The received model does not fit this one: {error}") from error


def _adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Return an adapter's names as they travel -> as they are in the module; None if the model is no ``peft`` one."""
    peft = sys.modules.get("peft")
    inner = bare(model)
    if peft is None or not isinstance(inner, peft.PeftModel):
        return None
    travelling = peft.get_peft_model_state_dict(inner, state_dict=dict(tensors), save_embedding_layers=False)
    long = {id(leaf): name for name, leaf in tensors.items()}
    return {short: long[id(leaf)] for short, leaf in travelling.items()}


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Return the bare module's parameters, whatever its parts are wrapped in."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    wrappers = ("_orig_mod", "_fsdp_wrapped_module")
    return {
        ".".join(step for step in name.split(".") if step not in wrappers): parameter
        for name, parameter in bare(model).named_parameters()
    }
