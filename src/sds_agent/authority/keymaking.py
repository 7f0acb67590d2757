"""New private keys without holding up the event loop."""

from sds_agent.pki.keys import KeyType, PrivateKey, generate
from sds_agent.tasks import in_thread


async def new_key(key_type: KeyType) -> PrivateKey:
    """Make a key, in a thread where that can take seconds."""
    return await in_thread(generate, key_type) if key_type.slow else generate(key_type)
