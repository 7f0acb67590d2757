"""The files that make the agent a service of systemd: the unit, its socket, and the account that it runs as. Pure.

Each directive that an operator could wonder about has its reason above it, because these files are read and changed on
the machine. Source of the names: systemd.exec(5), systemd.service(5), systemd.socket(5), sysusers.d(5).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

NAME = "sds-agent"
UNITS = Path("/etc/systemd/system")
ACCOUNTS = Path("/etc/sysusers.d")


class UnitPlan(Struct, frozen=True, kw_only=True):
    """What the files depend on.

    `command` is the agent's program and `file` its configuration. `runtime` and `state` are names of directories below
    /run and /var/lib, None for one that is elsewhere. `credentials` are files that only root may read, each by the name
    of the variable that sets the key which names it, and `state_credential` is the name of the one that the
    configuration has for the key of the state. `writable` are directories outside these that the agent writes to.
    """

    command: str
    file: Path
    socket: Path
    mode: str
    user: str = NAME
    group: str | None = None
    runtime: str | None = NAME
    state: str | None = NAME
    credentials: Mapping[str, Path] = {}
    state_credential: str | None = None
    writable: Sequence[Path] = ()
    at_home: bool = False


class UnitFile(Struct, frozen=True):
    """A file's place and text."""

    path: Path
    text: str


def files(plan: UnitPlan, *, with_socket: bool) -> tuple[UnitFile, ...]:
    """The service, its account, and its socket where it is to have one."""
    service = UnitFile(UNITS / f"{NAME}.service", _service(plan, with_socket=with_socket))
    account = UnitFile(ACCOUNTS / f"{NAME}.conf", _account(plan))
    return (account, service, *([UnitFile(UNITS / f"{NAME}.socket", _socket(plan))] if with_socket else []))


def _account(plan: UnitPlan) -> str:
    return f'# The account of the agent (sysusers.d(5)): `systemd-sysusers` makes it.\nu {plan.user} - "sds-agent"\n'


def _socket(plan: UnitPlan) -> str:
    group = [] if plan.group is None else [f"SocketGroup={plan.group}"]
    return _joined(
        "[Unit]",
        "Description=The socket of sds-agent",
        "",
        "[Socket]",
        f"ListenStream={_verbatim(str(plan.socket))}",
        "# A process that may connect can read private keys.",
        f"SocketMode={plan.mode}",
        f"SocketUser={plan.user}",
        *group,
        "# Envoys that connect while the agent restarts wait here.",
        "Backlog=4096",
        "",
        "[Install]",
        "WantedBy=sockets.target",
    )


def _service(plan: UnitPlan, *, with_socket: bool) -> str:
    return _joined(
        "[Unit]",
        "Description=sds-agent, mutual TLS identities for the Envoys of this machine",
        "Documentation=man:sds-agent(1)",
        "# An authority is usually on another machine. The agent asks again if the network comes later.",
        "Wants=network-online.target",
        "After=network-online.target",
        *([f"Requires={NAME}.socket", f"After={NAME}.socket"] if with_socket else []),
        "# The agent backs off by itself, so systemd never gives up on it.",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        *_process(plan),
        "",
        *_places(plan),
        "",
        *_HARDENING,
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    )


def _process(plan: UnitPlan) -> Sequence[str]:
    return (
        "# Ready means that Envoys can connect; `systemctl status` says whether every workload has its certificate.",
        "Type=notify",
        f"ExecStart={_quoted(plan.command)} run {_quoted(str(plan.file))}",
        "ExecReload=kill -HUP $MAINPID",
        "Restart=always",
        "RestartSec=1",
        "# systemd restarts an agent that gives no sign of life for so long.",
        "WatchdogSec=60",
        "# Three descriptors for each connection: the Envoy's end, and both ends of its way to gRPC.",
        "LimitNOFILE=65536",
    )


def _places(plan: UnitPlan) -> Sequence[str]:
    # systemd gives RuntimeDirectory= to the user and the group, and with it the socket that is in it
    lines = [f"User={plan.user}", *([] if plan.group is None else [f"Group={plan.group}"])]
    if plan.runtime is not None:
        # without it systemd would remove the socket's directory between two agents
        lines += [f"RuntimeDirectory={_quoted(plan.runtime)}", "RuntimeDirectoryPreserve=yes"]
    if plan.state is not None:
        lines += [f"StateDirectory={_quoted(plan.state)}", "StateDirectoryMode=0700"]
    if plan.writable:
        lines += ["# What the agent writes to besides: these have to be there, or the service does not start."]
    lines += [f"ReadWritePaths={_quoted(str(each))}" for each in plan.writable]
    if plan.state_credential is not None:
        name = plan.state_credential
        lines += [
            "# The key of the state, which has to be there, or the service does not start:",
            f"# openssl rand 32 | systemd-creds encrypt --name={name} - /etc/credstore.encrypted/{name}",
            f"LoadCredentialEncrypted={name}",
        ]
    if plan.credentials:
        lines += [
            "# Files that only root can read. systemd reads them once, at each start: for a file that changes while",
            "# the agent runs, such as a token that is renewed, remove both lines and let the agent's user read it.",
        ]
    for variable, path in plan.credentials.items():
        name = variable.rpartition("SDS_AGENT__")[2].lower().replace("__", ".")
        lines += [f"LoadCredential={name}:{_verbatim(str(path))}", f"Environment={variable}=%d/{name}"]
    home = "read-only" if plan.at_home else "yes"
    return [*lines, f"ProtectHome={home}"]


_HARDENING = (
    "# What the agent never needs (systemd-analyze security sds-agent). Without PrivateUsers=, so that the kernel can",
    "# tell the agent which user an Envoy runs as.",
    "CapabilityBoundingSet=",
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "PrivateTmp=yes",
    "PrivateDevices=yes",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectProc=invisible",
    "ProcSubset=pid",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "RemoveIPC=yes",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "KeyringMode=private",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@privileged @resources",
    "# It gives its socket and its outputs to their groups.",
    "SystemCallFilter=@chown",
    "SystemCallErrorNumber=EPERM",
    "UMask=0077",
    "# Core dumps and swap could hold private keys.",
    "LimitCORE=0",
    "MemorySwapMax=0",
)


def _quoted(text: str) -> str:
    """A word of a unit file, with its percent signs doubled (systemd.unit(5), specifiers)."""
    escaped = _verbatim(text.replace("\\", "\\\\").replace('"', '\\"'))
    return escaped if escaped == text and not any(c.isspace() for c in text) else f'"{escaped}"'


def _verbatim(text: str) -> str:
    """The rest of a line, in which systemd unquotes nothing and expands specifiers all the same."""
    return text.replace("%", "%%")


def _joined(*lines: str) -> str:
    return "\n".join(lines) + "\n"
