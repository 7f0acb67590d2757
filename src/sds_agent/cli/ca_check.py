"""`sds-agent ca check`: whether a directory, made by any tool, can be plugged in, or a CA's configuration be served."""

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from pwd import getpwuid

from sds_agent.ca.settings import CaSettings, SignerSettings, load
from sds_agent.ca.system import check_system
from sds_agent.cli import ca_keys, output
from sds_agent.cli.paths import as_path, is_directory
from sds_agent.errors import ConfigurationError, Problem, ProblemsError
from sds_agent.hardening import keep_memory_private
from sds_agent.signing import self_signed
from sds_agent.signing.cacerts import fault_of_revocation, read_signing_set
from sds_agent.signing.description import lines
from sds_agent.signing.directory import DirectoryError, Unsettled, read_directory
from sds_agent.signing.istiod import refused_by_istiod, spelled_otherwise
from sds_agent.signing.signing_set import SigningSet

UNUSABLE = 2
"""The exit code for a directory that cannot be plugged in."""

EXIT_CODES = (
    "0 it can be plugged in, or its configuration can be served; 2 it cannot, or cannot be read, or the call is wrong; "
    "1 any other failure"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The directory or the configuration, and how to read its key."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "directory",
        nargs="?",
        type=as_path,
        metavar="PATH",
        help="the directory with the CA's files, or the CA server's configuration, with its signer, key sets and deny "
        "list",
    )
    which.add_argument("--config", type=as_path, metavar="FILE", help="the same as PATH, for a configuration")
    parser.add_argument(
        "--passphrase-file",
        type=as_path,
        metavar="FILE",
        help="the passphrase of the CA's key; of a configuration by default signer.passphrase_file",
    )


def run(arguments: argparse.Namespace) -> int:
    """Say it on standard output: 0 if it can, 2 if not. Raises DirectoryError and ConfigurationError where nothing can
    be read, and ProblemsError for a configuration that cannot be used.
    """
    keep_memory_private()
    output.silence_warnings()
    path: Path = arguments.directory if arguments.config is None else arguments.config
    if arguments.config is None and is_directory(path):
        return _check(path, ca_keys.passphrase_in(arguments.passphrase_file))
    settings = load(path)
    signer = settings.signer
    _check_callers(settings)
    check_system()
    output.write(f"{path} is good.")
    if signer.self_signed is not None:
        with _as_its_owner(signer.self_signed) as user:
            self_signed.check(signer.self_signed, "signer.self_signed")
            _check_readable(settings)
        whose = "" if user is None else f" where it runs as uid {user}, to whom that belongs"
        output.write(f"The CA signs with a root of its own in {signer.self_signed}, and can use that directory{whose}.")
        return 0
    passphrase = ca_keys.passphrase_in(arguments.passphrase_file or signer.passphrase_file)
    return _check(_plugged(signer), passphrase, settings)


@contextmanager
def _as_its_owner(directory: Path) -> Iterator[int | None]:
    """Where root runs this, act as the user to whom the directory belongs, or what there is of the way to it: a service
    has an account of its own, for which root's rights say nothing. Gives that user, or None.
    """
    with ExitStack() as back:
        try:
            user = _become_owner(directory, back)
        except OSError:  # a container's root may not, or not look there: it is judged as the server in there would be
            back.close()
            user = None
        yield user


def _become_owner(directory: Path, back: ExitStack) -> int | None:
    """Raises OSError; `back` undoes what was done by then."""
    there = None if os.geteuid() else _nearest(directory)
    if there is None or there.st_uid == 0:
        return None
    group, groups = _groups_of(there)
    own_group, own_groups = os.getegid(), os.getgroups()
    os.setgroups(groups)  # root's would open what is closed to the service
    back.callback(os.setgroups, own_groups)
    os.setegid(group)
    back.callback(os.setegid, own_group)
    os.seteuid(there.st_uid)
    back.callback(os.seteuid, 0)
    return there.st_uid


def _groups_of(there: os.stat_result) -> tuple[int, list[int]]:
    """The groups that the owner has when a service runs as that user; the directory's for one who has no account."""
    try:
        account = getpwuid(there.st_uid)
    except KeyError:
        return there.st_gid, [there.st_gid]
    return account.pw_gid, os.getgrouplist(account.pw_name, account.pw_gid)


def _nearest(path: Path) -> os.stat_result:
    """Of the path, or of the nearest above it that is there. Raises OSError."""
    for each in (path, *path.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            return each.stat()
    return Path("/").stat()


def _check_callers(settings: CaSettings) -> None:
    """See that the files that say who may ask can be used. Raises ConfigurationError."""
    from sds_agent.ca import deny_list, jwks  # noqa: PLC0415 - of no use to the check of a directory

    for issuer in settings.callers.jwt:
        jwks.check(jwks.Location(issuer.jwks))
    if settings.callers.deny_file is not None:
        deny_list.check(settings.callers.deny_file, settings.trust_domain)


def _check_readable(settings: CaSettings) -> None:
    """See that this user may read these files, which root could. Raises ConfigurationError."""
    from sds_agent.ca import jwks  # noqa: PLC0415 - as above

    callers = settings.callers
    files = [("callers.jwt", Path(each.jwks)) for each in callers.jwt if not jwks.Location(each.jwks).is_url]
    if callers.deny_file is not None:
        files.append(("callers.deny_file", callers.deny_file))
    for key, file in files:
        if not os.access(file, os.R_OK, effective_ids=True):
            raise ConfigurationError(
                f"{key}: {file} cannot be read as uid {os.geteuid()}, to whom {settings.signer.self_signed} belongs; "
                "let that user, as whom the server is to run, read it"
            )


def _plugged(signer: SignerSettings) -> Path:
    if signer.cacerts is None:
        raise AssertionError("the settings have one of the two")
    return signer.cacerts


def _check(directory: Path, passphrase: bytes | None, settings: CaSettings | None = None) -> int:
    """Judge a directory to be plugged in, for a server's configuration if given. Raises DirectoryError."""
    contents = read_directory(directory)
    if isinstance(contents, Unsettled):
        raise DirectoryError(f"the files in {directory} change all the time", "try again when they are complete")
    now = datetime.now(UTC)
    judged = _judge(contents.files, now, passphrase, settings)
    if isinstance(judged, tuple):
        output.write(f"{directory} cannot be plugged in:")
        _list(judged)
        code = UNUSABLE
    else:
        output.write(f"{directory} can be plugged in.")
        for line in lines(contents.files, judged, now):
            output.write(f"  {line}")
        code = 0
    names = () if isinstance(judged, tuple) else spelled_otherwise(judged)
    if refused := (*refused_by_istiod(contents.files), *names):
        output.write("istiod itself would not take it as it is:" if code == 0 else "Besides, for istiod:")
        _list(refused)
    return code


def _judge(
    files: Mapping[str, bytes], now: datetime, passphrase: bytes | None, settings: CaSettings | None
) -> SigningSet | tuple[Problem, ...]:
    trust_domain = None if settings is None else settings.trust_domain
    try:
        signing = read_signing_set(files, now, passphrase=passphrase, trust_domain=trust_domain)
    except ProblemsError as error:
        return error.problems
    faults = [fault_of_revocation(signing), None if settings is None else _fault_of_names(settings, signing)]
    return tuple(filter(None, faults)) or signing


def _fault_of_names(settings: CaSettings, signing: SigningSet) -> Problem | None:
    from sds_agent.ca import tls  # noqa: PLC0415 - as above

    fault = tls.fault_of_names(settings.server_names, signing)
    if fault is None:
        return None
    return Problem(("server_names",), f"cannot all be used: {fault}", "name what is permitted, or plug in another CA")


def _list(problems: Iterable[Problem]) -> None:
    for problem in problems:
        output.write(f"  - {problem}")
