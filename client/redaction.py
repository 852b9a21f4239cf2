"""What of an error may leave a site: its kind and our own words, never an example, a label or a path."""

from __future__ import annotations

import re

from atoll.errors import DataChanged, DataError, InputError

UNFIT = "its data cannot be used for this job; the site's log says why"
CHANGED = "its data changed during the run; the site's log says more"
HIDDEN = "(a path at the site)"

_PATH = re.compile(r"(?<![\w:/.])~?/[^;,:()'\"\n]*[^;,:()'\"\s]")
"""From a slash to the next punctuation: names of folders may have spaces, so words after it go too."""


def redact(error: InputError, known: str) -> str:
    """One sentence for the server; of paths only those that are in `known`, which came from there."""
    if isinstance(error, DataChanged):
        return CHANGED
    if isinstance(error, DataError):
        return UNFIT
    return _PATH.sub(lambda found: found[0] if found[0] in known else HIDDEN, str(error))
