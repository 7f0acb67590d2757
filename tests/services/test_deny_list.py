"""Who is on the CA's deny list gets nothing, by whatever proof, and comes back by no accident."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import grpc
import grpc.aio
import pytest
from fakes.ca_servers import TRUST_DOMAIN, WEB, Served, ask, served
from fakes.calls import counted
from fakes.clocks import HandClock
from fakes.events import Events, recorded

from sds_agent.ca.denied import Denied, DenyListError, parse
from sds_agent.ca.deny_list import CHECK_EVERY, DenyList
from sds_agent.cli.main import main
from sds_agent.errors import ConfigurationError
from sds_agent.pki.keys import KeyType, generate

NODE = f"spiffe://{TRUST_DOMAIN}/ns/kube-system/sa/node"
AGENTS = f"  node_agents: [{{identity: {NODE}, may_act_for: [spiffe://{TRUST_DOMAIN}/ns/default/*]}}]"


@asynccontextmanager
async def denying(directory: Path, content: str = "# no identity\n") -> AsyncIterator[tuple[Served, Events]]:
    (directory / "denied").write_text(content)
    with recorded() as events:
        async with served(directory, callers=f"  deny_file: denied\n{AGENTS}") as ca:
            yield ca, events


def deny(ca: Served, *identities: str) -> None:
    (ca.directory / "new").write_text("".join(f"{each}\n" for each in identities))
    (ca.directory / "new").rename(ca.directory / "denied")


def denied(error: grpc.aio.AioRpcError) -> None:
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED, error.details()
    assert f"{WEB} is on the deny list" in (error.details() or "") or "node is on the deny list" in str(error.details())


async def test_a_machine_that_is_shut_out_gets_nothing_by_any_way_that_it_had(tmp_path: Path) -> None:
    """Its spent token with its first key, each certificate that it ever got, a token of its platform, a node agent."""
    async with denying(tmp_path) as (ca, events):
        token, key = ca.join_token(), generate(KeyType.EC_P256)
        first = await ca.ask(token, key=key)
        second = await ca.ask(identity=first)
        unused, node = ca.join_token(), ca.issuer.token(sub="system:serviceaccount:kube-system:node")
        async with ca.connected(first) as channel:
            await ask(channel)
            deny(ca, WEB)
            await events.wait("deny_list", ids=1)
            for attempt in (
                ask(channel),
                ca.ask(token, key=key),
                ca.ask(unused),
                ca.ask(identity=second),
                ca.ask(ca.issuer.token()),
                ca.ask(node, metadata={"ImpersonatedIdentity": WEB}),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await attempt
                denied(caught.value)
        await ca.ask(node, metadata={"ImpersonatedIdentity": f"{WEB}2"})
        deny(ca, NODE)
        await events.wait("deny_list", count=3)  # with the new one, and then without the old one
        await ca.ask(identity=second)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ca.ask(node, metadata={"ImpersonatedIdentity": f"{WEB}2"})
        denied(caught.value)
        assert {line["outcome"] for line in ca.audit} == {"issued", "denied"}
        assert ca.audit[-1]["caller"] == NODE


async def test_no_accident_with_the_file_lets_a_denied_caller_in_again(tmp_path: Path) -> None:
    async with denying(tmp_path, f"{WEB}\n") as (ca, events):
        file = ca.directory / "denied"
        for number, content in enumerate([b"", WEB[:-1].encode(), b"spiffe://\n", None], start=1):
            file.unlink() if content is None else file.write_bytes(content)
            reported = await events.wait("deny_list_not_taken", count=number)
            assert reported["level"] == "error"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ca.ask(ca.issuer.token())
            denied(caught.value)
        file.write_text("# no identity is denied\n")
        await events.wait("deny_list", ids=0)
        await ca.ask(ca.issuer.token())


async def test_a_file_that_is_half_written_at_the_start_lets_nobody_in(tmp_path: Path) -> None:
    file, clock = tmp_path / "denied", HandClock()
    file.write_text(f"{WEB}\n")
    found = list[DenyList]()

    async def start() -> None:
        found.append(await DenyList.open(file, TRUST_DOMAIN, clock))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start)
        await clock.asleep()
        with file.open("a") as end:
            end.write(f"spiffe://{TRUST_DOMAIN}/stolen\n")
        clock.elapse(timedelta(seconds=CHECK_EVERY))
    assert found[0].current().ids == {WEB, f"spiffe://{TRUST_DOMAIN}/stolen"}


async def test_a_file_that_is_written_line_by_line_lets_nobody_in_meanwhile(tmp_path: Path) -> None:
    """As by a script that prints into it: each line is whole, so nothing shows that the rest is still to come."""
    file, clock = tmp_path / "denied", HandClock()
    stolen, branch = f"spiffe://{TRUST_DOMAIN}/stolen", f"spiffe://{TRUST_DOMAIN}/branch7"
    whole = f"{WEB}\n{stolen}\n{branch}/*\n"
    file.write_text(whole)
    os.utime(file, (0, 0))
    deny_list = await DenyList.open(file, TRUST_DOMAIN, clock)

    def denied() -> list[bool]:
        return [deny_list.current().covers(each) for each in (WEB, stolen, f"{branch}/db")]

    async def check() -> None:
        await clock.asleep()
        clock.elapse(timedelta(seconds=CHECK_EVERY))
        await clock.asleep()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(deny_list.follow)
        for written in (f"{WEB}\n", f"{WEB}\n{stolen}\n", whole):
            file.write_text(written)
            await check()
            assert denied() == [True, True, True]
        file.write_text(f"{WEB}\n")
        await check()
        await check()
        assert denied() == [True, False, False], "and what was really taken out is denied no more"
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("last", ["", "no identity\n"], ids=["good", "cannot be used"])
async def test_callers_wait_for_no_list_to_be_read_however_long_it_is(tmp_path: Path, last: str) -> None:
    """The largest takes half a second, and the file is looked at each second."""
    file, clock = tmp_path / "denied", HandClock()
    file.write_text("# none yet\n")
    os.utime(file, (0, 0))
    deny_list = await DenyList.open(file, TRUST_DOMAIN, clock)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(deny_list.follow)
        await clock.asleep()
        file.write_text("".join(f"{WEB}/{number}\n" for number in range(100)) + last)
        with counted() as calls:
            for _ in range(4):
                clock.elapse(timedelta(seconds=CHECK_EVERY))
                await clock.asleep()
        tasks.cancel_scope.cancel()
    assert len(deny_list.current().ids) == (0 if last else 100)
    assert calls.of["SpiffeId.parse"] == 0


async def test_a_list_that_cannot_be_used_does_not_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("nothing", "No such file"), ("pipe", "it is a pipe")):
        with pytest.raises(ConfigurationError, match=rf"callers\.deny_file: .*{words}"):
            async with served(tmp_path, callers=f"  deny_file: {name}"):
                raise AssertionError


def test_each_line_is_an_identity_a_branch_or_a_comment() -> None:
    read = parse(f"# stolen\n{WEB}  # on 14 March\n\n  spiffe://{TRUST_DOMAIN}/branch7/*\r\n".encode(), TRUST_DOMAIN)
    assert read == Denied(frozenset({WEB}), (f"spiffe://{TRUST_DOMAIN}/branch7/*",))
    assert [read.covers(uri) for uri in (WEB, f"{WEB}2", f"spiffe://{TRUST_DOMAIN}/branch7/a/b")] == [True, False, True]
    assert not read.covers(f"spiffe://{TRUST_DOMAIN}/branch7")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b" \n", "it is empty"),
        (WEB.encode(), "its last line has no end"),
        (b"\xff\n", "no text in UTF-8"),
        (b"# one\nweb\n", "line 2: .* is not a SPIFFE ID"),
        (b"spiffe://elsewhere/web\n", "line 1: it is not in the trust domain"),
        (f"spiffe://{TRUST_DOMAIN}\n".encode(), "line 1: it has no path"),
    ],
)
def test_a_line_that_denies_no_identity_is_reported(content: bytes, words: str) -> None:
    """Its author believes that the identity is denied."""
    with pytest.raises(DenyListError, match=words):
        parse(content, TRUST_DOMAIN)


async def test_a_withdrawn_token_serves_no_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with served(tmp_path) as ca:
        key, other = generate(KeyType.EC_P256), ca.join_token(f"{WEB}2")
        unused, spent = ca.join_token(), ca.join_token()
        await ca.ask(spent, key=key)
        (tmp_path / "tokens" / f"{'0' * 64}.token").write_text("damaged")
        assert main(["ca", "token", str(tmp_path / "ca.yaml"), "--withdraw", WEB]) == 0
        assert f"withdrawn for {WEB}: 2" in capsys.readouterr().err
        for token in (unused, spent):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ca.ask(token, key=key)
            assert "it was withdrawn" in (caught.value.details() or "")
        await ca.ask(other)
        assert len(list((tmp_path / "tokens").glob("*.spent"))) == 1, "the other one"


def test_to_withdraw_makes_no_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "ca.yaml"
    config.write_text(f"trust_domain: {TRUST_DOMAIN}\nsigner: {{self_signed: r}}\ncallers: {{join_tokens: t}}\n")
    assert main(["ca", "token", str(config), WEB, "--withdraw", "--ttl", "5m"]) == 2
    assert "leave out --ttl and --output" in capsys.readouterr().err
    assert main(["ca", "token", str(config), WEB, "--withdraw"]) == 0
    assert list((tmp_path / "t").iterdir()) == []
