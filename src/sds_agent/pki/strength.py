"""Which keys are strong enough, and of a kind that Envoy takes: one table, and by it a rule for each place that asks.

Envoy's TLS library takes RSA keys, and EC keys on the curves of `CURVES`; Ed448, DSA, secp256k1 and Brainpool were
refused when tried on 1.40. In a chain, a key that is neither RSA nor EC is judged by the algorithm of its signatures
(`validation.signatures`).
"""

from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from msgspec import Struct

SMALLEST_RSA = 2048
"""Bits. They stand for 112 bits of strength, as P-224 and SHA-224 do (NIST SP 800-57 part 1, section 5.6.1)."""
LARGEST_RSA = 8192
"""Bits. The time that a signature takes to check grows with their square."""
LONGEST_EXPONENT = 33
"""Bits of an RSA key's public exponent: with longer ones BoringSSL loads no key (rsa_check_public_key)."""
CURVES = {"secp224r1": "P-224", "secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
"""What Envoy takes, by cryptography's names and by those that people use (FIPS 186-5)."""

# TLS 1.3 has no signatures with P-224 (RFC 8446 section 4.2.3), so a chain may have one and a new key may not
_OF_NEW_KEYS = {name: title for name, title in CURVES.items() if name != "secp224r1"}


class KeyFault(NamedTuple):
    """What a key is, where it is refused, and what is wanted: `an RSA key of 1024 bits`, `one of 2048 bits or more`."""

    found: str
    wanted: str


class KeyRule(Struct, frozen=True):
    """The curves and sizes that one place accepts; `others` are keys that are neither EC nor RSA."""

    curves: frozenset[str]
    smallest_rsa: int = SMALLEST_RSA
    largest_rsa: int | None = None
    others: bool = False

    def fault(self, key: object) -> KeyFault | None:
        """What is wrong with a private or public key, or None."""
        match key:
            case ec.EllipticCurvePublicKey(curve=curve) | ec.EllipticCurvePrivateKey(curve=curve):
                return None if curve.name in self.curves else KeyFault(f"a key on the curve {curve.name}", self._named)
            case rsa.RSAPrivateKey():
                return self._fault_of_rsa(key.public_key())
            case rsa.RSAPublicKey():
                return self._fault_of_rsa(key)
        return None if self.others else KeyFault("a key that is neither an EC nor an RSA key", "an EC or RSA key")

    def _fault_of_rsa(self, key: rsa.RSAPublicKey) -> KeyFault | None:
        if not self._has_size(key.key_size):
            return KeyFault(f"an RSA key of {key.key_size} bits", f"one of {self._sizes}")
        if (longest := key.public_numbers().e.bit_length()) > LONGEST_EXPONENT:
            return KeyFault(f"an RSA key with a public exponent of {longest} bits", "one with the exponent 65537")
        return None

    def _has_size(self, size: int) -> bool:
        return size >= self.smallest_rsa and (self.largest_rsa is None or size <= self.largest_rsa)

    @property
    def _named(self) -> str:
        names = ", ".join(title for name, title in _OF_NEW_KEYS.items() if name in self.curves)
        return f"one on {' or '.join(names.rsplit(', ', 1))}"

    @property
    def _sizes(self) -> str:
        return f"{self.smallest_rsa} {'bits or more' if self.largest_rsa is None else f'to {self.largest_rsa} bits'}"


IN_CHAINS = KeyRule(frozenset(CURVES), others=True)
"""For the key of any certificate in a chain: what Envoy takes is taken, unless it is weak."""
USABLE = KeyRule(frozenset(CURVES), smallest_rsa=512, others=True)
"""For the key of an anchor above a good chain, where Envoy goes on to it: what Envoy takes, weak or not."""
IN_FILES = KeyRule(frozenset(_OF_NEW_KEYS))
"""For a private key that is read from a file."""
IN_REQUESTS = KeyRule(frozenset(_OF_NEW_KEYS), largest_rsa=LARGEST_RSA)
"""For the key of a CSR, which costs time to verify: its sender must not choose how much."""
IN_SECRETS = KeyRule(frozenset({"secp256r1", "secp384r1"}), largest_rsa=LARGEST_RSA)
"""For a workload's key that was made elsewhere. Envoy loads one on P-521, and no other Envoy takes its signatures."""
