"""Redacts error messages before they leave a site: no example, label or path may be in them."""

from __future__ import annotations

import re

from atoll.errors import DataChanged, DataError, InputError

UNFIT = "its data cannot be used for this job; the site's log says why"
CHANGED = "its data changed during the run; the site's log says more"
HIDDEN = "(a path at the site)"

_PATH = re.compile(r"(?<![\w:/.])~?/[^;,:()'\"\n]*[^;,:()'\"\s]")
"""A path, from its slash to the next punctuation: folder names may have spaces, so text after it goes too."""


def redact(error: InputError, known: str) -> str:
    """An error as one sentence for the server, without paths, unless `known`, the server's text, has them."""
    if isinstance(error, DataChanged):
        return CHANGED
    if isinstance(error, DataError):
        return UNFIT
    return _PATH.sub(lambda match: match[0] if match[0] in known else HIDDEN, str(error))
