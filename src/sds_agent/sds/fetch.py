"""FetchSecrets: one request, one answer.

- An answer has all names that are served, and only when each of them has its secret: the call waits for one that is not
  issued yet, for as long as its client does.
- Names that are not served are left out. A call ends with NOT_FOUND when it asks for no other.
- A call without names ends with INVALID_ARGUMENT: there is no wildcard for secrets.
"""

from sds_agent.sds.protocol import (
    Absence,
    Finish,
    Resource,
    Respond,
    SotwRequest,
    StatusCode,
    View,
    unacceptable,
    unique,
)


def fetch(request: SotwRequest, view: View, *, most_names: int = 100) -> Respond | Finish | None:
    """What to answer now; None while a secret that the client asks for is not issued yet."""
    names = unique(request.names)
    if finish := unacceptable(request.type_url, len(names), most_names):
        return finish
    if not names:
        return Finish(StatusCode.INVALID_ARGUMENT, detail="resource_names is empty: name the secrets to fetch")
    found = [view[name] for name in names]
    if all(entry is Absence.UNKNOWN for entry in found):
        return Finish(StatusCode.NOT_FOUND, names)
    if any(entry is Absence.PENDING for entry in found):
        return None
    return Respond("", tuple(entry for entry in found if isinstance(entry, Resource)))
