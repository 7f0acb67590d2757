"""The embedded CA: its root survives restarts, faults and its own renewal, and no other user can read its key."""

import asyncio
import errno
import os
import stat
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from fakes import authorities
from fakes.clocks import HandClock
from fakes.events import recorded
from fakes.hierarchy import DAY, HOUR, NOW, URI, make_ca, new_key

from sds_agent.authority.embedded import REFRESH
from sds_agent.authority.in_process import StoredAuthority
from sds_agent.authority.protocol import AdvertisesAnchors, AuthorityError, ErrorKind, Issuance, IssueRequest
from sds_agent.errors import ConfigurationError
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted, accept
from sds_agent.pki.certificates import is_self_signed, read_pem, san_values, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate, to_pkcs8_pem
from sds_agent.pki.validation.path import PathError, find_path
from sds_agent.signing.self_signed import (
    LONGEST_RETRY,
    LONGEST_SETTLE,
    MOST_EXPIRED,
    RENEWAL_SHARE,
    SETTLE_SHARE,
    SelfSignedCa,
)

TEN_YEARS = timedelta(days=3650)
IDENTITY = SpiffeId.parse(URI)
KEY = new_key()
CSR = make_csr(KEY, URI)


async def embedded(directory: Path, clock: HandClock | None = None, **chosen: Any) -> StoredAuthority:
    return await authorities.embedded(directory, clock or HandClock(), **chosen)


async def test_a_root_that_was_made_for_another_trust_domain_is_warned_of(tmp_path: Path) -> None:
    """The old name in the new domain's root is the only trace: all that is signed goes on being trusted for both."""
    long = "a." * 100 + "example"
    for domain, other in (("sds-agent.local", "demo.example"), (long, long[:-1])):
        directory, causes = tmp_path / domain[:20], list[str]()
        for trust_domain, warnings in ((domain, 0), (domain, 0), (other, 1)):
            with recorded() as events:
                await embedded(directory, trust_domain=trust_domain)
            causes = [str(each["cause"]) for each in events.named("root_of_another_trust_domain", level="warning")]
            assert len(causes) == warnings
        assert f"another trust domain than {other}" in causes[0]
        assert str(directory / "roots.pem") in causes[0]


async def ask(authority: StoredAuthority, *, ttl: timedelta = HOUR, csr: bytes = CSR) -> Issuance:
    return await authority.issue(IssueRequest(IDENTITY, csr, ttl, "1"))


async def issue(authority: StoredAuthority, clock: HandClock, *, ttl: timedelta = HOUR) -> Accepted:
    """A certificate, checked as every CA's is."""
    answer = await ask(authority, ttl=ttl)
    return accept(answer, identity=IDENTITY, public_key=KEY.public_key(), anchors=(), now=clock.now())


async def anchors(authority: StoredAuthority) -> tuple[x509.Certificate, ...]:
    return read_pem(await authority.anchors())


class UnmountingClock(HandClock):
    """Takes a directory away as soon as it is asked the time: between the reading of the file and its writing."""

    def __init__(self, directory: Path, start: datetime = NOW) -> None:
        super().__init__(start)
        self._directory = directory

    def now(self) -> datetime:
        if self._directory.exists():
            self._directory.rename(self._directory.with_name("away"))
        return super().now()


def signed_by(leaf: x509.Certificate, root: x509.Certificate, now: datetime) -> bool:
    try:
        return find_path(leaf, (), [root], now) == (leaf,)
    except PathError:
        return False


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- issuing ---


async def test_the_embedded_ca_issues_what_the_agent_accepts_of_every_ca(tmp_path: Path) -> None:
    clock = HandClock()
    accepted = await issue(await embedded(tmp_path, clock), clock)
    assert accepted.chain == (accepted.leaf,)
    assert accepted.warnings == ()
    assert accepted.leaf.not_valid_after_utc == NOW + HOUR
    assert accepted.leaf.not_valid_before_utc == NOW - timedelta(minutes=2)


async def test_the_root_lives_ten_years_and_is_named_after_the_trust_domain(tmp_path: Path) -> None:
    (root,) = await anchors(await embedded(tmp_path))
    assert root.subject.rfc4514_string() == "O=demo.example"
    assert is_self_signed(root)
    assert root.not_valid_after_utc == NOW + TEN_YEARS


@pytest.mark.parametrize(
    ("key_type", "kind", "size"),
    [
        (KeyType.EC_P256, ec.EllipticCurvePublicKey, 256),
        (KeyType.EC_P384, ec.EllipticCurvePublicKey, 384),
        (KeyType.RSA_2048, rsa.RSAPublicKey, 2048),
    ],
)
async def test_the_roots_key_is_of_the_kind_that_was_chosen(
    tmp_path: Path, key_type: KeyType, kind: type[Any], size: int
) -> None:
    clock = HandClock()
    authority = await embedded(tmp_path, clock, key_type=key_type)
    accepted = await issue(authority, clock)
    public_key: Any = accepted.anchors[0].public_key()
    assert isinstance(public_key, kind)
    assert public_key.key_size == size
    again = await embedded(tmp_path, clock, key_type=key_type)
    assert await anchors(again) == accepted.anchors


async def test_the_name_is_the_identity_and_never_what_the_csr_says(tmp_path: Path) -> None:
    csr = make_csr(KEY, "spiffe://demo.example/ns/default/sa/admin")
    (leaf,) = read_pem((await ask(await embedded(tmp_path), csr=csr)).chain_pem)
    assert [name.value for name in san_values(leaf)] == [URI]


async def test_no_leaf_outlives_its_root(tmp_path: Path) -> None:
    clock = HandClock()
    authority = await embedded(tmp_path, clock, lifetime=10 * DAY)
    assert (await issue(authority, clock, ttl=90 * DAY)).leaf.not_valid_after_utc == NOW + 10 * DAY


def tampered() -> bytes:
    """A request whose signature is not that of its key."""
    der = bytearray(x509.load_pem_x509_csr(CSR).public_bytes(Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)


def ed25519_csr() -> bytes:
    builder = x509.CertificateSigningRequestBuilder(x509.Name([]))
    return builder.sign(ed25519.Ed25519PrivateKey.generate(), None).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    "csr",
    [b"", b"garbage", CSR[:-80], tampered(), ed25519_csr()],
    ids=["none", "garbage", "cut", "tampered", "ed25519"],
)
async def test_a_csr_that_proves_no_key_gets_no_certificate(tmp_path: Path, csr: bytes) -> None:
    with pytest.raises(AuthorityError, match="the CSR") as caught:
        await ask(await embedded(tmp_path), csr=csr)
    assert caught.value.kind is ErrorKind.INVALID


async def test_the_agent_refuses_a_lifetime_that_no_certificate_can_have(tmp_path: Path) -> None:
    with pytest.raises(AuthorityError, match="ask for 1 s or more") as caught:
        await ask(await embedded(tmp_path), ttl=timedelta(0))
    assert caught.value.kind is ErrorKind.DENIED


async def test_the_ca_advertises_its_anchors_without_issuing(tmp_path: Path) -> None:
    """Else a renewed root would reach the Envoys only with their next certificate."""
    assert isinstance(await embedded(tmp_path), AdvertisesAnchors)


# --- the file ---


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
async def test_no_other_user_can_read_the_stored_key(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        await embedded(tmp_path / "state" / "local")
    finally:
        os.umask(previous)
    assert mode_of(tmp_path / "state" / "local") == 0o700
    (file,) = (tmp_path / "state" / "local").iterdir()
    assert mode_of(file) == 0o600


async def test_a_restart_keeps_the_root(tmp_path: Path) -> None:
    """A new one would cut off every peer on other machines that was given the old."""
    clock = HandClock()
    before = await issue(await embedded(tmp_path, clock), clock)
    file = (tmp_path / "roots.pem").read_bytes()
    after = await issue(await embedded(tmp_path, clock), clock)
    assert before.anchors == after.anchors
    assert (tmp_path / "roots.pem").read_bytes() == file


def _others_may_read(file: Path) -> None:
    file.chmod(0o640)


def _others_may_write(file: Path) -> None:
    file.chmod(0o602)


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-60])


def _without_its_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _certificate_alone(file: Path) -> None:
    file.write_bytes(file.read_bytes().split(b"-----BEGIN PRIVATE")[0])


def _key_alone(file: Path) -> None:
    file.write_bytes(b"-----BEGIN PRIVATE" + file.read_bytes().split(b"-----BEGIN PRIVATE")[1])


def _another_key(file: Path) -> None:
    file.write_bytes(file.read_bytes().split(b"-----BEGIN PRIVATE")[0] + to_pkcs8_pem(generate(KeyType.EC_P256)))


def _no_ca(file: Path) -> None:
    own = make_ca("own", is_ca=False, key=KEY)
    file.write_bytes(write_pem([own.certificate]) + to_pkcs8_pem(KEY))


def _garbage(file: Path) -> None:
    file.write_bytes(bytes(range(256)))


def _text_behind(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"# renewed in March\n")


def _directory(file: Path) -> None:
    file.unlink()
    (file / "inside").mkdir(parents=True)


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def _dangling_symlink(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("on-a-disk-that-is-not-mounted"))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_others_may_read, "chmod 600"),
        (_others_may_write, "chmod 600"),
        (_truncated, "restore it from a copy"),
        (_without_its_end, "restore it from a copy"),
        (_empty, "restore it from a copy"),
        (_certificate_alone, "restore it from a copy"),
        (_key_alone, "restore it from a copy"),
        (_another_key, "restore it from a copy"),
        (_no_ca, "restore it from a copy"),
        (_garbage, "restore it from a copy"),
        (_text_behind, "restore it from a copy"),
        (_directory, "is not a regular file"),
        (_fifo, "is not a regular file"),
        (_dangling_symlink, "is not a regular file"),
    ],
)
async def test_the_agent_refuses_an_unusable_file_and_leaves_it_unchanged(
    tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    """A CA that silently began anew would cost every peer its trust, and the old root for ever."""
    await embedded(tmp_path)
    file = tmp_path / "roots.pem"
    harm(file)
    before = _everything(tmp_path)
    with pytest.raises(ConfigurationError, match=words) as caught:
        await embedded(tmp_path)
    assert str(caught.value).startswith(f"state_dir: {file}: ")
    assert _everything(tmp_path) == before


def _everything(directory: Path) -> dict[str, tuple[int, bytes | None]]:
    """Every path below, with its type and mode, and the content of files."""
    return {
        path.name: (path.lstat().st_mode, path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else None)
        for path in directory.rglob("*")
    }


async def test_a_root_that_another_user_put_there_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a group may write to the directory, each of its members could be the CA."""
    await embedded(tmp_path)
    if os.geteuid() == 0:
        os.chown(tmp_path / "roots.pem", 4711, -1)
    else:  # no other user may give it away, so we are the other
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(ConfigurationError, match="belongs to uid"):
        await embedded(tmp_path)


async def test_the_agent_removes_the_half_written_key_of_a_killed_agent(tmp_path: Path) -> None:
    await embedded(tmp_path)
    (tmp_path / ".roots.pem.0a1b2c3d").write_text("half a key")
    await embedded(tmp_path)
    assert _everything(tmp_path).keys() == {"roots.pem"}


async def test_the_agent_refuses_a_directory_that_every_user_may_write_to(tmp_path: Path) -> None:
    """A user who may put a file there could put a root of theirs in the place of ours."""
    directory = tmp_path / "local"
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(ConfigurationError, match=r"state_dir: every user may write to .*\(chmod o-w"):
        await embedded(directory)
    assert list(directory.iterdir()) == []


async def test_the_agent_refuses_a_path_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"precious")
    with pytest.raises(ConfigurationError, match=r"^state_dir: .*/state: cannot be used .* a directory of its own"):
        await embedded(tmp_path / "state" / "local")
    assert (tmp_path / "state").read_bytes() == b"precious"


async def test_a_disk_without_room_for_the_directory_is_to_be_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(ConfigurationError, match=r"No space left on device; make room on its disk$"):
        await embedded(tmp_path / "ca")


async def test_a_first_root_that_cannot_be_stored_is_a_configuration_error(tmp_path: Path) -> None:
    """An agent that went on would have another root after every restart."""
    directory = tmp_path / "local"
    with pytest.raises(
        ConfigurationError, match=r"state_dir: the self-signed CA cannot store its new root in .*: No such"
    ):
        await embedded(directory, UnmountingClock(directory))


# --- renewing the root ---


async def test_the_ca_renews_its_root_in_the_last_fifth_of_its_life_and_advertises_both(tmp_path: Path) -> None:
    clock = HandClock()
    authority = await embedded(tmp_path, clock, lifetime=100 * DAY)
    old = await anchors(authority)
    clock.elapse(80 * DAY - timedelta(seconds=1))
    assert await anchors(authority) == old
    with recorded() as events:
        clock.elapse(timedelta(seconds=1))
        both = await anchors(authority)
        assert len(both) == 2
        assert both[0] == old[0]
        assert both[1].not_valid_after_utc == clock.now() + 100 * DAY
        (event,) = events.named("root_created")
        assert event["serial"] == f"{both[1].serial_number:x}"
    assert await anchors(authority) == both
    assert await anchors(await embedded(tmp_path, clock, lifetime=100 * DAY)) == both
    assert mode_of(tmp_path / "roots.pem") == 0o600


@pytest.mark.parametrize(
    ("lifetime", "settle"),
    [(timedelta(minutes=100), timedelta(minutes=5)), (100 * DAY, LONGEST_SETTLE), (TEN_YEARS, LONGEST_SETTLE)],
)
@pytest.mark.parametrize("restart", [False, True])
async def test_a_new_root_signs_only_when_every_envoy_has_had_the_time_to_load_it(
    tmp_path: Path, lifetime: timedelta, settle: timedelta, restart: bool
) -> None:
    assert settle == min(lifetime * SETTLE_SHARE, LONGEST_SETTLE)
    clock = HandClock()
    ca, authority = await both(tmp_path, clock, lifetime)
    clock.elapse(lifetime * (1 - RENEWAL_SHARE))
    ttl = timedelta(seconds=30)
    first = await issue(authority, clock, ttl=ttl)
    old, new = first.anchors
    assert signed_by(first.leaf, old, clock.now())
    if restart:
        ca, authority = await both(tmp_path, clock, lifetime)
    clock.elapse(settle - timedelta(seconds=1))
    last = (await issue(authority, clock, ttl=ttl)).leaf
    assert signed_by(last, old, clock.now())
    assert (await ca.signing()).signer.certificate == old
    assert (await ca.signing()).roots == (old, new)
    clock.elapse(timedelta(seconds=1))
    after = await issue(authority, clock, ttl=ttl)
    assert signed_by(after.leaf, new, clock.now())
    assert (await ca.signing()).signer.certificate == new
    assert after.anchors == (old, new)
    assert find_path(last, (), after.anchors, clock.now()) == (last,)


async def both(directory: Path, clock: HandClock, lifetime: timedelta) -> tuple[SelfSignedCa, StoredAuthority]:
    """The CA, as a CA server uses it too, and the agent's authority on it."""
    ca = await SelfSignedCa.open(
        directory,
        trust_domain="demo.example",
        key_type=KeyType.EC_P256,
        lifetime=lifetime,
        clock=clock,
        setting="state_dir",
    )
    return ca, StoredAuthority(ca, "the embedded CA", clock, REFRESH)


async def test_the_first_root_signs_at_once(tmp_path: Path) -> None:
    clock = HandClock()
    assert (await issue(await embedded(tmp_path, clock), clock)).chain


async def test_leaves_from_the_old_root_verify_until_they_expire(tmp_path: Path) -> None:
    """From the day of the renewal to the last of the old root, some workload has such a leaf."""
    clock = HandClock()
    authority = await embedded(tmp_path, clock, lifetime=100 * DAY)
    clock.elapse(80 * DAY)
    leaf = (await issue(authority, clock, ttl=90 * DAY)).leaf
    while clock.now() < leaf.not_valid_after_utc - DAY:
        clock.elapse(DAY)
        assert find_path(leaf, (), await anchors(authority), clock.now()) == (leaf,)


async def test_the_ca_stops_advertising_an_expired_root(tmp_path: Path) -> None:
    """Envoy counts the days to the first expiry of its anchors, and would raise the alarm for ever."""
    clock = HandClock()
    authority = await embedded(tmp_path, clock, lifetime=100 * DAY)
    clock.elapse(80 * DAY)
    _old, new = await anchors(authority)
    clock.elapse(20 * DAY - timedelta(seconds=1))
    assert len(await anchors(authority)) == 2
    clock.elapse(timedelta(seconds=1))
    assert await anchors(authority) == (new,)
    assert (await issue(authority, clock)).anchors == (new,)


async def test_roots_follow_one_another_without_a_gap_for_ever(tmp_path: Path) -> None:
    clock = HandClock()
    authority = await embedded(tmp_path, clock, lifetime=100 * DAY)
    for _ in range(60):
        before = await issue(authority, clock, ttl=12 * DAY)
        clock.elapse(10 * DAY)
        after = await issue(authority, clock, ttl=12 * DAY)
        assert find_path(before.leaf, (), after.anchors, clock.now())
        assert find_path(after.leaf, (), after.anchors, clock.now())
        assert len(after.anchors) <= 2
    assert (tmp_path / "roots.pem").read_bytes().count(b"BEGIN PRIVATE KEY") <= 2


async def test_many_that_ask_at_the_moment_of_renewal_make_one_new_root(tmp_path: Path) -> None:
    """Also where a key is made in a thread: of two roots the file would hold one, and the other's leaves be lost."""
    clock = HandClock()
    authority = await embedded(tmp_path, clock, lifetime=100 * DAY, key_type=KeyType.RSA_2048)
    clock.elapse(80 * DAY)
    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(ask, authority)
            tasks.start_soon(authority.anchors)
    assert len(await anchors(authority)) == 2


async def test_a_machine_that_was_off_beyond_the_roots_end_begins_anew(tmp_path: Path) -> None:
    clock = HandClock()
    (old,) = await anchors(await embedded(tmp_path, clock, lifetime=100 * DAY))
    clock.elapse(200 * DAY)
    authority = await embedded(tmp_path, clock, lifetime=100 * DAY)
    accepted = await issue(authority, clock)
    assert len(accepted.anchors) == 1
    assert accepted.anchors != (old,)


# --- faults at the renewal ---


async def test_the_ca_issues_from_its_old_root_while_a_new_one_cannot_be_stored(tmp_path: Path) -> None:
    """The old root has a fifth of its life left; a full disk must not end every certificate within hours."""
    clock = HandClock()
    directory = tmp_path / "local"
    authority = await embedded(directory, clock, lifetime=100 * DAY)
    old = await anchors(authority)
    directory.rename(tmp_path / "away")
    with recorded() as events:
        clock.elapse(80 * DAY)
        accepted = await issue(authority, clock)
        assert accepted.anchors == await anchors(authority) == old
        event = events.named("root_not_renewed")[0]
        assert event["level"] == "error"
        assert f"{directory / 'roots.pem'}: No such file or directory" in event["cause"]
        assert events.named("root_created") == []
        assert len(events.named("root_not_renewed")) == 1, "however many ask"
        clock.elapse(LONGEST_RETRY)
        assert await anchors(authority) == old
        assert len(events.named("root_not_renewed")) == 2
        (tmp_path / "away").rename(directory)
        clock.set_wall(-LONGEST_RETRY)
        assert len(await anchors(authority)) == 2, "a clock that is set back puts nothing off"
        assert len(events.named("root_created")) == 1


async def test_an_agent_starts_on_its_old_root_when_a_new_one_cannot_be_stored(tmp_path: Path) -> None:
    clock = HandClock()
    old = await anchors(await embedded(tmp_path / "local", clock, lifetime=100 * DAY))
    clock.elapse(80 * DAY)

    clock = UnmountingClock(tmp_path / "local", clock.now())
    authority = await embedded(tmp_path / "local", clock, lifetime=100 * DAY)
    assert (await issue(authority, clock)).anchors == old


async def test_with_the_last_root_expired_the_failure_is_passing_and_says_why(tmp_path: Path) -> None:
    clock = HandClock()
    directory = tmp_path / "local"
    authority = await embedded(directory, clock, lifetime=100 * DAY)
    directory.rename(tmp_path / "away")
    clock.elapse(100 * DAY)
    for call in (lambda: ask(authority), authority.anchors):
        with pytest.raises(AuthorityError, match=r"cannot store its new root in .*roots.pem: No such file") as caught:
            await call()
        assert caught.value.kind is ErrorKind.TRANSIENT
    (tmp_path / "away").rename(directory)
    assert (await issue(authority, clock)).chain


async def test_a_renewal_that_is_cancelled_leaves_a_ca_that_works(tmp_path: Path) -> None:
    clock = HandClock()
    authority = await embedded(tmp_path, clock, lifetime=100 * DAY)
    clock.elapse(80 * DAY)
    asking = asyncio.create_task(ask(authority))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(authority.anchors)
        await anyio.lowlevel.checkpoint()
        asking.cancel()
    with anyio.fail_after(10):
        assert len((await issue(authority, clock)).anchors) == 2


# --- wrong clocks ---


async def test_the_error_for_a_clock_before_the_roots_beginning_says_to_set_the_clock(tmp_path: Path) -> None:
    clock = HandClock()
    authority = await embedded(tmp_path, clock)
    clock.set_wall(-30 * DAY)
    with pytest.raises(AuthorityError, match="set this machine's clock"):
        await ask(authority)
    assert len(await anchors(authority)) == 1
    clock.set_wall(30 * DAY)
    assert (await issue(authority, clock)).chain


async def test_a_clock_that_was_years_ahead_for_a_while_does_not_cost_the_root(tmp_path: Path) -> None:
    """Every peer trusts it; with the clock set right it has to sign again."""
    clock = HandClock()
    (root,) = await anchors(await embedded(tmp_path, clock))
    clock.set_wall(2 * TEN_YEARS)
    await issue(await embedded(tmp_path, clock), clock)
    clock.set_wall(-2 * TEN_YEARS)
    accepted = await issue(await embedded(tmp_path, clock), clock)
    assert signed_by(accepted.leaf, root, clock.now())


async def test_a_clock_that_was_far_ahead_for_a_while_costs_no_root_that_certificates_still_chain_to(
    tmp_path: Path,
) -> None:
    """Shortly after a renewal most of them are of the root before, and no Envoy would accept them any more."""
    clock, lifetime = HandClock(), 100 * DAY
    await embedded(tmp_path, clock, lifetime=lifetime)
    clock.elapse(82 * DAY)
    before = await anchors(await embedded(tmp_path, clock, lifetime=lifetime))
    assert len(before) == 2
    clock.set_wall(300 * DAY)
    await embedded(tmp_path, clock, lifetime=lifetime)
    clock.set_wall(-300 * DAY)
    assert set(before) <= set(await anchors(await embedded(tmp_path, clock, lifetime=lifetime)))


async def test_a_machine_that_is_mostly_off_gathers_no_roots(tmp_path: Path) -> None:
    """Each start would add one to those that have all expired, until the file is too large to be read again."""
    clock, sizes = HandClock(), list[int]()
    for _ in range(2 * MOST_EXPIRED):
        await embedded(tmp_path, clock, lifetime=DAY)
        sizes.append((tmp_path / "roots.pem").read_bytes().count(b"BEGIN CERTIFICATE"))
        clock.elapse(2 * DAY)
    assert sizes == [*range(1, MOST_EXPIRED + 1), *[MOST_EXPIRED + 1] * MOST_EXPIRED]


@pytest.mark.parametrize("start", [DAY, 200 * DAY], ids=["at once", "after the end of the root before it"])
async def test_a_root_that_was_made_while_the_clock_was_ahead_delays_no_later_one(
    tmp_path: Path, start: timedelta
) -> None:
    """It begins years after the one before it has ended, and until then the CA would have none to sign with."""
    clock, lifetime = HandClock(), 100 * DAY
    authority = await embedded(tmp_path, clock, lifetime=lifetime)
    await issue(authority, clock)
    clock.set_wall(1000 * DAY)
    await issue(authority, clock)
    clock.set_wall(-1000 * DAY)
    clock.elapse(start)
    for _ in range(30):
        await issue(authority, clock)
        clock.elapse(10 * DAY)


async def test_a_lifetime_that_is_configured_shorter_does_not_stop_the_root_there_is(tmp_path: Path) -> None:
    clock = HandClock()
    (root,) = await anchors(await embedded(tmp_path, clock))
    accepted = await issue(await embedded(tmp_path, clock, lifetime=10 * DAY), clock)
    assert accepted.anchors == (root,)


async def test_a_ca_begins_with_the_roots_that_another_has_renewed_since_it_was_opened(tmp_path: Path) -> None:
    """An agent that reloads opens it beside that of the former settings, which is in use for some seconds more."""
    clock = HandClock()
    former = await embedded(tmp_path, clock, lifetime=HOUR)
    await anchors(former)
    clock.elapse(HOUR - HOUR * RENEWAL_SHARE)
    opened = await embedded(tmp_path, clock, lifetime=2 * HOUR)
    renewed = await anchors(former)
    assert len(renewed) == 2
    assert (await anchors(opened))[:2] == renewed
    clock.elapse(2 * HOUR)
    assert (await issue(opened, clock)).not_after > clock.now()


async def test_a_ca_that_finds_damaged_roots_before_it_is_asked_leaves_them_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "roots.pem"
    clock = HandClock()
    authority = await embedded(tmp_path, clock)
    before = await ask(authority)
    opened = await embedded(tmp_path, clock)
    file.write_bytes(b"no roots")
    assert (await ask(opened)).anchors_pem == before.anchors_pem
    clock.elapse(TEN_YEARS)
    with pytest.raises(AuthorityError, match="holds other roots"):
        await ask(opened)
    assert file.read_bytes() == b"no roots"
