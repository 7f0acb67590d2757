"""Files of the state: what cannot be used is put aside and never served, and what is sealed opens for its key alone."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.disks import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sds_agent.errors import ConfigurationError
from sds_agent.files import remove_unfinished
from sds_agent.sealing import LEAST, MOST, OtherKeyError, Seal, SealError, read_seal
from sds_agent.statefile import ASIDE, FORMAT, MOST_ASIDE, StateFile, UnusableFileError, remove_aside

SEAL, OTHER = Seal(bytes(range(32))), Seal(b"another key of thirty-two bytes!")
GOOD = b'{"format": 2, "key": "a private key"}'


def file_in(directory: Path, seal: Seal | None = None, *, purpose: str = "spiffe://demo.example/a") -> StateFile:
    return StateFile(
        directory / "a.json", 1000, seal=seal, purpose=purpose, instead="the CA is asked for another", forbidden=0o007
    )


def refusal(file: StateFile) -> str:
    with pytest.raises(UnusableFileError) as refused:
        file.load(bytes)
    return str(refused.value)


# --- what is put aside ---


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "is damaged (Input data was truncated)"),
        (GOOD[:-1], "is damaged (Input data was truncated)"),
        (b"\0" * 4096, "it is larger than any that the agent writes"),
        (b'{"format": 3}', "has the format 3, and this version of the agent knows 2"),
        (b'{"format": "two"}', "is damaged (Expected `int`, got `str`"),
        (b"sds-agent sealed 2\nwhatever", "is encrypted in a form that only a newer version of the agent knows"),
    ],
)
@pytest.mark.parametrize("seal", [None, SEAL], ids=["plain", "sealed"])
def test_what_cannot_be_used_is_put_aside_and_the_error_says_why_and_what_to_do(
    tmp_path: Path, content: bytes, cause: str, seal: Seal | None
) -> None:
    if content.startswith(b"sds-agent sealed") and seal is None:
        seal = OTHER  # without any key it stays
    file = file_in(tmp_path, seal)
    file.path.write_bytes(content)
    file.path.chmod(0o600)
    said = refusal(file)
    assert said.startswith(f"{file.path} ")
    assert cause in said
    assert "; it is not used, and the CA is asked for another; it was renamed to a.json.unusable: " in said
    assert file.aside.read_bytes() == content, "to look at, or for the newer version"
    assert file.load(bytes) is None, "and the next start says nothing of it"


def test_a_file_that_was_put_aside_is_not_written_again_when_it_is_missed(tmp_path: Path) -> None:
    file = file_in(tmp_path)
    file.path.write_bytes(b"torn")
    file.path.chmod(0o600)
    refusal(file)
    assert file.put_back() is None
    assert not file.path.exists()


def test_of_one_file_one_copy_stays_put_aside(tmp_path: Path) -> None:
    file = file_in(tmp_path)
    for content in (b"first", b"second"):
        file.path.write_bytes(content)
        file.path.chmod(0o600)
        refusal(file)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json.unusable"]
    assert file.aside.read_bytes() == b"second"


def test_of_many_files_the_newest_stay_put_aside(tmp_path: Path) -> None:
    """A directory of an agent whose workloads come and go would fill up with keys of long ago."""
    for number in range(MOST_ASIDE + 3):
        (tmp_path / f"{number:02}.json{ASIDE}").touch()
    (tmp_path / f"notes{ASIDE}").touch()
    remove_aside(tmp_path, r"[0-9]{2}\.json")
    assert len(list(tmp_path.iterdir())) == MOST_ASIDE + 1
    remove_aside(tmp_path / "nowhere", "x")


def test_a_file_of_another_user_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_in(tmp_path)
    file.write(GOOD)
    if os.geteuid() == 0:
        os.chown(file.path, 65534, 65534)
    else:  # only root gives files away
        monkeypatch.setattr(os, "geteuid", lambda: 65533)
    assert "and not to the agent's user (uid" in refusal(file)
    assert file.aside.exists()


@pytest.mark.parametrize("aside_is_taken", [False, True])
def test_a_directory_in_the_files_place_ends_no_agent(tmp_path: Path, *, aside_is_taken: bool) -> None:
    file = file_in(tmp_path)
    file.path.mkdir()
    if aside_is_taken:
        file.aside.mkdir()
        (file.aside / "something").touch()
    said = refusal(file)
    assert "is not a regular file" in said
    assert ("cannot be renamed to a.json.unusable (Directory not empty)" in said) == aside_is_taken
    if not aside_is_taken:
        file.write(GOOD)
        assert file.load(bytes) is not None


@pytest.mark.parametrize(("mode", "good"), [(0o600, True), (0o660, True), (0o604, False), (0o602, False)])
def test_a_file_that_every_user_may_use_is_put_aside(tmp_path: Path, mode: int, *, good: bool) -> None:
    """What a group may do is Kubernetes's doing (fsGroup)."""
    file = file_in(tmp_path)
    file.write(GOOD)
    file.path.chmod(mode)
    if good:
        assert file.load(bytes) is not None
    else:
        assert f"may be read or written by others (mode {mode:04o})" in refusal(file)


def test_a_file_that_cannot_be_read_now_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk may be back at the next start."""
    file = file_in(tmp_path)
    file.write(GOOD)
    opened = os.open

    def failing(path: str | Path, *arguments: int) -> int:
        if path == file.path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", failing)
    assert "cannot read" in refusal(file)
    assert file.path.exists()


# --- what is sealed ---


@pytest.mark.parametrize("seal", [None, SEAL], ids=["plain", "sealed"])
def test_what_was_written_is_read_and_only_the_holder_of_the_key_finds_it_on_the_disk(
    tmp_path: Path, seal: Seal | None
) -> None:
    file_in(tmp_path, seal).write(GOOD)
    stored = file_in(tmp_path, seal).load(bytes)
    assert stored is not None
    assert (stored.content, stored.outdated) == (GOOD, False)
    assert (b"private" in (tmp_path / "a.json").read_bytes()) == (seal is None)


def test_no_two_writes_have_one_key_and_nonce() -> None:
    """AES-GCM with one nonce twice gives away what was encrypted, and lets others forge."""
    sealed = {SEAL.seal(GOOD, "a")[27:] for _ in range(100)}
    assert len({each[:32] for each in sealed}) == len({each[32:48] for each in sealed}) == 100


SEALED_BEFORE = (
    "97754fc6acfb00584ffaf8a4a9d2256fc56ac4a27650bd53042fef70d9107a18ad1cf83da3b64accc9760fb55c6f279f"
    "311a4a030a699e918af97e698231f7"
)


def test_the_form_is_that_of_the_description() -> None:
    """Each version of the agent has to open what an earlier one sealed: a change of the form needs a new number."""
    sealed = bytes.fromhex(
        "7364732d6167656e74207365616c656420310a"  # "sds-agent sealed 1", a line feed
        + SEALED_BEFORE
    )
    assert SEAL.open(sealed, "spiffe://demo.example/a") == b"content"


@pytest.mark.parametrize("seal", [None, OTHER], ids=["no key", "another key"])
def test_a_wrong_key_destroys_nothing(tmp_path: Path, seal: Seal | None) -> None:
    file_in(tmp_path, SEAL).write(GOOD)
    before = (tmp_path / "a.json").read_bytes()
    wrong = file_in(tmp_path, seal)
    said = refusal(wrong)
    assert ("names no key" if seal is None else "with another key than the one that state_encryption names") in said
    assert "it stays until there is another to write" in said
    assert wrong.path.read_bytes() == before
    assert not wrong.aside.exists()
    assert file_in(tmp_path, SEAL).load(bytes) is not None, "with the right key it is as good as before"
    wrong.write(GOOD)
    assert wrong.aside.read_bytes() == before
    assert wrong.load(bytes) is not None


def test_a_plain_file_is_read_once_and_is_to_be_written_sealed(tmp_path: Path) -> None:
    file_in(tmp_path).write(GOOD)
    file = file_in(tmp_path, SEAL)
    stored = file.load(bytes)
    assert stored is not None
    assert (stored.content, stored.outdated) == (GOOD, True)
    file.write(stored.content)
    again = file.load(bytes)
    assert again is not None
    assert not again.outdated


def test_a_file_of_an_older_format_is_read_and_is_to_be_written_in_the_new_one(tmp_path: Path) -> None:
    file = file_in(tmp_path)
    for content in (b'{"key": "of the first version"}', b"[1, 2]"):
        file.write(content)
        stored = file.load(bytes)
        assert stored is not None
        assert stored.outdated
    assert FORMAT == 2


def test_the_files_of_two_identities_cannot_be_exchanged(tmp_path: Path) -> None:
    """Who may write to the directory, as a group may, would give one workload the identity of another."""
    file_in(tmp_path, SEAL, purpose="spiffe://demo.example/b").write(GOOD)
    assert "was damaged or exchanged since" in refusal(file_in(tmp_path, SEAL))
    assert (tmp_path / "a.json.unusable").exists()


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_change_of_a_sealed_file_goes_unnoticed_or_ends_the_agent(data: st.DataObject, tmp_path: Path) -> None:
    sealed = SEAL.seal(GOOD, "a")
    match data.draw(st.sampled_from(["a bit", "cut off", "anything behind"])):
        case "a bit":
            bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
            changed = bytearray(sealed)
            changed[bit // 8] ^= 1 << bit % 8
            damaged = bytes(changed)
        case "cut off":
            damaged = sealed[: data.draw(st.integers(0, len(sealed) - 1))]
        case _:
            damaged = sealed + data.draw(st.binary(min_size=1, max_size=10))
    with pytest.raises(SealError):
        SEAL.open(damaged, "a")
    file = file_in(tmp_path, SEAL)
    file.path.write_bytes(damaged)
    file.path.chmod(0o600)
    assert refusal(file).isprintable()


def test_another_key_is_told_from_damage() -> None:
    with pytest.raises(OtherKeyError):
        OTHER.open(SEAL.seal(GOOD, "a"), "a")


def test_a_key_shows_nowhere() -> None:
    assert "secret" not in repr(SEAL)
    assert str(bytes(range(32))) not in f"{SEAL!r} {SEAL}"


# --- the key's file ---


def test_every_byte_of_the_key_file_counts(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"k" * LEAST + b"\n")
    assert read_seal(tmp_path / "key", "state_encryption.key_file") == Seal(b"k" * LEAST + b"\n")


@pytest.mark.parametrize(
    ("size", "words"), [(0, "has 0 bytes"), (LEAST - 1, "has 31 bytes"), (MOST + 1, "has more than 4096 bytes")]
)
def test_a_key_of_the_wrong_size_is_refused(tmp_path: Path, size: int, words: str) -> None:
    (tmp_path / "key").write_bytes(b"k" * size)
    with pytest.raises(ConfigurationError, match=f"^state_encryption.key_file: the key in .*{words}; it must have 32"):
        read_seal(tmp_path / "key", "state_encryption.key_file")


@pytest.mark.parametrize("kind", ["missing", "a directory", "an empty pipe"])
def test_a_key_that_cannot_be_read_is_refused(tmp_path: Path, kind: str) -> None:
    match kind:
        case "a directory":
            (tmp_path / "key").mkdir()
        case "an empty pipe":
            os.mkfifo(tmp_path / "key")
    with pytest.raises(ConfigurationError, match=r"state_encryption\.key_file: .*openssl rand -out"):
        read_seal(tmp_path / "key", "state_encryption.key_file")


# --- full disks ---


@pytest.mark.parametrize("seal", [None, SEAL], ids=["plain", "sealed"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, seal: Seal | None) -> None:
    file = file_in(tmp_path, seal)
    file.write(GOOD)
    with full_disk(room=10), pytest.raises(OSError, match="File too large"):
        file.write(GOOD + b" ")
    stored = file_in(tmp_path, seal).load(bytes)
    assert stored is not None
    assert stored.content == GOOD
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# --- kills ---

WRITER = """
import sys
from pathlib import Path
from sds_agent.sealing import Seal
from sds_agent.statefile import StateFile

seal = Seal(bytes(range(32))) if sys.argv[2] == "sealed" else None
file = StateFile(Path(sys.argv[1], "a.json"), 1 << 16, seal=seal, purpose="a", instead="it ends", forbidden=0o007)
for number in range(100_000):
    file.write(b'{"format": 2, "number": "' + str(number).encode() * 5000 + b'"}')
    print(number, flush=True)
"""


@pytest.mark.parametrize("form", ["plain", "sealed"])
def test_a_kill_in_the_middle_of_a_write_leaves_the_old_content_or_the_new(tmp_path: Path, form: str) -> None:
    path = os.pathsep.join(filter(None, sys.path))
    for kill in range(5):
        command = [sys.executable, "-c", WRITER, str(tmp_path), form]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={"PYTHONPATH": path}) as writer:
            assert writer.stdout is not None
            begun = [int(writer.stdout.readline()) for _ in range(3 + kill)]
            writer.kill()  # while the next is written: the process does nothing else
            last = [*begun, *map(int, writer.stdout.read().split())][-1]
        remove_unfinished(tmp_path, r"a\.json")
        assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
        file = StateFile(
            tmp_path / "a.json",
            1 << 16,
            seal=SEAL if form == "sealed" else None,
            purpose="a",
            instead="it ends",
            forbidden=0o007,
        )
        stored = file.load(json.loads)
        assert stored is not None
        assert stored.content["number"] in {str(last) * 5000, str(last + 1) * 5000}
