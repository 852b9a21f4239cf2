"""Compresses updates: to half precision, to 8, 4 or 1 bits a number, or to the largest numbers.

An update is one vector: its tensors concatenated in the order of their names. With `int8`
and `int4` every block of 256 numbers shares a scale, its largest magnitude over the highest level
(block-wise quantisation, Dettmers et al. 2022). A client with error feedback adds what the last
messages lost to the next update before it is compressed (Seide et al. 2014). That converges at the
rate of uncompressed updates for every C with |C(x) - x|² <= (1 - d) |x|² for some d > 0
(Karimireddy et al. 2019), as rounding to the nearest level and keeping the largest numbers are;
stochastic rounding is not. Without feedback, numbers are rounded up or down at random, so that the
message is unbiased (Alistarh et al. 2017, QSGD).

`sign` sends the sign of every number in a bit, and for each tensor x of d numbers one scale, |x|_1 / d. What
arrives is C(x) = |x|_1 / d sign(x), with |C(x) - x|² = |x|² - |x|_1² / d: the d above is |x|_1² / (d |x|²)
(EF-signSGD, Karimireddy et al. 2019, algorithm 1). Zero has the bit of the positive numbers;
without feedback a coin decides, so that zeros of several clients don't add up.

Every function works on vectors of several clients, [clients, numbers], and gives each client the bits
that it would get alone. Sizes depend on the job and on the model, never on values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch

from atoll.job.federation import Scheme
from atoll.job.job import Job
from atoll.protocol.tensors import Tensors, size_of

BLOCK = 256
"""How many numbers share a scale."""
LEVELS = {"int8": 127, "int4": 7}
"""The highest level of each scheme; the lowest is its negative."""
DRAWN = (*LEVELS, "sign")
"""Schemes that draw a number for each number that they send, where errors are not fed back."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A block with a smaller scale is sent as zeros; the error is below 2e-36."""


@dataclass(frozen=True)
class Compression:
    """The compression of vectors of `numbers` numbers; `top-k` sends the part `share` of them.

    `sizes` are the numbers of each tensor in the order of names; empty for vectors that are a single tensor.
    """

    scheme: Scheme
    numbers: int
    share: float = 0.01
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, job: Job, model: Tensors) -> Compression | None:
        """The job's compression; None where updates are not compressed."""
        federation = job.federation
        if federation.compression is None:
            return None
        sizes = tuple(model[name].numel() for name in sorted(model))
        return cls(federation.compression, numbers_of(model), federation.compression_top_k, sizes)

    @property
    def num_sent(self) -> int:
        """How many numbers `top-k` sends: at least one, where there are any."""
        return min(self.numbers, max(1, ceil(self.share * self.numbers - 1e-9)))

    @property
    def parts(self) -> Sequence[int]:
        """How many numbers share a scale of `sign`, one tensor after the other."""
        return self.sizes or (self.numbers,)

    @property
    def form(self) -> dict[str, tuple[int, torch.dtype]]:
        """(how many numbers, dtype) of each tensor in a message, by name."""
        blocks = ceil(self.numbers / BLOCK)
        match self.scheme:
            case "fp16":
                return {"values": (self.numbers, torch.float16)}
            case "int8":
                return {"scales": (blocks, torch.float32), "values": (self.numbers, torch.int8)}
            case "int4":
                return {"scales": (blocks, torch.float32), "values": (ceil(self.numbers / 2), torch.uint8)}
            case "top-k":
                places = torch.int32 if self.numbers < 2**31 else torch.int64
                return {"indices": (self.num_sent, places), "values": (self.num_sent, torch.float32)}
            case "sign":
                bits = (ceil(self.numbers / 8), torch.uint8)
                return {"scales": (len(self.parts), torch.float32), "values": bits}

    @property
    def bytes(self) -> int:
        """The size in bytes of one client's message, without headers."""
        return sum(count * dtype.itemsize for count, dtype in self.form.values())


def numbers_of(model: Tensors) -> int:
    """How many numbers the model's vector has."""
    return sum(tensor.numel() for tensor in model.values())


def upload_size(job: Job, model: Tensors) -> int:
    """The size in bytes of one client's update, compressed if the job says so, without headers."""
    compression = Compression.of(job, model)
    return size_of(model) if compression is None else compression.bytes


def flat(stack: Tensors) -> torch.Tensor:
    """Tensors [clients, …] as vectors in float32, [clients, numbers]."""
    parts = [stack[name].flatten(1).to(torch.float32) for name in sorted(stack)]
    return torch.cat(parts, dim=1)


def apart(vectors: torch.Tensor, model: Tensors) -> Tensors:
    """Vectors [clients, numbers] as the model's tensors, [clients, …] each."""
    names = sorted(model)
    parts = torch.split(vectors, [model[name].numel() for name in names], dim=1)
    stacks = {
        name: part.reshape(len(vectors), *model[name].shape).to(model[name].dtype)
        for name, part in zip(names, parts, strict=True)
    }
    return {name: stacks[name] for name in model}


def compress(vectors: torch.Tensor, how: Compression, uniform: torch.Tensor | None = None) -> Tensors:
    """Vectors [clients, numbers] as compressed messages: the tensors of `how.form`, each [clients, …].

    With `uniform`, numbers in [0, 1) in float64 of the same shape, levels are rounded stochastically, and
    zeros get a sign. A vector with a number that isn't finite becomes a message that `unsound` detects.
    """
    sound = torch.isfinite(vectors).all(dim=1, keepdim=True)
    finite = torch.where(sound, vectors, torch.zeros((), dtype=vectors.dtype))
    packed = _packed(finite, how, uniform)
    marked = "values" if how.scheme in ("fp16", "top-k") else "scales"
    packed[marked] = packed[marked].masked_fill(~sound, torch.nan)
    return packed


def _packed(vectors: torch.Tensor, how: Compression, uniform: torch.Tensor | None) -> Tensors:
    match how.scheme:
        case "fp16":
            most = torch.finfo(torch.float16).max
            return {"values": vectors.clamp(-most, most).to(torch.float16)}
        case "top-k":
            places = largest(vectors, how.num_sent)
            values = vectors.gather(1, places)
            return {"indices": places.to(how.form["indices"][1]), "values": values}
        case "int8" | "int4":
            levels, scales = quantised(vectors, LEVELS[how.scheme], uniform)
            return {"scales": scales, "values": levels if how.scheme == "int8" else in_nibbles(levels)}
        case "sign":
            up = vectors >= 0 if uniform is None else (vectors > 0) | ((vectors == 0) & (uniform < 0.5))
            return {"scales": mean_sizes(vectors, how.parts), "values": in_bits(up)}


def decompress(packed: Tensors, how: Compression) -> torch.Tensor:
    """The vectors [clients, numbers] of messages of the right form; an unsound message becomes NaN."""
    values = packed["values"]
    match how.scheme:
        case "fp16":
            vectors = values.to(torch.float32)
        case "top-k":
            places = packed["indices"].to(torch.int64).clamp(0, max(how.numbers - 1, 0))
            vectors = torch.zeros((len(values), how.numbers)).scatter_(1, places, values)
        case "int8":
            vectors = dequantised(values, packed["scales"])
        case "int4":
            vectors = dequantised(of_nibbles(values, how.numbers), packed["scales"])
        case "sign":
            counts = torch.tensor(how.parts)
            sizes = packed["scales"].repeat_interleave(counts, dim=1, output_size=how.numbers)
            vectors = torch.where(of_bits(values, how.numbers), sizes, -sizes)
    for mask in unsound(packed, how).values():
        vectors = vectors.masked_fill(mask.unsqueeze(1), torch.nan)
    return vectors


def unsound(packed: Tensors, how: Compression) -> dict[str, torch.Tensor]:
    """Faults of the values in messages of the right form, each with the clients that have it, [clients]."""
    values = packed["values"]
    faults: dict[str, torch.Tensor] = {}
    if "scales" in packed:
        scales = packed["scales"]
        bad = ~(torch.isfinite(scales) & (scales >= 0))
        faults["scales are not all finite and at least 0"] = bad.any(dim=1)
    match how.scheme:
        case "fp16":
            faults["values are not all finite"] = ~torch.isfinite(values).all(dim=1)
        case "int8":
            faults["values are not all from -127 to 127"] = (values == -128).any(dim=1)
        case "int4":
            low, high = values & 15, values >> 4
            outside = (low == 0).any(dim=1) | (high == 0).any(dim=1)
            if how.numbers % 2:
                outside |= high[:, -1] != ZERO
            faults["values are not all from -7 to 7"] = outside
        case "top-k":
            places = packed["indices"].to(torch.int64)
            outside = ((places < 0) | (places >= how.numbers)).any(dim=1)
            faults[f"indices are not all from 0 to {how.numbers - 1}"] = outside
            faults["indices do not rise"] = (places[:, 1:] <= places[:, :-1]).any(dim=1)
            faults["values are not all finite"] = ~torch.isfinite(values).all(dim=1)
        case "sign":
            if how.numbers % 8:
                beyond = values[:, -1] >> (how.numbers % 8)
                faults[f"values have more than {how.numbers} bits"] = beyond != 0
    return faults


def misshapen(packed: Mapping[str, torch.Tensor], how: Compression) -> str | None:
    """What is wrong with the names, shapes or dtypes of one client's message; None if nothing is."""
    if set(packed) != set(how.form):
        odd = sorted(set(packed) ^ set(how.form))[0]
        return f"tensor {odd} is {'unexpected' if odd in packed else 'missing'}"
    for name, (count, dtype) in how.form.items():
        tensor = packed[name]
        if tuple(tensor.shape) != (count,):
            return f"{name} have shape {tuple(tensor.shape)}, expected {(count,)}"
        if tensor.dtype != dtype:
            return f"{name} are {tensor.dtype}, expected {dtype}"
    return None


def largest(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """The places of each vector's `count` largest magnitudes in rising order, [clients, count].

    Of equal magnitudes the first ones are taken, while `torch.topk` takes any.
    """
    size = vectors.abs()
    least = size.topk(count, dim=1).values[:, -1:]
    above, equal = size > least, size == least
    open_places = count - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= open_places))
    return chosen.nonzero()[:, 1].reshape(len(vectors), count)


def quantised(
    vectors: torch.Tensor, highest: int, uniform: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(levels from -highest to highest, int8 [clients, numbers]; scales [clients, blocks]).

    Rounded to nearest, a number differs from its level times the scale by at most half a scale. With
    stochastic rounding it differs by less than one scale, and by nothing on average.
    """
    clients, numbers = vectors.shape
    blocks = _in_blocks(vectors)
    scales = blocks.abs().amax(dim=2) / torch.tensor(float(highest))
    scales = torch.where(scales < SMALLEST_SCALE, torch.zeros(()), scales)
    steps = torch.where(scales > 0, scales, torch.inf).unsqueeze(2)
    if uniform is None:
        levels = (blocks / steps).round_()
    else:
        levels = (blocks.to(torch.float64) / steps).add_(_in_blocks(uniform)).floor_()
    levels = levels.clamp_(-highest, highest).to(torch.int8)
    return levels.reshape(clients, -1)[:, :numbers].contiguous(), scales


def dequantised(levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Levels times their block's scale, [clients, numbers]."""
    values = _in_blocks(levels.to(torch.float32)) * scales.unsqueeze(2)
    return values.reshape(len(levels), -1)[:, : levels.shape[1]]


def _in_blocks(vectors: torch.Tensor) -> torch.Tensor:
    """The vectors as [clients, blocks, BLOCK]; the last block is padded with zeros."""
    clients, numbers = vectors.shape
    missing = -numbers % BLOCK
    return torch.nn.functional.pad(vectors, (0, missing)).reshape(clients, -1, BLOCK)


ZERO = 8
"""The nibble of level 0: nibbles are levels plus 8."""


def in_nibbles(levels: torch.Tensor) -> torch.Tensor:
    """Levels from -7 to 7 packed in pairs, the first in a byte's lower half, [clients, half as many]."""
    padded = torch.nn.functional.pad(levels, (0, levels.shape[1] % 2))
    nibbles = (padded + ZERO).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def of_nibbles(packed: torch.Tensor, numbers: int) -> torch.Tensor:
    """The levels that `in_nibbles` packed, int8 [clients, numbers]."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=2).reshape(len(packed), -1)
    return nibbles[:, :numbers].to(torch.int8) - ZERO


COLUMNS = 1 << 16
"""How many numbers of each vector are added up at a time."""


def mean_sizes(vectors: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
    """The mean magnitude of each part of the vectors, [clients, parts] in float32.

    Sums are in float64, by halves: single additions, whose bits depend on no other client and no thread.
    """
    means = torch.zeros((len(vectors), len(parts)), dtype=torch.float64)
    for place, part in enumerate(torch.split(vectors, list(parts), dim=1)):
        for block in torch.split(part, COLUMNS, dim=1):
            means[:, place] += _sums(block)
    return means.div_(torch.tensor(parts).clamp(min=1)).to(torch.float32)


def _sums(block: torch.Tensor) -> torch.Tensor:
    """The sum of each row's magnitudes, [clients] in float64."""
    sizes = block.abs().to(torch.float64)
    while sizes.shape[1] > 1:
        half = (sizes.shape[1] + 1) // 2
        folded = sizes[:, :half].clone()
        folded[:, : sizes.shape[1] - half] += sizes[:, half:]
        sizes = folded
    return sizes.sum(dim=1)


def in_bits(flags: torch.Tensor) -> torch.Tensor:
    """Flags packed in eights, the first in a byte's lowest bit, uint8 [clients, an eighth as many]."""
    return torch.from_numpy(np.packbits(flags.numpy(), axis=1, bitorder="little"))


def of_bits(packed: torch.Tensor, numbers: int) -> torch.Tensor:
    """The flags that `in_bits` packed, bool [clients, numbers]."""
    bits = np.unpackbits(packed.contiguous().numpy(), axis=1, count=numbers, bitorder="little")
    return torch.from_numpy(bits).to(torch.bool)
