"""The agent with a stand-in for an EST server: renewals, a restart, a new CA key and an outage.

Certificates live for seconds, by the machine's clock, as the server checks them in the TLS handshake.
"""

import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from ca_interop.driver import URI, Running, agent
from cryptography import x509
from fakes.est_server import PASSWORD, USER, EstServer
from fakes.hierarchy import Ca, make_ca, make_leaf

from sds_agent.pki.certificates import subject_alternative_uris

DAY = timedelta(days=1)
LIFETIME = timedelta(seconds=8)


class Hierarchy:
    """A root and the CA below it that signs."""

    def __init__(self, name: str) -> None:
        now = datetime.now(UTC)
        self.root = make_ca(name, not_before=now - DAY, not_after=now + DAY)
        self.signer = make_ca(f"{name} signer", self.root, not_before=now - DAY, not_after=now + DAY)

    def sign(self, csr: x509.CertificateSigningRequest) -> tuple[x509.Certificate, ...]:
        now = datetime.now(UTC)
        return (make_leaf(self.signer, URI, key=csr, not_before=now - DAY, not_after=now + LIFETIME),)  # type: ignore[arg-type]  # of a key it asks for the public one alone


class Life:
    """An EST server of two hierarchies, of which the old one signs at first."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.old, self.new = Hierarchy("old"), Hierarchy("new")
        self.server = EstServer()
        self.server.http.trust = (self.old.root.certificate, self.new.root.certificate)
        self.sign_with(self.old)
        self.serving = self.server.http.serving

    def sign_with(self, hierarchy: Hierarchy, *beside: Ca) -> None:
        self.server.ca.issue = hierarchy.sign
        told = (hierarchy.signer, hierarchy.root, *beside)
        self.server.cacerts = [each.certificate for each in told]

    @property
    def settings(self) -> dict[str, object]:
        (self.place / "roots.pem").write_bytes(self.server.http.roots_pem)
        (self.place / "password").write_text(PASSWORD)
        return {
            "type": "est",
            "url": self.server.http.url,
            "ca_file": self.place / "roots.pem",
            "username": USER,
            "password_file": self.place / "password",
            "refresh_every": "1s",
        }

    async def issued_by(self, hierarchy: Hierarchy, running: Running) -> None:
        """Wait for a renewal below this signer."""
        while (await running.more()).issuer != hierarchy.signer.certificate.subject:
            pass


@pytest.fixture
def life() -> Iterator[Life]:
    """With a short path, for the socket."""
    with tempfile.TemporaryDirectory(prefix="est-") as place:
        yield Life(Path(place))


async def test_the_password_is_for_the_first_certificate_and_three_renewals_need_none(life: Life) -> None:
    async with life.serving(), agent(life.place, life.settings, ttl="8s", fraction=0.2) as running:
        first = await running.first()
        (life.place / "password").write_text("spent")
        newest = await running.renewed(3)
        assert subject_alternative_uris(newest) == (URI,)
        assert newest.public_key() != first.public_key()
        assert running.chain()[1:] == (life.old.signer.certificate,)
        assert life.server.operations[:4] == ["simpleenroll", *["simplereenroll"] * 3]
        assert running.events.named("ca_warning") == []


async def test_a_restart_of_the_server_and_an_outage_cost_no_certificate(life: Life, port: int) -> None:
    async with life.serving(port=port):
        settings = life.settings
    async with agent(life.place, settings, ttl="8s", fraction=0.2) as running:
        async with life.serving(port=port):
            await running.first()
        await running.event("retrying", kind="transient", serving="the current certificate")
        served = running.chain()[0]
        assert served.not_valid_after_utc > datetime.now(UTC)
        async with life.serving(port=port):
            assert await running.more() != served
            assert "simpleenroll" not in life.server.operations[1:], "the password is not spent on an outage"


async def test_a_new_ca_key_is_trusted_beside_the_old_one_while_that_is_needed(life: Life) -> None:
    old, new = life.old.root.certificate, life.new.root.certificate
    async with life.serving(), agent(life.place, life.settings, ttl="8s", fraction=0.2) as running:
        await running.first()
        assert running.bundle == (old,)
        life.sign_with(life.new)
        await running.bundle_with(old, new)
        await life.issued_by(life.new, running)
        assert running.chain()[1:] == (life.new.signer.certificate,)
        await running.bundle_with(new)
        assert "simpleenroll" not in life.server.operations[1:], "the old certificate renews for the new key"
