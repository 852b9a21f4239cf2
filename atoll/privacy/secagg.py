"""Secure aggregation: the server learns the sum of the clients' vectors, and no vector.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", the variant
against a server that may lie (section 4 with signed keys and the consistency check). Five stages:

1. everyone makes two X25519 key pairs for the round and sends the public keys, with a hash that commits it
   to the seed of its mask, signed by its site;
2. everyone deals Shamir shares of its own seed and of its mask key to the others, encrypted for each;
3. everyone sends its vector under masks: one from its own seed, and one with each other client,
   added by one of the two and subtracted by the other, so that in the sum they cancel;
4. those whose vectors arrived are named, and everyone signs their list, one list a round;
5. who sees the signatures of as many of them as open the sum reveals for each client one share: of its
   seed if its vector arrived, of its mask key if it did not. Never both.

Without an `Identity`, as in tests and simulations, nothing is signed.

Vectors are unsigned 64-bit integers and sums wrap around, so that a masked vector is uniform and the
sum exact. Masks are AES-256 in counter mode under keys from HKDF-SHA256.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from atoll.errors import JobError

Vector = NDArray[np.uint64]
"""Integers modulo 2^64, [numbers]."""

MIN_CLIENTS = 3
"""Clients below which a sum tells too much of each."""
PRIME = 2**521 - 1
SHARE_BYTES = 66
SEED_BYTES = 32
KEY_BYTES = 96
"""Of an advertisement without its signature: key for shares, key for masks, hash of the seed."""
SEALED_BYTES = 2 * SHARE_BYTES + 16
OF_SEED, OF_KEY = b"s", b"k"


class SecureAggregationFailed(JobError):
    """The protocol cannot go on: too few clients are left, or a message is not what it must be."""


def least_threshold(clients: int) -> int:
    """The smallest number of clients that may open a sum of so many: more than two thirds, three at least."""
    return max(MIN_CLIENTS, 2 * clients // 3 + 1)


def check_threshold(threshold: int, clients: int) -> None:
    """Raises SecureAggregationFailed unless the threshold protects, and can be reached."""
    if clients < MIN_CLIENTS:
        raise SecureAggregationFailed(f"{clients} clients, a secure sum needs {MIN_CLIENTS} at least")
    if not least_threshold(clients) <= threshold <= clients:
        raise SecureAggregationFailed(
            f"threshold {threshold} of {clients} clients, expected {least_threshold(clients)} to {clients}"
        )


class Verifier(Protocol):
    """Verifies signatures of a federation's clients by their public keys."""

    def has_signed(self, client: str, content: bytes, signature: bytes) -> bool:
        """Whether the signature of `content` is the client's; False for clients outside the federation."""
        ...


class Identity(Verifier, Protocol):
    """Signs for a client, and verifies the other clients' signatures."""

    def knows(self, client: str) -> bool:
        """Whether the federation has a client of that name."""
        ...

    def sign(self, content: bytes) -> bytes:
        """The client's signature of these bytes."""
        ...


@dataclass
class Participant:
    """One client's part in one round; its secrets are made here and never leave in the clear.

    `context` names run and round, so that messages of one round cannot be used in another. With an
    `identity`, unsigned keys and unsigned lists of survivors are refused. `cohort` is the number of clients
    that the job states, or 0: the threshold must not be below `least_threshold` of it.
    """

    name: str
    context: bytes
    identity: Identity | None = None
    cohort: int = 0
    _cipher_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    _mask_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    _seed: bytes = field(default_factory=lambda: os.urandom(SEED_BYTES))
    _keys: dict[str, bytes] = field(default_factory=dict)
    _advertised: bytes = b""
    threshold: int = 0
    _shares: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    _confirmed: tuple[str, ...] | None = None

    def advertise(self) -> bytes:
        """Stage 1: the two public keys and the hash of the seed, 96 bytes, and their signature.

        A repeated call returns the same bytes.
        """
        if not self._advertised:
            public = [key.public_key().public_bytes_raw() for key in (self._cipher_key, self._mask_key)]
            keys = b"".join([*public, commitment(self._seed)])
            self._advertised = keys + self._signed(keys_said(self.context, self.name, keys))
        return self._advertised

    def deal(self, keys: Mapping[str, bytes], threshold: int) -> dict[str, bytes]:
        """Stage 2: for every other client an encrypted pair of shares.

        Raises:
            SecureAggregationFailed: the threshold doesn't protect, the keys are not all different, or one of
                them isn't signed by a client of the federation.
        """
        check_threshold(threshold, len(keys))
        if self.cohort and threshold < least_threshold(self.cohort):
            raise SecureAggregationFailed(
                f"threshold {threshold}, a cohort of {self.cohort} needs {least_threshold(self.cohort)}"
            )
        self._check_signatures(keys)
        if keys.get(self.name) != self.advertise() or len(set(keys.values())) != len(keys):
            raise SecureAggregationFailed("the list of public keys is not that of the clients")
        if self._keys:
            raise SecureAggregationFailed("shares were dealt already in this round")
        self._keys, self.threshold = dict(keys), threshold
        names = sorted(keys)
        places = range(1, len(names) + 1)
        of_seed = shamir_split(self._seed, threshold, places)
        of_key = shamir_split(self._mask_key.private_bytes_raw(), threshold, places)
        dealt = {}
        for name, seed_share, key_share in zip(names, of_seed, of_key, strict=True):
            if name == self.name:
                self._shares[name] = (seed_share, key_share)
            else:
                dealt[name] = self._sealed(name, seed_share + key_share)
        return dealt

    def check_dealt(self) -> None:
        """Raises SecureAggregationFailed before stage 2: what is sent before it can never be opened."""
        if not self._keys:
            raise SecureAggregationFailed("no shares were dealt yet in this round")

    def masked(self, dealt: Mapping[str, bytes], vector: Vector) -> Vector:
        """Stage 3: the vector under its masks, with all clients whose shares came.

        Raises:
            SecureAggregationFailed: the client itself or too few others dealt shares, or a share was changed
                on its way.
        """
        self.check_dealt()
        if set(dealt) - (set(self._keys) - {self.name}) or len(dealt) + 1 < self.threshold:
            raise SecureAggregationFailed(f"{len(dealt) + 1} clients dealt shares, needed {self.threshold}")
        if len(self._shares) > 1:
            raise SecureAggregationFailed("a vector was sent already in this round")
        for name, sealed in dealt.items():
            opened = self._opened(name, sealed)
            self._shares[name] = (opened[:SHARE_BYTES], opened[SHARE_BYTES:])
        total = vector + mask_of(self._seed, len(vector))
        for name in dealt:
            shared = agreed_seed(self._mask_key, mask_key_of(self._keys[name]), self.context)
            _add_pairwise(total, self.name, name, shared)
        return total

    def confirm(self, arrived: Sequence[str]) -> bytes:
        """Stage 4: the signature of the list of those whose vectors arrived; of no second list.

        Raises:
            SecureAggregationFailed: too few arrived, or other ones than were named before.
        """
        return self._signed(self._list_said(self._only_list(arrived)))

    def _only_list(self, arrived: Sequence[str]) -> tuple[str, ...]:
        names = tuple(sorted(set(arrived)))
        if self._confirmed not in (None, names):
            raise SecureAggregationFailed("other clients than those named before in this round")
        if set(names) - set(self._shares) or self.name not in names or len(names) < self.threshold:
            raise SecureAggregationFailed(f"{len(names)} vectors arrived, needed {self.threshold}")
        self._confirmed = names
        return names

    def reveal(self, arrived: Sequence[str], signatures: Mapping[str, bytes]) -> dict[str, bytes]:
        """Stage 5: a share for each client, of its seed if its vector arrived, else of its mask key.

        Raises:
            SecureAggregationFailed: the list isn't the one confirmed, or too few others have signed it.
        """
        names = self._only_list(arrived)
        if self.identity is not None:
            content = self._list_said(names)
            good = [n for n in names if self.identity.has_signed(n, content, signatures.get(n, b""))]
            if len(good) < self.threshold:
                raise SecureAggregationFailed(
                    f"{len(good)} clients signed the list of vectors that arrived, needed {self.threshold}"
                )
        return {
            name: OF_SEED + of_seed if name in names else OF_KEY + of_key
            for name, (of_seed, of_key) in self._shares.items()
        }

    def _signed(self, content: bytes) -> bytes:
        return b"" if self.identity is None else self.identity.sign(content)

    def _list_said(self, names: Sequence[str]) -> bytes:
        """The bytes that every client signs to confirm a list of survivors."""
        return b"\0".join((b"atoll survivors", self.context, *(name.encode() for name in names)))

    def _check_signatures(self, keys: Mapping[str, bytes]) -> None:
        if self.identity is None:
            return
        for client, advertised in keys.items():
            if not is_signed(self.identity, self.context, client, advertised):
                raise SecureAggregationFailed(f"the keys of {client[:64]} are not signed by its site")

    def _sealed(self, receiver: str, content: bytes) -> bytes:
        return self._box(receiver).encrypt(
            _nonce(self.name, receiver), content, self._about(self.name, receiver)
        )

    def _opened(self, sender: str, sealed: bytes) -> bytes:
        try:
            opened = self._box(sender).decrypt(
                _nonce(sender, self.name), sealed, self._about(sender, self.name)
            )
        except InvalidTag:
            raise SecureAggregationFailed(f"the shares of {sender} were changed on their way") from None
        if len(opened) != 2 * SHARE_BYTES:
            raise SecureAggregationFailed(f"the shares of {sender} have a wrong length")
        return opened

    def _box(self, other: str) -> ChaCha20Poly1305:
        secret = self._cipher_key.exchange(X25519PublicKey.from_public_bytes(self._keys[other][:32]))
        return ChaCha20Poly1305(derived(secret, b"atoll shares", self.context))

    def _about(self, sender: str, receiver: str) -> bytes:
        return b"\0".join((self.context, sender.encode(), receiver.encode()))


def sum_of(vectors: Iterable[Vector]) -> Vector:
    """The sum modulo 2^64 of one vector or more, which are not copied."""
    first, *others = vectors
    total = first.copy()
    for vector in others:
        np.add(total, vector, out=total)
    return total


def unmask_sum(
    keys: Mapping[str, bytes],
    dealers: Iterable[str],
    masked: Mapping[str, Vector],
    revealed: Mapping[str, Mapping[str, bytes]],
    threshold: int,
    context: bytes,
) -> Vector:
    """The sum of the vectors that arrived, at the server.

    `keys` are all public keys of stage 1, `dealers` those who dealt shares, `masked` the vectors
    that arrived, and `revealed` what the clients revealed, by client.

    Raises:
        SecureAggregationFailed: fewer than `threshold` revealed, or their shares don't fit.
    """
    if len(masked) < threshold or len(revealed) < threshold:
        raise SecureAggregationFailed(
            f"{len(masked)} vectors and {len(revealed)} revealed shares, needed {threshold} of each"
        )
    places = {name: place for place, name in enumerate(sorted(keys), start=1)}
    total = sum_of(masked.values())
    for name in masked:
        seed = _recovered(name, OF_SEED, revealed, places, threshold)
        if commitment(seed) != keys[name][64:KEY_BYTES]:
            raise SecureAggregationFailed(f"the shares of {name} do not give its seed")
        np.subtract(total, mask_of(seed, len(total)), out=total)
    for name in sorted(set(dealers) - set(masked)):
        secret = _recovered(name, OF_KEY, revealed, places, threshold)
        key = X25519PrivateKey.from_private_bytes(secret)
        if key.public_key().public_bytes_raw() != mask_key_of(keys[name]):
            raise SecureAggregationFailed(f"the shares of {name} do not give its key")
        for other in sorted(masked):
            # What `other` added for the one who is gone is what that one would have taken off.
            _add_pairwise(total, name, other, agreed_seed(key, mask_key_of(keys[other]), context))
    return total


def _recovered(
    name: str,
    kind: bytes,
    revealed: Mapping[str, Mapping[str, bytes]],
    places: Mapping[str, int],
    threshold: int,
) -> bytes:
    values = [
        (places[holder], shares[name][1:])
        for holder, shares in sorted(revealed.items())
        if shares.get(name, b"")[:1] == kind
    ]
    if len(values) < threshold:
        raise SecureAggregationFailed(f"{len(values)} shares of {name}, needed {threshold}")
    return shamir_combine(values[:threshold])


def _add_pairwise(total: Vector, client: str, other: str, seed: bytes) -> None:
    """Add the mask that two clients share, or take it off: the first by name adds."""
    mask = mask_of(seed, len(total))
    if client < other:
        total += mask
    else:
        total -= mask


def commitment(seed: bytes) -> bytes:
    """The hash, 32 bytes, by which a client commits itself to its seed of 256 random bits."""
    return hashlib.sha256(b"atoll seed\0" + seed).digest()


def keys_said(context: bytes, client: str, keys: bytes) -> bytes:
    """The bytes that a client signs to confirm its keys."""
    return b"\0".join((b"atoll keys", context, client.encode(), keys))


def is_signed(verifier: Verifier, context: bytes, client: str, advertised: bytes) -> bool:
    """Whether what a client advertised in that round is signed by its site."""
    content = keys_said(context, client, advertised[:KEY_BYTES])
    return verifier.has_signed(client, content, advertised[KEY_BYTES:])


def mask_key_of(advertised: bytes) -> bytes:
    """The public key for masks in what a client advertised."""
    return advertised[32:64]


def keys_fault(advertised: bytes) -> str | None:
    """Why no secret can be agreed on with these public keys; None where it can."""
    trial = X25519PrivateKey.generate()
    try:
        for start in (0, 32):
            trial.exchange(X25519PublicKey.from_public_bytes(advertised[start : start + 32]))
    except ValueError:
        return "its public keys are none"
    return None


def agreed_seed(private_key: X25519PrivateKey, other: bytes, context: bytes) -> bytes:
    """The seed of the mask that two clients share, from one client's private and the other's public key."""
    return derived(private_key.exchange(X25519PublicKey.from_public_bytes(other)), b"atoll mask", context)


def derived(secret: bytes, purpose: bytes, context: bytes) -> bytes:
    """A 32-byte key for one purpose (RFC 5869)."""
    info = purpose + b"\0" + hashlib.sha256(context).digest()
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def mask_of(seed: bytes, count: int) -> Vector:
    """`count` uniform 64-bit integers from a 32-byte seed that is used only here: AES-256 in counter mode."""
    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)


def _nonce(sender: str, receiver: str) -> bytes:
    """The nonce of a pair's message; each pair's key encrypts one message in each direction."""
    return bytes(11) + (b"\1" if sender < receiver else b"\2")


def shamir_split(secret: bytes, threshold: int, places: Iterable[int]) -> list[bytes]:
    """Shamir's shares (1979): values of a random polynomial that is the secret at 0."""
    coefficients = [int.from_bytes(secret, "little")]
    coefficients += [int.from_bytes(os.urandom(72), "little") % PRIME for _ in range(threshold - 1)]
    shares = []
    for place in places:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * place + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "little"))
    return shares


def shamir_combine(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The secret of as many shares (place, value) as the threshold, by Lagrange's formula at 0.

    Raises:
        SecureAggregationFailed: they are shares of no 32-byte secret.
    """
    total = 0
    for place, value in shares:
        above = below = 1
        for other, _ in shares:
            if other != place:
                above, below = above * other % PRIME, below * (other - place) % PRIME
        total += int.from_bytes(value, "little") * above * pow(below, -1, PRIME)
    total %= PRIME
    if total >= 1 << (8 * SEED_BYTES):
        raise SecureAggregationFailed("the revealed shares do not belong together")
    return total.to_bytes(SEED_BYTES, "little")
