"""Settings in plain sentences, and what on this machine does not fit them yet."""

import shutil
import stat
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from msgspec.structs import fields

from sds_agent.admin.settings import AdminSettings, TelemetrySettings
from sds_agent.authority import registry
from sds_agent.config.loading import Loaded
from sds_agent.config.settings import RenewalSettings, SdsSettings, Settings, WorkloadSettings
from sds_agent.configfile.durations import format_duration
from sds_agent.issuance.schedule import SPREAD_FROM
from sds_agent.text import quoted


def explain(loaded: Loaded) -> Iterator[str]:
    """What the agent would do, a paragraph at a time."""
    settings = loaded.settings
    yield f"The configuration is good. It comes from {loaded.source}, and with it the agent does this:"
    yield _socket(settings)
    yield _state(settings)
    yield _admin(settings.admin)
    if settings.telemetry is not None:
        yield _telemetry(settings.telemetry)
    for name, chosen in settings.authorities.items():
        yield registry.kind_of(chosen).sentence(chosen, name)
    for workload in settings.workloads:
        yield _workload(workload, settings)
    yield f"Every Envoy gets the CA certificates to trust by the name {' or '.join(settings.bundle_names)}."
    if settings.sds.files:
        yield _files(settings.sds)


def _socket(settings: Settings) -> str:
    sds, limits = settings.sds, settings.sds.limits
    owner = f"the user {sds.owner}" if sds.owner is not None else "the user that runs it"
    group = f"the group {sds.group}" if sds.group is not None else "that user's group"
    writers = f"{owner} and {group}" if sds.mode & stat.S_IWGRP else f"{owner} alone"
    but = " but what is for some of them" if any(each.clients is not None for each in settings.workloads) else ""
    return (
        f"It listens on the socket {sds.socket}, which has the mode {sds.mode} and belongs to {owner} and {group}. "
        f"Processes of {writers} (and of root) can connect to it, and each of them can have every certificate "
        f"and key below{but}. At one time there may be {limits.streams} streams with {limits.names} names on each, "
        f"and {limits.request_bytes} bytes in a request; clients can make it store {limits.stored_bytes} bytes."
    )


def _admin(admin: AdminSettings) -> str:
    places = [
        *([] if admin.socket is None else [f"the socket {admin.socket} with the mode {admin.mode}"]),
        *([] if admin.address is None else [f"http://{admin.address}"]),
    ]
    if not admin.enabled or not places:
        return "It shows its status nowhere: there is no admin server."
    return f"It shows its status, metrics and a page, and no key, on {' and on '.join(places)}."


def _telemetry(telemetry: TelemetrySettings) -> str:
    headers = "" if telemetry.headers_file is None else f", with the headers in {telemetry.headers_file}"
    return (
        f"Every {format_duration(telemetry.interval)} it sends its metrics, and a span for each attempt at an "
        f"authority, over OTLP to {telemetry.otlp_endpoint}{headers}."
    )


def _files(sds: SdsSettings) -> str:
    return (
        f"An Envoy can also have every certificate with its key, and all roots, in files below "
        f"{' and '.join(map(str, sds.files))}, by the names file-cert:CERTIFICATE~KEY and file-root:ROOTS."
    )


def _state(settings: Settings) -> str:
    if not settings.keep_certificates:
        return f"It keeps its state in {settings.state_dir}; it stores no certificates and keys there."
    return (
        f"It keeps its state in {settings.state_dir}, with the certificates and their private keys, so that after a "
        f"restart it serves at once what is still valid.{_encrypted(settings)}"
    )


def _encrypted(settings: Settings) -> str:
    encryption = settings.state_encryption
    if encryption is None:
        return ""
    named = f"the file {encryption.key_file}" if encryption.key_file else f"the credential {encryption.credential}"
    return f" It encrypts them with the key in {named}."


def _workload(workload: WorkloadSettings, settings: Settings) -> str:
    return (
        f"The workload {workload.name} has the SPIFFE ID {workload.spiffe_id}. An Envoy gets its certificate and key "
        f"by the name {' or '.join(workload.names)}{_clients(workload)}. {_origin(workload, settings)}"
        f"{_output(workload)}"
    )


def _clients(workload: WorkloadSettings) -> str:
    if workload.clients is None:
        return ""
    named = {"user": workload.clients.users, "group": workload.clients.groups}
    who = [f"the {kind}{'s' * (len(names) > 1)} {' and '.join(names)}" for kind, names in named.items() if names]
    return f", if its process is of {' or of '.join(who)}"


def _origin(workload: WorkloadSettings, settings: Settings) -> str:
    names, origin = settings.authorities_of(workload), _authorities(workload, settings)
    supplying = [name for name in names if registry.kind_of(settings.authorities[name]).supplies]
    if len(supplying) == len(names):
        return (
            f"Both come from {origin}, which decides the kind of the key, how long a certificate is valid and when the "
            "next one comes."
        )
    besides = "".join(f" The authority {name} decides all of this by itself." for name in supplying)
    return (
        f"The key is of the kind {workload.key}; a certificate comes from {origin}, is asked to be valid for "
        f"{format_duration(workload.ttl)} and is renewed {_renewed(workload.ttl, settings.renewal)} after its issue"
        f"{_first_renewed(workload.ttl, settings.renewal)}.{besides}"
    )


def _authorities(workload: WorkloadSettings, settings: Settings) -> str:
    first, *others = settings.authorities_of(workload)
    if not others:
        return f"the authority {first}"
    failover = settings.failover
    return (
        f"the authority {first}, and while that fails from {', then '.join(others)} (after {failover.failures} "
        f"failures or {format_duration(failover.after)}; {first} is tried again after "
        f"{format_duration(failover.back_after)} or at the next renewal)"
    )


def _output(workload: WorkloadSettings) -> str:
    output = workload.output
    if output is None:
        return ""
    said = f" Certificate, key and roots are also written as files to {output.directory}."
    for occasion, command in (("new files are there", output.on_renewed), ("an attempt has failed", output.on_failed)):
        if command is not None:
            said += f" When {occasion}, the agent runs {command[0]}."
    return said


def _renewed(ttl: timedelta, renewal: RenewalSettings) -> str:
    first, last = (
        format_duration(timedelta(seconds=round((ttl * share).total_seconds(), 1)))
        for share in (renewal.fraction - renewal.jitter, renewal.fraction + renewal.jitter)
    )
    return first if first == last else f"between {first} and {last}"


def _first_renewed(ttl: timedelta, renewal: RenewalSettings) -> str:
    return ", the first one at any moment before that" if renewal.jitter and ttl >= SPREAD_FROM else ""


def warnings(settings: Settings) -> Iterator[str]:
    """What is allowed and probably not meant, or not ready on this machine."""
    stored = [name for name, chosen in settings.authorities.items() if registry.kind_of(chosen).holds_ca]
    if settings.state_encryption is not None and stored:
        yield (
            f"state_encryption: what the authority {' or '.join(stored)} stores for itself, such as a CA's key, is not "
            f"encrypted; protect {settings.state_dir}/authorities by other means"
        )
    for name, chosen in settings.authorities.items():
        kind, use = registry.kind_of(chosen), settings.use_of(name)
        if not use.workloads:
            yield (
                f"authorities.{name}: no workload gets its certificate from it, and the roots that it advertises are "
                "trusted all the same; remove it if that is not meant"
            )
        yield from kind.warnings(chosen, use)
        if kind.supplies:
            yield from _without_effect(settings, name)
        if kind.opens_without_files:
            for key, path in kind.files(chosen).items():
                spare = key in kind.secrets and kind.renews(chosen)
                # a join token is removed once it is used, and the current certificate is the proof from then on
                but = ", unless it renews with the current certificate" if spare else ""
                lacks = f"no certificate comes from this authority{but}"
                yield from _about_file(f"authorities.{name}.{key}", path, lacks)
    if settings.telemetry is not None and settings.telemetry.headers_file is not None:
        yield from _about_file("telemetry.headers_file", settings.telemetry.headers_file, "nothing is sent")
    yield from _hooks(settings)


def _hooks(settings: Settings) -> Iterator[str]:
    for index, workload in enumerate(settings.workloads):
        for key in ("on_renewed", "on_failed"):
            command = () if workload.output is None else getattr(workload.output, key)
            if command and shutil.which(command[0]) is None:
                yield (
                    f"workloads[{index}].output.{key}: there is no program {quoted(command[0])} here; "
                    "install it, or name it by its path"
                )


def _without_effect(settings: Settings, authority: str) -> Iterator[str]:
    defaults = {field.name: field.default for field in fields(WorkloadSettings) if field.name in {"key", "ttl"}}
    for index, workload in enumerate(settings.workloads):
        if settings.authorities_of(workload) == (authority,):
            for key, default in defaults.items():
                if getattr(workload, key) != default:
                    yield (
                        f"workloads[{index}].{key}: it has no effect, as the authority {authority} makes keys and "
                        "certificates by itself; remove it, or set it there"
                    )


def _about_file(key: str, path: Path, lacks: str) -> Iterator[str]:
    """`lacks`: what does not happen without the file."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        yield f"{key}: {path} does not exist; until it does, {lacks}"
    except OSError as error:  # another user than the agent's may run this, and may not read there
        yield f"{key}: {path} cannot be examined ({error.strerror}); the agent's user has to be able to read it"
