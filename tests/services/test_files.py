"""Files with keys in them: never seen by others, never half there, never lost."""

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fakes.disks import forgetful_directories, full_disk
from fakes.processes import FOWNER, in_an_old_docker, without_capability

from sds_agent.files import (
    ForeignFileError,
    create,
    locked,
    read_at_once,
    read_own,
    remove_unfinished,
    sync_directory,
    write_private,
)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("before", [None, 0o644, 0o666])
def test_no_other_user_may_read_it_whatever_the_umask_and_the_file_before(
    tmp_path: Path, umask: int, before: int | None
) -> None:
    file = tmp_path / "key.pem"
    if before is not None:
        file.touch()
        file.chmod(before)
    previous = os.umask(umask)
    try:
        write_private(file, b"key")
    finally:
        os.umask(previous)
    assert file.read_bytes() == b"key"
    assert mode_of(file) == 0o600


def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    write_private(file, b"a long first content")
    write_private(file, b"second")
    assert file.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_leaves_the_old_content_and_no_piece_of_the_new(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    write_private(file, b"old")
    with full_disk(room=10), pytest.raises(OSError, match="File too large"):
        write_private(file, b"new " * 10)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_directory_in_the_way_stays_and_so_does_no_piece_of_the_new(tmp_path: Path) -> None:
    (tmp_path / "key.pem" / "kept").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_private(tmp_path / "key.pem", b"new")
    assert [path.name for path in tmp_path.rglob("*")] == ["key.pem", "kept"]


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_private(tmp_path / "missing" / "key.pem", b"new")


def test_a_symlink_is_replaced_and_what_it_points_to_is_not_written(tmp_path: Path) -> None:
    """Else a user who may put a link there chooses which file the agent overwrites."""
    target, file = tmp_path / "target", tmp_path / "key.pem"
    target.write_bytes(b"precious")
    file.symlink_to(target)
    write_private(file, b"key")
    assert target.read_bytes() == b"precious"
    assert not file.is_symlink()
    assert file.read_bytes() == b"key"


def test_a_reader_sees_one_content_or_the_other_and_never_a_part(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    contents = [b"a" * 100_000, b"b" * 50_000]
    write_private(file, contents[0])
    done = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(file.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(30):
            write_private(file, contents[turn % 2])
    finally:
        done.set()
        reader.join()
    assert seen <= set(contents)


@pytest.mark.parametrize("mode", [0o600, 0o644])
@pytest.mark.parametrize("umask", [0o000, 0o077, 0o277])
def test_a_new_file_has_its_mode_whatever_the_umask(tmp_path: Path, mode: int, umask: int) -> None:
    previous = os.umask(umask)
    try:
        create(tmp_path / "cert.pem", b"certificate", mode)
    finally:
        os.umask(previous)
    assert (tmp_path / "cert.pem").read_bytes() == b"certificate"
    assert mode_of(tmp_path / "cert.pem") == mode


_GIVEN = """
import sys
from pathlib import Path
from sds_agent.files import create
create(Path(sys.argv[1]), b"key", 0o640, owner=(int(sys.argv[2]), int(sys.argv[3])))
"""


def test_a_file_is_given_away_with_the_right_to_give_alone(tmp_path: Path) -> None:
    """As in a container that has CAP_CHOWN and no CAP_FOWNER."""
    user, group = (4711, 4712) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    file = tmp_path / "key.pem"
    program = [*without_capability(FOWNER), "-c", _GIVEN, str(file), str(user), str(group)]
    ended = subprocess.run([sys.executable, *program], check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    found = file.stat()
    assert (found.st_uid, found.st_gid, mode_of(file)) == (user, group, 0o640)


_CHECKED = """
import sys
from pathlib import Path
from sds_agent.files import check_writable
check_writable(Path(sys.argv[1]), Path(sys.argv[1]))
"""


def test_a_container_of_an_old_docker_may_write_where_it_may(tmp_path: Path) -> None:
    program = [*in_an_old_docker(), "-c", _CHECKED, str(tmp_path)]
    ended = subprocess.run([sys.executable, *program], check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("kind", ["file", "link", "broken link"])
def test_a_new_file_never_takes_the_place_of_another(tmp_path: Path, kind: str) -> None:
    file, target = tmp_path / "key.pem", tmp_path / "target"
    (file if kind == "file" else target).write_bytes(b"precious")
    if kind != "file":
        file.symlink_to(target if kind == "link" else "nowhere")
    with pytest.raises(FileExistsError):
        create(file, b"new")
    assert file.read_bytes() == b"precious" if kind != "broken link" else file.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} <= {"key.pem", "target"}


def test_a_full_disk_leaves_no_piece_of_a_new_file(tmp_path: Path) -> None:
    with full_disk(room=10), pytest.raises(OSError, match="File too large"):
        create(tmp_path / "key.pem", b"new " * 10)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_does_not_synchronize_directories_can_be_used() -> None:
    """Linux has some without that operation. Else no agent could keep its state on them."""
    directory = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            os.fsync(directory)
    finally:
        os.close(directory)
    sync_directory(Path("/proc"))


def test_a_directory_that_cannot_be_synchronized_is_an_error_and_the_file_is_whole(tmp_path: Path) -> None:
    with forgetful_directories(), pytest.raises(OSError, match="Input/output error"):
        write_private(tmp_path / "key.pem", b"new")
    assert (tmp_path / "key.pem").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["key.pem"]


# --- what a kill leaves ---

KILLED = """
import os, pathlib, signal, sys
from sds_agent import files
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
files.write_private(pathlib.Path(sys.argv[1]), b"PLANTED PRIVATE KEY")
"""


def test_what_a_kill_leaves_of_a_key_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """Else the private keys of all agents that were ever killed there lie on the disk for ever."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "key.pem"], env=environment, check=False)
    (left,) = tmp_path.iterdir()
    assert b"PLANTED" in left.read_bytes()
    others = {"key.pem", ".key.pem.12345678.bak", ".key.pem.1234567", ".other.pem.12345678", "xkey.pem.12345678"}
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".key.pem.0000000d").mkdir()
    (tmp_path / ".key.pem.0000000e").symlink_to("key.pem")
    remove_unfinished(tmp_path, r"key\.pem")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == others | {".key.pem.0000000d", ".key.pem.0000000e"}


def test_what_may_still_be_written_is_left(tmp_path: Path) -> None:
    (tmp_path / ".token.12345678").touch()
    remove_unfinished(tmp_path, "token", idle=60)
    assert (tmp_path / ".token.12345678").exists()
    os.utime(tmp_path / ".token.12345678", (0, 0))
    remove_unfinished(tmp_path, "token", idle=60)
    assert list(tmp_path.iterdir()) == []


def test_a_key_left_before_the_clock_was_set_back_goes_too(tmp_path: Path) -> None:
    left, later = tmp_path / ".key.pem.12345678", time.time() + 1e6
    left.touch()
    os.utime(left, (later, later))
    remove_unfinished(tmp_path, r"key\.pem")
    assert not left.exists()


def test_a_directory_that_is_not_there_has_nothing_unfinished(tmp_path: Path) -> None:
    remove_unfinished(tmp_path / "missing", "token")


# --- files of our own ---


def test_a_file_of_our_own_is_read_with_its_mode_and_no_more_than_asked_for(tmp_path: Path) -> None:
    write_private(tmp_path / "key.pem", b"12345678")
    assert read_own(tmp_path / "key.pem", 8) == (b"12345678", 0o600)
    assert read_own(tmp_path / "key.pem", 3) == (b"1234", 0o600)


def test_a_file_of_another_user_is_not_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a group may write to the directory, its members put there what they like."""
    write_private(tmp_path / "key.pem", b"planted")
    if os.getuid() == 0:
        os.chown(tmp_path / "key.pem", 4711, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(ForeignFileError, match="belongs to uid"):
        read_own(tmp_path / "key.pem", 100)


@pytest.mark.parametrize("kind", ["link", "broken link", "pipe", "directory"])
def test_what_is_no_file_is_not_read_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "key.pem"
    match kind:
        case "link":
            (tmp_path / "else").write_bytes(b"else")
            path.symlink_to("else")
        case "broken link":
            path.symlink_to("nowhere")
        case "pipe":
            os.mkfifo(path)
        case _:
            path.mkdir()
    with pytest.raises(ForeignFileError, match="is not a regular file"):
        read_own(path, 100)


def test_what_a_pipe_gives_is_not_taken_for_a_file(tmp_path: Path) -> None:
    """Half of a list of identities that are to get nothing would be a list too."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with (tmp_path / "pipe").open("wb", buffering=0) as writer:
            writer.write(b"the first half of it")
            with pytest.raises(OSError, match="is a pipe, and not a file"):
                read_at_once(tmp_path / "pipe", 100)
    finally:
        os.close(reader)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_own(tmp_path / "key.pem", 100)


# --- locks ---


def test_one_at_a_time_holds_a_lock_and_the_next_gets_it_afterwards(tmp_path: Path) -> None:
    """Two agents on one state directory would each renew the root, and one of the two would be lost."""
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
        pass
    with locked(tmp_path / "lock"):
        assert mode_of(tmp_path / "lock") == 0o600


def test_a_lock_can_be_had_again_whatever_the_umask_was(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        with locked(tmp_path / "lock"):
            pass
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "lock") == 0o600, "or its owner, unless that is root, could not open it any more"


def test_a_lock_is_released_when_its_holder_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "lock"):
        raise RuntimeError
    with locked(tmp_path / "lock"):
        pass


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    """After a kill -9 the agent has to start again without an operator's help."""
    program = (
        "import sys, pathlib; from sds_agent.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
            pass
        holder.kill()
    with locked(tmp_path / "lock"):
        pass


def test_a_lock_does_not_follow_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"), locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()
