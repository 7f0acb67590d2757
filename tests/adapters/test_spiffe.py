"""The client of a SPIFFE Workload API against a real gRPC server on a Unix socket."""

import socket
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import grpc
import pytest
from anyio.lowlevel import checkpoint
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from fakes.configurations import problems, settings
from fakes.events import Events, recorded
from fakes.hierarchy import make_ca
from fakes.workload_api import NO_IDENTITY, Gone, SpireCa, WorkloadApi, der, message

from sds_agent import app
from sds_agent.authority import registry
from sds_agent.authority.kind import Context
from sds_agent.authority.protocol import (
    AdvertisesFederation,
    AnnouncesAnchors,
    AuthorityError,
    ErrorKind,
    Supplied,
    Supplier,
)
from sds_agent.authority.spiffe.client import SpiffeSupplier
from sds_agent.authority.spiffe.settings import SpiffeSettings
from sds_agent.authority.spiffe.wire import LARGEST_MESSAGE, MOST
from sds_agent.cli.explanation import explain, warnings
from sds_agent.clock import SystemClock
from sds_agent.config.loading import load
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import accept
from sds_agent.pki.certificates import read_pem
from sds_agent.pki.keyfile import read_private_key
from sds_agent.secrets.model import BundleSecret, CertificateSecret

URI = "spiffe://demo.example/web"
OTHER = "spiffe://demo.example/api"
WEB = SpiffeId.parse(URI)


@pytest.fixture
def ca() -> SpireCa:
    return SpireCa()


@pytest.fixture
def api(tmp_path: Path) -> WorkloadApi:
    return WorkloadApi(tmp_path / "a#%41 b.sock")  # as a URL it would lead elsewhere


@pytest.fixture
def events() -> Iterator[Events]:
    with recorded() as seen:
        yield seen


@asynccontextmanager
async def client(
    api: WorkloadApi, *, hint: str | None = None, first_message: float = 5.0
) -> AsyncIterator[SpiffeSupplier]:
    """The client of that API, with its stream, inside this context."""
    chosen = SpiffeSettings(socket=api.socket, hint=hint)
    supplier = SpiffeSupplier(
        chosen, "demo.example", SystemClock(), first_message=first_message, randomness=lambda: 0.0
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(supplier.run)
        yield supplier
        tasks.cancel_scope.cancel()


async def given(supplier: SpiffeSupplier, held: bytes | None = None, identity: SpiffeId = WEB) -> Supplied:
    """The next certificate."""
    with anyio.fail_after(10):
        return await supplier.supply(identity, held)


async def given_after_all(supplier: SpiffeSupplier, held: bytes | None = None) -> Supplied:
    """The next certificate, asked for again after every error, as the agent does."""
    with anyio.fail_after(10):
        while True:
            try:
                return await supplier.supply(WEB, held)
            except AuthorityError:
                await checkpoint()


async def refused(supplier: SpiffeSupplier, identity: SpiffeId = WEB, held: bytes | None = None) -> AuthorityError:
    """The error in place of a certificate."""
    with anyio.fail_after(10), pytest.raises(AuthorityError) as caught:
        await supplier.supply(identity, held)
    return caught.value


def leaf(supplied: Supplied) -> x509.Certificate:
    """The leaf, after all the checks there are."""
    key = read_private_key(supplied.private_key_pem).public_key()
    return accept(supplied.issuance, identity=WEB, public_key=key, anchors=(), now=datetime.now(UTC)).leaf


# --- certificates ---


async def test_a_certificate_of_spires_kind_is_accepted_with_its_key_and_bundle(ca: SpireCa, api: WorkloadApi) -> None:
    api.give(message(ca.svid(URI)))
    async with api.serving(), client(api) as supplier:
        assert isinstance(supplier, Supplier)
        assert isinstance(supplier, AnnouncesAnchors)
        assert isinstance(supplier, AdvertisesFederation)
        supplied = await given(supplier)
        assert leaf(supplied).subject.rfc4514_string() == "O=SPIRE,C=US"
        assert supplied.issuance.anchors_pem is not None
        assert read_pem(supplied.issuance.anchors_pem) == (ca.ca.certificate,)
        assert read_pem(await supplier.anchors()) == (ca.ca.certificate,)
        assert api.headers[0]["workload.spiffe.io"] == "true"


async def test_each_rotation_is_given_as_it_comes_and_a_repeated_message_is_not(ca: SpireCa, api: WorkloadApi) -> None:
    first = message(ca.svid(URI), ca.svid(OTHER))
    again = message(*reversed(first.svids))
    api.give(first, again, first)
    async with api.serving(), client(api) as supplier:
        supplied = await given(supplier)
        held = supplied.issuance.chain_pem
        await api.have_sent(3)
        for _ in range(3):
            async with anyio.create_task_group() as tasks:
                got: list[Supplied] = []

                async def wait(held: bytes = held, got: list[Supplied] = got) -> None:
                    got.append(await given(supplier, held))

                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                assert got == []
                new = message(ca.svid(URI))
                api.give(new, new)
            assert leaf(got[0]).serial_number != leaf(supplied).serial_number
            supplied, held = got[0], got[0].issuance.chain_pem
        assert api.calls == 1


async def test_the_certificate_is_chosen_by_its_id_whatever_the_order(ca: SpireCa, api: WorkloadApi) -> None:
    svids = [ca.svid(OTHER), ca.svid(URI), ca.svid("spiffe://demo.example/web/more")]
    async with api.serving(), client(api) as supplier:
        api.give(message(*svids))
        first = await given(supplier)
        leaf(first)
        api.give(message(*reversed(svids)))
        await api.have_sent(2)
        assert (await given(supplier)).issuance == first.issuance


async def test_of_entries_with_one_id_that_with_the_hint_is_taken(ca: SpireCa, api: WorkloadApi) -> None:
    inside, outside = ca.svid(URI, hint="internal"), ca.svid(URI, hint="external")
    api.give(message(outside, inside))
    async with api.serving(), client(api, hint="internal") as supplier:
        assert leaf(await given(supplier)).public_bytes(Encoding.DER) == inside.x509_svid
    async with api.serving(), client(api, hint="other") as supplier:
        error = await refused(supplier)
        assert error.kind is ErrorKind.DENIED
        assert "with the hint 'other' but the hints 'external', 'internal'; correct hint" in str(error)


async def test_an_id_that_is_not_given_is_named_beside_those_that_are(ca: SpireCa, api: WorkloadApi) -> None:
    api.give(message(*(ca.svid(f"spiffe://demo.example/{n}") for n in range(7))))
    async with api.serving(), client(api) as supplier:
        error = await refused(supplier)
        assert error.kind is ErrorKind.DENIED
        assert f"no certificate for {URI} but 'spiffe://demo.example/0', " in str(error)
        assert "2 more; register an entry" in str(error)
        another = await given(supplier, identity=SpiffeId.parse("spiffe://demo.example/3"))
        assert another.issuance.chain_pem


# --- errors ---


async def test_without_an_entry_the_error_says_how_to_register_one_and_the_entry_is_noticed(
    ca: SpireCa, api: WorkloadApi
) -> None:
    api.give(NO_IDENTITY)
    async with api.serving(), client(api) as supplier:
        error = await refused(supplier)
        assert error.kind is ErrorKind.DENIED
        assert "(PERMISSION_DENIED: no identity issued); register an entry whose selectors fit" in str(error)
        await api.called(3)
        api.give(message(ca.svid(URI)))
        leaf(await given_after_all(supplier))


async def test_an_entry_that_is_deleted_is_an_error_and_one_that_is_registered_again_is_served(
    ca: SpireCa, api: WorkloadApi
) -> None:
    api.give(message(ca.svid(URI)))
    async with api.serving(), client(api) as supplier:
        held = (await given(supplier)).issuance.chain_pem
        api.give(NO_IDENTITY)
        assert (await refused(supplier, held=held)).kind is ErrorKind.DENIED
        assert read_pem(await supplier.anchors()) == (ca.ca.certificate,), "what is served still chains to it"
        api.give(message(ca.svid(URI)))
        assert (await given_after_all(supplier, held)).issuance.chain_pem != held


async def test_an_agent_that_is_away_is_found_again(ca: SpireCa, api: WorkloadApi) -> None:
    async with client(api) as supplier:
        error = await refused(supplier)
        assert error.kind is ErrorKind.TRANSIENT
        assert f"the Workload API at {api.socket} gives no certificate (UNAVAILABLE: there is no socket); " in str(
            error
        )
        for _ in range(3):
            api.give(message(ca.svid(URI)))
            async with api.serving():
                held = (await given_after_all(supplier)).issuance.chain_pem
            assert (await refused(supplier, held=held)).kind is ErrorKind.TRANSIENT
            assert read_pem(await supplier.anchors()) == (ca.ca.certificate,)


@pytest.mark.parametrize(("kind", "said"), [("file", "no process listens there"), ("left", "no process listens there")])
async def test_a_socket_that_nothing_listens_at_is_named_as_such(api: WorkloadApi, kind: str, said: str) -> None:
    if kind == "file":
        api.socket.touch()
    else:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(api.socket))
    async with client(api) as supplier:
        assert f"(UNAVAILABLE: {said}); check that its agent runs" in str(await refused(supplier))


async def test_an_agent_that_accepts_and_is_silent_is_an_error(api: WorkloadApi) -> None:
    async with api.serving(), client(api, first_message=0.05) as supplier:
        error = await refused(supplier)
        assert error.kind is ErrorKind.TRANSIENT
        assert "no message within 0.05 s" in str(error)
        await api.called(2)


STATUSES = [
    (grpc.StatusCode.UNAUTHENTICATED, ErrorKind.UNAUTHENTICATED, "identify the process of sds-agent"),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, ErrorKind.THROTTLED, "asked less often"),
    (grpc.StatusCode.INVALID_ARGUMENT, ErrorKind.INVALID, "check that socket is"),
    (grpc.StatusCode.UNIMPLEMENTED, ErrorKind.INVALID, "another service"),
    (grpc.StatusCode.INTERNAL, ErrorKind.TRANSIENT, "read the log of its agent"),
    (grpc.StatusCode.UNAVAILABLE, ErrorKind.TRANSIENT, "check that its agent runs"),
]


@pytest.mark.parametrize(("code", "kind", "fix"), STATUSES)
async def test_a_refusal_has_the_agents_words_on_one_line_and_says_what_to_do(
    api: WorkloadApi, code: grpc.StatusCode, kind: ErrorKind, fix: str
) -> None:
    api.give(Gone(code, "two\nlines " + "x" * 5000))
    async with api.serving(), client(api) as supplier:
        error = await refused(supplier)
        assert error.kind is kind
        assert f"({code.name}: two lines xxx" in str(error)
        assert fix in str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < 700


async def test_a_stream_that_is_ended_is_opened_again(ca: SpireCa, api: WorkloadApi) -> None:
    api.give(message(ca.svid(URI)), Gone(grpc.StatusCode.OK))
    async with api.serving(), client(api) as supplier:
        held = (await given_after_all(supplier)).issuance.chain_pem
        await api.called(4)
        again = ca.svid(URI)
        api.give(message(again))
        assert leaf(await given_after_all(supplier, held)).public_bytes(Encoding.DER) == again.x509_svid


def garbage(ca: SpireCa) -> dict[str, tuple[bytes, str]]:
    """Messages that say nothing usable, and what is said of them."""
    good = ca.svid(URI)
    cut, many = ca.svid(URI), ca.svid(URI)
    cut.x509_svid = good.x509_svid[:-1]
    many.bundle = b"\x05\x00" * (MOST + 1)
    return {
        "no message": (b"\xff\xff\xff<html>", "is no X509SVIDResponse"),
        "a certificate that is cut off": (message(cut).SerializeToString(), f"no usable DER for '{URI}'"),
        "a bundle without end": (message(many).SerializeToString(), f"no usable DER for '{URI}'"),
        "a thousand certificates": (message(*[good] * (MOST + 1)).SerializeToString(), "more than 1000"),
        "more bytes than any agent sends": (bytes(LARGEST_MESSAGE + 1), f"more than {LARGEST_MESSAGE} bytes"),
    }


@pytest.mark.parametrize("what", garbage(SpireCa()))
async def test_a_message_that_cannot_be_used_is_an_error_and_the_next_good_one_is_served(
    ca: SpireCa, api: WorkloadApi, what: str
) -> None:
    sent, said = garbage(ca)[what]
    api.give(message(ca.svid(URI)))
    async with api.serving(), client(api) as supplier:
        held = (await given(supplier)).issuance.chain_pem
        api.give(sent)
        error = await refused(supplier, held=held)
        assert error.kind is ErrorKind.INVALID
        assert said in str(error)
        assert read_pem(await supplier.anchors()) == (ca.ca.certificate,)
        api.give(message(ca.svid(URI)))
        leaf(await given_after_all(supplier, held))


async def test_a_message_that_is_too_large_once_it_is_decompressed_is_no_throttling(api: WorkloadApi) -> None:
    api.compression = grpc.Compression.Gzip
    api.give(bytes(2 * LARGEST_MESSAGE))
    async with api.serving(), client(api) as supplier:
        error = await refused(supplier)
    assert error.kind is ErrorKind.INVALID
    assert f"more than {LARGEST_MESSAGE} bytes" in str(error)


async def test_no_error_shows_a_key(ca: SpireCa, api: WorkloadApi) -> None:
    svid = ca.svid(URI)
    svid.x509_svid = svid.x509_svid[:-1]
    api.give(message(svid))
    async with api.serving(), client(api) as supplier:
        error = await refused(supplier)
        shown = "".join(traceback.format_exception(error)) + repr(vars(supplier))
        assert repr(svid.x509_svid_key)[2:40] not in shown
        assert "PRIVATE KEY" not in shown


# --- anchors ---


async def test_an_authority_that_is_prepared_is_announced_before_a_leaf_comes_from_it(
    ca: SpireCa, api: WorkloadApi
) -> None:
    svid, prepared = ca.svid(URI), make_ca("prepared").certificate
    api.give(message(svid))
    async with api.serving(), client(api) as supplier:
        assert read_pem(await supplier.anchors()) == (ca.ca.certificate,)
        svid.bundle = der((ca.ca.certificate, prepared))
        api.give(message(svid))
        with anyio.fail_after(10):
            await supplier.anchors_changed()
        assert set(read_pem(await supplier.anchors())) == {ca.ca.certificate, prepared}


async def test_the_anchors_of_another_trust_domain_are_never_among_the_own(ca: SpireCa, api: WorkloadApi) -> None:
    foreign = SpireCa("other.example")
    theirs = {"spiffe://other.example": der((foreign.ca.certificate,))}
    api.give(message(ca.svid(URI), foreign.svid("spiffe://other.example/x"), federated=theirs))
    async with api.serving(), client(api) as supplier:
        assert read_pem(await supplier.anchors()) == (ca.ca.certificate,)
        federated = await supplier.federated_anchors()
        assert {name: read_pem(pem) for name, pem in federated.items()} == {"other.example": (foreign.ca.certificate,)}


async def test_a_federated_bundle_that_is_garbage_costs_no_certificate(ca: SpireCa, api: WorkloadApi) -> None:
    theirs = {
        "spiffe://garbage.example": b"\x30\x82",
        "spiffe://Not A Name": b"",
        "spiffe://demo.example": der((make_ca("a root that claims to be ours").certificate,)),
    }
    api.give(message(ca.svid(URI), federated=theirs))
    async with api.serving(), client(api) as supplier:
        leaf(await given(supplier))
        assert await supplier.federated_anchors() == {"garbage.example": b""}
        assert read_pem(await supplier.anchors()) == (ca.ca.certificate,)


async def test_without_a_certificate_in_the_trust_domain_there_are_no_anchors(api: WorkloadApi) -> None:
    foreign = SpireCa("other.example")
    api.give(message(foreign.svid("spiffe://other.example/x")))
    async with api.serving(), client(api) as supplier:
        with pytest.raises(AuthorityError, match=r"no certificate in the trust domain demo\.example") as caught:
            await supplier.anchors()
        assert caught.value.kind is ErrorKind.DENIED


# --- in the agent ---


def configuration(folder: Path, api: WorkloadApi, keys: str = "", workload: str = "") -> str:
    return (
        f"trust_domain: demo.example\nstate_dir: {folder}/state\nsds: {{socket: {folder}/sds.sock}}\n"
        f"authorities: {{spire: {{type: spiffe, socket: {api.socket}{keys}}}}}\n"
        f"workloads: [{{name: web, spiffe_id: '{URI}'{workload}}}]\n"
    )


async def test_an_envoy_gets_what_the_workload_api_gives_and_federated_bundles_under_their_names(
    ca: SpireCa, api: WorkloadApi, tmp_path: Path, events: Events
) -> None:
    foreign = SpireCa("other.example")
    theirs = {
        "spiffe://other.example": der((foreign.ca.certificate,)),
        "spiffe://third.example": der((make_ca("third").certificate,)),
    }
    chosen, clock = settings(tmp_path, configuration(tmp_path, api, ", federated: [other.example]")), SystemClock()
    async with app.authorities(chosen, clock) as cas, app.agent(chosen, cas, clock) as agent:
        error = await events.wait("retrying")
        assert error["kind"] == "transient"
        api.give(message(ca.svid(URI), federated=theirs))
        async with api.serving():
            await events.wait("ready")
            await events.wait("federated_trust_changed")
            bundles = {
                name: secret for name, secret in agent.store.snapshot.items() if isinstance(secret, BundleSecret)
            }
            assert {name: read_pem(each.anchors_pem) for name, each in bundles.items()} == {
                "ROOTCA": (ca.ca.certificate,),
                "spiffe://demo.example": (ca.ca.certificate,),
                "spiffe://other.example": (foreign.ca.certificate,),
            }
            assert (await events.wait("federation_not_listed"))["trust_domains"] == ["third.example"]
            (status,) = agent.workloads
            assert status.attempt in {"waiting", None}
            long = timedelta(minutes=1)  # else it would be published when peers with slow clocks accept it too
            api.give(message(ca.svid(URI, backdated=long), federated=theirs))
            await events.wait("renewed")
        await events.wait("retrying", count=2)
        assert isinstance(agent.store.snapshot["web"], CertificateSecret)


async def test_a_key_that_envoys_refuse_of_each_other_is_not_served(
    ca: SpireCa, api: WorkloadApi, tmp_path: Path, events: Events
) -> None:
    api.give(message(ca.svid(URI, key=ec.generate_private_key(ec.SECP521R1()))))
    chosen, clock = settings(tmp_path, configuration(tmp_path, api)), SystemClock()
    async with api.serving(), app.authorities(chosen, clock) as cas, app.agent(chosen, cas, clock) as agent:
        cause = (await events.wait("retrying", kind="mismatch"))["cause"]
        assert "is a key on the curve secp521r1" in cause
        assert cause.endswith("let its source make one on P-256 or P-384")
        assert agent.store.snapshot["web"] is None


async def test_a_restarted_agent_serves_everything_while_the_workload_api_is_away(
    ca: SpireCa, api: WorkloadApi, tmp_path: Path, events: Events
) -> None:
    theirs = {"spiffe://other.example": der((SpireCa("other.example").ca.certificate,))}
    api.give(message(ca.svid(URI), federated=theirs))
    chosen, clock = settings(tmp_path, configuration(tmp_path, api, ", federated: [other.example]")), SystemClock()
    async with api.serving(), app.authorities(chosen, clock) as cas, app.agent(chosen, cas, clock) as agent:
        await events.wait("ready")
        await events.wait("federated_trust_changed")
        before = dict(agent.store.snapshot)
        stored = tmp_path / "state" / "anchors.json"
        with anyio.fail_after(10):
            while not stored.exists() or b"other.example" not in stored.read_bytes():
                await checkpoint()
    async with app.authorities(chosen, clock) as cas, app.agent(chosen, cas, clock) as agent:
        await events.wait("restored")
        assert dict(agent.store.snapshot) == before
        assert (await events.wait("retrying", kind="transient"))["serving"] == "the current certificate"


def test_a_file_where_the_socket_has_to_be_is_named_before_the_first_call(api: WorkloadApi, tmp_path: Path) -> None:
    kind, context = registry.kind("spiffe"), Context("spire", "demo.example", tmp_path, SystemClock())
    assert list(kind.credentials(SpiffeSettings(socket=api.socket), context)) == []
    assert list(kind.credentials(SpiffeSettings(socket=tmp_path / "absent.sock"), context)) == []
    (tmp_path / "api").touch()
    (found,) = kind.credentials(SpiffeSettings(socket=tmp_path / "api"), context)
    assert "is no socket" in str(found)


def test_check_says_that_key_and_ttl_have_no_effect(api: WorkloadApi, tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(configuration(tmp_path, api, ", hint: internal", ", key: ec-p384, ttl: 1h"))
    loaded = load(file, {})
    said = " ".join(explain(loaded))
    assert f"is the SPIFFE Workload API at {api.socket}" in said
    assert "Both come from the authority spire, which decides the kind of the key" in said
    found = [each for each in warnings(loaded.settings) if "no effect" in each]
    assert [each.partition(":")[0] for each in found] == ["workloads[0].key", "workloads[0].ttl"]
    file.write_text(configuration(tmp_path, api))
    assert not [each for each in warnings(load(file, {}).settings) if "no effect" in each]


@pytest.mark.parametrize(
    ("keys", "workload", "key", "found"),
    [
        (", federated: [demo.example]", "", "authorities.spire.federated", "the agent's own trust domain"),
        (", federated: [a.example, a.example]", "", "authorities.spire.federated", 'has "a.example" twice'),
        (", federated: ['spiffe://a.example']", "", "authorities.spire.federated[0]", "the name of a trust domain"),
        (", federated: [web]", "", "", ""),
        (", hint: ''", "", "authorities.spire.hint", "1 to 1024"),
        (", token: x", "", "authorities.spire.token", "is not a known key"),
    ],
)
def test_what_is_wrong_with_the_settings_is_said_with_its_key(
    api: WorkloadApi, tmp_path: Path, keys: str, workload: str, key: str, found: str
) -> None:
    said = problems(tmp_path, configuration(tmp_path, api, keys, workload))
    assert [each.key for each in said] == ([key] if key else [])
    assert found in "".join(str(each) for each in said)


def test_the_socket_has_to_be_a_path(tmp_path: Path, api: WorkloadApi) -> None:
    text = configuration(tmp_path, api).replace(f"socket: {api.socket}", "socket: 'unix:///run/api.sock'")
    (said,) = problems(tmp_path, text)
    assert "write the path alone" in str(said)


def test_a_workload_cannot_have_the_name_of_a_federated_bundle(tmp_path: Path, api: WorkloadApi) -> None:
    text = configuration(tmp_path, api, ", federated: [other.example]").replace(
        "name: web", "name: spiffe://other.example"
    )
    (said,) = problems(tmp_path, text)
    assert "a name of the trust bundle" in str(said)


def test_one_trust_domain_is_federated_by_one_authority(tmp_path: Path, api: WorkloadApi) -> None:
    more = f", federated: [a.example]}}, again: {{type: spiffe, socket: {api.socket}, federated: [a.example]"
    text = configuration(tmp_path, api, more, ", authority: spire")
    (said,) = problems(tmp_path, text)
    assert 'has "a.example" as authorities.spire.federated has' in str(said)


async def test_a_client_that_is_closed_leaves_no_call_behind(ca: SpireCa, api: WorkloadApi) -> None:
    api.give(message(ca.svid(URI)))
    async with api.serving():
        for _ in range(3):
            async with client(api) as supplier:
                await given(supplier)
                assert api.open == 1
            await api.have_closed()


async def test_a_flood_of_messages_is_read_at_a_bounded_rate(ca: SpireCa, api: WorkloadApi) -> None:
    api.give(*(message(ca.svid(URI, lifetime=timedelta(hours=1 + n))) for n in range(30)))
    async with api.serving(), client(api) as supplier:
        seen, held = 1, (await given(supplier)).issuance.chain_pem
        with anyio.move_on_after(0.35):
            while True:
                held = (await given(supplier, held)).issuance.chain_pem
                seen += 1
        assert seen <= 5
        assert (await given(supplier, held)).issuance.chain_pem != held, "and is read on"
