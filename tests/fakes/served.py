"""A stand-in for the catalog: the served secrets, as a plain dictionary that a test changes."""

from sds_agent.sds.protocol import Absence, Resource


class Served(dict[str, Resource | Absence]):
    """A `protocol.View`. Names that are not in it are unknown."""

    def __missing__(self, name: str) -> Absence:
        return Absence.UNKNOWN

    def put(self, name: str, version: str) -> Resource:
        """Serve `name` at `version` from now on."""
        resource = self[name] = Resource(name, version)
        return resource

    def hold(self, name: str) -> None:
        """Add `name` without a secret."""
        self[name] = Absence.PENDING
