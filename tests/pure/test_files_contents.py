"""What a set of files gives, whatever another program has written into them."""

from pathlib import Path

import pytest
from fakes.hierarchy import make_ca, make_leaf, new_key
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.authority.files.contents import (
    LAYOUTS,
    FileSet,
    UnusableSetError,
    certificate_key,
    judged,
    placed,
    watched,
)
from sds_agent.authority.files.settings import FilesSettings
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import to_pkcs8_pem

LIVE = Path("/live")
MOUNTED = FilesSettings(directory=LIVE)
ROOT = make_ca("root")
KEY = new_key()
WHOLE = {
    LIVE / "tls.crt": write_pem([make_leaf(ROOT, key=KEY)]),
    LIVE / "tls.key": to_pkcs8_pem(KEY),
    LIVE / "ca.crt": write_pem([ROOT.certificate]),
}


@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 2000), st.integers(0, 40), st.binary(max_size=40))
def test_no_damage_to_a_file_is_more_than_an_error_in_words(file: Path, at: int, cut: int, new: bytes) -> None:
    """Neither does a damaged key show in it."""
    data = WHOLE[file]
    damaged = {**WHOLE, file: data[:at] + new + data[at + cut :]}
    said = ""
    try:
        judged(MOUNTED, FileSet(placed(MOUNTED, lambda _: True), damaged))
    except UnusableSetError as error:
        said = str(error)
    assert not said or str(LIVE) in said
    assert WHOLE[LIVE / "tls.key"].split(b"\n")[1][:20].decode() not in said


def test_a_credential_bundle_without_its_key_is_called_that() -> None:
    chosen = FilesSettings(credential_file=Path("/both"), roots_file=Path("/roots"))
    contents = {Path("/both"): WHOLE[LIVE / "tls.crt"], Path("/roots"): WHOLE[LIVE / "ca.crt"]}
    with pytest.raises(UnusableSetError, match=r"^/both holds no private key") as error:
        judged(chosen, FileSet(placed(chosen, lambda _: True), contents))
    assert error.value.problem.where == ("credential_file",)


def test_the_first_layout_whose_certificate_is_there_counts() -> None:
    for number, layout in enumerate(LAYOUTS):
        there = {LIVE / each.certificate for each in LAYOUTS[number:]}
        places = placed(MOUNTED, there.__contains__)
        assert places is not None
        assert places.certificate == LIVE / layout.certificate
    assert placed(MOUNTED, lambda _: False) is None


def test_every_file_that_may_come_to_count_is_watched() -> None:
    chosen = FilesSettings(directory=LIVE, roots_file=Path("/roots"), password_file=Path("/word"))
    names = {name for each in LAYOUTS for name in (each.certificate, each.key)}
    assert set(watched(chosen)) == {*(LIVE / name for name in names), Path("/roots"), Path("/word")}
    both = FilesSettings(credential_file=Path("/both"), roots_file=Path("/roots"))
    assert watched(both) == (Path("/both"), Path("/roots"))
    assert (certificate_key(chosen), certificate_key(both)) == ("directory", "credential_file")
