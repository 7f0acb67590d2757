"""An agent that was once busy must not stay as large as it was then: a node has other things to hold."""

from pathlib import Path

from sds_agent import memory

BLOCK = 4096
BLOCKS = 20_000


def resident() -> int:
    """Bytes of this process in memory (proc(5): statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_between_what_is_still_in_use_goes_back_to_the_system() -> None:
    blocks = [bytearray(BLOCK) for _ in range(BLOCKS)]
    kept = blocks[::50]
    busy = resident()
    del blocks
    memory.give_back()
    assert busy - resident() > BLOCK * BLOCKS // 2
    assert len(kept) == BLOCKS // 50
