"""Which models torchvision has, and which weights it publishes, read from its source.

Importing torchvision takes as long as importing torch, and most runs use it for nothing but a name: of a
backbone whose features are kept, or of one that somebody mistyped.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from atoll.system.installed import folder_of

TorchvisionKind = Literal["classification", "segmentation", "detection"]

_FOLDERS: dict[TorchvisionKind, str] = {
    "classification": "", "segmentation": "segmentation", "detection": "detection",
}  # fmt: skip
_OTHERS = ("maskrcnn", "keypointrcnn")
"""Masks and key points of objects are other tasks."""
_REGISTRATION = re.compile(
    r'^@register_model\((?:name="(?P<given>\w+)")?\)$.*?^def (?P<builder>\w+)', re.DOTALL | re.MULTILINE
)

_NORMALISED_OTHERWISE = re.compile(r"alexnet|squeezenet|vgg\d+$|vit_|swin_|convnext_")


@dataclass(frozen=True)
class Published:
    """The addresses of a model's weights by their names, the default one's first."""

    default: str
    urls: dict[str, str]

    @property
    def by_preference(self) -> list[str]:
        """Every address, the default one first."""
        return [self.default, *self.urls.values()]


def torchvision_names(kind: TorchvisionKind = "classification") -> list[str]:
    """Names of torchvision's models of that kind."""
    return [name for name in sorted(_files(kind)) if not name.startswith(_OTHERS)]


def has_batch_norm(name: str) -> bool:
    """Whether one of torchvision's classification models has batch norms."""
    return name in torchvision_names() and _NORMALISED_OTHERWISE.match(name) is None


@cache
def published_weights(name: str) -> Published:
    """What torchvision publishes for one of its models.

    Raises:
        LookupError: there is no such model.
    """
    file = next((_files(kind)[name] for kind in _FOLDERS if name in _files(kind)), None)
    if file is None:
        raise LookupError(f"torchvision has no model {name!r}")
    tree = ast.parse(file.read_text("utf-8"))
    builder = next(node for node in tree.body if _registered_as(node) == name)
    assert isinstance(builder, ast.FunctionDef)
    return _published(tree, builder)


@cache
def _files(kind: TorchvisionKind) -> dict[str, Path]:
    """The files that register models, by the models' names.

    Found by words: to parse all of them takes half a second, to parse the one that is asked for nothing.
    """
    folder = folder_of("torchvision") / "models" / _FOLDERS[kind]
    return {
        registration["given"] or registration["builder"]: file
        for file in sorted(folder.glob("*.py"))
        for registration in _REGISTRATION.finditer(file.read_text("utf-8"))
    }


def _registered_as(node: ast.stmt) -> str | None:
    """The model that a function makes: what the decorator says, or else the function's own name."""
    if not isinstance(node, ast.FunctionDef):
        return None
    calls = [one for one in node.decorator_list if isinstance(one, ast.Call)]
    registration = next((one for one in calls if ast.unparse(one.func) == "register_model"), None)
    if registration is None:
        return None
    names = [keyword.value for keyword in registration.keywords if keyword.arg == "name"]
    return str(ast.literal_eval(names[0])) if names else node.name


def _published(tree: ast.Module, builder: ast.FunctionDef) -> Published:
    """The entries of the class that the argument `weights` is of: `Optional[AlexNet_Weights]`."""
    arguments = [*builder.args.args, *builder.args.kwonlyargs]
    kind = next(a.annotation for a in arguments if a.arg == "weights")
    assert isinstance(kind, ast.Subscript)
    of = ast.unparse(kind.slice)
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == of)
    urls: dict[str, str] = {}
    default = ""
    for line in body:
        if not isinstance(line, ast.Assign):
            continue
        name = ast.unparse(line.targets[0])
        if isinstance(line.value, ast.Call):
            urls[name] = _url(line.value)
        elif name == "DEFAULT":
            default = urls[ast.unparse(line.value)]
    return Published(default, urls)


def _url(weights: ast.Call) -> str:
    address = next(keyword.value for keyword in weights.keywords if keyword.arg == "url")
    return str(ast.literal_eval(address))
