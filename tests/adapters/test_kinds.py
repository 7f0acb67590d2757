"""Every kind of CA keeps the contract of `authority.kind`: a line in MINIMUM puts a new kind under all these tests.

The kinds of other packages come through the entry points: what is wrong with such a package is said in a line.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml
from fakes import editors, packages
from fakes.ca_files import files_of
from fakes.clocks import HandClock
from fakes.configurations import MINIMAL, problems, settings
from fakes.hierarchy import make_ca
from msgspec import structs

from sds_agent.authority import registry
from sds_agent.authority.cacerts import CacertsSettings
from sds_agent.authority.cfssl.settings import CfsslSettings
from sds_agent.authority.embedded import EmbeddedSettings
from sds_agent.authority.est.settings import EstSettings
from sds_agent.authority.files.settings import FilesSettings
from sds_agent.authority.istio.settings import IstioSettings
from sds_agent.authority.kind import AuthoritySettings, Context, Use
from sds_agent.authority.kubernetes.settings import KubernetesSettings
from sds_agent.authority.protocol import AdvertisesAnchors, Authority, Supplier
from sds_agent.authority.spiffe.settings import SpiffeSettings
from sds_agent.authority.step_ca.settings import StepCaSettings
from sds_agent.authority.vault.settings import VaultCertAuth, VaultSettings
from sds_agent.cli.main import main
from sds_agent.config.schema import json_schema
from sds_agent.configfile.reading import UNREAD
from sds_agent.errors import ConfigurationError
from sds_agent.pki.certificates import read_pem
from sds_agent.state import Restorable

MINIMUM = {
    "embedded": "",
    "istio": "address: 127.0.0.1:1, ca_file: roots.pem, token_file: token",
    "cacerts": "directory: ca",
    "step-ca": "url: https://127.0.0.1:1, provisioner: sds, ca_file: roots.pem, jwk_file: token",
    "vault": "url: 'https://127.0.0.1:1', ca_file: roots.pem, role: web, auth: {type: token, token_file: token}",
    "cfssl": "url: https://127.0.0.1:1, ca_file: roots.pem",
    "est": "url: https://127.0.0.1:1, ca_file: roots.pem, username: agent, password_file: token",
    "spiffe": "socket: api.sock",
    "files": "directory: live",
    "kubernetes": "kubeconfig: kubeconfig, signer_name: example.com/workloads, roots_file: roots.pem",
    "leased": "journal: journal",
}
"""The least that a file says of an authority, by its kind; the last is another package's."""


@pytest.fixture(scope="module", autouse=True)
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place for modules where another package is installed."""
    with packages.leases(tmp_path_factory.mktemp("packages")) as folder:
        yield folder


def text(kind: str, keys: str) -> str:
    return f"{MINIMAL}authorities: {{upstream: {{type: {kind}, {keys}}}}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With what the files of MINIMUM name."""
    root = make_ca("root")
    (tmp_path / "ca").mkdir()
    for name, content in files_of(make_ca("signer", root), root).items():
        (tmp_path / "ca" / name).write_bytes(content)
    (tmp_path / "roots.pem").write_bytes(files_of(root, root)["root-cert.pem"])
    (tmp_path / "token").write_text("a.token.x")
    return tmp_path


def chosen(folder: Path, kind: str, keys: str | None = None) -> AuthoritySettings:
    return settings(folder, text(kind, MINIMUM[kind] if keys is None else keys)).authorities["upstream"]


def context(folder: Path) -> Context:
    return Context("upstream", "demo.example", folder / "state", HandClock())


def test_every_built_in_kind_is_tested_against_the_contract() -> None:
    assert set(MINIMUM) == {*registry.OURS, "leased"}


@pytest.mark.parametrize("kind", MINIMUM)
def test_the_least_that_a_file_says_gives_settings_of_its_kind(folder: Path, kind: str) -> None:
    read = chosen(folder, kind)
    assert type(read) is registry.kind(kind).settings
    assert (registry.name_of(read), registry.kind_of(read)) == (kind, registry.kind(kind))
    assert registry.settings_of(kind) is type(read)
    assert kind in registry.names()


@pytest.fixture(scope="module")
def editor() -> Any:
    return editors.editor(json_schema())


@pytest.mark.parametrize("kind", MINIMUM)
def test_the_schema_that_editors_get_knows_the_kind(kind: str, editor: Any) -> None:
    editor.validate(yaml.safe_load(text(kind, MINIMUM[kind])))
    with pytest.raises(jsonschema.ValidationError):
        editor.validate(yaml.safe_load(text(kind, "no_such_key: 1")))
    declared = editor.schema["$defs"][registry.kind(kind).settings.__name__]
    assert declared["description"]
    assert all(each.get("description") for name, each in declared["properties"].items() if name != "type")


@pytest.mark.parametrize("kind", MINIMUM)
def test_a_sentence_names_the_authority(folder: Path, kind: str) -> None:
    said = registry.kind(kind).sentence(chosen(folder, kind), "upstream")
    assert said.startswith("The authority upstream ")
    assert said.endswith(".")


@pytest.mark.parametrize("kind", MINIMUM)
def test_every_path_in_the_settings_is_checked_for_who_may_change_it(folder: Path, kind: str) -> None:
    """`check` and `run` warn of those whom others can change, so none may be forgotten."""
    declared = registry.kind(kind).settings
    paths = {field.name: Path(f"/{field.name}") for field in structs.fields(declared) if "Path" in str(field.type)}
    full = structs.replace(chosen(folder, kind), **paths)  # type: ignore[type-var]  # a struct, as the contract says
    files = registry.kind(kind).files(full)
    assert {key: path for key, path in files.items() if "." not in key} == paths  # the others are in its sections


@pytest.mark.parametrize("kind", MINIMUM)
def test_the_checks_pass_over_what_could_not_be_read(kind: str) -> None:
    """The user of a file with a wrong value gets an error about that value, not about what follows from it."""
    declared = registry.kind(kind).settings
    unread = declared(**{field.name: UNREAD for field in structs.fields(declared)})
    assert list(registry.kind(kind).conflicts(unread)) == []
    assert list(registry.kind(kind).workload_conflicts(unread, Use("upstream", {}, keep_certificates=True))) == []


def descriptors() -> dict[str, str]:
    found = {}
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            found[each.name] = str(each.readlink())
    return found


@pytest.mark.parametrize("kind", MINIMUM)
async def test_an_authority_that_was_closed_leaves_no_task_and_no_descriptor(folder: Path, kind: str) -> None:
    read, ours, before = chosen(folder, kind), asyncio.all_tasks(), descriptors()
    async with registry.kind(kind).open(read, context(folder)) as authority:
        assert isinstance(authority, Supplier if registry.kind(kind).supplies else Authority)
    assert asyncio.all_tasks() == ours
    # those of tests before this one may still be being closed
    assert not set(descriptors().items()) - set(before.items())


async def test_the_embedded_cas_roots_are_restored_when_they_are_lost(folder: Path) -> None:
    read = chosen(folder, "embedded")
    async with registry.kind("embedded").open(read, context(folder)) as authority:
        assert isinstance(authority, Restorable)
        roots = context(folder).directory / "roots.pem"
        stored = roots.read_bytes()
        roots.unlink()
        assert authority.put_back() == roots
        assert roots.read_bytes() == stored


@pytest.mark.parametrize("kind", ["embedded", "cacerts"])
async def test_a_ca_in_the_agent_advertises_new_roots_before_it_signs(folder: Path, kind: str) -> None:
    async with registry.kind(kind).open(chosen(folder, kind), context(folder)) as authority:
        assert isinstance(authority, AdvertisesAnchors)
        assert read_pem(await authority.anchors())


def spoilt(folder: Path, kind: str) -> tuple[AuthoritySettings, Context]:
    """What no authority can be opened with."""
    (folder / "occupied").touch()
    wrong: dict[str, AuthoritySettings] = {
        "embedded": EmbeddedSettings(),  # a file has the place of its directory
        "istio": IstioSettings(address=("ca.example:1",), plaintext_loopback=True, token_file=folder / "token"),
        "cacerts": CacertsSettings(directory=folder / "nowhere"),
        "step-ca": StepCaSettings(url="https://127.0.0.1:1", provisioner="sds", jwk_file=folder / "token"),
        "vault": VaultSettings(url=("https://127.0.0.1:1",), role="web", auth=VaultCertAuth()),
        "cfssl": CfsslSettings(url="https://ca.example:8888"),
        "est": EstSettings(url="https://ca.example:8443"),
        "spiffe": SpiffeSettings(socket=folder / "api.sock", federated=("demo.example",)),
        "files": FilesSettings(),
        "kubernetes": KubernetesSettings(signer_name="example.com/workloads"),
        "leased": chosen(folder, "leased", "journal: journal, refuses: true"),
    }
    return wrong[kind], Context("upstream", "demo.example", folder / "occupied", HandClock())


@pytest.mark.parametrize("kind", MINIMUM)
async def test_an_authority_that_cannot_be_opened_is_a_configuration_error(folder: Path, kind: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        async with registry.kind(kind).open(*spoilt(folder, kind)):
            pass
    place = "state_dir" if kind == "embedded" else "authorities.upstream."
    assert place in str(refused.value).splitlines()[0]


@pytest.mark.parametrize("kind", ["embedded", "cacerts", "spiffe"])
async def test_preflight_refuses_what_open_refuses_in_the_same_words(folder: Path, kind: str) -> None:
    with pytest.raises(ConfigurationError) as at_start:
        async with registry.kind(kind).open(*spoilt(folder, kind)):
            pass
    with pytest.raises(ConfigurationError) as beforehand:
        registry.kind(kind).check(*spoilt(folder, kind))
    assert str(beforehand.value) == str(at_start.value)


# Kinds of other packages


def test_another_packages_keys_are_checked_as_our_own(tmp_path: Path) -> None:
    found = problems(tmp_path, text("leased", "jurnal: x, refuses: true, hangs: true"))
    assert [(each.key, each.found) for each in found] == [
        ("authorities.upstream.jurnal", "is not a known key"),
        ("authorities.upstream.journal", "is missing"),
        ("authorities.upstream.hangs", "is true"),
    ]


def test_the_error_for_an_unknown_kind_lists_the_kinds_there_are(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, text("leasd", "journal: x"))
    assert found.fix == f"it must be one of {', '.join(registry.names())}; did you mean leased?"


def offer(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, target: str = "") -> None:
    module = name.replace("-", "_") + "_module"
    packages.install(folder, f"acme-{name}", {name: target or f"{module}:KIND"}, {module: source})
    monkeypatch.syspath_prepend(folder)


BROKEN = {
    "not-there": ("", "cannot be imported (AttributeError: "),
    "in-need": ("import a_library_that_is_not_there", "cannot be imported (ModuleNotFoundError: No module named"),
    "raising": ("raise KeyError('x' * 10_000)", "cannot be imported (KeyError: 'xxx"),
    "no-python": ("KIND =", "cannot be imported (SyntaxError: "),
    "no-kind": ("KIND = object()", "no_kind_module:KIND is no authority.kind.Kind"),
    "no-settings": (
        "from sds_agent.authority.kind import Kind\nKIND = Kind(settings=dict, open=print, sentence=print)",
        "no_settings_module:KIND is no authority.kind.Kind with a settings class",
    ),
    "misnamed": (packages.LEASED, 'its settings have the type "leased"'),
}
"""Packages that cannot be used, and what is said of each."""


@pytest.mark.parametrize(("name", "source", "said"), [(name, *each) for name, each in BROKEN.items()], ids=BROKEN)
def test_a_package_that_cannot_be_used_is_named_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    source: str,
    said: str,
) -> None:
    offer(tmp_path, monkeypatch, name, source)
    file = tmp_path / "agent.yaml"
    file.write_text(text(name, "journal: x"))
    assert main(["check", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f'agent.yaml:5: authorities.upstream.type is "{name}"' in line
    assert f"acme-{name} offers" in line
    assert said in line
    assert len(line) < 1000


def test_a_kind_that_two_packages_offer_is_neither_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, monkeypatch, "twofold", packages.LEASED.replace('"leased"', '"twofold"'))
    packages.install(tmp_path, "acme-again", {"twofold": "twofold_module:KIND"}, {})
    (found,) = problems(tmp_path, text("twofold", "journal: x"))
    assert found.found == 'is "twofold", which acme-again and acme-twofold offer'


def test_no_package_takes_the_place_of_a_kind_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, monkeypatch, "embedded", packages.LEASED.replace('"leased"', '"embedded"'))
    registry.kind.cache_clear()
    assert problems(tmp_path, text("embedded", "key: ec-p384")) == ()
    assert registry.names().count("embedded") == 1


def loaded(program: str, file: Path, others: Path) -> set[str]:
    """What a program in a process of its own prints, word by word."""
    path = os.pathsep.join([str(others), *(entry for entry in sys.path if entry)])
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


READ = """
import sys
from pathlib import Path
from sds_agent.config.loading import load

load(Path(sys.argv[1]), {})
print(*({"asyncio", "grpc", "cryptography.x509", "importlib.metadata"} & set(sys.modules)))
"""


@pytest.mark.parametrize("kind", registry.OURS)
def test_to_read_a_file_takes_no_client_and_no_event_loop(folder: Path, others: Path, kind: str) -> None:
    """Reporting a wrong configuration, or a health check, does not wait for imports that only a running agent needs."""
    file = folder / "agent.yaml"
    file.write_text(text(kind, MINIMUM[kind]))
    assert loaded(READ, file, others) == set()


LOAD = """
import asyncio, sys
from pathlib import Path
from sds_agent import app
from sds_agent.clock import SystemClock
from sds_agent.config.loading import load

async def open_all():
    async with app.authorities(load(Path(sys.argv[1]), {}).settings, SystemClock()):
        pass

asyncio.run(open_all())
print(*(each for each in sys.modules if each.startswith(("importlib.metadata", "sds_agent.authority."))))
"""


def test_a_file_that_names_our_own_kinds_loads_no_others_and_no_package_index(tmp_path: Path, others: Path) -> None:
    """The first secret does not wait for kinds that its file does not name."""
    file = tmp_path / "agent.yaml"
    file.write_text(f"{MINIMAL}state_dir: {tmp_path}/state\n")
    (tmp_path / "state").mkdir()
    names = ("embedded", "in_process", "kind", "protocol", "registry")
    assert loaded(LOAD, file, others) == {f"sds_agent.authority.{name}" for name in names}
