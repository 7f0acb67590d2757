"""What the documentation shows is what a reader types: configuration, commands, scripts and links have to work."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx
import pytest
import yaml
from fakes.ca_servers import TokenIssuer
from fakes.envoys import BINARY
from fakes.ports import reserved_port
from fakes.processes import Program, started

from sds_agent.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
TEXT = "\n".join(page.read_text() for page in PAGES)

YAML = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
CONFIGURATIONS = [example for example in YAML if re.search(r"^workloads:", example, re.MULTILINE)]
ENVOYS = [example for example in YAML if re.search(r"^static_resources:", example, re.MULTILINE)]
INDENTED = [textwrap.dedent(block) for block in re.findall(r"^\n((?:    .*\n)+)", TEXT, re.MULTILINE)]
CA_CONFIGURATIONS = [example for example in INDENTED if re.search(r"^(signer|callers):", example, re.MULTILINE)]
LEAST_CA = "trust_domain: cluster.local\nlisten: 127.0.0.1:0\nsigner: {self_signed: root}\n"

# indented lines and `code` in the text
CODE = "\n".join(re.findall(r"^    .*$|`[^`\n]+`", TEXT, re.MULTILINE))
COMMANDS = sorted(set(re.findall(r"\bsds-agent ([a-z][a-z-]+)(?=[ `\n]|$)", CODE, re.MULTILINE)))
SCRIPTS = sorted(set(re.findall(r"(?<![\w/])(scripts/[\w-]+)(?![\w/])", CODE)))
LINKS = [
    (page.relative_to(ROOT), link)
    for page in PAGES
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
]


def sds_agent(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", "sds_agent", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_there_is_something_to_check() -> None:
    assert len(CONFIGURATIONS) > 3
    assert len(CA_CONFIGURATIONS) > 1
    assert len(CONFIGURATIONS) + len(ENVOYS) == len(YAML)
    assert COMMANDS
    assert SCRIPTS
    assert LINKS


# Commands, one after another until one fails: importing what they need takes longer than most of what they do.
COMMANDS_IN_TURN = """
import json, os, sys
from sds_agent.cli.main import main
unneeded, *before, last = map(json.loads, sys.argv[1:])
{prepared}
for each in before:
    child = os.fork()
    if not child:
        sys.exit(main(each))
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(code)
sys.exit(main(last))
"""
# As a user that is not root, who may not be let into root's Python: what they import is imported before.
AS_ANOTHER = """
import pkgutil
import anyio._backends._asyncio, concurrent.futures.thread, encodings.idna, jwt, httpx, sds_agent
for each in pkgutil.walk_packages(sds_agent.__path__, "sds_agent."):
    if not each.name.endswith(tuple(unneeded)):
        __import__(each.name)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
"""
USERS = ["root", "another"] if os.geteuid() == 0 else ["another"]


class Machine:
    """A machine in a directory: what an example names in /etc, /run and /var is there, as its page says."""

    def __init__(self, folder: Path, user: str) -> None:
        self.folder = folder
        self._user = user
        self._unneeded = ["__main__", "envoy_config.messages"]  # Envoy's types take longer than all the rest

    def place(self, path: str) -> Path:
        """Where that is here."""
        return self.folder / path.removeprefix("/")

    def write(self, name: str, example: str) -> Path:
        """The example as a file; only its places are moved, and a port that may be taken is left to the kernel."""
        if "telemetry:" not in example:
            self._unneeded.append("admin.otel")
        text = re.sub(r"(?<![\w:/.])/(?=(etc|run|var)/)", f"{self.folder}/", example).replace(
            "listen: 127.0.0.1:15012", "listen: 127.0.0.1:0"
        )
        file = self.folder / name
        file.write_text(text if os.geteuid() == 0 else re.sub(r'(owner|group): "0"', "", text))
        for path in re.findall(r"passphrase_file: (\S+)", text):
            self._passphrase = Path(path)
        for path in re.findall(r"(?:cacerts:|type: cacerts,?\s+directory:) (/[^\s,}]+)", text):
            self._plug(Path(path), re.findall(r"^trust_domain: (.*)", text, re.MULTILINE)[0])
        for path in re.findall(r" key_file: (/\S+/state\.key)", text):
            self._make_state_key(Path(path))
        for credential in re.findall(r"credential: (\S+)", text):
            self._make_state_key(self.folder / "credentials" / credential)
        for path in re.findall(r"jwks: (/[^\s,}]+)", text):
            Path(path).write_bytes(TokenIssuer().key_set())
        if self._user == "another" and os.geteuid() == 0:
            for each in [self.folder, *self.folder.rglob("*")]:
                os.chown(each, 65534, 65534)
        return file

    @staticmethod
    def _make_state_key(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(32))
        path.chmod(0o400)

    def _plug(self, directory: Path, trust_domain: str) -> None:
        """A CA, made as docs/hierarchy.md says."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        root = self.folder / "root"
        assert main(["ca", "root", str(root), "--trust-domain", trust_domain]) == 0
        more = []
        if self._passphrase is not None:
            self._passphrase.write_text("a long passphrase\n")
            more = ["--passphrase-file", str(self._passphrase)]
        assert main(["ca", "intermediate", str(directory), "--root", str(root), "--name", "cluster1", *more]) == 0

    _passphrase: Path | None = None

    def command(self, *commands: list[str]) -> list[str]:
        """One that runs these, in turn."""
        another = self._user == "another" and os.geteuid() == 0
        program = COMMANDS_IN_TURN.format(prepared=AS_ANOTHER if another else "")
        return [sys.executable, "-P", "-c", program, *map(json.dumps, [self._unneeded, *commands])]

    def foreign(self, file: Path) -> bool:
        """Whether what that file names is root's, and the user another."""
        return self._user == "another" and 'owner: "0"' in file.read_text()

    @property
    def environment(self) -> dict[str, str]:
        """A home of the user's own; root's places, which are the machine's, are moved by variables."""
        home = {"HOME": str(self.folder), "XDG_RUNTIME_DIR": str(self.folder), "XDG_STATE_HOME": str(self.folder)}
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "GRPC_VERBOSITY": "NONE"}
        return path | home | {"CREDENTIALS_DIRECTORY": str(self.folder / "credentials")}


@pytest.fixture(params=USERS)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A short path: sockets are made in it."""
    with tempfile.TemporaryDirectory(prefix="d") as folder:
        yield Machine(Path(folder), request.param)


IN_PROCESS = {"embedded", "cacerts"}
"""The kinds of CA that an example brings along. With another the agent waits for a server, or for files."""
AGENTS = [*CONFIGURATIONS, (ROOT / "envoy" / "agent.yaml").read_text()]


def places(example: str, machine: Machine) -> dict[str, str]:
    """What moves the places that the example leaves to the agent."""
    chosen = {"SDS_AGENT__SDS__SOCKET": "sds.sock", "SDS_AGENT__STATE_DIR": "state"}
    left_out = [name for name in chosen if f"{name.rpartition('__')[2].lower()}:" not in example]
    return {name: str(machine.folder / chosen[name]) for name in left_out}


def signs_by_itself(example: str) -> bool:
    """Whether all certificates of the example's workloads come from CAs inside the agent."""
    file = yaml.safe_load(example)
    authorities = file.get("authorities", {"local": {"type": "embedded"}})
    chosen = [each.get("authority", next(iter(authorities))) for each in file["workloads"]]
    used = [name for names in chosen for name in ([names] if isinstance(names, str) else names)]
    return all(authorities[name]["type"] in {"embedded", "cacerts"} for name in used)


@pytest.mark.parametrize("example", AGENTS)
async def test_an_agent_starts_with_the_configurations_shown(example: str, machine: Machine) -> None:
    """As they stand: what a newcomer pastes first must not end with a word about their machine."""
    file = machine.write("sds-agent.yaml", example)
    environment = machine.environment | places(example, machine)
    async with started(machine.command(["check", str(file)], ["run", str(file)]), environment) as agent:
        if machine.foreign(file):  # every key is in that one, and none but root gives a socket to root
            await agent.line("sds.owner: only root")
            assert await agent.process.wait() == 3
            return
        await agent.line('"listening"')
        if signs_by_itself(example):  # the others wait for a CA that is not here
            await agent.line('"ready"')
        assert await agent.stop() == 0


@pytest.mark.parametrize("example", CA_CONFIGURATIONS)
async def test_a_ca_starts_with_the_configurations_shown(example: str, machine: Machine) -> None:
    whole = "signer:" in example
    rest = LEAST_CA + example.replace("callers:\n", "callers:\n  join_tokens: tokens\n")
    file = machine.write("ca.yaml", example if whole else rest)
    async with started(machine.command(["ca", "serve", str(file)]), machine.environment) as ca:
        await ca.line('"listening"')
        if whole:
            command = machine.command(["ca", "token", str(file), "spiffe://cluster.local/vm/db1", "--ttl", "10m"])
            token = await anyio.run_process(command, env=machine.environment)
            assert token.stdout
        assert await ca.stop() == 0


async def workers_started(proxy: Program, client: httpx.AsyncClient) -> None:
    """Wait until that Envoy's listeners are open."""
    admin = (await proxy.line("admin address: ")).rpartition(" ")[2]
    shown = ""
    with anyio.fail_after(30):
        while "workers_started: 1" not in shown:
            shown = (await client.get(f"http://{admin}/stats?filter=workers_started")).text


async def test_the_envoy_of_the_readme_answers_over_mutual_tls_and_finds_a_restarted_agent(tmp_path: Path) -> None:
    """The README's own text on both sides; only the ports, which may be taken, and the socket's place are others."""
    (text,) = ENVOYS
    ours = tmp_path / "sds-agent.yaml"
    ours.write_text(next(each for each in CONFIGURATIONS if each in (ROOT / "README.md").read_text()))
    places = {"SDS_AGENT__SDS__SOCKET": str(tmp_path / "sds.sock"), "SDS_AGENT__STATE_DIR": str(tmp_path / "state")}
    run = [sys.executable, "-m", "sds_agent", "run", str(ours), "--log-format", "json"]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **places}
    with reserved_port() as inbound, reserved_port() as outbound:
        moved = {
            "9901": "0",
            "10443": str(inbound),
            "10000": str(outbound),
            "/run/sds-agent/sds.sock": f"{tmp_path}/sds.sock",
        }
        for shown, here in moved.items():
            assert shown in text
            text = text.replace(shown, here)
        theirs = tmp_path / "envoy.yaml"
        theirs.write_text(text)
        command = [BINARY, "-c", str(theirs), "--disable-hot-restart", "--concurrency", "1", "-l", "info"]
        async with started(command) as proxy, httpx.AsyncClient(trust_env=False) as client:
            for _ in range(2):  # Envoy is there first, then it has to reconnect
                async with started(run, environment) as agent:
                    await agent.line('"envoy_served"')
                    await workers_started(proxy, client)
                    answer = await client.get(f"http://127.0.0.1:{outbound}/")
                    assert (answer.status_code, answer.text) == (200, "hello over mutual TLS\n")
                    assert await agent.stop() == 0
            assert not [line for line in proxy.lines if "deprecated" in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_shown_exist(command: str) -> None:
    done = sds_agent(command, "--help")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_shown_exist(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_is_asked_for_help_explains_itself_and_does_nothing_else(script: str) -> None:
    """`scripts/demo` hands its arguments to demo_app, behind the environment that it makes first."""
    command = {
        "scripts/demo": [sys.executable, "-m", "demo_app"],
        "scripts/gen-man": [sys.executable, str(ROOT / script)],
        "scripts/gen-schema": [sys.executable, str(ROOT / script)],
    }.get(script, [str(ROOT / script)])
    path = os.pathsep.join([str(ROOT / "scripts"), *filter(None, sys.path)])
    environment = os.environ | {"PATH": "/usr/bin:/bin", "PYTHONPATH": path}
    done = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    head = re.findall(r"\A#!.*\n((?:#.*\n)+)", (ROOT / script).read_text())
    if head and script != "scripts/demo":
        assert done.stdout == re.sub(r"^# ?", "", head[0], flags=re.MULTILINE)
    assert Path(script).name in done.stdout


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"scripts/demo", "scripts/gen-man", "scripts/gen-schema"}))
def test_a_script_refuses_an_argument_that_it_does_not_know(script: str) -> None:
    done = subprocess.run([ROOT / script, "--hepl"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{script} does not know '--hepl'" in done.stderr


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_the_links_lead_somewhere(page: Path, link: str) -> None:
    file, _, section = link.partition("#")
    target = ROOT / page.parent / file if file else ROOT / page
    assert target.exists()
    assert not section or section in sections(target.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_file_that_a_page_shows_is_not_shown_as_text_of_the_list_before_it(page: Path) -> None:
    """Markdown takes four spaces after an item for a paragraph of that item, and a comment in it for a heading."""
    assert re.findall(r"^(?:-|\d+\.) .*\n(?: +\S.*\n)*\n {4,5}\S.*", page.read_text(), re.MULTILINE) == []


def sections(page: str) -> set[str]:
    """The names by which GitHub lets one link to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def test_the_layout_that_contributors_read_names_every_part_of_the_program() -> None:
    layout = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layout")[2].partition("## ")[0]
    parts = {each.stem for each in (ROOT / "src" / "sds_agent").iterdir() if not each.name.startswith(("__", "py."))}
    assert parts <= set(re.findall(r"\w+", layout))


def events() -> set[str]:
    """The names of the events that the program logs, as far as they stand in its calls."""
    found = set[str]()
    for path in (ROOT / "src" / "sds_agent").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and re.search(
                r"\b(log\.event|LogOnChange|_event|_detail|_say|_debug|_log|Events)$", ast.unparse(call.func)
            ):
                given = [*call.args[:2], *(each.value for each in call.keywords if each.arg in {"refused", "unread"})]
                found |= {str(each.value) for each in given if isinstance(each, ast.Constant)}
    return found


def test_every_event_that_can_be_logged_is_explained() -> None:
    """Who finds one in a log looks for it in the pages, and the changelog explains nothing."""
    pages = "\n".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    logged = events()
    assert {"retrying", "ca_refused", "output_lost", "still_stopping", "acked"} <= logged
    assert sorted(event for event in logged if f"`{event}`" not in pages) == []


OTHERS_NAMES = {
    "channel_args",
    "days_until_expiration",
    "demo_x",
    "depends_on",
    "downstream_context_secrets_not_ready",
    "group_add",
    "host_volume",
    "update_failure",
    "update_success",
    "upstream_cx_connect_fail",
}
"""Names in the pages that are Envoy's, Docker's, Nomad's or an example's."""
PROCESS_METRICS = set(re.findall(r"`(process_[a-z_]+)`", TEXT))
"""prometheus_client's names, which test_observability.py holds to what it measures."""
NAMES = sorted(set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", TEXT)) - OTHERS_NAMES - PROCESS_METRICS)


@pytest.fixture(scope="module")
def words() -> set[str]:
    """All that the names of keys, events and files can come from."""
    folders = [ROOT / "src" / "sds_agent", ROOT / "envoy"]
    files = [path for each in folders for path in each.rglob("*.[pyj]*") if path.suffix != ".pyc"]
    return {word for file in files for word in re.findall(r"\w+", file.read_text())}


@pytest.mark.parametrize("name", NAMES)
def test_the_keys_and_log_events_that_the_pages_name_exist(name: str, words: set[str]) -> None:
    """A reader searches a log, or writes a file, by that name."""
    assert name in words
