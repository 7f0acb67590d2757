"""What goes wrong in a call of an adapter, which may be another package, as an AuthorityError."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sds_agent import log
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.tasks import NoThreadError

LOG = logging.getLogger(__name__)


class NoAnswerError(AuthorityError):
    """A CA did not answer in the time that it had."""

    def __init__(self, seconds: float) -> None:
        super().__init__(ErrorKind.TRANSIENT, f"the CA did not answer within {round(seconds, 1):g} s")


@contextmanager
def failures_of(authority: str, seconds: float) -> Iterator[None]:
    """Turn all that a call of an adapter raises, but the caller's own cancellation, into an AuthorityError.

    `authority` is its name in the file, and `seconds` is how long the call may take, after which the caller ends it.
    A bug is logged (`fault`).
    """
    try:
        yield
    except TimeoutError as error:
        raise NoAnswerError(seconds) from error
    except AuthorityError:
        raise
    except NoThreadError as error:
        raise AuthorityError(ErrorKind.TRANSIENT, str(error)) from error
    except (Exception, asyncio.CancelledError) as error:
        if _cancelled():
            raise
        log.fault(LOG, f"authority {authority}", error)
        message = (
            f"the adapter of authority {authority!r} failed with {type(error).__name__}; please report the event "
            "fault in the log"
        )
        raise AuthorityError(ErrorKind.INVALID, message) from error


def _cancelled() -> bool:
    """Whether this task is being cancelled: an adapter may raise CancelledError because of a task of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
