"""What the CA server was asked and what it answered since its start, counted for views."""

from sds_agent.ca.callers import Proof
from sds_agent.tally import Counter, Histogram

ISSUED = "issued"
UNPROVEN = "none"
"""The proof of a request whose caller is not proven."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""The upper ends of the buckets for the time to an answer, which takes some milliseconds with a key on a curve."""


class CaCounts:
    """Of all callers together: who they are is in the audit log."""

    def __init__(self) -> None:
        self.requests = Counter("result", "proof")
        """Requests that were answered: with a certificate (`issued`) or with the reason of a refusal, by the kind of
        proof of the caller.
        """
        self.seconds = Histogram(SECONDS)
        """From the call to the certificate."""
        self.unwritten = Counter()
        """Lines that the audit log did not take."""
        self.workers_ended = Counter()
        """Worker processes that ended while the server was to serve."""

    def issued(self, proof: Proof, seconds: float) -> None:
        """A request got a certificate, in that time."""
        self.requests.add(ISSUED, proof.value)
        self.seconds.observe(seconds)

    def refused(self, reason: str, proof: Proof | None) -> None:
        """A request was refused."""
        self.requests.add(reason, UNPROVEN if proof is None else proof.value)
