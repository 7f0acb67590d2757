"""What a message of the Workload API says, whatever is in it."""

from itertools import permutations

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from fakes.workload_api import SpireCa, der, message
from hypothesis import example, given
from hypothesis import strategies as st
from sds_agent_proto.spiffe_pb2 import X509SvidsResponse

from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.authority.spiffe.wire import METADATA, METHOD, REQUEST, StreamEnd, WorkloadState, read_state
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.pki.certificates import read_pem
from sds_agent.pki.der import split
from sds_agent.pki.keyfile import read_private_key

CA, FOREIGN = SpireCa(), SpireCa("other.example")
WEB = "spiffe://demo.example/web"
SVIDS = [CA.svid(WEB), CA.svid(WEB, hint="internal"), CA.svid("spiffe://demo.example/api")]


def read(*svids: object, **federated: bytes) -> WorkloadState:
    sent = message(*svids, federated={f"spiffe://{name}": each for name, each in federated.items()})  # type: ignore[arg-type]
    return read_state(sent.SerializeToString(), "demo.example")


def test_the_call_is_the_one_of_the_standard() -> None:
    assert METHOD == "/SpiffeWorkloadAPI/FetchX509SVID"
    assert METADATA == (("workload.spiffe.io", "true"),)
    assert REQUEST == b""


def test_two_messages_that_say_the_same_are_equal_whatever_their_order() -> None:
    """Else each repeated message would look like a change."""
    states = [read(*order) for order in permutations(SVIDS)]
    assert all(state == states[0] for state in states)
    assert read(*SVIDS[:2]) != states[0]


def test_certificates_and_keys_are_the_same_in_pem() -> None:
    svid = CA.svid(WEB)
    supplied = read(svid).supplied(SpiffeId.parse(WEB), None, "api.sock")
    (leaf,) = read_pem(supplied.issuance.chain_pem)
    assert leaf.public_bytes(Encoding.DER) == svid.x509_svid
    assert read_private_key(supplied.private_key_pem).public_key() == leaf.public_key()


def test_a_chain_with_intermediates_stays_in_its_order() -> None:
    svid = CA.svid(WEB)
    svid.x509_svid += der((CA.ca.certificate, FOREIGN.ca.certificate))
    supplied = read(svid).supplied(SpiffeId.parse(WEB), None, "api.sock")
    assert read_pem(supplied.issuance.chain_pem)[1:] == (CA.ca.certificate, FOREIGN.ca.certificate)


def test_a_trust_domain_whose_name_begins_with_the_own_is_another() -> None:
    close = SpireCa("demo.example.org")
    state = read(CA.svid(WEB), close.svid("spiffe://demo.example.org/web"))
    assert read_pem(state.anchors("demo.example")) == (CA.ca.certificate,)


def test_no_form_of_a_state_shows_a_key() -> None:
    state = read(*SVIDS)
    assert repr(state) == "WorkloadState(...)"
    assert repr(state.svids[0]) == "Svid(...)"


GOOD = message(*SVIDS, federated={"spiffe://other.example": der((FOREIGN.ca.certificate,))}).SerializeToString()


def outcome(data: bytes) -> WorkloadState | AuthorityError:
    """What the message is; anything else that is raised would be a fault."""
    try:
        return read_state(data, "demo.example")
    except AuthorityError as error:
        return error


@given(st.binary(max_size=200))
@example(b"\x0a\xff\xff\xff\xff\x0f")
@example(X509SvidsResponse(svids=[{"spiffe_id": "\n"}]).SerializeToString())
def test_garbage_is_a_state_or_an_error_and_never_a_fault(data: bytes) -> None:
    found = outcome(data)
    assert isinstance(found, WorkloadState) or (found.kind is ErrorKind.INVALID and str(found).isprintable())


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_a_damaged_message_is_a_state_or_an_error_and_never_a_fault(at: int, byte: int) -> None:
    found = outcome(GOOD[:at] + bytes([byte]) + GOOD[at + 1 :])
    assert isinstance(found, WorkloadState) or (found.kind is ErrorKind.INVALID and str(found).isprintable())


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_values_in_der_are_split_as_they_were_joined(contents: list[bytes]) -> None:
    def value(content: bytes) -> bytes:
        size = len(content)
        length = bytes([size]) if size < 0x80 else b"\x82" + size.to_bytes(2, "big")
        return b"\x30" + length + content

    joined = [value(content) for content in contents]
    assert split(b"".join(joined), 5) == joined
    if joined:
        with pytest.raises(IndexError):
            split(b"".join(joined), len(joined) - 1)
        with pytest.raises(IndexError):
            split(b"".join(joined)[:-1], 5)


@pytest.mark.parametrize("code", ["CANCELLED", "UNKNOWN", "DEADLINE_EXCEEDED", "INTERNAL", "OK", "ABORTED", "NEW"])
def test_an_end_without_a_meaning_of_its_own_is_transient(code: str) -> None:
    error = StreamEnd(code).error("/run/api.sock")
    assert error.kind is ErrorKind.TRANSIENT
    assert str(error).startswith(f"the Workload API at /run/api.sock gives no certificate ({code}); ")
