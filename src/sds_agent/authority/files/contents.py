"""What the files say: where each is, and whether they go together. Nothing here reads a file or a clock."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from sds_agent.authority.files.settings import FilesSettings
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, Supplied
from sds_agent.errors import Problem
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.pki.certificates import (
    CertificateError,
    ParsedBundle,
    describe_name,
    read_bundle,
    read_pem,
    san_values,
    write_pem,
)
from sds_agent.pki.forms import without_certificate
from sds_agent.pki.keyfile import LONGEST_PASSPHRASE
from sds_agent.pki.keys import to_pkcs8_pem
from sds_agent.pki.pairs import KEY, Pair, PairError, read_pair_of
from sds_agent.values import Sensitive

MOST_NAMES = 5
"""Names of a certificate that a message has."""


class FilesLayout(Struct, frozen=True):
    """The names that one writer gives to the files of a directory."""

    certificate: str
    key: str
    roots: str | None


LAYOUTS = (
    FilesLayout("tls.crt", "tls.key", "ca.crt"),  # Kubernetes Secrets, cert-manager's CSI drivers
    FilesLayout("cert-chain.pem", "key.pem", "root-cert.pem"),  # Istio
    FilesLayout("svid.pem", "svid_key.pem", "svid_bundle.pem"),  # spiffe-helper
    FilesLayout("svid.0.pem", "svid.0.key", "bundle.0.pem"),  # spire-agent api fetch x509 -write
    FilesLayout(
        "certificates.pem", "private_key.pem", "ca_certificates.pem"
    ),  # /var/run/secrets/workload-spiffe-credentials
    FilesLayout("fullchain.pem", "privkey.pem", None),  # certbot
)


class FilesPlaces(Struct, frozen=True):
    """Where each part of a set is. `roots` is None where nothing names them."""

    certificate: Path
    key: Path
    roots: Path | None
    password: Path | None

    @property
    def all(self) -> tuple[Path, ...]:
        """Each file once."""
        parts = (self.certificate, self.key, self.roots, self.password)
        return tuple(dict.fromkeys(each for each in parts if each is not None))


class Unreadable(Struct, frozen=True):
    """A file that gave no content, for this reason."""

    reason: str


class FileSet(Sensitive, frozen=True):
    """The files as they were at one moment: their places, None where no known layout is there, and their contents."""

    places: FilesPlaces | None
    contents: Mapping[Path, bytes | Unreadable]


class Material(Sensitive, frozen=True):
    """A set that goes together: the chain, its key in PKCS#8, and the roots, in PEM; and what was left out of them.

    Roots that cannot be read are among the others, and come without a certificate too.
    """

    chain_pem: bytes
    private_key_pem: bytes
    anchors_pem: bytes
    warnings: tuple[str, ...]

    @property
    def supplied(self) -> Supplied:
        """The certificate as the rest of the agent takes it."""
        return Supplied(Issuance(self.chain_pem, self.anchors_pem, self.warnings), self.private_key_pem)


class UnusableSetError(AuthorityError):
    """The files do not make a set. `problem` says which does not, by its key in the configuration."""

    def __init__(self, message: str, key: str, fix: str) -> None:
        super().__init__(ErrorKind.INVALID, f"{message}; {fix}")
        self.problem = Problem((key,), f"cannot be used: {message}", fix)


def watched(chosen: FilesSettings) -> tuple[Path, ...]:
    """Every path at which a part of the set is or may come to be."""
    return tuple(dict.fromkeys(path for places in _candidates(chosen) for path in places.all))


def placed(chosen: FilesSettings, is_there: Callable[[Path], bool]) -> FilesPlaces | None:
    """Where the parts are. In a directory, by the first layout whose certificate is there; None where none is."""
    candidates = list(_candidates(chosen))
    if len(candidates) == 1:
        return candidates[0]
    return next((each for each in candidates if is_there(each.certificate)), None)


def _candidates(chosen: FilesSettings) -> Iterator[FilesPlaces]:
    if chosen.directory is not None:
        for layout in LAYOUTS:
            own = None if layout.roots is None else chosen.directory / layout.roots
            yield FilesPlaces(
                chosen.directory / layout.certificate,
                chosen.directory / layout.key,
                chosen.roots_file or own,
                chosen.password_file,
            )
    certificate = chosen.credential_file or chosen.certificate_file
    key = chosen.credential_file or chosen.key_file
    if certificate is not None and key is not None:
        yield FilesPlaces(certificate, key, chosen.roots_file, chosen.password_file)


def judged(chosen: FilesSettings, read: FileSet) -> Material:
    """What the set gives. Raises UnusableSetError, whose message names the file and holds nothing of a key."""
    places = read.places
    if places is None:
        known = ", ".join(layout.certificate for layout in LAYOUTS)
        raise UnusableSetError(
            f"the directory {chosen.directory} holds no certificate under a known name ({known})",
            "directory",
            "have it written there, or name the files one by one",
        )
    if places.roots is None:
        raise UnusableSetError(
            f"nothing names the roots: the layout of {places.certificate} has none",
            "roots_file",
            "name their file in roots_file",
        )
    pair = _pair(chosen, places, read.contents)
    roots = _roots(chosen, places.roots, read.contents)
    left_out = ((places.certificate, pair.left_out), (places.roots, roots.left_out))
    warnings = tuple(f"left out of {file}: {each}" for file, causes in left_out for each in causes)
    return Material(write_pem(pair.chain), to_pkcs8_pem(pair.key), roots.rewritten, warnings)


def _pair(chosen: FilesSettings, places: FilesPlaces, contents: Mapping[Path, bytes | Unreadable]) -> Pair:
    chain = _content(chosen, places.certificate, contents)
    key = _content(chosen, places.key, contents)
    password = None
    if places.password is not None:
        password = _password(places.password, _content(chosen, places.password, contents))
    try:
        return read_pair_of(chain, key, password)
    except PairError as error:
        place = places.key if KEY in error.problem.where else places.certificate
        message, fix = f"{place} {error.problem.found}", error.problem.fix
        if place == chosen.credential_file and b" PRIVATE KEY-----" not in key:
            message, fix = f"{place} holds no private key", "write the key into it, beside the certificate"
        raise UnusableSetError(message, _key_of(chosen, place), fix) from error


def _password(file: Path, text: bytes) -> bytes:
    """The first line, as OpenSSL's commands take it (`-passin file:FILE`)."""
    line = text.split(b"\n", maxsplit=1)[0].removesuffix(b"\r")
    if not line or len(line) > LONGEST_PASSPHRASE:
        raise UnusableSetError(
            f"the first line of {file} is no password: it has {len(line)} bytes",
            "password_file",
            f"write the key's password there, of 1 to {LONGEST_PASSPHRASE} bytes",
        )
    return line


def _roots(chosen: FilesSettings, file: Path, contents: Mapping[Path, bytes | Unreadable]) -> ParsedBundle:
    data, key = _content(chosen, file, contents), _key_of(chosen, file)
    try:
        read = read_bundle(data)
    except CertificateError as error:
        raise UnusableSetError(f"{file} cannot be read: {error}", key, "write the roots there, in PEM") from error
    if not read.certificates:
        problem = without_certificate(data, "the roots")
        raise UnusableSetError(f"{file} {problem.found}", key, problem.fix)
    return read


def _content(chosen: FilesSettings, file: Path, contents: Mapping[Path, bytes | Unreadable]) -> bytes:
    found = contents[file]
    if isinstance(found, Unreadable):
        raise UnusableSetError(
            f"{file} cannot be read: {found.reason}",
            _key_of(chosen, file),
            "the program that writes it has to put it there, readable for the user that runs this",
        )
    return found


def _key_of(chosen: FilesSettings, file: Path) -> str:
    """The key in the configuration that leads to the file."""
    for key in ("credential_file", "certificate_file", "key_file", "roots_file", "password_file"):
        if getattr(chosen, key) == file:
            return key
    return "directory"


def certificate_key(chosen: FilesSettings) -> str:
    """The key in the configuration that leads to the certificate."""
    ways = ("directory", "credential_file", "certificate_file")
    return next(key for key in ways if getattr(chosen, key) is not None)


def check_identity(chosen: FilesSettings, material: Material, identity: SpiffeId) -> None:
    """See that the certificate is for the workload and for nothing else. Raises AuthorityError MISMATCH.

    `issuance` checks that of every certificate; here it is known which file has to change.
    """
    leaf = read_pem(material.chain_pem)[0]
    names = san_values(leaf)
    if [getattr(each, "value", None) for each in names] == [str(identity)]:
        return
    found = ", ".join(f"{type(each).__name__} {describe_name(each.value)}" for each in names[:MOST_NAMES]) or "none"
    file = getattr(chosen, certificate_key(chosen))
    raise AuthorityError(
        ErrorKind.MISMATCH,
        f"the certificate in {file} must have the URI {identity} and no other subject alternative name, and has: "
        f"{found}; have the program that writes it ask for that URI, or change the workload's spiffe_id. A certificate "
        "without a SPIFFE ID can be served by the name file-cert: (sds.files)",
    )
