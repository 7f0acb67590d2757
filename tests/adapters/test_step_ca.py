"""The client of step-ca against a stand-in that keeps its contract: what a user gets, and reads where it fails."""

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from fakes.clocks import HandClock
from fakes.events import Events, recorded
from fakes.hierarchy import Ca, common_name, key_usage, make_ca, make_leaf, new_key
from fakes.https_server import Reply, Request, json_reply
from fakes.odd_certificates import NOT_READ, together
from fakes.ports import reserved_port
from fakes.step_ca_server import BACKDATE, DAY, StepCaStandIn, jwk_of, write_jwk

from sds_agent.authority.kind import Context
from sds_agent.authority.protocol import (
    AdvertisesAnchors,
    AdvertisesLists,
    AuthorityError,
    CurrentIdentity,
    ErrorKind,
    Issuance,
    IssueRequest,
)
from sds_agent.authority.step_ca.client import StepCaAuthority
from sds_agent.authority.step_ca.kind import KIND
from sds_agent.authority.step_ca.roots import NAME
from sds_agent.authority.step_ca.settings import StepCaSettings
from sds_agent.clock import SystemClock
from sds_agent.errors import Problem
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted, accept
from sds_agent.issuance.lists import read_lists
from sds_agent.pki.certificates import read_bundle, read_pem, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, PrivateKey, generate, to_pkcs8_pem
from sds_agent.state import Restorable

WEB = SpiffeId.parse("spiffe://demo.example/ns/default/sa/web")
HOUR = timedelta(hours=1)
PASSWORD = b"a long passphrase"


@asynccontextmanager
async def step_ca() -> AsyncIterator[StepCaStandIn]:
    async with StepCaStandIn().serving() as ca:
        yield ca


def settings(folder: Path, ca: StepCaStandIn, **changed: Any) -> StepCaSettings:
    files = {} if "jwk_file" in changed else write_jwk(folder, ca)
    given: dict[str, Any] = {"fingerprint": ca.fingerprint, **files, **changed}
    return StepCaSettings(url=ca.server.url, provisioner="sds", **given)


def context(folder: Path) -> Context:
    return Context("step", "demo.example", folder / "state", SystemClock())


def client(folder: Path, ca: StepCaStandIn, **changed: Any) -> StepCaAuthority:
    return StepCaAuthority(settings(folder, ca, **changed), context(folder))


class Workload:
    """A key of its own for each request, and the check that what came back can be served."""

    def __init__(self, identity: SpiffeId = WEB, ttl: timedelta = HOUR) -> None:
        self.identity = identity
        self.ttl = ttl
        self.key: PrivateKey = generate(KeyType.EC_P256)

    def request(self, current: CurrentIdentity | None = None) -> IssueRequest:
        self.key = generate(KeyType.EC_P256)
        return IssueRequest(self.identity, make_csr(self.key, str(self.identity)), self.ttl, "id", current)

    def accepted(self, issuance: Issuance) -> Accepted:
        return accept(
            issuance, identity=self.identity, public_key=self.key.public_key(), anchors=(), now=datetime.now(UTC)
        )

    async def issued(self, authority: StepCaAuthority, current: CurrentIdentity | None = None) -> CurrentIdentity:
        """A certificate that would be served, with its key."""
        accepted = self.accepted(await authority.issue(self.request(current)))
        return CurrentIdentity(write_pem(accepted.chain), to_pkcs8_pem(self.key))


def leaf(identity: CurrentIdentity) -> x509.Certificate:
    return read_pem(identity.chain_pem)[0]


async def failed(authority: StepCaAuthority, request: IssueRequest | None = None) -> AuthorityError:
    with pytest.raises(AuthorityError) as caught:
        await authority.issue(request or Workload().request())
    return caught.value


@pytest.fixture
def events() -> Iterator[Events]:
    with recorded() as seen:
        yield seen


# The first certificate


async def test_a_fingerprint_and_an_encrypted_key_give_a_certificate_that_can_be_served(tmp_path: Path) -> None:
    async with step_ca() as ca:
        authority = client(tmp_path, ca, **write_jwk(tmp_path, ca, PASSWORD))
        got = await Workload().issued(authority)
    assert leaf(got).not_valid_after_utc - leaf(got).not_valid_before_utc == HOUR + BACKDATE


async def test_a_file_of_roots_in_place_of_the_fingerprint_needs_no_unverified_connection(tmp_path: Path) -> None:
    (tmp_path / "roots.pem").write_bytes(b"")
    async with step_ca() as ca:
        (tmp_path / "roots.pem").write_bytes(ca.server.roots_pem)
        await Workload().issued(client(tmp_path, ca, fingerprint=None, ca_file=tmp_path / "roots.pem"))
        assert ca.asked(f"/root/{ca.fingerprint}") == []


async def test_another_root_than_the_pinned_one_is_refused_before_a_token_is_sent(tmp_path: Path) -> None:
    """Who answers the first request is not known: the hash alone decides."""
    other = make_ca("impostor")

    async def impostor(_request: Request) -> Reply:
        return Reply(200, json.dumps({"ca": write_pem([other.certificate]).decode()}).encode())

    async with step_ca() as ca:
        ca.server.answer = impostor
        error = await failed(client(tmp_path, ca))
        assert ca.asked("/1.0/sign") == []
    assert error.kind is ErrorKind.INVALID
    assert "answered with another root than the one with the fingerprint" in str(error)


async def test_a_server_that_the_pinned_root_does_not_vouch_for_gets_no_token(tmp_path: Path) -> None:
    async with step_ca() as ca:
        chosen = settings(tmp_path, ca)
        ca.roots, ca.federated = [], [ca.root]  # it still gives the root
        ca.server.ca = make_ca("another", **ca.validity)
        async with ca.server.serving():
            authority = StepCaAuthority(StepCaSettings(**{**_fields(chosen), "url": ca.server.url}), context(tmp_path))
            error = await failed(authority)
            assert ca.asked("/1.0/sign") == []
    assert error.kind is ErrorKind.TRANSIENT
    assert "the root with the fingerprint and those announced since do not vouch for the certificate" in str(error)
    assert "set fingerprint" in str(error)


def _fields(chosen: StepCaSettings) -> dict[str, Any]:
    return {name: getattr(chosen, name) for name in chosen.__struct_fields__}


async def test_an_unknown_fingerprint_names_the_command_that_prints_the_right_one(tmp_path: Path) -> None:
    async with step_ca() as ca:
        error = await failed(client(tmp_path, ca, fingerprint="0" * 64))
    assert error.kind is ErrorKind.INVALID
    assert "`step certificate fingerprint root_ca.crt`" in str(error)


async def test_an_x5c_certificate_asks_in_place_of_a_key(tmp_path: Path) -> None:
    root = make_ca("devices", **StepCaStandIn().validity)
    async with step_ca() as ca:
        ca.x5c_root = root.certificate
        files = write_x5c(tmp_path, root)
        await Workload().issued(client(tmp_path, ca, jwk_file=None, **files))
        (asked,) = ca.asked("/1.0/sign")
    header = jwt.get_unverified_header(asked.json["ott"])
    assert len(header["x5c"]) == 1


def write_x5c(folder: Path, root: Ca, **changed: Any) -> dict[str, Path]:
    key = new_key()
    times = {"not_before": datetime.now(UTC) - HOUR, "not_after": datetime.now(UTC) + HOUR}
    device = make_leaf(root, None, key=key, subject=common_name("device"), **{**times, **changed})
    (folder / "device.pem").write_bytes(write_pem([device]))
    (folder / "device.key").write_bytes(to_pkcs8_pem(key))
    return {"certificate_file": folder / "device.pem", "key_file": folder / "device.key"}


# Tokens


async def test_every_attempt_has_a_token_of_its_own(tmp_path: Path) -> None:
    """step-ca takes no token a second time, also where the request with it failed."""
    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        too_long = Workload(ttl=100 * DAY)
        refused = await failed(authority, too_long.request())
        assert refused.kind is ErrorKind.DENIED
        await Workload().issued(authority)
        first, second = (
            jwt.decode(each.json["ott"], options={"verify_signature": False}) for each in ca.asked("/1.0/sign")
        )
    assert first["jti"] != second["jti"]
    assert second["sans"] == [str(WEB)]
    assert second["exp"] - second["nbf"] == 300


def claims(sent: Request) -> dict[str, Any]:
    return jwt.decode(sent.json["ott"], options={"verify_signature": False})


async def test_sign_never_sees_a_certificate(tmp_path: Path) -> None:
    """An expired one would break the connection in spite of the token."""
    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        web = Workload()
        first = await web.issued(authority)
        ca.renewal_disabled = True
        await web.issued(authority, first)
        assert [each.certificate for each in ca.asked("/1.0/sign")] == [None, None]
        assert [each.certificate for each in ca.asked("/1.0/rekey")] == [leaf(first)]


async def test_a_key_that_is_replaced_signs_the_next_token(tmp_path: Path) -> None:
    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        right = (tmp_path / "sds.jwk").read_text()
        (tmp_path / "sds.jwk").write_text(json.dumps(jwk_of(new_key())))
        assert (await failed(authority)).kind is ErrorKind.UNAUTHENTICATED
        (tmp_path / "sds.jwk").write_text(right)
        await Workload().issued(authority)


async def test_space_at_the_end_of_a_password_counts_no_more_than_for_step(tmp_path: Path) -> None:
    """`step crypto jwk create --password-file` takes the same file, and trims it."""
    async with step_ca() as ca:
        files = write_jwk(tmp_path, ca, PASSWORD)
        authority = client(tmp_path, ca, **files)
        for end in (b" \n", b"\r\n\n"):
            files["password_file"].write_bytes(PASSWORD + end)
            await Workload().issued(authority)


async def test_a_password_that_is_replaced_counts_for_the_next_token(tmp_path: Path) -> None:
    async with step_ca() as ca:
        files = write_jwk(tmp_path, ca, PASSWORD)
        authority = client(tmp_path, ca, **files)
        await Workload().issued(authority)
        files["password_file"].write_text("another one")
        error = await failed(authority)
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert "cannot be decrypted; the password is wrong" in str(error)


async def test_many_workloads_at_once_read_the_roots_once(tmp_path: Path) -> None:
    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        workloads = [Workload(SpiffeId.parse(f"spiffe://demo.example/w{number}")) for number in range(5)]
        await asyncio.gather(*(each.issued(authority) for each in workloads))
        assert len(ca.asked("/1.0/roots")) == 1
        assert len({claims(each)["jti"] for each in ca.asked("/1.0/sign")}) == 5


@pytest.mark.parametrize("held", ["/1.0/roots", "/1.0/federation"])
async def test_a_root_that_another_caller_has_read_meanwhile_is_not_dropped(tmp_path: Path, held: str) -> None:
    reached, go = asyncio.Event(), asyncio.Event()

    async def holding(request: Request) -> Reply:
        reply = await ca.answer(request)
        if request.path == held and not reached.is_set():
            reached.set()
            await go.wait()
        return reply

    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        ca.server.answer = holding
        reading = asyncio.create_task(authority.anchors())
        await reached.wait()
        ca.roots.append(make_ca("new root", **ca.validity))
        new = await authority.anchors()
        assert len(read_pem(new)) == 2
        go.set()
        assert await reading == new


@pytest.mark.parametrize("paths", [("/1.0/roots",), ("/1.0/federation",), ("/1.0/roots", "/1.0/federation")])
async def test_a_root_that_cannot_be_read_is_told_once_beside_the_others(
    tmp_path: Path, paths: tuple[str, ...]
) -> None:
    """Or nobody would hear that peers below it are refused (`anchors_left_out`). step-ca's federation has its roots."""

    async def odd(request: Request) -> Reply:
        if request.path not in paths:
            return await ca.answer(request)
        return json_reply({"crts": [bundle, write_pem([ca.root.certificate]).decode()]}, 201)

    bundle = together(NOT_READ["_ in PrintableString"]).decode()
    async with step_ca() as ca:
        ca.server.answer = odd
        authority = client(tmp_path, ca)
        told = read_bundle(await authority.anchors())
        assert ca.root.certificate in told.certificates
        assert len(told.left_out) == 1
        issuance = await authority.issue(Workload().request())
        assert issuance.anchors_pem == await authority.anchors()


async def test_server_name_is_the_audience_where_the_host_is_no_name_of_the_ca(tmp_path: Path) -> None:
    ca = StepCaStandIn()
    ca.names = ca.server.names = ("ca.example",)
    async with ca.serving():
        await Workload().issued(client(tmp_path, ca, server_name="ca.example"))
        (asked,) = ca.asked("/1.0/sign")
    assert claims(asked)["aud"] == f"https://ca.example:{ca.server.port}/1.0/sign"


# Renewal


async def test_renewals_are_by_rekey_with_new_keys(tmp_path: Path) -> None:
    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        web = Workload()
        current = await web.issued(authority)
        for _ in range(3):
            current = await web.issued(authority, current)
        assert len(ca.asked("/1.0/sign")) == 1
        assert len(ca.asked("/1.0/rekey")) == 3
        assert "ott" not in ca.asked("/1.0/rekey")[0].json
    assert leaf(current).not_valid_after_utc - leaf(current).not_valid_before_utc == HOUR + BACKDATE


async def test_a_ca_with_a_backdate_of_its_own_renews_by_rekey_after_the_first_signature(tmp_path: Path) -> None:
    async with step_ca() as ca:
        ca.backdate = timedelta(minutes=7)
        web = Workload()
        first = await web.issued(client(tmp_path, ca))
        authority = client(tmp_path, ca)  # after a restart, which does not know the backdate
        second = await web.issued(authority, first)
        await web.issued(authority, second)
        assert len(ca.asked("/1.0/sign")) == 2
        assert len(ca.asked("/1.0/rekey")) == 1


async def test_with_rekey_turned_off_a_token_renews(tmp_path: Path) -> None:
    async with step_ca() as ca:
        authority = client(tmp_path, ca, rekey=False)
        web = Workload()
        await web.issued(authority, await web.issued(authority))
        assert len(ca.asked("/1.0/sign")) == 2
        assert ca.asked("/1.0/rekey") == []


async def test_an_expired_certificate_is_not_shown_and_a_token_asks_anew(tmp_path: Path) -> None:
    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        expired = held(ca.signer, WEB, HOUR, ago=2 * HOUR)
        await Workload().issued(authority, expired)
        assert ca.asked("/1.0/rekey") == []


def held(issuer: Ca, identity: SpiffeId, ttl: timedelta, ago: timedelta = timedelta(minutes=1)) -> CurrentIdentity:
    """A certificate that was issued so long ago."""
    key, since = new_key(), datetime.now(UTC) - ago
    made = make_leaf(
        issuer,
        str(identity),
        key=key,
        subject=common_name(str(identity)),
        not_before=since - BACKDATE,
        not_after=since + ttl,
    )
    return CurrentIdentity(write_pem([made, issuer.certificate]), to_pkcs8_pem(key))


@pytest.mark.parametrize("difference", ["identity", "ttl"])
async def test_a_changed_identity_or_ttl_is_signed_and_not_rekeyed(tmp_path: Path, difference: str) -> None:
    """step-ca's rekey copies both from the old certificate, whatever the CSR says."""
    other = SpiffeId.parse("spiffe://demo.example/other")
    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        old = held(ca.signer, other if difference == "identity" else WEB, HOUR / 2 if difference == "ttl" else HOUR)
        got = await Workload().issued(authority, old)
        assert ca.asked("/1.0/rekey") == []
        again = await Workload().issued(authority, got)
        assert len(ca.asked("/1.0/rekey")) == 1
    assert leaf(again).not_valid_after_utc - leaf(again).not_valid_before_utc == HOUR + BACKDATE


async def test_a_certificate_of_another_ca_costs_a_warning_and_no_renewal(tmp_path: Path, events: Events) -> None:
    """As after the removal of an old root: step-ca breaks the connection on which such a certificate is shown."""
    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        foreign = held(make_ca("foreign", **ca.validity), WEB, HOUR)
        for _ in range(2):
            await Workload().issued(authority, foreign)
        assert ca.asked("/1.0/rekey") == []
        assert len(ca.asked("/1.0/sign")) == 2
    (reported,) = events.named("certificate_not_taken")
    assert reported["level"] == "warning"


async def test_a_proxy_that_ends_tls_hides_the_certificate_and_costs_no_renewal(tmp_path: Path) -> None:
    async with step_ca() as ca:
        ca.server.trust = ()
        async with ca.server.serving():
            authority = client(tmp_path, ca)
            web = Workload()
            await web.issued(authority, await web.issued(authority))
            assert len(ca.asked("/1.0/rekey")) == 1
            assert len(ca.asked("/1.0/sign")) == 2


async def test_a_delay_counts_before_the_root_is_there_too(tmp_path: Path) -> None:
    async def busy(_request: Request) -> Reply:
        return Reply(429, b"", {"retry-after": "7"})

    async with step_ca() as ca:
        ca.server.answer = busy
        error = await failed(client(tmp_path, ca))
    assert (error.kind, error.retry_after) == (ErrorKind.THROTTLED, 7.0)


async def test_an_overloaded_ca_is_not_asked_twice_in_one_attempt(tmp_path: Path) -> None:
    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        web = Workload()
        first = await web.issued(authority)
        before = len(ca.server.requests)

        async def busy(_request: Request) -> Reply:
            return Reply(503, b"", {"retry-after": "7"})

        ca.server.answer = busy
        error = await failed(authority, web.request(first))
        assert len(ca.server.requests) == before + 1
    assert (error.kind, error.retry_after) == (ErrorKind.TRANSIENT, 7.0)


# Roots


async def test_the_roots_and_the_federated_ones_are_anchors(tmp_path: Path) -> None:
    async with step_ca() as ca:
        ca.federated = [make_ca("federated", **ca.validity), ca.root]
        authority = client(tmp_path, ca)
        assert isinstance(authority, AdvertisesAnchors)
        assert len(read_pem(await authority.anchors())) == 2
        assert len(read_pem(await client(tmp_path, ca, federation=False).anchors())) == 1


async def test_a_federated_root_does_not_vouch_for_the_server(tmp_path: Path, port: int) -> None:
    """It is the CA of others, who may issue for workloads and are not step-ca."""
    ca = StepCaStandIn()
    ca.federated = [make_ca("federated", **ca.validity)]
    async with ca.serving(port=port):
        authority = client(tmp_path, ca)
        assert len(read_pem(await authority.anchors())) == 2
    ca.server.ca = ca.federated[0]
    async with ca.serving(port=port):
        with pytest.raises(AuthorityError, match="do not vouch"):
            await authority.anchors()


async def test_an_announced_root_vouches_for_the_server_after_its_rotation(tmp_path: Path, port: int) -> None:
    ca = StepCaStandIn()
    async with ca.serving(port=port):
        authority = client(tmp_path, ca)
        web = Workload()
        first = await web.issued(authority)
        old = ca.rotate()
        ca.roots.append(old)  # what the operator does first: both are in `root`
        await authority.anchors()
    ca.roots, ca.federated = [ca.root], [old]
    async with ca.serving(port=port):
        second = await web.issued(authority, first)
        anchors = read_pem(await authority.anchors())
    assert leaf(second).issuer == ca.signer.certificate.subject
    assert set(anchors) == {ca.root.certificate, old.certificate}


async def test_an_agent_that_restarts_after_a_rotation_still_trusts_the_server(tmp_path: Path, port: int) -> None:
    """The pinned root vouches for nothing any more, and the announced one was stored."""
    ca = StepCaStandIn()
    async with ca.serving(port=port):
        chosen = settings(tmp_path, ca)
        old = ca.rotate()
        ca.roots.append(old)
        await StepCaAuthority(chosen, context(tmp_path)).anchors()
    ca.roots = [ca.root]
    async with ca.serving(port=port):
        await Workload().issued(StepCaAuthority(chosen, context(tmp_path)))
    stored = tmp_path / "state" / NAME
    assert stored.stat().st_mode & 0o077 == 0


@asynccontextmanager
async def restarted_after_a_rotation(folder: Path) -> AsyncIterator[StepCaAuthority]:
    """The client of an agent that stored the next root, of a step-ca that does not know the pinned one any more."""
    ca = StepCaStandIn()
    with reserved_port() as port:
        async with ca.serving(port=port):
            chosen = settings(folder, ca)
            old = ca.rotate()
            ca.roots.append(old)
            await StepCaAuthority(chosen, context(folder)).anchors()
            before = len(ca.asked(f"/root/{chosen.fingerprint}"))
        ca.roots = [ca.root]
        async with ca.serving(port=port):
            yield StepCaAuthority(chosen, context(folder))
            assert len(ca.asked(f"/root/{chosen.fingerprint}")) == before


async def test_what_is_asked_at_the_same_time_waits_for_the_stored_roots(tmp_path: Path) -> None:
    """A start asks for the first certificate and reads the anchors at once."""
    async with restarted_after_a_rotation(tmp_path) as authority:
        await asyncio.gather(authority.anchors(), Workload().issued(authority))


async def test_an_attempt_that_is_cancelled_while_the_roots_are_read_costs_no_later_one(tmp_path: Path) -> None:
    async with restarted_after_a_rotation(tmp_path) as authority:
        attempt = asyncio.create_task(authority.anchors())
        await asyncio.sleep(0)  # it begins to read them
        attempt.cancel()
        await asyncio.wait([attempt])
        assert attempt.cancelled()
        await Workload().issued(authority)


async def test_stored_roots_that_are_lost_are_written_again(tmp_path: Path) -> None:
    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        assert isinstance(authority, Restorable)
        assert authority.put_back() is None
        await authority.anchors()
        stored = tmp_path / "state" / NAME
        content = stored.read_bytes()
        restarted = client(tmp_path, ca)
        await restarted.anchors()
        for each in (authority, restarted):
            stored.unlink()
            assert each.put_back() == stored
            assert stored.read_bytes() == content


@pytest.mark.parametrize("fault", ["damaged", "of another fingerprint", "written by others"])
async def test_stored_roots_that_cannot_be_trusted_are_not_used(tmp_path: Path, events: Events, fault: str) -> None:
    async with step_ca() as ca:
        await client(tmp_path, ca).anchors()
        stored = tmp_path / "state" / NAME
        if fault == "damaged":
            stored.write_text("{")
        elif fault == "written by others":
            stored.chmod(0o666)
        else:
            stored.write_text(stored.read_text().replace(ca.fingerprint, "0" * 64))
        before = len(ca.asked(f"/root/{ca.fingerprint}"))
        await client(tmp_path, ca).anchors()
        assert len(ca.asked(f"/root/{ca.fingerprint}")) == before + 1
    assert len(events.named("server_roots_not_restored")) == (fault != "of another fingerprint")


async def test_a_disk_that_takes_no_roots_costs_no_certificate(tmp_path: Path, events: Events) -> None:
    (tmp_path / "state").write_text("a file in the directory's place")
    async with step_ca() as ca:
        await Workload().issued(client(tmp_path, ca))
    (reported,) = events.named("server_roots_not_stored")
    assert "cannot write step-ca's roots" in reported["cause"]


async def test_another_file_of_roots_ends_the_trust_in_what_the_former_server_announced(
    tmp_path: Path, port: int
) -> None:
    ca = StepCaStandIn()
    file = tmp_path / "roots.pem"
    async with ca.serving(port=port):
        file.write_bytes(ca.server.roots_pem)
        authority = client(tmp_path, ca, fingerprint=None, ca_file=file)
        ca.roots.append(ca.rotate())
        await authority.anchors()
    async with ca.serving(port=port):
        await authority.anchors()
        file.write_bytes(write_pem([make_ca("another").certificate]))
        with pytest.raises(AuthorityError, match="do not vouch"):
            await authority.anchors()


async def test_a_new_intermediate_below_a_new_root_brings_its_anchor_along(tmp_path: Path) -> None:
    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        await Workload().issued(authority)
        ca.rotate()
        got = await Workload().issued(authority)
    assert leaf(got).issuer == ca.signer.certificate.subject


# Failures


async def test_a_401_lists_what_to_check(tmp_path: Path) -> None:
    """step-ca gives no reason to the caller."""
    async with step_ca() as ca:
        ca.names = ("ca.internal",)
        error = await failed(client(tmp_path, ca))
        assert ca.reasons
    assert error.kind is ErrorKind.UNAUTHENTICATED
    said = str(error)
    assert "step-ca's own log alone has the reason" in said
    for hint in ("'sds' is of the type JWK", "jwk_file holds its key", "dnsNames", "server_name", "clocks"):
        assert hint in said


@pytest.mark.parametrize(
    ("provisioners", "said"),
    [
        ([{"type": "JWK", "name": "other"}], "it has no provisioner 'sds'; set provisioner to one of 'other'"),
        ([{"type": "ACME", "name": "other"}], "it has no provisioner 'sds'; add one to its ca.json"),
        ([{"type": "x"}, {"type": "ACME", "name": "sds"}], "its provisioner 'sds' is of the type ACME"),
        (
            [{"type": "JWK", "name": "sds", "key": {"kid": "changed"}}],
            "its provisioner 'sds' has the key 'changed', and jwk_file holds 'the-key-of-sds'",
        ),
    ],
)
async def test_a_401_for_another_provisioner_says_which_there_are(
    tmp_path: Path, provisioners: list[dict[str, object]], said: str
) -> None:
    async with step_ca() as ca:
        ca.provisioners, ca.names = provisioners, ("nothing.fits",)
        error = await failed(client(tmp_path, ca))
    assert said in str(error)
    assert error.kind is ErrorKind.UNAUTHENTICATED


async def test_a_401_for_a_wrong_clock_says_how_far_it_is_off(tmp_path: Path) -> None:
    clock = HandClock()
    async with step_ca() as ca:
        (tmp_path / "roots.pem").write_bytes(ca.server.roots_pem)
        chosen = settings(tmp_path, ca, fingerprint=None, ca_file=tmp_path / "roots.pem")
        ca.now = lambda: clock.now() + timedelta(seconds=500)
        authority = StepCaAuthority(chosen, Context("step", "demo.example", tmp_path / "state", clock))
        error = await failed(authority)
    assert "this machine's is 500 s behind step-ca's" in str(error)


async def test_a_403_quotes_the_reason(tmp_path: Path) -> None:
    async with step_ca() as ca:
        error = await failed(client(tmp_path, ca), Workload(ttl=100 * DAY).request())
    assert error.kind is ErrorKind.DENIED
    assert "403: requested duration of 8640000s is more than the authorized maximum" in str(error)
    assert "maxTLSCertDuration" in str(error)


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (Reply(400, b'{"status":400,"message":"missing csr"}'), ErrorKind.INVALID, "400: missing csr"),
        (Reply(404, b"404 page not found\n"), ErrorKind.INVALID, "is no step-ca"),
        (Reply(429, b"", {"retry-after": "3"}), ErrorKind.THROTTLED, "asked less often"),
        (Reply(500, b'{"message":"boom"}'), ErrorKind.TRANSIENT, "500: boom"),
        (Reply(308, b"", {"location": "https://else.example"}), ErrorKind.INVALID, "follows no redirect"),
        (Reply(204, b""), ErrorKind.INVALID, "(204)"),
        (Reply(201, b"<html>"), ErrorKind.INVALID, "is not what step-ca sends"),
        (Reply(201, b"{}"), ErrorKind.INVALID, "holds no certificate"),
    ],
)
async def test_a_failure_says_who_has_to_act(tmp_path: Path, reply: Reply, kind: ErrorKind, said: str) -> None:
    async with step_ca() as ca:
        authority = client(tmp_path, ca)
        await authority.anchors()

        async def answer(_request: Request) -> Reply:
            return reply

        ca.server.answer = answer
        error = await failed(authority)
    assert error.kind is kind
    assert said in str(error)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"uri": None}, '"sans": {{ toJson .SANs }}'),
        ({"usages": [ExtendedKeyUsageOID.SERVER_AUTH]}, '"extKeyUsage": ["serverAuth", "clientAuth"]'),
    ],
)
async def test_a_template_that_spoils_certificates_is_named_with_the_line_that_it_lacks(
    tmp_path: Path, changed: dict[str, Any], line: str
) -> None:
    async with step_ca() as ca:
        ca.issue = lambda csr: [make_leaf(ca.signer, **{"uri": str(WEB), "key": csr, **ca.validity, **changed})]
        error = await failed(client(tmp_path, ca))
    assert error.kind is ErrorKind.MISMATCH
    assert f"put {line} into the template of the provisioner" in str(error)


async def test_no_roots_no_token_is_spent(tmp_path: Path) -> None:
    async with step_ca() as ca:

        async def without_roots(request: Request) -> Reply:
            return Reply(500) if request.path == "/1.0/roots" else await ca.answer(request)

        ca.server.answer = without_roots
        error = await failed(client(tmp_path, ca))
        assert ca.asked("/1.0/sign") == []
    assert error.kind is ErrorKind.TRANSIENT


async def test_a_silent_ca_ends_with_the_callers_deadline(tmp_path: Path) -> None:
    async with step_ca() as ca:
        arrived, never = asyncio.Event(), asyncio.Event()

        async def silent(_request: Request) -> None:
            arrived.set()
            await never.wait()

        ca.server.answer = silent
        task = asyncio.create_task(client(tmp_path, ca).issue(Workload().request()))
        await arrived.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


# Credentials and secrets


def found(folder: Path, ca: StepCaStandIn, **changed: Any) -> list[Problem]:
    chosen = settings(folder, ca, **changed)
    return list(KIND.credentials(chosen, context(folder)))


def test_good_credentials_are_not_complained_of(tmp_path: Path) -> None:
    ca = StepCaStandIn()
    assert found(tmp_path, ca) == []
    assert found(tmp_path, ca, **write_jwk(tmp_path, ca, PASSWORD)) == []
    assert found(tmp_path, ca, jwk_file=None, **write_x5c(tmp_path, make_ca("devices"))) == []


def test_what_is_wrong_with_a_key_is_said_before_the_first_call(tmp_path: Path) -> None:
    ca = StepCaStandIn()
    files = write_jwk(tmp_path, ca, PASSWORD)
    (without,) = found(tmp_path, ca, jwk_file=files["jwk_file"])
    assert without.where == ("jwk_file",)
    assert "is encrypted and there is no password; name" in str(without)
    files["password_file"].write_text("wrong")
    (wrong,) = found(tmp_path, ca, **files)
    assert (wrong.where, "cannot be decrypted" in wrong.found) == (("password_file",), True)
    files["password_file"].unlink()
    (gone,) = found(tmp_path, ca, **files)
    assert str(files["password_file"]) in gone.found
    files["jwk_file"].write_text(json.dumps(jwk_of(ca.key, private=False)))
    (public,) = found(tmp_path, ca, jwk_file=files["jwk_file"])
    assert (public.where, "is a public key" in public.found) == (("jwk_file",), True)
    files["jwk_file"].unlink()
    (gone,) = found(tmp_path, ca, jwk_file=files["jwk_file"])
    assert (gone.where, str(files["jwk_file"]) in gone.found) == (("jwk_file",), True)


def test_what_is_wrong_with_an_x5c_certificate_is_said_before_the_first_call(tmp_path: Path) -> None:
    ca, root, now = StepCaStandIn(), make_ca("devices"), datetime.now(UTC)
    (expired,) = found(tmp_path, ca, jwk_file=None, **write_x5c(tmp_path, root, not_after=now - HOUR / 2))
    assert "expired at" in expired.found
    (ahead,) = found(tmp_path, ca, jwk_file=None, **write_x5c(tmp_path, root, not_before=now + HOUR / 2))
    assert "is valid only from" in ahead.found
    usage = key_usage(cert_sign=True)
    (unfit,) = found(tmp_path, ca, jwk_file=None, **write_x5c(tmp_path, root, usage=usage))
    assert "lacks digitalSignature" in unfit.found
    files = write_x5c(tmp_path, root)
    files["key_file"].write_bytes(to_pkcs8_pem(new_key()))
    (other,) = found(tmp_path, ca, jwk_file=None, **files)
    assert "do not belong together" in other.found


async def test_no_key_no_password_and_no_token_is_in_what_a_user_sees(tmp_path: Path, events: Events) -> None:
    async with step_ca() as ca:
        authority = client(tmp_path, ca, **write_jwk(tmp_path, ca, PASSWORD))
        await authority.anchors()

        async def echoes(request: Request) -> Reply:
            return Reply(
                401, json.dumps({"message": request.json["ott"] if request.path == "/1.0/sign" else ""}).encode()
            )

        ca.server.answer = echoes
        error = await failed(authority)
        token = ca.asked("/1.0/sign")[0].json["ott"]
    secrets = [PASSWORD.decode(), *token.split("."), token[:40], jwk_of(ca.key)["d"]]
    shown = "".join(traceback.format_exception(error)) + str(events.seen) + repr(vars(authority))
    shown += repr(vars(authority._proofs)) + logging.Formatter().formatException((type(error), error, None))
    assert [each for each in secrets if each in shown] == []


# Revocation


async def test_the_list_comes_with_the_cas_that_may_have_signed_it(tmp_path: Path) -> None:
    """Before the first certificate, and at once where another intermediate signs, the list can be checked."""
    async with step_ca() as ca:
        ca.revoke(make_leaf(ca.signer))
        advertised = await client(tmp_path, ca, revocation_lists=True).lists()
    (found,) = read_lists(advertised.lists)
    assert found.crl == ca.crl
    assert read_pem(advertised.issuers_pem) == (ca.signer.certificate,)


async def test_an_older_step_ca_gives_its_list_alone(tmp_path: Path) -> None:
    async with step_ca() as ca:
        ca.revoke()
        ca.names_intermediates = False
        advertised = await client(tmp_path, ca, revocation_lists=True).lists()
    assert (len(advertised.lists), advertised.issuers_pem) == (1, b"")


async def test_a_step_ca_without_lists_is_answered_with_the_lines_to_add(tmp_path: Path) -> None:
    async with step_ca() as ca:
        with pytest.raises(AuthorityError, match=r'set "crl": \{"enabled": true') as caught:
            await client(tmp_path, ca, revocation_lists=True).lists()
    assert caught.value.kind is ErrorKind.INVALID


async def test_a_step_ca_that_is_not_ready_is_asked_for_its_list_again(tmp_path: Path) -> None:
    """That is no matter of its ca.json."""
    async with step_ca() as ca:
        authority = client(tmp_path, ca, revocation_lists=True)
        await authority.anchors()

        async def unready(_request: Request) -> Reply:
            return Reply(503, b'{"status":503,"message":"not ready"}', {})

        ca.server.answer = unready
        with pytest.raises(AuthorityError, match="not ready") as caught:
            await authority.lists()
    assert caught.value.kind is ErrorKind.TRANSIENT
    assert "ca.json" not in str(caught.value)


def test_lists_are_asked_for_where_the_configuration_says_so() -> None:
    assert StepCaSettings(url="https://ca.example", provisioner="sds").revocation_lists is False


async def test_the_authority_says_whether_it_is_to_be_asked_for_lists(tmp_path: Path) -> None:
    async with step_ca() as ca:
        for wanted in (False, True):
            authority = client(tmp_path, ca, revocation_lists=wanted)
            assert isinstance(authority, AdvertisesLists)
            assert authority.revocation_lists is wanted
