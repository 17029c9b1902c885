# SPDX-License-Identifier: Apache-2.0
"""Names that a job file may use, one table per family, and how a name becomes a value.

Only strings stand here, so nothing is imported before it is asked for. Third parties add names by entry points
in the group ``hansa.<family>``; in Python, pass the value itself instead of a name. ``module:attribute`` works in
every place a name does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast, get_type_hints

import pydantic

from hansa.errors import JobError, MissingExtraError, nearest

TABLES: Mapping[str, Mapping[str, str]] = {
    "strategies": {
        "fedavg": "hansa.strategies.fedavg:fedavg",
        "fedavgm": "hansa.strategies.fedavgm:fedavgm",
        "fedadam": "hansa.strategies.fedopt:fedadam",
        "fedyogi": "hansa.strategies.fedopt:fedyogi",
        "fedadagrad": "hansa.strategies.fedopt:fedadagrad",
        "fedprox": "hansa.strategies.fedprox:fedprox",
        "scaffold": "hansa.strategies.scaffold:scaffold",
    },
    "filters": {
        "clip": "hansa.filters.clip:clip",
        "cast": "hansa.filters.cast:cast",
    },
    "partitions": {
        "iid": "hansa.partition.iid:iid",
        "dirichlet": "hansa.partition.dirichlet:dirichlet",
        "shards": "hansa.partition.shards:shards",
        "by_key": "hansa.partition.by_key:by_key",
        "files": "hansa.partition.files:files",
    },
    "recipes": {
        "causal-lm": "hansa.recipes.causal_lm:build",
        "sequence-classification": "hansa.recipes.sequence_classification:build",
        "token-classification": "hansa.recipes.token_classification:build",
        "image-classification": "hansa.recipes.image_classification:build",
        "tabular-classification": "hansa.recipes.tabular_classification:build",
        "script": "hansa.recipes.script:build",
    },
    "workflows": {
        "scatter-gather": "hansa.workflows.scatter_gather:workflow",
        "cyclic": "hansa.workflows.cyclic:workflow",
    },
    "attacks": {
        "canaries": "hansa.audit.canaries:attack",
        "inversion": "hansa.audit.inversion:attack",
        "membership": "hansa.audit.membership:attack",
        "text": "hansa.audit.text:attack",
    },
}

_EXTRAS = {
    "torch": "torch",
    "transformers": "recipes",
    "peft": "recipes",
    "datasets": "recipes",
    "pyarrow": "recipes",
    "PIL": "recipes",
    "matplotlib": "report",
    "jinja2": "report",
    "tensorboard": "tensorboard",
    "dp_accounting": "privacy",
    "randomgen": "privacy",
    "cryptography": "privacy",
    "tenseal": "homomorphic",
    "zstandard": "homomorphic",
    "opacus": "dp-sgd",
}


def names(family: str) -> list[str]:
    """Return every known name of a family, third parties' included."""
    extra = {point.name for point in importlib.metadata.entry_points(group=f"hansa.{family}")}
    return sorted({*TABLES[family], *extra})


def load(family: str, name: str) -> Callable[..., Any]:
    """Return the builder that ``name`` stands for.

    Raises:
        JobError: no such name; the nearest one is suggested.
        MissingExtraError: its optional library is not installed.
    """
    target = TABLES[family].get(name)
    if target is None and ":" in name:
        target = name
    if target is None:
        for point in importlib.metadata.entry_points(group=f"hansa.{family}"):
            if point.name == name:
                target = point.value
    if target is None:
        known = names(family)
        raise JobError(f"{name!r} is not one of the {family}: {', '.join(known)}.{nearest(name, known)}")
    builder = load_object(target)
    if not callable(builder):
        raise JobError(f"{target!r} is not one of the {family}: it can't be called.")
    return cast("Callable[..., Any]", builder)


def load_object(target: str) -> Any:
    """Import ``module:attribute``.

    Raises:
        JobError: there is no such module or attribute.
        MissingExtraError: the module's optional library is not installed.
    """
    module, _, attribute = target.partition(":")
    if not all(step.isidentifier() for step in [*module.split("."), attribute]):
        raise JobError(f"{target!r} is not of the form module:attribute.")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error) or JobError(
            f"{target!r} can't be imported: {error}. Check the module's name and that it is on the path."
        ) from error
    except (ImportError, SyntaxError) as error:
        raise JobError(f"{target!r} can't be imported: {error}.") from error
    if not hasattr(loaded, attribute):
        raise JobError(f"{target!r} can't be imported: {module} has no {attribute!r}.{nearest(attribute, dir(loaded))}")
    return getattr(loaded, attribute)


def missing(error: ModuleNotFoundError) -> MissingExtraError | None:
    """Return the error that names the extra to install, if ``error`` is about an optional library."""
    top = (error.name or "").partition(".")[0]
    if top not in _EXTRAS:
        return None
    return MissingExtraError(f"This job needs {top!r}. Install it with: pip install 'hansa[{_EXTRAS[top]}]'")


def build(family: str, name: str, options: Mapping[str, Any]) -> Any:
    """Call the builder of ``name`` with ``options``, checked against its signature.

    Raises:
        JobError: an option is unknown, missing, or of the wrong type.
    """
    builder = load(family, name)
    return builder(**checked(f"{family}.{name}", builder, options))


def checked(where: str, builder: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` converted to the types that ``builder``'s keyword parameters are annotated with."""
    signature = inspect.signature(builder).parameters.values()
    parameters = {p.name: p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature)
    hints = get_type_hints(builder)
    for key in options:
        if key not in parameters and not open_ended:
            raise JobError(
                f"{where} has no option {key!r}; it has: {', '.join(parameters) or 'none'}.{nearest(key, parameters)}"
            )
    converted = {key: value for key, value in options.items() if key not in parameters}
    for key, parameter in parameters.items():
        if key not in options:
            if parameter.default is inspect.Parameter.empty:
                raise JobError(f"{where} needs the option {key!r}.")
            continue
        try:
            converted[key] = pydantic.TypeAdapter(hints.get(key, Any)).validate_python(options[key])
        except pydantic.ValidationError as error:
            raise JobError(f"{where}.{key}: {error.errors()[0]['msg']} (got {options[key]!r}).") from None
    return converted
