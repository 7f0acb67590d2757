"""Files of certificates that an operator names, such as the roots that vouch for a server: one reader for them all."""

from pathlib import Path

from sds_agent.files import read_at_once
from sds_agent.pki.certificates import CertificateError, Reading, read_bundle
from sds_agent.pki.forms import without_certificate

LARGEST = 4 << 20
"""Bytes of a file."""


def read_certificate_file(file: Path, what: str) -> Reading:
    """The certificates in `file`, at least one; `what` they are is for messages, such as "the extra anchors".

    Blocks for a moment on the disk, but for no pipe. Raises CertificateError, which names the file and the way out.
    """
    try:
        data = read_at_once(file, LARGEST)
    except OSError as error:
        raise CertificateError(
            f"{what} cannot be read from {file}: {error.strerror}; put it there, readable for the agent's user"
        ) from error
    if len(data) > LARGEST:
        raise CertificateError(
            f"{file} is larger than {LARGEST} bytes and cannot be {what}; look whether it is the right one"
        )
    try:
        reading = read_bundle(data)
    except CertificateError as error:
        raise CertificateError(f"{what} in {file} cannot be read: {error}; put the right certificates there") from error
    if not reading.certificates:
        raise CertificateError(f"{file} should hold {what} and {without_certificate(data, what)}")
    return reading
