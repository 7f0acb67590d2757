"""The import directions in CONTRIBUTING.md: these tests read every import, those inside functions too."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src"
ROOT = "sds_agent"

BASE = {"errors", "budget", "clock", "digest", "log", "tasks", "text", "values"}
MATERIAL = BASE | {"identity", "pki"}

# What each part of sds_agent may import of the others; "pki.keys" means that module and no other of its
# package. A new part is a new line, below what it uses and above what uses it. BASE and MATERIAL are open to
# whole groups of parts; all else is in a line only while the part imports it.
MAY_IMPORT = {
    "errors": set[str](),
    "libc": set[str](),
    "hardening": {"libc"},
    "budget": set[str](),
    "clock": set[str](),
    "deferral": set[str](),
    "digest": set[str](),
    "pipes": set[str](),
    "memory": {"libc"},
    "text": set[str](),
    "tally": set[str](),
    "log": {"errors", "pipes", "text"},
    "tasks": {"errors"},
    "values": set[str](),
    "files": BASE,
    "descriptors": BASE,
    "accounts": BASE,
    "directories": BASE | {"files"},
    "ownfile": BASE | {"files", "directories"},
    "sealing": BASE | {"files"},
    "statefile": BASE | {"files", "ownfile", "sealing"},
    "state": BASE | {"directories"},
    "sources": BASE | {"directories"},
    "signals": BASE,
    "systemd": BASE,
    "units": set[str](),
    "named_files": BASE | {"files", "pki"},
    "file_sets": set[str](),
    "path_watch": {"libc", "log", "clock"},
    "identity": BASE,
    "pki": BASE,
    "rpc": BASE,
    "configfile": BASE | {"files", "identity"},
    "config": BASE | {"identity", "pki.keys", "configfile", "authority.kind", "authority.registry", "admin.settings"},
    "secrets": MATERIAL,
    "signing": MATERIAL | {"files", "directories", "ownfile"},
    # Each kind of CA is imported by its name in `authority.registry`, so no other part can depend on one.
    "authority": MATERIAL | {"named_files", "signing", "configfile", "files", "directories", "file_sets", "path_watch"},
    "sds": MATERIAL
    | {
        "tally",
        "memory",
        "accounts",
        "descriptors",
        "files",
        "directories",
        "rpc",
        "secrets",
        "file_sets",
        "path_watch",
    },
    "outputs": MATERIAL | {"accounts", "files", "directories", "secrets"},
    "issuance": MATERIAL | {"tally", "files", "directories", "sealing", "statefile", "secrets", "authority.protocol"},
    # The configurations read its settings. What it shows it gets as values.
    "admin": BASE
    | {
        "tally",
        "authority.protocol",
        "configfile",
        "descriptors",
        "files",
        "issuance.attempts",
        "issuance.counts",
        "issuance.expiry",
        "issuance.status",
        "sds.counts",
        "sds.departed",
        "sds.endpoint",
        "sds.status",
    },
    "ca": MATERIAL
    | {
        "admin.application",
        "admin.asgi",
        "admin.exposition",
        "admin.families",
        "admin.server",
        "admin.settings",
        "pipes",
        "descriptors",
        "files",
        "directories",
        "state",
        "sources",
        "named_files",
        "rpc",
        "configfile",
        "signing",
        "signals",
        "tally",
    },
    "inspection": MATERIAL,
    "envoy_config": set[str](),
    "doctor": {"admin.model", "configfile", "inspection.web"},
    # for authors of adapters: nothing of the agent imports it
    "conformance": MATERIAL
    | {"signing", "authority.kind", "authority.protocol", "authority.registry", "issuance.acceptance"},
    "preflight": BASE
    | {
        "admin.server",
        "directories",
        "sealing",
        "sources",
        "config",
        "authority.credentials",
        "authority.kind",
        "authority.protocol",
        "authority.registry",
        "sds.endpoint",
        "sds.permissions",
        "outputs.directory",
    },
    "supervision": BASE | {"systemd", "secrets"},
    "live": MATERIAL
    | {
        "supervision",
        "admin.observed",
        "authority.kind",
        "authority.protocol",
        "authority.registry",
        "config",
        "issuance",
        "outputs",
        "sds.counts",
        "sds.departed",
        "sds.permissions",
        "sds.service",
        "sds.status",
        "secrets",
        "state",
        "preflight",
        "files",
        "file_sets",
        "path_watch",
        "sources",
    },
    "app": MATERIAL
    | {
        "supervision",
        "systemd",
        "admin",
        "config",
        "directories",
        "issuance",
        "live",
        "preflight",
        "rpc",
        "sds",
        "sealing",
        "secrets",
        "signals",
        "sources",
        "state",
    },
    "once": MATERIAL
    | {
        "app",
        "live.assembly",
        "authority.kind",
        "authority.protocol",
        "authority.registry",
        "config",
        "configfile",
        "directories",
        "files",
        "issuance",
        "outputs",
        "preflight",
        "secrets",
    },
    "probe": MATERIAL
    | {
        "app",
        "live.assembly",
        "authority.protocol",
        "authority.registry",
        "config",
        "configfile",
        "issuance",
        "once",
        "preflight",
        "secrets",
    },
    "cli": MATERIAL
    | {
        "admin.model",
        "admin.reasons",
        "admin.settings",
        "inspection",
        "envoy_config",
        "doctor",
        "app",
        "authority.registry",
        "ca",
        "config",
        "configfile",
        "deferral",
        "directories",
        "files",
        "hardening",
        "issuance.schedule",
        "live.origin",
        "once",
        "outputs.layout",
        "preflight",
        "probe",
        "rpc",
        "signals",
        "signing",
        "sources",
        "units",
    },
    "__main__": {"cli"},
}

# Libraries that belong to some parts only. The wire schema is SDS's: what others know of a secret is a value.
BELONGS_TO = {
    "sds_agent_proto": {"rpc", "sds", "authority", "ca", "inspection"},
    "grpc": {"rpc", "sds", "authority", "ca", "inspection"},
    "httpx": {"authority", "ca", "cli", "doctor", "inspection"},
    "yaml": {"configfile", "cli"},
    "argparse": {"cli"},
    "shtab": {"cli"},
    "starlette": {"admin", "ca"},
    "uvicorn": {"admin"},
    "prometheus_client": {"admin", "ca"},
    "opentelemetry": {"admin"},
}

# Decisions: neither a clock nor a socket nor an event loop, so that a test can put any question to them.
PURE = {
    "admin.agent_families",
    "admin.families",
    "admin.model",
    "admin.reasons",
    "admin.view",
    "authority.answers",
    "authority.cfssl.wire",
    "authority.est.wire",
    "authority.files.contents",
    "authority.grpc_retry",
    "authority.http_message",
    "authority.istio.wire",
    "authority.kubernetes.kubeconfig",
    "authority.kubernetes.trust_wire",
    "authority.kubernetes.wire",
    "authority.protocol",
    "authority.spiffe.wire",
    "authority.step_ca.jwk",
    "authority.step_ca.wire",
    "authority.vault.lease",
    "authority.vault.refusals",
    "authority.vault.wire",
    "budget",
    "ca.anchors",
    "ca.callers",
    "ca.counts",
    "ca.denied",
    "ca.families",
    "ca.lists",
    "ca.places",
    "ca.policy",
    "ca.refusal",
    "ca.status",
    "config.changes",
    "config.conflicts",
    "config.istio_environment",
    "configfile.durations",
    "configfile.phrases",
    "digest",
    "doctor.agents",
    "doctor.clocks",
    "doctor.diagnosis",
    "doctor.dumps",
    "doctor.envoy_ads",
    "doctor.envoy_versions",
    "doctor.envoys",
    "envoy_config.choices",
    "envoy_config.commented",
    "errors",
    "file_sets",
    "identity.spiffe",
    "inspection.istioctl",
    "inspection.secrets",
    "issuance.acceptance",
    "issuance.attempts",
    "issuance.counts",
    "issuance.failover",
    "issuance.lists",
    "issuance.schedule",
    "issuance.standing",
    "issuance.status",
    "issuance.validity",
    "issuance.workload",
    "live.file_turn",
    "outputs.layout",
    "pki",
    "rpc.crowd",
    "rpc.frames",
    "sds.catalog",
    "sds.codec",
    "sds.counts",
    "sds.delta",
    "sds.departed",
    "sds.fetch",
    "sds.file_names",
    "sds.protocol",
    "sds.pushes",
    "sds.sotw",
    "sds.status",
    "secrets.acknowledgements",
    "secrets.model",
    "signing.cacerts",
    "signing.description",
    "signing.istiod",
    "signing.reach",
    "signing.signer",
    "signing.template",
    "signing.signing_set",
    "tally",
    "text",
    "units",
    "values",
}
EFFECTS = {"anyio", "asyncio", "grpc", "random", "selectors", "socket", "subprocess", "threading", "time"}

# Each costs more than the whole way to the first secret, but for anyio, which costs a tenth of it.
OFF_THE_PATH = {
    "anyio",
    "starlette",
    "uvicorn",
    "h11",
    "prometheus_client",
    "opentelemetry",
    "envoy_data_plane",
    "betterproto2",
    "httpx",
    "jwt",
    "rich",
    "jsonschema",
}


def modules(sources: Path) -> dict[str, Path]:
    """Every module's file; the names are like `sds.sotw`, and `sds` for the package's own."""
    found = {}
    for path in sorted((sources / ROOT).rglob("*.py")):
        parts = path.relative_to(sources / ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


@cache
def told(path: Path) -> tuple[ast.Import | ast.ImportFrom | ast.ClassDef, ...]:
    """What the tests look at in a file, each file parsed once, as eight tests read them all."""
    kinds = ast.Import | ast.ImportFrom | ast.ClassDef
    return tuple(node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds))


def imported(path: Path, known: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The line and the dotted name of every import in a file; the module's name where `from` names one."""
    for node in told(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full.removeprefix(f"{ROOT}.") in known else str(node.module)


def edges(sources: Path) -> Iterator[tuple[str, str, str]]:
    """The place, the importing module and the dotted name imported, for every import of the package."""
    known = modules(sources)
    for name, path in known.items():
        for line, target in imported(path, known):
            yield f"{path.relative_to(sources)}:{line}", name, target


def within(name: str, parts: Iterable[str]) -> bool:
    """Whether a dotted name is one of `parts` or inside one of them."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def top(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def wrong_ways(sources: Path) -> list[str]:
    wrong = []
    for place, module, target in edges(sources):
        inside = target.removeprefix(f"{ROOT}.")
        allowed = MAY_IMPORT.get(top(module), set()) | {top(module)}
        if target.startswith(f"{ROOT}.") and not within(inside, allowed):
            wrong.append(f"{place}: {top(module)} may not import {target}")
    return wrong


def borrowed(sources: Path) -> list[str]:
    return [
        f"{place}: {target} belongs to {', '.join(sorted(BELONGS_TO[top(target)]))}"
        for place, module, target in edges(sources)
        if top(target) in BELONGS_TO and top(module) not in BELONGS_TO[top(target)]
    ]


def effects(sources: Path) -> list[str]:
    return [
        f"{place}: {module} decides and may not import {target}"
        for place, module, target in edges(sources)
        if within(module, PURE) and top(target) in EFFECTS
    ]


def unused_permissions(sources: Path) -> list[str]:
    """What MAY_IMPORT allows a part beyond MATERIAL, and no module of it imports."""
    used: dict[str, set[str]] = {}
    for _, module, target in edges(sources):
        used.setdefault(top(module), set()).add(target.removeprefix(f"{ROOT}."))
    return [
        f"{part} imports nothing of {allowed}"
        for part, permissions in MAY_IMPORT.items()
        for allowed in sorted(permissions - MATERIAL)
        if not any(within(target, {allowed}) for target in used.get(part, ()))
    ]


def namesakes(sources: Path) -> list[str]:
    """The names that more than one class has: a reader of one cannot tell which it is."""
    places: dict[str, list[str]] = {}
    for path in modules(sources).values():
        for node in told(path):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{path.relative_to(sources)}:{node.lineno}")
    return [f"{name}: {', '.join(found)}" for name, found in places.items() if len(found) > 1]


def mixed(sources: Path) -> list[str]:
    """Modules that speak two dialects of concurrency: a lock or a cancellation of one is not the other's."""
    found: dict[str, set[str]] = {}
    for _, module, target in edges(sources):
        found.setdefault(module, set()).add(top(target))
    return [module for module, targets in found.items() if {"asyncio", "anyio"} <= targets]


def cycle(sources: Path) -> list[str]:
    graph: dict[str, set[str]] = {name: set() for name in modules(sources)}
    for _, module, target in edges(sources):
        inside = target.removeprefix(f"{ROOT}.")
        if target.startswith(f"{ROOT}.") and inside in graph:
            graph[module].add(inside)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_run_one_way() -> None:
    assert wrong_ways(SOURCES) == []


def test_no_part_may_import_what_it_does_not() -> None:
    assert unused_permissions(SOURCES) == []


def test_a_name_means_one_class() -> None:
    assert namesakes(SOURCES) == []


def test_every_part_has_its_place_in_the_table() -> None:
    assert {top(name) for name in modules(SOURCES)} - {""} - set(MAY_IMPORT) == set()


def test_no_module_imports_itself_through_others() -> None:
    assert cycle(SOURCES) == []


def test_libraries_stay_with_the_parts_they_belong_to() -> None:
    assert borrowed(SOURCES) == []


def test_decisions_reach_for_no_clock_and_no_socket() -> None:
    assert effects(SOURCES) == []


def test_no_module_mixes_asyncio_and_anyio() -> None:
    assert mixed(SOURCES) == []


def test_serving_and_issuing_meet_only_in_what_is_served() -> None:
    assert not within("issuance", MAY_IMPORT["sds"])
    assert not within("sds", MAY_IMPORT["issuance"])


@pytest.mark.parametrize("module", ["sds_agent.app", "sds_agent.cli.main"])
def test_the_first_secret_does_not_wait_for_libraries_it_does_not_need(module: str) -> None:
    program = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {top(name) for name in json.loads(done.stdout)} & OFF_THE_PATH == set()


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_an_import_inside_a_function_is_seen(tmp_path: Path) -> None:
    inside = "def serve():\n    from sds_agent.issuance import loop\n"
    sources = tree(tmp_path, {"sds/server.py": inside, "issuance/__init__.py": "", "issuance/loop.py": ""})
    assert wrong_ways(sources) == ["sds_agent/sds/server.py:2: sds may not import sds_agent.issuance.loop"]


def test_a_cycle_is_seen(tmp_path: Path) -> None:
    sources = tree(tmp_path, {"a.py": "import sds_agent.b", "b.py": "from sds_agent import a", "__init__.py": ""})
    assert set(cycle(sources)) == {"a", "b"}


def test_a_mixture_of_asyncio_and_anyio_is_seen(tmp_path: Path) -> None:
    sources = tree(tmp_path, {"a.py": "import asyncio\nimport anyio.to_thread\n", "b.py": "import anyio\n"})
    assert mixed(sources) == ["a"]


def test_only_the_named_module_of_a_package_is_open(tmp_path: Path) -> None:
    files = {
        "config/settings.py": "from sds_agent.pki.keys import KeyType\nfrom sds_agent.pki import pem\n",
        "pki/keys.py": "",
        "pki/pem.py": "",
    }
    found = wrong_ways(tree(tmp_path, files))
    assert found == ["sds_agent/config/settings.py:2: config may not import sds_agent.pki.pem"]


def test_a_class_name_that_is_there_twice_is_seen(tmp_path: Path) -> None:
    sources = tree(tmp_path, {"a.py": "class Twice: ...\n", "b.py": "def one():\n    class Twice: ...\n"})
    assert namesakes(sources) == ["Twice: sds_agent/a.py:1, sds_agent/b.py:2"]


def test_a_permission_that_no_module_uses_is_seen(tmp_path: Path) -> None:
    sources = tree(tmp_path, {"state.py": "import sds_agent.log\n"})
    assert "state imports nothing of directories" in unused_permissions(sources)


def test_a_borrowed_library_and_an_effect_are_seen(tmp_path: Path) -> None:
    sources = tree(tmp_path, {"pki/keys.py": "import time\nimport sds_agent_proto.sds_pb2\n"})
    assert effects(sources) == ["sds_agent/pki/keys.py:1: pki.keys decides and may not import time"]
    assert borrowed(sources) == [
        "sds_agent/pki/keys.py:2: sds_agent_proto.sds_pb2 belongs to authority, ca, inspection, rpc, sds"
    ]
