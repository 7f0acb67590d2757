"""When a worker counts as hanging: it answers nothing any more, while the machine and its parent run.

Judged by its answers alone, and not by a time since the last one: where the whole machine was suspended, or a container
with all its processes was paused, no worker could answer. So the parent asks again and again, counts the questions that
have no answer, and counts anew where it was itself kept from asking.
"""

ASK_EVERY = 2.0
"""Seconds from one question to the next."""
LATE = 6.0
"""Seconds from one question to the next from which on the parent was kept from asking."""
SUSPECT = 2
"""Questions without an answer from which on a worker gets no new connection if another one answers."""
MOST_UNANSWERED = 10
"""Questions without an answer from which on a worker hangs. An event loop under load answers late, but not so late."""


class Silence:
    """Of one worker: the questions that it has not answered."""

    def __init__(self) -> None:
        self._unanswered = 0

    @property
    def is_suspect(self) -> bool:
        """Whether the worker may not come to answer a caller."""
        return self._unanswered >= SUSPECT

    def ask(self, passed: float) -> bool:
        """Count one more question, so many seconds after the one before; whether the worker hangs."""
        if passed >= LATE:
            self._unanswered = 0
        self._unanswered += 1
        return self._unanswered > MOST_UNANSWERED

    def answered(self) -> None:
        """The worker is alive."""
        self._unanswered = 0
