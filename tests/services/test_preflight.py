"""What `check` says of this machine is what `run` does on it, and to find it out changes nothing."""

import asyncio
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fakes.ca_servers import fresh, plug
from fakes.configurations import MINIMAL, settings

from sds_agent import app, preflight
from sds_agent.cli.main import main
from sds_agent.clock import SystemClock
from sds_agent.config.settings import Settings
from sds_agent.directories import locked_directory
from sds_agent.errors import ConfigurationError, SdsAgentError
from sds_agent.files import locked
from sds_agent.sds.endpoint import SocketFile, claim
from sds_agent.sealing import Seal

CACERTS = "authorities: {plugged: {type: cacerts, directory: ca, passphrase_file: passphrase}}\n"


class Machine:
    """A directory for all of an agent's places, and what a test does to it."""

    def __init__(self, folder: Path, until_the_end: ExitStack) -> None:
        self.folder = folder
        self.socket = folder / "run" / "sds.sock"
        self.state = folder / "state"
        self.open = until_the_end

    def settings(self, more: str = "", sds: str = "") -> Settings:
        places = f"state_dir: {self.state}\nsds: {{socket: {self.socket}{sds}}}\n"
        return settings(self.folder, f"{MINIMAL}{places}{more}")


@pytest.fixture
def machine() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory() as made, ExitStack() as until_the_end:
        yield Machine(Path(made), until_the_end)


def entries(folder: Path) -> dict[str, tuple[int, int, float, bytes]]:
    """Everything there is: modes, owners, times and contents."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path)] = (status.st_mode, status.st_uid, status.st_mtime, content)
    return found


def unknown_group(machine: Machine) -> Settings:
    return machine.settings(sds=", group: no-such-group")


def unknown_owner(machine: Machine) -> Settings:
    return machine.settings(sds=", owner: no-such-user")


def open_directory(machine: Machine) -> Settings:
    machine.socket.parent.mkdir()
    machine.socket.parent.chmod(0o777)
    return machine.settings()


def file_for_a_directory(machine: Machine) -> Settings:
    machine.socket.parent.touch()
    return machine.settings()


def file_above_the_directory(machine: Machine) -> Settings:
    (machine.folder / "file").touch()
    machine.socket = machine.folder / "file" / "run" / "sds.sock"
    return machine.settings()


def deny_writing(machine: Machine, directory: Path) -> None:
    """Say of the directory what the kernel says to another user than root, who may write anywhere."""
    may, patch = os.access, machine.open.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(
        os, "access", lambda path, how, **by: not (path == directory and how & os.W_OK) and may(path, how, **by)
    )


def socket_directory_with_a_lock_alone(machine: Machine) -> Settings:
    """As where the lock is of an agent that could write there."""
    machine.socket.parent.mkdir()
    (machine.socket.parent / "sds.sock.lock").touch()
    deny_writing(machine, machine.socket.parent)
    return machine.settings()


def file_for_a_socket(machine: Machine) -> Settings:
    machine.socket.parent.mkdir()
    machine.socket.touch()
    return machine.settings()


def other_server(machine: Machine) -> Settings:
    machine.socket.parent.mkdir()
    listening = machine.open.enter_context(socket.socket(socket.AF_UNIX))
    listening.bind(str(machine.socket))
    listening.listen()
    return machine.settings()


def other_agent_on_the_socket(machine: Machine) -> Settings:
    machine.open.enter_context(claim(SocketFile(machine.socket)))
    return machine.settings()


def other_agent_on_the_state(machine: Machine) -> Settings:
    machine.open.enter_context(locked_directory(machine.state, "state_dir", SdsAgentError()))
    return machine.settings()


def open_state(machine: Machine) -> Settings:
    machine.state.mkdir()
    machine.state.chmod(0o777)
    return machine.settings()


def file_for_the_state(machine: Machine) -> Settings:
    machine.state.touch()
    return machine.settings()


def roots(machine: Machine, content: bytes, mode: int) -> Settings:
    file = machine.state / "authorities" / "local" / "roots.pem"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    file.chmod(mode)
    return machine.settings()


def damaged_roots(machine: Machine) -> Settings:
    return roots(machine, b"not a root", 0o600)


def roots_for_all_to_read(machine: Machine) -> Settings:
    return roots(machine, b"not a root", 0o644)


def no_cacerts(machine: Machine) -> Settings:
    return machine.settings(CACERTS)


def unfinished_cacerts(machine: Machine) -> Settings:
    (machine.folder / "passphrase").write_text("word\n")
    (machine.folder / "ca").mkdir()
    return machine.settings(CACERTS)


def no_passphrase(machine: Machine) -> Settings:
    root = fresh("root")
    plug(machine.folder / "ca", fresh("i", root), [], [root])
    return machine.settings(CACERTS)


def no_state_key(machine: Machine) -> Settings:
    return machine.settings("state_encryption: {key_file: state.key}\n")


def short_state_key(machine: Machine) -> Settings:
    (machine.folder / "state.key").write_bytes(b"a password")
    return no_state_key(machine)


def no_credentials(machine: Machine) -> Settings:
    return machine.settings("state_encryption: {credential: state}\n")


def run(chosen: Settings) -> str:
    """Start the agent, which ends by itself; returns why."""
    with pytest.raises((SdsAgentError, ExceptionGroup)) as raised:
        asyncio.run(asyncio.wait_for(app.run(chosen), 20))
    error = raised.value
    while isinstance(error, ExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, SdsAgentError)
    return str(error)


@pytest.mark.parametrize(
    "disturb",
    [
        unknown_group,
        unknown_owner,
        open_directory,
        file_for_a_directory,
        file_above_the_directory,
        socket_directory_with_a_lock_alone,
        file_for_a_socket,
        other_server,
        other_agent_on_the_socket,
        other_agent_on_the_state,
        open_state,
        file_for_the_state,
        damaged_roots,
        roots_for_all_to_read,
        no_cacerts,
        unfinished_cacerts,
        no_passphrase,
        no_state_key,
        short_state_key,
        no_credentials,
    ],
)
def test_what_keeps_the_agent_from_starting_is_known_beforehand(
    machine: Machine, disturb: Callable[[Machine], Settings]
) -> None:
    chosen = disturb(machine)
    before = entries(machine.folder)
    (reported,) = preflight.obstacles(chosen, SystemClock())
    assert entries(machine.folder) == before, "to look changes nothing"
    assert str(reported) == run(chosen)


def test_nothing_is_reported_of_a_machine_where_it_starts(machine: Machine) -> None:
    assert list(preflight.obstacles(machine.settings(), SystemClock())) == []
    assert [path.name for path in machine.folder.iterdir()] == ["sds-agent.yaml"]


def test_a_start_that_was_killed_leaves_no_obstacle(machine: Machine) -> None:
    with claim(SocketFile(machine.socket)) as endpoint, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(endpoint.temporary))
        machine.socket.hardlink_to(endpoint.temporary)
    assert machine.socket.is_socket()
    assert list(preflight.obstacles(machine.settings(), SystemClock())) == []


def test_the_key_of_the_state_may_be_a_credential_of_systemd(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine.folder / "state").mkdir()
    (machine.folder / "state" / "sds").write_bytes(bytes(32))
    chosen = machine.settings("state_encryption: {credential: sds}\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(machine.folder / "state"))
    assert preflight.seal(chosen) == Seal(bytes(32))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "relative")
    with pytest.raises(ConfigurationError, match="put LoadCredentialEncrypted=sds"):
        preflight.seal(chosen)


@pytest.mark.parametrize(("mode", "said"), [(0o644, True), (0o600, False)])
def test_a_key_of_the_state_that_every_user_can_read_is_warned_of(machine: Machine, mode: int, *, said: bool) -> None:
    key = machine.folder / "state.key"
    key.write_bytes(bytes(32))
    key.chmod(mode)
    chosen = no_state_key(machine)
    warnings = list(preflight.credentials(chosen, SystemClock()))
    assert [each.partition(": ")[0] for each in warnings] == ["state_encryption.key_file"] * said
    assert ("state_encryption.key_file", key) in preflight.sources(chosen), "nor may another user replace it unseen"


def test_every_obstacle_is_reported_at_once(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    open_state(machine)
    open_directory(machine)
    machine.settings(CACERTS, ", owner: no-such-user, group: no-such-group")
    assert main(["check", str(machine.folder / "sds-agent.yaml")]) == 3
    said = capsys.readouterr()
    assert said.out.startswith("The configuration is good.")
    first, *rest = said.err.splitlines()
    assert first == (f"sds-agent: the configuration is good, but the agent cannot start here as uid {os.geteuid()}:")
    keys = ["state_dir", "authorities.plugged.directory", "sds.owner", "sds.group", "sds.socket"]
    assert [line.split(": ")[1] for line in rest] == keys


def test_root_is_told_that_an_obstacle_is_the_directory_of_a_service(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who believes that the directories must be root's, and gives them to root, takes them from the service."""
    machine.settings()
    machine.folder.chmod(0o755)
    machine.state.mkdir(0o700)
    machine.socket.parent.mkdir(0o755)
    if os.geteuid() == 0:  # who alone can give them away
        os.chown(machine.state, 4711, 4711)
        os.chown(machine.socket.parent, 4711, 4711)
    assert main(["check", str(machine.folder / "sds-agent.yaml")]) == (3 if os.geteuid() == 0 else 0)
    told = [line for line in capsys.readouterr().err.splitlines() if "ask as that user" in line]
    belongs = f"sds-agent: warning: state_dir: {machine.state} belongs to uid 4711; if the agent runs as that user"
    assert [line.partition(",")[0] for line in told] == [belongs] * (os.geteuid() == 0)


def test_a_check_keeps_no_agent_from_starting(tmp_path: Path) -> None:
    """It holds the lock for an instant, and an agent that starts in it tries again."""
    lock = tmp_path / "lock"
    with ExitStack() as checking:
        checking.enter_context(locked(lock))
        leave = threading.Timer(0.01, checking.close)
        leave.start()
        with locked(lock):
            leave.join()


AS_ANOTHER = """
import os, sys
from sds_agent.cli.main import main
main(["check"])  # what imports are to come: a user may not be let into root's Python
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (0o755, []),
        (
            0o555,
            [
                "state_dir: cannot use {0}/state: Permission denied",
                "sds.socket: cannot use the directory {0}/run: Permission denied",
            ],
        ),
    ],
)
def test_an_operator_who_forgot_sudo_is_warned(machine: Machine, mode: int, said: list[str]) -> None:
    machine.settings()
    if os.geteuid() == 0:
        os.chown(machine.folder, 65534, 65534)
    machine.folder.chmod(mode)
    call = [sys.executable, "-B", "-c", AS_ANOTHER, "check", str(machine.folder / "sds-agent.yaml")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (3 if said else 0), done.stderr
    for words in said:
        assert words.format(machine.folder) in done.stderr


# Outputs


def with_output(machine: Machine, output: Path) -> Settings:
    text = MINIMAL + f"    output: {output}\nstate_dir: {machine.state}\nsds: {{socket: {machine.socket}}}\n"
    return settings(machine.folder, text)


@pytest.mark.parametrize("below", [".", "sub"])
def test_an_output_that_will_never_be_written_is_reported_and_not_called_good(
    machine: Machine, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An emptyDir of Kubernetes is open to everybody, and so is what lies below it."""
    volume = machine.folder / "volume"
    volume.mkdir()
    volume.chmod(0o777)
    with_output(machine, volume / below)
    before = entries(machine.folder)
    assert main(["check", str(machine.folder / "sds-agent.yaml")]) == 3
    assert entries(machine.folder) == before
    summary, said = capsys.readouterr().err.splitlines()
    assert summary == (
        f"sds-agent: the configuration is good, but the agent cannot write every output here as uid {os.geteuid()}:"
    )
    assert said.startswith(f"sds-agent: workloads[0].output: every user may write to {volume}, and so could")


def test_an_output_that_takes_no_more_files_is_reported(machine: Machine) -> None:
    output = machine.folder / "certs"
    output.mkdir()
    (output / "..lock").touch()
    deny_writing(machine, output)
    (reported,) = preflight.shortfalls(with_output(machine, output))
    assert str(reported).startswith(f"workloads[0].output: cannot use {output}: Permission denied; make it writable")


def test_an_output_that_another_agent_writes_is_reported(machine: Machine) -> None:
    output = machine.folder / "certs"
    output.mkdir()
    assert list(preflight.shortfalls(with_output(machine, output))) == []
    with locked(output / "..lock"):
        (reported,) = preflight.shortfalls(with_output(machine, output))
    assert str(reported) == f"workloads[0].output: another sds-agent writes to {output}"


def test_an_admin_server_that_could_not_listen_is_reported(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = machine.open.enter_context(socket.create_server(("127.0.0.1", 0)))
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    path = machine.folder / "admin.sock"
    path.touch()
    machine.settings(f"admin: {{socket: {path}, address: {address}}}\n")
    assert main(["check", str(machine.folder / "sds-agent.yaml")]) == 3
    summary, *said = capsys.readouterr().err.splitlines()
    assert summary.endswith(f"but the agent cannot show its status here as uid {os.geteuid()}:")
    assert said == [
        f"sds-agent: admin.socket: {path} is not a socket; remove that file or choose another path",
        f"sds-agent: admin.address: cannot listen on {address}: Address already in use; choose another port",
    ]
    assert list(preflight.hidden(machine.settings(f"admin: {{address: {address}, enabled: false}}\n"))) == []


def test_an_agent_that_cannot_start_is_not_said_to_show_nothing_as_well(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    path = machine.folder / "admin.sock"
    path.touch()
    machine.socket.parent.mkdir(parents=True, exist_ok=True)
    machine.socket.touch()
    machine.settings(f"admin: {{socket: {path}}}\n")
    assert main(["check", str(machine.folder / "sds-agent.yaml")]) == 3
    said = capsys.readouterr().err
    assert f"{machine.socket} is not a socket" in said
    assert "admin.socket" not in said


def test_a_check_binds_no_admin_address_for_longer_than_it_lasts(machine: Machine, port: int) -> None:
    chosen = machine.settings(f"admin: {{address: 127.0.0.1:{port}}}\n")
    before = entries(machine.folder)
    assert list(preflight.hidden(chosen)) == []
    assert entries(machine.folder) == before
    socket.create_server(("127.0.0.1", port)).close()


def test_a_group_that_could_change_what_is_stored_is_reported(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Kubernetes gives volumes to the group of a pod."""
    for directory in (machine.state, machine.socket.parent, machine.folder / "certs"):
        directory.mkdir()
        directory.chmod(0o2775)
    with_output(machine, machine.folder / "certs")
    assert main(["check", str(machine.folder / "sds-agent.yaml")]) == 0
    warned = capsys.readouterr().err.splitlines()
    keys = ["state_dir", "sds.socket", "workloads[0].output"]
    assert [line.split(": ")[2] for line in warned] == keys
    assert all("could replace the agent's files (chmod g-w" in line for line in warned)


@pytest.mark.parametrize(
    ("mode", "own", "another"), [(0o700, True, True), (0o710, False, True), (0o701, True, False), (0o755, False, False)]
)
def test_a_group_that_cannot_get_to_its_socket_is_warned_of(
    machine: Machine, mode: int, *, own: bool, another: bool
) -> None:
    """The socket's mode alone lets it in: to its Envoys the agent would not be there."""
    machine.socket.parent.mkdir()
    machine.socket.parent.chmod(mode)
    machine.folder.chmod(0o755)
    for group, warned in ((machine.socket.parent.stat().st_gid, own), (4711, another)):
        said = list(preflight.unreachable(machine.settings(sds=f", group: '{group}'")))
        reported = f"sds.socket: the group {group} cannot pass {machine.socket.parent}, which has the mode {mode:04o}"
        assert [each.startswith(reported) for each in said] == [True] * warned
    assert list(preflight.unreachable(machine.settings())) == [], "without a group nothing more was meant"
