"""The image's health check: it asks what the container was started for. Docker itself is not needed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import anyio
import pytest
from fakes.ca_servers import TRUST_DOMAIN
from fakes.processes import started

SCRIPT = Path(__file__).parents[2] / "scripts" / "container_health.py"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("container_health", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HEALTH = loaded()


def configuration(directory: Path, port: int) -> Path:
    file = directory / "ca.yaml"
    file.write_text(
        f"trust_domain: {TRUST_DOMAIN}\nlisten: 127.0.0.1:{port}\nsigner: {{self_signed: root}}\n"
        "audit: audit.log\ncallers: {join_tokens: tokens}\n"
    )
    return file


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["/opt/sds-agent/bin/python3", "/opt/sds-agent/bin/sds-agent", "run", "FILE"], ["run", "FILE"]),
        (["/sbin/docker-init", "--", "sds-agent", "ca", "serve", "FILE"], ["ca", "serve", "FILE"]),
        (["sh", "-c", "sds-agent run FILE"], ["run", HEALTH.USUAL]),
    ],
)
def test_what_the_container_was_started_for_is_found_behind_an_interpreter_and_an_init(
    words: list[str], arguments: list[str]
) -> None:
    assert HEALTH.command(words) == arguments


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("run FILE", "FILE"),
        ("run --config FILE --log-level debug", "FILE"),
        ("run --config=FILE", "FILE"),
        ("run", ""),
        ("run FILE --socket /run/web/sds.sock", "--socket /run/web/sds.sock"),
        ("run --socket=/run/web/sds.sock --config FILE", "--socket /run/web/sds.sock"),
        ("ca serve FILE", "FILE"),
        ("ca serve --config=FILE", "FILE"),
    ],
)
def test_what_runs_is_asked_where_its_command_says_that_it_serves(words: str, asked: str, tmp_path: Path) -> None:
    file = tmp_path / "sds-agent.yaml"
    file.touch()
    found = HEALTH.place(words.replace("FILE", str(file)).split())
    assert found == asked.replace("FILE", str(file)).split()


async def test_a_ca_that_serves_is_healthy(tmp_path: Path, port: int) -> None:
    file = configuration(tmp_path, port)
    async with started([sys.executable, "-m", "sds_agent", "ca", "serve", str(file)]) as program:
        await program.line("listening")
        assert await anyio.to_thread.run_sync(HEALTH.ask_ca, file) == 0
        assert await program.stop() == 0


def test_a_ca_that_is_not_there_is_unhealthy_and_the_log_says_where(
    tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert HEALTH.ask_ca(configuration(tmp_path, port)) == 1
    assert f"does not answer at 127.0.0.1:{port}" in capsys.readouterr().out
