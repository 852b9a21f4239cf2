"""The scattering backbone against the definition, pixel by pixel, and what follows from it exactly."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from atoll.backbones.extract import BATCH, extract
from atoll.backbones.resolve import known_width, resolve
from atoll.backbones.scattering.filters import morlet
from atoll.backbones.scattering.transform import Scattering, scattering_width
from atoll.backbones.vision import VisionEncoder, load_vision_encoder
from atoll.cli.listing import backbones
from atoll.errors import WeightsError
from atoll.job.job import BackboneSection, Job
from atoll.privacy.accounting import Release, epsilon, epsilon_rdp
from atoll.privacy.dp_plan import dp_plan_of
from tests.support.small import grey_png_shard

SECTION = BackboneSection(name="atoll:scattering", image_size=16)


def encoder(section: BackboneSection = SECTION) -> VisionEncoder:
    return load_vision_encoder(resolve(section, 1), section, 1)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


Complex = NDArray[np.complex128]
Plane = NDArray[np.float64]


def periodic(period: int, at_pixel: Callable[[int, int], complex]) -> Complex:
    """A function of a pixel's place, summed over the copies of a period that are near."""
    values = np.zeros((period, period), complex)
    for y in range(-2 * period, 3 * period):
        for x in range(-2 * period, 3 * period):
            values[y % period, x % period] += at_pixel(y, x)
    return values


def wavelet(period: int, scale: int, angle: int) -> Complex:
    """Mallat's Morlet wavelet as Bruna and Mallat 2013 have it, written out once more."""
    deviation, turned = 0.8 * 2**scale, (3 - angle) * math.pi / 8

    def envelope(y: int, x: int) -> tuple[float, float]:
        u = x * math.cos(turned) + y * math.sin(turned)
        v = y * math.cos(turned) - x * math.sin(turned)
        return u, math.exp(-(u * u + v * v / 4) / (2 * deviation**2)) / (4 * math.pi * deviation**2)

    def wave(y: int, x: int) -> complex:
        u, height = envelope(y, x)
        return height * cmath.exp(3j * math.pi / 4 / 2**scale * u)

    waves, heights = periodic(period, wave), periodic(period, lambda y, x: envelope(y, x)[1])
    found: Complex = waves - waves.sum() / heights.sum() * heights
    return found


def gauss(period: int) -> Complex:
    return periodic(period, lambda y, x: math.exp(-(y * y + x * x) / (2 * 1.6**2)) / (2 * math.pi * 1.6**2))


def convolved(picture: Plane, kernel: Complex, step: int = 1) -> Complex:
    """A periodic convolution, sum by sum, at every `step`-th pixel."""
    period = len(picture)
    places = range(0, period, step)
    found = np.zeros((len(places), len(places)), complex)
    for i, y in enumerate(places):
        for k, x in enumerate(places):
            rows, columns = (y - np.arange(period)) % period, (x - np.arange(period)) % period
            found[i, k] = (picture * kernel[np.ix_(rows, columns)]).sum()
    return found


def by_definition(picture: Plane) -> Plane:
    """The 81 channels of a small picture, without a Fourier transform."""
    padded = np.pad(picture, 4, mode="reflect")
    period, phi = len(padded), gauss(len(padded))
    psi = [[wavelet(period, scale, angle) for angle in range(8)] for scale in range(2)]

    def read(values: Plane) -> Plane:
        """Smoothed and read at every fourth pixel, of all pixels or every second."""
        step = period // len(values)
        smooth = convolved(values, phi[::step, ::step] * step**2).real
        apart = 4 // step
        return smooth[
            apart : apart * (1 + len(picture) // 4) : apart, apart : apart * (1 + len(picture) // 4) : apart
        ]

    fine = [np.abs(convolved(padded, kernel)) for kernel in psi[0]]
    coarse = [np.abs(convolved(padded, kernel, 2)) for kernel in psi[1]]
    both = [np.abs(convolved(first, kernel, 2)) for first in fine for kernel in psi[1]]
    return np.stack([read(values) for values in (padded, *fine, *coarse, *both)])


def test_channels_are_those_of_the_definition() -> None:
    picture = noise(8, 8)
    found = Scattering(8).channels(picture.unsqueeze(0))[0]
    assert found.shape == (81, 2, 2)
    np.testing.assert_allclose(found.numpy(), by_definition(picture.double().numpy()), atol=1e-6)


def test_features_are_the_channels_of_the_grey_picture_normalised_in_groups_of_three() -> None:
    colours = noise(2, 3, 16, 16)
    transform = Scattering(16)
    grey = 0.299 * colours[:, 0] + 0.587 * colours[:, 1] + 0.114 * colours[:, 2]
    groups = transform.channels(grey).double().numpy().reshape(2, 27, 3 * 16)
    spread = np.sqrt(groups.var(2, keepdims=True) + 1e-5)
    expected = ((groups - groups.mean(2, keepdims=True)) / spread).reshape(2, -1)
    np.testing.assert_allclose(transform(colours).numpy(), expected, atol=1e-4)
    assert transform.width == expected.shape[1] == scattering_width(16) == 81 * 16


def test_a_plain_picture_has_its_value_and_no_edges() -> None:
    plain = torch.full((1, 28, 28), 0.7)
    found = Scattering(28).channels(plain)[0]
    torch.testing.assert_close(found[0], torch.full((7, 7), 0.7))
    assert float(found[1:].abs().max()) < 1e-6
    features = Scattering(28)(plain.expand(1, 3, 28, 28))[0].view(81, 49)
    assert float(features[3:].abs().max()) < 1e-3


@pytest.mark.parametrize(("scale", "angle"), [(0, 0), (0, 3), (1, 5), (1, 7)])
def test_a_wavelet_sums_to_zero(scale: int, angle: int) -> None:
    assert abs(complex(morlet(16, scale, angle).sum())) < 1e-14


def test_a_picture_turned_over_its_diagonal_has_the_same_channels_at_mirrored_angles() -> None:
    """Number a becomes (2 - a) mod 8: its angle is taken off pi / 2, and half a turn is nothing."""
    picture, transform = noise(1, 20, 20), Scattering(20)
    mirrored = torch.tensor([(2 - angle) % 8 for angle in range(8)])
    order = [torch.zeros(1, dtype=torch.int64), 1 + mirrored, 9 + mirrored]
    order += [17 + 8 * first + mirrored for first in mirrored]
    expected = transform.channels(picture)[:, torch.cat(order)].mT
    torch.testing.assert_close(transform.channels(picture.mT), expected, atol=1e-6, rtol=0)


def test_neither_neighbours_nor_place_nor_workers_change_a_bit() -> None:
    images = list(grey_png_shard(2 * BATCH + 5, classes=3).inputs)
    whole = extract(encoder(), images, threads=1, device="cpu")
    assert whole.shape == (len(images), 81 * 4 * 4)
    for rows in ([0], [36, 3, 20], list(range(36, -1, -1)), list(range(5, 22))):
        part = extract(encoder(), [images[r] for r in rows], threads=1, device="cpu")
        assert torch.equal(part, whole[rows]), rows


def test_everything_moves_to_the_device_and_nothing_is_tuned() -> None:
    transform = Scattering(8).to("meta")
    assert transform(torch.zeros(2, 3, 8, 8, device="meta")).shape == (2, 81 * 4)
    assert not list(transform.parameters()) and not transform.state_dict()


def test_it_is_found_without_weights_and_listed() -> None:
    found = resolve(SECTION, 1)
    assert found.weights is None and found == resolve(SECTION, 2) and known_width(found) is None
    assert encoder(SECTION.model_copy(update={"image_size": None})).width == 3969
    (told,) = [(what, whose) for name, what, whose in backbones() if name == SECTION.name]
    assert "Bruna and Mallat 2013" in told[0] and told[1] == "atoll"


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        ({"image_size": 30}, "backbone.image_size: .* expected a multiple of 4, found 30"),
        ({"weights": "random"}, "backbone.weights: atoll:scattering has none.* found 'random'"),
        ({"name": "atoll:scatering"}, "there is no network.* did you mean 'atoll:scattering'"),
    ],
)
def test_what_it_does_not_take_is_answered_in_one_line(keys: dict[str, object], pattern: str) -> None:
    with pytest.raises(WeightsError, match=pattern) as caught:
        encoder(SECTION.model_copy(update=keys))
    assert "\n" not in str(caught.value)


def test_the_job_on_fashion_mnist_is_the_central_algorithm_within_its_epsilon() -> None:
    """One noised sum a round over all examples, each in it at the rate that the accountant is told."""
    job = Job.load(Path("jobs/fashion-private.toml"))
    dp_plan = dp_plan_of(job, "example")
    assert dp_plan is not None and job.backbone.name == SECTION.name and not job.privacy.seeded_noise
    assert (dp_plan.where, dp_plan.per_round, job.federation.secure_threshold) == ("distributed", 1, 1.0)
    assert dp_plan.divisor == pytest.approx(60_000 * dp_plan.event.sampling_rate, rel=1e-3)
    assert 2.99 < epsilon({dp_plan.event: job.federation.rounds}, 1e-5) <= 3.0
    # What Tramèr and Boneh 2021 publish for 50 passes over 60,000 examples: epsilon 3 by RDP.
    published = {Release(4.05, 8192 / 60_000): 366}
    assert epsilon_rdp(published, 1e-5) == pytest.approx(3.0, abs=0.01)
