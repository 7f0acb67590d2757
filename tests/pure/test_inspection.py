"""Inspected secrets in istioctl's shapes, and how two of them differ: scripts and people at night rely on each word."""

import base64
import json
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fakes.hierarchy import NOW
from msgspec.structs import replace

from sds_agent.inspection.istioctl import HEAD, dump, rows
from sds_agent.inspection.secrets import InspectedSecret, certificates_only, difference, ordered
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.keys import KeyType, generate
from sds_agent.signing.signer import make_root

HOUR = timedelta(hours=1)
KEY = generate(KeyType.EC_P256)
CA = make_root(KEY, "demo.example", NOW, 10 * HOUR)
LATER_CA = make_root(generate(KeyType.EC_P256), "demo.example", NOW, 20 * HOUR)


def leaf(after: timedelta) -> bytes:
    return write_pem([CA.sign_leaf(KEY.public_key(), "spiffe://demo.example/web", NOW + after, HOUR)])


OLD, NEW = (
    InspectedSecret(name="web", state="ACTIVE", kind="certificate", pem=leaf(after), version="v1")
    for after in (timedelta(0), HOUR)
)
ROOTS = InspectedSecret(name="ROOTCA", state="ACTIVE", kind="bundle", pem=write_pem([CA.certificate]), version="v2")
WAITING = InspectedSecret(name="late", state="WARMING", detail="it is not issued yet")


def test_the_first_certificate_and_the_first_bundle_are_where_istioctls_users_look() -> None:
    found = dump([ROOTS, WAITING, OLD, replace(OLD, name="other")])
    active = found["dynamicActiveSecrets"]
    assert [each["name"] for each in active] == ["web", "ROOTCA", "other"]
    chain = active[0]["secret"]["tlsCertificate"]["certificateChain"]["inlineBytes"]
    assert base64.b64decode(chain) == OLD.pem
    assert base64.b64decode(active[1]["secret"]["validationContext"]["trustedCa"]["inlineBytes"]) == ROOTS.pem
    assert [each["name"] for each in found["dynamicWarmingSecrets"]] == ["late"]


def test_the_private_key_is_always_redacted() -> None:
    key = dump([OLD])["dynamicActiveSecrets"][0]["secret"]["tlsCertificate"]["privateKey"]["inlineBytes"]
    assert base64.b64decode(key) == b"[redacted]"
    assert "PRIVATE" not in json.dumps(dump([OLD, ROOTS]))


def test_a_private_key_in_a_chain_is_left_out() -> None:
    key = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    found = certificates_only(b"a note\n" + key + OLD.pem + key + ROOTS.pem + b"-----BEGIN PRIVATE KEY-----\nMII")
    assert found == OLD.pem + ROOTS.pem
    assert certificates_only(key) == b""
    assert certificates_only(OLD.pem[:-20] + key) == b"", "a certificate without an end may have anything in it"


def test_a_refused_secret_is_not_among_the_active_ones() -> None:
    found = dump([replace(OLD, state="REJECTED", detail="no"), ROOTS])
    assert [each["name"] for each in found["dynamicActiveSecrets"]] == ["ROOTCA"]
    assert found["dynamicWarmingSecrets"][0]["errorState"] == {"details": "no"}


def test_the_table_has_istioctls_columns() -> None:
    assert HEAD == ("RESOURCE NAME", "TYPE", "STATUS", "VALID CERT", "SERIAL NUMBER", "NOT AFTER", "NOT BEFORE")
    certificate, bundle, waiting = rows([OLD, ROOTS, WAITING], NOW + timedelta(minutes=1))
    serial = f"{read_pem(OLD.pem)[0].serial_number:x}"
    assert certificate[:5] == ("web", "Cert Chain", "ACTIVE", "true", serial)
    assert bundle[:4] == ("ROOTCA", "CA", "ACTIVE", "true")
    assert waiting == ("late", "", "WARMING", "false", "", "", "")
    assert rows([OLD], NOW + 2 * HOUR)[0][3] == "false"


def test_a_secret_that_cannot_be_read_is_not_valid() -> None:
    assert rows([replace(OLD, pem=b"-----BEGIN")], NOW)[0][3:5] == ("false", "")


def test_nothing_is_lost_by_the_order() -> None:
    assert ordered([]) == ()
    assert ordered([WAITING]) == (WAITING,)
    assert ordered([OLD, NEW, ROOTS]) == (OLD, ROOTS, NEW)


def other_root() -> InspectedSecret:
    return replace(ROOTS, pem=write_pem([CA.certificate, LATER_CA.certificate]))


@pytest.mark.parametrize(
    ("served", "used", "same", "words"),
    [
        (OLD, OLD, True, "both have the certificate"),
        (NEW, OLD, False, "Envoy is behind: the agent serves the certificate"),
        (OLD, NEW, False, "the agent is behind"),
        (ROOTS, ROOTS, True, "both have 1 root ("),
        (other_root(), ROOTS, False, "Envoy is behind: the agent serves 2 roots"),
        (NEW, replace(NEW, state="REJECTED"), False, "Envoy refuses the certificate"),
        (OLD, None, False, "does not ask for it"),
        (OLD, replace(OLD, pem=b"", state="WARMING"), False, "Envoy has nothing yet"),
        (ROOTS, replace(ROOTS, pem=b""), False, "they cannot be compared"),
        (WAITING, OLD, False, "the agent has none to give, and Envoy uses the certificate"),
        (WAITING, WAITING, False, "waits for it"),
        (replace(WAITING, state="UNKNOWN"), OLD, False, "the agent does not serve it"),
        (replace(WAITING, state="DENIED"), OLD, False, "ask as the user that this Envoy runs as"),
        (
            replace(OLD, pem=b""),
            OLD,
            False,
            "cannot be compared: the agent serves nothing that can be read, Envoy uses the",
        ),
        (replace(ROOTS, pem=b""), ROOTS, False, "the agent serves nothing that can be read, Envoy uses 1 root ("),
    ],
)
def test_a_difference_says_who_is_behind(
    served: InspectedSecret, used: InspectedSecret | None, same: bool, words: str
) -> None:
    found = difference(served, used)
    assert (found.name, found.same) == (served.name, same)
    assert words in found.text
