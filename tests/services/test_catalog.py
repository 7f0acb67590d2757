"""The catalog: each secret encoded once for all streams, and no key stored longer than it is served."""

from datetime import UTC, datetime

import pytest

from sds_agent.sds.catalog import MOST_FORMER, Catalog
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
    assert service._catalog._former == {}, "nobody uses it"


ONE, TWO, THREE = (certificate(content) for content in (b"1", b"2", b"3"))


def renewed(store: SecretStore, catalog: Catalog, *secrets: CertificateSecret) -> None:
    """Serve these, one after another, to Envoys that ask for them."""
    for secret in secrets:
        assert isinstance(catalog["default"], Resource)
        store.publish({"default": secret})
        catalog.change(["default"], ["default"])


def test_what_envoys_use_is_kept_for_those_that_refuse_the_newer_one(store: SecretStore) -> None:
    catalog = Catalog(store)
    used = catalog["default"]
    renewed(store, catalog, TWO, THREE)
    assert catalog.former("default", ONE.version) is used
    catalog.release(lambda _: {ONE.version, THREE.version})
    assert catalog.former("default", ONE.version) is used
    assert catalog.former("default", TWO.version) is None, "nobody uses it"
    catalog.release(lambda _: {THREE.version})
    assert catalog._former == {}, "nor its key"


@pytest.mark.parametrize("change", ["withheld", "removed"])
def test_what_envoys_used_is_forgotten_with_the_secret(store: SecretStore, change: str) -> None:
    catalog = Catalog(store)
    renewed(store, catalog, TWO)
    if change == "withheld":
        store.withhold(["default"])
    else:
        store.replace_names(["late"], [], {})
    catalog.change(["default"], ["default"])
    assert catalog._former == {}


def test_a_name_that_goes_to_another_owner_has_no_former_secret(store: SecretStore) -> None:
    """Its key is that of another SPIFFE ID."""
    catalog = Catalog(store)
    renewed(store, catalog, TWO)
    with store.watching(lambda names: catalog.change(names, names)):
        store.replace_names(store.names, [], {"default": THREE})
        assert catalog._former == {}
        store.publish({"default": ONE})
        assert list(catalog._former["default"]) == [THREE.version]
        store.replace_names(["default"], [], {})
        assert list(catalog._former["default"]) == [THREE.version], "it goes on as it was"


def test_what_is_served_again_is_no_former_secret(store: SecretStore) -> None:
    catalog = Catalog(store)
    renewed(store, catalog, TWO, ONE)
    assert list(catalog._former["default"]) == [TWO.version]


def test_the_number_of_former_secrets_is_bounded(store: SecretStore) -> None:
    """Envoys that never reply could make the agent keep each key that it has had."""
    catalog, secrets = Catalog(store), [certificate(b"%d" % number) for number in range(2 * MOST_FORMER)]
    renewed(store, catalog, *secrets)
    assert list(catalog._former["default"]) == [each.version for each in secrets[-MOST_FORMER - 1 : -1]]


def test_a_secret_that_an_envoy_uses_is_not_forgotten_for_those_that_it_refuses(store: SecretStore) -> None:
    """Many in a few seconds, such as a file that is written again and again."""
    catalog, refused = Catalog(store), [certificate(b"%d" % number) for number in range(2, 2 * MOST_FORMER)]
    for secret in refused:
        assert isinstance(catalog["default"], Resource)
        store.publish({"default": secret})
        catalog.change(["default"], ["default"], lambda _: {ONE.version})
    assert list(catalog._former["default"]) == [ONE.version, *[each.version for each in refused[-MOST_FORMER:-1]]]


def test_an_answer_makes_no_copy_of_all_that_is_served(store: SecretStore) -> None:
    """A snapshot of twenty thousand names is copied at the next change, for each Envoy that was answered between."""
    service = SecretDiscoveryService(store)
    for number in range(2):
        store.publish({"default": certificate(b"%d" % number)})
        assert service._journal.label("default") == "default"
        assert service._journal.label("of no configuration") == SdsCounts.OTHERS
    assert store._snapshot is None, "nobody has taken one"
