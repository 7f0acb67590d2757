"""How gRPC's core is set up in this process, by variables that it reads once, when it is imported.

A variable that the operator has set stays. None of them changes what is sent: where a later gRPC does not know an
experiment any more, it says so at a level that is off, and goes on as it would without it.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType

SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        # it writes to standard error on its own account
        "GRPC_VERBOSITY": "NONE",
        # Measured with grpcio 1.85: a server whose connections gRPC's older poller reads needs two thirds of the
        # processor time for a push to 500 streams, and its threads a tenth of the switches. `scripts/bench push` tells
        # when that is no longer so.
        "GRPC_EXPERIMENTS": "-event_engine_listener",
    }
)


def set_up() -> None:
    """Set what is not set. To be called before gRPC is imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def in_force() -> dict[str, str]:
    """What is set, by names for fields of a line in the log."""
    return {name.lower(): os.environ.get(name, "") for name in SETTINGS}
