"""What answers in place of an agent or an Envoy may be broken, another program, or mean harm to who asks."""

import gzip
import itertools
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import grpc
import grpc.aio
import msgspec
import pytest
from fakes.envoy_admin import admin_interface
from fakes.hierarchy import NOW
from fakes.observed import FAILURE, Seen, workload
from fakes.raw_http import ok, raw_server
from sds_agent_proto import sds_pb2 as wire
from sds_agent_proto.health_pb2 import HealthCheckResponse

from sds_agent import __version__
from sds_agent.admin.model import FORMAT
from sds_agent.admin.reasons import explain
from sds_agent.admin.view import status
from sds_agent.cli import asking
from sds_agent.cli.answered import NotStatusError, read_status
from sds_agent.cli.main import main
from sds_agent.cli.status import rendered
from sds_agent.doctor import reach
from sds_agent.doctor.agents import of_agent
from sds_agent.inspection import web
from sds_agent.inspection.sds_client import FETCH, ask

Printed = pytest.CaptureFixture[str]
AGENT = [["status"], ["status", "--watch"], ["explain", "web"], ["secret"], ["doctor"]]
ENVOY = [["secret"], ["doctor"]]
COMMANDS = [*((each, "--admin") for each in AGENT), *((each, "--envoy") for each in ENVOY)]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
EVIL = "a\x1b[2J\x9b31m\x7f\u202e\u2028\r\ngood     all: is well"


def call(arguments: list[str], option: str, url: str, folder: Path) -> int:
    """Run a command that asks only there."""
    alone = ["--socket", str(folder / "none.sock")] if arguments == ["doctor"] and option == "--envoy" else []
    return main([*arguments, *alone, option, url])


def harmless(printed: Printed) -> str:
    """What was printed, none of which tells a terminal anything."""
    said = "".join(printed.readouterr())
    assert all(line.isprintable() for line in said.split("\n")), ascii(said)
    assert not any(line.startswith("good     all") for line in said.splitlines())
    return said


def endless() -> Iterable[bytes]:
    return itertools.chain([HEAD + b"connection: close\r\n\r\n"], itertools.repeat(b"[" * 65536))


def dripping_body() -> Iterable[bytes]:
    return itertools.chain([HEAD + b"content-length: 1000000\r\n\r\n"], itertools.repeat(b" "))


def dripping_head() -> Iterable[bytes]:
    return itertools.chain([HEAD], (b"x%d: y\r\n" % number for number in itertools.count()))


def never_final() -> Iterable[bytes]:
    return itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n")


@pytest.mark.parametrize(("arguments", "option"), COMMANDS)
@pytest.mark.parametrize("answer", [dripping_body, dripping_head, never_final])
def test_an_answer_that_never_ends_does_not_hold_up_who_asked(
    answer: Callable[[], Iterable[bytes]],
    arguments: list[str],
    option: str,
    tmp_path: Path,
    capsys: Printed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web, "TIMEOUT", 0.3)
    with raw_server(answer, drips=True) as server:
        assert call(arguments, option, server.url, tmp_path) == 1
    assert "after 0.3 s" in harmless(capsys)


@pytest.mark.parametrize(("arguments", "option"), COMMANDS)
def test_an_answer_without_end_fills_no_memory(
    arguments: list[str], option: str, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "LARGEST", 1 << 20)
    with raw_server(endless) as server:
        assert call(arguments, option, server.url, tmp_path) == 1
    assert server.sent < 32 << 20, "what the kernel holds beside what was read"
    assert "larger than" in harmless(capsys)


@pytest.mark.parametrize(("arguments", "option"), COMMANDS)
@pytest.mark.parametrize(
    "body",
    [b"", b"<html>\x1b[2J", b"5", b"[]", b"null", b'{"format": "\x1b"}', b"\xff", b'{"configs": 5, "format": [1]}']
    + [b'{"x": ' + b"[" * depth + b"]" * depth + b"}" for depth in (900, 100_000)],
)
def test_another_program_is_said_to_be_one(
    body: bytes, arguments: list[str], option: str, tmp_path: Path, capsys: Printed
) -> None:
    if arguments == ["status", "--watch"]:
        body = b"event: status\n\n" + body
    with raw_server(ok(body, "content-type: text/html\x1b[31m")) as server:
        assert call(arguments, option, server.url, tmp_path) == 1
    assert harmless(capsys)


def test_a_compressed_answer_is_not_unpacked(tmp_path: Path, capsys: Printed) -> None:
    """A kilobyte of it can be a megabyte, and a megabyte a gigabyte."""
    with raw_server(ok(gzip.compress(plain().encode()), "content-encoding: gzip")) as server:
        assert call(["status"], "--admin", server.url, tmp_path) == 1
    assert "is no agent" in harmless(capsys)


def test_an_error_page_and_a_redirect_are_named(tmp_path: Path, capsys: Printed) -> None:
    for code in ("302 Found\r\nlocation: http://example.com/", "500 \x1b[31mNo", "200"):
        with raw_server(lambda code=code: [f"HTTP/1.1 {code}\r\n\r\n".encode()]) as server:  # type: ignore[misc]
            for arguments, option in COMMANDS:
                assert call(arguments, option, server.url, tmp_path) == 1
    harmless(capsys)


@pytest.mark.parametrize(
    "url", ["http://a..b", "http://[::1", "http://xn--:1", "http://\x80:1", "http://127.0.0.1:99999"]
)
@pytest.mark.parametrize(("arguments", "option"), COMMANDS)
def test_an_address_that_is_none_is_one_sentence(
    arguments: list[str], option: str, url: str, tmp_path: Path, capsys: Printed
) -> None:
    assert call(arguments, option, url, tmp_path) == 1
    assert "no agent answers" in (said := harmless(capsys)) or "no Envoy answers" in said


def plain(**changed: object) -> str:
    """A status as an agent sends it."""
    seen = Seen(workloads=(workload(failure=FAILURE),))
    return json.dumps({**json.loads(msgspec.json.encode(status(seen, NOW))), **changed})


def test_an_agent_of_a_later_version_is_named_with_the_way_out(tmp_path: Path, capsys: Printed) -> None:
    """Else a user would be told that it is no agent, or shown fields that mean something else by now."""
    later = {"format": FORMAT + 1, "agent": {"version": "9.0", "since": 5}, "everything": "else"}
    for arguments, option in COMMANDS:
        if option == "--envoy" or "--watch" in arguments:
            continue
        with admin_interface({"/status": json.dumps(later).encode()}) as url:
            assert call(arguments, option, url, tmp_path) == 1
        said = harmless(capsys)
        assert f"the agent at {url} is newer than this command" in said
        assert "version 9.0" in said
        assert f"version {__version__}" in said
        assert "upgrade this one to 9.0" in said


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document: a mapping or a list, and the key in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize("form", ["table", "json", "yaml"])
@pytest.mark.parametrize("arguments", [["status"], ["explain", "web"], ["explain", EVIL], ["doctor"], ["secret"]])
def test_no_text_of_a_status_reaches_the_terminal_as_it_is(
    arguments: list[str], form: str, tmp_path: Path, capsys: Printed
) -> None:
    """Else whoever answers could clear the screen, hide a line or write one that says good."""
    made = json.loads(plain())
    for holder, key in list(places(made)):
        if isinstance(holder[key], str) and not any(
            word in key
            for word in ("_at", "at", "not_", "valid_", "since", "next_", "last_", "state", "until")
            if isinstance(key, str)
        ):
            holder[key] += EVIL
    with admin_interface({"/status": json.dumps(made).encode()}) as url:
        call([*arguments, "-o", form], "--admin", url, tmp_path)
    harmless(capsys)


ODD = [None, 5, -1, 1e300, "x", "", [], [5], {}, {"x": 5}, True, "0001-01-01T00:00:00+14:00"]
ODD += ["9999-12-31T23:59:59-14:00", "2026-01-01T00:00:00", "\0"]


@pytest.mark.parametrize("odd", ODD)
def test_no_value_in_a_status_is_a_traceback(odd: Any) -> None:
    made = json.loads(plain())
    shown = 0
    for holder, key in list(places(made)):
        before, holder[key] = holder[key], odd
        try:
            found = read_status(json.dumps(made).encode(), "here")
        except NotStatusError as error:
            said = [str(error)]
        else:
            shown += 1
            said = [rendered(found, "table"), *(each.text for each in explain(found, "web"))]
            said += [f"{each.subject} {each.text}" for each in of_agent(found, __version__)]
        assert all(line.isprintable() for line in "\n".join(said).split("\n"))
        holder[key] = before
    assert shown or not isinstance(odd, str), "a text is of the right type somewhere"


def dump(**changed: Any) -> dict[str, bytes]:
    """An Envoy's answers about one bundle, which it refused."""
    pem = "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCgotLS0tLUVORCBDRVJUSUZJQ0FURS0tLS0tCg=="
    secret = {
        "name": "ROOTCA",
        "version_info": "v2",
        "last_updated": "2026-01-01T00:00:00Z",
        "error_state": {"details": "no"},
        "secret": {"validation_context": {"trusted_ca": {"inline_bytes": pem}}},
        **changed,
    }
    answers = {
        "/certs": {"certificates": [{"ca_cert": [{"serial_number": "1"}]}]},
        "/config_dump?resource=dynamic_active_secrets": {"configs": [secret]},
        "/config_dump?resource=dynamic_warming_secrets": {},
        "/stats?filter=version_text&format=json": {"stats": []},
    }
    return {path: json.dumps(each).encode() for path, each in answers.items()}


@pytest.mark.parametrize("form", ["table", "json", "yaml", "pem"])
def test_no_text_of_an_envoy_reaches_the_terminal_as_it_is(form: str, capsys: Printed) -> None:
    pem = f"-----BEGIN CERTIFICATE-----\n{EVIL}\n-----END CERTIFICATE-----"
    evil = {"name": EVIL, "version_info": EVIL, "error_state": {"details": EVIL}}
    secret = {"tls_certificate": {"certificate_chain": {"inline_string": pem}}}
    with admin_interface(dump(**evil, secret=secret)) as url:
        assert main(["secret", "--envoy", url, "-o", form]) == 1
    said = "".join(capsys.readouterr()).replace("\r\n", "\n")  # PEM may have those
    assert all(line.isprintable() for line in said.split("\n"))


@pytest.mark.parametrize("odd", [*ODD, "\xe9", {"details": {"deep": [1]}}])
def test_no_value_of_an_envoy_is_a_traceback(odd: Any, capsys: Printed) -> None:
    bundle = {"validation_context": {"trusted_ca": {"inline_bytes": odd}}}
    changes: list[dict[str, Any]] = [{"secret": bundle}]
    changes += [{field: odd} for field in ("name", "version_info", "last_updated", "error_state", "secret")]
    for changed in changes:
        with admin_interface(dump(**changed)) as url:
            assert main(["secret", "--envoy", url, "-o", "json"]) == 1
    harmless(capsys)


def test_a_line_of_events_that_does_not_end_is_given_up(
    tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "LONGEST_LINE", 1 << 16)
    answers = itertools.chain([ok(b"live")], itertools.repeat(endless))

    def answer() -> Iterable[bytes]:
        return next(answers)()

    with raw_server(answer) as server:
        assert call(["status", "--watch"], "--admin", server.url, tmp_path) == 1
    assert "does not end" in harmless(capsys)


@pytest.mark.parametrize("answer", [dripping_head, never_final])
def test_a_ca_that_drips_does_not_hold_up_the_doctor(
    answer: Callable[[], Iterable[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "TIMEOUT", 0.3)
    with raw_server(answer, drips=True) as server:
        found = reach.of_place("vault", server.url, NOW)
    assert (found.condition, "after 0.3 s" in found.text) == ("bad", True)


def test_a_ca_that_does_not_run_is_a_line_of_the_doctors_with_the_reason() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        host, port = bound.getsockname()
        found = reach.of_place("vault", f"http://{host}:{port}", NOW)
    assert (found.condition, "does not answer (Connection refused)" in found.text) == ("bad", True)


def test_a_ca_whose_host_is_no_name_is_a_line_of_the_doctors() -> None:
    assert reach.of_place("vault", "http://a..b", NOW).condition == "bad"


@asynccontextmanager
async def answering(socket: Path, method: str, answer: bytes) -> AsyncIterator[None]:
    """A gRPC server that answers a method with these bytes."""

    async def handler(_: bytes, __: object) -> bytes:
        return answer

    server = grpc.aio.server()
    service, _, name = method[1:].partition("/")
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {name: grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


@pytest.mark.parametrize(
    "answer", [HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING, reasons=[EVIL]).SerializeToString(), b"\xff"]
)
async def test_reasons_of_who_listens_at_the_socket_do_not_write_to_the_terminal(
    answer: bytes, tmp_path: Path, capsys: Printed
) -> None:
    async with answering(tmp_path / "a.sock", "/grpc.health.v1.Health/Check", answer):
        assert await anyio.to_thread.run_sync(main, ["ready", "--socket", str(tmp_path / "a.sock")]) == 1
    assert "sds-agent: " in harmless(capsys)


async def served(path: Path, answer: bytes) -> Any:
    """What our client makes of these bytes as the answer of FetchSecrets."""
    async with answering(path, FETCH, answer):
        return (await ask(path, ["web"], 5))[0]


async def test_a_version_in_an_answer_of_sds_does_not_write_to_the_terminal(tmp_path: Path) -> None:
    secret = wire.Secret(name="web").SerializeToString()
    answer = wire.DiscoveryResponse(version_info=EVIL)
    answer.resources.add(value=secret)
    found = await served(tmp_path / "a.sock", answer.SerializeToString())
    assert found.version.isprintable()


async def test_a_resource_that_is_no_secret_is_no_traceback(tmp_path: Path) -> None:
    answer = wire.DiscoveryResponse()
    answer.resources.add(value=b"\xff\xff")
    with pytest.raises(Exception, match="does not speak SDS"):
        await served(tmp_path / "a.sock", answer.SerializeToString())


async def test_a_bundle_larger_than_grpc_takes_by_itself_is_shown(tmp_path: Path) -> None:
    """The revocation lists of a large CA are: 100,000 entries have 4.2 MiB."""
    secret = wire.Secret(name="web")
    secret.validation_context.crl.inline_bytes = b"x" * (5 << 20)
    answer = wire.DiscoveryResponse()
    answer.resources.add(value=secret.SerializeToString())
    assert (await served(tmp_path / "a.sock", answer.SerializeToString())).state == "ACTIVE"


async def test_a_socket_that_does_not_answer_is_not_said_to_be_an_agent_that_waits(tmp_path: Path) -> None:
    """Who reads that the certificate is not issued yet looks for the fault at the CA."""
    path = tmp_path / "sds.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        (found,) = await ask(path, ["web"], 0.5)
    assert (found.state, found.detail) == (
        "WARMING",
        "no answer came within 0.5 s: it is not issued yet, or what listens there hangs",
    )


class Issuing:
    """An SDS server that notes how long each call may take. It answers of secrets that are not issued yet at the end of
    that time, as an agent, but for the last half second, so that no answer comes too late; `silent` is how short a time
    is too short for it.
    """

    def __init__(self, silent: float = 0.0) -> None:
        self.silent = silent
        self.given: dict[str, list[float]] = {}

    async def fetch(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        (name,) = wire.DiscoveryRequest.FromString(data).resource_names
        remaining: float = context.time_remaining()
        self.given.setdefault(name, []).append(remaining)
        if remaining < self.silent:
            await anyio.sleep_forever()
        if name.startswith("late"):
            await anyio.sleep(max(0, remaining - 0.5))
            await context.abort(grpc.StatusCode.UNAVAILABLE, "a secret that was asked for is not issued yet")
        answer = wire.DiscoveryResponse()
        secret = wire.Secret(name=name)
        secret.validation_context.trusted_ca.inline_bytes = b"x"
        answer.resources.add(value=secret.SerializeToString())
        return answer.SerializeToString()

    @asynccontextmanager
    async def at(self, path: Path) -> AsyncIterator[None]:
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self.fetch)
        service, _, method = FETCH.strip("/").partition("/")
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        try:
            yield
        finally:
            await server.stop(None)


async def test_many_secrets_that_are_not_issued_yet_are_waited_for_together(tmp_path: Path) -> None:
    """One after the other, ten thousand of them would take an hour. None that is there is said to be missing."""
    issuing, late, good = Issuing(), [f"late{n}" for n in range(80)], [f"good{n}" for n in range(20)]
    async with issuing.at(tmp_path / "a.sock"):
        found = await ask(tmp_path / "a.sock", [*late, *good], 1)
    assert [each.state for each in found] == ["WARMING"] * len(late) + ["ACTIVE"] * len(good)
    assert {each.detail for each in found} == {"it is not issued yet, or has ended", ""}
    # the first time: one that a busy machine does not let answer in it is asked again for longer
    patient = [name for name, given in issuing.given.items() if given[0] > 0.5]
    assert len(patient) <= 32, "each has the whole time"


async def test_a_server_that_is_too_busy_to_answer_at_once_is_asked_again_for_longer(tmp_path: Path) -> None:
    issuing, names = Issuing(silent=0.7), [*(f"late{n}" for n in range(16)), "good"]
    async with issuing.at(tmp_path / "a.sock"):
        *_, found = await ask(tmp_path / "a.sock", names, 2)
    assert (found.state, len(issuing.given["good"])) == ("ACTIVE", 2)


def test_why_nothing_can_be_connected_to_is_said() -> None:
    """That all attempts have failed names no fault to look for."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with pytest.raises(web.WebError, match="Connection refused"):
            web.get(f"http://127.0.0.1:{reserved.getsockname()[1]}", "/status")


def test_why_tls_fails_is_said_in_its_own_words() -> None:
    """The number of such an error is none of the system's: by that name it would be a matter of permissions."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection, suppress(ConnectionError):
                connection.sendall(b"220 mail.example ESMTP\r\n")
                while connection.recv(65536):
                    pass

        greeting = threading.Thread(target=greet)
        greeting.start()
        try:
            with pytest.raises(web.WebError, match="SSL"):
                web.get(f"https://127.0.0.1:{listener.getsockname()[1]}", "/status")
        finally:
            greeting.join()
