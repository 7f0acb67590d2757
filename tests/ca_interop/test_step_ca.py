"""A running agent with a real step-ca, from the first certificate through its restart, its rotation and an outage."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from ca_interop.driver import URI, Running, agent
from ca_interop.step_ca import LISTED_SVID, LISTS, PURE_SVID, RealStepCa, serving
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fakes.hierarchy import common_name, make_leaf, new_key
from fakes.step_ca_server import jwk_of

from sds_agent.pki.certificates import extension, san_values, write_pem
from sds_agent.pki.keys import to_pkcs8_pem
from sds_agent.pki.validation.revocation import read_crls
from sds_agent.secrets.model import BundleSecret

TTL = "6s"
"""A renewal each 2 s, by the driver's fraction."""


@pytest.fixture
async def ca(place: Path) -> AsyncIterator[RealStepCa]:
    async with serving(RealStepCa(place / "ca")) as running:
        yield running


def authority(ca: RealStepCa, place: Path, **changed: object) -> dict[str, object]:
    """The configuration of the authority: the root by its fingerprint, the provisioner's key encrypted."""
    given = {"type": "step-ca", "url": ca.url, "provisioner": "sds", "fingerprint": ca.fingerprint}
    return {**given, **ca.jwk_files(place), "refresh_every": "1s", **changed}


async def test_the_first_certificate_comes_by_fingerprint_and_encrypted_key(ca: RealStepCa, place: Path) -> None:
    async with agent(place, authority(ca, place), ttl="1h") as running:
        leaf = await running.first()
        assert [each.value for each in san_values(leaf)] == [URI]
        assert running.bundle == (ca.root.certificate,)
        assert len(running.chain()) == 2
    assert leaf.subject == common_name(URI)
    assert extension(leaf, x509.BasicConstraints) is None


async def test_the_template_for_pure_svids_gives_them(ca: RealStepCa, place: Path) -> None:
    ca.options = {"x509": {"template": PURE_SVID}}
    await ca.restart()
    async with agent(place, authority(ca, place), ttl=TTL) as running:
        first = await running.first()
        newest = await running.renewed()
    for leaf in (first, newest):
        assert leaf.subject.rdns == []
        assert leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical
        assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


async def test_three_renewals_are_by_rekey_with_new_keys(ca: RealStepCa, place: Path) -> None:
    async with agent(place, authority(ca, place), ttl=TTL) as running:
        leaves = [await running.first()]
        leaves += [await running.renewed(count) for count in (1, 2, 3)]
        assert running.events.named("retrying") == []
        assert running.events.named("certificate_not_taken") == []
    assert len({public_bytes(each) for each in leaves}) == 4
    assert len(ca.requests("/1.0/sign")) == 1
    assert len(ca.requests("/1.0/rekey")) >= 3


def public_bytes(leaf: x509.Certificate) -> bytes:
    return leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


async def test_a_restart_of_step_ca_costs_no_certificate(ca: RealStepCa, place: Path) -> None:
    async with agent(place, authority(ca, place), ttl=TTL) as running:
        await running.first()
        await ca.restart()
        await running.more(2)
    assert len(ca.requests("/1.0/sign")) == 1


async def test_new_keys_of_the_ca_are_followed_and_old_certificates_trusted_to_their_end(
    ca: RealStepCa, place: Path
) -> None:
    """The three steps of docs/authorities/step-ca.md: announce the new root, sign with it, remove the old one."""
    async with agent(place, authority(ca, place), ttl=TTL) as running:
        await running.first()
        old, old_signer = ca.root, ca.signer
        new = ca.make_signer("step root 2", "step intermediate 2")
        ca.roots = [old, new.root]
        await ca.reload()
        await running.bundle_with(old.certificate, new.root.certificate)
        assert running.chain()[0].issuer == old_signer.certificate.subject
        ca.root, ca.signer = new.root, new.signer
        ca.roots = [new.root, old]
        await ca.reload()
        while running.chain()[0].issuer != ca.signer.certificate.subject:
            await running.more()
        ca.roots, ca.federated = [new.root], [old]
        await ca.reload()
        await running.more(2)
        assert set(running.bundle) == {new.root.certificate, old.certificate}
        ca.federated = []
        await ca.reload()
        await running.bundle_with(new.root.certificate)
        await running.more()
        assert running.events.named("retrying") == []
    async with agent(place, authority(ca, place), ttl=TTL) as running:
        # the pinned root is gone from step-ca; the one that it announced was stored
        await running.renewed()
        assert running.events.named("trust_not_refreshed") == []


async def test_a_certificate_below_a_removed_root_is_replaced_by_a_token(ca: RealStepCa, place: Path) -> None:
    """step-ca breaks the connection on which it is shown."""
    async with agent(place, authority(ca, place), ttl="12s") as running:
        await running.first()
        new = ca.make_signer("step root 2", "step intermediate 2")
        ca.roots = [ca.root, new.root]
        await ca.reload()
        await running.bundle_with(ca.root.certificate, new.root.certificate)
        ca.root, ca.signer, ca.roots = new.root, new.signer, [new.root]
        await ca.reload()
        await running.event("certificate_not_taken")
        await running.more(2)
        assert running.chain()[0].issuer == new.signer.certificate.subject
        assert running.events.named("retrying") == []
    assert len(ca.requests("/1.0/sign")) == 2


async def test_an_outage_past_the_end_of_a_certificate_ends_with_a_new_token(ca: RealStepCa, place: Path) -> None:
    async with agent(place, authority(ca, place), ttl=TTL) as running:
        first = await running.first()
        await ca.server.stop()
        cause = (await running.event("retrying"))["cause"]
        assert "cannot be reached (Connection refused)" in cause
        assert running.chain()[0] == first
        await running.event("expired")
        await ca.server.start()
        await running.renewed()
    assert len(ca.requests("/1.0/sign")) == 2


async def test_an_outage_past_a_renewal_costs_no_certificate(ca: RealStepCa, place: Path) -> None:
    async with agent(place, authority(ca, place), ttl="12s", fraction=0.2) as running:
        await running.first()
        await ca.server.stop()
        await running.event("retrying", count=2)
        await ca.server.start()
        await running.renewed()
        assert running.events.named("expired") == []
    assert len(ca.requests("/1.0/sign")) == 1


async def test_an_x5c_provisioner_issues_for_a_certificate(ca: RealStepCa, place: Path) -> None:
    key = new_key()
    device = make_leaf(ca.devices, None, key=key, subject=common_name("device-7"), **ca.validity)
    (place / "device.pem").write_bytes(write_pem([device]))
    (place / "device.key").write_bytes(to_pkcs8_pem(key))
    files = {"certificate_file": place / "device.pem", "key_file": place / "device.key"}
    chosen = authority(ca, place, provisioner="devices", **files)
    del chosen["jwk_file"], chosen["password_file"]
    async with agent(place, chosen, ttl=TTL) as running:
        await running.first()
        await running.renewed()
    assert len(ca.requests("/1.0/rekey")) >= 1


async def test_another_provisioner_is_answered_with_those_there_are(ca: RealStepCa, place: Path) -> None:
    async with agent(place, authority(ca, place, provisioner="sd")) as running:
        refused = await running.event("retrying")
    assert refused["kind"] == "unauthenticated"
    assert "it has no provisioner 'sd'; set provisioner to one of 'sds'" in refused["cause"]


async def test_another_key_is_answered_with_the_one_there_is(ca: RealStepCa, place: Path) -> None:
    chosen = authority(ca, place)
    (place / "sds.jwe").write_text(json.dumps(jwk_of(new_key(), kid="another")))
    async with agent(place, chosen) as running:
        refused = await running.event("retrying")
    assert "has the key 'the-key-of-sds', and jwk_file holds 'another'" in refused["cause"]


async def test_a_key_that_signs_wrongly_is_answered_with_what_to_check(ca: RealStepCa, place: Path) -> None:
    chosen = authority(ca, place)
    (place / "sds.jwe").write_text(json.dumps(jwk_of(new_key())))
    async with agent(place, chosen) as running:
        refused = await running.event("retrying")
    assert "step-ca's own log alone has the reason; check that" in refused["cause"]


async def test_too_long_a_lifetime_is_answered_with_the_claim_to_change(ca: RealStepCa, place: Path) -> None:
    async with agent(place, authority(ca, place), ttl="25h") as running:
        refused = await running.event("retrying")
    assert refused["kind"] == "denied"
    assert "requested duration of 25h1m0s is more than the authorized maximum" in refused["cause"]


async def test_a_policy_against_the_name_is_quoted(ca: RealStepCa, place: Path) -> None:
    ca.authority = {"policy": {"x509": {"allow": {"uri": ["other.example"]}}}}
    await ca.restart()
    async with agent(place, authority(ca, place)) as running:
        refused = await running.event("retrying")
    assert refused["kind"] == "denied"
    assert f'uri name "{URI}" not allowed' in refused["cause"]


async def test_a_template_without_the_names_is_answered_with_the_line_that_it_lacks(
    ca: RealStepCa, place: Path
) -> None:
    ca.options = {"x509": {"template": PURE_SVID.replace('"sans": {{ toJson .SANs }},', "")}}
    await ca.restart()
    async with agent(place, authority(ca, place)) as running:
        refused = await running.event("retrying")
    assert refused["kind"] == "mismatch"
    assert '"sans": {{ toJson .SANs }}' in refused["cause"]


async def test_a_changed_ttl_takes_a_token_once_and_no_more(ca: RealStepCa, place: Path) -> None:
    async with agent(place, authority(ca, place), ttl="10s") as running:
        await running.first()
    async with agent(place, authority(ca, place), ttl=TTL) as running:
        await running.renewed(2)
        leaf = running.chain()[0]
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(seconds=66)
    assert len(ca.requests("/1.0/sign")) == 2


async def test_a_name_that_is_none_of_the_cas_needs_server_name(ca: RealStepCa, place: Path) -> None:
    ca.names = ["ca.example"]
    await ca.restart()
    async with agent(place, authority(ca, place)) as running:
        refused = await running.event("retrying")
        assert "is not for 127.0.0.1" in refused["cause"]
    async with agent(place, authority(ca, place, server_name="ca.example"), ttl=TTL) as running:
        await running.first()


# Revocation


def listed(running: Running) -> tuple[x509.CertificateRevocationList, ...]:
    """The revocation lists that Envoys are given."""
    bundle = running.parts.store.snapshot["ROOTCA"]
    assert isinstance(bundle, BundleSecret)
    return read_crls(bundle.lists_pem)


async def with_lists(ca: RealStepCa) -> None:
    """As docs/authorities/step-ca.md has it."""
    ca.lists, ca.options = LISTS, {"x509": {"template": LISTED_SVID}}
    await ca.restart()


async def test_a_revoked_certificate_is_in_the_list_that_envoys_get(ca: RealStepCa, place: Path) -> None:
    await with_lists(ca)
    async with agent(place, authority(ca, place, revocation_lists=True), ttl="1h") as running:
        leaf = await running.first()
        await running.event("revocation_on")
        (before,) = listed(running)
        assert before.get_revoked_certificate_by_serial_number(leaf.serial_number) is None
        await ca.revoke(leaf)
        await running.event("lists_changed", count=2)
        (after,) = listed(running)
        assert after.get_revoked_certificate_by_serial_number(leaf.serial_number) is not None
        assert after.last_update_utc >= before.last_update_utc
        assert running.events.named("lists_left_out") == []
        assert running.events.named("revocation_off") == []


async def test_a_template_without_the_lists_address_keeps_the_list_back(ca: RealStepCa, place: Path) -> None:
    """Envoy would refuse every certificate."""
    ca.lists = LISTS
    await ca.restart()
    async with agent(place, authority(ca, place, revocation_lists=True), ttl="1h") as running:
        (cause,) = (await running.event("lists_left_out"))["causes"]
        assert "have the CA write that CRL distribution point into every certificate" in cause
        await running.event("revocation_off")
        assert listed(running) == ()


async def test_a_step_ca_without_lists_is_named(ca: RealStepCa, place: Path) -> None:
    async with agent(place, authority(ca, place, revocation_lists=True), ttl="1h") as running:
        assert "publishes no revocation list (404" in (await running.event("lists_not_refreshed"))["cause"]
        await running.event("revocation_off")
        await running.first()


async def test_the_lists_of_both_cas_are_served_through_new_keys_of_the_ca(ca: RealStepCa, place: Path) -> None:
    """While the new root has no list below it there is none at all; then both go out."""
    await with_lists(ca)
    async with agent(place, authority(ca, place, revocation_lists=True), ttl=TTL) as running:
        leaf = await running.first()
        await running.event("revocation_on")
        old = ca.root
        new = ca.make_signer("step root 2", "step intermediate 2")
        ca.roots = [old, new.root]
        await ca.restart()
        await running.bundle_with(old.certificate, new.root.certificate)
        assert listed(running) == ()
        ca.root, ca.signer, ca.roots = new.root, new.signer, [new.root, old]
        await ca.restart()
        while running.chain()[0].issuer != ca.signer.certificate.subject:
            await running.more()
        await running.event("revocation_on", count=2)
        issuers = {each.issuer for each in listed(running)}
        assert issuers == {leaf.issuer, ca.signer.certificate.subject}
        assert running.events.named("retrying") == []
