"""The store: what a stream reads is the newest, complete, and announced to it once."""

from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import pytest
from fakes.calls import counted
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.secrets.acknowledgements import Acknowledgements
from sds_agent.secrets.model import BundleSecret, CertificateSecret, Secret
from sds_agent.secrets.store import SecretStore

LATER = datetime(2036, 1, 1, tzinfo=UTC)


def certificate(chain: bytes = b"chain", key: bytes = b"key", not_after: datetime = LATER) -> CertificateSecret:
    return CertificateSecret(chain, key, not_after)


def bundle(anchors: bytes = b"roots") -> BundleSecret:
    return BundleSecret(anchors)


class Watcher:
    """Notes which names it was called with, and what the store served at that moment."""

    def __init__(self, store: SecretStore) -> None:
        self.store = store
        self.reported: list[set[str]] = []
        self.served: list[dict[str, Secret | None]] = []

    def __call__(self, names: frozenset[str]) -> None:
        self.reported.append(set(names))
        self.served.append(dict(self.store.snapshot))


# --- versions ---


def test_the_version_is_the_contents_so_a_restart_disturbs_no_envoy() -> None:
    """Written out, because a change of it makes every Envoy reload its certificate once."""
    assert certificate().version == "9eeb3986a4687efd"
    assert bundle().version == "b7865405a8df58c2"


def test_another_chain_or_bundle_has_another_version() -> None:
    assert certificate(b"chain 1").version != certificate(b"chain 2").version
    assert bundle(b"roots 1").version != bundle(b"roots 2").version
    assert certificate(b"same").version != bundle(b"same").version


def test_the_version_shows_nothing_of_the_key() -> None:
    assert certificate(key=b"key 1").version == certificate(key=b"key 2").version


def test_a_secret_cannot_be_changed() -> None:
    secret: Any = certificate()
    with pytest.raises(AttributeError):
        secret.chain_pem = b"other"
    secret = bundle()
    with pytest.raises(AttributeError):
        secret.anchors_pem = b"other"


# --- what is served ---


def test_a_name_exists_without_a_secret_until_it_is_published() -> None:
    store = SecretStore(["default"])
    assert dict(store.snapshot) == {"default": None}
    assert store.publish({"default": certificate()}) == {"default"}
    assert dict(store.snapshot) == {"default": certificate()}


@pytest.mark.parametrize("name", ["", "DEFAULT", "default ", "defaul", "default/", "*", "file-cert:/etc/passwd"])
def test_only_exact_names_are_served(name: str) -> None:
    """Elsewhere a misspelt name falls through to the workload's own key."""
    store = SecretStore(["default"])
    store.publish({"default": certificate()})
    assert name not in store.snapshot


def test_a_snapshot_never_changes_under_a_reader() -> None:
    store = SecretStore(["default"])
    before: Any = store.snapshot
    store.publish({"default": certificate()})
    assert before["default"] is None
    after: Any = store.snapshot
    for snapshot in (before, after):
        with pytest.raises(TypeError):
            snapshot["default"] = certificate()


def test_unchanged_content_is_not_published_again() -> None:
    """Envoys got the same secret 22,000 times a day."""
    store = SecretStore(["default", "ROOTCA"])
    store.publish({"default": certificate(), "ROOTCA": bundle()})
    watcher = Watcher(store)
    with store.watching(watcher):
        before = store.snapshot
        assert store.publish({"default": certificate(), "ROOTCA": bundle()}) == set()
        assert store.snapshot is before
    assert watcher.reported == []


def test_watchers_are_called_with_changed_names_alone() -> None:
    store = SecretStore(["default", "ROOTCA"])
    store.publish({"default": certificate(), "ROOTCA": bundle()})
    watcher = Watcher(store)
    with store.watching(watcher):
        assert store.publish({"default": certificate(b"new"), "ROOTCA": bundle()}) == {"default"}
    assert watcher.reported == [{"default"}]


def test_what_is_published_together_is_seen_together() -> None:
    """No stream sees a workload's new certificate under one of its names and the old under another."""
    store = SecretStore(["default", "spiffe://demo.example/web"])
    watcher = Watcher(store)
    with store.watching(watcher):
        store.publish(dict.fromkeys(("default", "spiffe://demo.example/web"), certificate()))
    assert watcher.reported == [{"default", "spiffe://demo.example/web"}]
    assert watcher.served == [dict.fromkeys(("default", "spiffe://demo.example/web"), certificate())]


def test_a_secret_that_is_withheld_leaves_its_name_and_comes_back() -> None:
    store = SecretStore(["default", "late"])
    store.publish({"default": certificate()})
    watcher = Watcher(store)
    with store.watching(watcher):
        assert store.withhold(["default", "late", "unknown"]) == {"default"}
        assert store.withhold(["default"]) == set()
        assert dict(store.snapshot) == {"default": None, "late": None}
        assert store.publish({"default": certificate()}) == {"default"}
    assert watcher.reported == [{"default"}, {"default"}]


# --- watchers ---


def test_a_watcher_reads_the_new_snapshot_when_it_is_called() -> None:
    store = SecretStore(["default"])
    watcher = Watcher(store)
    with store.watching(watcher):
        store.publish({"default": certificate(b"1")})
        store.publish({"default": certificate(b"2")})
    assert watcher.served == [{"default": certificate(b"1")}, {"default": certificate(b"2")}]


def test_a_watcher_that_has_left_is_not_called_even_after_an_error() -> None:
    store = SecretStore(["default"])
    watcher = Watcher(store)
    with pytest.raises(RuntimeError, match="the stream broke"), store.watching(watcher):
        raise RuntimeError("the stream broke")
    store.publish({"default": certificate()})
    assert watcher.reported == []
    assert store._watchers == {}


def test_one_watcher_may_watch_twice() -> None:
    """Two streams of one connection are two watchers, however alike."""
    store = SecretStore(["default"])
    watcher = Watcher(store)
    with store.watching(watcher):
        with store.watching(watcher):
            store.publish({"default": certificate(b"1")})
        store.publish({"default": certificate(b"2")})
    assert len(watcher.reported) == 3


def test_a_watcher_that_leaves_while_others_are_called_disturbs_none() -> None:
    store = SecretStore(["default"])
    last = Watcher(store)
    first = ExitStack()
    first.enter_context(store.watching(lambda _names: first.close()))
    with store.watching(last):
        store.publish({"default": certificate(b"1")})
        store.publish({"default": certificate(b"2")})
    assert len(last.reported) == 2


# --- who is waited for ---


def test_a_name_is_awaited_until_its_last_client_stops_waiting() -> None:
    store = SecretStore(["a", "b"])
    store.await_names("one", frozenset({"a", "b"}))
    store.await_names("other", frozenset({"b"}))
    assert store.awaited(["a"])
    assert store.awaited(["x", "b"])
    store.await_names("one", frozenset())
    assert not store.awaited(["a"])
    assert store.awaited(["b"])
    store.await_names("other", frozenset())
    store.await_names("other", frozenset())
    assert not store.awaited(["a", "b"])
    assert not store.awaited([])


def test_what_a_client_waits_for_now_takes_the_place_of_what_it_waited_for() -> None:
    store = SecretStore(["a", "b"])
    store.await_names("one", frozenset({"a", "b"}))
    store.await_names("one", frozenset({"b"}))
    assert not store.awaited(["a"])
    assert store.awaited(["b"])


# --- whatever happens ---

NAMES = ["a", "b", "c"]
secrets = st.binary(max_size=1).map(certificate) | st.binary(max_size=1).map(bundle)
changes = st.lists(
    st.tuples(st.just("publish"), st.dictionaries(st.sampled_from(NAMES), secrets))
    | st.tuples(st.just("withhold"), st.lists(st.sampled_from(NAMES)))
)


@given(changes)
def test_a_watcher_that_reads_what_it_is_called_with_is_never_behind(steps: list[tuple[str, Any]]) -> None:
    """No change is announced twice, and none is left out."""
    store = SecretStore(NAMES)
    seen = dict(store.snapshot)

    def look(names: frozenset[str]) -> None:
        assert names
        for name in names:
            new = store.snapshot[name]
            assert new != seen[name]
            seen[name] = new

    with store.watching(look):
        for what, argument in steps:
            getattr(store, what)(argument)
            assert seen == dict(store.snapshot)


# --- what clients have acknowledged ---


def test_a_client_is_outstanding_until_it_acknowledges_what_is_served_now() -> None:
    noted = Acknowledgements()
    assert noted.outstanding({"roots": "1"}) == 0, "without subscribers there is none to wait for"
    noted.note("envoy a", {"roots": "", "default": "7"})
    noted.note("envoy b", {"default": "7"})
    assert noted.outstanding({"roots": "1"}) == 1
    noted.note("envoy a", {"roots": "1", "default": "7"})
    assert (noted.outstanding({"roots": "1"}), noted.outstanding({"roots": "2"})) == (0, 1)
    noted.note("envoy a", {})
    assert noted.outstanding({"roots": "2"}) == 0


def test_many_that_wait_for_the_same_acknowledgements_cost_each_the_same() -> None:
    """As after a change of the CA: each workload waits for the same bundle, and each of as many Envoys takes it."""
    costs = list[float]()
    for count in (10, 40):
        noted = Acknowledgements()
        for number in range(count):
            noted.note(number, {"roots": "1"})
        with counted() as calls:
            found = [noted.outstanding({"roots": "2"}) for _ in range(count)]
        assert found == [count] * count
        costs.append(sum(calls.of.values()) / count)
    assert costs[1] <= 1.2 * costs[0]


def test_the_acknowledgements_are_reported_as_they_change_and_not_otherwise() -> None:
    noted, calls = Acknowledgements(), list[int]()
    with noted.watching(lambda: calls.append(1)):
        noted.note("envoy", {})
        noted.note("envoy", {"roots": "1"})
        noted.note("envoy", {"roots": "1"})
        noted.note("envoy", {})
    noted.note("envoy", {"roots": "2"})
    assert len(calls) == 2


# --- names that come and go ---


def test_names_change_hands_in_one_step_that_only_those_who_ask_for_them_see() -> None:
    """A workload goes, another takes its name, a third comes: what the rest serves is not announced."""
    store = SecretStore(["web", "api", "id-web"], ["spiffe://other"])
    store.publish({"web": certificate(b"old"), "id-web": certificate(b"old"), "api": certificate(b"api")})
    watcher = Watcher(store)
    with store.watching(watcher):
        names, optional = ["web", "api", "new"], ["spiffe://more"]
        changed = store.replace_names(names, optional, {"web": None, "new": certificate(b"new")})
    assert changed == {"web", "id-web", "new", "spiffe://other", "spiffe://more"}
    assert watcher.reported == [set(changed)]
    assert watcher.served == [
        {"web": None, "api": certificate(b"api"), "new": certificate(b"new"), "spiffe://more": None}
    ]
    assert store.missing == ("web",), "an optional name that is new keeps no agent from being ready"


def test_names_that_stay_announce_nothing() -> None:
    store = SecretStore(["web", "api"])
    store.publish({"web": certificate(b"old")})
    watcher = Watcher(store)
    with store.watching(watcher):
        assert store.replace_names(["api", "web"], [], {"web": certificate(b"old")}) == frozenset()
    assert watcher.reported == []
    assert tuple(store.snapshot) == ("api", "web"), "in the order of the configuration"
