"""The files of a CA that is plugged in, as Istio lays them out, judged as values.

`ca-cert.pem` is the signer, `ca-key.pem` its key, `root-cert.pem` the trust anchors, `cert-chain.pem` what leads from
the signer up, `ca-crl.pem` (which may be missing) revocation lists. cert-manager's names are `tls.crt`, `tls.key` and
`ca.crt`; a directory with a `tls.crt` is read by these, as istiod does.

All problems are reported at once. That the pieces work together is proved by signing (`reach`). A certificate that
cannot be used, or that Envoy would not load, is left out where it is not needed.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime

from cryptography import x509
from cryptography.x509.oid import PublicKeyAlgorithmOID
from msgspec import Struct

from sds_agent.errors import Problem, ProblemsError
from sds_agent.pki.certificates import (
    CertificateError,
    describe,
    describe_name,
    describe_time,
    has_key,
    longest_valid_first,
    read_bundle,
    subject_alternative_uris,
    unique,
    write_pem,
)
from sds_agent.pki.forms import without_certificate
from sds_agent.pki.keyfile import (
    EXPLICIT_CURVE,
    EXPLICIT_REFUSED,
    PSS_REFUSED,
    KeyFileError,
    read_private_key,
)
from sds_agent.pki.keys import PrivateKey
from sds_agent.pki.validation.revocation import RevocationList, RevocationListError, fault_of_list, read_crls, revoked
from sds_agent.pki.validation.rules import fault_of_ca_flag, fault_of_key_usage
from sds_agent.signing.reach import Prover, Reach, ReachError
from sds_agent.signing.signer import Signer
from sds_agent.signing.signing_set import LARGEST_ANSWER, ROOM_FOR_LEAF, SigningSet

Certificates = tuple[x509.Certificate, ...]


class Layout(Struct, frozen=True):
    """The names of the files. Without a `chain` the signer's file holds the certificates above it too."""

    signer: str
    key: str
    roots: str
    chain: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """The files without which there is no CA."""
        return (self.signer, self.key, self.roots, *([self.chain] if self.chain else []))


CHAIN_FILE = "cert-chain.pem"
CRL_FILE = "ca-crl.pem"
ISTIO = Layout("ca-cert.pem", "ca-key.pem", "root-cert.pem", CHAIN_FILE)
CERT_MANAGER = Layout("tls.crt", "tls.key", "ca.crt")
FILES = (*ISTIO.required, CRL_FILE, *CERT_MANAGER.required)
"""Every name that counts; other files in the directory are ignored."""


def layout_of(files: Mapping[str, bytes]) -> Layout:
    """The layout that these files have."""
    return CERT_MANAGER if CERT_MANAGER.signer in files else ISTIO


def read_signing_set(
    files: Mapping[str, bytes],
    now: datetime,
    *,
    passphrase: bytes | None = None,
    trust_domain: str | None = None,
    lists: bool = True,
) -> SigningSet:
    """The CA that these files (contents by name) make. Raises ProblemsError with everything that is wrong.

    With a `trust_domain` the name constraints must allow its IDs; without one they must allow those of some domain
    (`reach`). Without `lists` the set has no revocation lists, and what is wrong with them is `left_out`.
    """
    reading = _FilesReader(files, layout_of(files), lists=lists)
    signing = reading.signing_set(now, passphrase, trust_domain) if not reading.incomplete() else None
    if signing is None or reading.problems:
        raise ProblemsError(reading.problems)
    return signing


class _FilesReader:
    """One pass over the files, and the problems that it found."""

    def __init__(self, files: Mapping[str, bytes], layout: Layout, *, lists: bool) -> None:
        self._files = files
        self._layout = layout
        self._lists = lists
        self._left_out: dict[str, tuple[str, ...]] = {}
        self.problems: list[Problem] = []

    def refuse(self, where: str, found: str, fix: str) -> None:
        self.problems.append(Problem((where,), found, fix))

    def incomplete(self) -> bool:
        """Refuse a set that lacks a file: it may be half written."""
        present = [name for name in FILES if name in self._files]
        if not present:
            wanted = f"{', '.join(ISTIO.required)} or {', '.join(CERT_MANAGER.required)}"
            self.problems.append(Problem((), "holds none of a CA's files", f"put there {wanted}"))
        missing = [name for name in self._layout.required if name not in self._files]
        for name in missing if present else []:
            self.refuse(name, "is missing", f"put it beside {', '.join(present)}: {_PURPOSE[name]}")
        return bool(missing)

    def signing_set(self, now: datetime, passphrase: bytes | None, trust_domain: str | None) -> SigningSet | None:
        layout = self._layout
        key = self._key(layout.key, passphrase)
        own = self._certificates(layout.signer)
        above = self._certificates(layout.chain) if layout.chain else ()
        roots = self._certificates(layout.roots)
        crls = self._crls((*own, *above, *roots))
        if not own:
            return None
        certificate = self._signer(own, key, now)
        if key is None or not roots or self.problems:
            return None
        signer, anchors = Signer(certificate, key), longest_valid_first(roots)
        chain = self._proved(Prover(signer, unique((*own, *above)), anchors, now), trust_domain)
        return (
            None
            if chain is None or self._too_large(chain, anchors)
            else SigningSet(signer, chain, anchors, crls, self._all_left_out())
        )

    def _key(self, name: str, passphrase: bytes | None) -> PrivateKey | None:
        try:
            return read_private_key(self._files[name], passphrase)
        except KeyFileError as error:
            self.problems.append(error.problem.within(name))
        return None

    def _certificates(self, name: str) -> Certificates:
        try:
            reading = read_bundle(self._files[name])
        except CertificateError as error:
            self.refuse(name, f"cannot be read ({error})", "write it anew in PEM, or have the certificate issued anew")
            return ()
        self._left_out[name] = reading.left_out
        if not reading.certificates:
            self.problems.append(without_certificate(self._files[name], _PURPOSE[name]).within(name))
        return reading.certificates

    def _all_left_out(self, *names: str) -> tuple[str, ...]:
        """What was left out of these files, or of all."""
        chosen = names or tuple(self._left_out)
        return tuple(f"{name}: {each}" for name in chosen for each in self._left_out.get(name, ()))

    def _crls(self, known: Certificates) -> tuple[RevocationList, ...]:
        faults, crls = _judged_lists(self._files.get(CRL_FILE), known)
        if not self._lists:
            self._left_out[CRL_FILE] = tuple(fault.found for fault in faults)
            return ()
        self.problems += [fault.within(CRL_FILE) for fault in faults]
        return crls

    def _signer(self, own: Certificates, key: PrivateKey | None, now: datetime) -> x509.Certificate:
        """The certificate that has the key. Notes what is wrong with it by itself."""
        where = self._layout.signer
        matching = [c for c in own if key is not None and has_key(c, key.public_key())]
        certificate = matching[0] if matching else own[0]
        if key is not None and not matching:
            self.refuse(
                f"{where} and {self._layout.key}",
                f"the key is not that of {describe(certificate)}{_besides(self._all_left_out(where))}",
                "put the key there that the certificate was made for, or the certificate made for this key",
            )
        self.problems += [fault.within(where) for fault in _faults_of_signer(certificate, now)]
        return certificate

    def _too_large(self, chain: Certificates, anchors: Certificates) -> bool:
        """Whether an answer with a leaf would be larger than clients receive."""
        size, most = len(write_pem((*chain, *anchors))), LARGEST_ANSWER - ROOM_FOR_LEAF
        if size > most:
            found = f"with the chain its roots have {size} bytes, and clients take {most}"
            self.refuse(self._layout.roots, found, "remove the roots that are no longer needed")
        return size > most

    def _proved(self, prover: Prover, trust_domain: str | None) -> Certificates | None:
        """The intermediates from the signer up to an anchor, or None where no leaf of the signer would be trusted."""
        try:
            return prover.chain(trust_domain)
        except ReachError as error:
            above = self._layout.chain or self._layout.signer
            left_out = _besides(self._all_left_out(above, self._layout.roots))
            found = f"no certificate of this signer would be trusted: {error}{left_out}"
            self.refuse(f"{above} and {self._layout.roots}", found, _FIX_CHAIN)
        return None


def _besides(left_out: tuple[str, ...]) -> str:
    """What was left out, as a possible reason."""
    return f" (left out: {'; '.join(left_out)})" if left_out else ""


def _judged_lists(data: bytes | None, known: Certificates) -> tuple[list[Problem], tuple[RevocationList, ...]]:
    """What is wrong with the revocation lists, and the lists."""
    if data is None:
        return [], ()
    try:
        crls = read_crls(data)
    except RevocationListError as error:
        return [error.problem], ()
    if not crls:
        return [Problem((), "is empty", "put the revocation lists into it, or remove it where there are none")], ()
    faults = ((number, fault_of_list(crl, known)) for number, crl in enumerate(crls, start=1))
    return [Problem((), f"its revocation list {number} {fault}", _FIX_LIST) for number, fault in faults if fault], crls


def _faults_of_signer(certificate: x509.Certificate, now: datetime) -> Iterator[Problem]:
    name = describe(certificate)
    if fault := fault_of_ca_flag(certificate):
        yield Problem((), fault, "issue it with basicConstraints=critical,CA:TRUE")
    if fault := fault_of_key_usage(certificate):
        yield Problem((), fault, "issue it with keyUsage=critical,keyCertSign,cRLSign")
    if identities := [uri for uri in subject_alternative_uris(certificate) if _is_workload(uri)]:
        yield Problem(
            (),
            f"{name} is a workload's own certificate: it carries the SPIFFE ID {describe_name(identities[0])}",
            "a CA's SPIFFE ID has no path (X509-SVID section 4.1): issue a CA certificate without that name",
        )
    if now > certificate.not_valid_after_utc:
        yield Problem((), f"{name} expired on {describe_time(certificate.not_valid_after_utc)}", "issue a new one")
    if now < certificate.not_valid_before_utc:
        first = describe_time(certificate.not_valid_before_utc)
        yield Problem((), f"{name} is valid only from {first}", "wait for that, or set this machine's clock")
    if certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        yield PSS_REFUSED
    elif EXPLICIT_CURVE in certificate.tbs_certificate_bytes:
        yield EXPLICIT_REFUSED


def _is_workload(uri: str) -> bool:
    return uri.startswith("spiffe://") and uri.removeprefix("spiffe://").strip("/").count("/") > 0


def reach(files: Mapping[str, bytes], signing: SigningSet, now: datetime) -> Reach:
    """For which trust domains the CA that was read from these files can issue."""
    layout = layout_of(files)
    above = read_bundle(files[layout.chain]).certificates if layout.chain else ()
    candidates = unique((*read_bundle(files[layout.signer]).certificates, *above))
    return Prover(signing.signer, candidates, signing.roots, now).reach()


def fault_of_revocation(signing: SigningSet) -> Problem | None:
    """What is wrong where the lists beside a CA revoke the CA itself, or None.

    Such a CA can sign all the same, and a running CA server has to accept the set: or else it would not know of the
    revocation.
    """
    for root in signing.roots:
        if (gone := revoked((*signing.intermediates, root), signing.crls)) is not None:
            found = f"revokes {describe(gone)}, so nothing that this CA issues would be taken for a renewal"
            return Problem((CRL_FILE,), found, "have another CA certificate issued, for a new key")
    return None


_PURPOSE = {
    ISTIO.signer: "the CA certificate that signs",
    ISTIO.key: "the private key of ca-cert.pem",
    ISTIO.roots: "the CA certificates to trust",
    CHAIN_FILE: "the certificates from ca-cert.pem up to the root",
    CERT_MANAGER.signer: "the CA certificate that signs, and those above it",
    CERT_MANAGER.key: "the private key of tls.crt",
    CERT_MANAGER.roots: "the CA certificates to trust",
}
_FIX_LIST = (
    "have that CA issue it anew, or remove it; if it is a former CA's of that name, add its certificate to the chain"
)
_FIX_CHAIN = (
    "put the certificates from the signer up to the root into the one, the root itself into the other, and renew or "
    "reissue the certificate that is at fault"
)
