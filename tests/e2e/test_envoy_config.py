"""`sds-agent envoy-config`: a real Envoy takes every variant, and two of them speak mutual TLS with nobody else."""

import io
import itertools
import json
import re
import subprocess
from contextlib import AsyncExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import yaml
from fakes.agents import agent
from fakes.envoys import BINARY, Envoy
from fakes.ports import reserved_port
from fakes.processes import started

from sds_agent.cli.main import main

ROOT = Path(__file__).parents[2]
OPTIONS = ("--delta", "--post-quantum", "--no-resumption", "--tls13", "--peer=spiffe://demo.example/peer")


def config(folder: Path, layout: str = "istio", ttl: str = "24h") -> Path:
    file = folder / "sds-agent.yaml"
    files = {"directory": str(folder / "files"), "layout": layout}
    workloads = [
        {"name": "web", "spiffe_id": "spiffe://demo.example/web", "output": files, "ttl": ttl},
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
    bootstrap, *files = text.split("---\n")
    for each in files:
        heading, _, content = each.partition("\n")
        Path(heading.removeprefix("# ")).write_text(content)
    (folder / "envoy.yaml").write_text(bootstrap)
    return folder / "envoy.yaml"


@pytest.mark.parametrize("options", [(), OPTIONS])
def test_envoy_takes_what_is_printed_as_it_stands(tmp_path: Path, options: tuple[str, ...]) -> None:
    file = config(tmp_path)
    envoys = tmp_path / "envoy.yaml"
    envoys.write_text(printed("web", "--config", str(file), "--bootstrap", *options))
    validate(envoys)
    as_json = json.loads(printed("web", "--config", str(file), "--bootstrap", "-o", "json", *options))
    assert as_json == yaml.safe_load(envoys.read_text())


def test_envoy_takes_every_combination_of_options(tmp_path: Path) -> None:
    """All but --peer, which changes nothing else, in one Envoy with a listener and a cluster for each: a process takes
    longer than they do.
    """
    file = str(config(tmp_path))
    listeners: list[Any] = []
    clusters: list[Any] = []
    for number, options in enumerate(itertools.product(*(("", each) for each in OPTIONS[:-1]))):
        made = json.loads(printed("web", "--config", file, "--bootstrap", "-o", "json", *filter(None, options)))
        inbound, (peer, agents) = made["static_resources"]["listeners"][0], made["static_resources"]["clusters"]
        inbound["address"]["socket_address"]["port_value"] += number
        listeners.append(inbound | {"name": f"inbound-{number}"})
        clusters = [agents, *clusters[1:], peer | {"name": f"peer-{number}"}]
    assert len(listeners) == 16
    resources = {"listeners": listeners, "clusters": clusters}
    whole = tmp_path / "envoy.json"
    whole.write_text(json.dumps({"node": {"id": "web-1", "cluster": "web"}, "static_resources": resources}))
    validate(whole)


def test_envoy_takes_the_variant_without_the_agent(tmp_path: Path) -> None:
    options = ["--path-config", str(tmp_path), *OPTIONS[1:]]
    text = printed("web", "--config", str(config(tmp_path)), "--bootstrap", *options)
    validate(split(text, tmp_path))
    assert "sds.sock" not in text


async def test_an_envoy_that_reads_the_files_itself_loads_the_renewed_certificate(tmp_path: Path) -> None:
    file = config(tmp_path, layout="kubernetes", ttl="5s")
    text = printed("web", "--config", str(file), "--bootstrap", "--path-config", str(tmp_path))
    bootstrap = yaml.safe_load(split(text, tmp_path).read_text())
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(agent(file))
        await running.event("output_written")
        ports = {shown: stack.enter_context(reserved_port()) for shown in (10443, 10000)}
        proxy = Envoy(
            await stack.enter_async_context(started(command(tmp_path, "web", bootstrap, ports))), tmp_path / "web.admin"
        )
        await proxy.ready()
        client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        seen = set[str]()
        with anyio.fail_after(30):
            while len(seen) < 2:
                await running.event("output_written", count=len(running.events("output_written")) + 1)
                assert (await client.get(f"http://127.0.0.1:{ports[10000]}/")).status_code == 200
                seen |= {found["serial_number"] for found in loaded(await proxy.admin("/certs"))}
        events = [each for name in ("issued", "renewed") for each in running.events(name, workload="web")]
        assert {int(serial, 16) for serial in seen} <= {int(each["serial"], 16) for each in events}


def loaded(certs: Any) -> list[dict[str, str]]:
    """The leaves that an Envoy has loaded."""
    return [found for each in certs["certificates"] for found in each["cert_chain"]]


def test_without_a_peer_the_configuration_says_whom_it_accepts(tmp_path: Path) -> None:
    file = str(config(tmp_path))
    said = "# This accepts every workload of the trust domain; `--peer SPIFFE-ID` names those you expect."
    anyone = printed("web", "--config", file).splitlines()
    here = anyone.index(next(line for line in anyone if line.strip() == said))
    assert anyone[here + 1].strip() == 'prefix: "spiffe://demo.example/"'
    peers = ("spiffe://demo.example/a", "spiffe://demo.example/b")
    alone = printed("web", "--config", file, *(f"--peer={each}" for each in peers))
    assert said not in alone
    _, downstream, upstream = yaml.safe_load_all(alone)
    for part in (downstream, upstream):
        assert part["typed_config"]["common_tls_context"]["combined_validation_context"][
            "default_validation_context"
        ] == {"match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": each}} for each in peers]}


def test_sessions_can_be_kept_from_resuming_in_both_directions(tmp_path: Path) -> None:
    _, downstream, upstream = yaml.safe_load_all(printed("web", "--config", str(config(tmp_path)), "--no-resumption"))
    assert downstream["typed_config"]["disable_stateless_session_resumption"] is True
    assert downstream["typed_config"]["disable_stateful_session_resumption"] is True
    assert upstream["typed_config"]["max_session_keys"] == 0


def plain(value: Any) -> Any:
    """Without what is said in another way: a cluster is STATIC unless it says otherwise, and 0.1s are 0.100s."""
    match value:
        case dict():
            return {k: plain(v) for k, v in value.items() if (k, v) != ("type", "STATIC")}
        case list():
            return [plain(each) for each in value]
        case str() if re.fullmatch(r"[0-9.]+s", value):
            return float(value[:-1])
        case _:
            return value


def test_the_file_of_the_readme_is_what_the_command_prints(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shown = next(each for each in examples if each.startswith("# envoy.yaml"))
    ours = tmp_path / "sds-agent.yaml"
    ours.write_text(next(each for each in examples if each.startswith("trust_domain: ")))
    options = ["--peer", "spiffe://demo.example/ns/default/sa/web", "--socket", "/run/sds-agent/sds.sock"]
    made = printed("web", "--config", str(ours), "--bootstrap", *options)
    assert plain(yaml.safe_load(shown)) == plain(yaml.safe_load(made))


def test_the_files_to_copy_have_what_the_command_prints() -> None:
    ours = str(ROOT / "envoy" / "agent.yaml")
    identity = "spiffe://demo.example/ns/default/sa"
    a, b = (
        yaml.safe_load((ROOT / "envoy" / name).read_text())["static_resources"]
        for name in ("client.yaml", "server.yaml")
    )
    cluster, _, upstream = yaml.safe_load_all(printed("web", "--config", ours, "--peer", f"{identity}/backend"))
    _, downstream, _ = yaml.safe_load_all(printed("backend", "--config", ours, "--peer", f"{identity}/web"))
    for file in (a, b):
        assert plain(cluster) in plain(file["clusters"])
    assert plain(a["clusters"][0]["transport_socket"]) == plain(upstream)
    assert plain(b["listeners"][0]["filter_chains"][0]["transport_socket"]) == plain(downstream)


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
    del other["static_resources"]["listeners"][0]  # it only calls
    async with AsyncExitStack() as stack:
        ports = {shown: stack.enter_context(reserved_port()) for shown in (10443, 10000)}
        others = {10443: ports[10443], 10000: stack.enter_context(reserved_port())}
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
    text = json.dumps(bootstrap | {"admin": {"address": {"pipe": {"path": str(folder / f"{name}.admin")}}}})
    for shown, here in ports.items():
        text = text.replace(str(shown), str(here))
    (folder / f"{name}.json").write_text(text)
    return [BINARY, "-c", str(folder / f"{name}.json"), "--disable-hot-restart", "--concurrency", "1", "-l", "info"]


def test_what_cannot_be_built_is_said_in_one_line(tmp_path: Path) -> None:
    file = str(config(tmp_path))
    assert "no workload is named wbe; did you mean web?" in refused("wbe", "--config", file)
    assert "--peer: " in refused("web", "--config", file, "--peer", "demo.example/web")
    assert "add output: DIRECTORY" in refused("other", "--config", file, "--path-config", str(tmp_path))
    assert "leave out --delta" in refused("web", "--config", file, "--path-config", str(tmp_path), "--delta")
    one_file = str(config(tmp_path, layout="spiffe"))
    assert "key and chain in one file" in refused("web", "--config", one_file, "--path-config", str(tmp_path))
