"""`sds-agent envoy-config`: a real Envoy takes every variant, and two of them speak mutual TLS with nobody else."""

import io
import itertools
import json
import socket
import subprocess
from contextlib import AsyncExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import httpx
import pytest
import yaml
from fakes.agents import agent
from fakes.envoys import BINARY
from fakes.processes import started

from sds_agent.cli.main import main

OPTIONS = ("--delta", "--post-quantum", "--no-resumption", "--tls13", "--peer=spiffe://demo.example/peer")


def config(folder: Path) -> Path:
    file = folder / "sds-agent.yaml"
    workloads = [
        {"name": "web", "spiffe_id": "spiffe://demo.example/web", "output": str(folder / "files")},
        {"name": "other", "spiffe_id": "spiffe://demo.example/other"},
    ]
    places = {"state_dir": str(folder / "state"), "sds": {"socket": str(folder / "sds.sock")}}
    file.write_text(json.dumps({"trust_domain": "demo.example", **places, "workloads": workloads}))
    return file


def run(*arguments: str) -> tuple[int, str, str]:
    """The exit code, the output and the errors of the command, in this process: the schema takes half a second to
    import.
    """
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["envoy-config", *arguments])
    return code, out.getvalue(), err.getvalue()


def printed(*arguments: str) -> str:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    return out


def refused(*arguments: str) -> str:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def validate(file: Path) -> None:
    done = subprocess.run(
        [BINARY, "--mode", "validate", "-l", "warning", "-c", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower(), done.stderr


def split(text: str, folder: Path) -> Path:
    """Write each part that names its place to it; returns the bootstrap's."""
    bootstrap, *files = text.split(f"# {folder}/")
    for each in files:
        name, _, content = each.partition("\n")
        (folder / name).write_text(content)
    (folder / "envoy.yaml").write_text(bootstrap)
    return folder / "envoy.yaml"


@pytest.mark.parametrize("count", [0, 1, len(OPTIONS)])
def test_envoy_takes_every_variant(tmp_path: Path, count: int) -> None:
    file = config(tmp_path)
    for options in itertools.combinations(OPTIONS, count):
        envoys = tmp_path / "envoy.yaml"
        envoys.write_text(printed("web", "--config", str(file), "--bootstrap", *options))
        validate(envoys)
        as_json = json.loads(printed("web", "--config", str(file), "--bootstrap", "-o", "json", *options))
        assert as_json == yaml.safe_load(envoys.read_text())


def test_envoy_takes_the_variant_without_the_agent(tmp_path: Path) -> None:
    text = printed("web", "--config", str(config(tmp_path)), "--bootstrap", "--path-config", str(tmp_path))
    validate(split(text, tmp_path))
    assert "sds.sock" not in text


def test_the_parts_to_paste_are_those_of_the_whole(tmp_path: Path) -> None:
    file = config(tmp_path)
    parts = list(json.loads(printed("web", "--config", str(file), "-o", "json")).values())
    whole = json.loads(printed("web", "--config", str(file), "--bootstrap", "-o", "json"))["static_resources"]
    cluster, downstream, upstream = parts
    assert cluster in whole["clusters"]
    assert downstream == whole["listeners"][0]["filter_chains"][0]["transport_socket"]
    assert upstream == next(each for each in whole["clusters"] if each["name"] == "peer")["transport_socket"]


async def test_two_envoys_speak_mutual_tls_and_a_third_identity_is_refused(tmp_path: Path) -> None:
    file = config(tmp_path)
    web = "spiffe://demo.example/web"
    with_peer = yaml.safe_load(printed("web", "--config", str(file), "--bootstrap", "--peer", web, "--post-quantum"))
    other = yaml.safe_load(printed("other", "--config", str(file), "--bootstrap", "--peer", web, "--post-quantum"))
    ports = {10443: free_port(), 10000: free_port()}
    others = {10443: ports[10443], 10000: free_port()}
    del other["static_resources"]["listeners"][0]  # it only calls
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(agent(file))
        await running.event("ready")
        for name, bootstrap, moved in (("web", with_peer, ports), ("other", other, others)):
            proxy = await stack.enter_async_context(started(command(tmp_path, name, bootstrap, moved)))
            await proxy.line("all dependencies initialized. starting workers")
        client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        good = await client.get(f"http://127.0.0.1:{ports[10000]}/")
        assert (good.status_code, good.text) == (200, "hello over mutual TLS\n")
        bad = await client.get(f"http://127.0.0.1:{others[10000]}/")
        assert bad.status_code == 503, "its identity is not the one that --peer names"


def command(folder: Path, name: str, bootstrap: dict[str, object], ports: dict[int, int]) -> list[str]:
    text = json.dumps({key: value for key, value in bootstrap.items() if key != "admin"})
    for shown, here in ports.items():
        text = text.replace(str(shown), str(here))
    (folder / f"{name}.json").write_text(text)
    return [BINARY, "-c", str(folder / f"{name}.json"), "--disable-hot-restart", "--concurrency", "1", "-l", "info"]


def free_port() -> int:

    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def test_what_cannot_be_built_is_said_in_one_line(tmp_path: Path) -> None:
    file = str(config(tmp_path))
    assert "no workload is named wbe; did you mean web?" in refused("wbe", "--config", file)
    assert "--peer: " in refused("web", "--config", file, "--peer", "demo.example/web")
    assert "add output: DIRECTORY" in refused("other", "--config", file, "--path-config", str(tmp_path))
