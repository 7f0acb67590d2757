"""Certificates that outlive the agent: served at once after a restart, and believed no more than what a CA sends."""

import asyncio
import json
import os
import re
import stat
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import msgspec
import pytest
from cryptography import x509
from fakes.authorities import Hang, ScriptedAuthority, Step, UpstreamCa, answering, failing, good, shifted
from fakes.clocks import HandClock
from fakes.disks import DeadDisk
from fakes.events import Events, recorded
from fakes.hierarchy import NOW, URI, new_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from sds_agent.authority.protocol import ErrorKind, Issuance, IssueRequest
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.cache import (
    MOST_AT_ONCE,
    Cached,
    CachedCertificate,
    CacheError,
    CertificateCache,
    WorkloadCache,
    tidy,
)
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.publication import HANDSHAKE, PublicationTarget
from sds_agent.issuance.queue import IssuanceQueue
from sds_agent.issuance.source import Upstream
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload
from sds_agent.pki.certificates import has_key, read_pem, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, to_pkcs8_pem
from sds_agent.sealing import Seal
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.statefile import FORMAT

HOUR = timedelta(hours=1)
SEAL = Seal(bytes(range(32)))
WORKLOAD = Workload("default", SpiffeId.parse(URI), KeyType.EC_P256, HOUR, "upstream", ("default",))
DOWN = failing(ErrorKind.TRANSIENT, "the CA is down")


def anchors(store: SecretStore) -> set[x509.Certificate]:
    """What the bundle has in it."""
    bundle = store.snapshot["ROOTCA"]
    assert isinstance(bundle, BundleSecret)
    return set(read_pem(bundle.anchors_pem))


class Machine:
    """What stays when the agent is restarted: the disk, the clock and the CA."""

    disk_timeout = 60.0
    seal: Seal | None = None

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "certificates"
        self.clock = HandClock()
        self.ca = UpstreamCa(self.clock.now)

    @property
    def file(self) -> Path:
        (file,) = self.directory.iterdir()
        return file

    @property
    def stored(self) -> CachedCertificate:
        """What the file holds."""
        return msgspec.json.decode(self.file.read_bytes(), type=CachedCertificate)

    @asynccontextmanager
    async def agent(
        self, *script: Step, workload: Workload = WORKLOAD
    ) -> AsyncIterator[tuple[SecretStore, Events, ScriptedAuthority]]:
        """One run of the agent, inside this context."""
        store, authority = SecretStore(["default", "ROOTCA"]), ScriptedAuthority(*script)
        self.trust = Trust(store, ["ROOTCA"], self.clock)
        self.cache = CertificateCache(self.directory, self.seal, timeout=self.disk_timeout)
        issuer = Issuer(
            workload,
            Upstream(authority, IssuanceQueue()),
            PublicationTarget(store, self.trust),
            clock=self.clock,
            cache=WorkloadCache(workload, self.cache),
        )
        with recorded() as events:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(issuer.run)
                yield store, events, authority
                tasks.cancel_scope.cancel()

    async def issue(self) -> str:
        """Run an agent that is stopped as soon as it has a certificate; returns the certificate's version."""
        async with self.agent(answering(self.ca)) as (store, events, _):
            await events.wait("issued")
            secret = store.snapshot["default"]
            assert secret is not None
            return secret.version


async def test_first_start_has_nothing_to_restore_and_says_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    async with machine.agent(answering(machine.ca)) as (_, events, _authority):
        await events.wait("issued")
        assert events.named("restored") == events.named("not_restored") == []


async def test_a_disk_that_does_not_answer_holds_up_neither_renewals_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of the network that is gone. Once it is back, the next certificate is stored."""
    machine = Machine(tmp_path)
    machine.disk_timeout = 0.01
    disk = DeadDisk(monkeypatch)
    async with machine.agent(answering(machine.ca)) as (_, events, _authority):
        try:
            await events.wait("issued")
            causes = [(await events.wait("not_kept"))["cause"]]
            await machine.clock.asleep()
            machine.clock.elapse(HOUR * 0.56)
            await events.wait("renewed")
            causes.append((await events.wait("not_kept", count=2))["cause"])
        finally:
            disk.revive()  # here, or else an agent that waits for it would hold up this test
    assert causes == [
        "the disk of the state directory: no answer within 0.01 s",
        "the disk of the state directory: an earlier attempt has not come back yet",
    ]


async def test_a_disk_that_does_not_answer_delays_no_end_of_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path)
    disk = DeadDisk(monkeypatch)
    async with machine.agent(answering(machine.ca), Hang(DOWN)) as (store, events, _authority):
        try:
            await events.wait("issued")
            await machine.clock.asleep()
            machine.clock.elapse(HOUR)
            await events.wait("expired")
            assert store.snapshot["default"] is None
        finally:
            disk.revive()
    assert machine.file.exists(), "and its end waits for the disk, as long as that may take"


async def test_a_certificate_that_comes_in_the_moment_of_the_end_is_cached(tmp_path: Path) -> None:
    """It may have cost a token that serves once."""
    machine = Machine(tmp_path)
    store = SecretStore(["default", "ROOTCA"])
    with anyio.CancelScope() as scope:

        async def last(request: IssueRequest) -> Issuance:
            asyncio.get_running_loop().call_soon(scope.cancel)
            return good(machine.ca, request)

        issuer = Issuer(
            WORKLOAD,
            Upstream(ScriptedAuthority(last), IssuanceQueue()),
            PublicationTarget(store, Trust(store, ["ROOTCA"], machine.clock)),
            clock=machine.clock,
            cache=WorkloadCache(WORKLOAD, CertificateCache(machine.directory)),
        )
        await issuer.run()
    assert store.snapshot["default"] is None, "else this shows nothing"
    assert machine.file.exists()


async def test_the_cache_knows_when_a_certificate_was_issued(tmp_path: Path) -> None:
    """Not when the CA, that backdates, says it began: its renewal would come early after each restart."""
    machine = Machine(tmp_path)
    await machine.issue()
    assert machine.stored.issued == machine.clock.now()


async def test_restored_certificate_is_withheld_when_it_expires_in_an_outage(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    async with machine.agent(DOWN) as (store, events, _):
        await events.wait("restored")
        await machine.clock.asleep()
        machine.clock.elapse(HOUR)
        await events.wait("expired")
        assert store.snapshot["default"] is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_restored_workloads_of_an_old_and_a_new_root_are_all_trusted(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    """The root changed between two renewals: whichever is restored last, peers hold leaves from both."""
    machine = Machine(tmp_path)
    store, cas = SecretStore(["a", "b", "ROOTCA"]), (machine.ca, UpstreamCa(machine.clock.now, "new"))
    trust = Trust(store, ["ROOTCA"], machine.clock)

    def issuer(name: str, script: Step) -> Issuer:
        workload = Workload(name, SpiffeId.parse(f"spiffe://demo.example/{name}"), KeyType.EC_P256, HOUR, "up", (name,))
        return Issuer(
            workload,
            Upstream(ScriptedAuthority(script), IssuanceQueue()),
            PublicationTarget(store, trust),
            clock=machine.clock,
            cache=WorkloadCache(workload, CertificateCache(machine.directory)),
        )

    for name, ca in zip("ab", cas, strict=True):
        with recorded() as events:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(issuer(name, answering(ca)).run)
                await events.wait("issued")
                await machine.clock.asleep()
                tasks.cancel_scope.cancel()
    store, restarted = SecretStore(["a", "b", "ROOTCA"]), "ab"
    trust = Trust(store, ["ROOTCA"], machine.clock)
    with recorded() as events:
        async with anyio.create_task_group() as tasks:
            for number in order:
                tasks.start_soon(issuer(restarted[number], DOWN).run)
            await events.wait("restored", count=2)
            assert anchors(store) == {ca.root.certificate for ca in cas}
            tasks.cancel_scope.cancel()


async def test_what_a_restored_certificate_chains_to_stays_though_the_ca_advertises_it_no_more(tmp_path: Path) -> None:
    """The CA got a new root while the agent was away. Peers trust this machine's bundle, and refused it otherwise."""
    machine = Machine(tmp_path)
    await machine.issue()
    new = UpstreamCa(machine.clock.now, "new").root.certificate
    async with machine.agent(DOWN) as (store, events, _):
        await events.wait("restored")
        machine.trust.update("upstream", (new,))
        assert anchors(store) == {machine.ca.root.certificate, new}
        await machine.clock.asleep()


async def test_restarted_agent_serves_at_once_what_is_still_valid_though_the_ca_is_down(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    version = await machine.issue()
    async with machine.agent(DOWN) as (store, events, authority):
        restored = await events.wait("restored", workload="default")
        assert restored["spiffe_id"].startswith("spiffe://"), (
            "the log says who got what, from whom, after a restart too"
        )
        assert restored["authority"] == "upstream"
        secret, bundle = store.snapshot["default"], store.snapshot["ROOTCA"]
        assert secret is not None
        assert secret.version == version, "the same content, so no Envoy is disturbed"
        assert bundle is not None
        assert authority.requests == [], "and nothing is asked before it is due"


async def test_it_is_renewed_when_the_first_agent_would_have_renewed_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    machine.clock.elapse(HOUR * 0.56)
    async with machine.agent(answering(machine.ca)) as (_, events, authority):
        await events.wait("restored")
        await events.wait("renewed")
        assert authority.requests[0].current is not None, "a CA that renews over mTLS is shown the current certificate"


async def test_a_restart_moves_no_renewal_of_a_first_certificate(tmp_path: Path) -> None:
    """Else the half of a fleet that restarts is no longer spread, and asks its CA together."""
    machine = Machine(tmp_path)
    async with machine.agent(answering(machine.ca)) as (_, events, _authority):
        due = (await events.wait("issued"))["renew_at"]
    machine.clock.elapse(timedelta(milliseconds=200))
    async with machine.agent(DOWN) as (_, events, _authority):
        assert (await events.wait("restored"))["renew_at"] == due


async def test_a_first_certificate_is_cached_though_it_has_to_wait_and_restored_when_it_is_valid(
    tmp_path: Path,
) -> None:
    """It may have cost a join token, which serves once: an agent that is restarted in between had nothing left."""
    machine = Machine(tmp_path)
    ahead = answering(machine.ca, shifted(timedelta(seconds=40), HOUR))
    async with machine.agent(ahead) as (store, events, _):
        await events.wait("held_back")
    assert machine.file.exists()
    async with machine.agent(DOWN) as (store, events, authority):
        assert (await events.wait("held_back"))["serving"] == "nothing"
        await machine.clock.asleep()
        assert store.snapshot["default"] is None
        machine.clock.elapse(timedelta(seconds=40))
        await events.wait("restored")
        assert store.snapshot["default"] is not None
        assert authority.requests == []


async def test_a_certificate_that_could_not_be_cached_while_it_waited_is_when_it_is_published(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.directory.write_text("where the directory should be")
    async with machine.agent(answering(machine.ca, shifted(timedelta(seconds=40), HOUR))) as (_, events, _authority):
        await events.wait("not_kept")
        await machine.clock.asleep()
        machine.directory.unlink()
        machine.clock.elapse(timedelta(seconds=40))
        await events.wait("issued")
    assert machine.file.exists()


async def test_a_renewed_certificate_that_has_to_wait_does_not_replace_the_cached_one(
    tmp_path: Path,
) -> None:
    """Restarted in between, the agent would serve nothing, where it had a valid one."""
    machine = Machine(tmp_path)
    version = await machine.issue()
    machine.clock.elapse(HOUR * 0.56)
    async with machine.agent(answering(machine.ca, shifted(timedelta(seconds=40), HOUR))) as (_, events, _authority):
        await events.wait("held_back")
        await machine.clock.asleep()
    async with machine.agent(DOWN) as (store, events, _):
        await events.wait("restored")
        secret = store.snapshot["default"]
        assert secret is not None
        assert secret.version == version


@pytest.mark.parametrize("change", [{"authority": "another"}, {"kind": "cacerts"}])
async def test_a_workload_that_got_another_ca_is_served_what_it_had_and_asks_the_new_one_at_once(
    tmp_path: Path, change: dict[str, str]
) -> None:
    """Its old certificate would go on for half its life, as if the configuration had not been changed."""
    machine = Machine(tmp_path)
    version = await machine.issue()
    workload, new = structs.replace(WORKLOAD, **change), UpstreamCa(machine.clock.now, "new")
    async with machine.agent(DOWN, workload=workload) as (store, events, authority):
        await events.wait("retrying")
        secret = store.snapshot["default"]
        assert secret is not None
        assert secret.version == version
        assert len(authority.requests) == 1
    async with machine.agent(answering(new), workload=workload) as (store, events, _):
        await events.wait("held_back")
        await machine.clock.asleep()
        machine.clock.elapse(HANDSHAKE)
        await events.wait("renewed")
        assert anchors(store) == {machine.ca.root.certificate, new.root.certificate}
        await machine.clock.asleep()
    async with machine.agent(DOWN, workload=workload) as (_, events, authority):
        await events.wait("restored")
        await machine.clock.asleep()
        assert authority.requests == []


async def test_expired_one_is_not_served_and_replaced_by_the_next(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    machine.clock.elapse(HOUR * 2)
    async with machine.agent(DOWN) as (store, events, _):
        assert "expired" in str((await events.wait("not_restored"))["cause"])
        assert store.snapshot["default"] is None
    await machine.issue()
    assert machine.file.suffix == ".json", "nothing was put aside"
    async with machine.agent(DOWN) as (_, events, _authority):
        await events.wait("restored")


@pytest.mark.parametrize(("ahead", "words"), [(-24 * HOUR, "valid only from"), (9000 * HOUR, "expired at")])
async def test_a_certificate_that_is_not_valid_by_a_clock_that_boots_wrong_stays_for_the_next_start(
    tmp_path: Path, ahead: timedelta, words: str
) -> None:
    """A machine without a battery for its clock boots at any time, and would lose what it cannot obtain again."""
    machine = Machine(tmp_path)
    await machine.issue()
    machine.clock.set_wall(ahead)
    async with machine.agent(DOWN) as (store, events, _):
        cause = str((await events.wait("not_restored"))["cause"])
        assert words in cause
        assert "see that this machine's clock is right" in cause
        assert store.snapshot["default"] is None
    machine.clock.set_wall(-ahead)
    async with machine.agent(DOWN) as (_, events, _authority):
        await events.wait("restored")


async def test_with_a_key_no_private_key_is_readable_on_the_disk_and_a_restart_serves_the_same(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.seal = SEAL
    version = await machine.issue()
    assert b"PRIVATE KEY" not in machine.file.read_bytes()
    async with machine.agent(DOWN) as (store, events, authority):
        await events.wait("restored")
        secret = store.snapshot["default"]
        assert secret is not None
        assert secret.version == version
        assert authority.requests == []


async def test_plain_files_are_served_and_encrypted_when_a_key_is_named(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    version = await machine.issue()
    machine.seal = SEAL
    async with machine.agent(DOWN) as (store, events, _):
        await events.wait("restored")
        secret = store.snapshot["default"]
        assert secret is not None
        assert secret.version == version
    assert b"PRIVATE KEY" not in machine.file.read_bytes()
    async with machine.agent(DOWN) as (_, events, _authority):
        await events.wait("restored")


@pytest.mark.parametrize("wrong", [None, Seal(b"another key of thirty-two bytes!")], ids=["no key", "another key"])
async def test_a_wrong_key_costs_a_request_and_the_right_one_restores_what_was_stored(
    tmp_path: Path, wrong: Seal | None
) -> None:
    """An agent whose join token is spent has nothing else."""
    machine = Machine(tmp_path)
    machine.seal = SEAL
    version = await machine.issue()
    machine.seal = wrong
    async with machine.agent(DOWN) as (store, events, _):
        assert "name the key that it was encrypted with" in str((await events.wait("not_restored"))["cause"])
        await events.wait("retrying")
        assert store.snapshot["default"] is None
    machine.seal = SEAL
    async with machine.agent(DOWN) as (store, events, _):
        await events.wait("restored")
        secret = store.snapshot["default"]
        assert secret is not None
        assert secret.version == version
    machine.seal = wrong
    async with machine.agent(answering(machine.ca)) as (_, events, _authority):
        await events.wait("issued")
    assert sorted(path.suffix for path in machine.directory.iterdir()) == [".json", ".unusable"]


async def test_the_files_of_two_identities_that_were_exchanged_are_not_served(tmp_path: Path) -> None:
    machine, other = Machine(tmp_path / "a"), structs.replace(WORKLOAD, identity=SpiffeId.parse(f"{URI}/other"))
    machine.seal = SEAL
    await machine.issue()
    first = machine.file
    async with machine.agent(answering(machine.ca), workload=other) as (_, events, _authority):
        await events.wait("issued")
    (second,) = set(machine.directory.iterdir()) - {first}
    first.replace(second)
    async with machine.agent(DOWN, workload=other) as (store, events, _):
        assert "was damaged or exchanged since" in str((await events.wait("not_restored"))["cause"])
        assert store.snapshot["default"] is None


async def test_a_file_of_the_first_version_is_restored_and_written_in_the_new_format(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    version = await machine.issue()
    fields = json.loads(machine.file.read_bytes())
    assert fields.pop("format") == FORMAT
    machine.file.write_text(json.dumps(fields))
    async with machine.agent(DOWN) as (store, events, _):
        await events.wait("restored")
        secret = store.snapshot["default"]
        assert secret is not None
        assert secret.version == version
    assert machine.stored.format == FORMAT


async def test_a_certificate_is_restored_with_the_anchors_of_its_own_file(tmp_path: Path) -> None:
    """Killed before the bundle was stored too: peers would refuse what is below a new root."""
    machine, new = Machine(tmp_path), UpstreamCa(HandClock().now, "new")
    await machine.issue()
    async with machine.agent(DOWN) as (store, events, _):
        machine.trust.restore_advertised("upstream", (new.root.certificate,), NOW + HOUR)
        await events.wait("restored")
        assert anchors(store) == {machine.ca.root.certificate, new.root.certificate}


DAMAGE: Mapping[str, bytes | Mapping[str, object]] = {
    "nothing": b"",
    "the first byte alone": b"{",
    "another type": b'{"spiffe_id": 1}',
    "no UTF-8": b"\xff\xfe",
    "zeros, as after a power cut": bytes(4096),
    "a deep nest": b"[" * 200_000,
    "larger than any certificate": b" " * (2 << 20),
    "a time that no calendar has": {"issued_at": 1e12},
    "a time before all calendars": {"issued_at": -1e18},
    "a time as a text": {"issued_at": "today"},
    "no part of a term": {"elapsed": 1.5},
    "no number": b'{"spiffe_id": "", "issued_at": NaN}',
    "half a character": {"chain_pem": "\ud800"},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
async def test_damaged_file_is_logged_and_replaced_by_the_next_certificate(
    tmp_path: Path, damage: bytes | Mapping[str, object]
) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    if isinstance(damage, bytes):
        machine.file.write_bytes(damage)
    else:
        machine.file.write_text(json.dumps(json.loads(machine.file.read_bytes()) | damage))
    async with machine.agent(answering(machine.ca)) as (_, events, _authority):
        assert "damaged" in str((await events.wait("not_restored"))["cause"])
        await events.wait("issued")


async def test_a_time_of_issue_that_is_yet_to_come_does_not_put_off_the_renewal(tmp_path: Path) -> None:
    """The certificate would expire, and the agent wait for the year 2286."""
    machine = Machine(tmp_path)
    await machine.issue()
    machine.file.write_text(json.dumps(json.loads(machine.file.read_bytes()) | {"issued_at": 9_999_999_999}))
    async with machine.agent(answering(machine.ca)) as (_, events, _authority):
        assert (await events.wait("restored"))["renew_at"] < "2026-03-14T15:43"
        await machine.clock.asleep()
        machine.clock.elapse(HOUR * 0.56)
        await events.wait("renewed")


SECRET = re.compile("[A-Za-z0-9+/]{40}")
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def cached_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A good file, of a certificate that is valid at NOW."""
    folder = tmp_path_factory.mktemp("kept")
    ca, key = UpstreamCa(lambda: NOW), new_key()
    request = IssueRequest(WORKLOAD.identity, make_csr(key, URI), HOUR, "1")
    certificate = CachedCertificate(
        URI,
        NOW.timestamp(),
        write_pem([ca.leaf(request), ca.lower.certificate, ca.upper.certificate]).decode(),
        write_pem([ca.root.certificate]).decode(),
        to_pkcs8_pem(key).decode(),
    )
    CertificateCache(folder).save(certificate)
    (file,) = folder.glob("*.json")
    return file.read_bytes()


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_damage_of_a_cached_file_ends_the_agent(data: st.DataObject, cached_bytes: bytes, tmp_path: Path) -> None:
    """Fields of any kind and value, bytes changed, cut off or put in: what is restored is as good as from the CA."""
    fields = json.loads(cached_bytes)
    if data.draw(st.booleans(), label="a field"):
        fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(ANYTHING)
        damaged = json.dumps(fields).encode()
    else:
        begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(cached_bytes))] * 2)))
        damaged = cached_bytes[:begin] + data.draw(st.binary(max_size=40)) + cached_bytes[end:]
    cache = CertificateCache(tmp_path)
    cache._file(URI).write(damaged)
    restored, refusal = None, ""
    try:
        restored = cache.restore(WORKLOAD.identity, NOW)
    except CacheError as error:
        refusal = str(error)
    assert refusal.isprintable()
    assert SECRET.search(refusal) is None, "no part of a key"
    if restored is not None:
        assert restored.issued_at <= NOW
        assert has_key(restored.accepted.leaf, restored.key.public_key())


async def test_damaged_key_is_logged_and_replaced_by_the_next_certificate(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    stored = machine.stored
    CertificateCache(machine.directory).save(
        structs.replace(stored, private_key_pem=stored.private_key_pem.replace("M", "-", 1))
    )
    async with machine.agent(answering(machine.ca)) as (_, events, _authority):
        assert "the cached private key of" in str((await events.wait("not_restored"))["cause"])
        await events.wait("issued")


@pytest.mark.parametrize("kind", ["a directory", "a pipe", "a link to itself", "an endless device"])
async def test_file_that_cannot_be_read_is_logged_and_the_ca_asked(tmp_path: Path, kind: str) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    file = machine.file
    file.unlink()
    match kind:
        case "a directory":
            file.mkdir()
        case "a pipe":
            os.mkfifo(file)
        case "a link to itself":
            file.symlink_to(file)
        case _:
            file.symlink_to("/dev/zero")
    async with machine.agent(answering(machine.ca)) as (_, events, _authority):
        assert "is not a regular file; it is not used" in str((await events.wait("not_restored"))["cause"])
        await events.wait("issued")


async def test_key_of_another_certificate_is_not_served(tmp_path: Path) -> None:
    machine, other = Machine(tmp_path), Machine(tmp_path / "other")
    await machine.issue()
    await other.issue()
    mixed = structs.replace(machine.stored, private_key_pem=other.stored.private_key_pem)
    CertificateCache(machine.directory).save(mixed)
    async with machine.agent(DOWN) as (store, events, _):
        await events.wait("not_restored")
        assert store.snapshot["default"] is None


async def test_no_other_user_may_read_it_and_nothing_shows_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    assert stat.S_IMODE(machine.file.stat().st_mode) == 0o600
    assert stat.S_IMODE(machine.directory.stat().st_mode) == 0o700
    stored = machine.stored
    assert stored.private_key_pem.splitlines()[1] not in repr(stored) + str(stored)


@pytest.mark.parametrize("keep", [True, False])
async def test_keys_that_are_not_to_be_cached_do_not_stay_on_the_disk(tmp_path: Path, *, keep: bool) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    name = machine.file.name
    (machine.directory / f".{name}.0a1b2c3d").write_text("half a key")
    (machine.directory / f"{name}.unusable").write_text("a key that was put aside")
    with recorded() as events:
        tidy(machine.directory, keep=keep)
        assert machine.directory.exists() == keep
        assert [each["count"] for each in events.named("kept_certificates_removed")] == ([] if keep else [2])
        if keep:
            assert {path.name for path in machine.directory.iterdir()} == {name, f"{name}.unusable"}
        tidy(machine.directory, keep=keep)
        assert len(events.seen) == (0 if keep else 1), "and nothing is said where there is nothing to do"


async def test_files_of_others_stay_and_are_logged(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    await machine.issue()
    (machine.directory / "notes").touch()
    with recorded() as events:
        tidy(machine.directory, keep=False)
    assert [path.name for path in machine.directory.iterdir()] == ["notes"]
    (reported,) = events.named("kept_certificates_not_removed")
    assert f"{machine.directory}: Directory not empty" in reported["cause"]


@pytest.mark.parametrize(("mode", "good"), [(0o604, False), (0o602, False), (0o660, True)])
async def test_a_file_that_others_may_use_is_not_served(tmp_path: Path, mode: int, *, good: bool) -> None:
    """The group's rights are Kubernetes's doing: it sets them on each file of a volume whenever a pod starts."""
    machine = Machine(tmp_path)
    await machine.issue()
    machine.file.chmod(mode)
    async with machine.agent(DOWN) as (store, events, _):
        if good:
            await events.wait("restored")
        else:
            assert "by others" in str((await events.wait("not_restored"))["cause"])
        assert (store.snapshot["default"] is not None) == good


@pytest.mark.parametrize("obstacle", ["a file", "a directory for everybody"])
async def test_disk_that_cannot_be_written_does_not_stop_the_service(tmp_path: Path, obstacle: str) -> None:
    machine = Machine(tmp_path)
    if obstacle == "a file":
        machine.directory.write_text("where the directory should be")
    else:
        machine.directory.mkdir()
        machine.directory.chmod(0o777)
    async with machine.agent(answering(machine.ca)) as (store, events, _):
        assert (await events.wait("not_kept"))["level"] == "error"
        assert obstacle == "a file" or list(machine.directory.iterdir()) == []
        assert store.snapshot["default"] is not None


async def test_a_certificate_that_could_not_be_cached_is_as_soon_as_the_disk_takes_it(tmp_path: Path) -> None:
    """The newest alone; and it is not asked for again, as a renewal is hours away."""
    machine = Machine(tmp_path)
    machine.directory.write_text("where the directory should be")
    async with machine.agent(answering(machine.ca)) as (store, events, _):
        for count, time in enumerate((timedelta(), HOUR * 0.56), start=1):
            machine.clock.elapse(time)
            await events.wait("not_kept", count=count)
            await machine.clock.asleep()
        with pytest.raises(CacheError, match="a directory"):
            machine.cache.put_back_all()
        machine.directory.unlink()
        assert machine.cache.put_back_all() == [machine.file]
        served = store.snapshot["default"]
        assert isinstance(served, CertificateSecret)
        assert machine.stored.chain_pem.encode() == served.chain_pem
        assert machine.cache.put_back_all() == []


def test_file_of_another_identity_is_not_taken(tmp_path: Path) -> None:
    cache = CertificateCache(tmp_path)
    other = SpiffeId.parse("spiffe://demo.example/other")
    foreign = CachedCertificate("spiffe://demo.example/x", 0.0, "", "", "")
    cache._file(str(other)).write(msgspec.json.encode(foreign))
    with pytest.raises(CacheError, match="another identity"):
        cache.restore(other, NOW)


async def test_certificates_that_come_together_wait_for_the_disk_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes ten milliseconds for each would take minutes for a start with ten thousand identities."""
    directories, fsync = list[int](), os.fsync

    def counted(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            directories.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    cache = CertificateCache(tmp_path / "certificates")
    identities = [f"spiffe://demo.example/{number}" for number in range(MOST_AT_ONCE + 1)]
    assert await written(cache, map(Kept, identities)) == [None] * len(identities)
    assert len(list((tmp_path / "certificates").iterdir())) == len(identities)
    assert len(directories) == 2, "the first that comes takes with it all that are there"


def test_each_of_many_certificates_that_are_removed_comes_back(tmp_path: Path) -> None:
    cache = CertificateCache(tmp_path)
    for number in range(3):
        cache.save(Kept(f"spiffe://demo.example/{number}").cached())
    assert cache.put_back_all() == []
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    lost = sorted(before)[:2]
    for path in lost:
        path.unlink()
    assert sorted(cache.put_back_all()) == lost
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    cache.forget(SpiffeId.parse("spiffe://demo.example/0"))
    for path in before:
        path.unlink()
    assert len(cache.put_back_all()) == 2, "that of a workload that is gone stays away"


def test_thousands_that_come_back_take_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one left, no Envoy could connect."""
    cache, fsync, opened = CertificateCache(tmp_path), os.fsync, set[int]()

    def seen(descriptor: int) -> None:
        opened.add(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    identities = [f"spiffe://demo.example/{number}" for number in range(3 * MOST_AT_ONCE)]
    for each in identities:
        cache.know(SpiffeId.parse(each), Kept(each))
    assert len(cache.put_back_all()) == len(list(tmp_path.iterdir())) == len(identities)
    assert len(opened) <= MOST_AT_ONCE + 1, "descriptors are numbered from the lowest that is free"


def test_a_workload_may_go_while_lost_files_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, listdir, lost = CertificateCache(tmp_path), os.listdir, SpiffeId.parse("spiffe://demo.example/web")
    cache.know(lost, Kept(str(lost)))

    def look(directory: Path) -> list[str]:
        cache.forget(lost)
        return listdir(directory)

    monkeypatch.setattr(os, "listdir", look)
    assert cache.put_back_all() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["renewed", "gone"])
def test_a_certificate_that_comes_back_takes_the_place_of_no_newer_one(tmp_path: Path, change: str) -> None:
    """The disk may be slow: while the lost file is about to be written, its workload is renewed, or goes."""
    cache, renewed = CertificateCache(tmp_path), Kept("spiffe://demo.example/web", issued_at=2.0)

    def act() -> None:
        if change == "renewed":
            cache.save(renewed.cached())
        else:
            cache.forget(SpiffeId.parse(renewed.spiffe_id))

    cache.know(SpiffeId.parse(renewed.spiffe_id), Kept(renewed.spiffe_id, issued_at=1.0, then=act))
    cache.put_back_all()
    found = [msgspec.json.decode(path.read_bytes(), type=CachedCertificate).issued_at for path in tmp_path.iterdir()]
    assert found == ([2.0] if change == "renewed" else [])


async def test_one_certificate_that_cannot_be_written_keeps_no_other_from_the_disk(tmp_path: Path) -> None:
    cache = CertificateCache(tmp_path)
    good, bad = (Kept(f"spiffe://demo.example/{name}") for name in ("good", "bad"))
    in_the_way = cache._file(bad.spiffe_id).path
    in_the_way.mkdir()
    of_bad, of_good = await written(cache, (bad, good))
    assert isinstance(of_bad, CacheError)
    assert str(of_bad) == f"cannot cache the certificate of {bad.spiffe_id} in {tmp_path}: Is a directory"
    assert of_good is None
    assert set(os.listdir(tmp_path)) == {in_the_way.name, cache._file(good.spiffe_id).path.name}  # noqa: PTH208 - names are what is compared


async def test_a_workload_that_ends_while_the_disk_writes_keeps_no_other_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits meanwhile was to be written after its certificate, in a task of its own group."""
    cache = CertificateCache(tmp_path)
    ends, goes_on = (Kept(f"spiffe://demo.example/{name}") for name in ("ends", "goes-on"))
    disk, loop = DeadDisk(monkeypatch), asyncio.get_running_loop()
    of_first: asyncio.Future[Exception | None] = loop.create_future()
    of_second: asyncio.Future[Exception | None] = loop.create_future()

    async def ending() -> None:
        async with asyncio.TaskGroup() as tasks:
            cache.begin(ends, tasks, of_first.set_result)
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(ending())
        await asyncio.to_thread(disk.asked.wait, 60)
        cache.begin(goes_on, tasks, of_second.set_result)
        first.cancel()
        disk.revive()
        assert await of_first is None
        assert await of_second is None
    assert len(os.listdir(tmp_path)) == 2  # noqa: PTH208 - names are what is compared


async def test_a_bug_while_certificates_are_written_leaves_nobody_waiting(tmp_path: Path) -> None:
    """The agent ends with it, and not before each issuer has ended, which waits for its certificate to be written."""
    cache, ended = CertificateCache(tmp_path), list[Exception | None]()

    async def write() -> None:
        async with asyncio.TaskGroup() as tasks:
            for each in (Broken(), Kept("spiffe://demo.example/good")):
                cache.begin(each, tasks, ended.append)

    with pytest.raises(ExceptionGroup) as raised:
        await write()
    assert raised.group_contains(ZeroDivisionError)
    assert [type(each) for each in ended] == [CacheError, CacheError]


async def written(cache: CertificateCache, certificates: Iterable[Cached]) -> list[Exception | None]:
    """Have them written; returns what became of each."""
    async with asyncio.TaskGroup() as tasks:
        ended = list[asyncio.Future[Exception | None]]()
        for each in certificates:
            ended.append(asyncio.get_running_loop().create_future())
            cache.begin(each, tasks, ended[-1].set_result)
        return await asyncio.gather(*ended)


class Broken:
    """A certificate whose content cannot be made, by a bug."""

    def cached(self) -> CachedCertificate:
        """Never returns."""
        raise ZeroDivisionError


class Kept:
    """A certificate to write, of nothing but its identity and its time. Making its content does `then`."""

    def __init__(self, spiffe_id: str, *, issued_at: float = 0.0, then: Callable[[], None] = lambda: None) -> None:
        self.spiffe_id = spiffe_id
        self._issued_at = issued_at
        self._then = then

    def cached(self) -> CachedCertificate:
        """As `issuance.cache.Cached` has it."""
        self._then()
        return CachedCertificate(self.spiffe_id, self._issued_at, "", "", "")
