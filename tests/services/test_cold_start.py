"""What an agent imports and opens before it has let Envoys in: each module and file costs every Envoy of the
machine that waits for it. Counted, and not timed: the figures are those of benchmarks/cold.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from msgspec import Struct

from sds_agent.deferral import EXPRESSIONS, UNUSED

RUN = """
import json, sys
from fakes.expressions import compiled_for
before, opened = set(sys.modules), []

def note(event, arguments):
    if event == "open":
        opened.append(str(arguments[0]))
    elif event == "import" and arguments[0] == "sds_agent.issuance.expiry":  # the first of what is not urgent
        found = {name: type(module).__name__ for name, module in sys.modules.items() if name not in before}
        print(json.dumps({"modules": found, "opened": opened, "expressions": sorted(expressions)}), flush=True)

expressions = compiled_for()
sys.addaudithook(note)
from sds_agent.cli.main import main
sys.exit(main(sys.argv[1:]))
"""

CONFIG = """\
trust_domain: demo.example
state_dir: {0}/state
sds: {{socket: {0}/sds.sock}}
workloads: [{{name: default, spiffe_id: spiffe://demo.example/default}}]
"""


class Start(Struct):
    """An agent's start, until it does what is not urgent: the modules, with the names of their classes, the files that
    were opened, and the modules that had a regular expression compiled.
    """

    modules: dict[str, str]
    opened: list[str]
    expressions: list[str]

    def of(self, package: str) -> set[str]:
        """The modules of a package."""
        return {name for name in self.modules if name.split(".", maxsplit=1)[0] == package}

    @property
    def data(self) -> list[str]:
        """The files that hold no code."""
        return [name for name in self.opened if not name.endswith((".pyc", ".py", ".so"))]


def started(folder: Path) -> Start:
    """A start on the state that is there."""
    file = folder / "sds-agent.yaml"
    file.write_text(CONFIG.format(folder))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SDS_AGENT", "COV"))}
    with subprocess.Popen(
        [sys.executable, "-c", RUN, "run", str(file)],
        env=environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as agent:
        assert agent.stdout is not None
        assert agent.stderr is not None
        found = agent.stdout.readline()
        said = next(line for line in agent.stderr if '"ready"' in line)  # the certificate is there, and is kept
        agent.terminate()
    assert said
    assert agent.returncode == 0
    return msgspec.convert(json.loads(found), Start)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Start, Start]:
    """The first start ever, which makes a root and a certificate, and one from the state that it kept."""
    folder = tmp_path_factory.mktemp("cold")
    return started(folder), started(folder)


UNNEEDED = {
    "argparse": "the usual calls are read without it",
    "ctypes": "its core is enough: `libc`",
    "gettext": "argparse's",
    "pickle": "protobuf's in pure Python",
    "shutil": "argparse's, for the width of the terminal",
    "_hashlib": "OpenSSL a second time",
    "_ssl": "OpenSSL a second time",
    "google.protobuf.text_format": "protobuf's in pure Python",
    "sds_agent.admin.server": "starts later",
    "sds_agent.admin.application": "starts with the first request",
    "sds_agent.cli.next_steps": "for a terminal",
    "sds_agent.cli.parser": "the usual calls are read without it",
    "sds_agent.issuance.expiry": "warns later",
    "sds_agent.issuance.lists": "no revocation lists are configured",
    "sds_agent.live.reload": "starts later",
    "sds_agent.once": "of another command",
    "sds_agent.pki.csr": "the CA is in this process",
    "sds_agent.outputs.directory": "no outputs are configured",
    "sds_agent.sds.delta": "no Envoy has asked yet",
    "sds_agent.sds.fetch": "likewise",
    "sds_agent.sds.file_secrets": "no files are configured",
    "sds_agent_proto.health_pb2": "no prober has asked yet",
}


@pytest.mark.parametrize("module", UNNEEDED)
def test_no_envoy_waits_for_what_the_first_secret_does_not_need(module: str, starts: tuple[Start, Start]) -> None:
    for start in starts:
        assert "sds_agent.app" in start.modules
        assert module not in start.modules, UNNEEDED[module]


UNTIL_3_12 = {"email.base64mime", "email.errors", "email.quoprimime", "linecache", "platform"}
"""From 3.13 on Python itself imports these once they are used."""


@pytest.mark.parametrize("module", sorted(UNUSED))
def test_what_is_imported_in_vain_stays_unloaded(module: str, starts: tuple[Start, Start]) -> None:
    for start in starts:
        assert module in start.modules.keys() | UNTIL_3_12
        assert start.modules.get(module, "_Unloaded") == "_Unloaded"


def test_no_expression_is_compiled_in_vain(starts: tuple[Start, Start]) -> None:
    for start in starts:
        assert start.modules.keys() | UNTIL_3_12 >= EXPRESSIONS
        used = EXPRESSIONS & set(start.expressions)
        assert used <= {"logging", "yaml.resolver"}  # of which some are used: a plain word may be a boolean
        ours = {name for name in start.expressions if name.startswith("sds_agent")}
        assert ours <= {"sds_agent.admin.settings", "sds_agent.configfile.types", "sds_agent.pki.pem"}


def test_only_the_configured_kind_of_ca_is_imported(starts: tuple[Start, Start]) -> None:
    shared = {"embedded", "in_process", "kind", "protocol", "registry"}
    for start in starts:
        kinds = {name.split(".")[2] for name in start.of("sds_agent") if name.startswith("sds_agent.authority.")}
        assert kinds == shared


MOST_OWN = 136
"""Modules of ours. Each takes 50 microseconds to find and read beside what its code does: 0.14 ms in the middle."""
MOST = 400
"""Modules in all, on every version of Python."""
MOST_FILES = (26, 13)
"""Files without code, on the first start and on later ones: the configuration, the state, the socket's lock. Each is a
wait for a disk. The first start writes some of them beside the way to the first secret, so their number varies.
"""


def test_the_modules_before_the_first_secret_do_not_grow(starts: tuple[Start, Start]) -> None:
    """Who adds one asks whether the first secret needs it. The number is for lowering."""
    for start in starts:
        assert len(start.of("sds_agent")) <= MOST_OWN
        assert len(start.modules) <= MOST


def test_the_libraries_before_the_first_secret_are_few(starts: tuple[Start, Start]) -> None:
    known = {
        "_cffi_backend",
        "cryptography",
        "google",
        "grpc",
        "grpc_tools",  # which grpc looks for
        "msgspec",
        "sds_agent",
        "sds_agent_proto",
        "typing_extensions",
        "yaml",
    }
    for start in starts:
        libraries = {name.split(".", maxsplit=1)[0] for name in start.modules} - sys.stdlib_module_names
        assert {name for name in libraries if not name.startswith(("_cython", "cython", "_openssl"))} <= known


def test_the_files_before_the_first_secret_do_not_grow(starts: tuple[Start, Start]) -> None:
    for start, most in zip(starts, MOST_FILES, strict=True):
        assert len(start.data) <= most, start.data
