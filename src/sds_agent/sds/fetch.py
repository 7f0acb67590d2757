"""FetchSecrets: one question, one answer.

A name that is not issued yet is worth waiting for, as long as the caller does; a name that is not served is not.
"""

from sds_agent.sds.protocol import (
    Absence,
    Finish,
    Request,
    Resource,
    Respond,
    Status,
    View,
    unacceptable,
    unique,
)


def fetch(request: Request, view: View, *, most_names: int = 100) -> Respond | Finish | None:
    """What to answer now, or None while a secret that was asked for is not issued yet."""
    names = unique(request.names)
    if finish := unacceptable(request.type_url, len(names), most_names):
        return finish
    if not names:
        return Finish(Status.INVALID_ARGUMENT, detail="resource_names is empty: name the secrets to fetch")
    found = [view[name] for name in names]
    if all(entry is Absence.UNKNOWN for entry in found):
        return Finish(Status.NOT_FOUND, names)
    if any(entry is Absence.PENDING for entry in found):
        return None
    return Respond("", tuple(entry for entry in found if isinstance(entry, Resource)))
