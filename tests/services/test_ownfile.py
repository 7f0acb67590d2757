"""A file of one process's own: written again when it is lost, and never over what another process wrote."""

from pathlib import Path

import pytest
from fakes.disks import forgetful_directories, full_disk

from sds_agent.ownfile import OwnFile, ReplacedError


@pytest.fixture
def file(tmp_path: Path) -> OwnFile:
    """A file that was written once."""
    file = OwnFile(tmp_path / "state" / "roots.pem", 100)
    file.path.parent.mkdir(mode=0o700)
    file.write(b"first")
    return file


def test_a_lost_file_is_put_back_as_it_was_left(file: OwnFile) -> None:
    assert file.put_back() is None
    file.path.unlink()
    file.path.parent.rmdir()
    assert file.put_back() == file.path
    assert file.read() == (b"first", 0o600)


def test_what_another_process_wrote_is_not_overwritten(file: OwnFile) -> None:
    """Else each of two agents would take the other's root for its own."""
    file.path.write_bytes(b"another's")
    with pytest.raises(ReplacedError, match="holds something else"):
        file.renew(b"second")
    assert file.path.read_bytes() == b"another's"


def test_a_write_that_failed_changes_nothing(file: OwnFile) -> None:
    with full_disk(room=3), pytest.raises(OSError, match="File too large"):
        file.renew(b"second")
    assert file.is_there()
    file.path.unlink()
    file.put_back()
    assert file.path.read_bytes() == b"first"


def test_a_write_whose_durability_is_unknown_can_be_repeated_and_put_back(file: OwnFile) -> None:
    """The new content is there by then: taken for another process's, it would end every later renewal."""
    with forgetful_directories(), pytest.raises(OSError, match="Input/output error"):
        file.renew(b"second")
    assert file.is_there()
    file.path.unlink()
    file.put_back()
    assert file.path.read_bytes() == b"second"
    file.renew(b"third")
    assert file.path.read_bytes() == b"third"
