"""Reading a study file: YAML, overrides from the command line, and a sentence for every mistake.

What the file may say is in `config` and `search.space_rules`; this module turns text into a
`StudyConfig` and pydantic's findings into sentences that name the file, the line, what was found and what is
allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raydisp.config import StudyConfig
from raydisp.config.train import EFFORT_FIELDS
from raydisp.errors import ConfigError, suggest
from raydisp.search import space
from raydisp.search.space_rules import find_problem

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but `1e-5` is a number, as in YAML 1.2, and a key given twice is a mistake."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)[eE][-+]?[0-9]+
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study file.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value`, the value in YAML; checked like the file.
    Raises:
        ConfigError: the file cannot be read, or it or an override says something that is not allowed.
    """
    return parse_study(_read_text(Path(path)), str(path), overrides)


def parse_study(text: str, name: str, overrides: Sequence[str] = ()) -> StudyConfig:
    """A study from the text of its file; `name` is what mistakes call the file. Raises as `load_study`."""
    tree, lines = _parse_yaml(text, name)
    overridden = [_apply_override(tree, override) for override in overrides]
    source = _Source(name, lines, overridden)
    try:
        study = StudyConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(error, tree, source))) from None
    problem = find_problem(study, explain)
    if problem is not None:
        key_path, sentence = problem
        raise ConfigError(f"{source.place(key_path)}: {sentence}")
    return study


def dump_study(study: StudyConfig) -> str:
    """The resolved study file, defaults included, as YAML that `load_study` reads back."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


EFFORT = ("output", "resources", "checkpoint", "failures", "trackers")
"""Parts of a study file that do not change what a trial finds."""


LENGTH_FIELDS = ("num_trials", "max_tokens_total", "max_hours", "stop_when")
"""Fields of `search` that say how long it goes on."""


def differences(earlier: StudyConfig, later: StudyConfig) -> list[str]:
    """The fields that change results and differ, each as `train.learning_rate (0.002 -> 0.003)`.

    A study may go on for longer, so `search.num_trials` and what else ends it may differ; parts in EFFORT may
    too, and `confirm` may until it is frozen (`confirm.frozen_plan`).
    """
    trees = [study.model_dump(mode="json", exclude={*EFFORT, "confirm"}) for study in (earlier, later)]
    for tree in trees:
        for name in LENGTH_FIELDS:
            del tree["search"][name]
        for name in EFFORT_FIELDS:
            del tree["train"][name]
        del tree["dispersion"]["allow_negative_weight"]  # the weight itself is compared
        # What it stands for counts, not how it is spelt: half of num_trials would change as they grow.
        if tree["search"]["num_startup_trials"] is None:
            del tree["search"]["num_startup_trials"]
        # The median rule looks at each of these evaluations; rungs are where they are.
        if "median" not in tree["search"]["scheduler"]:
            tree["evaluate"].pop("every_tokens")
        tree["evaluate"].pop("num_log_spaced")  # nobody is stopped there
    if trees[0]["model"]["source"] != trees[1]["model"]["source"]:
        trees = [{**tree, "model": {"source": tree["model"]["source"]}} for tree in trees]
    if trees[0]["data"]["source"] != trees[1]["data"]["source"]:
        trees = [{**tree, "data": {"source": tree["data"]["source"]}} for tree in trees]
    flat = [dict(_leaves(tree, ())) for tree in trees]
    paths = [path for path in {**flat[0], **flat[1]} if flat[0].get(path) != flat[1].get(path)]
    names = [list(study.arms or ()) for study in (earlier, later)]
    if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):  # trials are numbered by it
        return [f"the order of arms ({', '.join(names[0])} -> {', '.join(names[1])})"]
    return [f"{_dotted(path)} ({_shown(flat[0].get(path))} -> {_shown(flat[1].get(path))})" for path in paths]


def _leaves(tree: Any, at: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*at, key))
    else:
        yield at, tree


class _Source:
    """Knows on which line of the file, or in which override, a key stands."""

    def __init__(self, path: str, lines: Mapping[KeyPath, int], overridden: Sequence[KeyPath]) -> None:
        self._path = path
        self._lines = lines
        self._overridden = overridden

    def place(self, key_path: KeyPath) -> str:
        for path in self._overridden:
            # What stands below the override, or above it and only because of it.
            below = key_path[: len(path)] == path
            if below or (path[: len(key_path)] == key_path and key_path not in self._lines):
                return f"--set {_dotted(path)}"
        for length in range(len(key_path), 0, -1):
            if key_path[:length] in self._lines:
                return f"{self._path}:{self._lines[key_path[:length]]}"
        return self._path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such file; give the path of a study file{_nearby(path)}"
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path} is a directory; give the path of a study file, a YAML file{_nearby(path / 'x')}"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8; a study file is YAML text in UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _parse_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _collect_lines(node, (), lines, name)
            tree = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except RecursionError:
        raise ConfigError(
            f"{name}: lists and mappings stand in each other too deeply, or without end"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        context = f" {error.context}" if error.context else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem}{context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        found = "empty" if tree is None else f"a {_kind(tree)}"
        raise ConfigError(
            f"{name} is {found}; a study file is a mapping with the keys name, model, data, train and search"
        )
    return tree, lines


def _collect_lines(node: yaml.Node, at: KeyPath, lines: dict[KeyPath, int], name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise ConfigError(
                    f'{name}:{line}: the key "{_dotted((*at, key))}" stands twice, first on line '
                    f"{seen[key]}; keep one of them"
                )
            seen[key] = line
            lines[(*at, key)] = line
            _collect_lines(value_node, (*at, key), lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*at, index)] = item.start_mark.line + 1
            _collect_lines(item, (*at, index), lines, name)


def _nearby(path: Path) -> str:
    try:
        files = sorted(file.name for file in path.parent.glob("*.y*ml"))
    except OSError:
        return ""
    guess = suggest(path.name, files)
    if guess:
        return f".{guess}"
    return f" (in {path.parent} there are {', '.join(files[:5])})" if files else ""


def _apply_override(tree: dict[str, Any], text: str) -> KeyPath:
    """Set one key in the tree; returns where."""
    dotted, equals, raw = text.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted or ".." in dotted or dotted.startswith(".") or dotted.endswith("."):
        raise ConfigError(
            f"--set {text}: expected dotted.key=value, for example --set train.learning_rate=1e-3"
        )
    try:
        value = yaml.load(raw, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"--set {text}: the value is not valid YAML: {problem}") from None
    key_path = _split_override(tree, dotted)
    node: Any = tree
    for index, key in enumerate(key_path[:-1]):
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(
                f"--set {text}: {_dotted(key_path[: index + 1])} is a {_kind(node)}, which has no keys; "
                "set it as a whole"
            )
    node[key_path[-1]] = value
    return key_path


def _split_override(tree: dict[str, Any], dotted: str) -> tuple[str, ...]:
    # Below search.space a key has dots of its own: search.space.dispersion.weight.low means
    # search -> space -> "dispersion.weight" -> low. So it has below arms.NAME.
    parts = dotted.split(".")
    if parts[:2] != ["search", "space"] and parts[0] != "arms":
        return tuple(parts)
    head, rest = tuple(parts[:2]), parts[2:]
    if len(rest) > 2 and rest[-1] in ("low", "high", "log", "step", "when", "choices"):
        return (*head, ".".join(rest[:-1]), rest[-1])
    return (*head, ".".join(rest)) if rest else head


# --- sentences -----------------------------------------------------------------------------------------


def _sentences(error: ValidationError, tree: Any, source: _Source) -> list[str]:
    grouped: dict[KeyPath, list[Mapping[str, Any]]] = {}
    for finding in error.errors(include_url=False):
        grouped.setdefault(_real_path(finding, tree), []).append(finding)
    sentences = []
    for path, findings in grouped.items():
        sentence = _sentence(path, findings, tree)
        first = _first_field(sentence)
        place = first if first[: len(path)] == path else path
        sentences.append(f"{source.place(place)}: {sentence}")
    return sentences


def explain(error: ValidationError, tree: Any) -> str:
    """A sentence for the first mistake in a tree of values, without its place in a file."""
    finding = error.errors(include_url=False)[0]
    return _sentence(_real_path(finding, tree), [finding], tree)


def _first_field(sentence: str) -> KeyPath:
    # A rule over several parts of the file belongs to no key, but its sentence begins with one.
    match = re.match(r"([a-z_]+(?:\.[a-z_]+)+)", sentence)
    return tuple(match[1].split(".")) if match else ()


def _real_path(finding: Mapping[str, Any], tree: Any) -> KeyPath:
    """Where the finding is in the file: pydantic's location without its names for members of a union."""
    location: tuple[str | int, ...] = finding["loc"]
    path: list[str | int] = []
    node = tree
    for index, key in enumerate(location):
        in_mapping = isinstance(node, dict) and key in node
        following = location[index + 1 : index + 2]
        if in_mapping and key == node.get("source") and following and following[0] in node:
            continue  # the name of a member that is called like one of its keys: {source: path, path: ...}
        in_list = isinstance(node, list) and isinstance(key, int) and key < len(node)
        if in_mapping or in_list:
            node = node[key]
        elif not (finding["type"] == "missing" and index == len(location) - 1):
            continue
        path.append(key)
    return tuple(path)


def _sentence(path: KeyPath, findings: Sequence[Mapping[str, Any]], tree: Any) -> str:
    first = findings[0]
    kind, context = first["type"], first.get("ctx", {})
    name = _dotted(path)
    if kind == "extra_forbidden":
        allowed = _allowed_keys(path[:-1], tree)
        parent = f"in {_dotted(path[:-1])}" if len(path) > 1 else "in a study file"
        return (
            f'"{path[-1]}" is not a key {parent}; allowed: {", ".join(allowed)}.'
            f"{suggest(str(path[-1]), allowed)}"
        )
    if kind == "invalid_key":
        return f"{name} is a key that is not text; allowed are the names of fields"
    if kind == "missing":
        return f"{name} is missing; add it"
    if kind == "union_tag_not_found":
        tag = context["discriminator"].strip("'")
        return f"{name}.{tag} is missing; it says which kind of {path[-1]} is meant"
    if kind == "union_tag_invalid":
        tag = context["discriminator"].strip("'")
        expected = [word.strip(" '") for word in context["expected_tags"].split(",")]
        return (
            f'{name}.{tag} = "{context["tag"]}" is not one of {", ".join(expected)}.'
            f"{suggest(str(context['tag']), expected)}"
        )
    if kind == "value_error":
        message = str(context["error"]).rstrip(".")
        leaf = str(path[-1]) if path else ""
        if leaf and message.startswith((f"{leaf} ", "is ")):
            # The rule speaks of its own field: say where that field is, and what stands there.
            found = "" if " = " in message.split(";")[0] else f" = {_shown(first['input'])}"
            return f"{name}{found} {message.removeprefix(leaf).lstrip()}"
        # A rule over several keys names them in full.
        return f"{name}: {message}" if path and not message.startswith(f"{name}.") else message
    allowed_texts = list(dict.fromkeys(_allowed(finding) for finding in findings))
    sentence = f"{name} = {_shown(first['input'])} is not {' or '.join(allowed_texts)}"
    words = [word for finding in findings for word in _literals(finding)]
    guess = suggest(first["input"], words) if isinstance(first["input"], str) else ""
    return f"{sentence}.{guess}" if guess else sentence


def _literals(finding: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", finding["ctx"]["expected"]) if finding["type"] == "literal_error" else []


_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}

_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "finite_number": "a finite number",
}


def _allowed(finding: Mapping[str, Any]) -> str:
    kind, context = finding["type"], finding.get("ctx", {})
    if kind in _BOUNDS:
        key, relation = _BOUNDS[kind]
        return f"{relation} {context[key]}"
    if kind in _TYPES:
        return _TYPES[kind]
    if kind == "literal_error":
        words = _literals(finding) or [context["expected"]]
        return f"one of {', '.join(words)}" if len(words) > 1 else f'"{words[0]}"'
    if kind == "string_pattern_mismatch":
        return "a name of letters, digits, '.', '_' and '-' that begins with a letter or digit"
    if kind == "string_too_short":
        return "text of at least one character"
    if kind == "string_too_long":
        return f"text of at most {context['max_length']} characters"
    if kind == "too_short":
        return "a list with at least one entry"
    if kind == "too_long":
        return f"a list with at most {context['max_length']} entries"
    return f"allowed ({finding['msg']})"


def _allowed_keys(path: KeyPath, tree: Any) -> list[str]:
    """Keys that the section at `path` may have, following the chosen member of a union."""
    section: Any = StudyConfig
    node = tree
    for key in path:
        node = node[key]
        section = space.section_class(section, key, node)
    return list(section.model_fields)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "mapping"
    return "list" if isinstance(value, list) else "single value"


def _dotted(path: KeyPath) -> str:
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        elif "." in key:
            text += f'["{key}"]'
        else:
            text += f".{key}" if text else key
    return text
