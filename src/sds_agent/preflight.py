"""Whether an agent with these settings could start here and now, found by looking alone.

Each part that can refuse to start has its own look, which its start uses too; here they are only put together, in the
order in which `app.run` comes to them.
"""

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from sds_agent.config.settings import AuthoritySettings, CacertsSettings, EmbeddedSettings, SdsSettings, Settings
from sds_agent.directories import UntrustedDirectoryError, check_directory, check_lockable_directory
from sds_agent.errors import ConfigurationError, SdsAgentError, within
from sds_agent.sds.endpoint import SocketFile, blocked_directories, refusals
from sds_agent.sources import Source


class StateInUseError(SdsAgentError):
    """Another agent runs on the state directory."""


def in_use(state_dir: Path) -> StateInUseError:
    """The error for a state directory that another agent holds."""
    return StateInUseError(f"another sds-agent runs on {state_dir}; stop it first, or give this one another state_dir")


def authority_directory(settings: Settings, name: str) -> Path:
    """Where an embedded CA keeps its roots."""
    return settings.state_dir / "authorities" / name


def socket_file(sds: SdsSettings) -> SocketFile:
    """The socket as the settings want it."""
    return SocketFile(sds.socket, mode=sds.mode, owner=sds.owner, group=sds.group)


def obstacles(settings: Settings, now: datetime) -> Iterator[SdsAgentError]:
    """Everything for which `app.run` would refuse to start at `now`. Nothing is made, bound, locked or written."""
    stateless = False
    try:
        check_lockable_directory(settings.state_dir, "state_dir", in_use(settings.state_dir))
    except SdsAgentError as error:
        stateless = isinstance(error, ConfigurationError)
        yield error
    for name, authority in settings.authorities.items():
        if stateless and isinstance(authority, EmbeddedSettings):
            continue  # its directory is in the one that cannot be used
        try:
            _look_at_authority(name, authority, settings, now)
        except SdsAgentError as error:
            yield error
    yield from refusals(socket_file(settings.sds))


def shortfalls(settings: Settings) -> Iterator[SdsAgentError]:
    """Everything that `app.run` would complain of again and again while it serves: outputs that it cannot write."""
    for key, directory in _outputs(settings):
        try:
            _look_at_output(directory, key)
        except SdsAgentError as error:
            yield error


def shared(settings: Settings) -> Iterator[str]:
    """Who else could change what the agent keeps, where it takes the directory all the same."""
    looks: list[tuple[str, Path]] = [("state_dir", settings.state_dir), ("sds.socket", settings.sds.socket.parent)]
    for key, directory in (*looks, *_outputs(settings)):
        with suppress(UntrustedDirectoryError, OSError):  # which is an obstacle or a shortfall
            yield from (f"{key}: {cause}" for cause in check_directory(directory))


def unreachable(settings: Settings) -> Iterator[str]:
    """Where those whom `sds.owner` and `sds.group` mean cannot get to the socket."""
    with suppress(SdsAgentError, OSError):  # which is an obstacle
        yield from (f"sds.socket: {cause}" for cause in blocked_directories(socket_file(settings.sds)))


def sources(settings: Settings) -> list[Source]:
    """The keys that name what the operator provides, and what they name."""
    keys = ("directory", "passphrase_file", "ca_file", "token_file", "provisioned", "extra_anchors")
    return [
        (f"authorities.{name}.{key}", path)
        for name, authority in settings.authorities.items()
        for key in keys
        if (path := getattr(authority, key, None)) is not None
    ]


def _outputs(settings: Settings) -> list[tuple[str, Path]]:
    found = ((f"workloads[{number}].output", each.output) for number, each in enumerate(settings.workloads))
    return [(key, directory) for key, directory in found if directory is not None]


def _look_at_output(directory: Path, key: str) -> None:
    from sds_agent.outputs.directory import look_at  # noqa: PLC0415 - measured: 9 ms

    look_at(directory, key)


def _look_at_authority(name: str, authority: AuthoritySettings, settings: Settings, now: datetime) -> None:
    """An Istio CA is first asked when the agent runs, and then again and again: nothing of it keeps a start up."""
    if isinstance(authority, EmbeddedSettings):
        from sds_agent.signing import self_signed  # noqa: PLC0415 - only where there is such a CA

        self_signed.check(authority_directory(settings, name), "state_dir")
    elif isinstance(authority, CacertsSettings):
        from sds_agent.signing import directory  # noqa: PLC0415 - only where there is such a CA

        with within(f"authorities.{name}.directory"):
            directory.check(authority.directory, settings.trust_domain, authority.passphrase_file, now)
