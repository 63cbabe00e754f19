"""What a node says of itself by mDNS, and what is to be thought of what others say. Pure.

The TXT record, one ``key=value`` each; a person reads it with ``avahi-browse -rt _skulk._tcp``:

| key        | value                                                                                         |
|------------|-----------------------------------------------------------------------------------------------|
| `cluster`  | name of the cluster                                                                           |
| `version`  | of Skulk; `protocol`: major version of the bus contract                                       |
| `node`     | the node's id; `name`: of its host, for people                                                |
| `route`    | port of its nats-server's routes                                                              |
| `at`       | its usable addresses, separated by commas                                                     |
| `proof`    | only with SKULK_CLUSTER_TOKEN: that whoever wrote all this knows the token                    |

Why a proof: NATS shows the routes' password to whatever it dials. Without one, a stranger on the network would only
have to advertise the cluster's name to be told it. The proof covers the addresses, so that a copy of it leads to
nobody else.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from skulk.discovery.addresses import route_text, usable_routes
from skulk.ids import is_token

Problem = Literal[
    "other_cluster",
    "wrong_token",
    "incompatible_version",
    "no_usable_address",
    "port_closed",
    "no_answer",
    "unknown_host",
    "other_program",
    "wrong_tls",
]
"""Why a node that was seen isn't joined."""

_TEXT_LIMIT: Final = 240  # a string of a TXT record has at most 255 bytes, its key included
_SCRYPT: Final = {"n": 2**14, "r": 8, "p": 1, "dklen": 32}


class Advert(msgspec.Struct, frozen=True, kw_only=True):
    """One node's word. Texts come from strangers: checked by `read_advert`, never trusted further."""

    cluster: str
    node_id: str
    version: str
    protocol: int
    port: int
    addresses: tuple[str, ...]
    name: str = ""
    proof: str = ""

    @property
    def routes(self) -> tuple[str, ...]:
        """``host:port`` of each address that another node may dial."""
        return usable_routes((route_text(address, self.port) for address in self.addresses), local=False)


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why a node isn't joined, for machines and for people."""

    problem: Problem
    detail: str


def proof_key(token: str, cluster: str) -> bytes:
    """The key of all proofs of a cluster; empty where there is no token.

    Slow on purpose (50 ms): a proof can be listened to, and every guess at a weak token should cost as much.
    """
    if not token:
        return b""
    return hashlib.scrypt(token.encode(), salt=b"skulk advert\0" + cluster.encode(), **_SCRYPT)


def with_proof(advert: Advert, key: bytes) -> Advert:
    """The advert as it is published."""
    return msgspec.structs.replace(advert, proof=_proof(advert, key)) if key else advert


def txt_of(advert: Advert) -> dict[str, str]:
    """The TXT record. Addresses that don't fit into one string are left out."""
    at = _fitting(advert.addresses)
    texts = {
        "cluster": advert.cluster,
        "version": advert.version,
        "protocol": str(advert.protocol),
        "node": advert.node_id,
        "name": advert.name[:_TEXT_LIMIT],
        "route": str(advert.port),
        "at": ",".join(at),
    }
    return {**texts, "proof": advert.proof} if advert.proof else texts


def fitting(advert: Advert) -> Advert:
    """The advert with the addresses that a TXT record has room for; to be signed after this."""
    return msgspec.structs.replace(advert, addresses=_fitting(advert.addresses))


def read_advert(txt: Mapping[str, str]) -> Advert | None:
    """What a TXT record says; None where it is no node's."""
    node_id, cluster = txt.get("node", ""), txt.get("cluster", "")
    numbers = [txt.get(key, "") for key in ("route", "protocol")]
    if not (is_token(node_id) and is_token(cluster) and all(_is_small_number(text) for text in numbers)):
        return None
    port, protocol = (int(text) for text in numbers)
    if not 0 < port < 65536:
        return None
    return Advert(
        cluster=cluster,
        node_id=node_id[:64],
        version=printable(txt.get("version", ""))[:32],
        protocol=protocol,
        port=port,
        addresses=tuple(txt.get("at", "").split(",")),
        name=printable(txt.get("name", "")),
        proof=txt.get("proof", ""),
    )


def refusal_of(advert: Advert, *, cluster: str, protocol: int, key: bytes) -> Refusal | None:
    """Why the node of an advert isn't to be joined; None where it is.

    1. another cluster: says nothing about us
    2. another major version of the bus's contract
    3. no proof, a wrong one, or one where we have no token
    4. no address that can be dialled
    """
    if advert.cluster != cluster:
        return Refusal(
            problem="other_cluster",
            detail=f"it belongs to the cluster {advert.cluster}, this node to {cluster} (--cluster NAME)",
        )
    if advert.protocol != protocol:
        return Refusal(
            problem="incompatible_version",
            detail=f"it runs Skulk {advert.version}, which speaks version {advert.protocol} of the bus's contract; "
            f"this node speaks version {protocol}: bring both to one version",
        )
    if advert.proof and not key:
        return Refusal(problem="wrong_token", detail="it has a SKULK_CLUSTER_TOKEN and this node has none")
    if key and not advert.proof:
        return Refusal(problem="wrong_token", detail="this node has a SKULK_CLUSTER_TOKEN and it has none")
    if key and not hmac.compare_digest(advert.proof.encode(), _proof(advert, key).encode()):
        return Refusal(problem="wrong_token", detail="its SKULK_CLUSTER_TOKEN is not this node's")
    if not advert.routes:
        return Refusal(problem="no_usable_address", detail="it has told no address that this node could dial")
    return None


def printable(text: str) -> str:
    """A stranger's text for logs and terminals: nothing that drives one, 64 letters at most."""
    return "".join(letter for letter in text if letter.isprintable())[:64]


def _proof(advert: Advert, key: bytes) -> str:
    told = [advert.cluster, advert.node_id, advert.protocol, advert.port, *advert.addresses]
    return hmac.new(key, json.dumps(told).encode(), hashlib.sha256).hexdigest()[:32]


def _fitting(addresses: tuple[str, ...]) -> tuple[str, ...]:
    kept: list[str] = []
    for address in addresses:
        if len(",".join((*kept, address))) <= _TEXT_LIMIT:
            kept.append(address)
    return tuple(kept)


def _is_small_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5
