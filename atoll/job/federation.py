"""`[federation]`: who takes part in a round, and how what they send travels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from atoll.job.section import Count, Positive, Rate, Section

Scheme = Literal["fp16", "int8", "int4", "top-k"]
"""How an update is compressed."""


class FederationSection(Section):
    """`[federation]`: who takes part in a round, and how what they send travels."""

    clients: Count = 20
    cohort: Count | None = None
    cohort_rate: Rate | None = None
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    quorum: Rate = 0.5
    round_timeout: Positive = 3600.0
    wait: Positive = 600.0
    devices: str | None = None
    deadline: Positive | None = None
    over_sampling: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] = 1.0
    secure_aggregation: bool = False
    secure_threshold: Rate | None = None
    compression: Scheme | None = None
    compression_top_k: Rate = 0.01
    error_feedback: bool = True

    @model_validator(mode="after")
    def _compression_has_what_it_uses(self) -> FederationSection:
        share = type(self).model_fields["compression_top_k"].default
        if self.compression_top_k != share and self.compression != "top-k":
            raise ValueError("compression_top_k has no meaning without compression = 'top-k': remove it")
        if not self.error_feedback and self.compression is None:
            raise ValueError("error_feedback has no meaning without compression: remove it")
        return self

    @model_validator(mode="after")
    def _time_is_simulated_with_devices(self) -> FederationSection:
        for key, given in (
            ("deadline", self.deadline is not None),
            ("over_sampling", self.over_sampling > 1),
        ):
            if given and self.devices is None:
                raise ValueError(f"{key} is in simulated time: it needs devices, a profile of the clients'")
        if self.over_sampling > 1 and self.cohort is None:
            raise ValueError("over_sampling goes with cohort, the number of updates that a round waits for")
        return self

    @model_validator(mode="after")
    def _cohort_fits(self) -> FederationSection:
        if self.cohort is not None and self.cohort_rate is not None:
            raise ValueError("cohort and cohort_rate exclude each other: keep one")
        if self.cohort is not None and self.cohort > self.clients:
            raise ValueError(f"cohort must be at most clients = {self.clients}, found {self.cohort}")
        return self
