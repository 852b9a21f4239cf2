"""The names of Flower's strategies, read from Flower's source, since importing it takes a second."""

from __future__ import annotations

import ast
from functools import cache

from atoll.errors import ConfigError, did_you_mean
from atoll.system.installed import folder_of

BASE = "FedAvg"
"""The base class of all strategies that a job can name; wrappers of strategies do not derive from it."""


@cache
def flower_names() -> tuple[str, ...]:
    """Names that can follow `flwr:` in a job; tree boosting and wrappers of strategies can't."""
    folder = folder_of("flwr") / "serverapp" / "strategy"
    trees = [ast.parse(path.read_text("utf-8")) for path in sorted(folder.glob("*.py"))]
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    offered = _offered(ast.parse((folder / "__init__.py").read_text("utf-8")))
    return tuple(name for name in sorted(offered) if _is_averaging(name, bases) and "Xgb" not in name)


def _offered(tree: ast.Module) -> list[str]:
    """The names that a module's `__all__` lists."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise ValueError("flwr.serverapp.strategy has no __all__, expected one in Flower's source")


def _is_averaging(name: str, bases: dict[str, set[str]]) -> bool:
    return name == BASE or any(_is_averaging(base, bases) for base in bases.get(name, ()))


def check_flower_name(name: str) -> None:
    """Raises ConfigError if Flower has no strategy of that name."""
    if name not in flower_names():
        raise ConfigError(
            f"strategy.name: Flower has no strategy {name!r}, {did_you_mean(name, flower_names())}"
        )
