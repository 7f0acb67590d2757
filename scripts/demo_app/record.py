"""What happened during the demonstration, and whether it is what scripts/demo promises."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

ROTATIONS = 3
"""How often the certificate on the wire has to change."""


@dataclass(slots=True)
class Proxy:
    """What one Envoy received and what it then presented. `serials` are those seen on the wire, in order."""

    title: str
    identity: str
    serials: list[int] = field(default_factory=list)
    pushed: int = 0
    nacked: int = 0
    ack_ms: list[float] = field(default_factory=list)

    @property
    def rotations(self) -> int:
        """How often its certificate changed on the wire."""
        return max(0, len(self.serials) - 1)

    def presented(self, serial: int) -> bool:
        """Record a certificate seen on the wire; true if it is a new one."""
        if serial in self.serials:
            return False
        self.serials.append(serial)
        return True


@dataclass(slots=True)
class Requests:
    """The requests sent so far. `took_ms` holds the times of the good ones."""

    failures: list[str] = field(default_factory=list)
    took_ms: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Record:
    """Everything that was seen; `complete` once all requests were sent. The Envoys are found by their node's id."""

    envoys: dict[str, Proxy]
    requests: Requests = field(default_factory=Requests)
    complete: bool = False

    def count(self, event: Mapping[str, object]) -> None:
        """Count an event of the agent's log."""
        envoy = self.envoys.get(str(event.get("node")))
        match event.get("event"), envoy:
            case "sent", Proxy():
                envoy.pushed += 1
            case "acked", Proxy():
                envoy.ack_ms.append(float(str(event.get("after_ms", 0))))
            case "nacked", Proxy():
                envoy.nacked += 1

    def shortfalls(self, rotations: int) -> list[str]:
        """What should have happened and did not, in sentences; empty if nothing is missing."""
        server = self.envoys["envoy-b"]
        found = []
        if server.rotations < rotations:
            found.append(f"Envoy B's certificate changed {server.rotations} times, not {rotations}.")
        if self.requests.failures:
            found.append(f"{len(self.requests.failures)} requests failed; the first: {self.requests.failures[0]}.")
        if not self.requests.took_ms:
            found.append("No request was answered.")
        return found


def short(serial: int) -> str:
    """The beginning of a serial number as the agent logs it, enough to distinguish two."""
    return f"{serial:x}"[:8]


def percentile(values: list[float], share: float) -> float:
    """The smallest of `values` that `share` of them do not exceed (nearest rank); 0 if there are none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median(values: list[float]) -> float:
    """The median, 0 of nothing."""
    return statistics.median(values) if values else 0.0
