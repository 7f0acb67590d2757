"""What a real Envoy says of some 1,400 odd certificate chains, and what the agent says of them before it serves them.

What Envoy refuses must never leave the agent, and what it takes must not be refused without a reason. Each chain is
judged as a CA's answer is; the bundle that the agent would publish then goes to Envoy, which has the chain as its own,
and a peer presents the chain.
"""

import re
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from fakes import der
from fakes.clocks import HandClock
from fakes.judge import Case, Question, judging
from fakes.oddities import every_case

from sds_agent.authority.protocol import AuthorityError, Issuance
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import accept
from sds_agent.issuance.trust import Trust
from sds_agent.pki.certificates import write_pem
from sds_agent.secrets.model import BundleSecret
from sds_agent.secrets.store import SecretStore

FEWEST_ASKED = 1300
"""Of the chains a few cannot be presented, since the client's TLS library does not read them."""

# What the agent takes and Envoy refuses, by label: nothing, or why that must be borne.
MILDER: dict[str, str] = {}

# What the agent refuses and each of the Envoys takes, by label and words of the refusal.
STRICTER: dict[str, str] = {
    # what cannot be read
    r"is not a well-formed X\.509 certificate": "cryptography does not read it; what is beside it goes on",
    r"of a kind that is not supported": "likewise: cryptography does not know that kind of key or name",
    # what was not asked for, and what an Envoy that calls would refuse: this one is called
    r"alternative names must be exactly": "a leaf has the SPIFFE ID and no other name",
    r"the certificate's extended key usage lacks": "an Envoy is called and calls",
    r"the CA issued a CA certificate": "a workload that can sign could take any identity",
    r"ExtendedKeyUsage of '.*' does not list serverAuth and clientAuth": "an Envoy is called and calls",
    # what is weak
    r"is signed with SHA1": "certificates have been forged with SHA-1",
    r"has an RSA key of (1024|2047) bits": "NIST SP 800-57 has no use for it any more",
    # of an anchor Envoy sees the validity, the name constraints and whether it may sign; openssl and Go see the rest
    r"'CN=Demo Root' is no CA": "a certificate that is pinned by mistake must not issue identities",
    r"'CN=Demo Root' has the critical extension": "RFC 5280 section 4.2",
    r"^path length: .* 'CN=Demo Root' allows at most \d CAs below it": "section 6.1.1 leaves it open",
    r"the chain has more than 8 intermediates": "no hierarchy in use is deeper; Envoy stops at 100",
    r"^constraints: 3001: the certificate chain has \d+ bytes": "over TLS 1.3 it is refused, and this peer speaks 1.2",
    # what Envoys of another version, or with another bundle, refuse
    r"Envoy may choose the trust anchor": "which of several it takes depends on its version and the order",
    r"^demo\.example with .* hold the URI '.*', which must be a DNS name": "Go refuses it beside one that fits, too",
    r"^constraints: .* excluded: .* exclude '.*', and so": "a mailbox is the same in any case, and a dot ends no name",
    r"^constraints: .* of another form: .* hold a minimum or a maximum": "RFC 5280 section 4.2.1.10 rules them out",
}
# Likewise, and only some of the Envoys take it: those up to 1.37 are milder, and read the end of a DNS name otherwise.
STRICTER_THAN_SOME: dict[str, str] = {
    r"^host '.*' .* must then be a DNS name": "any text is a host for Envoy 1.36; Go refuses a dot at the end",
    r"^host '.*' .* hold the URI '.*', which must be a DNS name": "likewise, in the constraint",
    r"^constraints: .* hold the URI '.*', which must be a DNS name": "likewise",
    r"^constraints: a DNS .* ends in a dot: .* permit '.*', but not": "Envoy 1.36 takes the dot for a part of the name",
    r"^constraints: an address .* is none in plain ASCII": "any text is an e-mail address for Envoy 1.36",
    r"^constraints: .* which is no e-mail address and no domain": "likewise",
}


@dataclass(frozen=True)
class Ours:
    """The agent's verdict: what it refuses has `words`; the bundle and the chain are what an Envoy gets to see."""

    words: str | None
    bundle: bytes
    chain: bytes


def judged(case: Case, now: datetime) -> Ours:
    """As a CA's answer, then as the bundle is published."""
    identity = cast("SpiffeId", case.spiffe_id)  # of which only the text is read; some are none
    key = case.key.public_key()
    assert not isinstance(key, ed25519.Ed25519PublicKey), "of which no leaf's key is"
    answer = Issuance(case.chain_pem, case.anchors_pem)
    try:
        accepted = accept(answer, identity=identity, public_key=key, anchors=(), now=now)
    except AuthorityError as error:
        return Ours(str(error), case.anchors_pem, case.chain_pem)
    store = SecretStore(["ROOTCA"])
    Trust(store, ["ROOTCA"], HandClock(now)).update("ca", accepted.anchors)
    bundle = store.snapshot["ROOTCA"]
    assert isinstance(bundle, BundleSecret)
    return Ours(None, bundle.anchors_pem, write_pem(accepted.chain))


@dataclass(frozen=True)
class Disagreement:
    """A chain that only one of the two takes."""

    label: str
    words: str | None
    envoys: str

    def __str__(self) -> str:
        return f"{self.label}: " + (self.words or f"taken, and Envoy says {self.envoys}")

    def known(self) -> list[str]:
        """The entries that list it."""
        entries = MILDER if self.words is None else STRICTER | STRICTER_THAN_SOME
        return [entry for entry in entries if re.search(entry, str(self))]


@pytest.mark.filterwarnings("ignore:Attribute's length must be")  # cryptography's, of names that it reads all the same
async def test_the_agent_and_envoy_take_the_same_chains(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    cases = {f"c{number}": case for number, case in enumerate(every_case())}
    ours = {name: judged(case, now) for name, case in cases.items()}
    questions = {name: Question(each.chain + der.key_pem(cases[name].key), each.bundle) for name, each in ours.items()}
    taken = dict[str, bool]()
    async with judging(questions, tmp_path) as judge:
        loaded = await judge.loaded()
        for name in cases:
            try:
                taken[name] = name in loaded and await judge.lets_in(name)
            except ssl.SSLError:
                continue
        reasons = await judge.reasons()
    different = [
        Disagreement(
            cases[name].label,
            ours[name].words,
            reasons.get(name, "that it cannot load the bundle, or the chain as its own"),
        )
        for name, envoys in taken.items()
        if envoys is not (ours[name].words is None)
    ]
    listed = [entry for each in different for entry in each.known()]
    unlisted = "\n".join(str(each) for each in different if not each.known())
    assert not unlisted, f"Envoy judges otherwise:\n{unlisted}"
    assert {*MILDER, *STRICTER} - set(listed) == set(), "an entry that lists nothing any more"
    assert len(taken) >= FEWEST_ASKED
