"""One line of `sds-agent doctor`: pure."""

from typing import Literal

from msgspec import Struct

Condition = Literal["good", "warning", "bad"]


class Diagnosis(Struct, frozen=True):
    """What was found of a subject, such as the socket or an Envoy, and in a clause after a semicolon the way out."""

    condition: Condition
    subject: str
    text: str


def good(subject: str, text: str) -> Diagnosis:
    """Nothing is wrong with it."""
    return Diagnosis("good", subject, text)


def warning(subject: str, text: str) -> Diagnosis:
    """It works, and is perhaps not meant, or not for long."""
    return Diagnosis("warning", subject, text)


def bad(subject: str, text: str) -> Diagnosis:
    """It does not work, or is not safe."""
    return Diagnosis("bad", subject, text)
