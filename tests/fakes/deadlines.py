"""An end for a test of what must not wait: a fault in it fails the test in place of standing still."""

import threading
from collections.abc import Callable

LIMIT = 20
"""Seconds, many times what any of them takes."""


def promptly(action: Callable[[], None]) -> None:
    """Do it in a thread, and fail when it has not ended by the limit. The thread is then left behind."""
    failures: list[BaseException] = []

    def act() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - raised in the test itself
            failures.append(error)

    actor = threading.Thread(target=act, daemon=True)
    actor.start()
    actor.join(LIMIT)
    assert not actor.is_alive(), "it waits for what it must not wait for"
    for failure in failures:
        raise failure
