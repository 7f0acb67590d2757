"""Files that a command writes where the user says: never in the place of a device or a link that others need."""

from contextlib import suppress
from os import urandom
from pathlib import Path

from sds_agent.errors import ConfigurationError
from sds_agent.files import create, fix_of, sync_directory


def check_place(path: Path | None) -> None:
    """Refuse to replace what is no regular file: a device, or a link such as /dev/stdout that others need.

    Raises ConfigurationError.
    """
    with suppress(OSError):  # another error is reported when the file is written
        if path is not None and (path.is_symlink() or (path.exists() and not path.is_file())):
            raise ConfigurationError(
                f"--output: cannot write {path}: it is there and is no regular file; name one, or leave --output out "
                "for standard output"
            )


def write_public(path: Path, data: bytes) -> None:
    """Put `data` at `path` with mode 0644, all of it or nothing. Raises ConfigurationError."""
    temporary = path.with_name(f".{path.name}.{urandom(4).hex()}")
    try:
        create(temporary, data, 0o644)
        try:
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> ConfigurationError:
    """Why a file that the user named is not there."""
    fix = fix_of(error, "name a file in a directory that this user may write to")
    return ConfigurationError(f"--output: cannot write {path}: {error.strerror}; {fix}")
