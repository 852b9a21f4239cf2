"""`generated-entities`: sentences of newspapers with the people, places and organisations in them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from atoll.datasets.synthetic.drawing import cut
from atoll.protocol.random_streams import stream_seed

_FIRST = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jonas", "Kira", "Leo")
_STARTS = ("bar", "cor", "dal", "fen", "gar", "hol", "kem", "lun", "mor", "nor", "pel", "ros", "sel", "tor")
_ENDS = ("a", "by", "den", "ford", "gate", "ham", "ley", "mond", "ner", "o", "ster", "ton", "well", "wick")
_NAMES = {
    "PER": ("{first} {stem}", "{first}", "Doctor {stem}", "{first} van {stem}", "Judge {stem}"),
    "LOC": ("{stem}", "New {stem}", "{stem} Harbour", "Lake {stem}", "{stem}"),
    "ORG": ("{stem} Bank", "University of {stem}", "{stem} and {stem}", "{stem} Airways", "{stem}"),
}
"""What entities are called; a stem alone may be a place or an organisation, which the sentence tells."""

_FORMS = (
    "{PER} lives in {LOC}",
    "{PER} works for {ORG} in {LOC}",
    "the road from {LOC} to {LOC} is closed",
    "{ORG} sells its offices in {LOC}",
    "{ORG} has named {PER} as its new head",
    "shares of {ORG} and {ORG} fell",
    "{PER} met {PER} in {LOC}",
    "it will rain in {LOC} today",
    "{PER} will leave {ORG} next month",
    "workers of {ORG} ask for more pay",
    "the mayor of {LOC} , {PER} , has no comment",
    "a fire in the harbour of {LOC} is out",
    "nobody was hurt",
    "said {PER} of {ORG}",
)
_AFTER = ("", " .", " today .", " , a paper says .", " again .")
_PAPERS = 12
# Below 1: each paper writes mostly of a few things.
_TASTE = 0.7


def generated_entities(seed: int = 0, count: int = 2400) -> dict[str, pa.Table]:
    """Different sentences: columns tokens, tags (BIO: PER, LOC, ORG; one a word) and paper.

    A paper has favourite forms of sentences, and stems of names of its own.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-entities"))
    stems = [f"{start}{end}".title() for start in _STARTS for end in _ENDS]
    tastes = rng.dirichlet(np.full(len(_FORMS), _TASTE), _PAPERS)
    stems_of = [[stems[place] for place in rng.permutation(len(stems))[:60]] for _ in range(_PAPERS)]
    sentences: dict[tuple[str, ...], tuple[tuple[str, ...], str]] = {}
    while len(sentences) < count:
        paper = int(rng.integers(_PAPERS))
        form = _FORMS[rng.choice(len(_FORMS), p=tastes[paper])] + _AFTER[rng.integers(len(_AFTER))]
        words, tags = _sentence(rng, form, stems_of[paper])
        sentences.setdefault(words, (tags, f"paper-{paper:02d}"))
    kind = pa.list_(pa.string())
    return cut(
        pa.table(
            {
                "tokens": pa.array([list(words) for words in sentences], kind),
                "tags": pa.array([list(tags) for tags, _ in sentences.values()], kind),
                "paper": pa.array([paper for _, paper in sentences.values()], pa.string()),
            }
        )
    )


def _sentence(
    rng: np.random.Generator, form: str, stems: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words of a form whose places are filled with names, and their tags."""
    words: list[str] = []
    tags: list[str] = []
    for part in form.split():
        kind = part[1:-1] if part.startswith("{") else None
        name = _name(rng, kind, stems) if kind else [part]
        words += name
        tags += [f"{'I' if place else 'B'}-{kind}" if kind else "O" for place in range(len(name))]
    return tuple(words), tuple(tags)


def _name(rng: np.random.Generator, kind: str, stems: list[str]) -> list[str]:
    forms = _NAMES[kind]
    words = forms[rng.integers(len(forms))].split()
    filled = {"{first}": list(_FIRST), "{stem}": stems}
    return [str(rng.choice(filled[word])) if word in filled else word for word in words]
