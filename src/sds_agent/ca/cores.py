"""How many cores this process may use: those of its CPU set, or fewer where its control groups allow less time."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def usable(group: Path = GROUP, groups: Path = GROUPS) -> int:
    """The number, at least 1. Of control groups those of version 2 are read (cgroups(7))."""
    return max(1, math.floor(min([len(os.sched_getaffinity(0)), *_quotas(group, groups)])))


def _quotas(group: Path, groups: Path) -> Iterator[float]:
    """What each control group on the way up from ours allows, in cores."""
    with suppress(OSError, ValueError):
        of_ours = next(line for line in group.read_text().splitlines() if line.startswith("0::"))
        place = groups / of_ours.removeprefix("0::").strip().lstrip("/")
        for each in (place, *place.parents):
            if not each.is_relative_to(groups):
                return
            with suppress(OSError, ValueError):
                quota, period = (each / "cpu.max").read_text().split()
                if quota != "max":
                    yield int(quota) / int(period)
