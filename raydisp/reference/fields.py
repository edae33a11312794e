"""Every field of a study file: its name, what it may be, its default, what it means. From the classes alone.

What a field may be is read off its JSON schema, by which editors check too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from raydisp.config import StudyConfig, TrialConfig, in_identity
from raydisp.config.section import Section
from raydisp.search.space import may_be_searched

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A field.

    Attributes:
        name: as it is written, dotted; FIELD stands for a name that the user gives.
        allowed: what it may be, in words (Markdown).
        default: as YAML has it; None: the field must be given.
        meaning: its description (plain text).
        searched: whether a search may vary it; None: it is no field of a trial.
        identity: whether it is part of a trial's identity; None: it is no field of a trial.
    """

    name: str
    allowed: str
    default: str | None
    meaning: str
    searched: bool | None
    identity: bool | None


@dataclass(frozen=True)
class Group:
    """The fields of a section, or of one kind of it.

    Attributes:
        title: name of the section, and after a comma what tells its kinds apart; empty: no section.
        text: what it is for (plain text).
        depth: 2 for what stands within a section, else 1.
    """

    title: str
    text: str
    depth: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class _Place:
    """Where the fields of a class stand in a study file."""

    title: str
    prefix: str
    """Of the fields' names."""
    kind: type[Section]
    depth: int
    note: str = ""


def anchor(title: str) -> str:
    """What a link names: `search.space, range` -> `search.space-range`."""
    return re.sub(r"[^a-z0-9._]+", "-", title.lower())


def groups() -> list[Group]:
    """All fields of a study file: those that stand in no section, then section by section."""
    places: list[_Place] = []
    plain: dict[str, FieldInfo] = {}
    seen: set[type[Section]] = set()
    for name, field in StudyConfig.model_fields.items():
        kinds = _sections_in(field.annotation)
        if kinds and _is_section(field.annotation):
            note = "Required." if field.is_required() else "May be left out."
            for kind in kinds:
                source = kind.model_fields.get("source")
                suffix = f", source: {get_args(source.annotation)[0]}" if source is not None else ""
                places.append(_Place(name + suffix, name, kind, 1, note))
                places += _places_within(name, kind, seen)
        else:
            plain[name] = field
            places += _places_of(name, field, seen, depth=1)
    links = {place.kind.__name__: _link(place.title) for place in reversed(places)}
    for kind in filter(_is_wrapper, seen):
        (inner,) = _sections_in(next(iter(kind.model_fields.values())).annotation)
        links[kind.__name__] = links[inner.__name__]
    schema = StudyConfig.model_json_schema()
    entries = [_entry("", name, field, schema, links) for name, field in plain.items()]
    return [
        Group("", "The fields that stand in no section.", 1, tuple(entries)),
        *(_group(place, links) for place in places),
    ]


def _places_within(
    prefix: str, kind: type[Section], seen: set[type[Section]], *, depth: int = 2
) -> Iterator[_Place]:
    """The sections that the fields of a class hold."""
    for name, field in kind.model_fields.items():
        yield from _places_of(f"{prefix}.{name}", field, seen, depth=depth)


def _places_of(name: str, field: FieldInfo, seen: set[type[Section]], *, depth: int) -> Iterator[_Place]:
    """The sections that a field holds, but those that have a place already."""
    kinds = [kind for kind in _sections_in(field.annotation) if kind not in seen]
    seen.update(kinds)
    prefix = f"{name}.FIELD" if get_origin(field.annotation) is dict else name
    for kind in kinds:
        if _is_wrapper(kind):
            yield from _places_within(name, kind, seen, depth=depth)
        else:
            title = f"{name}, {kind.__name__.lower()}" if len(kinds) > 1 else name
            yield _Place(title, prefix, kind, depth)
            yield from _places_within(prefix, kind, seen)


def _is_wrapper(kind: type[Section]) -> bool:
    """Whether a class only says under which key its one section stands: {asha: {...}}."""
    return len(kind.model_fields) == 1 and kind.__name__.startswith("_")


def _sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that an annotation admits, also within lists and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    found = [kind for member in get_args(annotation) for kind in _sections_in(member)]
    return list(dict.fromkeys(found))


def _is_section(annotation: Any) -> bool:
    """Whether an annotation admits nothing but sections, and perhaps None."""
    members = get_args(annotation)
    if get_origin(annotation) in (list, dict):
        return False
    if not members:
        return annotation is type(None) or bool(_sections_in(annotation))
    return all(_is_section(member) for member in members if isinstance(member, type) or get_args(member))


def _link(title: str) -> str:
    return f"[{re.split(r', (?:source: )?|[.]', title)[-1]}](#{anchor(title)})"


def _group(place: _Place, links: Mapping[str, str]) -> Group:
    schema = place.kind.model_json_schema()
    # What decides which of several kinds it is comes first, wherever the class has it.
    fields = sorted(place.kind.model_fields.items(), key=lambda item: item[0] != "source")
    entries = tuple(_entry(place.prefix, name, field, schema, links) for name, field in fields)
    text = inspect.cleandoc(place.kind.__doc__ or "")
    return Group(place.title, f"{text} {place.note}".strip(), place.depth, entries)


def _entry(prefix: str, name: str, field: FieldInfo, schema: Schema, links: Mapping[str, str]) -> Entry:
    told = schema["properties"][name]
    default = told.get("default", field.get_default(call_default_factory=True))
    dotted = f"{prefix}.{name}" if prefix else name
    part, _, inner = dotted.partition(".")
    of_trial = part in TrialConfig.model_fields
    return Entry(
        dotted,
        allowed(told, links),
        None if field.is_required() else _as_yaml(default),
        _description(told),
        may_be_searched(part, inner.partition(".")[0]) if of_trial else None,
        in_identity(part, inner.partition(".")[0]) if of_trial else None,
    )


def _description(schema: Schema) -> str:
    if "description" in schema:
        return str(schema["description"])
    return next((one["description"] for one in schema.get("anyOf", ()) if "description" in one), "")


def _as_yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_as_yaml(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- what a field may be ------------------------------------------------------------------------------------

_TYPES = {
    "string": "text",
    "null": "`null`",
    "integer": "whole number",
    "number": "number",
}


def allowed(schema: Schema, links: Mapping[str, str]) -> str:
    """What a JSON schema admits, in words.

    Args:
        links: what is said of a definition that it refers to.
    """
    parts = list(dict.fromkeys(_alternatives(schema, links)))
    if "number" in parts and "whole number" in parts:
        parts.remove("whole number")
    return " or ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _alternatives(schema: Schema, links: Mapping[str, str]) -> list[str]:
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return [part for one in schema[key] for part in _alternatives(one, links)]
    if "$ref" in schema:
        return [links[schema["$ref"].rpartition("/")[2]]]
    if "enum" in schema or "const" in schema:
        return [f"`{_as_yaml(value)}`" for value in schema.get("enum", [schema.get("const")])]
    kind = schema["type"]
    if isinstance(kind, list):
        return [part for one in kind for part in _alternatives({"type": one}, links)]
    if kind == "boolean":
        return ["`true`", "`false`"]
    if kind == "array":
        return [f"list{_length(schema)} of {_several(schema['items'], links)}"]
    if kind == "object" and "properties" in schema:
        return ["mapping of its fields"]
    if kind == "object":
        return [f"mapping of names to {_several(schema['additionalProperties'], links)}"]
    return [_TYPES[kind] + _bounds(schema)]


def _several(schema: Schema, links: Mapping[str, str]) -> str:
    """What each entry of a list or mapping may be."""
    inner = allowed(schema, links)
    return f"({inner})" if " or " in inner else re.sub(r"^((whole )?number)\b", r"\1s", inner)


def _length(schema: Schema) -> str:
    least, most = schema.get("minItems"), schema.get("maxItems")
    if least is None and most is None:
        return ""
    if least == most:
        return f" of length {least}"
    return f" ({_range(least, most)})"


def _range(least: Any, most: Any) -> str:
    if most is None:
        return f"at least {_number(least)}"
    return f"at most {_number(most)}" if least is None else f"{_number(least)} to {_number(most)}"


def _bounds(schema: Schema) -> str:
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    least, most = schema.get("minimum"), schema.get("maximum")
    said = [f"above {_number(above)}"] if above is not None else []
    if least is not None or most is not None:
        said.append(_range(least, most))
    if below is not None:
        said.append(f"below {_number(below)}")
    return f" ({', '.join(said)})" if said else ""


def _number(value: float) -> str:
    exponent = len(str(int(value))) - 1
    return (
        f"10^{exponent}"
        if exponent > 6 and value == 10**exponent
        else f"{value:,g}"
        if value < 10**6
        else f"{int(value):,}"
    )
