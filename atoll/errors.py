"""The one tree of errors that a user can cause or meet."""


class JobError(Exception):
    """A run cannot go on; its message is the one line the user reads."""

    exit_code = 1


class InputError(JobError):
    """What the user gave is wrong: nothing was run."""

    exit_code = 2


class ConfigError(InputError):
    """A job, a kit or a command-line value is wrong; the message names the key."""


class DataError(InputError):
    """A shard or a source is wrong; the message names the file or column."""


class DataChanged(DataError):
    """A shard is no longer what it was when the run began."""


class WeightsError(InputError):
    """A backbone's weights are missing or damaged; the message says where they were looked for."""


class BudgetExhausted(JobError):
    """The next release would spend more privacy than was allowed."""


class InconsistentUpdates(JobError):
    """Too few usable updates arrived to close a round."""
