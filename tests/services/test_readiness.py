"""Readiness: an agent that cannot give every workload its certificate says so, and says so once."""

from collections.abc import Iterator
from datetime import UTC, datetime

import anyio
import pytest
from fakes.events import Events, recorded

from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.readiness import complete, watched
from sds_agent.secrets.store import SecretStore

SECRET = CertificateSecret(b"chain", b"key", datetime(2036, 1, 1, tzinfo=UTC))


@pytest.fixture
def events() -> Iterator[Events]:
    with recorded() as events:
        yield events


def test_what_has_no_secret_is_missing() -> None:
    store = SecretStore(["default", "ROOTCA"])
    store.publish({"default": SECRET})
    assert store.missing == ("ROOTCA",)


async def test_an_agent_is_ready_without_the_bundle_of_another_trust_domain() -> None:
    """Its anchors come when the other side gives them, which may be never."""
    store = SecretStore(["default"], ["spiffe://other.example"])
    assert set(store.snapshot) == {"default", "spiffe://other.example"}
    store.publish({"default": SECRET})
    assert store.missing == ()
    with anyio.fail_after(10):
        await complete(store)


def test_readiness_is_logged_when_it_comes_and_when_it_goes_and_not_in_between(events: Events) -> None:
    store = SecretStore(["default", "ROOTCA"])
    with watched(store):
        assert events.seen == [{"event": "not_ready", "level": "warning", "without_secret": ["default", "ROOTCA"]}]
        events.seen.clear()
        store.publish({"ROOTCA": BundleSecret(b"1")})
        assert events.seen == []
        store.publish({"default": SECRET})
        store.publish({"ROOTCA": BundleSecret(b"2")})
        assert events.seen == [{"event": "ready", "level": "info"}]
        events.seen.clear()
        store.withhold(["default"])
        store.withhold(["ROOTCA"])
        assert events.seen == [{"event": "not_ready", "level": "warning", "without_secret": ["default"]}]
    events.seen.clear()
    store.publish({"default": SECRET, "ROOTCA": BundleSecret(b"1")})
    assert events.seen == [], "an agent that has ended logs nothing"


def test_an_agent_that_begins_ready_says_so(events: Events) -> None:
    store = SecretStore(["default"])
    store.publish({"default": SECRET})
    with watched(store):
        assert [event["event"] for event in events.seen] == ["ready"]
