"""Whether an agent with these settings could start here and now, found without a change to anything.

Each part that can refuse to start has a check of its own, which its start uses too. This module calls them in the order
in which `app.run` starts the parts.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from pwd import getpwuid
from typing import TYPE_CHECKING

from sds_agent.authority import registry
from sds_agent.authority.kind import Context
from sds_agent.clock import Clock
from sds_agent.config.settings import OutputSettings, SdsSettings, Settings
from sds_agent.directories import ROOT, UntrustedDirectoryError, check_directory, check_lockable_directory
from sds_agent.errors import ConfigurationError, Problem, SdsAgentError
from sds_agent.sds.endpoint import SocketFile, blocked_directories, refusals
from sds_agent.sealing import Seal, read_seal

if TYPE_CHECKING:
    from sds_agent.sds.permissions import Rules
    from sds_agent.sources import Source


_SERVER_ROOTS = "ca_file"
"""The key by which each kind names the file."""


class StateInUseError(SdsAgentError):
    """Another agent runs on the state directory."""


def in_use(state_dir: Path) -> StateInUseError:
    """The error for a state directory that another agent has locked."""
    return StateInUseError(f"another sds-agent runs on {state_dir}; stop it first, or give this one another state_dir")


def context(settings: Settings, name: str, clock: Clock) -> Context:
    """What the authority of this name gets of the agent."""
    return Context(name, settings.trust_domain, settings.state_dir / "authorities" / name, clock)


def socket_file(sds: SdsSettings) -> SocketFile:
    """The socket as the settings want it."""
    return SocketFile(sds.socket, mode=sds.mode, owner=sds.owner, group=sds.group)


def client_rules(settings: Settings) -> "Rules":
    """Who may have which secret; empty where every process that may connect may have all. Raises ProblemsError.

    Blocks on what the system takes its users and groups from.
    """
    chosen = [
        (each.names, each.clients, f"workloads[{number}].clients")
        for number, each in enumerate(settings.workloads)
        if each.clients is not None
    ]
    if not chosen:
        return {}
    from sds_agent.sds.permissions import Accounts  # noqa: PLC0415 - most configurations have no rules

    known = Accounts()
    return {
        name: known.rule(clients.users, clients.groups, setting) for names, clients, setting in chosen for name in names
    }


def seal(settings: Settings) -> Seal | None:
    """What encrypts the state, None where it is not to be encrypted. Raises ConfigurationError for an unusable key."""
    found = _state_key(settings)
    return None if found is None else read_seal(found[1], found[0])


def _state_key(settings: Settings) -> "Source | None":
    """The key that names the state's key, and its file. Raises ConfigurationError where there can be no such file."""
    encryption = settings.state_encryption
    if encryption is None:
        return None
    if encryption.key_file is not None:
        return "state_encryption.key_file", encryption.key_file
    setting, directory = "state_encryption.credential", os.environ.get("CREDENTIALS_DIRECTORY", "")
    if not Path(directory).is_absolute():
        name = encryption.credential
        raise ConfigurationError(
            f"{setting}: $CREDENTIALS_DIRECTORY names no directory; put LoadCredentialEncrypted={name} or "
            f"LoadCredential={name}:PATH into the unit, and let systemd start the agent"
        )
    return setting, Path(directory, encryption.credential or "")


def obstacles(settings: Settings, clock: Clock) -> Iterator[SdsAgentError]:
    """Everything for which `app.run` would refuse to start now. Nothing is made, bound, locked or written."""
    stateless = False
    try:
        check_lockable_directory(settings.state_dir, "state_dir", in_use(settings.state_dir))
    except SdsAgentError as error:
        stateless = isinstance(error, ConfigurationError)
        yield error
    try:
        seal(settings)
    except SdsAgentError as error:
        yield error
    for name, chosen in settings.authorities.items():
        kind = registry.kind_of(chosen)
        if stateless and kind.stores_state:
            continue  # its directory is in the one that cannot be used
        try:
            kind.check(chosen, context(settings, name, clock))
        except SdsAgentError as error:
            yield error
    try:
        client_rules(settings)
    except SdsAgentError as error:
        yield error
    yield from refusals(socket_file(settings.sds))


def shortfalls(settings: Settings) -> Iterator[SdsAgentError]:
    """Everything that `app.run` would log again and again while it serves: outputs that it cannot write."""
    for key, output in _outputs(settings):
        try:
            _check_output(output, key)
        except SdsAgentError as error:
            yield error


def hidden(settings: Settings) -> Iterator[SdsAgentError]:
    """Everything that keeps the admin server from listening: the agent would serve, and show nothing of itself."""
    from sds_agent.admin import server  # noqa: PLC0415 - measured: 3 ms

    file, address = server.socket_file(settings.admin), settings.admin.address
    if file is not None:
        yield from refusals(file)
    if settings.admin.enabled and address is not None and address.port:
        try:
            server.bound(address).close()
        except SdsAgentError as error:
            yield error


def shared(settings: Settings) -> Iterator[str]:
    """Which other users could change the agent's own files, in directories that it uses with a warning."""
    for key, directory in _own_directories(settings):
        with suppress(UntrustedDirectoryError, OSError):  # which is an obstacle or a shortfall
            yield from (f"{key}: {cause}" for cause in check_directory(directory))


def of_services(settings: Settings) -> Iterator[str]:
    """Where root asks, the other users to whom the agent's own directories belong, with one directory of each: a
    service runs as such a user, and for root its directories are obstacles.
    """
    found = dict[int, tuple[str, Path]]()
    for key, directory in _own_directories(settings) if os.geteuid() == ROOT else ():
        with suppress(OSError):  # it is not there yet, or an obstacle
            found.setdefault(directory.stat().st_uid, (key, directory))
    for user, (key, directory) in found.items():
        if user != ROOT:
            yield (
                f"{key}: {directory} belongs to {_named(user)}; if the agent runs as that user, as a service does, "
                "what is said of it here holds for root alone: ask as that user before you change it"
            )


def _named(user: int) -> str:
    try:
        return f"the user {getpwuid(user).pw_name}"
    except KeyError:
        return f"uid {user}"


def _own_directories(settings: Settings) -> Iterator[tuple[str, Path]]:
    """The keys of the directories that the agent writes to, and what they name."""
    yield "state_dir", settings.state_dir
    yield "sds.socket", settings.sds.socket.parent
    yield from ((key, output.directory) for key, output in _outputs(settings))


def unreachable(settings: Settings) -> Iterator[str]:
    """The directories that keep the users of `sds.owner` and `sds.group` from the socket."""
    with suppress(SdsAgentError, OSError):  # which is an obstacle
        yield from (f"sds.socket: {cause}" for cause in blocked_directories(socket_file(settings.sds)))


def sources(settings: Settings) -> "list[Source]":
    """The keys that name what the operator provides, and what they name."""
    encryption = settings.state_encryption
    state_key = None if encryption is None else encryption.key_file
    return [
        *([] if state_key is None else [("state_encryption.key_file", state_key)]),
        *_telemetry_headers(settings),
        *((f"sds.files[{number}]", directory) for number, directory in enumerate(settings.sds.files)),
        *authority_sources(settings),
    ]


def _telemetry_headers(settings: Settings) -> "list[Source]":
    telemetry = settings.telemetry
    if telemetry is None or telemetry.headers_file is None:
        return []
    return [("telemetry.headers_file", telemetry.headers_file)]


def authority_sources(settings: Settings) -> "list[Source]":
    """Those of the authorities."""
    return [
        (f"authorities.{name}.{key}", path)
        for name, chosen in settings.authorities.items()
        for key, path in registry.kind_of(chosen).files(chosen).items()
    ]


def exposed(settings: Settings) -> Iterator[str]:
    """Secrets for the authorities that every user can read, in lines that begin with the configuration's key. Blocks on
    the disk.
    """
    from sds_agent.sources import find_readable  # noqa: PLC0415 - not before the first secret

    for name, chosen in settings.authorities.items():
        kind = registry.kind_of(chosen)
        keys, files = (*kind.secrets, *kind.holds_keys), kind.files(chosen).items()
        yield from find_readable((f"authorities.{name}.{key}", path) for key, path in files if key in keys)


def credentials(settings: Settings, clock: Clock) -> Iterator[str]:
    """What is wrong with the credentials that the agent would show to its CAs and its collector, and with the key of
    the state, in lines that begin with the configuration's key. Blocks on the disk.
    """
    from sds_agent.sources import find_readable  # noqa: PLC0415 - not before the first secret

    with suppress(ConfigurationError):  # which is an obstacle
        found = _state_key(settings)
        yield from find_readable([] if found is None else [found])
    yield from find_readable(_telemetry_headers(settings))
    yield from exposed(settings)
    yield from unusable_credentials(settings, clock)


def unusable_credentials(settings: Settings, clock: Clock) -> Iterator[str]:
    """What keeps the credentials from being shown to the CAs, in such lines, and the CAs' servers from being verified.
    Blocks on the disk.
    """
    for name, chosen in settings.authorities.items():
        kind = registry.kind_of(chosen)
        roots = kind.files(chosen).get(_SERVER_ROOTS)
        for each in (*_server_roots(roots), *kind.credentials(chosen, context(settings, name, clock))):
            yield f"authorities.{name}.{'.'.join(map(str, each.where))}: {each.found}; {each.fix}"


def _server_roots(file: Path | None) -> Iterator[Problem]:
    """What is wrong with the file that vouches for a CA's server; nothing where it is not there, since it may come."""
    if file is None or not os.path.lexists(file):
        return
    from sds_agent.authority.credentials import as_problem, read_roots  # noqa: PLC0415 - not before the first secret
    from sds_agent.authority.protocol import AuthorityError  # noqa: PLC0415 - likewise

    try:
        read_roots(file)
    except AuthorityError as error:
        yield as_problem(_SERVER_ROOTS, error)


def _outputs(settings: Settings) -> list[tuple[str, OutputSettings]]:
    found = ((f"workloads[{number}].output", each.output) for number, each in enumerate(settings.workloads))
    return [(key, output) for key, output in found if output is not None]


def _check_output(output: OutputSettings, key: str) -> None:
    from sds_agent.outputs.directory import access_of, check_output  # noqa: PLC0415 - measured: 9 ms

    check_output(output.directory, key)
    access_of(output.owner, output.group, int(output.key_mode, 8), key)
