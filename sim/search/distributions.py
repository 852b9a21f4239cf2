"""A key that a search may vary: a list of values, or a range of numbers, as the sampler sees it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atoll.errors import ConfigError
from atoll.sim.sweep.grid import as_value

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Choice:
    """A key and the values that it may have, as they were typed."""

    key: str
    texts: tuple[str, ...]

    @property
    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.texts)

    def sample(self, trial: Trial) -> str:
        """What the sampler suggests, as it would be typed."""
        return self.text(trial.suggest_categorical(self.key, self.texts))

    def text(self, param: Any) -> str:
        """What was drawn, as it would be typed."""
        return str(param)

    def param(self, text: str) -> Any:
        """What `text` is among what can be drawn; None where it isn't there."""
        return next((t for t in self.texts if as_value(t) == as_value(text)), None)

    def distance(self, text: str, other: str) -> float:
        """How far two values are from each other, from 0 to 1; numbers by their places in the list."""
        if text == other:
            return 0.0
        values = [as_value(t) for t in self.texts]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            return 1.0
        order = sorted(values)
        places = [order.index(as_value(t)) for t in (text, other)]
        return abs(places[0] - places[1]) / (len(order) - 1)

    @property
    def ends(self) -> tuple[str, ...]:
        """The values that must be valid for all to be."""
        return self.texts

    @property
    def as_option(self) -> str:
        return f"--vary {self.key}={','.join(self.texts)}"


@dataclass(frozen=True)
class Range:
    """A key and a range of numbers, ends included; uniform in their logarithm with `is_log`."""

    key: str
    low: float
    high: float
    is_log: bool
    is_whole: bool

    @classmethod
    def of(cls, text: str) -> Range:
        """From `key=low..high` or `key=low..high,log`.

        Raises:
            ConfigError: it has another form, or low isn't below high.
        """
        wanted = "expected key=low..high, or key=low..high,log, such as train.lr=0.001..1,log"
        key, equals, bounds = text.partition("=")
        span, comma, scale = bounds.partition(",")
        ends = [end.strip() for end in span.split("..")]
        is_log = scale.strip() == "log"
        if not equals or not key.strip() or len(ends) != 2 or (comma and not is_log):
            raise ConfigError(f"--range {text}: {wanted}")
        low, high = (_number(end, f"--range {text}: {wanted}") for end in ends)
        if not low < high or (is_log and low <= 0):
            raise ConfigError(
                f"--range {text}: expected low < high{', and low > 0 with log' if is_log else ''}"
            )
        is_whole = all(re.fullmatch(r"-?\d+", end) is not None for end in ends)
        return cls(key.strip(), low, high, is_log, is_whole)

    @property
    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.is_whole:
            return IntDistribution(int(self.low), int(self.high), log=self.is_log)
        return FloatDistribution(self.low, self.high, log=self.is_log)

    def sample(self, trial: Trial) -> str:
        """What the sampler suggests, as it would be typed."""
        if self.is_whole:
            return self.text(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.is_log))
        return self.text(trial.suggest_float(self.key, self.low, self.high, log=self.is_log))

    def text(self, param: Any) -> str:
        """What was drawn, to three digits: a learning rate has no more."""
        if self.is_whole:
            return str(int(param))
        return f"{min(max(float(f'{param:.3g}'), self.low), self.high):.12g}"

    def param(self, text: str) -> Any:
        """What `text` is among what can be drawn; None where it is outside."""
        value = as_value(text)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high:
            return None
        return int(value) if self.is_whole else float(value)

    def distance(self, text: str, other: str) -> float:
        """How far two values are from each other, from 0 to 1, on the range's own scale."""
        low, high, *values = (
            math.log(v) if self.is_log else v for v in (self.low, self.high, float(text), float(other))
        )
        return abs(values[0] - values[1]) / (high - low)

    @property
    def ends(self) -> tuple[str, ...]:
        return (self.text(self.low), self.text(self.high))

    @property
    def as_option(self) -> str:
        low, high = self.ends
        return f"--range {self.key}={low}..{high}{',log' if self.is_log else ''}"


def _number(text: str, complaint: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(complaint)
    return value
