"""Which models torchvision has, and which weights it publishes, read from its source.

Importing torchvision takes as long as importing torch, and most runs use it for nothing but a name: of a
backbone whose features are kept, or of one that somebody mistyped.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from atoll.system.installed import folder_of, parsed

TorchvisionKind = Literal["classification", "segmentation", "detection"]

_FOLDERS: dict[TorchvisionKind, str] = {
    "classification": "", "segmentation": "segmentation", "detection": "detection",
}  # fmt: skip
_OTHERS = ("maskrcnn", "keypointrcnn")
"""Masks and key points of objects are other tasks."""
_REGISTERED = "@register_model"


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
    return [name for name in sorted(_models(kind)) if not name.startswith(_OTHERS)]


def published_weights(name: str) -> Published:
    """What torchvision publishes for one of its models.

    Raises:
        LookupError: there is no such model.
    """
    for kind in _FOLDERS:
        if name in _models(kind):
            return _models(kind)[name]
    raise LookupError(f"torchvision has no model {name!r}")


@cache
def _models(kind: TorchvisionKind) -> dict[str, Published]:
    folder = folder_of("torchvision") / "models" / _FOLDERS[kind]
    return {
        _name_of(builder): _published(tree, builder)
        for tree in parsed(folder, _REGISTERED)
        for builder in _builders(tree)
    }


def _builders(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """The functions that torchvision makes its models with."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and _registration(node) is not None:
            yield node


def _registration(builder: ast.FunctionDef) -> ast.Call | None:
    calls = [one for one in builder.decorator_list if isinstance(one, ast.Call)]
    return next((one for one in calls if ast.unparse(one.func) == "register_model"), None)


def _name_of(builder: ast.FunctionDef) -> str:
    """What it is registered as: what the decorator says, or else the function's own name."""
    registration = _registration(builder)
    assert registration is not None
    given = [keyword.value for keyword in registration.keywords if keyword.arg == "name"]
    return str(ast.literal_eval(given[0])) if given else builder.name


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
    given = next(keyword.value for keyword in weights.keywords if keyword.arg == "url")
    return str(ast.literal_eval(given))
