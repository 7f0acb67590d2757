"""The YAML file, read into a document in which every key knows its line.

It is composed from PyYAML's events rather than loaded: so each key has its line, a key given twice is an error (YAML
forbids it, PyYAML takes the last), and the size that aliases expand to and the depth have limits (the C composer
recurses without one and crashes the interpreter). Only the tags of YAML's plain types are allowed, so that no tag
constructs an object.
"""

import errno
import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Never, TypeAlias

import msgspec
import yaml
from msgspec import Struct

from sds_agent.configfile.document import Document, Origin, Tree, working_directory
from sds_agent.configfile.phrases import KeyPath, quoted, render
from sds_agent.errors import Problem, ProblemsError
from sds_agent.files import read_at_once

LARGEST_FILE = 1 << 20
"""Bytes."""
MOST_VALUES = 200_000
"""Values in a file once its aliases are followed: some twenty thousand workloads."""
DEEPEST = 32
MOST_TAGS = 256
"""Scalars of which it is remembered what they are: the keys are among the first."""
_TOO_LARGE = ("the file is too large once its aliases are followed", f"{MOST_VALUES} values are the most")

MINIMUM = "the least it needs is trust_domain and one item of workloads with a name and a spiffe_id"

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_TEXT = {f"{_TAG}{kind}" for kind in ("str", "timestamp", "value", "merge")}

_TAGS = {
    yaml.ScalarEvent: {f"{_TAG}{kind}" for kind in ("bool", "float", "int", "null", "str")},
    yaml.SequenceStartEvent: {f"{_TAG}seq"},
    yaml.MappingStartEvent: {f"{_TAG}map"},
}

_DESCRIPTORS = "/proc/"
_PLAIN = frozenset("\t\n\r" + "".join(map(chr, range(0x20, 0x7F))))
"""The characters of ASCII that YAML takes."""
LOADER: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML was built with it."""


class _Scalar(Struct, frozen=True):
    line: int
    written: str
    value: object
    merges: bool = False


class _List(Struct, frozen=True):
    line: int
    items: "list[_Node]"


class _Map(Struct, frozen=True):
    """`entries` has the line of each key; those that a merge key added have that of the key they came from."""

    line: int
    entries: "_Entries"


_Node: TypeAlias = _Scalar | _List | _Map
_Entries: TypeAlias = dict[str, tuple[int, _Node]]


def read(
    path: Path, loader: type[Any] = LOADER, minimum: str = MINIMUM, *, waits: bool = True
) -> tuple[Document, list[Problem]]:
    """The file as a document, and the problems in it after which the rest could be read.

    `minimum` says what such a file needs at least; an error about an empty file ends with it. For a command that
    `waits` it may be a pipe. Raises ProblemsError when the file cannot be read, is not YAML or is no mapping.
    """
    content = _content(path, waits=waits)
    text = _text(path, content)
    composer = _Composer(str(path), loader(text), text, minimum)
    root = composer.document()
    document = Document(tree={}, origins={(): Origin(str(path), root.line)}, base=_base(path), content=content)
    document.tree = _Expansion(composer, document).root(root)
    return document, composer.problems


def _base(path: Path) -> Path:
    """The directory that relative paths start from. A descriptor, such as /dev/stdin or a pipe of the shell's
    (/dev/fd/63), lies in none that could be meant: what is stored in /dev is gone after the next boot. Raises
    ConfigurationError where the working directory was removed.
    """
    parent = path.absolute().parent
    leads_to = os.readlink(path) if path.is_symlink() else ""  # noqa: PTH115 - text, to be compared
    is_descriptor = leads_to.startswith(_DESCRIPTORS) or f"{os.path.realpath(parent)}/".startswith(_DESCRIPTORS)
    return working_directory() if is_descriptor else parent


def _content(path: Path, *, waits: bool) -> bytes:
    try:
        return _read(path) if waits else read_at_once(path, LARGEST_FILE)
    except FileNotFoundError as error:
        fix = "for standard input name /dev/stdin" if path == Path("-") else "name one that does"
        raise _unreadable(path, "the file does not exist", fix) from error
    except IsADirectoryError as error:
        raise _unreadable(path, "this is a directory", "name a file in it") from error
    except OSError as error:
        fix = "make it readable for the user that runs this command"
        if error.errno == errno.ESPIPE:
            fix = "put a file in its place"
        raise _unreadable(path, f"the file cannot be read ({error.strerror})", fix) from error


def _text(path: Path, content: bytes) -> str:
    if len(content) > LARGEST_FILE:
        raise _unreadable(path, "the file is too large", f"{LARGEST_FILE} bytes are the most")
    try:
        text = content.removeprefix(BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _unreadable(path, "the file is not text in UTF-8", "save it as UTF-8", line) from error
    # most files are of plain characters alone, and to compile the expression takes 3 ms
    if not _PLAIN.issuperset(text) and (wrong := yaml.reader.Reader.NON_PRINTABLE.search(text)):
        found = f"the file holds the character U+{ord(wrong.group()):04X}, which YAML does not take"
        raise _unreadable(path, found, "remove it", text.count("\n", 0, wrong.start()) + 1)
    return text


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LARGEST_FILE + 1)


def _unreadable(path: Path, found: str, fix: str, line: int = 0) -> ProblemsError:
    return ProblemsError([Problem((str(path),), found, fix, line=line)])


class _Composer(Struct):
    """Events to nodes."""

    file: str
    loader: Any
    text: str
    minimum: str
    problems: list[Problem] = msgspec.field(default_factory=list)
    anchors: dict[str, _Node] = msgspec.field(default_factory=dict)
    tags: dict[tuple[str, tuple[bool, bool]], str] = msgspec.field(default_factory=dict)
    count: int = 0

    def document(self) -> _Node:
        """The file's one document. Raises ProblemsError."""
        event = self._next()  # the start of the stream
        while isinstance(event, yaml.StreamStartEvent | yaml.DocumentStartEvent):
            event = self._next()
        if isinstance(event, yaml.StreamEndEvent):
            raise ProblemsError([self.problem(0, "the file is empty", self.minimum)])
        root = self._node(event, ())
        self._next()  # the end of the document
        after = self._next()
        if isinstance(after, yaml.DocumentStartEvent):
            self._stop(after, "a second document begins here", "keep one document in a file")
        return root

    def problem(self, line: int, found: str, fix: str, path: KeyPath = ()) -> Problem:
        """A problem in this file."""
        return Problem((self.file,), found, fix, render(path), line)

    def _next(self) -> Any:
        try:
            return self.loader.get_event()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line if mark is not None else 0
            found = f"the file is not valid YAML here ({error.problem})"
            raise ProblemsError([*self.problems, self.problem(line + 1, found, self._fix(line))]) from error
        except (ValueError, OverflowError) as error:  # PyYAML's own scanner, on an escape beyond Unicode
            found = "the file holds an escape or a number that YAML does not have"
            raise ProblemsError(
                [*self.problems, self.problem(0, found, "correct the escapes in double quotes")]
            ) from error

    def _fix(self, line: int) -> str:
        lines = self.text.splitlines()
        written = lines[line] if line < len(lines) else ""
        if "\t" in written[: len(written) - len(written.lstrip())]:
            return "indent with spaces: YAML does not take tabs"
        return "check the indentation, quotes and brackets here and on the lines before"

    def _stop(self, event: Any, found: str, fix: str) -> Never:
        raise ProblemsError([*self.problems, self.problem(event.start_mark.line + 1, found, fix)])

    def _node(self, event: Any, path: KeyPath) -> _Node:
        if len(path) > DEEPEST:
            self._stop(event, f"the file is nested more than {DEEPEST} levels deep", "write it flatter")
        if isinstance(event, yaml.AliasEvent):
            return self._aliased(event)
        if event.tag is not None:
            self._check_tag(event)
        node = self._scalar(event, path) if isinstance(event, yaml.ScalarEvent) else self._collection(event, path)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _aliased(self, event: Any) -> _Node:
        if event.anchor not in self.anchors:
            fix = f"define &{event.anchor[:80]} before it is used, and outside itself"
            self._stop(event, f"the alias *{event.anchor[:80]} has no anchor", fix)
        return self.anchors[event.anchor]

    def _check_tag(self, event: Any) -> None:
        if event.tag != "!" and event.tag not in _TAGS[type(event)]:
            self._stop(event, f"the tag {quoted(event.tag)} is not used here", "remove it")

    def _collection(self, event: Any, path: KeyPath) -> _List | _Map:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.MappingStartEvent):
            return _Map(line, self._entries(path))
        items: list[_Node] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._node(event, (*path, len(items))))
        return _List(line, items)

    def _scalar(self, event: Any, path: KeyPath) -> _Scalar:
        line, tag, value = event.start_mark.line + 1, event.tag, event.value
        if tag is None or tag == "!":
            tag = self._resolved(value, event.implicit)
        if tag not in _TEXT:
            try:
                value = self.loader.construct_object(yaml.ScalarNode(tag, event.value))
            except (ValueError, KeyError, IndexError, OverflowError):
                found = f"is not what YAML calls {tag.removeprefix(_TAG)}"
                self.problems.append(self.problem(line, found, "write it in quotes", path))
        return _Scalar(line, event.value, value, merges=tag == _MERGE)

    def _resolved(self, value: str, implicit: tuple[bool, bool]) -> str:
        """The tag of a scalar without one. Most are keys, which thousands of sections have in common."""
        key = value, implicit
        if (known := self.tags.get(key)) is not None:
            return known
        tag: str = self.loader.resolve(yaml.ScalarNode, value, implicit)
        if len(self.tags) < MOST_TAGS:
            self.tags[key] = tag
        return tag

    def _entries(self, path: KeyPath) -> _Entries:
        entries: _Entries = {}
        sources: list[_Map] = []
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._node(event, (*path, "key"))
            name = key.value if isinstance(key, _Scalar) and isinstance(key.value, str) else None
            line = event.start_mark.line + 1
            at = (*path, "?" if name is None else name)
            value = self._node(self._next(), at)
            if name is None:
                self.problems.append(self.problem(line, "has a key that is not text", "write the key in quotes", path))
            elif isinstance(key, _Scalar) and key.merges:
                sources += self._sources(value, line, at)
            elif name in entries:
                found = f"is given twice (first on line {entries[name][0]})"
                self.problems.append(self.problem(line, found, "keep one of them", at))
            else:
                entries[name] = (line, value)
        merged: _Entries = {}
        for source in reversed(sources):  # of several mappings the earlier ones win
            merged |= source.entries
        return merged | entries

    def _sources(self, value: _Node, line: int, path: KeyPath) -> Iterator[_Map]:
        """The mappings whose entries a merge key (`<<`) adds."""
        for source in value.items if isinstance(value, _List) else [value]:
            if isinstance(source, _Map):
                self.count += len(source.entries)
                if self.count > MOST_VALUES:
                    raise ProblemsError([self.problem(line, *_TOO_LARGE)])
                yield source
            else:
                fix = "give it the alias of one, as in <<: *name"
                self.problems.append(self.problem(line, "does not name a mapping", fix, path))


class _Expansion(Struct):
    """Nodes to plain data, with every alias followed, and the origins of all of it."""

    composer: _Composer
    document: Document
    count: int = 0

    def root(self, node: _Node) -> Tree:
        """The tree. Raises ProblemsError if the file holds no mapping."""
        if isinstance(node, _Scalar) and node.value is None:
            raise ProblemsError([self.composer.problem(0, "the file is empty", self.composer.minimum)])
        tree = self._value(node, (), node.line)
        if not isinstance(tree, dict):
            found = "the file does not begin with a mapping of keys"
            problem = self.composer.problem(node.line, found, self.composer.minimum)
            raise ProblemsError([*self.composer.problems, problem])
        return tree

    def _value(self, node: _Node, path: KeyPath, line: int) -> object:
        self.count += 1
        if self.count > MOST_VALUES or len(path) > DEEPEST:
            raise ProblemsError([self.composer.problem(line, *_TOO_LARGE)])
        written = node.written if isinstance(node, _Scalar) else None
        if path:
            self.document.origins[path] = Origin(self.composer.file, line, written)
        match node:
            case _Scalar():
                return node.value
            case _List():
                return [self._value(item, (*path, index), item.line) for index, item in enumerate(node.items)]
            case _Map():
                return {key: self._value(item, (*path, key), at) for key, (at, item) in node.entries.items()}
