"""The `options` of an extension in a job: free keys, validated by the extension's own pydantic model."""

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
    """(an instance of the extension's options model,), or () if the extension declares no model.

    `where` is the key of the options in the job, for error messages. `extension` must be loaded.

    Raises:
        ConfigError: a key is unknown or missing, or its value is invalid; one line that names it.
    """
    if extension.options is not None:
        return (validated(extension.options, options or {}, where),)
    if options:
        raise ConfigError(f"{where}.{next(iter(options))}: {extension.name} has no options, expected none")
    return ()


def validated(model: type[BaseModel], options: Mapping[str, Any], where: str) -> BaseModel:
    """The options as an instance of the model; unknown keys are errors, unless the model allows extra keys.

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
