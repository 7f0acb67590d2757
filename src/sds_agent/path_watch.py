"""The kernel reports that a file may have changed, wherever on the way to it that happens (inotify(7)).

Programs replace a file in many ways: they write it in place, rename another over it, swap a symlink on the way to it,
or exchange a directory above it. So a `PathWatch` watches each directory in which the kernel looks a name of the way
up, those behind symlinks too, and the file itself. It watches a directory before it reads the name there, and follows
the whole way anew for each reading of the file: that reading sees a change, or the kernel reports it afterwards.

The kernel reports neither a mount, nor what another machine does on a network's disk, nor a write through a mapping,
and its watches may be used up. So a program that follows a file also reads it every few seconds, and a watch makes that
sooner. Of an event only its directory and name matter, and lost events are reported by an event (IN_Q_OVERFLOW): three
functions of the C library are enough, and no package is needed.
"""

import asyncio
import errno
import logging
import os
import stat
import struct
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sds_agent import libc, log
from sds_agent.clock import Clock

LOG = logging.getLogger(__name__)

SETTLE = 0.05
"""Seconds from the kernel's report to the next reading: a program that replaces several files is often done by then."""
MOST_LINKS = 40
"""Symlinks on one way, as the kernel has it (path_resolution(7))."""
_BUFFER = 1 << 16

_ATTRIB, _CLOSE_WRITE, _MODIFY = 0x004, 0x008, 0x002
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = 0x040, 0x080, 0x100, 0x200, 0x400, 0x800
_Q_OVERFLOW, _IGNORED, _ONLY_DIRECTORY, _DONT_FOLLOW = 0x4000, 0x8000, 0x01000000, 0x02000000
_ITSELF = _ATTRIB | _DELETE_SELF | _MOVE_SELF | _DONT_FOLLOW
_OF_DIRECTORY = _ITSELF | _ONLY_DIRECTORY | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_OF_FILE = _ITSELF | _MODIFY | _CLOSE_WRITE
_EVENT = struct.Struct("iIII")

_FIXES = {
    errno.ENOSPC: "the user's watches are used up; raise fs.inotify.max_user_watches (sysctl)",
    errno.EMFILE: "the user's inotify instances or the process's descriptors are used up; raise "
    "fs.inotify.max_user_instances (sysctl)",
    errno.ENFILE: "the system's descriptors are used up; raise fs.file-max (sysctl)",
    errno.ENOSYS: "this system has no inotify, or this Python cannot ask for it",
}
"""Why the kernel watches nothing more, and the fix."""


class PathWatch:
    """Watches the ways to files. `arm` may be called in a thread, by one at a time; all else belongs to the loop's."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._interest: dict[int, set[bytes]] = {}  # the names that matter in a directory, by its watch
        self._changed = asyncio.Event()
        self._reader: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._arming = self._closed = False
        self._fault = self._logged = ""

    def arm(self, paths: Iterable[Path]) -> None:
        """Watch the ways to these paths as they are now, and nothing else. Raises nothing.

        Blocks on the disk. Where the kernel cannot watch, `changed` returns by time alone, and each call tries again.
        """
        with self._lock:
            if self._closed:
                return
            self._arming = True
        try:
            self._arm(paths)
        finally:
            with self._lock:
                self._arming = False
                if self._closed:
                    self._close_descriptor()

    async def changed(self, clock: Clock, seconds: float) -> None:
        """Return when something may have changed since this returned last, but at the latest after so many seconds."""
        self._listen()
        self._report(seconds)
        async with asyncio.TaskGroup() as tasks:
            changed, over = tasks.create_task(self._changed.wait()), tasks.create_task(clock.sleep(seconds))
            await asyncio.wait([changed, over], return_when=asyncio.FIRST_COMPLETED)
            was_changed = changed.done()
            changed.cancel()
            over.cancel()
        if was_changed:
            await asyncio.sleep(SETTLE)
        self._changed.clear()

    @property
    def has_changed(self) -> bool:
        """Whether `changed` would return at once."""
        return self._changed.is_set()

    def wake(self) -> None:
        """Let `changed` return for a reason of the caller's own."""
        self._changed.set()

    def close(self) -> None:
        """Watch nothing any more."""
        if self._reader is not None and self._descriptor is not None:
            self._reader.remove_reader(self._descriptor)
        with self._lock:
            self._closed = True
            if not self._arming:
                self._close_descriptor()

    def _close_descriptor(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _listen(self) -> None:
        if self._reader is None and self._descriptor is not None:
            self._reader = asyncio.get_running_loop()
            self._reader.add_reader(self._descriptor, self._read)

    def _report(self, seconds: float) -> None:
        if self._fault and self._fault != self._logged:
            log.event(LOG, "watched_by_time", level=logging.WARNING, cause=self._fault, every_seconds=seconds)
        self._logged = self._fault

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor or 0, _BUFFER)
        except OSError:  # nothing to read after all
            return
        if self._concerns_us(data):
            self._changed.set()

    def _concerns_us(self, data: bytes) -> bool:
        """Whether one of the events is about a name on a way, about what is watched itself, or about lost events."""
        at = 0
        while at < len(data):
            watch, mask, _cookie, length = _EVENT.unpack_from(data, at)
            name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0")
            at += _EVENT.size + length
            if mask & _IGNORED:  # the watch has ended, by us, or after an event of its own
                continue
            names = self._interest.get(watch)
            if mask & _Q_OVERFLOW or names is None or not name or name in names:
                return True
        return False

    def _arm(self, paths: Iterable[Path]) -> None:
        fresh: dict[int, set[bytes]] = {}
        try:
            if self._descriptor is None:
                self._descriptor = _inotify_init()
            for path in paths:
                self._follow(path, fresh)
        except OSError as error:
            cause = _FIXES.get(error.errno or 0, error.strerror)
            self._fault = f"the kernel does not watch all files: {cause}"
        else:
            self._fault = ""
        for watch in self._interest.keys() - fresh.keys():
            _inotify_remove(self._descriptor, watch)
        self._interest = fresh

    def _follow(self, path: Path, fresh: dict[int, set[bytes]]) -> None:
        """Watch each step of the way, until a name is missing. Raises OSError with an `errno` in _FIXES."""
        names, at, links = list(reversed(path.absolute().parts[1:])), "/", 0
        while names:
            name = names.pop()
            if name == "..":  # the way so far holds no link
                at = os.path.dirname(at)  # noqa: PTH120 - a Path for each step costs more than the kernel's part
                continue
            self._watch(at, _OF_DIRECTORY, name, fresh)
            at = os.path.join(at, name)  # noqa: PTH118 - likewise
            try:
                mode = os.lstat(at).st_mode
                to = Path(os.readlink(at)) if stat.S_ISLNK(mode) else None  # noqa: PTH115 - likewise
            except OSError:
                return
            if to is not None:
                links += 1
                if links > MOST_LINKS:
                    return
                names += reversed(to.parts[1:] if to.is_absolute() else to.parts)
                at = "/" if to.is_absolute() else os.path.dirname(at)  # noqa: PTH120 - likewise
            elif not names and not stat.S_ISDIR(mode):
                self._watch(at, _OF_FILE, "", fresh)

    def _watch(self, path: str, mask: int, name: str, fresh: dict[int, set[bytes]]) -> None:
        try:
            watch = _inotify_add(self._descriptor, path, mask)
        except OSError as error:
            if error.errno in _FIXES:
                raise
            return  # it has just gone, which its directory reports; or this user may not read it, and time has to do
        # in both at once: an event of this moment counts, by what was watched before as by what is now
        for each in (fresh, self._interest):
            each.setdefault(watch, set()).add(os.fsencode(name))


def _inotify_init() -> int:
    return libc.call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)


def _inotify_add(descriptor: int | None, path: str, mask: int) -> int:
    return libc.call("inotify_add_watch", descriptor, os.fsencode(path), mask)


def _inotify_remove(descriptor: int | None, watch: int) -> None:
    with suppress(OSError):  # it went with what it watched
        libc.call("inotify_rm_watch", descriptor, watch)
