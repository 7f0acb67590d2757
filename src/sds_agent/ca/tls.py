"""The CA server's own TLS: a certificate that it issues to itself and renews, and the context of a handshake.

A context keeps what it was made with: the certificate, and the anchors for clients' certificates. So a new one is made
whenever the signer, its roots or the certificate change, and every handshake uses the newest.
"""

import logging
import ssl
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from sds_agent import log
from sds_agent.ca.anchors import anchors_of
from sds_agent.pki import openssl
from sds_agent.pki.certificates import describe, extension, serial_hex, write_pem
from sds_agent.pki.keys import PublicKey, to_pkcs8_pem
from sds_agent.pki.validation.constraints import ConstrainedName, violation
from sds_agent.pki.validation.signatures import fault_of_signature
from sds_agent.signing.signer import Signer, SignerError
from sds_agent.signing.signing_set import SigningSet
from sds_agent.values import Sensitive

LOG = logging.getLogger(__name__)

LIFETIME = timedelta(hours=24)


class _Made(Sensitive, frozen=True):
    signer: x509.Certificate
    chain: tuple[x509.Certificate, ...]
    key_pem: bytes
    renew_at: datetime

    @property
    def sent(self) -> tuple[x509.Certificate, ...]:
        """The chain, with the root where that signed it.

        OpenSSL would send that root as well, but look for it and verify it in each handshake: a fifth of its time.
        """
        return self.chain if len(self.chain) > 1 else (*self.chain, self.signer)

    def is_of(self, signing: SigningSet) -> bool:
        """Whether it was issued with that signer and has that chain: a CA above a signer may be issued anew."""
        return (self.signer, self.chain[1:]) == (signing.signer.certificate, signing.intermediates)

    @property
    def begins(self) -> datetime:
        """Its NotBefore, which lies in the future once a clock that was ahead is corrected."""
        return self.chain[0].not_valid_before_utc


class ServerTls:
    """Makes contexts for handshakes. `current` returns the signing set of the moment, `now` the time."""

    def __init__(
        self,
        current: Callable[[], SigningSet],
        names: Sequence[str],
        now: Callable[[], datetime],
        *,
        ask_client: bool,
        lifetime: timedelta = LIFETIME,
    ) -> None:
        self._current = current
        self._names = tuple(names)
        self._now = now
        self._ask_client = ask_client
        self._lifetime = lifetime
        self._made: _Made | None = None
        self._signing: SigningSet | None = None
        self._anchors: tuple[x509.Certificate, ...] = ()
        self._context: ssl.SSLContext | None = None
        self._not_loaded = log.LogOnChange(LOG, "anchors_left_out")
        # tried again at each handshake, and anyone may begin one
        self._not_renewed = log.LogOnChange(LOG, "server_certificate_not_renewed")

    def context(self) -> ssl.SSLContext:
        """The newest context. Raises SignerError when there is no certificate yet and none can be issued."""
        signing = self._current()
        made = self._certificate(signing)
        anchors = self._anchors if signing is self._signing else anchors_of(signing).usable
        if self._context is None or made is not self._made or anchors != self._anchors:
            self._context = self._renewed(made, anchors if self._ask_client else ())
        self._signing, self._made, self._anchors = signing, made, anchors
        return self._context

    def _renewed(self, made: _Made, anchors: Sequence[x509.Certificate]) -> ssl.SSLContext:
        """A context with these, or the one before where OpenSSL does not load the certificate."""
        try:
            context = _context(made)
        except SignerError as error:
            if self._context is None:
                raise
            self._not_renewed.report(str(error))
            return self._context
        if anchors:
            context.verify_mode = ssl.CERT_OPTIONAL
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an anchor need not be self-signed
            left_out = tuple(openssl.trust(context, anchors))
            self._not_loaded.report(left_out, effect="no caller's certificate is taken because of them")
        return context

    def _certificate(self, signing: SigningSet) -> _Made:
        now, made = self._now(), self._made
        if made is not None and made.is_of(signing) and made.begins <= now < made.renew_at:
            return made
        try:
            issued = self._issue(signing, now)
        except SignerError as error:
            if made is None:
                raise
            self._not_renewed.report(str(error))
            return made
        self._not_renewed.resolved()
        return issued

    def _issue(self, signing: SigningSet, now: datetime) -> _Made:
        if fault := fault_of_names(self._names, signing):
            raise SignerError(f"{fault}; give server_names that are permitted, or another signer")
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = sign_server(signing.signer, key.public_key(), self._names, now, self._lifetime)
        log.event(LOG, "server_certificate", serial=serial_hex(leaf), not_after=leaf.not_valid_after_utc)
        renew_at = now + (leaf.not_valid_after_utc - now) / 2
        return _Made(signing.signer.certificate, (leaf, *signing.intermediates), to_pkcs8_pem(key), renew_at)


def sign_server(
    signer: Signer, public_key: PublicKey, names: Sequence[str], now: datetime, lifetime: timedelta
) -> x509.Certificate:
    """A TLS server's certificate for DNS names and IP addresses (RFC 6125 section 6.4). Raises SignerError."""
    return signer.sign(public_key, map(_general_name, names), [ExtendedKeyUsageOID.SERVER_AUTH], now, lifetime)


def fault_of_names(names: Iterable[str], signing: SigningSet) -> str | None:
    """Which DNS name of the server the name constraints above its certificate rule out, or None.

    For one such name a client refuses the whole certificate. What is an IP address is left to the clients, which differ
    in whether they judge those.
    """
    hosts = [(x509.DNSName, name.value) for name in map(_general_name, names) if isinstance(name, x509.DNSName)]
    above = signing.intermediates or (signing.signer.certificate,)
    anchors = [root for root in signing.roots if fault_of_signature(above[-1], root) is None]
    faults = [_fault_of_hosts(hosts, each) for each in above]
    of_anchors = [_fault_of_hosts(hosts, each) for each in anchors]
    if None not in of_anchors:  # a client needs one of them
        faults += of_anchors
    return next(filter(None, faults), None)


def _fault_of_hosts(hosts: Iterable[ConstrainedName], ca: x509.Certificate) -> str | None:
    constraints = extension(ca, x509.NameConstraints)
    fault = None if constraints is None else violation(constraints, hosts)
    return (
        fault and f"the name constraints of {describe(ca)} {fault}, so clients would refuse this server's certificate"
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _context(made: _Made) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    # a resumed session would bring back a client certificate without verifying it again, and HTTP/2 forbids
    # renegotiation (RFC 9113 section 9.2.1), for which a write would have to wait
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    try:
        openssl.load_certificate(context, write_pem(made.sent) + made.key_pem)
    except ssl.SSLError as error:
        raise SignerError(
            f"OpenSSL does not load the certificate that {describe(made.signer)} signs for this server, or its chain "
            f"({error.reason}): have the CA issued anew"
        ) from error
    return context
