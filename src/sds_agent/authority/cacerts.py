"""The authority `cacerts`: a plugged-in CA in a directory of its operator's, followed as it changes."""

from datetime import timedelta
from pathlib import Path

from sds_agent.authority.in_process import InProcessAuthority
from sds_agent.clock import Clock
from sds_agent.signing.plugged import PluggedCa

REFRESH = timedelta(seconds=5)
"""How often the directory is read while nothing is issued; for every certificate it is read too."""


class CacertsAuthority(InProcessAuthority):
    """Made by `open`."""

    refresh_every = REFRESH

    @classmethod
    async def open(
        cls, directory: Path, *, trust_domain: str, passphrase_file: Path | None, clock: Clock
    ) -> "CacertsAuthority":
        """The CA in `directory`. Raises ConfigurationError with everything that is wrong with it."""
        ca = await PluggedCa.open(directory, trust_domain=trust_domain, passphrase_file=passphrase_file, clock=clock)
        return cls(ca, f"the CA in {directory}", clock)
