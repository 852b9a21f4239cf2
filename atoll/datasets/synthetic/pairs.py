"""`generated-pairs`: sentences, and what they are in a made-up language with an order of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from atoll.datasets.synthetic.drawing import cut
from atoll.protocol.random_streams import stream_seed

_PEOPLE = {"Anna": "An", "Ben": "Be", "Carla": "Ca", "David": "Da", "Emma": "Em", "Felix": "Fe"}
_VERBS = {"has": "su", "wants": "mo", "takes": "ri", "makes": "po", "sees": "vi", "hears": "lu"}
_COLOURS = {"red": "ro", "blue": "bu", "green": "ge", "black": "ne", "white": "bi", "grey": "gi"}
_THINGS = {
    "book": "li", "car": "ko", "door": "pu", "hat": "ka", "boat": "na", "lamp": "te", "box": "fo",
    "cup": "ta", "key": "ke", "ball": "pa",
}  # fmt: skip
_PLACES = {"garden": "za", "kitchen": "wo", "library": "xi", "station": "yu", "office": "ho", "market": "qe"}
_MANY, _NOT, _HERE = "n", "ba", "e"
_OFFICES = 6
# Below 1: each office of translators has mostly a few of the places.
_TASTE = 0.5


def generated_pairs(seed: int = 0, count: int = 4000) -> dict[str, pa.Table]:
    """Different sentences: columns source (English), target (made up) and office (of 6 translators' offices).

    In the target the verb stands last and a colour behind its thing; many are one with an `n` behind it; `ba`
    denies. So a word's place and form depend on other words.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-pairs"))
    tastes = rng.dirichlet(np.full(len(_PLACES), _TASTE), _OFFICES)

    def draw(office: int) -> tuple[str, str]:
        return _pair(rng, str(rng.choice(list(_PLACES), p=tastes[office])))

    return pairs_by_site("office", _OFFICES, count, rng, draw)


def pairs_by_site(
    site: str, sites: int, count: int, rng: np.random.Generator, draw: Callable[[int], tuple[str, str]]
) -> dict[str, pa.Table]:
    """`count` different sources with targets: columns source, target, and one called as `site`.

    A site is drawn for each, and `draw` makes its (source, target) from the site's number.
    """
    pairs: dict[str, tuple[str, str]] = {}
    while len(pairs) < count:
        number = int(rng.integers(sites))
        source, target = draw(number)
        pairs.setdefault(source, (target, f"{site}-{number}"))
    columns = {
        "source": list(pairs),
        "target": [target for target, _ in pairs.values()],
        site: [name for _, name in pairs.values()],
    }
    return cut(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}))


def _pair(rng: np.random.Generator, place: str) -> tuple[str, str]:
    """A sentence in both languages."""
    person, verb, colour, thing = (
        str(rng.choice(list(words))) for words in (_PEOPLE, _VERBS, _COLOURS, _THINGS)
    )
    is_denied, are_many, has_place = (bool(rng.integers(2)) for _ in range(3))
    what = f"many {colour} {thing}s" if are_many else f"the {colour} {thing}"
    where = f" in the {place}" if has_place else ""
    source = f"{person} {verb} {'not ' if is_denied else ''}{what}{where}"
    place_words = [_PLACES[place] + _HERE] if has_place else []
    place_words += [_PEOPLE[person], _THINGS[thing] + (_MANY if are_many else ""), _COLOURS[colour]]
    return source, " ".join([*place_words, *([_NOT] if is_denied else []), _VERBS[verb]])
