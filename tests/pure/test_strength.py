"""Which keys are accepted where: the whole table, each row through the code that asks."""

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fakes.hierarchy import NOW, Key, common_name, make_ca, make_leaf

from sds_agent.pki.csr import CsrError, proven_key
from sds_agent.pki.keyfile import KeyFileError, read_private_key
from sds_agent.pki.keys import KeyType, generate
from sds_agent.pki.strength import IN_CHAINS, IN_FILES, IN_REQUESTS, IN_SECRETS, LARGEST_RSA, KeyFault, KeyRule
from sds_agent.pki.validation.rules import Times, fault_of_certificate

CHAIN, CA_FILE, CSR = "in a chain", "a CA's file", "a request"
EVERYWHERE = {CHAIN, CA_FILE, CSR}
NOWHERE = set[str]()
ROOT = make_ca("root")


def on(curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve)


KEYS: dict[str, tuple[Key, set[str]]] = {
    "P-192": (on(ec.SECP192R1()), NOWHERE),
    "P-224": (on(ec.SECP224R1()), {CHAIN}),
    "P-256": (on(ec.SECP256R1()), EVERYWHERE),
    "P-384": (on(ec.SECP384R1()), EVERYWHERE),
    "P-521": (on(ec.SECP521R1()), EVERYWHERE),
    "secp256k1": (on(ec.SECP256K1()), NOWHERE),
    "brainpoolP256r1": (on(ec.BrainpoolP256R1()), NOWHERE),
    "brainpoolP512r1": (on(ec.BrainpoolP512R1()), NOWHERE),
    "RSA 1024": (rsa.generate_private_key(65537, 1024), NOWHERE),  # noqa: S505 - weak on purpose
    "RSA 2040": (rsa.generate_private_key(65537, 2040), NOWHERE),  # noqa: S505 - weak on purpose
    "RSA 2048": (rsa.generate_private_key(65537, 2048), EVERYWHERE),
    "RSA 3072": (rsa.generate_private_key(65537, 3072), EVERYWHERE),
    "Ed25519": (ed25519.Ed25519PrivateKey.generate(), {CHAIN}),
    "Ed448": (ed448.Ed448PrivateKey.generate(), {CHAIN}),
}


def in_chain(key: Key) -> bool:
    """Whether the key of a certificate is good; of kinds but EC and RSA it is the signatures that are not."""
    return fault_of_certificate(make_leaf(ROOT, key=key), Times(NOW, timedelta(0))) is None


def in_ca_file(key: Key) -> bool:
    try:
        read_private_key(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    except KeyFileError:
        return False
    return True


def in_request(key: Key) -> bool:
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey) else hashes.SHA256()
    csr = x509.CertificateSigningRequestBuilder(common_name("x")).sign(key, digest)
    try:
        proven_key(csr.public_bytes(Encoding.PEM))
    except CsrError:
        return False
    return True


@pytest.mark.parametrize(("key", "accepted"), KEYS.values(), ids=KEYS)
def test_each_place_accepts_the_keys_that_it_should_and_no_others(key: Key, accepted: set[str]) -> None:
    found = {CHAIN: in_chain(key), CA_FILE: in_ca_file(key), CSR: in_request(key)}
    assert {place for place, good in found.items() if good} == accepted


@pytest.mark.parametrize("rule", [IN_CHAINS, IN_FILES, IN_REQUESTS], ids=[CHAIN, CA_FILE, CSR])
def test_each_rule_begins_at_2048_bits_and_only_that_of_requests_ends(rule: KeyRule) -> None:
    """A giant key of a CA costs its owner, one in a request costs the CA."""
    good = [bits for bits in (2047, 2048, LARGEST_RSA, LARGEST_RSA + 1, 16384) if rule.fault(public_rsa(bits)) is None]
    assert good == ([2048, LARGEST_RSA] if rule is IN_REQUESTS else [2048, LARGEST_RSA, LARGEST_RSA + 1, 16384])


@pytest.mark.parametrize("rule", [IN_CHAINS, IN_FILES, IN_REQUESTS, IN_SECRETS], ids=[CHAIN, CA_FILE, CSR, "a secret"])
def test_each_rule_refuses_an_rsa_key_whose_exponent_envoy_does_not_load(rule: KeyRule) -> None:
    assert rule.fault(public_rsa(2048, 2**33 - 1)) is None
    assert rule.fault(public_rsa(2048, 2**33 + 1)) == KeyFault(
        "an RSA key with a public exponent of 34 bits", "one with the exponent 65537"
    )


def public_rsa(bits: int, exponent: int = 65537) -> rsa.RSAPublicKey:
    """A modulus without a private key: to find two primes takes many seconds."""
    return rsa.RSAPublicNumbers(exponent, (1 << (bits - 1)) + 1).public_key()


def test_a_workloads_key_on_p521_is_refused_with_the_curves_that_envoys_take_of_each_other() -> None:
    assert {name for name, (key, _) in KEYS.items() if IN_SECRETS.fault(key) is None} == {
        "P-256",
        "P-384",
        "RSA 2048",
        "RSA 3072",
    }
    assert IN_SECRETS.fault(KEYS["P-521"][0]) == KeyFault("a key on the curve secp521r1", "one on P-256 or P-384")
    assert IN_FILES.fault(KEYS["P-224"][0]) == KeyFault("a key on the curve secp224r1", "one on P-256, P-384 or P-521")


@pytest.mark.parametrize("kind", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
def test_every_key_that_this_project_makes_is_accepted_everywhere(kind: KeyType) -> None:
    """Else an agent could ask a CA in its own process for what that CA refuses."""
    key = generate(kind)
    assert in_chain(key)
    assert in_ca_file(key)
    assert in_request(key)
