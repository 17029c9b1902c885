# SPDX-License-Identifier: Apache-2.0
"""Models, tokenizers and adapters as a job names them, through ``transformers`` and ``peft``.

A base is a directory, ``package:NAME/SUBDIR`` (a folder inside an installed package), or a hub name. Weights are
mapped from their safetensors file, so processes on one machine share the pages of whatever they don't train.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from hansa.client.torch import seeded
from hansa.core.config import Adapter, Job
from hansa.errors import JobError, ModelError, StorageError, nearest
from hansa.recipes import hub, tokenizers

_HUB_NAME = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")


@dataclass(frozen=True)
class Base:
    """Where a pre-trained model lies: ``where`` is a directory (``local``) or a hub name; ``hint`` a folder like it."""

    where: str
    local: bool
    hint: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """What every ``from_pretrained`` call is given: only a hub name, if the hub answers, leads to the network."""
        return {"local_files_only": self.local or not hub.online()}


def locate(job: Job, name: str) -> Base:
    """Say what ``model.base`` or ``model.tokenizer`` names.

    Raises:
        ModelError: it is neither a directory, nor in an installed package, nor a possible hub name.
    """
    if name.startswith("package:"):
        return Base(str(_in_package(name)), local=True)
    path = job.path(name)
    if path.is_dir():
        return Base(str(path.resolve()), local=True)
    if _HUB_NAME.match(name) and ("/" not in name or not path.parent.is_dir()):
        folders = (each.name for each in path.parent.iterdir()) if path.parent.is_dir() else ()
        return Base(name, local=False, hint=nearest(path.name, folders))
    raise ModelError(f"There is no model folder {str(path)!r}.{_sibling(path)}")


def _sibling(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {str(path.parent)!r} does not exist either."
    folders = [each.name for each in path.parent.iterdir() if each.is_dir()]
    return nearest(path.name, folders) or f" Folders there: {', '.join(sorted(folders)[:8]) or 'none'}."


def _in_package(name: str) -> Path:
    package, _, folder = name.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"{name!r}: no installed package {package!r} has folders."
            f"{nearest(package, importlib.metadata.packages_distributions())} Install it, or give a directory."
        )
    root = Path(found.submodule_search_locations[0])
    path = root / folder
    if not path.is_dir():
        raise ModelError(f"{name!r}: the package {package!r} has no folder {folder!r}.{_sibling(path)}")
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence ``transformers``' progress bars and load reports inside the block."""
    logging = transformers.utils.logging
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def saving(directory: Path) -> Iterator[None]:
    """Turn what ``save_pretrained`` raises for a full disk into StorageError."""
    try:
        with quiet():
            yield
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in an error of its own
        raise StorageError(f"The model can't be written to {directory}: {error}. Free some space.") from error


@contextlib.contextmanager
def explained(base: Base, what: str) -> Iterator[None]:
    """Turn what ``from_pretrained`` raises for a base that is not there, or is not one, into ModelError."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if base.local:
            advice = "Check that the folder holds what transformers saves (config.json, tokenizer.json, ...)."
        elif hub.online():
            advice = "Check the name, and that you may read it (hf auth login)."
        else:
            advice = "The hub can't be reached from here: fetch the model elsewhere and give its folder as model.base."
        raise ModelError(f"The {what} {base.where!r} can't be loaded: {_reason(error)} {advice}{base.hint}") from error


def _reason(error: BaseException) -> str:
    """Return the first line of a library's message, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:") + "."


def load_tokenizer(job: Job, **options: Any) -> Any:
    """Return the job's tokenizer, with a padding token.

    Args:
        job: the job.
        options: what ``from_pretrained`` is told beside.

    Raises:
        ModelError: there is none, or it can't be loaded.
        JobError: the job names neither a tokenizer nor a base.
    """
    name = job.model.tokenizer or job.model.base
    if name is None:
        raise JobError("model.tokenizer is needed with model.config: a directory, a hub name, or 'bytes'.")
    if name == "bytes":
        tokenizer = tokenizers.byte_level()
    else:
        base = locate(job, name)
        with explained(base, "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(base.where, **base.options, **options)
    if not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer {name!r} gives no offsets (it is not a 'fast' one). Use one with tokenizer.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"The tokenizer {name!r} has no padding, end or unknown token, so texts can't be batched.")
    return tokenizer


def load_model(
    job: Job, auto_class: str, fields: Mapping[str, Any], tokenizer: Any | None
) -> tuple[nn.Module, list[str]]:
    """Return the job's model, and the names of the modules that the base has no weights for.

    What the base lacks is drawn from the job's seed, so every process draws the same.

    Args:
        job: the job.
        auto_class: e.g. ``AutoModelForCausalLM``.
        fields: config fields that the task sets (labels).
        tokenizer: for the defaults of a model from scratch; None for models of images.

    Raises:
        ModelError: the base is not there or can't be loaded.
        JobError: the config is not one, or neither base nor config is given.
    """
    dtype = getattr(torch, job.model.dtype)
    auto = getattr(transformers, auto_class)
    if (job.model.base is None) == (job.model.config is None):
        raise JobError("Give either model.base (a pre-trained model) or model.config (one from scratch).")
    with seeded(job.seed, "model"), quiet():
        if job.model.base is None:
            return _from_scratch(auto, scratch_config(job, fields, tokenizer), dtype), []
        base = locate(job, job.model.base)
        with explained(base, "base model"):
            config = transformers.AutoConfig.from_pretrained(base.where, **base.options, **fields)
            model, report = auto.from_pretrained(
                base.where,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=bool(fields),
                **base.options,
            )
    fresh = [*report["missing_keys"], *(each[0] for each in report["mismatched_keys"])]
    return model, sorted({name.rpartition(".")[0] for name in fresh})


def _from_scratch(auto: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    try:
        model: nn.Module = auto.from_config(config, dtype=dtype)
    except (AssertionError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise JobError(f"transformers can't build a model from model.config: {_reason(error)}") from error
    return model


def scratch_config(job: Job, fields: Mapping[str, Any], tokenizer: Any | None) -> Any:
    """Return the config of ``model.config``, its vocabulary and special tokens taken from the tokenizer.

    Raises:
        JobError: the model type or a field is unknown, or a value is refused.
    """
    given = dict(job.model.config or {})
    kind = given.pop("model_type", None)
    known_kinds = list(transformers.CONFIG_MAPPING)
    if kind not in known_kinds:
        raise JobError(
            f"model.config needs a model_type that transformers knows, not {kind!r}.{nearest(str(kind), known_kinds)}"
        )
    known = transformers.CONFIG_MAPPING[kind]().to_dict()
    for name in given:
        if name not in known:
            raise JobError(f"model.config: a {kind} config has no field {name!r}.{nearest(name, known)}")
    if tokenizer is not None:
        specials = ("pad_token_id", "bos_token_id", "eos_token_id")
        defaults = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in specials}}
        given = {**{name: value for name, value in defaults.items() if name in known}, **given}
        if isinstance(given.get("vocab_size"), int):
            check_vocabulary(given["vocab_size"], tokenizer, str(job.model.tokenizer))
    try:
        return transformers.AutoConfig.for_model(kind, **given, **fields)
    except (TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        raise JobError(f"model.config is refused by transformers: {' '.join(str(error).split())}") from None


def load_text_model(
    job: Job, auto_class: str, fields: Mapping[str, Any], tokenizer: Any, max_length: int
) -> tuple[nn.Module, list[str]]:
    """Return :func:`load_model`'s model after checking that the tokenizer and ``max_length`` fit it."""
    model, fresh = load_model(job, auto_class, fields, tokenizer)
    check_vocabulary(_vocabulary(model), tokenizer, job.model.tokenizer or str(job.model.base))
    check_length(model, max_length)
    return model, fresh


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def check_vocabulary(rows: int, tokenizer: Any, name: str) -> None:
    """Raise ModelError if a token of the tokenizer has none of the ``rows`` of the model's embedding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"The tokenizer {name!r} has token ids up to {largest}; the model embeds {rows} tokens (0 to {rows - 1}). "
            "Use the tokenizer that belongs to the model, or set model.config.vocab_size."
        )


def check_length(model: nn.Module, max_length: int) -> None:
    """Raise JobError if ``max_length`` tokens are more than the model has positions for."""
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        raise JobError(f"recipe.max_length is {max_length} tokens; the model takes at most {positions}. Lower it.")


def add_adapter(
    model: nn.Module, adapter: Adapter, task_type: str | None, heads: Sequence[str], seed: int
) -> nn.Module:
    """Return ``model`` with a fresh adapter, its own weights frozen.

    Args:
        model: the base.
        adapter: peft method and config fields.
        task_type: peft's name of the task.
        heads: modules that are trained whole beside the adapter.
        seed: what the adapter's initial weights are drawn from.

    Raises:
        JobError: peft has no such method, or the method no such field.
        ModelError: the adapter's target matches nothing in the model.
    """
    config = _adapter_config(adapter, task_type, heads)
    try:
        with seeded(seed, "adapter"), quiet(), warnings.catch_warnings():
            # peft asks transformers in a way that transformers deprecates; the user can do nothing about it.
            warnings.simplefilter("ignore", FutureWarning)
            adapted: nn.Module = peft.get_peft_model(model, config)
    except (ValueError, AttributeError, KeyError, TypeError, NotImplementedError) as error:
        advice = (
            f"Set model.adapter.target_modules; linear modules of this model: {', '.join(linear_modules(model))}."
            if "target" in str(error).lower()
            else f"Check the fields of model.adapter against peft's {type(config).__name__}."
        )
        raise ModelError(
            f"The adapter {adapter.method!r} does not fit this model: {_reason(error)} {advice}"
        ) from error
    return adapted


def _adapter_config(adapter: Adapter, task_type: str | None, heads: Sequence[str]) -> Any:
    methods = {
        str(getattr(kind, "value", kind)).lower(): each for kind, each in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    method = adapter.method.lower().replace("-", "_")
    if method not in methods:
        raise JobError(
            f"model.adapter.method {adapter.method!r} is no method of peft: {', '.join(sorted(methods))}."
            f"{nearest(method, methods)}"
        )
    fields = {field.name for field in dataclasses.fields(methods[method]) if field.init}
    options = adapter.options
    for name in options:
        if name not in fields:
            own = sorted(fields - {field.name for field in dataclasses.fields(peft.PeftConfig)})
            suggested = nearest(name, fields) or f" Its fields: {', '.join(own)}."
            raise JobError(f"model.adapter: peft's {method} has no field {name!r}.{suggested}")
    if heads and "modules_to_save" in fields:
        options["modules_to_save"] = sorted({*heads, *(options.get("modules_to_save") or [])})
    try:
        return methods[method](**{"task_type": task_type, **options})
    except (TypeError, ValueError) as error:
        raise JobError(f"model.adapter is refused by peft: {_reason(error)}") from None


def linear_modules(model: nn.Module, limit: int = 12) -> list[str]:
    """Return the last parts of the names of linear modules, each once, at most ``limit``."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    names = (name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds))
    return list(dict.fromkeys(names))[:limit]


def shared_tensors(model: nn.Module, *, adapted: bool) -> dict[str, Tensor]:
    """Return what sites share: trainable parameters and, without an adapter, persistent floating buffers.

    Names are the base model's own, without peft's wrappers; a tied tensor appears once, under its first name.
    Integer buffers are state of one process and are not shared.
    """
    tensors: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not adapted:
        kept = model.state_dict().keys()
        tensors |= {n: b for n, b in model.named_buffers() if n in kept and b.is_floating_point()}
    plain = [plain_name(name) if adapted else name for name in tensors]
    if len(set(plain)) < len(plain):
        return tensors
    return dict(zip(plain, tensors.values(), strict=True))


def plain_name(name: str) -> str:
    """Return a parameter's name without peft's wrappers.

    >>> plain_name("base_model.model.model.layers.0.q_proj.lora_A.default.weight")
    'model.layers.0.q_proj.lora_A.weight'
    >>> plain_name("base_model.model.classifier.modules_to_save.default.bias")
    'classifier.bias'
    """
    steps = name.removeprefix("base_model.model.").split(".")
    return ".".join(step for step in steps if step not in ("default", "modules_to_save"))
