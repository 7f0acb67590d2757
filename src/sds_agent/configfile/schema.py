"""The JSON Schema of a configuration file, for editors, from the settings classes that read it.

It knows every key, type and pattern. What needs more than one key or arithmetic (names that collide, the bounds of a
duration) only reading the file finds. msgspec describes the settings; a file differs from them in a few ways: no key is
null, a duration or an address is text, and some keys may be left out because the loader fills them in.
"""

from collections.abc import Iterator
from inspect import cleandoc
from typing import Any, TypeAlias

from msgspec import NODEFAULT, Struct, to_builtins
from msgspec.inspect import CustomType, DictType, Field, StructType, Type, VarTupleType
from msgspec.json import schema_components

from sds_agent.configfile.declarations import Declaration, declaration, fields_of

Schema: TypeAlias = dict[str, Any]


def schema_of(root: type[Struct], title: str, description: str) -> Schema:
    """The schema (JSON Schema draft 2020-12) of a file whose keys a settings class declares."""
    sections = sections_of(root)
    declared = [each for section in sections for each in _declarations(section)]
    selected = {
        each.type.cls: {"oneOf": [{"$ref": f"#/$defs/{kind.__name__}"} for kind in kinds_of(each)]}
        for each in declared
        if each.variant and isinstance(each.type, CustomType)
    }

    def hook(of: type) -> Schema:
        return selected.get(of, {})

    _, components = schema_components([section.cls for section in sections], schema_hook=hook)
    for section in sections:
        _correct(components[section.cls.__name__], section)
    as_text = {each.type.cls.__name__ for each in declared if isinstance(each.type, StructType) and not each.section}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **components.pop(root.__name__),
        "title": title,
        "description": description,
        # the docstring of an enumeration is for readers of the code
        "$defs": {
            name: {"enum": each["enum"]} if "enum" in each else described(each)
            for name, each in components.items()
            if name not in as_text
        },
    }


def described(component: Schema) -> Schema:
    """The schema of a class with its docstring as readers see it: some versions of msgspec leave the indentation in."""
    return {key: cleandoc(value) if key == "description" else value for key, value in component.items()}


def sections_of(root: type[Struct]) -> list[StructType]:
    """The settings classes of a file, each once, those that a `type` selects among them."""
    found: dict[type, StructType] = {}
    waiting = [fields_of(root)]
    while waiting:
        section = waiting.pop(0)
        if section.cls not in found:
            found[section.cls] = section
            for each in _declarations(section):
                waiting += [each.section] if each.section else []
                waiting += [fields_of(kind) for kind in kinds_of(each)]
    return list(found.values())


def kinds_of(here: Declaration) -> list[type[Struct]]:
    """The settings classes among which the key `type` of a place selects; none where there is no such choice."""
    return [kind for name in here.variant.types if (kind := here.variant.find(name))] if here.variant else []


def default_of(field: Field) -> object:
    """The default of a key, as the file has it; None where there is none, or a section's."""
    here = declaration(field.type)
    default = field.default if field.default_factory is NODEFAULT else field.default_factory()
    if default in (NODEFAULT, None) or here.section or isinstance(here.type, DictType):
        return None
    if isinstance(here.type, VarTupleType):
        return list(default) or None
    return here.extra["write"](default) if "write" in here.extra else to_builtins(default)


def _declarations(section: StructType) -> Iterator[Declaration]:
    """Those of the places in a section, with those in its lists and mappings."""
    waiting: list[Type] = [field.type for field in section.fields]
    while waiting:
        here = declaration(waiting.pop(0))
        yield here
        match here.type:
            case VarTupleType(item_type=item) | DictType(value_type=item):
                waiting.append(item)


def _correct(schema: Schema, section: StructType) -> None:
    """Make msgspec's schema of a settings class that of the section in the file."""
    del schema["title"]
    schema["additionalProperties"] = False
    for field in section.fields:
        here, key = declaration(field.type), schema["properties"][field.name]
        key.pop("default", None)
        if "convert" in here.extra:
            key = dict(here.schema)
        elif options := key.pop("anyOf", None):
            key |= options[0]
        if here.shorthand is not None:
            described = {name: key.pop(name) for name in ("description",) if name in key}
            key = {"anyOf": [dict(here.shorthand.schema), key], **described}
        if (default := default_of(field)) is not None:
            key["default"] = default
        if "filled_in" in here.extra and field.required:
            schema["required"].remove(field.name)
        schema["properties"][field.name] = key
