"""Who may have which secret, by what the kernel says of the process that has connected."""

import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest
from fakes.configurations import settings
from fakes.events import Events, recorded
from fakes.hierarchy import make_ca
from fakes.peers import Peer, connected

from sds_agent.errors import ProblemsError
from sds_agent.inspection.sds_client import ask
from sds_agent.pki.certificates import write_pem
from sds_agent.preflight import client_rules
from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.permissions import Permissions, Rule, Rules, process_of
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import SecretDiscoveryService
from sds_agent.secrets.model import BundleSecret
from sds_agent.secrets.store import SecretStore

ME, MY_GROUP = os.geteuid(), os.getegid()
OTHER = 4711
MINE, THEIRS = Rule(users=frozenset({ME})), Rule(users=frozenset({OTHER}), groups=frozenset({OTHER}))
SECRET = BundleSecret(write_pem([make_ca("root").certificate]))
"""It stands for a certificate: what is served makes no difference here."""
NAMES = ("mine", "theirs", "everybodys")


class Bench:
    """A server of three secrets, and a client that is this process."""

    def __init__(self, service: SecretDiscoveryService, store: SecretStore, peer: Peer, events: Events) -> None:
        self.service = service
        self.store = store
        self.peer = peer
        self.events = events

    def change(self) -> None:
        """Serve another secret under each name."""
        other = BundleSecret(write_pem([make_ca("other").certificate]))
        self.store.publish(dict.fromkeys(NAMES, other))


@asynccontextmanager
async def bench(folder: Path, rules: Rules) -> AsyncIterator[Bench]:
    store = SecretStore(NAMES)
    store.publish(dict.fromkeys(NAMES, SECRET))
    service = SecretDiscoveryService(store)
    service.permit(rules)
    with recorded() as events:
        async with serving(service, SocketFile(folder / "sds.sock"), Limits()), connected(folder / "sds.sock") as peer:
            with anyio.fail_after(20):
                yield Bench(service, store, peer, events)


RULES: Mapping[str, Rule] = {"mine": MINE, "theirs": THEIRS}
DENIED = f"a process of uid {ME} and gid {MY_GROUP} may not have 'theirs': workloads[].clients names who may"


async def test_a_process_gets_what_it_may_have_and_nothing_else(tmp_path: Path) -> None:
    async with bench(tmp_path, RULES) as made:
        stream = await made.peer.stream().ask(*NAMES)
        assert set(await stream.read()) == {"mine", "everybodys"}
        (refused,) = made.events.named("refused")
        assert (refused["cause"], refused["names"]) == (DENIED, ["theirs"])
        stream.leave()


async def test_who_may_not_have_a_secret_is_remembered_with_its_name_as_the_configuration_has_it(
    tmp_path: Path,
) -> None:
    store = SecretStore(("über",))
    store.publish({"über": SECRET})
    service, socket = SecretDiscoveryService(store), tmp_path / "sds.sock"
    service.permit({"über": THEIRS})
    async with serving(service, SocketFile(socket), Limits()), connected(socket) as peer:
        await (await peer.stream().ask("über")).end()
        with anyio.fail_after(20):
            while not service.departed:
                await anyio.lowlevel.checkpoint()
        assert [each.names for each in service.departed] == [("über",)]


async def test_a_process_is_told_that_it_may_not_have_the_secret(tmp_path: Path) -> None:
    """Its operator looks into the Envoy's log first."""
    async with bench(tmp_path, RULES) as made:
        stream = await made.peer.stream().ask("theirs")
        assert await stream.end() == (grpc.StatusCode.PERMISSION_DENIED, DENIED)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await made.peer.fetch("theirs")
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.PERMISSION_DENIED, DENIED)
        assert {each["cause"] for each in made.events.named("refused")} == {DENIED}


async def test_the_command_says_of_a_secret_that_it_is_for_others(tmp_path: Path) -> None:
    """Not that the agent does not answer, or has no such secret."""
    async with bench(tmp_path, RULES):
        mine, theirs = await ask(tmp_path / "sds.sock", ("mine", "theirs"), 10)
        assert (mine.state, theirs.state, theirs.detail) == ("ACTIVE", "DENIED", DENIED)


async def test_fetch_and_delta_hold_to_the_rules_too(tmp_path: Path) -> None:
    async with bench(tmp_path, RULES) as made:
        assert set(await made.peer.fetch(*NAMES, "nobodys")) == {"mine", "everybodys"}
        refused = {each["cause"]: each["names"] for each in made.events.named("refused")}
        assert refused == {DENIED: ["theirs"], "unknown name": ["nobodys"]}
        delta = await made.peer.delta().subscribe(*NAMES)
        answer = await delta.read()
        assert {each.name for each in answer.resources} == {"mine", "everybodys"}
        assert answer.removed_resources == ["theirs"]
        delta.leave()


@pytest.mark.parametrize("names", [NAMES, ("theirs",)])
async def test_its_status_says_of_a_stream_what_it_may_not_have(tmp_path: Path, names: tuple[str, ...]) -> None:
    """It would be said to wait, or to be behind, for ever."""
    async with bench(tmp_path, RULES) as made:
        delta = await made.peer.delta().subscribe(*names)
        await delta.read()
        await delta.ack()
        made.service.permit({"theirs": THEIRS})
        (stream,) = made.service.streams
        assert {each.name: each.denied for each in stream.names} == {each: each == "theirs" for each in names}
        made.service.permit({})
        (stream,) = made.service.streams
        assert not any(each.denied for each in stream.names)
        delta.leave()


async def test_a_call_that_waits_holds_to_rules_that_come_meanwhile(tmp_path: Path) -> None:
    """The first of them, and a secret that comes with it, while the call is already told to look again."""
    async with bench(tmp_path, {}) as made:
        made.store.withhold(["theirs"])
        async with anyio.create_task_group() as calls:
            answers = list[set[str] | grpc.StatusCode]()

            async def fetch() -> None:
                try:
                    answers.append(set(await made.peer.fetch("everybodys", "theirs")))
                except grpc.aio.AioRpcError as error:
                    answers.append(error.code())

            calls.start_soon(fetch)
            while not made.store.awaited(["theirs"]):
                await anyio.lowlevel.checkpoint()
            made.store.announce(frozenset({"everybodys"}))
            made.service.permit(RULES)
            made.store.publish({"theirs": SECRET})
        assert answers in ([grpc.StatusCode.UNAVAILABLE], [{"everybodys"}])


async def test_who_may_not_have_a_secret_hurries_nobody(tmp_path: Path) -> None:
    """Those for whom clients wait are issued first."""
    async with bench(tmp_path, RULES) as made:
        made.store.withhold(["mine", "theirs"])
        async with anyio.create_task_group() as calls:
            calls.start_soon(made.peer.fetch, "mine", "theirs")
            while not made.store.awaited(["mine"]):
                await anyio.lowlevel.checkpoint()
            assert not made.store.awaited(["theirs"])
            made.store.publish({"mine": SECRET})


async def test_a_rule_that_changes_for_others_disturbs_nobody(tmp_path: Path) -> None:
    """An Envoy that refuses a secret has been sent the one before: it is not to refuse the same one again."""
    async with bench(tmp_path, RULES) as made:
        stream = await made.peer.stream().ask("mine")
        await stream.read()
        await stream.ack("mine")
        made.change()
        await stream.read()
        await stream.ack("mine", error="no such curve")
        assert set(await stream.read()) == {"mine"}, "the one before"
        await stream.ack("mine")
        await stream.ask("mine", "theirs")
        await made.events.wait("refused")
        made.service.permit({"mine": Rule(users=frozenset({ME, OTHER})), "theirs": MINE})
        assert set(await stream.read()) == {"theirs"}
        stream.leave()


async def test_a_name_that_is_not_there_is_told_from_one_that_is_for_others(tmp_path: Path) -> None:
    async with bench(tmp_path, RULES) as made:
        delta = await made.peer.delta().subscribe("nobodys", "theirs")
        await delta.read()
        refused = {each["cause"]: each["names"] for each in made.events.named("refused")}
        assert refused == {DENIED: ["theirs"], "unknown name": ["nobodys"]}
        delta.leave()


async def test_a_renewal_reaches_those_alone_who_may_have_it(tmp_path: Path) -> None:
    async with bench(tmp_path, RULES) as made:
        stream = await made.peer.stream().ask(*NAMES)
        await stream.read()
        await stream.ack(*NAMES)
        made.change()
        assert set(await stream.read()) == {"mine", "everybodys"}
        await stream.ack(*NAMES)
        pushed = await made.events.wait("pushed")
        assert set(pushed["names"]) == {"mine", "everybodys"}, "it waits for a reply to what it never sends"
        stream.leave()


async def test_a_name_that_is_not_there_is_still_called_unknown(tmp_path: Path) -> None:
    async with bench(tmp_path, RULES) as made:
        stream = await made.peer.stream().ask("nobodys")
        code, words = await stream.end()
        assert (code, words) == (
            grpc.StatusCode.NOT_FOUND,
            "no secret named 'nobodys'; this agent serves 'mine', 'everybodys'",
        )


async def test_who_may_no_longer_have_a_secret_loses_it_and_no_other_stream_ends(tmp_path: Path) -> None:
    async with bench(tmp_path, RULES) as made:
        asked = (NAMES, ("mine",), ("everybodys",))
        both, mine, others = [await made.peer.stream().ask(*names) for names in asked]
        for each, names in zip((both, mine, others), asked, strict=True):
            await each.read()
            await each.ack(*names)
        made.service.permit({"mine": THEIRS, "theirs": MINE})
        assert set(await both.read()) == {"theirs"}
        assert (await mine.end())[0] is grpc.StatusCode.PERMISSION_DENIED
        made.change()
        await both.ack(*NAMES)
        assert set(await both.read()) == {"theirs", "everybodys"}
        assert set(await others.read()) == {"everybodys"}
        for each in (both, others):
            each.leave()


async def test_who_loses_a_secret_is_logged_though_it_was_refused_before(tmp_path: Path) -> None:
    async with bench(tmp_path, RULES) as made:
        for count in (1, 2):
            stream = await made.peer.stream().ask("theirs")
            await stream.end()
            await made.events.wait("refused", count=count)
            made.service.permit({"theirs": MINE})
            stream = await made.peer.stream().ask("theirs")
            await stream.read()
            made.service.permit(RULES)
            await stream.end()
            await made.events.wait("refused", count=count + 1)


async def test_the_first_rule_concerns_streams_that_are_open(tmp_path: Path) -> None:
    """Their Envoys open others, which get what they may have."""
    async with bench(tmp_path, {}) as made:
        stream = await made.peer.stream().ask("theirs")
        assert set(await stream.read()) == {"theirs"}
        made.service.permit(RULES)
        assert (await stream.end())[0] is grpc.StatusCode.OK
        assert (await (await made.peer.stream().ask("theirs")).end())[0] is grpc.StatusCode.PERMISSION_DENIED


async def test_the_last_rule_goes(tmp_path: Path) -> None:
    async with bench(tmp_path, RULES) as made:
        stream = await made.peer.stream().ask(*NAMES)
        await stream.read()
        await stream.ack(*NAMES)
        made.service.permit({})
        assert set(await stream.read()) == {"theirs"}
        stream.leave()


@pytest.mark.parametrize("groups", [{MY_GROUP}, *({each} for each in os.getgroups()[:1])])
def test_the_groups_of_a_process_count(groups: set[int]) -> None:
    here, there = socket.socketpair()
    with here, there:
        process = process_of(here)
    assert process is not None
    assert (process.user, process.group, process.groups) == (ME, MY_GROUP, frozenset({MY_GROUP, *os.getgroups()}))
    permissions = Permissions({"web": Rule(groups=frozenset(groups)), "api": Rule(groups=frozenset({OTHER}))})
    assert (permissions.may(process, "web"), permissions.may(process, "api")) == (True, False)


def test_a_process_of_which_nothing_is_known_gets_what_everybody_may_have() -> None:
    here, there = socket.socketpair()
    there.close()
    here.close()
    permissions = Permissions(RULES)
    assert process_of(here) is None
    assert [permissions.may(None, name) for name in NAMES] == [False, False, True]


HEAD = "trust_domain: demo.example\nsds: {socket: sds.sock}\nstate_dir: state\nworkloads:\n"


def rules(folder: Path, clients: str) -> Rules:
    """Those of a workload with these clients, beside one without any."""
    web = f"  - {{name: web, spiffe_id: spiffe://demo.example/web, clients: {clients}}}\n"
    return client_rules(settings(folder, f"{HEAD}{web}  - {{name: api, spiffe_id: spiffe://demo.example/api}}\n"))


def test_users_and_groups_are_given_by_name_or_number(tmp_path: Path) -> None:
    expected = Rule(users=frozenset({0, 4711}), groups=frozenset({0, 4712}))
    found = rules(tmp_path, "{users: [root, 4711], groups: ['4712', root]}")
    assert found == {"web": expected, "spiffe://demo.example/web": expected}


@pytest.mark.parametrize(
    ("clients", "problem"),
    [
        ("{users: [no-such-user]}", "workloads[0].clients.users: there is no user 'no-such-user' on this machine"),
        ("{groups: [no-such-group]}", "workloads[0].clients.groups: there is no group 'no-such-group' on this machine"),
        (
            "{users: [nobody]}",
            "workloads[0].clients.users: names the user 'nobody', whose id 65534 stands for each user",
        ),
        ("{groups: [65534]}", "workloads[0].clients.groups: names the group '65534', whose id 65534 stands for each"),
    ],
)
def test_a_user_whom_the_kernel_cannot_tell_from_others_is_refused(tmp_path: Path, clients: str, problem: str) -> None:
    with pytest.raises(ProblemsError) as caught:
        rules(tmp_path, clients)
    assert str(caught.value.problems[0]).startswith(problem)
    assert " out" not in caught.value.problems[0].fix, (
        "which would leave it to everybody, or refuse the rest of the list"
    )
