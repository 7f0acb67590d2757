"""Files beside our own that an operator names, such as the roots that vouch for a server: one reader for them all."""

from pathlib import Path

from sds_agent.errors import SdsAgentError
from sds_agent.files import read_at_once
from sds_agent.pki.certificates import CertificateError, ParsedBundle, read_bundle
from sds_agent.pki.forms import without_certificate

LARGEST = 4 << 20
"""Bytes of a file of certificates."""


class NamedFileError(SdsAgentError):
    """A file is not what it is named for; the message says which, and the way out."""


def read_named_file(file: Path, what: str, most: int) -> bytes:
    """The content of `file`, at most that many bytes; `what` it should be is for messages, such as "the token".

    Blocks for a moment on the disk, but for no pipe. Raises NamedFileError.
    """
    try:
        data = read_at_once(file, most)
    except OSError as error:
        raise NamedFileError(
            f"{what} cannot be read from {file}: {error.strerror}; put it there, readable for the user that runs this"
        ) from error
    if len(data) > most:
        raise NamedFileError(
            f"{file} is larger than {most} bytes and cannot be {what}; look whether it is the right one"
        )
    return data


def read_certificate_file(file: Path, what: str) -> ParsedBundle:
    """The certificates in `file`, at least one. Raises NamedFileError."""
    data = read_named_file(file, what, LARGEST)
    try:
        reading = read_bundle(data)
    except CertificateError as error:
        raise NamedFileError(f"{what} in {file} cannot be read: {error}; put the right certificates there") from error
    if not reading.certificates:
        raise NamedFileError(f"{file} should hold {what} and {without_certificate(data, what)}")
    return reading
