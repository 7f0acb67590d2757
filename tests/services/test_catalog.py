"""The catalog: each secret encoded once for all streams, and no key stored longer than it is served."""

from datetime import UTC, datetime

import pytest

from sds_agent.sds.catalog import Catalog
from sds_agent.sds.counts import SdsCounts
from sds_agent.sds.protocol import Absence, Resource
from sds_agent.sds.service import SecretDiscoveryService
from sds_agent.secrets.model import CertificateSecret
from sds_agent.secrets.store import SecretStore


def certificate(chain: bytes) -> CertificateSecret:
    return CertificateSecret(chain, b"key", datetime(2036, 1, 1, tzinfo=UTC))


@pytest.fixture
def store() -> SecretStore:
    store = SecretStore(["default", "late"])
    store.publish({"default": certificate(b"1")})
    return store


def test_it_knows_what_is_there_what_is_not_yet_and_what_never_is(store: SecretStore) -> None:
    catalog = Catalog(store)
    found = catalog["default"]
    assert isinstance(found, Resource)
    assert (found.name, found.version) == ("default", certificate(b"1").version)
    assert (catalog["late"], catalog["nobody"]) == (Absence.PENDING, Absence.UNKNOWN)
    assert catalog.names == ("default", "late")


def test_a_secret_is_encoded_once_for_all_who_ask(store: SecretStore) -> None:
    """500 Envoys that ask for one certificate share its bytes."""
    catalog = Catalog(store)
    first = catalog["default"]
    assert catalog["default"] is first
    store.publish({"late": certificate(b"2")})
    assert catalog["default"] is first


def test_a_new_secret_takes_the_place_of_the_old(store: SecretStore) -> None:
    catalog = Catalog(store)
    first = catalog["default"]
    store.publish({"default": certificate(b"2")})
    second = catalog["default"]
    assert isinstance(first, Resource)
    assert isinstance(second, Resource)
    assert b"2" in second.sotw
    assert first.version != second.version


@pytest.mark.parametrize("change", ["renewed", "withheld", "removed"])
def test_a_key_that_is_no_longer_served_is_not_stored(store: SecretStore, change: str) -> None:
    """Also where no stream asks for anything again."""
    service = SecretDiscoveryService(store)
    assert isinstance(service._catalog["default"], Resource)
    match change:
        case "renewed":
            store.publish({"default": certificate(b"2")})
        case "withheld":
            store.withhold(["default"])
        case "removed":
            store.replace_names(["late"], [], {})
    assert service._catalog._encoded == {}


def test_an_answer_makes_no_copy_of_all_that_is_served(store: SecretStore) -> None:
    """A snapshot of twenty thousand names is copied at the next change, for each Envoy that was answered between."""
    service = SecretDiscoveryService(store)
    for number in range(2):
        store.publish({"default": certificate(b"%d" % number)})
        assert service._journal.label("default") == "default"
        assert service._journal.label("of no configuration") == SdsCounts.OTHERS
    assert store._snapshot is None, "nobody has taken one"
