"""The authority `embedded`: a self-signed root in the state directory, for one machine, a first try or a test."""

from datetime import timedelta
from pathlib import Path

from sds_agent.authority.in_process import InProcessAuthority
from sds_agent.clock import Clock
from sds_agent.pki.keys import KeyType
from sds_agent.signing.self_signed import SelfSignedCa

REFRESH = timedelta(minutes=5)
"""How often the agent asks for the roots while nothing is issued: that is when a new root is made, too."""


class EmbeddedAuthority(InProcessAuthority):
    """Made by `open`."""

    refresh_every = REFRESH

    def __init__(self, ca: SelfSignedCa, clock: Clock) -> None:
        super().__init__(ca, "the embedded CA", clock)
        self.put_back = ca.put_back

    @classmethod
    async def open(
        cls, directory: Path, *, trust_domain: str, key_type: KeyType, lifetime: timedelta, clock: Clock
    ) -> "EmbeddedAuthority":
        """The CA in `directory`, made there when there is none. Raises ConfigurationError, which names `state_dir`."""
        ca = await SelfSignedCa.open(
            directory,
            trust_domain=trust_domain,
            key_type=key_type,
            lifetime=lifetime,
            clock=clock,
            setting="state_dir",
        )
        return cls(ca, clock)
