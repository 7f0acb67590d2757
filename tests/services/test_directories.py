"""Directories with secrets in them: no other user can replace what is in them, or move them away."""

import errno
import os
import stat
from pathlib import Path

import pytest
from fakes.events import recorded

from sds_agent.directories import (
    MOST_LINKS,
    Role,
    Step,
    UntrustedDirectoryError,
    check_directory,
    judge,
    locked_directory,
    own_directory,
    walk,
)
from sds_agent.errors import ConfigurationError, SdsAgentError

US, OTHER = 1000, 1001
TARGET = Path("/srv/state")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def made(path: Path, mode: int) -> Path:
    path.mkdir()
    path.chmod(mode)
    return path


def step(owner: int | None, mode: int, role: Role) -> Step:
    return Step(TARGET if role is Role.LAST else TARGET.parent, owner, 50, mode, role)


# What is said


@pytest.mark.parametrize(
    ("owner", "mode", "role", "refused"),
    [
        (US, 0o700, Role.LAST, ""),
        (0, 0o755, Role.LAST, ""),
        (US, 0o770, Role.LAST, ""),
        (US, 0o777, Role.LAST, "and so could replace the agent's files"),
        (US, 0o1777, Role.LAST, "and so could replace the agent's files"),
        (OTHER, 0o700, Role.LAST, "/srv/state belongs to uid 1001"),
        (None, 0o700, Role.LAST, "/srv/state belongs to a user of another namespace"),
        (US, 0o755, Role.ABOVE, ""),
        (0, 0o1777, Role.ABOVE, ""),
        (0, 0o2775, Role.ABOVE, ""),
        (0, 0o777, Role.ABOVE, "every user may write to /srv, and so could put another directory in the place of"),
        (
            OTHER,
            0o755,
            Role.ABOVE,
            "/srv belongs to uid 1001, who could put another directory in the place of /srv/st",
        ),
        (OTHER, 0o1777, Role.ABOVE, "/srv belongs to uid 1001"),
        (None, 0o755, Role.ABOVE, ""),
        (US, 0o777, Role.LINK, ""),
        (OTHER, 0o777, Role.LINK, "/srv belongs to uid 1001"),
    ],
)
def test_who_could_replace_our_files_is_refused_and_named(
    owner: int | None, mode: int, role: Role, refused: str
) -> None:
    found = judge([step(0, 0o755, Role.ABOVE), step(owner, mode, role)], TARGET, US)
    assert (found.refused or "").startswith(refused) or refused in str(found.refused)
    assert bool(found.refused) == bool(refused)


@pytest.mark.parametrize(
    ("owner", "mode", "role", "said"),
    [
        (US, 0o755, Role.LAST, ()),
        (
            US,
            0o2775,
            Role.LAST,
            ("the group 50 may write to /srv/state and could replace the agent's files (chmod g-w",),
        ),
        (
            0,
            0o775,
            Role.ABOVE,
            ("the group 50 may write to /srv and could put another directory in the place of /srv/",),
        ),
        (0, 0o1775, Role.ABOVE, ()),
        (
            None,
            0o755,
            Role.ABOVE,
            ("/srv belongs to a user of another namespace, who could put another directory in",),
        ),
        (US, 0o777, Role.LINK, ()),
    ],
)
def test_a_group_that_could_replace_them_is_named(
    owner: int | None, mode: int, role: Role, said: tuple[str, ...]
) -> None:
    found = judge([step(owner, mode, role)], TARGET, US)
    assert found.refused is None
    assert len(found.shared) == len(said)
    assert all(each.startswith(words) for each, words in zip(found.shared, said, strict=True))


def test_a_user_that_is_trusted_too_may_own_the_way() -> None:
    """Root makes a join token in the directory of the CA's user."""
    way = [step(OTHER, 0o755, Role.ABOVE), step(OTHER, 0o700, Role.LAST)]
    assert judge(way, TARGET, 0, [OTHER]).refused is None


# The way


def test_every_directory_that_a_link_leads_through_is_checked(tmp_path: Path) -> None:
    """A path that is resolved beforehand hides the directory that the link itself lies in."""
    for path in ("links", "real", "real/deep"):
        (tmp_path / path).mkdir()
    (tmp_path / "links/there").symlink_to("../real/deep")
    (tmp_path / "links/absolute").symlink_to(tmp_path / "links/there")
    steps, missing = walk(tmp_path / "links" / "absolute")
    assert missing is None
    assert {tmp_path / "links", tmp_path / "real", tmp_path / "real/deep"} <= {each.path for each in steps}
    assert (steps[-1].path, steps[-1].role) == (tmp_path / "real/deep", Role.LAST)
    assert [each.role for each in steps[:-1]] == [Role.ABOVE] * (len(steps) - 1)


@pytest.mark.parametrize("mode", [0o1777, 0o1770])
def test_a_link_among_the_files_of_others_is_checked(tmp_path: Path, mode: int) -> None:
    """In /tmp another user's link leads anywhere, at any time."""
    (tmp_path / "real").mkdir()
    shared = made(tmp_path / "tmp", mode)
    (shared / "link").symlink_to(tmp_path / "real")
    steps, _ = walk(shared / "link")
    assert (shared / "link", Role.LINK) in [(each.path, each.role) for each in steps]


def test_dots_behind_a_link_lead_to_where_the_kernel_goes(tmp_path: Path) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    steps, _ = walk(tmp_path / "link" / ".." / "b")
    assert steps[-1].path == tmp_path / "a/b"


def test_links_in_a_circle_end_in_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        walk(tmp_path / "a" / "state")


def test_so_many_links_are_followed_as_the_kernel_follows(tmp_path: Path) -> None:
    last = made(tmp_path / "0", 0o700)
    for number in range(1, MOST_LINKS + 2):
        (tmp_path / str(number)).symlink_to(str(number - 1))
    most, more = tmp_path / str(MOST_LINKS), tmp_path / str(MOST_LINKS + 1)
    assert most.stat() == last.stat()
    assert walk(most)[0][-1].path == last
    for look in (Path.stat, walk):
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            look(more)


@pytest.mark.parametrize("below", [".", "state"])
def test_a_link_to_a_disk_that_is_not_mounted_is_an_error_and_nothing_is_made(tmp_path: Path, below: str) -> None:
    """Else the agent would begin anew there, with another root, and its state lie under the disk when that is back."""
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "sds-agent")
    with pytest.raises(FileNotFoundError):
        own_directory(tmp_path / "link" / below, 0o700)
    assert not (tmp_path / "disk").exists()


# Making and taking


@pytest.mark.parametrize("mode", [0o700, 0o755])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_directory_and_those_above_are_made_with_their_modes_whatever_the_umask(
    tmp_path: Path, mode: int, umask: int
) -> None:
    """With 077 no Envoy of another user would reach the socket, with 000 every user could replace it."""
    before = os.umask(umask)
    try:
        assert own_directory(tmp_path / "a" / "b" / "c", mode) == ()
    finally:
        os.umask(before)
    assert [mode_of(tmp_path / each) for each in ("a", "a/b", "a/b/c")] == [0o755, 0o755, mode]


def test_a_directory_keeps_the_group_that_the_one_above_hands_down(tmp_path: Path) -> None:
    above = made(tmp_path / "run", 0o2755)
    before = os.umask(0o077)
    try:
        own_directory(above / "sds-agent", 0o755)
    finally:
        os.umask(before)
    assert mode_of(above / "sds-agent") == 0o2755


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_directory_of_our_own_is_taken_as_it_is(tmp_path: Path, mode: int) -> None:
    directory = made(tmp_path / "own", 0o710)
    (directory / "kept").touch()
    own_directory(directory, mode)
    assert mode_of(directory) == 0o710
    assert (directory / "kept").exists()


@pytest.mark.parametrize(("mode", "fix"), [(0o777, "chmod o-w "), (0o703, "chmod o-w "), (0o1777, r"make one in it\)")])
def test_a_directory_that_every_user_may_write_to_is_not_our_own(tmp_path: Path, mode: int, fix: str) -> None:
    """To close /tmp, which has the sticky bit, would break the machine for all other users."""
    tmp_path.chmod(mode)
    with pytest.raises(UntrustedDirectoryError, match=rf"every user may write to .*\({fix}"):
        own_directory(tmp_path, 0o700)
    assert mode_of(tmp_path) == mode


@pytest.mark.parametrize("there", [True, False])
def test_a_directory_that_every_user_may_move_away_is_not_our_own(tmp_path: Path, *, there: bool) -> None:
    above = made(tmp_path / "volume", 0o777)
    if there:
        made(above / "state", 0o700)
    with pytest.raises(UntrustedDirectoryError, match=f"every user may write to {above}, .* in the place of .*state"):
        own_directory(above / "state", 0o700)
    assert (above / "state").exists() == there, "and nothing is made there"


def test_a_directory_below_one_with_the_sticky_bit_is_as_good_as_below_tmp(tmp_path: Path) -> None:
    above = made(tmp_path / "tmp", 0o1777)
    assert own_directory(above / "state", 0o700) == ()


def test_a_directory_of_another_user_is_not_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.getuid() + 1
    if os.getuid() == 0:
        os.chown(tmp_path, other, -1)
    else:  # no other user may give it away, so we are the other
        monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(UntrustedDirectoryError, match="who could"):
        own_directory(tmp_path, 0o700)
    if os.getuid() == 0:
        assert own_directory(tmp_path, 0o700, any_owner=True) == ()


def test_a_directory_of_root_is_as_good_as_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """/run/sds-agent, made by the service manager."""
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    own_directory(Path("/usr"), 0o755)


@pytest.mark.parametrize("below", [".", "state"])
def test_a_file_in_the_directorys_place_is_an_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(NotADirectoryError):
        own_directory(tmp_path / "file" / below, 0o700)
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_relative_path_starts_where_the_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own_directory(Path("state/deep"), 0o700)
    assert mode_of(tmp_path / "state" / "deep") == 0o700


def test_a_check_creates_no_directory(tmp_path: Path) -> None:
    assert check_directory(tmp_path / "state") == ()
    assert list(tmp_path.iterdir()) == []


# Holding


def test_a_group_that_could_replace_the_state_is_reported_at_the_start(tmp_path: Path) -> None:
    """A Kubernetes volume with an fsGroup: the agent serves, and the log says who is trusted."""
    directory = made(tmp_path / "volume", 0o2770)
    with recorded() as events, locked_directory(directory, "state_dir", SdsAgentError("in use")):
        (reported,) = events.named("directory_shared")
        assert (reported["level"], reported["setting"]) == ("warning", "state_dir")
        assert f"may write to {directory} and could replace the agent's files" in reported["cause"]


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.EACCES, f"make it writable for the user that runs this (uid {os.geteuid()}), or choose another"),
        (errno.EROFS, f"make it writable for the user that runs this (uid {os.geteuid()}), or choose another"),
        (errno.ENOSPC, "make room there, or choose another"),
        (errno.ENOTDIR, "choose another"),
    ],
)
def test_what_keeps_a_directory_from_being_locked_is_said_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number), str(tmp_path))

    monkeypatch.setattr(os, "open", fail)
    with (
        pytest.raises(ConfigurationError) as raised,
        locked_directory(tmp_path, "state_dir", SdsAgentError("in use")),
    ):
        pass
    assert str(raised.value) == f"state_dir: cannot use {tmp_path}: {os.strerror(number)}; {fix}"


def test_a_directory_that_cannot_be_locked_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    above = made(tmp_path / "volume", 0o777)
    with (
        pytest.raises(ConfigurationError, match=r"^state_dir: every user may write to "),
        locked_directory(above / "state", "state_dir", SdsAgentError("in use")),
    ):
        pass
