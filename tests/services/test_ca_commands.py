"""`sds-agent ca serve` and `sds-agent ca token` as they are called."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc.aio
import pytest
from fakes.ca_servers import METHOD, TRUST_DOMAIN, WEB, Served, TokenIssuer, ask
from fakes.processes import Program, started, with_descriptors

from sds_agent.ca.schema import json_schema
from sds_agent.ca.tokens import JoinTokens
from sds_agent.cli.main import main
from sds_agent.cli.parser import Parser, build
from sds_agent.pki.certificates import read_pem, subject_alternative_uris, write_pem
from sds_agent.pki.keys import KeyType, generate

DB = WEB.replace("web", "db")
CONFIG = (
    f"trust_domain: {TRUST_DOMAIN}\nlisten: 127.0.0.1:0\nserver_names: [localhost]\nsigner: {{self_signed: root}}\n"
    "audit: audit.log\ncallers: {join_tokens: tokens}\nlog: {format: json}\n"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ca.yaml"
    path.write_text(CONFIG)
    return path


def add(file: Path, line: str) -> None:
    file.write_text(f"{CONFIG}{line}\n")


def change(file: Path, old: str, new: str) -> None:
    file.write_text(CONFIG.replace(old, new))


@asynccontextmanager
async def running(file: Path, descriptors: tuple[int, int] | None = None) -> AsyncIterator[tuple[Program, Served]]:
    """The command, and the CA that it serves; if given, with these limits (soft and hard) on descriptors."""
    limited = [] if descriptors is None else with_descriptors(*descriptors)
    async with started([sys.executable, *limited, "-m", "sds_agent", "ca", "serve", str(file)]) as program:
        address = json.loads(await program.line('"listening"'))["address"]
        stored = (file.parent / "root" / "roots.pem").read_bytes()
        yield program, Served(address, file.parent, TokenIssuer(), write_pem(read_pem(stored)))


async def test_a_machine_joins_with_a_token_from_the_command_line(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ca", "token", str(file), WEB, "--ttl", "5m"]) == 0
    token = capsys.readouterr().out.strip()
    async with running(file) as (program, ca):
        got = await ca.ask(token)
        assert subject_alternative_uris(got.leaf) == (WEB,)
        assert await program.stop(signal.SIGTERM) == 0
    assert token not in "\n".join(program.lines)
    assert token not in (file.parent / "audit.log").read_text()


async def test_the_root_outlives_the_server(file: Path) -> None:
    async with running(file) as (program, first):
        await program.stop()
    async with running(file) as (program, second):
        assert second.roots == first.roots


async def test_a_later_signal_ends_it_at_once_and_one_that_comes_twice_does_not(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ca", "token", str(file), WEB]) == 0
    proof = [("authorization", f"Bearer {capsys.readouterr().out.strip()}")]
    async with running(file) as (program, ca), ca.connected() as channel:
        unfinished: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(METHOD)
        call = unfinished(metadata=proof)  # so that the first takes its time
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(channel)  # the call is there when this one is answered, on the same connection
        for _ in range(2):
            program.process.terminate()
        await program.line('"still_stopping"')
        assert await program.stop(signal.SIGTERM) == -signal.SIGTERM
        with pytest.raises(grpc.aio.AioRpcError):
            await call


HANGING = """
import socket, sys, threading
from sds_agent.cli.main import main
from sds_agent.cli.parser import Parser, build
look_up = socket.getaddrinfo
def hang(host, *arguments, **options):
    if "issuer.example" in str(host):
        threading.Event().wait()
    return look_up(host, *arguments, **options)
socket.getaddrinfo = hang
sys.exit(main(sys.argv[1:]))
"""


async def test_a_name_whose_lookup_hangs_does_not_hold_up_the_end(file: Path) -> None:
    """Or else a restart takes as long as the servers for names are waited for, up to half a minute."""
    issuer = '{issuer: i, audience: a, jwks: "https://issuer.example/keys"}'
    change(file, "join_tokens: tokens", f"join_tokens: tokens, jwt: [{issuer}]")
    async with started([sys.executable, "-c", HANGING, "ca", "serve", str(file)]) as program:
        await program.line('"key_set_not_read"')
        await program.line('"listening"')
        assert await program.stop() == 0


async def test_two_servers_do_not_share_a_root(file: Path) -> None:
    async with running(file), started([sys.executable, "-m", "sds_agent", "ca", "serve", str(file)]) as second:
        assert await second.process.wait() == 2


def refusal_to_serve(file: Path) -> str:
    """What a server says that does not start. It runs in a process of its own: gRPC can hand what is left of a server
    to the next test, whose event loop is another.
    """
    command = [sys.executable, "-m", "sds_agent", "ca", "serve", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    return done.stderr


def test_root_makes_a_token_for_a_ca_that_runs_as_another_user(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only root can give a directory away; another user's stays its own."""
    owner = (4711, 4712) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    tokens = file.parent / "tokens"
    tokens.mkdir(0o700)
    os.chown(tokens, *owner)
    assert main(["ca", "token", str(file), WEB]) == 0, capsys.readouterr().err
    (record,) = tokens.iterdir()
    assert (record.stat().st_uid, record.stat().st_gid) == owner
    if os.geteuid() == 0:
        assert "belongs to uid 4711" in refusal_to_serve(file), "who could make tokens for everybody"


def test_root_is_told_to_start_the_ca_first_whose_user_the_tokens_belong_to(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To make them below root's own directories, as for the server itself, would take them from the server's user."""
    state = file.parent / "state"
    state.mkdir(0o700)
    file.write_text(file.read_text().replace("join_tokens: tokens", "join_tokens: state/tokens"))
    state.chmod(0o777)
    assert main(["ca", "token", str(file), WEB]) == 2
    assert "every user may write to" in capsys.readouterr().err
    state.chmod(0o700)
    if os.geteuid() == 0:  # who alone can give a directory away
        os.chown(state, 4711, -1)
        assert main(["ca", "token", str(file), WEB]) == 2
        assert f"there is no {state}/tokens yet" in (said := capsys.readouterr().err)
        assert "start the CA server first" in said
        assert list(state.iterdir()) == []


def test_a_token_goes_to_a_file_of_its_own(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = file.parent / "web.token"
    assert main(["ca", "token", str(file), WEB, "--output", str(target)]) == 0
    assert target.stat().st_mode & 0o777 == 0o600
    assert target.read_text().startswith("sds-join-")
    assert "sds-join-" not in capsys.readouterr().out


def test_what_a_killed_command_left_of_a_token_is_removed(file: Path) -> None:
    output = file.with_name("db1.token")
    left, recent, other = (file.with_name(f".{name}.0a1b2c3d") for name in ("db1.token", "db1.token", "db2.token"))
    recent = recent.with_name(".db1.token.00000000")
    for path in (left, recent, other):
        path.write_text("a token")
    for path in (left, other):
        os.utime(path, (0, 0))
    assert main(["ca", "token", str(file), WEB, "--output", str(output)]) == 0
    assert [path.exists() for path in (output, left, recent, other)] == [True, False, True, True]


def test_a_token_takes_the_place_of_no_device_and_of_no_link(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Root would take /dev/null or /dev/stdout from everybody on the machine."""
    os.mkfifo(file.parent / "device")
    (file.parent / "link").symlink_to("device")
    (file.parent / "link to a file").symlink_to(file)
    for name in ("device", "link", "link to a file"):
        before = (file.parent / name).lstat()
        assert main(["ca", "token", str(file), WEB, "--output", str(file.parent / name)]) == 2
        assert "is no regular file" in capsys.readouterr().err
        assert (file.parent / name).lstat().st_ino == before.st_ino


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["spiffe://elsewhere/web"], "no workload of"),
        (["web"], "not a SPIFFE ID"),
        ([WEB, "--ttl", "25h"], "24h"),
        ([WEB, "--ttl", "soon"], "write it like"),
        ([WEB, "--output", "/nowhere/at/all"], "cannot write /nowhere/at/all: No such file or directory; name a file"),
        ([WEB, "--output", "/proc"], "cannot write /proc: "),
        ([WEB, "--output", "n" * 300], "File name too long; name a file"),
    ],
)
def test_a_token_that_makes_no_sense_is_refused_in_words(
    file: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ca", "token", str(file), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not [*(file.parent / "tokens").glob("*.token")], "a token that nobody has is listed, and withdrawn in vain"


def test_a_token_for_which_the_disk_has_no_room_is_nobodys_right(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To run the command as another user, as for other errors, would help nobody."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    assert main(["ca", "token", str(file), WEB]) == 2
    assert "No space left on device; make room on its disk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{self_signed: root}", "{cacerts: missing}", "signer.cacerts"),
        ("{join_tokens: tokens}", "{mtls: true}", "first certificate"),
        (
            "{join_tokens: tokens}",
            "{jwt: [{issuer: i, audience: a, jwks: missing.json}]}",
            "the key set",
        ),
        ("audit.log", "no/such/directory/audit.log", "audit: cannot write"),
        ("trust_domain", "trust_domian", "did you mean trust_domain?"),
        ("127.0.0.1:0", "a..b:15012", "a name has 1 to 63 characters between two dots, and no space"),
        ("127.0.0.1:0", "nobody.invalid:15012", "; give a name that leads to an address of this machine"),
        ("127.0.0.1:0", "192.0.2.1:15012", "; give an address of this machine, or 0.0.0.0"),
        ("127.0.0.1:0", f"127.0.0.1:{'1' * 5000}", "an address and a port"),
        ("{self_signed: root}", f"{{cacerts: {'d' * 300}}}", "signer.cacerts"),
    ],
)
def test_a_server_that_cannot_be_good_does_not_start(file: Path, old: str, new: str, words: str) -> None:
    change(file, old, new)
    assert words in refusal_to_serve(file)


async def test_a_directory_too_long_for_a_socket_is_named(file: Path) -> None:
    directory = file.parent / ("d" * 100)
    directory.mkdir()
    command = [sys.executable, "-m", "sds_agent", "ca", "serve", str(file)]
    async with started(command, {"TMPDIR": str(directory)}) as program:
        assert "set TMPDIR to a shorter one" in await program.line("too long")
        assert await program.process.wait() == 2


async def test_temporary_files_may_be_in_a_directory_of_any_name(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To gRPC the path of its socket is part of an address, in which some characters mean something else."""
    assert main(["ca", "token", str(file), WEB]) == 0
    with TemporaryDirectory(prefix="50%20 of? #1") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        async with running(file) as (program, ca):
            await ca.ask(capsys.readouterr().out.strip())
            assert await program.stop() == 0


def test_the_schema_of_the_file_is_printed_for_an_editor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ca", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


async def test_a_killed_server_forgets_no_spent_token(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ca", "token", str(file), WEB]) == 0
    token = capsys.readouterr().out.strip()
    async with running(file) as (program, ca):
        await ca.ask(token)
        await program.stop(signal.SIGKILL)
    async with running(file) as (program, ca):
        with pytest.raises(grpc.aio.AioRpcError):
            await ca.ask(token)


@pytest.mark.parametrize(("descriptors", "few"), [((128, 4096), False), ((128, 190), True)], ids=["soft", "hard"])
async def test_connections_never_take_the_descriptor_that_the_audit_log_needs(
    file: Path, capsys: pytest.CaptureFixture[str], descriptors: tuple[int, int], *, few: bool
) -> None:
    """Agents that keep their connections are many, and 1024 descriptors are what most systems give: when they were
    used up, no caller would get a certificate any more, those that are connected included.
    """
    add(file, "limits: {connections: 1000}")
    assert main(["ca", "token", str(file), WEB]) == 0
    token = capsys.readouterr().out.strip()
    async with running(file, descriptors) as (program, ca), AsyncExitStack() as open_until_the_end:
        first = await open_until_the_end.enter_async_context(ca.connected(await ca.ask(token)))
        await ask(first)
        for _ in range(39):  # there are 30 places where the limit is hard, and the oldest gives way
            channel = await open_until_the_end.enter_async_context(ca.connected())
            check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
            await check(b"", timeout=10)
        await ask(first)
        assert await program.stop() == 0
    assert ("few_descriptors" in "".join(program.lines)) is few


def make(file: Path, identity: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["ca", "token", *options, str(file), identity]) == 0
    return capsys.readouterr().out.strip()


def test_who_could_still_join_is_listed_without_a_token(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = JoinTokens(file.parent / "tokens")
    used, open_ = make(file, WEB, capsys), make(file, DB, capsys, "--ttl", "10m")
    tokens.spend(tokens.find(used), generate(KeyType.EC_P256).public_key())
    before = sorted((each.name, each.lstat().st_mtime_ns) for each in (file.parent / "tokens").iterdir())
    assert main(["ca", "token", "list", str(file), "-o", "json"]) == 0
    said = capsys.readouterr().out
    first, second = json.loads(said)
    assert (first["spiffe_id"], first["used"], second["spiffe_id"]) == (DB, None, WEB)
    assert first["made"] < first["expires"] < second["expires"]
    assert second["made"] <= second["used"] < second["expires"]
    for token in (used, open_):
        assert token not in said
        assert hashlib.sha256(token.encode()).hexdigest() not in said
    assert main(["ca", "token", "list", "--config", str(file)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["SPIFFE", "ID", "MADE", "EXPIRES", "USED"]
    assert [row.split()[0] for row in rows] == [DB, WEB]
    assert [row.endswith("-") for row in rows] == [True, False]
    assert sorted((each.name, each.lstat().st_mtime_ns) for each in (file.parent / "tokens").iterdir()) == before


def test_a_ca_without_tokens_says_so_and_makes_no_directory(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ca", "token", "list", str(file)]) == 0
    assert capsys.readouterr().out == "There is no join token.\n"
    assert not (file.parent / "tokens").exists()


def test_a_directory_of_tokens_that_cannot_be_read_is_not_an_empty_one(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file.parent / "tokens").touch()
    assert main(["ca", "token", "list", str(file)]) == 2
    assert f"callers.join_tokens: cannot read {file.parent}/tokens: Not a directory; " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["withdraw", "FILE", WEB], ["withdraw", WEB, "--config", "FILE"], ["FILE", "--withdraw", WEB]]
)
def test_the_tokens_of_one_identity_are_withdrawn(
    file: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for identity in (WEB, WEB, DB):
        make(file, identity, capsys)
    assert main(["ca", "token", *(str(file) if word == "FILE" else word for word in words)]) == 0
    assert f"tokens withdrawn for {WEB}: 2; " in capsys.readouterr().err
    assert [each.spiffe_id for each in JoinTokens(file.parent / "tokens").listed()] == [DB]


@pytest.mark.parametrize(
    "words", [["token"], ["token", "--ttl", "5m"], ["token", "make"], ["token", "make", "--ttl=5m"]]
)
def test_the_word_make_may_be_left_out(file: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ca", *words, str(file), WEB]) == 0
    assert capsys.readouterr().out.startswith("sds-join-")
    assert main(["ca", "token", str(file), "--ttl", "5m", WEB]) == 0, "options may stand between"


@pytest.mark.parametrize(
    "words",
    [
        ["token", "--config", "FILE", WEB],
        ["token", "make", WEB, "--config", "FILE"],
        ["token", "make", "--config=FILE", "--ttl", "5m", WEB],
        ["token", "--ttl", "5m", WEB, "--config", "FILE"],
    ],
)
def test_a_token_is_made_by_a_configuration_that_is_named_as_for_every_other_command(
    file: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ca", *(word.replace("FILE", str(file)) for word in words)]) == 0
    assert capsys.readouterr().out.startswith("sds-join-")


def test_a_configuration_that_is_named_twice_is_a_wrong_call(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ca", "token", str(file), WEB, "--config", str(file)]) == 2
    assert "one argument too many" in capsys.readouterr().err
    assert main(["ca", "token", WEB, "--config"]) == 2


def test_every_command_that_takes_a_file_takes_it_as_config_too() -> None:
    def commands(parser: Parser) -> Iterator[Parser]:
        yield parser
        for each in parser.commands.values():
            yield from commands(each)

    for each in commands(build().whole()):
        named = [
            action.dest for action in each.declarations() if action.metavar == "FILE" and not action.option_strings
        ]
        assert not named or "--config" in [word for action in each.declarations() for word in action.option_strings], (
            each.prog
        )
