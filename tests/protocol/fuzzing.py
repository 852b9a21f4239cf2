"""Messages that atheris makes up, guided by which branches of the parser it has reached: `make fuzz`.

`python -m tests.protocol.fuzzing --cases 1000000` plays so many; with `FILE` in place of `--cases` it
plays one again. Where something is raised that a parser should have caught, or is taken that nobody signed,
it ends with another exit code than 0 and writes the message to a file beside it (`crash-…`).

A case is one byte for who reads it, four for the length of its first part, and two parts: a JSON head and a
body of safetensors, or a greeting and nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

MOST_BYTES, MOST_MEGABYTES = 1 << 14, 4_000

with redirect_stderr(StringIO()), atheris.instrument_imports(include=["atoll"]):
    from flwr.app import RecordDict

    from atoll.errors import DataError
    from atoll.protocol.flower_content import add_seal, bodies_of, packed, packed_greetings
    from atoll.protocol.messages import hello_to_json
    from atoll.protocol.requests import EvaluateRequest, decode_request, encode_request
    from atoll.server.received import greetings
    from tests.protocol.test_fuzzed_replies import (
        BODY,
        EXCHANGE,
        HEAD,
        HELLO,
        MODEL,
        NAME,
        check,
        keys,
        taken,
    )
    from tests.server.rounds.test_received import setting


def reply(head: str, body: bytes) -> None:
    taken(_content(head, body), signed=False)


def signed_reply(head: str, body: bytes) -> None:
    """A reply under the signature of another: taken only where it is that other."""
    content = _content(head, body)
    add_seal(content, keys()[0].seal(EXCHANGE, {NAME: (HEAD, BODY)}))
    assert taken(content, signed=True) == ((head, body) == (HEAD, BODY))


def greeting(text: str, body: bytes) -> None:
    for signed in (None, check()):
        (hello,) = greetings(packed_greetings([text]), NAME, setting(1), signed)
        assert len(hello.refusal) < 2_000 and len(hello.client) <= 128
        assert hello.refusal or signed is None, "a greeting is believed that nobody signed"


def request(head: str, body: bytes) -> None:
    """What a site reads of a server."""
    try:
        decode_request(head, body)
    except DataError as error:
        assert 0 < len(str(error)) < 2_000


ASKED = encode_request(EvaluateRequest("{}", "hash", 1, HELLO.data_info, MODEL, run="run", adapt_steps=1))
READERS: tuple[Callable[[str, bytes], None], ...] = (reply, signed_reply, greeting, request)


def _content(head: str, body: bytes) -> RecordDict:
    return packed({NAME: head}, bodies_of({NAME: body}))


def case_of(reader: int, head: str, body: bytes) -> bytes:
    text = head.encode("utf-8", "surrogatepass")
    return bytes([reader]) + len(text).to_bytes(4, "little") + text + body


def play(case: bytes) -> None:
    """Let one case be read; raises what its reader didn't catch, AssertionError where it takes too much."""
    if len(case) < 5:
        return
    rest = case[5:]
    length = int.from_bytes(case[1:5], "little") % (len(rest) + 1)
    READERS[case[0] % len(READERS)](rest[:length].decode("utf-8", "replace"), rest[length:])


def valid_cases() -> list[bytes]:
    """A message for each reader that is as it should be: where atheris begins."""
    return [
        case_of(0, HEAD, BODY),
        case_of(1, HEAD, BODY),
        case_of(2, hello_to_json(HELLO), b""),
        case_of(3, *ASKED),
    ]


def words() -> str:
    """libFuzzer's dictionary: names of fields and kinds, and what JSON and safetensors are written with."""
    known = {
        *json.loads(HEAD),
        *json.loads(ASKED[0]),
        *HELLO.data_info,
        "delta/w",
        "states/train_loss.sum",
        "dtype",
    }
    known |= {
        "F32",
        "I64",
        "shape",
        "data_offsets",
        "__metadata__",
        "NaN",
        "Infinity",
        "1e999",
        "null",
        "[[[[",
    }
    return "".join(f'"{word}"\n' for word in sorted(known))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="a case to play again")
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    if asked.file:
        return play(asked.file.read_bytes())
    with TemporaryDirectory() as name:
        (corpus := Path(name, "cases")).mkdir()
        for number, case in enumerate(valid_cases()):
            (corpus / str(number)).write_bytes(case)
        (dictionary := Path(name, "words")).write_text(words())
        limits = [f"-max_len={MOST_BYTES}", f"-rss_limit_mb={MOST_MEGABYTES}", "-timeout=60"]
        runs = [f"-runs={asked.cases}", f"-seed={asked.seed}", f"-dict={dictionary}", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *limits, *runs, str(corpus)], play)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
