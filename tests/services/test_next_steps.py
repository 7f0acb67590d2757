"""What a newcomer reads on the terminal once the agent serves: it is pasted, so it has to be right."""

import logging
import os
import pty
import select
import signal
import subprocess
import sys
import tty
from collections.abc import Iterator
from io import FileIO, TextIOWrapper
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from fakes.agents import COMMAND, PATHS
from fakes.configurations import MINIMAL, UID, settings
from fakes.deadlines import LIMIT, promptly

from sds_agent import log
from sds_agent.cli.next_steps import LONGEST, shown_once_ready, stanza, steps
from sds_agent.config.loading import Loaded, load
from sds_agent.envoy_config import messages
from sds_agent.envoy_config.choices import EnvoyChoices

LOG = logging.getLogger("sds_agent.test")


def loaded(folder: Path, more: str = "", *, socket: Path | None = None) -> Loaded:
    file = folder / "sds-agent.yaml"
    file.write_text(MINIMAL + more)
    return load(file, {}, uid=UID, socket=socket)


def text(chosen: Loaded) -> str:
    return "\n".join(steps(chosen))


def test_the_stanza_is_what_envoy_config_builds(tmp_path: Path) -> None:
    chosen = settings(tmp_path, MINIMAL.replace("name: default", "name: 'a \"b'"))
    choices = EnvoyChoices(
        name=chosen.workloads[0].name,
        spiffe_id=chosen.workloads[0].spiffe_id,
        trust_domain=chosen.trust_domain,
        bundle="ROOTCA",
        socket=chosen.sds.socket,
    )
    cluster, listener = yaml.safe_load_all(stanza(chosen))
    assert cluster == messages.as_json(messages.sds_cluster(choices))
    assert listener == messages.as_json(messages.downstream(choices))


def test_without_a_file_there_is_an_envoy_configuration_to_paste() -> None:
    shown = text(load(None, {}, uid=UID))
    assert "tls_certificate_sds_secret_configs" in shown
    assert "sds-agent status  " in shown
    assert "set admin.address" in shown


def test_with_a_file_the_commands_name_it(tmp_path: Path) -> None:
    shown = text(loaded(tmp_path, "admin: {address: 127.0.0.1:9902}\n"))
    assert f"sds-agent envoy-config default --config {tmp_path}/sds-agent.yaml " in shown
    assert "http://127.0.0.1:9902/ " in shown
    assert "tls_certificate_sds_secret_configs" not in shown


def test_a_command_has_the_name_of_a_workload_as_the_configuration_has_it(tmp_path: Path) -> None:
    file = tmp_path / "sds-agent.yaml"
    file.write_text(MINIMAL.replace("name: default", "name: über"))
    assert f"sds-agent envoy-config 'über' --config {file} " in text(load(file, {}, uid=UID))


def test_the_commands_reach_an_agent_whose_socket_the_file_does_not_have(tmp_path: Path) -> None:
    file = tmp_path / "sds-agent.yaml"
    for shown in (
        text(loaded(tmp_path, socket=tmp_path / "it's.sock")),
        text(load(file, {"sds_agent__sds__socket": f"{tmp_path}/it's.sock"}, uid=UID)),
    ):
        option = f"--socket '{tmp_path}/it'\"'\"'s.sock' "
        assert f"sds-agent status {option}" in shown
        assert f"sds-agent secret {option}" in shown
        assert f"sds-agent envoy-config default --config {file} {option}" in shown


def test_what_is_off_or_not_known_yet_is_not_shown_as_an_address(tmp_path: Path) -> None:
    assert "log line admin_listening" in text(loaded(tmp_path, "admin: {address: '127.0.0.1:0'}\n"))
    off = text(loaded(tmp_path, "admin: {enabled: false, address: 127.0.0.1:9902}\n"))
    assert "remove admin.enabled: false" in off
    assert "sds-agent status" not in off
    assert "http://" not in off


def test_a_path_cannot_write_what_it_likes_to_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "\x1b[2J"
    folder.mkdir()
    shown = text(loaded(folder))
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) < LONGEST + 100


class Terminal(NamedTuple):
    """A terminal, and what is shown on it."""

    stream: TextIOWrapper
    shown: int

    def until(self, end: bytes) -> bytes:
        """All that is shown up to these bytes."""
        found = b""
        while end not in found:
            assert select.select([self.shown], [], [], LIMIT)[0], f"not shown: {end!r}; shown: {found[-2000:]!r}"
            found += os.read(self.shown, 65536)
        return found


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """One that shows what is written to it as it is."""
    shown, descriptor = pty.openpty()
    tty.setraw(descriptor)
    with TextIOWrapper(FileIO(descriptor, "w"), write_through=True) as stream, os.fdopen(shown, "rb", buffering=0):
        yield Terminal(stream, shown)


@pytest.mark.parametrize(("form", "expected"), [("auto", 1), ("text", 1), ("json", 0)])
def test_they_are_shown_below_the_first_ready_alone_and_never_among_json(
    form: log.Format, expected: int, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    log.configure(form)
    with shown_once_ready(loaded(tmp_path), form):
        for name in ("listening", "ready", "not_ready", "ready", "the end"):
            log.event(LOG, name)
    shown = terminal.until(b"the end").decode()
    assert shown.count("The agent serves. Next:") == expected
    assert "\x1b" not in shown
    if expected:
        assert shown.index("ready") < shown.index("The agent serves") < shown.index("not_ready")


def test_a_terminal_that_stands_still_does_not_stop_the_agent(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Ctrl-S: what does not fit waits, and is shown whole and in order once there is room again."""
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    log.configure("text")
    chosen = load(None, {}, uid=UID)

    def fill_and_go_on() -> None:
        with shown_once_ready(chosen, "text"):
            while select.select([], [terminal.stream], [], 0)[1]:
                log.event(LOG, "filling", more="x" * 500)
            log.event(LOG, "ready")
            log.event(LOG, "the end")

    promptly(fill_and_go_on)
    shown = terminal.until(b"the end").decode()
    assert text(chosen) in shown


def test_run_shows_them_on_a_terminal_and_nothing_heavy_is_imported_for_it(terminal: Terminal, tmp_path: Path) -> None:
    places = {"SDS_AGENT__SDS__SOCKET": f"{tmp_path}/s", "SDS_AGENT__STATE_DIR": f"{tmp_path}/state"}
    python, *module = COMMAND
    command = [python, "-X", "importtime", *module, "run"]
    with subprocess.Popen(command, env=os.environ | PATHS | places, cwd=tmp_path, stderr=terminal.stream) as agent:
        try:
            shown = terminal.until(b"set admin.address").decode(errors="replace")
            agent.send_signal(signal.SIGTERM)
            terminal.until(b" stopped")
        except BaseException:
            agent.kill()
            raise
    assert agent.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in shown.splitlines() if line.startswith("import time:")}
    assert "sds_agent.cli.next_steps" in imported
    assert imported.isdisjoint({"betterproto2", "envoy_data_plane", "starlette", "httpx"})
