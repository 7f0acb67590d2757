"""What the CA server needs of the system that it runs on, whatever its configuration."""

from sds_agent.errors import ConfigurationError
from sds_agent.files import DESCRIPTORS, MOUNT_PROC, has_descriptors


def check_system() -> None:
    """Raises ConfigurationError where the server could not serve."""
    if not has_descriptors():
        raise ConfigurationError(
            f"the CA reaches its own server, and OpenSSL the server's certificate, by {DESCRIPTORS}, which is not "
            f"there; {MOUNT_PROC}"
        )
