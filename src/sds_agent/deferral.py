"""Modules that libraries import and the agent may never use: they are loaded once something in them is asked for.

Whoever imports such a module gets it, and its code runs when the first of its names is read. So nothing is taken away:
a TLS connection of asyncio's loads `ssl` when it is made. The standard library's LazyLoader does not suffice: there a
second import loads the module, and before Python 3.12.3 a thread can see half of one.

Other modules are needed, and compile regular expressions that are not, in milliseconds: these expressions are compiled
once they are used.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader

UNUSED = frozenset(
    {
        "ssl",  # for TLS on asyncio's own transports, as a check of istiod uses it: 4 ms, and a second OpenSSL, 4 MB
        "asyncio.sslproto",  # likewise; it reads names of `ssl` as it is loaded
        "hashlib",  # for key identifiers that cryptography would make itself; loads the second OpenSSL too
        "hmac",  # for the comparison of such identifiers; likewise
        "calendar",  # for dates of e-mails: cryptography imports what reads their addresses
        "email.base64mime",  # likewise for the bodies of e-mails
        "email.errors",  # likewise
        "email.quoprimime",  # likewise
        "copy",  # for dataclasses as dictionaries
        "linecache",  # for the lines of a traceback
        "locale",  # for text that programs write, with 900 names of locales
        "ntpath",  # for paths of Windows
        "textwrap",  # for the advice in a traceback
        "tokenize",  # for the encoding of a source file in a traceback
        "asyncio.staggered",  # for a host with several addresses
        "asyncio.trsock",  # for the sockets of asyncio's own transports
        "cryptography.x509.verification",  # cryptography's own walk of chains
        "pkgutil",  # for gRPC's own list of roots
        "google.protobuf.descriptor_database",  # for descriptors in pure Python, beside those in C
        "google.protobuf.text_encoding",  # likewise
        "google.protobuf.internal.python_edition_defaults",  # likewise
        "google.protobuf.internal.python_message",  # messages in pure Python, beside those in C: 5 ms, 2 MB
    }
)


EXPRESSIONS = frozenset(
    {
        "cryptography.hazmat.primitives.serialization.ssh",  # for keys of SSH
        "cryptography.x509.name",  # for names as text, with every character of Unicode: 5 ms
        "email.utils",  # for addresses and parameters of e-mails
        "logging",  # for formats other than Python's usual one
        "platform",  # for the names of platforms, which `uuid` asks for: 0.8 ms
        "string",  # for templates
        "urllib.parse",  # for URLs with characters beyond ASCII
        "yaml.constructor",  # for dates
        "yaml.reader",  # for characters that YAML does not take, where Python reads it in place of libyaml: 3 ms
        "yaml.resolver",  # for plain scalars that are no strings, of which most files have one kind or two: 0.7 ms
    }
)
"""Modules whose regular expressions are compiled once they are used."""


class _Expression:
    """A regular expression that is compiled whenever it is used, which is once: `re` keeps what it compiled."""

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self._given = pattern, flags

    def __getattr__(self, name: str) -> Any:
        """What it has once it is compiled."""
        return getattr(re.compile(*self._given), name)


class _Uncompiled:
    """Runs a module's code with `loader`, and leaves its regular expressions for later."""

    def __init__(self, loader: "Loader") -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """What the loader makes."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run its code. It looks like one that the loader has loaded."""
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        compiled = re.compile

        def compile_later(pattern: Any, flags: int = 0) -> Any:
            # what this module imports in its turn, and other threads, have theirs at once
            caller = sys._getframe(1)  # noqa: SLF001 - Python has no other name for it that costs nothing to import
            return (_Expression if caller.f_globals is module.__dict__ else compiled)(pattern, flags)

        re.compile = compile_later
        try:
            self._loader.exec_module(module)
        finally:
            re.compile = compiled


class _Unloaded(ModuleType):
    """A module whose code has not run."""

    def __getattr__(self, name: str) -> Any:
        """What Python calls for a name that is not there: load the module first, in one thread, while others wait."""
        later: _Later = self.__dict__["__spec__"].loader_state
        with later.lock:
            if not later.has_begun:
                later.load(self)
        return ModuleType.__getattribute__(self, name)


class _Later:
    """Leaves a module unloaded, for `loader` to load later."""

    def __init__(self, loader: "Loader") -> None:
        self.lock = RLock()
        self.has_begun = False
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module without its code's names."""
        return _Unloaded(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave it for later. It looks like one that the loader has loaded."""
        spec = module.__spec__
        if spec is not None:
            spec.loader_state = self
            spec.loader = module.__loader__ = self._loader

    def load(self, module: ModuleType) -> None:
        """Run its code. Raises what that raises; then the next one who asks for a name tries again."""
        self.has_begun = True
        try:
            self._loader.exec_module(module)
        except BaseException:
            self.has_begun = False
            raise
        module.__class__ = ModuleType


class _Finder:
    """Finds the modules in UNUSED and EXPRESSIONS where Python does."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder` has it."""
        kind = _Later if name in UNUSED else _Uncompiled if name in EXPRESSIONS else None
        spec = None if kind is None else PathFinder.find_spec(name, path)
        if kind is not None and spec is not None and spec.loader is not None:
            later: Any = kind(spec.loader)  # not a Loader: importlib.abc imports as much as this saves
            spec.loader = later
        return spec


@contextmanager
def deferred() -> Iterator[None]:
    """Inside this context an import of a module in UNUSED leaves it unloaded, and one of a module in EXPRESSIONS leaves
    these uncompiled. One that is loaded already stays so.

    Where Python was built without TLS, which asyncio finds out by loading `ssl`, all are loaded.
    """
    if PathFinder.find_spec("_ssl") is None:
        yield
        return
    sys.meta_path.insert(0, _Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(_Finder)
