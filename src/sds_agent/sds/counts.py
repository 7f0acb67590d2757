"""What went out to SDS clients and what they said of it since the start, counted for views."""

from sds_agent.tally import Counter, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""The upper ends of the buckets for the time to an ACK, which takes an Envoy some milliseconds."""


class SdsCounts:
    """Of all streams together. `name` is a resource name of the configuration; names that clients make up, such as
    those of files, count under one label, `OTHERS`.
    """

    OTHERS = "(others)"

    def __init__(self) -> None:
        self.responses = Counter("name")
        """Secrets sent, by an answer of any kind."""
        self.pushes = Counter("name")
        """Those of them that were sent because the secret had changed."""
        self.acks = Counter("name")
        """Secrets that a client took (ACK)."""
        self.nacks = Counter("name")
        """Secrets that a client refused (NACK)."""
        self.seconds_to_ack = Histogram(SECONDS)
        """From an answer to its ACK."""
        self.streams = Counter("method")
        """Streams and calls that were opened."""
