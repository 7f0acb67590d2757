"""What a changed configuration changes: which of it a running agent takes, and which it refuses as a whole."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fakes.configurations import settings
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from sds_agent.config.changes import LIVE, RESTART, NameChange, SettingsChange, difference
from sds_agent.config.settings import SdsSettings, Settings, WorkloadSettings

BEFORE = """
trust_domain: demo.example
state_dir: state
sds: {socket: sds.sock}
authorities: {one: {type: embedded}, two: {type: embedded}}
workloads:
  - {name: web, spiffe_id: spiffe://demo.example/web, authority: one}
  - {name: api, spiffe_id: spiffe://demo.example/api, authority: two}
"""


def changed(folder: Path, old: str, new: str, text: str = BEFORE) -> SettingsChange:
    """What it changes to write `new` for `old`."""
    assert old in text
    return difference(settings(folder, text), settings(folder, text.replace(old, new)))


def test_every_key_is_either_applied_or_needs_a_restart() -> None:
    """A key in neither table would be changed in the file, and nothing would say that it has no effect."""
    assert sorted((*LIVE, *RESTART)) == sorted(Settings.__struct_fields__)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: web,", "name: front,", (NameChange(("front",), ("web",)), NameChange(), ("workloads",))),
        ("  - {name: web,", "  - {ttl: 1h, name: web,", (NameChange(changed=("web",)), NameChange(), ("workloads",))),
        (
            "two: {type: embedded}",
            "two: {type: embedded, root_lifetime: 9h}",
            (NameChange(), NameChange(changed=("two",)), ("authorities",)),
        ),
        (
            "{one: {type",
            "{three: {type: embedded}, one: {type",
            (NameChange(), NameChange(added=("three",)), ("authorities",)),
        ),
        ("trust_domain:", "renewal: {fraction: 0.4}\ntrust_domain:", (NameChange(), NameChange(), ("renewal",))),
        ("trust_domain:", "log: {level: debug}\ntrust_domain:", (NameChange(), NameChange(), ("log",))),
        ("trust_domain:", "requests: {timeout: 3s}\ntrust_domain:", (NameChange(), NameChange(), ("requests",))),
        ("trust_domain:", "failover: {failures: 1}\ntrust_domain:", (NameChange(), NameChange(), ("failover",))),
    ],
)
def test_what_a_running_agent_takes(
    tmp_path: Path, old: str, new: str, expected: tuple[NameChange, NameChange, tuple[str, ...]]
) -> None:
    found = changed(tmp_path, old, new)
    assert (found.workloads, found.authorities, found.keys) == expected
    assert found.refusals == ()


@pytest.mark.parametrize(
    ("old", "new", "keys"),
    [
        ("state_dir: state", "state_dir: other", ("state_dir",)),
        ("socket: sds.sock", "socket: other.sock", ("sds.socket", "admin.socket")),  # which lies beside it
        ("socket: sds.sock", 'socket: sds.sock, mode: "0600"', ("sds.mode",)),
        (
            "socket: sds.sock",
            "socket: sds.sock, limits: {streams: 5, names: 5}",
            ("sds.limits.streams", "sds.limits.names"),
        ),
        ("socket: sds.sock", "socket: sds.sock, files: [certs]", ("sds.files",)),
        ("trust_domain:", "keep_certificates: false\ntrust_domain:", ("keep_certificates",)),
        ("trust_domain:", "state_encryption: {key_file: key}\ntrust_domain:", ("state_encryption",)),
        ("trust_domain:", "admin: {enabled: false}\ntrust_domain:", ("admin.enabled",)),
        ("demo.example", "other.example", ("trust_domain",)),
    ],
)
def test_what_only_a_restart_applies_is_refused_by_the_name_of_the_key(
    tmp_path: Path, old: str, new: str, keys: tuple[str, ...]
) -> None:
    found = changed(tmp_path, old, new)
    assert found.restart == keys
    assert found.refusals == tuple(f"{key} has changed, which only a restart of the agent applies" for key in keys)


def test_other_order_of_the_workloads_is_a_change_that_touches_none_of_them(tmp_path: Path) -> None:
    before = settings(tmp_path, BEFORE)
    after = structs.replace(before, workloads=before.workloads[::-1])
    found = difference(before, after)
    assert (bool(found), found.workloads, found.refusals) == (True, NameChange(), ())


def test_what_has_to_be_opened_and_closed_follows_from_it() -> None:
    change = SettingsChange(authorities=NameChange(("new",), ("old",), ("other",)))
    assert (change.to_open, change.to_close) == (("new", "other"), ("old", "other"))


NAMES = ("web", "api", "db")
BASE = Settings(
    trust_domain="demo.example",
    state_dir=Path("/state"),
    sds=SdsSettings(socket=Path("/sds.sock")),
    workloads=(WorkloadSettings(name="web", spiffe_id="spiffe://demo.example/web"),),
)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """The keys of a configuration that differ from one to the next."""
    chosen = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    return {
        "workloads": {name: draw(st.sampled_from([3600, 7200])) for name in chosen},
        "fraction": draw(st.sampled_from([0.4, 0.5])),
        "keep": draw(st.booleans()),
    }


def made(before: Settings, keys: dict[str, Any]) -> Settings:
    (first, *_) = before.workloads
    return structs.replace(
        before,
        workloads=tuple(
            structs.replace(first, name=name, spiffe_id=f"spiffe://demo.example/{name}", ttl=timedelta(seconds=ttl))
            for name, ttl in keys["workloads"].items()
        ),
        renewal=structs.replace(before.renewal, fraction=keys["fraction"]),
        keep_certificates=keys["keep"],
    )


@given(one=configurations(), other=configurations())
def test_there_is_no_change_only_between_equals(one: dict[str, Any], other: dict[str, Any]) -> None:
    base, target = made(BASE, one), made(BASE, other)
    change, back = difference(base, target), difference(target, base)
    assert bool(change) == (base != target)
    assert (change.workloads.added, change.workloads.removed) == (back.workloads.removed, back.workloads.added)
    assert set(change.workloads.changed) == set(back.workloads.changed)
    kept = {each.name for each in base.workloads} - set(change.workloads.removed)
    assert kept | set(change.workloads.added) == {each.name for each in target.workloads}
