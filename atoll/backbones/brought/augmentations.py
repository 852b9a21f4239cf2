"""Augmentations that extensions bring: how they are applied, and what is seen of them before a run begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from atoll.errors import ConfigError
from atoll.plugins import Extension, failure_of, in_one_line
from atoll.protocol.random_streams import stream

TRIES = 8
"""Generators with which an augmentation is tried before a run."""
TRIED_SAMPLES = 4_000
"""A quarter of a second."""


def augmented_image(
    image: Image.Image, augmentations: Sequence[Extension], draw: torch.Generator
) -> Image.Image:
    """An RGB image after each of the augmentations, in this order; of the same size.

    Raises:
        ConfigError: one raises an error, or returns something else.
    """
    for extension in augmentations:
        image_out, size = _applied(extension, image, draw), image.size
        if not isinstance(image_out, Image.Image):
            raise _wrong(extension, "a PIL image", type(image_out).__name__)
        if (image_out.mode, image_out.size) != ("RGB", size):
            mode_and_size = f"{image_out.mode}, {image_out.width} x {image_out.height}"
            raise _wrong(extension, f"an image as it was given, RGB, {size[0]} x {size[1]}", mode_and_size)
        image = image_out
    return image


def augmented_text(text: str, augmentations: Sequence[Extension], draw: torch.Generator) -> str:
    """A text after each of the augmentations, in this order.

    Raises:
        ConfigError: one raises an error, or returns something else.
    """
    for extension in augmentations:
        changed = _applied(extension, text, draw)
        if not isinstance(changed, str) or not changed.strip():
            raise _wrong(extension, "a text that isn't empty", repr(changed)[:40])
        text = changed
    return text


def augmented_sound(
    samples: torch.Tensor, augmentations: Sequence[Extension], draw: torch.Generator
) -> torch.Tensor:
    """A sound's samples, float32 [n], after each of the augmentations, in this order.

    Raises:
        ConfigError: one raises an error, or returns something else.
    """
    for extension in augmentations:
        changed = _applied(extension, samples.clone(), draw)
        if not isinstance(changed, torch.Tensor) or changed.dtype != torch.float32:
            kind = getattr(changed, "dtype", type(changed).__name__)
            raise _wrong(extension, "a float32 tensor", str(kind))
        if changed.shape != samples.shape:
            raise _wrong(
                extension, f"samples as many as it was given, {list(samples.shape)}", f"{list(changed.shape)}"
            )
        if not torch.isfinite(changed).all():
            raise _wrong(extension, "samples that are finite", "others")
        samples = changed
    return samples


def check_draws(extension: Extension) -> None:
    """See whether an augmentation returns the same whenever it is given the same example and generator.

    So it draws from nothing else, and remembers no example when it varies another: what example-level privacy
    and equal runs rest on. It is tried on made-up inputs, forwards and backwards.

    Raises:
        ConfigError: it doesn't, raises an error, or returns something else.
    """
    numbers = range(TRIES)
    forwards = {number: _tried(extension, number) for number in numbers}
    backwards = {number: _tried(extension, number) for number in reversed(numbers)}
    if forwards != backwards:
        raise _wrong(
            extension,
            "the same result for the same example and generator, whatever came before",
            "others the second time: it draws from something else, or remembers",
        )


def _tried(extension: Extension, number: int) -> bytes:
    draw = stream(number, "probe", extension.name)
    if extension.of == "texts":
        return augmented_text(f"text {number} of {TRIES}, made up to try this", [extension], draw).encode()
    if extension.of == "sounds":
        made_up = torch.rand(TRIED_SAMPLES, generator=stream(number, "probe")) - 0.5
        return augmented_sound(made_up, [extension], draw).numpy().tobytes()
    noise = torch.randint(256, (32, 32, 3), generator=stream(number, "probe"), dtype=torch.uint8)
    return augmented_image(Image.fromarray(noise.numpy()), [extension], draw).tobytes()


def _applied(extension: Extension, example: Any, draw: torch.Generator) -> Any:
    results: list[Any] = []
    failure = failure_of(lambda: results.append(extension.thing(example, draw)))  # type: ignore[misc]
    if failure is not None:
        raise ConfigError(f"{_called(extension)} raised {in_one_line(failure)}") from failure
    return results[0]


def _wrong(extension: Extension, expected: str, actual: str) -> ConfigError:
    return ConfigError(f"{_called(extension)}: expected {expected}, found {actual}")


def _called(extension: Extension) -> str:
    return f"train.augment: {extension.name} ({extension.origin})"
