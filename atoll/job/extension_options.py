"""The `options` of what an extension brings: free keys of a job, checked by the extension's own model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from atoll.errors import ConfigError, did_you_mean
from atoll.job.error_text import explain
from atoll.plugins import Extension


def checked_options(
    extension: Extension, options: Mapping[str, Any] | None, where: str
) -> tuple[object, ...]:
    """The job's options as the extension's model has them, in a tuple; empty where it declares none.

    `where` is the table's key in the job, for error messages. `extension` is loaded.

    Raises:
        ConfigError: a key is unknown, missing, or its value doesn't fit; one line that names it.
    """
    if extension.options is not None:
        return (validated(extension.options, options or {}, where),)
    if options:
        raise ConfigError(f"{where}.{next(iter(options))}: {extension.name} has no options, expected none")
    return ()


def validated(model: type[BaseModel], options: Mapping[str, Any], where: str) -> BaseModel:
    """An instance of a model; a key that it doesn't have is refused, also where the model would ignore it.

    Raises:
        ConfigError: as `checked_options`.
    """
    known = [field.alias or name for name, field in model.model_fields.items()]
    for key in options if model.model_config.get("extra") != "allow" else ():
        if key not in known:
            hint = did_you_mean(key, known, cutoff=0.5) if known else "expected none"
            raise ConfigError(f"{where}.{key}: unknown key, {hint}")
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(explain(error, model, where, joined_by=".")) from None
