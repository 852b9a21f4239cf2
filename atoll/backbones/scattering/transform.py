"""`atoll:scattering`: a picture's edges at two scales and eight angles, by fixed filters that nobody trained.

The scattering transform (Bruna and Mallat 2013, "Invariant Scattering Convolution Networks") with J = 2
scales, L = 8 angles and order 2. A picture x is convolved with wavelets, at most twice, of which only the
modulus is kept; then it is smoothed and read at every fourth pixel:

    order 0    x * phi                                  1 channel
    order 1    |x * psi_j,a| * phi                      J L = 16 channels, scale by scale
    order 2    ||x * psi_0,a| * psi_1,b| * phi          L^2 = 64 channels, b runs fastest

Filters are those of kymatio (Andreux et al. 2020, "Kymatio: Scattering Transforms in Python"), in closed
form: psi_j,a is a Morlet wavelet and phi a Gaussian, both made periodic. What was convolved with psi_1 is
kept at every second pixel, as there: the Fourier transform is folded, so that the smaller one that follows
gives just these pixels.

Channels are normalised in 27 groups of three, each over its numbers in one picture (Wu and He 2018, without
parameters), as Tramèr and Boneh 2021, "Differentially Private Learning Needs Better Features (Or Much More
Data)", do for Fashion-MNIST. Nothing here was learnt from data, so a promise of privacy costs nothing for it.
"""

from __future__ import annotations

import torch
from torch import nn

from atoll.backbones.resolve import SCATTERING
from atoll.backbones.scattering.filters import ANGLES, SCALES, STRIDE, morlet, smoothing
from atoll.errors import WeightsError

CHANNELS = 1 + SCALES * ANGLES + ANGLES**2 * SCALES * (SCALES - 1) // 2
GROUPS = CHANNELS // 3

RED_GREEN_BLUE = (0.299, 0.587, 0.114)
"""What each colour is of a grey value (ITU-R BT.601)."""


def scattering_width(side: int) -> int:
    """How many features a picture of so many pixels a side has.

    Raises:
        WeightsError: the side is no multiple of four.
    """
    if side % STRIDE:
        raise WeightsError(
            f"backbone.image_size: atoll:{SCATTERING} reads every fourth pixel; expected a multiple of"
            f" {STRIDE}, found {side}"
        )
    width: int = CHANNELS * (side // STRIDE) ** 2
    return width


class Scattering(nn.Module):
    """Pictures of one size, [batch, 3, s, s] with values from 0 to 1, to features [batch, 81 (s / 4)^2].

    Colours become grey first. Filters are computed in float64, kept in float32 and are no parameters.

    >>> import torch
    >>> Scattering(28)(torch.zeros(2, 3, 28, 28)).shape
    torch.Size([2, 3969])
    """

    grey: torch.Tensor
    fine: torch.Tensor
    coarse: torch.Tensor
    smooth: torch.Tensor
    smooth_half: torch.Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.width = side, scattering_width(side)
        period = side + 2 * STRIDE
        fine, coarse = (
            torch.stack([torch.fft.fft2(morlet(period, scale, angle)).real for angle in range(ANGLES)])
            for scale in range(SCALES)
        )
        for name, values in (
            ("grey", torch.tensor(RED_GREEN_BLUE, dtype=torch.float64).view(3, 1, 1)),
            ("fine", fine),
            ("coarse", _folded(coarse) / 4),
            ("smooth", smoothing(side, 1)),
            ("smooth_half", smoothing(side, 2)),
        ):
            self.register_buffer(name, values.to(torch.float32).contiguous(), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[batch, 3, s, s] to [batch, 81 (s / 4)^2], in the order of channels, rows, columns."""
        channels = self.channels((pixels * self.grey).sum(1))
        return nn.functional.group_norm(channels, GROUPS).flatten(1)

    def channels(self, grey: torch.Tensor) -> torch.Tensor:
        """The transform before it is normalised: [batch, s, s] to [batch, 81, s / 4, s / 4]."""
        padded = nn.functional.pad(grey.unsqueeze(1), (STRIDE,) * 4, mode="reflect")
        spectrum = torch.fft.fft2(padded)
        first = torch.fft.ifft2(spectrum * self.fine).abs()
        # Of the picture and of each channel of the finest scale, which the coarser wavelets take.
        folded = _folded(torch.cat([spectrum, torch.fft.fft2(first)], 1))
        second = torch.fft.ifft2(_summed(folded, self.coarse)).abs()
        return torch.cat(
            [
                self.smooth @ torch.cat([padded, first], 1) @ self.smooth.T,
                (self.smooth_half @ second @ self.smooth_half.T).flatten(1, 2),
            ],
            1,
        )


def _folded(spectrum: torch.Tensor) -> torch.Tensor:
    """Fourier transforms [..., n, n] in the four quarters that fall together at every second pixel.

    [4, ..., n / 2, n / 2]: their sum over 4 is the transform of these pixels.
    """
    half = spectrum.shape[-1] // 2
    quarters = spectrum.reshape(*spectrum.shape[:-2], 2, half, 2, half)
    return quarters.movedim((-4, -2), (0, 1)).flatten(0, 1)


def _summed(folded: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Quarters [4, batch, c, h, h] times those of filters [4, angles, h, h], summed over the quarters.

    [batch, c, angles, h, h]
    """
    total = folded[0].unsqueeze(2) * filters[0]
    for quarter, of_filters in zip(folded[1:], filters[1:], strict=True):
        total = total + quarter.unsqueeze(2) * of_filters
    return total
