"""The running agent takes another configuration: what the change is not about notices nothing of it."""

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import pytest
from cryptography import x509
from fakes.authorities import Hang, ScriptedAuthority, ScriptedTrust, UpstreamCa, answering, failing, shifted
from fakes.configurations import settings
from fakes.events import Events, recorded
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from fakes.peers import Peer, SotwStream, chain_of, connected

from sds_agent.app import agent
from sds_agent.authority.protocol import ErrorKind
from sds_agent.clock import SystemClock
from sds_agent.config.settings import Settings
from sds_agent.issuance.issuer import Issuer
from sds_agent.live import assembly
from sds_agent.live.agent import Agent
from sds_agent.live.workloads import STARTED_AT_ONCE
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.preflight import client_rules
from sds_agent.secrets.model import BundleSecret
from sds_agent.secrets.readiness import complete
from sds_agent.state import RestorableFiles

HEAD = """
trust_domain: demo.example
state_dir: state
sds: {socket: sds.sock}
"""
ONE = "authorities: {one: {type: embedded}}\n"
TWO = "authorities: {one: {type: embedded}, two: {type: embedded}}\n"


def workload(name: str, spiffe_id: str = "", more: str = "") -> str:
    return f"  - {{name: {name}, spiffe_id: spiffe://demo.example/{spiffe_id or name}{more}}}\n"


class Listener:
    """A stream on which the next message is waited for."""

    def __init__(self, stream: SotwStream) -> None:
        self.heard = asyncio.create_task(stream.read())
        self._stream = stream

    async def end(self) -> tuple[grpc.StatusCode, str]:
        """Wait until the server ends the stream without another message; returns its status code and message."""
        await asyncio.wait([self.heard])
        assert self.heard.exception() is not None
        return await self._stream.end()

    def leave(self) -> None:
        """End the stream."""
        self.heard.cancel()
        self._stream.leave()


class Live:
    """An agent with CAs of this process, and a client of its socket."""

    def __init__(self, folder: Path, agent: Agent, peer: Peer, cas: Mapping[str, ScriptedAuthority]) -> None:
        self.folder = folder
        self.agent = agent
        self.peer = peer
        self.cas = dict(cas)

    def settings(self, *parts: str) -> Settings:
        """These parts of a file as a whole configuration."""
        return settings(self.folder, HEAD + "".join(parts))

    async def apply(self, *parts: str, **cas: ScriptedAuthority) -> None:
        """Take another configuration, with these authorities in the place of others or beside them."""
        chosen = self.settings(*parts)
        self.cas |= cas
        cas = {name: self.cas[name] for name in chosen.authorities}
        await self.agent.apply(chosen, cas, client_rules(chosen))

    async def subscribed(self, *names: str) -> "Listener":
        """One that has what is served under these names, and has taken it."""
        stream = await self.peer.stream().ask(*names)
        got = set[str]()
        while got != set(names):
            got |= set(await stream.read())
            await stream.ack(*names)
        return Listener(stream)

    async def nothing_said(self, *listeners: "Listener") -> None:
        """None of these has got a message, and their streams are open. What the agent had to say is said by now."""
        for _ in range(3):
            await self.peer.fetch("api")
        assert [each.heard.done() for each in listeners] == [False] * len(listeners)

    def serials(self) -> dict[str, str]:
        """What is served to whom."""
        return {each.name: each.current.serial for each in self.agent.workloads if each.current is not None}

    def anchors(self) -> set[x509.Certificate]:
        """The trust bundle."""
        bundle = self.agent.store.snapshot["ROOTCA"]
        assert isinstance(bundle, BundleSecret)
        return set(read_pem(bundle.anchors_pem))


CLOCK = SystemClock()
CA, OTHER = UpstreamCa(CLOCK.now, "one"), UpstreamCa(CLOCK.now, "two")


class Advertising(ScriptedAuthority):
    """A CA that advertises its root as well, and is asked for it all the time."""

    refresh_every = timedelta(milliseconds=5)

    def __init__(self, ca: UpstreamCa) -> None:
        super().__init__(answering(ca))
        self.roots = ScriptedTrust(write_pem([ca.root.certificate]))

    async def anchors(self) -> bytes:
        """The root."""
        return await self.roots.anchors()


@asynccontextmanager
async def live(folder: Path, *parts: str, **cas: ScriptedAuthority) -> AsyncIterator[Live]:
    chosen = settings(folder, HEAD + "".join(parts))
    async with agent(chosen, cas, CLOCK) as running, connected(folder / "sds.sock") as peer:
        with anyio.fail_after(20):
            yield Live(folder, running, peer, cas)


def good() -> ScriptedAuthority:
    return ScriptedAuthority(answering(CA))


@pytest.fixture
def events() -> Any:
    with recorded() as events:
        yield events


WEB_AND_API = (ONE, "workloads:\n", workload("web"), workload("api"))
ONE_MORE = workload("db")


async def test_a_workload_that_goes_ends_its_streams_and_no_other_gets_a_message(tmp_path: Path) -> None:
    async with live(tmp_path, *WEB_AND_API, one=good()) as all_:
        await complete(all_.agent.store)
        api, both, web = [await all_.subscribed(*names) for names in (("api", "ROOTCA"), ("web", "api"), ("web",))]
        serials = all_.serials()
        await all_.apply(ONE, "workloads:\n", workload("api"))
        code, words = await web.end()
        assert code is grpc.StatusCode.NOT_FOUND
        assert "no secret named 'web'" in words
        assert "this agent serves 'api'" in words
        await all_.nothing_said(api, both)
        assert all_.serials() == {"api": serials["api"]}
        assert {name for each in all_.agent.streams for name in (s.name for s in each.names)} >= {"api", "ROOTCA"}
        for stream in (api, both):
            stream.leave()


async def test_delta_says_that_the_name_was_removed(tmp_path: Path) -> None:
    async with live(tmp_path, *WEB_AND_API, one=good()) as all_:
        await complete(all_.agent.store)
        stream = await all_.peer.delta().subscribe("web")
        await stream.read()
        await stream.ack()
        await all_.apply(ONE, "workloads:\n", workload("api"))
        assert (await stream.read()).removed_resources == ["web"]
        await stream.ack()
        await all_.apply(*WEB_AND_API)
        assert [each.name for each in (await stream.read()).resources] == ["web"], "it was removed for good"


async def test_a_workload_that_comes_is_issued_and_no_other_stream_gets_a_message(tmp_path: Path) -> None:
    async with live(tmp_path, ONE, "workloads:\n", workload("api"), one=good()) as all_:
        await complete(all_.agent.store)
        api, serials = await all_.subscribed("api", "ROOTCA"), all_.serials()
        await all_.apply(*WEB_AND_API)
        assert "web" in await all_.peer.fetch("web", "spiffe://demo.example/web")
        await all_.nothing_said(api)
        assert all_.serials()["api"] == serials["api"]
        assert [each.name for each in all_.agent.workloads] == ["web", "api"], "in the order of the file"
        assert all_.agent.about.names["web"] == ("web", "spiffe://demo.example/web")
        api.leave()


@pytest.mark.parametrize(
    "more",
    [", ttl: 2h", ", key: rsa-2048", ", authority: [one]"],
)
async def test_a_workload_that_is_configured_otherwise_goes_on_with_its_certificate(tmp_path: Path, more: str) -> None:
    ca = good()
    async with live(tmp_path, *WEB_AND_API, one=ca) as all_:
        await complete(all_.agent.store)
        web, serials = await all_.subscribed("web"), all_.serials()
        await all_.apply(ONE, "workloads:\n", workload("web", more=more), workload("api"))
        await all_.nothing_said(web)
        assert (all_.serials(), len(ca.requests)) == (serials, 2)


async def test_a_workload_that_is_for_others_from_now_on_goes_on_with_its_certificate(tmp_path: Path) -> None:
    ca, others = good(), ", clients: {users: [4711]}"
    async with live(tmp_path, ONE, "workloads:\n", workload("web"), workload("api", more=others), one=ca) as all_:
        await complete(all_.agent.store)
        web, serials = await all_.subscribed("web"), all_.serials()
        await all_.apply(ONE, "workloads:\n", workload("web", more=others), workload("api"))
        assert (await web.end())[0] is grpc.StatusCode.PERMISSION_DENIED
        await all_.peer.fetch("api", "spiffe://demo.example/api", "ROOTCA")
        assert (all_.serials(), len(ca.requests)) == (serials, 2)


async def test_a_workload_that_comes_for_others_is_not_for_everybody_for_a_moment(tmp_path: Path) -> None:
    """A stream may have asked for its name long before."""
    more = ", clients: {users: [4711]}"
    parts = [ONE, "workloads:\n", workload("api"), workload("db", more=more)]
    async with live(tmp_path, *parts, one=good()) as all_:
        await complete(all_.agent.store)
        stream = await all_.peer.stream().ask("api", "web")
        await stream.read()
        await stream.ack("api", "web")
        listener = Listener(stream)
        await all_.apply(*parts, workload("web", more=more))
        await complete(all_.agent.store)
        await all_.nothing_said(listener)
        listener.leave()


async def test_a_renamed_workload_is_served_under_its_new_name_at_once(tmp_path: Path) -> None:
    """The CA may be down, or may have taken a join token for it."""
    async with live(
        tmp_path, *WEB_AND_API, one=ScriptedAuthority(*[answering(CA)] * 2, failing(ErrorKind.DENIED))
    ) as all_:
        await complete(all_.agent.store)
        old, by_id = await all_.subscribed("web"), await all_.subscribed("spiffe://demo.example/web")
        before = chain_of((await all_.peer.fetch("web"))["web"])
        await all_.apply(ONE, "workloads:\n", workload("front", "web"), workload("api"))
        assert (await old.end())[0] is grpc.StatusCode.NOT_FOUND
        assert chain_of((await all_.peer.fetch("front"))["front"]) == before
        await all_.nothing_said(by_id)
        by_id.leave()


async def test_other_identity_under_a_name_never_gets_the_certificate_of_the_one_before(tmp_path: Path) -> None:
    ca = ScriptedAuthority(*[answering(CA)] * 2, hang := Hang(answering(CA)))
    async with live(tmp_path, *WEB_AND_API, one=ca) as all_:
        await complete(all_.agent.store)
        stream = await all_.subscribed("web")
        await all_.apply(ONE, "workloads:\n", workload("web", "other"), workload("api"))
        await ca.asked(3)
        assert all_.agent.store.snapshot["web"] is None
        assert "spiffe://demo.example/web" not in all_.agent.store.snapshot
        await all_.nothing_said(stream)
        hang.release.set()
        (leaf, *_) = read_pem(chain_of((await stream.heard)["web"]))
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://demo.example/other"]
        stream.leave()


async def test_an_attempt_under_way_is_given_up_with_its_workload(tmp_path: Path) -> None:
    ca = ScriptedAuthority(hang := Hang(answering(CA)))
    async with live(tmp_path, *WEB_AND_API, one=ca) as all_:
        await ca.asked(2)
        await all_.apply(ONE, "workloads:\n", workload("api"))
        assert (ca.under_way, hang.given_up) == (1, True)
        hang.release.set()
        assert "api" in await all_.peer.fetch("api")
        assert all_.agent.store.missing == (), "the agent waits for a workload that is gone"


async def test_peers_accept_a_removed_workload_until_its_certificate_ends(tmp_path: Path) -> None:
    """They may have a connection open with it, or be asked by an Envoy that has not been told yet."""
    both = (TWO, "workloads:\n", workload("web", more=", authority: one"), workload("api", more=", authority: two"))
    async with live(tmp_path, *both, one=good(), two=ScriptedAuthority(answering(OTHER))) as all_:
        await complete(all_.agent.store)
        roots = {CA.root.certificate, OTHER.root.certificate}
        assert all_.anchors() == roots
        ends = next(each.current.not_after for each in all_.agent.workloads if each.name == "web" and each.current)
        await all_.apply("authorities: {two: {type: embedded}}\nworkloads:\n", workload("api"))
        assert all_.anchors() == roots, "peers would refuse a certificate that has not ended"
        (kept,) = [each for each in all_.agent.trust.anchors if not each.advertised_by]
        assert kept.needed_until == ends
        stored = {each.authority for each in all_.agent.bundle.stored.advertised}
        assert stored == {"two"}, "after a restart an authority that is gone would advertise"


@pytest.mark.parametrize("way", ["removed", "replaced"])
async def test_an_authority_that_goes_is_asked_for_its_roots_no_longer(tmp_path: Path, way: str) -> None:
    """It is closed, or its address was given to another: its answers would change the trust bundle all the same."""
    one, two, fresh = Advertising(CA), Advertising(OTHER), Advertising(OTHER)
    async with live(tmp_path, TWO, "workloads:\n", workload("api", more=", authority: one"), one=one, two=two) as all_:
        await two.roots.asked(2)
        if way == "removed":
            await all_.apply(ONE, "workloads:\n", workload("api"))
        else:
            changed = TWO.replace("two: {type: embedded", "two: {type: embedded, root_lifetime: 9h")
            await all_.apply(changed, "workloads:\n", workload("api", more=", authority: one"), two=fresh)
            await fresh.roots.asked(1)
        calls = two.roots.calls
        await one.roots.asked(one.roots.calls + 5)
        assert two.roots.calls == calls


async def test_workloads_of_a_changed_authority_go_on_and_ask_the_new_one_when_it_is_due(tmp_path: Path) -> None:
    fresh = ScriptedAuthority(answering(CA))
    async with live(tmp_path, *WEB_AND_API, one=good()) as all_:
        await complete(all_.agent.store)
        web, serials = await all_.subscribed("web", "ROOTCA"), all_.serials()
        await all_.apply(ONE.replace("embedded", "embedded, root_lifetime: 9h"), *WEB_AND_API[1:], one=fresh)
        await all_.nothing_said(web)
        assert (all_.serials(), fresh.requests) == (serials, [])
        await all_.apply(
            ONE.replace("embedded", "embedded, root_lifetime: 9h"),
            *WEB_AND_API[1:],
            "  - {name: db, spiffe_id: spiffe://demo.example/db}\n",
        )
        assert str((await fresh.asked(1)).identity) == "spiffe://demo.example/db"
        web.leave()


async def test_a_workload_of_another_authority_gets_another_certificate_and_both_are_trusted(
    tmp_path: Path, events: Events
) -> None:
    async with live(tmp_path, ONE, "workloads:\n", workload("web"), one=good()) as all_:
        await complete(all_.agent.store)
        web, serials = await all_.subscribed("web"), all_.serials()
        moved = ("authorities: {two: {type: embedded}}\nworkloads:\n", workload("web"))
        await all_.apply(*moved, two=ScriptedAuthority(answering(OTHER)))
        (leaf, *_) = read_pem(chain_of((await web.heard)["web"]))
        assert all_.serials() == {"web": f"{leaf.serial_number:x}"}
        assert all_.serials() != serials
        assert all_.anchors() == {CA.root.certificate, OTHER.root.certificate}
        assert events.named("old_anchors_kept", authority="two")
        web.leave()


async def test_times_of_renewal_apply_to_all_without_a_message(tmp_path: Path) -> None:
    async with live(tmp_path, *WEB_AND_API, one=good()) as all_:
        await complete(all_.agent.store)
        before = [each.current.renew_at for each in all_.agent.workloads if each.current]
        web = await all_.subscribed("web")
        await all_.apply("renewal: {fraction: 0.7}\n", *WEB_AND_API)
        after = [each.current.renew_at for each in all_.agent.workloads if each.current]
        assert all(late > early for early, late in zip(before, after, strict=True) if early and late)
        await all_.nothing_said(web)
        web.leave()


async def test_a_certificate_that_was_never_served_keeps_no_root_when_its_workload_goes(
    tmp_path: Path, events: Events
) -> None:
    ahead = ScriptedAuthority(answering(OTHER, shifted(timedelta(seconds=40), timedelta(hours=1))))
    both = ("workloads:\n", workload("api", more=", authority: one"), workload("web", more=", authority: two"))
    async with live(tmp_path, TWO, *both, one=good(), two=ahead) as all_:
        await events.wait("held_back", workload="web")
        await all_.apply(ONE, *both[:2])
        assert {each.authority for each in all_.agent.bundle.needed} <= {"one"}
        assert OTHER.root.certificate not in all_.anchors()


async def test_the_stored_certificate_of_a_workload_that_went_is_not_written_again(tmp_path: Path) -> None:
    async with live(tmp_path, *WEB_AND_API, one=good()) as all_:
        await complete(all_.agent.store)
        await all_.apply(ONE, "workloads:\n", workload("api"))
        stored = list((tmp_path / "state" / "certificates").iterdir())
        assert len(stored) == 2, "it stays, for a workload that comes back"
        for path in stored:
            path.unlink()
        (cache,) = [part for part in all_.agent.restorable if isinstance(part, RestorableFiles)]
        assert len(cache.put_back_all()) == 1


async def test_workloads_that_go_before_they_have_started_never_start(tmp_path: Path) -> None:
    """Thousands start a few at a time, and the file may change meanwhile."""
    names = [f"w{number}" for number in range(3 * STARTED_AT_ONCE)]
    async with live(tmp_path, ONE, "workloads:\n", workload("api"), one=good()) as all_:
        await all_.apply(ONE, "workloads:\n", workload("api"), *map(workload, names))
        await all_.apply(ONE, "workloads:\n", workload("api"))
        await all_.nothing_said()
        asked = {each.identity.path for each in all_.cas["one"].requests}
        assert asked <= {"/api", *(f"/{name}" for name in names[:STARTED_AT_ONCE])}
        assert set(all_.agent.store.names) == set(assembly.names(all_.agent.settings))


async def test_two_changes_in_a_row_take_no_certificate_from_workloads_that_have_not_started_again(
    tmp_path: Path,
) -> None:
    """Nothing is stored, so what one that has not started has taken over is all that there is."""
    workloads = [f"keep_certificates: false\n{ONE}workloads:\n"]
    workloads += [workload(f"w{number}") for number in range(3 * STARTED_AT_ONCE)]
    async with live(tmp_path, *workloads, one=good()) as all_:
        await complete(all_.agent.store)
        serials, before = all_.serials(), all_.agent.versions
        for fraction in (0.7, 0.6):
            await all_.apply(f"renewal: {{fraction: {fraction}}}\n", *workloads)
            assert all_.agent.versions == before
        assert all_.serials() == serials


async def test_an_output_comes_changes_and_goes_with_the_configuration(tmp_path: Path, events: Events) -> None:
    """What was written stays: a program may have it open."""
    async with live(tmp_path, *WEB_AND_API, one=good()) as all_:
        await complete(all_.agent.store)
        serials = all_.serials()
        for place in ("first", "second"):
            more = f", output: {tmp_path / place}"
            await all_.apply(ONE, "workloads:\n", workload("web", more=more), workload("api"))
            await events.wait("output_written", directory=str(tmp_path / place))
        await all_.apply(ONE, "workloads:\n", workload("api"))
        assert all((tmp_path / place / "key.pem").exists() for place in ("first", "second"))
        await all_.apply(ONE, "workloads:\n", workload("web", more=f", output: {tmp_path / 'first'}"), workload("api"))
        await events.wait("output_written", directory=str(tmp_path / "first"), count=2)
        assert all_.serials()["api"] == serials["api"]


async def test_a_workload_that_comes_back_has_the_certificate_that_was_stored(tmp_path: Path, events: Events) -> None:
    """As after a restart; and a restart finds what it left."""
    async with live(tmp_path, *WEB_AND_API, one=good()) as all_:
        await complete(all_.agent.store)
        serials = all_.serials()
        await all_.apply(ONE, "workloads:\n", workload("api"))
        await all_.apply(*WEB_AND_API)
        assert "web" in await all_.peer.fetch("web")
        assert all_.serials() == serials
        assert events.named("restored", workload="web")
    async with live(tmp_path, *WEB_AND_API, one=good()) as again:
        assert "web" in await again.peer.fetch("web")
        assert again.serials() == serials


async def test_the_roots_of_an_authority_that_came_are_there_after_a_restart(tmp_path: Path) -> None:
    """Its CA may be down then, and peers have certificates of it."""
    both = (TWO, "workloads:\n", workload("web", more=", authority: one"), workload("api", more=", authority: one"))
    async with live(tmp_path, *WEB_AND_API, one=good()) as all_:
        await complete(all_.agent.store)
        await all_.apply(*both, two=Advertising(OTHER))
        while OTHER.root.certificate not in all_.anchors():
            await anyio.lowlevel.checkpoint()
    async with live(tmp_path, *both, one=good(), two=ScriptedAuthority(Hang(answering(OTHER)))) as again:
        assert OTHER.root.certificate in again.anchors()


class Federating(Advertising):
    """One that has the roots of another trust domain too."""

    async def federated_anchors(self) -> Mapping[str, bytes]:
        """They are those of the other CA."""
        return {"other.example": write_pem([OTHER.root.certificate])}


async def test_another_trust_domain_comes_and_goes_with_the_configuration(tmp_path: Path) -> None:
    """Its roots are served as soon as it is in the file, and no longer than it is."""
    name, more = "spiffe://other.example", ", two: {type: spiffe, socket: /run/spire.sock%s}}\n"
    authorities = "authorities: {one: {type: embedded}" + more
    workloads = ("workloads:\n", workload("web", more=", authority: one"), workload("api", more=", authority: one"))
    without, with_it = authorities % "", authorities % ", federated: [other.example]"
    async with live(tmp_path, without, *workloads, one=good(), two=Federating(CA)) as all_:
        for _ in range(2):
            await complete(all_.agent.store)
            await all_.apply(with_it, *workloads, two=Federating(CA))
            assert all_.agent.store.snapshot[name] is None, "nothing is left of the time before"
            while (served := all_.agent.store.snapshot[name]) is None:
                await anyio.lowlevel.checkpoint()
            assert isinstance(served, BundleSecret)
            assert set(read_pem(served.anchors_pem)) == {OTHER.root.certificate}
            await all_.apply(without, *workloads, two=Federating(CA))
            assert name not in all_.agent.store.snapshot


async def test_a_trust_domain_that_comes_never_has_the_certificate_of_a_workload_of_its_name(tmp_path: Path) -> None:
    """An Envoy would get a private key where it asks whom to trust."""
    authorities = "authorities: {one: {type: embedded}, two: {type: spiffe, socket: /run/spire.sock%s}}\nworkloads:\n"
    named = workload("'spiffe://other.example'", "web", ", authority: one")
    async with live(tmp_path, authorities % "", named, one=good(), two=Federating(CA)) as all_:
        await complete(all_.agent.store)
        assert all_.agent.store.snapshot["spiffe://other.example"] is not None
        renamed = workload("web", more=", authority: one")
        await all_.apply(authorities % ", federated: [other.example]", renamed, two=Federating(CA))
        assert all_.agent.store.snapshot["spiffe://other.example"] is None
        assert all_.agent.store.complete, "it need not ever have one"


async def test_who_looks_at_all_workloads_while_they_change_sees_what_there_is_now(tmp_path: Path) -> None:
    """Thousands are shown with pauses. A workload without a certificate would be an alarm."""
    async with live(tmp_path, *WEB_AND_API, ONE_MORE, one=good()) as all_:
        await complete(all_.agent.store)
        serials, seen = all_.serials(), all_.agent.each_workload()
        first = next(seen)
        await all_.apply("renewal: {fraction: 0.7}\n", *WEB_AND_API)
        others = list(seen)
        assert [each.name for each in (first, *others)] == ["web", "api"]
        assert [each.current.serial for each in others if each.current] == [serials["api"]]


async def test_a_key_is_kept_by_nothing_that_was_replaced(tmp_path: Path) -> None:
    """What is there since the start is not collected when it has become garbage."""
    async with live(tmp_path, *WEB_AND_API, one=good()) as all_:
        await complete(all_.agent.store)
        await all_.peer.fetch("web")
        first = all_.agent.issuers["web"]
        key = given_key(first)
        await all_.apply(ONE, "workloads:\n", workload("web", more=", key: rsa-2048"), workload("api"))
        second = all_.agent.issuers["web"]
        assert (first.secret, given_key(second)) == (None, key)
        await all_.apply(ONE, "workloads:\n", workload("api"))
        await all_.nothing_said()
        alone = bytes(bytearray(key))
        assert references(key) == references(alone)


@pytest.mark.parametrize("slots", [2, 1])
async def test_an_attempt_that_a_reload_cuts_off_keeps_no_key(tmp_path: Path, slots: int) -> None:
    """It asks with the certificate that is served, or waits for its turn to. Nobody looks for its garbage either."""
    asked = ScriptedAuthority(Hang(answering(OTHER)))
    requests = f"requests: {{concurrency: {slots}}}\n"
    of_one = [workload(name, more=", authority: one") for name in ("api", "web")]
    of_two = [workload(name, more=", authority: two") for name in ("api", "web")]
    async with live(tmp_path, requests, TWO, "workloads:\n", *of_one, one=good(), two=asked) as all_:
        await complete(all_.agent.store)
        key = given_key(all_.agent.issuers["web"])
        await all_.apply(requests, TWO, "workloads:\n", *of_two)
        await asked.asked(slots)
        cut_off = all_.agent.issuers["web"]
        assert cut_off.status.attempt == ("asking" if slots == 2 else "queued")
        await all_.apply(requests, TWO, "workloads:\n", of_one[0])
        asked.requests.clear()
        alone = bytes(bytearray(key))
        assert references(key) == references(alone)
        assert cut_off.status.attempt is None


async def test_an_attempt_that_failed_keeps_no_key(tmp_path: Path, events: Events) -> None:
    """Its error is shown until the next one, and would know the whole call."""
    asked = ScriptedAuthority(failing(ErrorKind.TRANSIENT))
    of_one = [workload(name, more=", authority: one") for name in ("api", "web")]
    of_two = [workload(name, more=", authority: two") for name in ("api", "web")]
    async with live(tmp_path, TWO, "workloads:\n", *of_one, one=good(), two=asked) as all_:
        await complete(all_.agent.store)
        key = given_key(all_.agent.issuers["web"])
        await all_.apply(TWO, "workloads:\n", *of_two)
        await events.wait("retrying", count=2)
        ended = all_.agent.issuers["web"]
        await all_.apply(TWO, "workloads:\n", of_one[0])
        asked.requests.clear()
        alone = bytes(bytearray(key))
        assert references(key) == references(alone)
        assert str(ended.last_error) == "the CA says no"


def given_key(issuer: Issuer) -> bytes:
    """The private key that Envoys are given."""
    assert issuer.secret is not None
    return issuer.secret.private_key_pem


def references(value: bytes) -> int:
    """How many there are to a variable's value: as many as to a new one, where nothing else knows it.

    The collector would not say: it passes values of bytes by.
    """
    gc.collect()
    return sys.getrefcount(value)
