"""Private keys stay where they belong: no log line, no representation and no error ever shows one.

A scenario with everything that can go wrong is played, every key that is made in it is noted, and all that was written
and all that can be reached is searched for each of them.
"""

import gc
import io
import logging
import pprint
import traceback
import types
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from fakes.authorities import WRONG, Hang, ScriptedAuthority, Step, UpstreamCa, answering, failing, faulty
from fakes.clocks import HAND_LOOP, HandClock
from fakes.events import Events, recorded
from fakes.hierarchy import DAY, HOUR, NOW, URI
from msgspec.structs import asdict

from sds_agent import log
from sds_agent.authority.embedded import REFRESH
from sds_agent.authority.in_process import StoredAuthority
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, IssueRequest
from sds_agent.errors import ConfigurationError
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.publication import PublicationTarget
from sds_agent.issuance.queue import IssuanceQueue
from sds_agent.issuance.requester import CA_TIMEOUT, Requester
from sds_agent.issuance.schedule import Renewal
from sds_agent.issuance.source import Upstream
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload
from sds_agent.pki.keys import KeyType, PrivateKey, generate, to_pkcs8_pem
from sds_agent.sds.catalog import Catalog
from sds_agent.secrets.model import CertificateSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.signing.self_signed import LONGEST_RETRY, SelfSignedCa

MINUTE = timedelta(minutes=1)
ROOT_LIFETIME = 100 * DAY


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return HAND_LOOP


def forms(key: PrivateKey) -> set[str]:
    """The texts that give a key away: any line of any PEM of it, its DER and its numbers."""
    found = set()
    for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
        pem = key.private_bytes(Encoding.PEM, form, NoEncryption()).decode().splitlines()
        # the last line of an EC key ends in the public half, which is no secret
        found |= {line for line in pem[1:-1] if len(line) == 64}
        found.add(key.private_bytes(Encoding.DER, form, NoEncryption()).hex()[60:120])
    numbers = key.private_numbers()
    private = (
        [numbers.d, numbers.p, numbers.q] if isinstance(numbers, rsa.RSAPrivateNumbers) else [numbers.private_value]
    )
    return found | {text for number in private for text in (f"{number}", f"{number:x}", f"{number:X}")}


class Keys:
    """Every private key that was made."""

    def __init__(self) -> None:
        self.noted: list[PrivateKey] = []
        self._forms: set[str] = set()

    def note(self, key: PrivateKey) -> None:
        """Remember a key."""
        self.noted.append(key)
        self._forms |= forms(key)

    def note_pem(self, pem: bytes) -> None:
        """Remember every key in a text."""
        marker = b"-----BEGIN PRIVATE KEY-----"
        for part in pem.split(marker)[1:]:
            key = load_pem_private_key(marker + part, None)
            assert isinstance(key, PrivateKey)
            self.note(key)

    def leaked(self, text: str) -> set[str]:
        """What of any of them the text shows."""
        return {form for form in self._forms if form in text}


class Scene:
    """One workload with an embedded CA, on the way to which everything goes wrong."""

    def __init__(self, directory: Path, events: Events) -> None:
        self.keys = Keys()
        self.clock = HandClock()
        self.directory = directory
        self.events = events
        self.store = SecretStore(["default", "ROOTCA"])
        self.trust = Trust(self.store, ["ROOTCA"], self.clock)
        identity, renewal = SpiffeId.parse(URI), Renewal(jitter=0)
        self.workload = Workload("default", identity, KeyType.EC_P256, HOUR, "local", ("default",), renewal=renewal)
        self.stored: list[object] = []
        """Values that are gone by the end, stored to be searched."""

    def noting(self, step: Step) -> Step:
        """The step, with the key of the request noted, and the request and the answer stored."""

        async def noted(request: IssueRequest) -> Issuance:
            requester = self.issuer._sources[0]._requester
            assert isinstance(requester, Requester)
            pending = requester._pending
            assert pending is not None
            self.keys.note(pending.key)
            self.stored += [request, pending]
            try:
                answer = await step(request)
            except Exception as error:
                self.stored.append(error)
                raise
            self.stored.append(answer)
            return answer

        return noted

    @asynccontextmanager
    async def playing(self, *script: Step) -> AsyncIterator[ScriptedAuthority]:
        authority = ScriptedAuthority(*(self.noting(step) for step in script))
        self.issuer = Issuer(
            self.workload,
            Upstream(authority, IssuanceQueue()),
            PublicationTarget(self.store, self.trust),
            clock=self.clock,
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.issuer.run)
            yield authority
            tasks.cancel_scope.cancel()

    async def open(self) -> StoredAuthority:
        """The CA, its keys noted."""
        ca = self.self_signed = await SelfSignedCa.open(
            self.directory,
            trust_domain="demo.example",
            key_type=KeyType.EC_P256,
            lifetime=ROOT_LIFETIME,
            clock=self.clock,
            setting="state_dir",
        )
        self.keys.note_pem((self.directory / "roots.pem").read_bytes())
        return StoredAuthority(ca, "the embedded CA", self.clock, REFRESH)

    async def play(self) -> None:
        """Failures of every kind, two certificates, an expiry, and roots that are renewed, lost and damaged."""
        upstream = UpstreamCa(self.clock.now)
        wrong = [answering(upstream, answer) for answer, _kind in WRONG.values()]
        refused = [failing(kind, f"refused as {kind.value}") for kind in ErrorKind]
        ca = await self.open()
        hung = Hang(ca.issue)
        async with self.playing(faulty, *wrong, *refused, hung, ca.issue, faulty, ca.issue, refused[0]) as authority:
            failures = len(wrong) + len(refused) + 1
            for count in range(1, failures + 1):
                await self.events.wait("retrying", count=count)
                await self.clock.asleep()
                self.clock.elapse(MINUTE)
            await authority.asked(failures + 1)
            self.clock.elapse(timedelta(seconds=CA_TIMEOUT))
            await self.events.wait("retrying", count=failures + 1)
            self.clock.elapse(MINUTE)
            await self.events.wait("issued")
            await self.clock.asleep()
            self.clock.elapse(HOUR / 2)
            await self.events.wait("retrying", count=failures + 2)
            self.clock.elapse(MINUTE)
            await self.events.wait("renewed")
            await self.clock.asleep()
            self.stored += [self.issuer.status, self.trust.status, self.store.snapshot, Catalog(self.store)["default"]]
            self.clock.elapse(2 * HOUR)
            await self.events.wait("expired")
        self.stored += [self.issuer, self.store, self.trust, ca]
        await self.trouble_with_roots(ca)

    async def trouble_with_roots(self, ca: StoredAuthority) -> None:
        """Not to be written in time; renewed; not to be written at all; damaged."""
        file, away = self.directory / "roots.pem", self.directory.with_name("away")
        self.clock.elapse(ROOT_LIFETIME * 0.85)
        self.directory.rename(away)
        await ca.anchors()
        await self.events.wait("root_not_renewed")
        away.rename(self.directory)
        self.clock.elapse(LONGEST_RETRY)
        await ca.anchors()
        self.keys.note_pem(file.read_bytes())
        self.stored.append(await self.self_signed.signing())
        self.directory.rename(away)
        self.clock.elapse(2 * ROOT_LIFETIME)
        with pytest.raises(AuthorityError) as unwritten:
            await ca.anchors()
        away.rename(self.directory)
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(ConfigurationError) as damaged:
            await self.open()
        self.stored += [unwritten.value, damaged.value]


@pytest.fixture(params=["text", "json"])
def written(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """All that is logged: by us in one of our forms, and as a program around us would log it, with tracebacks."""
    loggers = [logging.getLogger(name) for name in (log.ROOT, "asyncio", "grpc")]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    stream = io.StringIO()
    log.configure(request.param, "debug", stream)
    loggers[0].addHandler(logging.StreamHandler(stream))
    yield stream
    for logger, handlers, level, propagate in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with recorded() as events:
        yield Scene(tmp_path / "ca", events)


async def test_no_log_line_ever_shows_a_key(written: io.StringIO, scene: Scene) -> None:
    await scene.play()
    text = written.getvalue()
    for event in ("fault", "retrying", "issued", "renewed", "expired", "root_created", "root_not_renewed"):
        assert event in text
    assert "Traceback" in text
    assert len(scene.keys.noted) > 30
    assert scene.keys.leaked(text) == set()


def reachable(roots: Iterable[object]) -> Iterator[object]:
    """Whatever the roots hold, however deeply, but for modules, classes and code."""
    seen: dict[int, object] = {}
    rest = list(roots)
    while rest:
        found = rest.pop()
        if id(found) not in seen and not isinstance(found, types.ModuleType | type | types.FunctionType):
            seen[id(found)] = found
            yield found
            rest += gc.get_referents(found)


def ours(found: object) -> bool:
    return type(found).__module__.startswith("sds_agent") or isinstance(found, types.MappingProxyType | BaseException)


def texts(found: object) -> Iterator[str]:
    """Every way in which a value is usually put into words."""
    yield from (repr(found), str(found), f"{found}", pprint.pformat(found), "%s %r" % (found, found))  # noqa: UP031 - %-formatting is what is tried here
    if isinstance(found, BaseException):
        yield "".join(traceback.format_exception(found))


async def test_no_representation_and_no_error_shows_a_key(scene: Scene) -> None:
    await scene.play()
    found = [value for value in reachable(scene.stored) if ours(value)]
    assert {type(value).__name__ for value in found} >= {
        "AuthorityError",
        "CertificateSecret",
        "ConfigurationError",
        "CurrentIdentity",
        "StoredAuthority",
        "Issuance",
        "IssueRequest",
        "Issuer",
        "KeyError",
        "Resource",
        "Roots",
        "SecretStore",
        "Signer",
        "PendingRequest",
        "mappingproxy",
    }
    leaking = {type(value).__name__ for value in found for text in texts(value) if scene.keys.leaked(text)}
    assert leaking == set()


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
def test_the_search_finds_what_is_there(key_type: KeyType) -> None:
    """Each way in which a key could be shown is recognised; else the tests above would prove nothing."""
    key, keys = generate(key_type), Keys()
    pem = to_pkcs8_pem(key)
    keys.note_pem(pem)
    secret = CertificateSecret(b"chain", pem, NOW)
    numbers = key.private_numbers()
    private = numbers.d if isinstance(numbers, rsa.RSAPrivateNumbers) else numbers.private_value
    shown = [pem.decode(), repr(pem), repr([pem]), repr(asdict(secret)), repr(private), f"{private:x}"]
    assert all(keys.leaked(text) for text in shown)
    assert not keys.leaked(repr(secret))
