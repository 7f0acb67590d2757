"""Istio's names for files: what they stand for, and which are refused before anything is opened."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.sds.file_names import LONGEST_NAME, CertificateFiles, RootsFile, parsed

CERTS, OTHER = Path("/etc/certs"), Path("/srv/tls")
ALLOWED = (CERTS, OTHER)


def test_a_certificate_and_its_key() -> None:
    found = parsed("file-cert:/etc/certs/a/tls.crt~/srv/tls/tls.key", ALLOWED)
    assert found == CertificateFiles(CERTS, Path("/etc/certs/a/tls.crt"), Path("/srv/tls/tls.key"))
    assert found.paths == (Path("/etc/certs/a/tls.crt"), Path("/srv/tls/tls.key"))


def test_one_file_may_hold_both() -> None:
    found = parsed("file-cert:/etc/certs/both.pem~/etc/certs/both.pem", ALLOWED)
    assert found is not None
    assert found.paths == (Path("/etc/certs/both.pem"),)


def test_roots() -> None:
    assert parsed("file-root:/srv/tls/ca.crt", ALLOWED) == RootsFile(OTHER, Path("/srv/tls/ca.crt"))


def test_a_directory_may_be_written_with_slashes_and_dots() -> None:
    assert parsed("file-root:/etc/certs/ca.crt", (Path("/etc/../etc/certs/"),)) is not None


@pytest.mark.parametrize(
    "name",
    [
        "default",
        "file-cert:",
        "file-root:",
        "file-cert:/etc/certs/tls.crt",
        "file-cert:/etc/certs/tls.crt~",
        "file-cert:~/etc/certs/tls.key",
        "file-cert:/etc/certs/tls.crt~/etc/certs/tls.key~/etc/certs/ca.crt",
        "file-cert:/etc/certs/tls.crt~/etc/shadow",
        "file-cert:/etc/shadow~/etc/certs/tls.key",
        "file-root:/etc/certs",
        "file-root:/etc/certs/",
        "file-root:/etc/certs/.",
        "file-root:/etc/certsx/ca.crt",
        "file-root:/etc/certs/../shadow",
        "file-root:/etc/certs/a/../ca.crt",
        "file-root:etc/certs/ca.crt",
        "file-root:/etc/certs/ca.crt~/etc/certs/ca.crl",
        "file-root:system",
        "file-root:/etc/certs/a\nb",
        "file-root:/etc/certs/a\0b",
        "FILE-ROOT:/etc/certs/ca.crt",
        " file-root:/etc/certs/ca.crt",
        "file-root:" + "/etc/certs/" + "a" * LONGEST_NAME,
    ],
)
def test_any_other_name_is_unknown(name: str) -> None:
    assert parsed(name, ALLOWED) is None


def test_nothing_is_allowed_by_default() -> None:
    assert parsed("file-root:/etc/certs/ca.crt", ()) is None


@given(st.lists(st.sampled_from(["..", ".", "", "a", "etc", "certs", "~", "/"]), max_size=8))
def test_no_path_climbs_out(parts: list[str]) -> None:
    for name in (f"file-root:/etc/certs/{'/'.join(parts)}", f"file-root:{'/'.join(parts)}"):
        if (found := parsed(name, ALLOWED)) is not None:
            assert all(path.resolve().is_relative_to(CERTS) and path != CERTS for path in found.paths)
