"""What a workload's certificate may be used for, in the bare programs that make some to compare with."""

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

KEY_USAGE = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
BOTH_ENDS = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
"""Of a TLS connection: for the extended key usage."""
