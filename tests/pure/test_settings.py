"""What a good configuration means: defaults, overrides, places, durations and the schema that editors read."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml
from fakes import editors
from fakes.configurations import MINIMAL, UID, problems, settings
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct, structs

from sds_agent.authority import registry
from sds_agent.authority.embedded import EmbeddedSettings
from sds_agent.cli import run
from sds_agent.config.changes import difference
from sds_agent.config.conflicts import conflicts
from sds_agent.config.loading import load
from sds_agent.config.schema import FILE, json_schema
from sds_agent.config.settings import OutputSettings, Settings, WorkloadSettings
from sds_agent.configfile import durations, reading
from sds_agent.configfile.document import Document, Origin
from sds_agent.configfile.reading import UNREAD
from sds_agent.configfile.schema import sections_of
from sds_agent.errors import ConfigurationError, ProblemsError
from sds_agent.issuance.failover import DEFAULT_POLICY
from sds_agent.issuance.requester import CA_TIMEOUT
from sds_agent.pki.keys import KeyType

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "configuration-keys.md").read_text()


def examples(page: Path) -> list[str]:
    return re.findall(r"^```yaml\n(# sds-agent\.yaml.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


EXAMPLES = [example for page in sorted(DOCS.rglob("*.md")) for example in examples(page)]
FULL = examples(DOCS / "configuration.md")[1]


def test_a_minimal_file_gets_every_default(tmp_path: Path) -> None:
    read = settings(tmp_path, MINIMAL, XDG_RUNTIME_DIR=str(tmp_path), XDG_STATE_HOME="/state")
    assert read.trust_domain == "demo.example"
    assert (read.sds.socket, read.state_dir) == (tmp_path / "sds-agent/sds.sock", Path("/state/sds-agent"))
    assert (read.sds.mode, str(read.sds.mode), read.sds.owner, read.sds.group) == (0o660, "0660", None, None)
    assert (read.sds.limits.streams, read.sds.limits.names, read.sds.limits.request_bytes) == (10_000, 100, 1 << 20)
    assert read.authorities == {"local": EmbeddedSettings()}
    assert read.authorities["local"] == EmbeddedSettings(key=KeyType.EC_P256, root_lifetime=timedelta(days=3650))
    assert read.workloads == (
        WorkloadSettings(
            name="default",
            spiffe_id="spiffe://demo.example/web",
            key=KeyType.EC_P256,
            ttl=timedelta(hours=24),
            authority=None,
        ),
    )
    assert read.authorities_of(read.workloads[0]) == ("local",)
    assert (read.renewal.fraction, read.renewal.jitter) == (0.5, 0.05)
    assert (read.log.format, read.log.level) == ("auto", "info")


def test_an_envoy_may_use_the_names_of_istio_and_of_spire(tmp_path: Path) -> None:
    read = settings(tmp_path, MINIMAL)
    assert read.workloads[0].names == ("default", "spiffe://demo.example/web")
    assert read.bundle_names == ("ROOTCA", "spiffe://demo.example")


def test_a_name_that_is_the_spiffe_id_is_one_name(tmp_path: Path) -> None:
    read = settings(tmp_path, MINIMAL.replace("name: default", "name: spiffe://demo.example/web"))
    assert read.workloads[0].names == ("spiffe://demo.example/web",)


def test_every_key_of_the_full_example_is_taken(tmp_path: Path) -> None:
    read = settings(tmp_path, FULL)
    assert read.sds.socket == Path("/run/sds-agent/sds.sock")
    assert (read.sds.owner, read.sds.group) == ("0", "0")
    assert {"local", "legacy", "plugged", "mesh"} <= set(read.authorities)
    assert read.workloads[1].key is KeyType.RSA_2048
    assert read.workloads[1].ttl == timedelta(minutes=90)
    assert read.authorities_of(read.workloads[1]) == ("legacy", "local")


def test_the_full_example_shows_every_key_of_the_agents_own() -> None:
    shown = {path for example in EXAMPLES for path in _key_paths(yaml.safe_load(example))}
    every = set(_schema_paths(json_schema(), json_schema()["$defs"]))
    assert {path for path in every if not path.startswith("authorities.NAME.")} <= shown


@pytest.mark.parametrize("kind", registry.OURS)
def test_the_page_of_a_kind_names_every_key_of_it(kind: str) -> None:
    pages = {"embedded": "configuration.md", "cacerts": "configuration.md", "istio": "istio.md"}
    page = (DOCS / pages.get(kind, f"authorities/{kind}.md")).read_text() + FULL
    definition = json_schema()["$defs"][registry.kind(kind).settings.__name__]
    keys = _schema_paths(definition, json_schema()["$defs"])
    for key in {path.rpartition(".")[2].removesuffix("[]") for path in keys}:
        assert f"`{key}`" in page or re.search(rf"\b{key}:", page), key


def test_relative_paths_start_from_the_files_directory(tmp_path: Path) -> None:
    read = settings(tmp_path, f"{MINIMAL}state_dir: state\nsds: {{socket: ../run/s.sock}}\n")
    assert read.state_dir == tmp_path / "state"
    assert read.sds.socket == tmp_path / "../run/s.sock"


def test_numeric_and_quoted_accounts_mean_the_same(tmp_path: Path) -> None:
    assert settings(tmp_path, f"{MINIMAL}sds: {{group: 1000}}").sds.group == "1000"
    assert settings(tmp_path, f'{MINIMAL}sds: {{group: "1000", owner: _envoy}}').sds.group == "1000"


@pytest.mark.parametrize(
    ("mode", "bits"), [("0660", 0o660), ("660", 0o660), ("0o600", 0o600), ("0640", 0o640), ("0770", 0o770)]
)
def test_a_mode_is_read_as_chmod_reads_it(mode: str, bits: int, tmp_path: Path) -> None:
    assert settings(tmp_path, f'{MINIMAL}sds: {{mode: "{mode}"}}').sds.mode == bits


@pytest.mark.parametrize("loader", [yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)])
def test_aliases_and_merge_keys_work_with_both_of_pyyamls_loaders(loader: Any, tmp_path: Path) -> None:
    from sds_agent.configfile import source  # noqa: PLC0415 - as the loader does, only where there is a file

    file = tmp_path / "sds-agent.yaml"
    file.write_text(
        "trust_domain: demo.example\n"
        "workloads:\n"
        "  - &first {name: a, spiffe_id: spiffe://demo.example/a, ttl: &ttl 1h, key: rsa-2048}\n"
        "  - {<<: *first, name: b, spiffe_id: spiffe://demo.example/b}\n"
        "  - {<<: [{key: ec-p384}, *first], name: c, spiffe_id: spiffe://demo.example/c, ttl: *ttl}\n"
        "  - {<<: {key: ec-p384}, <<: *first, name: d, spiffe_id: spiffe://demo.example/d}\n"
    )
    document, found = source.read(file, loader)
    assert not found
    document.tree |= {"state_dir": "/s", "sds": {"socket": "/s"}}
    read, wrong = reading.read(Settings, document)
    assert not wrong
    assert [(each.name, each.key.value, each.ttl) for each in read.workloads] == [
        ("a", "rsa-2048", timedelta(hours=1)),
        ("b", "rsa-2048", timedelta(hours=1)),
        ("c", "ec-p384", timedelta(hours=1)),
        ("d", "ec-p384", timedelta(hours=1)),
    ]


def test_settings_cannot_be_changed(tmp_path: Path) -> None:
    read = settings(tmp_path, MINIMAL)
    with pytest.raises(AttributeError):
        read.trust_domain = "other.example"  # type: ignore[misc]  # that it is refused is what is tested
    with pytest.raises(TypeError):
        read.authorities["new"] = EmbeddedSettings()  # type: ignore[index]  # likewise


# Without a file


def test_no_file_gives_one_workload_on_the_embedded_ca() -> None:
    loaded = load(None, {}, uid=0)
    read = loaded.settings
    assert read.trust_domain == "sds-agent.local"
    assert [each.names for each in read.workloads] == [("default", "spiffe://sds-agent.local/default")]
    assert read.authorities == {"local": EmbeddedSettings()}
    assert (read.sds.socket, read.state_dir) == (Path("/run/sds-agent/sds.sock"), Path("/var/lib/sds-agent"))
    assert loaded.source == "the defaults"


def test_without_a_file_the_workload_follows_the_trust_domain() -> None:
    loaded = load(None, {"SDS_AGENT__TRUST_DOMAIN": "demo.example"}, uid=0)
    assert loaded.settings.workloads[0].spiffe_id == "spiffe://demo.example/default"
    assert loaded.source == "the defaults and $SDS_AGENT__TRUST_DOMAIN"


def test_a_container_can_be_configured_by_variables_alone() -> None:
    environ = {
        "SDS_AGENT__TRUST_DOMAIN": "demo.example",
        "SDS_AGENT__WORKLOADS__0__NAME": "web",
        "SDS_AGENT__WORKLOADS__0__SPIFFE_ID": "spiffe://demo.example/web",
        "SDS_AGENT__WORKLOADS__1__NAME": "batch",
        "SDS_AGENT__WORKLOADS__1__SPIFFE_ID": "spiffe://demo.example/batch",
        "SDS_AGENT__SDS__LIMITS__STREAMS": "5",
        "SDS_AGENT__RENEWAL__FRACTION": "0.6",
        "SDS_AGENT__SDS__MODE": "0600",
        "SDS_AGENT__SDS__FILES__0": "/etc/certs",
    }
    read = load(None, environ, uid=0).settings
    assert [each.name for each in read.workloads] == ["web", "batch"]
    assert (read.sds.limits.streams, read.renewal.fraction, read.sds.mode) == (5, 0.6, 0o600)
    assert read.sds.files == (Path("/etc/certs"),)


def test_variables_make_a_list_in_the_order_of_its_indexes() -> None:
    names = [f"{index}.example" for index in range(12)]
    environ = {f"SDS_AGENT__ADMIN__HOSTS__{index}": name for index, name in enumerate(names)}
    assert load(None, environ, uid=0).settings.admin.hosts == tuple(names)


@pytest.mark.parametrize("written", ["/", "//", "/etc/..", "/etc/../.."])
def test_not_every_file_of_the_machine_can_be_allowed(written: str, tmp_path: Path) -> None:
    (found,) = problems(tmp_path, f"{MINIMAL}sds: {{files: [{written}]}}\n")
    assert (found.key, "every file of this machine" in found.fix) == ("sds.files[0]", True)


def places(uid: int, **environ: str) -> tuple[str, str]:
    read = load(None, environ, uid=uid).settings
    return str(read.sds.socket), str(read.state_dir)


def test_the_socket_and_the_state_go_where_the_user_has_them(tmp_path: Path) -> None:
    own, home = str(tmp_path), str(tmp_path)
    socket = f"{own}/sds-agent/sds.sock"
    assert places(UID, XDG_RUNTIME_DIR=own, XDG_STATE_HOME="/s") == (socket, "/s/sds-agent")
    assert places(UID, XDG_RUNTIME_DIR=own, HOME=home) == (socket, f"{home}/.local/state/sds-agent")
    assert places(0, XDG_RUNTIME_DIR=own, HOME=home) == ("/run/sds-agent/sds.sock", "/var/lib/sds-agent")


@pytest.mark.parametrize("uid", [0, UID])
def test_the_directories_that_a_service_manager_made_come_first(tmp_path: Path, uid: int) -> None:
    """systemd's RuntimeDirectory= and StateDirectory=, and the image: each names its directories in a variable."""
    home = {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": "/s", "HOME": str(tmp_path)}
    made = {"RUNTIME_DIRECTORY": "/run/web:/run/other", "STATE_DIRECTORY": "/var/lib/web"}
    assert places(uid, **home, **made) == ("/run/web/sds.sock", "/var/lib/web")
    assert places(uid, **home, RUNTIME_DIRECTORY="web", STATE_DIRECTORY="") == places(uid, **home)


def test_a_place_names_the_variable_that_decided_it() -> None:
    long = f"/{'d' * 120}"
    with pytest.raises(ProblemsError, match=r"\$RUNTIME_DIRECTORY: sds\.socket "):
        places(UID, RUNTIME_DIRECTORY=long)


@pytest.mark.parametrize("useless", ["", "relative", "/does/not/exist"])
def test_a_user_without_home_and_runtime_directory_still_gets_places(useless: str) -> None:
    last = f"/tmp/sds-agent-{UID}"
    assert places(UID) == (f"{last}/sds.sock", f"{last}/state")
    assert places(UID, HOME=useless, XDG_RUNTIME_DIR=useless) == (f"{last}/sds.sock", f"{last}/state")


def test_a_reload_keeps_the_default_places_that_the_start_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home on another machine's disk may be read-only by then. No file that says nothing of places changes them."""
    monkeypatch.setattr(os, "geteuid", lambda: UID)
    runtime, home = tmp_path / "run", tmp_path / "home"
    for variable, directory in {"XDG_RUNTIME_DIR": runtime, "HOME": home}.items():
        directory.mkdir()
        monkeypatch.setenv(variable, str(directory))
    for variable in ("XDG_STATE_HOME", "STATE_DIRECTORY", "RUNTIME_DIRECTORY"):
        monkeypatch.delenv(variable, raising=False)
    file = tmp_path / "sds-agent.yaml"
    file.write_text(MINIMAL)
    before = load(file, os.environ)
    assert before.settings.state_dir == home / ".local/state/sds-agent"
    assert before.settings.sds.socket == runtime / "sds-agent/sds.sock"
    arguments = run.plain([str(file)])
    assert arguments is not None
    source = run.config_source(before, arguments)
    assert source is not None
    for directory in (runtime, home):
        directory.rmdir()
    assert not difference(before.settings, source.load())


# Environment variables


@pytest.mark.parametrize(
    "variable", ["SDS_AGENT__WORKLOADS__0__TTL", "sds_agent__workloads__0__ttl", "Sds_Agent__Workloads__0__Ttl"]
)
def test_a_variable_overrides_the_file_in_any_case(variable: str, tmp_path: Path) -> None:
    assert settings(tmp_path, f"{MINIMAL}    ttl: 2h\n", **{variable: "1h"}).workloads[0].ttl == timedelta(hours=1)


def test_a_variable_finds_an_authority_whose_name_a_shell_cannot_write(tmp_path: Path) -> None:
    text = f"{MINIMAL}authorities:\n  step-ca: {{type: embedded}}\n"
    read = settings(tmp_path, text, SDS_AGENT__AUTHORITIES__STEP_CA__KEY="rsa-2048")
    assert read.authorities == {"step-ca": EmbeddedSettings(key=KeyType.RSA_2048)}


def test_of_two_names_alike_to_a_shell_a_variable_means_the_exact_one(tmp_path: Path) -> None:
    text = f"{MINIMAL}    authority: a-b\nauthorities:\n  a-b: {{type: embedded}}\n  a_b: {{type: embedded}}\n"
    read = settings(tmp_path, text, SDS_AGENT__AUTHORITIES__A_B__KEY="rsa-2048")
    assert read.authorities["a_b"] == EmbeddedSettings(key=KeyType.RSA_2048)
    assert read.authorities["a-b"] == EmbeddedSettings(key=KeyType.EC_P256)


def test_a_variable_may_add_an_authority_and_fill_an_empty_section(tmp_path: Path) -> None:
    variables = {"SDS_AGENT__AUTHORITIES__NEW__TYPE": "embedded", "SDS_AGENT__SDS__GROUP": "envoy"}
    read = settings(tmp_path, f"{MINIMAL}sds:\n", **variables)
    assert list(read.authorities) == ["new"]
    assert read.sds.group == "envoy"


def test_a_variable_sets_a_key_of_the_ca_that_is_there_without_being_named(tmp_path: Path) -> None:
    """As the page on the configuration has it; to set the kind of its key one would have to write a section else."""
    key = {"SDS_AGENT__AUTHORITIES__LOCAL__KEY": "rsa-2048"}
    expected = {"local": EmbeddedSettings(key=KeyType.RSA_2048)}
    assert settings(tmp_path, MINIMAL, **key).authorities == expected
    assert load(None, key).settings.authorities == expected
    section = f"{MINIMAL}authorities:\n  local: {{key: ec-p384}}\n"
    with pytest.raises(ProblemsError, match=r"authorities\.local\.type is missing"):
        settings(tmp_path, section, **key)
    with pytest.raises(ProblemsError, match=r"authorities\.local\.type is missing"):
        settings(tmp_path, MINIMAL, **key, SDS_AGENT__AUTHORITIES__OTHER__TYPE="embedded")


def test_the_agent_ignores_the_variables_that_kubernetes_sets_for_a_service_of_its_name(tmp_path: Path) -> None:
    variables = {"SDS_AGENT_SERVICE_HOST": "10.0.0.1", "SDS_AGENT_PORT": "tcp://10.0.0.1:80"}
    assert settings(tmp_path, MINIMAL, **variables) == settings(tmp_path, MINIMAL)


# Durations


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("20s", timedelta(seconds=20)),
        ("1h30m", timedelta(minutes=90)),
        ("90d", timedelta(days=90)),
        ("1d12h", timedelta(hours=36)),
        ("1.5h", timedelta(minutes=90)),
        ("1h0m0s", timedelta(hours=1)),
        ("500ms", timedelta(milliseconds=500)),
        ("5m1ms", timedelta(minutes=5, milliseconds=1)),
        ("0s", timedelta()),
        ("999999999d24h", timedelta.max),
        ("999999999.9d999999999.9h", timedelta.max),
    ],
)
def test_a_duration_is_read(text: str, duration: timedelta) -> None:
    assert durations.parse(text) == duration


@pytest.mark.parametrize(
    "text", ["", "20", "s", "1 h", "-1h", "1h 30m", "30m1h", "1h1h", "1w", "1.h", ".5h", "1e3s", "١s", "1H", "1h\n"]
)
def test_a_text_that_is_not_a_duration_is_refused(text: str) -> None:
    assert durations.parse(text) is None


@given(st.integers(0, 10**12))
def test_a_duration_that_is_shown_can_be_written_into_the_file(milliseconds: int) -> None:
    duration = timedelta(milliseconds=milliseconds)
    assert durations.parse(durations.format_duration(duration)) == duration


def test_the_usual_durations_look_usual() -> None:
    shown = [timedelta(hours=24), timedelta(days=90), timedelta(seconds=20), timedelta(minutes=90), timedelta()]
    assert [durations.format_duration(each) for each in shown] == ["24h", "90d", "20s", "1h30m", "0s"]


# Whatever is in the tree

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("spiffe://d/x")
KEYS = {field.name for section in sections_of(Settings) for field in section.fields}
NAMES = st.sampled_from([*sorted(KEYS), "type", "local"])
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=6))


@given(st.dictionaries(NAMES, TREES, max_size=8))
def test_every_tree_gives_settings_or_problems(tree: dict[str, object]) -> None:
    document = Document(tree=dict(tree), origins={(): Origin("f", 1)}, base=Path("/base"))
    read, found = reading.read(Settings, document)
    assert all(str(document.place(each)) for each in (*found, *conflicts(read)))
    if not found:
        assert UNREAD not in leaves(read)


def leaves(of: object) -> Iterator[object]:
    """All that a settings object holds, at whatever depth."""
    inner: Iterable[object] = ()
    if isinstance(of, Struct):
        inner = structs.astuple(of)
    elif isinstance(of, Mapping):
        inner = of.values()
    elif isinstance(of, tuple):
        inner = of
    else:
        yield of
    for each in inner:
        yield from leaves(each)


# The schema


def test_the_schema_that_is_checked_in_is_what_the_settings_give() -> None:
    assert json.loads(FILE.read_text()) == json_schema()


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_the_page_has_a_minimal_and_a_full_example() -> None:
    assert len(EXAMPLES) >= 2


@pytest.fixture(scope="module")
def editor() -> Any:
    return editors.editor(json_schema())


@pytest.mark.parametrize("example", [MINIMAL, *EXAMPLES])
def test_the_examples_are_good_for_the_agent_and_for_an_editor(example: str, tmp_path: Path, editor: Any) -> None:
    assert problems(tmp_path, example) == ()
    editor.validate(yaml.safe_load(example))


@pytest.mark.parametrize("output", ["certs", "{directory: certs}"])
def test_an_output_is_a_directory_or_a_mapping(output: str, tmp_path: Path, editor: Any) -> None:
    text = f"{MINIMAL}    output: {output}\n"
    (workload,) = settings(tmp_path, text).workloads
    assert workload.output == OutputSettings(directory=tmp_path / "certs")
    editor.validate(yaml.safe_load(text))


def test_an_output_that_is_neither_is_said_in_words(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, f"{MINIMAL}    output: ''\n")
    assert found.key == "workloads[0].output"
    assert found.fix.startswith("it must be a path, or a mapping with the keys directory, group, hook_timeout, ")


@pytest.mark.parametrize(
    "change",
    [
        "trust_domain: Demo.example",
        "unknown: 1",
        "workloads: []",
        "workloads: [{name: a}]",
        "workloads: [{name: '', spiffe_id: spiffe://demo.example/a}]",
        "workloads: [{name: 'file-cert:/a', spiffe_id: spiffe://demo.example/a}]",
        "workloads: [{name: a, spiffe_id: spiffe://demo.example}]",
        "workloads: [{name: a, spiffe_id: spiffe://demo.example/a, key: ec-p999}]",
        "workloads: [{name: a, spiffe_id: spiffe://demo.example/a, ttl: 60}]",
        "workloads: [{name: a, spiffe_id: spiffe://demo.example/a, ttl: 1w}]",
        "authorities: {}",
        "authorities: {local: {}}",
        "authorities: {local: {type: other}}",
        "authorities: {Local: {type: embedded}}",
        "authorities: {local: {type: embedded, more: 1}}",
        "sds: {mode: '0666'}",
        "sds: {mode: 0660}",
        "sds: {group: 'no such name'}",
        "sds: {limits: {streams: 0}}",
        "sds: {files: /etc/certs}",
        "sds: {files: [/]}",
        "sds: {socket: //}",
        "sds: {files: [//]}",
        "admin: {hosts: ['https://agent.example']}",
        "admin: {hosts: ['::1']}",
        "renewal: {fraction: 1}",
        "workloads: [{name: a, spiffe_id: spiffe://demo.example/a, output: [/run/certs]}]",
        "workloads: [{name: a, spiffe_id: spiffe://demo.example/a, output: {layout: istio}}]",
        "workloads: [{name: a, spiffe_id: spiffe://demo.example/a, output: {directory: c, on_renewed: reload}}]",
        "workloads: [{name: a, spiffe_id: spiffe://demo.example/a, output: {directory: c, key_mode: '0644'}}]",
        "log: {level: loud}",
        "log:",
    ],
)
def test_the_schema_refuses_what_the_agent_refuses(change: str, tmp_path: Path, editor: Any) -> None:
    text = yaml.safe_dump(yaml.safe_load(MINIMAL) | yaml.safe_load(change))
    assert problems(tmp_path, text)
    with pytest.raises(jsonschema.ValidationError):
        editor.validate(yaml.safe_load(text))


def test_the_page_lists_every_key_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([^|]*) \|", PAGE[: PAGE.index("## `sds-agent ca serve`")], re.MULTILINE))
    expected = _schema_paths(json_schema(), json_schema()["$defs"])
    sections = {path for path, default in expected.items() if default == "section"}
    assert set(rows) - {"authorities", "workloads"} == set(expected) - sections
    for path in expected.keys() - sections:
        if expected[path] is not None:
            assert rows[path].strip("`").lower() == str(expected[path]).lower(), path


def test_the_flags_offer_what_the_file_takes() -> None:
    log = json_schema()["$defs"]["LogSettings"]["properties"]
    assert sorted(run.FORMATS) == log["format"]["enum"]
    assert sorted(run.LEVELS) == log["level"]["enum"]


def _schema_paths(schema: dict[str, Any], definitions: dict[str, Any], path: str = "") -> dict[str, object]:
    """Every key of the schema with its default; None without one."""
    found: dict[str, object] = {}
    for name, key in schema.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        mapping = [each for each in key.get("anyOf", []) if "$ref" in each]  # where a single value stands for a section
        inner = _resolved(mapping[0] if mapping else key, definitions)
        items = _resolved(inner.get("items", {}), definitions)
        section = inner.get("type") == "object" or "properties" in items or "oneOf" in inner
        found[here] = "section" if section else inner.get("default")
        found |= _schema_paths(inner, definitions, here)
        for kind in inner.get("oneOf", ()):
            found |= _schema_paths(_resolved(kind, definitions), definitions, here)
        if isinstance(inner.get("additionalProperties"), dict):
            for kind in inner["additionalProperties"]["oneOf"]:
                found |= _schema_paths(_resolved(kind, definitions), definitions, f"{here}.NAME")
        found |= _schema_paths(items, definitions, f"{here}[]")
    return found


def _resolved(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """A schema with what its reference names."""
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    return {**definitions.get(name, {}), **schema}


def _key_paths(value: object, path: str = "") -> Iterator[str]:
    """Every key of an example, written as `_schema_paths` writes them."""
    if isinstance(value, list):
        for item in value:
            yield from _key_paths(item, f"{path}[]")
    elif isinstance(value, dict):
        for name, inner in value.items():
            here = "authorities.NAME" if path == "authorities" else f"{path}.{name}" if path else str(name)
            yield here
            yield from _key_paths(inner, here)


# --- several authorities ---

TWO = "authorities: {a: {type: embedded}, b-2: {type: embedded}}\n"


@pytest.mark.parametrize(
    ("written", "names"),
    [("a", ("a",)), ("[a]", ("a",)), ("[b-2, a]", ("b-2", "a"))],
)
def test_a_workload_has_one_authority_or_several_in_order(written: str, names: tuple[str, ...], tmp_path: Path) -> None:
    read = settings(tmp_path, f"{MINIMAL}    authority: {written}\n{TWO}")
    assert read.authorities_of(read.workloads[0]) == names
    for name in ("a", "b-2"):
        assert list(read.use_of(name).workloads) == ([0] if name in names else [])


def test_variables_set_one_authority_or_items_of_the_list(tmp_path: Path) -> None:
    one = settings(tmp_path, f"{MINIMAL}{TWO}", SDS_AGENT__WORKLOADS__0__AUTHORITY="a")
    assert one.authorities_of(one.workloads[0]) == ("a",)
    several = {f"SDS_AGENT__WORKLOADS__0__AUTHORITY__{index}": name for index, name in enumerate(["b-2", "a"])}
    two = settings(tmp_path, f"{MINIMAL}{TWO}", **several)
    assert two.authorities_of(two.workloads[0]) == ("b-2", "a")


def test_the_defaults_of_failover_and_requests_are_those_of_the_parts(tmp_path: Path) -> None:
    """A part that is used without a file must behave as the agent does."""
    read = settings(tmp_path, MINIMAL)
    assert (read.failover.failures, read.failover.after, read.failover.back_after) == (
        DEFAULT_POLICY.failures,
        DEFAULT_POLICY.after,
        DEFAULT_POLICY.back_after,
    )
    assert read.requests.timeout.total_seconds() == CA_TIMEOUT


def test_a_working_directory_that_was_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with (tmp_path / "a.yaml").open("w+") as file:
        file.write(MINIMAL)
        file.flush()
        for piped in (None, Path(f"/dev/fd/{file.fileno()}")):
            with pytest.raises(ConfigurationError, match="the working directory was removed; change to another one"):
                load(piped, {})


def test_paths_in_a_file_that_is_a_descriptor_start_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state would be in /dev, and lost with the next boot, or nowhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.yaml").write_text(f"{MINIMAL}state_dir: state\n")
    with (tmp_path / "elsewhere" / "a.yaml").open() as file:
        (tmp_path / "elsewhere" / "stdin").symlink_to(f"/proc/self/fd/{file.fileno()}")
        for name in (f"/dev/fd/{file.fileno()}", "elsewhere/stdin"):
            assert load(Path(name), {}, uid=UID).settings.state_dir == tmp_path / "state"
    assert load(Path("elsewhere/a.yaml"), {}, uid=UID).settings.state_dir == tmp_path / "elsewhere" / "state"
