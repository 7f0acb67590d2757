"""One certificate to files and an exit code, and the probe of every CA: the commands, against real CAs."""

import asyncio
import errno
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path

import anyio
import pytest
from fakes.agents import agent, write_config
from fakes.ca_servers import TRUST_DOMAIN, WEB, Served, served
from fakes.cfssl_server import KEY, CfsslServer
from fakes.processes import DAC_OVERRIDE, started, without_capability

from sds_agent.authority.istio.kind import JOIN_TOKEN
from sds_agent.ca import tokens
from sds_agent.config.loading import load
from sds_agent.directories import LockedDirectory, locked_directory
from sds_agent.errors import ConfigurationError, SdsAgentError
from sds_agent.once import copied_state
from sds_agent.outputs.directory import LOCK
from sds_agent.pki.certificates import read_pem, serial_hex

FILES = ("cert-chain.pem", "key.pem", "root-cert.pem")
PATHS = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def command(*arguments: object, before: Sequence[str] = ()) -> list[str]:
    return [sys.executable, *before, "-m", "sds_agent", *map(str, arguments)]


async def run(*arguments: object, code: int, before: Sequence[str] = ()) -> "subprocess.CompletedProcess[bytes]":
    """Run the command, which has to end with this exit code and without a traceback."""
    done = await anyio.run_process(command(*arguments, before=before), env=PATHS, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert b"Traceback" not in done.stderr
    return done


def last_line(done: "subprocess.CompletedProcess[bytes]") -> str:
    return done.stderr.decode().splitlines()[-1]


def embedded(directory: Path, **workloads: str) -> Path:
    return write_config(directory, **(workloads or {"default": "1h"}))


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[Served]:
    (tmp_path / "ca").mkdir()
    async with served(tmp_path / "ca", callers="  mtls: true") as running:
        yield running


def joining(directory: Path, ca: Served, token: str | None) -> Path:
    """The configuration of a machine with a join token for that CA."""
    (directory / "roots.pem").write_bytes(ca.roots)
    if token is not None:
        (directory / "token").write_text(token)
        (directory / "token").chmod(0o600)
    config = {
        "trust_domain": TRUST_DOMAIN,
        "state_dir": str(directory / "state"),
        "sds": {"socket": str(directory / "sds.sock")},
        "authorities": {
            "ca": {
                "type": "istio",
                "address": ca.address.replace("127.0.0.1", "localhost"),
                "ca_file": "roots.pem",
                "token_file": "token",
            }
        },
        "workloads": [{"name": "web", "spiffe_id": WEB, "ttl": "1h"}],
    }
    file = directory / "sds-agent.yaml"
    file.write_text(json.dumps(config))
    return file


@asynccontextmanager
async def silent(directory: Path, ca: Served) -> AsyncIterator[tuple[Path, asyncio.Event]]:
    """The configuration of a machine whose CA takes connections and says nothing, and whether one has come."""
    asked = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        with suppress(OSError):
            while await reader.read(1 << 16):
                pass
        writer.close()

    config = joining(directory, ca, ca.join_token())
    server = await asyncio.start_server(take, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    config.write_text(config.read_text().replace(ca.address.rpartition(":")[2], str(port)))
    try:
        yield config, asked
    finally:
        server.close()


# --- issue ---


async def test_a_certificate_is_written_as_a_set_and_described_without_its_key(tmp_path: Path) -> None:
    done = await run("issue", embedded(tmp_path), "--output", tmp_path / "out", code=0)
    said: Mapping[str, object] = json.loads(done.stdout)
    leaf = read_pem((tmp_path / "out" / "cert-chain.pem").read_bytes())[0]
    assert said["serial"] == serial_hex(leaf)
    assert datetime.fromisoformat(str(said["not_after"])) == leaf.not_valid_after_utc
    assert said["issuer"] == leaf.issuer.rfc4514_string()
    assert said["spiffe_id"] == "spiffe://demo.example/default"
    ssl.create_default_context(cafile=tmp_path / "out" / "root-cert.pem").load_cert_chain(
        tmp_path / "out" / "cert-chain.pem", tmp_path / "out" / "key.pem"
    )
    assert (tmp_path / "out" / "key.pem").resolve().stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in done.stdout + done.stderr


async def test_without_an_output_nothing_is_written_but_the_summary(tmp_path: Path) -> None:
    done = await run("issue", embedded(tmp_path), "--output", "-", code=0)
    assert json.loads(done.stdout)["directory"] is None
    assert sorted(os.listdir(tmp_path)) == ["sds-agent.yaml", "state"]  # noqa: PTH208 - names are what is compared


async def test_it_works_beside_a_running_agent_and_signs_with_the_same_root(tmp_path: Path) -> None:
    config = embedded(tmp_path)
    async with agent(config) as running:
        await running.event("ready")
        roots = (tmp_path / "state/authorities/local/roots.pem").read_bytes()
        await run("issue", config, "--output", tmp_path / "out", code=0)
        assert (tmp_path / "out" / "root-cert.pem").read_bytes() in roots
        assert (tmp_path / "state/authorities/local/roots.pem").read_bytes() == roots
        assert [path.name for path in (tmp_path / "state").glob(".*")] == [], "no copy of the CA's key stays"
        await running.program.stop()


async def test_beside_a_running_agent_it_replaces_no_root_that_is_due(tmp_path: Path) -> None:
    """The agent would take the new root for another process's, and renew none until it is restarted."""
    config, state = embedded(tmp_path), tmp_path / "state"
    short = {**json.loads(config.read_text()), "authorities": {"local": {"type": "embedded", "root_lifetime": "1h"}}}
    config.write_text(json.dumps(short))
    await run("issue", config, "--output", "-", code=0)
    roots = (state / "authorities/local/roots.pem").read_bytes()
    config.write_text(json.dumps(short).replace('"1h"}}', '"365d"}}'))
    with locked_directory(state, "state_dir", SdsAgentError()):
        await run("issue", config, "--output", tmp_path / "out", code=0)
    assert (state / "authorities/local/roots.pem").read_bytes() == roots
    assert (tmp_path / "out" / "cert-chain.pem").exists()


OTHER_USER = 4711 if os.geteuid() == 0 else os.geteuid()


@pytest.mark.parametrize("owner", [None, str(OTHER_USER)])
async def test_a_token_is_spent_once_and_the_next_run_proves_itself_with_the_files(
    tmp_path: Path, ca: Served, owner: str | None
) -> None:
    """A cron job has nothing else to renew with: the CA refuses the token from then on. Root's may give the files to
    the user of the service that reads them.
    """
    config = joining(tmp_path, ca, ca.join_token())
    if owner is not None:
        given = json.loads(config.read_text())
        given["workloads"][0]["output"] = {"directory": str(tmp_path / "of-the-agent"), "owner": owner}
        config.write_text(json.dumps(given))
    first = await run("issue", config, "--output", tmp_path / "out", code=0)
    assert not (tmp_path / "state").exists(), "nor does it need the agent's state"
    (tmp_path / "token").unlink()
    second = await run("issue", config, "--output", tmp_path / "out", code=0)
    assert json.loads(first.stdout)["serial"] != json.loads(second.stdout)["serial"]
    assert [line["proof"] for line in ca.audit] == ["join-token", "certificate"]


async def test_a_ca_that_refuses_is_quoted_and_the_files_stay(tmp_path: Path, ca: Served) -> None:
    config = joining(tmp_path, ca, f"{JOIN_TOKEN}of-nobody")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "key.pem").write_text("of before")
    done = await run("issue", config, "--output", tmp_path / "out", "--timeout", "1s", code=1)
    said = last_line(done)
    assert said.startswith(
        "sds-agent: no certificate for web within 1s; the only attempt at the authority ca failed (una"
    )
    assert "token" in said
    assert "of-nobody" not in done.stderr.decode()
    assert (tmp_path / "out" / "key.pem").read_text() == "of before"


async def test_a_ca_that_does_not_answer_ends_at_the_deadline(tmp_path: Path, ca: Served) -> None:
    async with silent(tmp_path, ca) as (config, _):
        done = await run("issue", config, "--output", tmp_path / "out", "--timeout", "500ms", code=1)
    assert "no certificate for web within 500ms" in last_line(done)
    assert not (tmp_path / "out" / "key.pem").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "wbe"], "which is no workload of the configuration; did you mean web?"),
        ([], "--workload is missing; with several workloads it must be one of web, batch"),
        (["--timeout", "0s"], "it must be a duration such as 10s or 5m, at most 1h"),
        (["--timeout", "5"], "it must be a duration"),
    ],
)
async def test_a_wrong_call_is_explained(tmp_path: Path, arguments: list[str], words: str) -> None:
    config = embedded(tmp_path, web="1h", batch="1h")
    assert words in last_line(await run("issue", config, "--output", tmp_path / "out", *arguments, code=2))
    assert not (tmp_path / "out").exists()


async def test_an_output_that_cannot_be_written_is_found_before_a_token_is_spent(tmp_path: Path, ca: Served) -> None:
    config = joining(tmp_path, ca, ca.join_token())
    (tmp_path / "file").touch()
    assert "--output: cannot use" in last_line(await run("issue", config, "--output", tmp_path / "file", code=3))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "every user may write" in last_line(await run("issue", config, "--output", tmp_path / "open", code=3))
    locked = LockedDirectory(tmp_path / "out", "output", SdsAgentError(), mode=0o755, lock=LOCK)
    locked.claim()
    assert "another sds-agent writes to" in last_line(await run("issue", config, "--output", tmp_path / "out", code=3))
    locked.release()
    (tmp_path / "out").chmod(0o555)  # with the lock of an earlier run in it
    refused = await run("issue", config, "--output", tmp_path / "out", code=3, before=without_capability(DAC_OVERRIDE))
    assert "out: Permission denied; make it writable for" in last_line(refused)
    (tmp_path / "out").chmod(0o755)
    assert ca.audit == []
    await run("issue", config, "--output", tmp_path / "out", code=0)


async def test_a_directory_where_a_file_goes_is_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out" / "key.pem" / "x").mkdir(parents=True)
    done = await run("issue", embedded(tmp_path), "--output", tmp_path / "out", code=3)
    assert f"cannot write to {tmp_path / 'out' / 'key.pem'}: Is a directory" in last_line(done)


async def test_a_signal_ends_it_with_words(tmp_path: Path, ca: Served) -> None:
    asking = ("issue", tmp_path / "sds-agent.yaml", "--output", tmp_path / "out", "--timeout", "1m")
    async with silent(tmp_path, ca) as (_, asked), started(command(*asking), PATHS) as program:
        with anyio.fail_after(20):
            await asked.wait()
        assert await program.stop(signal.SIGTERM) == 130
        assert "sds-agent: interrupted before a certificate was issued" in program.lines


# --- probe ---


async def test_a_probe_says_of_each_ca_whether_it_issues_and_spends_no_token_unless_asked(
    tmp_path: Path, ca: Served
) -> None:
    config = joining(tmp_path, ca, ca.join_token())
    done = await run("check", "--probe", config, code=0)
    said = done.stdout.decode().splitlines()[-1]
    assert said.startswith("The authority ca: not asked: token_file: the join token in")
    assert "`sds-agent check --probe --spend-token` asks all the same" in said
    assert ca.audit == []
    done = await run("check", "--probe", "--spend-token", config, code=0)
    said = done.stdout.decode().splitlines()[-1]
    assert said.startswith("The authority ca is good: it issued a certificate in ")
    assert re.search(r"valid for (1m|5[0-9]s) ", said), "a certificate's times are whole seconds"
    assert WEB in said
    assert not (tmp_path / "state").exists(), "it is thrown away"
    done = await run("check", "--probe", "--spend-token", config, code=3)
    assert last_line(done).startswith("sds-agent: the authority ca does not issue: unauthenticated: ")
    assert last_line(done).endswith(
        "; an agent that has a certificate from it renews with that, which a probe does not have"
    )


async def test_a_probe_of_a_ca_that_takes_no_lifetime_does_not_complain_of_its_own(tmp_path: Path) -> None:
    """It would tell the operator to change a ttl that is the profile's."""
    server = CfsslServer()
    (tmp_path / "hmac").write_text(f"{KEY.hex()}\n")
    (tmp_path / "hmac").chmod(0o600)
    corp = {"type": "cfssl", "ca_file": "roots.pem", "auth_key_file": "hmac", "profile": "mesh", "bundle": True}
    config = embedded(tmp_path, default="1h")
    async with server.http.serving():
        (tmp_path / "roots.pem").write_bytes(server.http.roots_pem)
        authorities = {"authorities": {"corp": {**corp, "url": server.http.url}}}
        config.write_text(json.dumps(json.loads(config.read_text()) | authorities))
        done = await run("check", "--probe", config, code=0)
    said = done.stdout.decode().splitlines()[-1]
    assert said.startswith("The authority corp is good: it issued a certificate in ")
    assert "warning" not in said


async def test_a_probe_says_once_what_is_in_the_way_of_certificates_and_roots(tmp_path: Path) -> None:
    config = embedded(tmp_path)
    authorities = {"authorities": {"spire": {"type": "spiffe", "socket": str(tmp_path / "missing.sock")}}}
    config.write_text(json.dumps(json.loads(config.read_text()) | authorities))
    said = last_line(await run("check", "--probe", config, code=3))
    assert said.startswith("sds-agent: the authority spire does not issue: transient: ")
    assert said.endswith("; nor does it give its trust anchors")
    assert said.count("missing.sock") == 1


async def test_a_probe_beside_a_running_agent_says_of_the_ca_what_it_is_and_ends_as_check_does(tmp_path: Path) -> None:
    config = embedded(tmp_path)
    async with agent(config) as running:
        await running.event("ready")
        done = await run("check", "--probe", config, code=3)
        assert b"The authority local is good" in done.stdout
        assert b"another sds-agent runs on" in done.stderr
        await running.program.stop()


async def test_a_ca_inside_the_agent_is_checked_and_not_asked(tmp_path: Path) -> None:
    config = embedded(tmp_path)
    done = await run("check", "--probe", config, code=0)
    assert b"The authority local is good: it is a part of the agent" in done.stdout
    assert not (tmp_path / "state").exists()


def test_a_join_token_is_known_by_how_the_ca_begins_it() -> None:
    assert JOIN_TOKEN == tokens.PREFIX


def test_without_a_directory_for_temporary_files_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose file system is read-only."""
    chosen = load(embedded(tmp_path), {}).settings
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ConfigurationError, match=r"let \$TMPDIR name one"), copied_state(chosen, None):
        pass


def test_where_a_cas_root_can_have_no_copy_the_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes beside the root, wherever temporary files are."""
    chosen = load(embedded(tmp_path), {}).settings

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    said = f"^state_dir: no directory for a copy can be made in {tmp_path}: No space left on device; make room"
    with pytest.raises(ConfigurationError, match=said), copied_state(chosen, tmp_path):
        pass


def test_a_cas_root_that_cannot_be_copied_is_not_replaced_by_another(tmp_path: Path) -> None:
    chosen = load(embedded(tmp_path), {}).settings
    root = tmp_path / "state" / "authorities" / "local" / "roots.pem"
    root.parent.mkdir(parents=True)
    root.symlink_to("nowhere")
    with pytest.raises(ConfigurationError, match="where the CA of a running agent is"), copied_state(chosen, tmp_path):
        pass
