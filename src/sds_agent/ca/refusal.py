"""Why a caller gets no certificate: the message that it gets in place of one, by who can fix it."""

from enum import Enum

from sds_agent.errors import SdsAgentError


class Reason(Enum):
    """Who can fix it."""

    UNAUTHENTICATED = "unauthenticated"
    """The caller did not prove who it is."""
    DENIED = "denied"
    """The caller is known and may not have what it asks for."""
    INVALID = "invalid"
    """No caller could get a certificate for this request."""
    EXHAUSTED = "exhausted"
    """Too many requests: ask again later."""
    INTERNAL = "internal"
    """The CA cannot sign at present; its operator has to act."""


class RefusalError(SdsAgentError):
    """No certificate. The message goes to the caller and to the audit log."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def unauthenticated(message: str) -> RefusalError:
    """The caller did not prove who it is."""
    return RefusalError(Reason.UNAUTHENTICATED, message)


def denied(message: str) -> RefusalError:
    """The caller may not have that."""
    return RefusalError(Reason.DENIED, message)


def invalid(message: str) -> RefusalError:
    """The request cannot be signed."""
    return RefusalError(Reason.INVALID, message)
