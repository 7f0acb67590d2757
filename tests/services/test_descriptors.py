"""How many connections there are file descriptors for."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
soft, hard, connections = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from sds_agent.descriptors import room_for
print(room_for(connections), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "room", "asked"),
    [
        (400, 400, 1000, 100, 400),  # what 400 leave beside the 100 that are reserved, three for each
        (50, 400, 100, 100, 400),  # the soft limit is raised as far as it has to be
        (350, 400, 50, 50, 350),  # and no further
        (100, 100, 50, 10, 100),  # half of what 100 leave beside the 40 that are needed in any case
        (50, 60, 10, 3, 60),
        (28, 28, 10, 1, 28),  # one connection at least
    ],
)
def test_connections_leave_descriptors_for_all_else(
    soft: int, hard: int, connections: int, room: int, asked: int
) -> None:
    """Or else a server under a flood could write neither its log nor read its files anew."""
    command = [sys.executable, "-c", PROGRAM, *map(str, (soft, hard, connections))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(room), str(asked), str(hard)]
