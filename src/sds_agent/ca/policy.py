"""What is signed: the one home of every rule between a proven caller and a signature.

A certificate is always for the caller's own identity, whatever the CSR asks for; nothing of a CSR is used but its key
and the proof that the caller has it. The one exception is a node agent, which may ask for the identities that the
configuration lists for it (Istio's `ImpersonatedIdentity`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta

from msgspec import Struct

from sds_agent.budget import Buckets, Rate
from sds_agent.ca.callers import Caller, Proof
from sds_agent.ca.denied import Denied
from sds_agent.ca.refusal import denied, invalid
from sds_agent.identity.spiffe import SpiffeId, SpiffeIdError, covers
from sds_agent.pki.certificates import describe_name
from sds_agent.pki.csr import CsrError, proven_key
from sds_agent.pki.keys import PublicKey

DEFAULT_TTL = timedelta(hours=24)
LONGEST_TTL = timedelta(days=90)
MOST_CALLERS = 100_000
"""Callers whose requests are counted. Beyond it the CA forgets the one that asked least recently, which at worst lets
that one ask a minute's worth again.
"""
LARGEST_CSR = 64 << 10
"""Bytes. One with an RSA key of 8192 bits has about 3,000."""

_BLOCK = re.compile(r"-----BEGIN (?:NEW )?CERTIFICATE REQUEST-----")


class Quota:
    """`per_minute` requests for each caller: all at once if it likes, for its allowance fills evenly."""

    def __init__(self, per_minute: int) -> None:
        self._callers = Buckets(Rate(per_minute, per_minute / 60), MOST_CALLERS)

    def take(self, caller: str, now: datetime) -> bool:
        """Count a request of that caller; whether it is within its quota."""
        return self._callers.take(caller, now.timestamp())


class NodeAgent(Struct, frozen=True):
    """A caller that may ask for other identities: each of `may_act_for` is a SPIFFE ID, or ends in `/*`, which stands
    for everything below.
    """

    identity: str
    may_act_for: tuple[str, ...]

    def covers(self, uri: str) -> bool:
        """Whether it may act for that identity."""
        return covers(self.may_act_for, uri)


class Order(Struct, frozen=True):
    """What the signer is asked for, once nothing speaks against it."""

    identity: SpiffeId
    public_key: PublicKey
    ttl: timedelta


def ttl_of(seconds: int) -> timedelta:
    """How long a certificate is to be valid: what was asked for, and DEFAULT_TTL where nothing was, as istiod has it.

    Raises RefusalError for more than LONGEST_TTL.
    """
    if seconds <= 0:
        return DEFAULT_TTL
    if seconds > LONGEST_TTL.total_seconds():
        raise invalid(f"a certificate cannot be valid for {seconds} s: {LONGEST_TTL.days} days are the most")
    return timedelta(seconds=seconds)


def check_not_denied(identity: SpiffeId, deny_list: Denied) -> None:
    """Raises RefusalError for an identity that gets nothing, however it is proven."""
    if deny_list.covers(str(identity)):
        raise denied(f"{identity} is on the deny list of this CA")


def identity_for(caller: Caller, impersonated: str, node_agents: Mapping[str, NodeAgent]) -> SpiffeId:
    """Whose certificate it will be; `impersonated` is empty where the caller asks for its own. Raises RefusalError."""
    if not impersonated:
        return caller.identity
    agent = node_agents.get(str(caller.identity))
    if agent is None:
        raise denied(f"{caller.identity} may not act for others: it is not listed in callers.node_agents")
    if caller.proof is Proof.JOIN_TOKEN:
        raise denied("a join token is bound to one identity: it cannot be used to act for another")
    try:
        wanted = SpiffeId.parse(impersonated)
    except SpiffeIdError as error:
        raise invalid(f"ImpersonatedIdentity is not a SPIFFE ID: {error}") from error
    if wanted.trust_domain != caller.identity.trust_domain or not wanted.is_workload or not agent.covers(str(wanted)):
        raise denied(f"{caller.identity} may not act for {describe_name(impersonated)}")
    return wanted


def key_of(csr_pem: str) -> PublicKey:
    """The key that a CSR (PEM) proves possession of. Raises RefusalError."""
    if len(csr_pem) > LARGEST_CSR:
        raise invalid(f"the CSR has {len(csr_pem)} characters: {LARGEST_CSR} are the most")
    if len(_BLOCK.findall(csr_pem)) != 1:
        raise invalid("the request holds no CSR in PEM, or more than one")
    try:
        return proven_key(csr_pem.encode())
    except CsrError as error:
        raise invalid(str(error)) from error


def overreaching(node_agents: Iterable[NodeAgent]) -> Iterator[tuple[NodeAgent, NodeAgent]]:
    """Each node agent that may act for another one, and so, with the certificate that it gets, for all that one may."""
    agents = tuple(node_agents)
    for agent in agents:
        yield from ((agent, other) for other in agents if other is not agent and agent.covers(other.identity))
