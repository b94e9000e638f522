"""Hydra's override strings, read once and by Hydra's own parser: from here on one works on keys and values.

What becomes text again is quoted such that Hydra reads the same value.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.overrides_visitor import HydraOverrideVisitor
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Override,
    OverrideType,
    Quote,
    QuotedString,
    RangeSweep,
    ValueType,
)
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import (  # type: ignore[attr-defined]
    CommonTokenStream,
    InputStream,
    OverrideLexer,
)
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fomoe_flwr.config import REMOVED, absolute, is_name, path_keys, schema
from fomoe_flwr.errors import ConfigError
from fomoe_flwr.files import expanded

# The folders of conf/, from which one file is chosen by `model=tiny`.
GROUPS = ("model", "federation", "strategy", "data", "runtime")
# Where a run lives: keys of Hydra's own that are paths.
DIRECTORIES = ("hydra.run.dir", "hydra.sweep.dir")


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


@functools.cache
def known_keys() -> frozenset[str]:
    """Every key of the configuration, dotted."""
    return frozenset(key for key, _ in schema())


@functools.cache
def _text_keys() -> frozenset[str]:
    """The keys of text, and that of the sites, which has some within."""
    texts = {key for key, field in schema() if field.type in ("str", "str | None")}
    return frozenset({"federation.sites", *texts})


def read_overrides(items: Iterable[str | Override]) -> list[Override]:
    """What the user gave, as Hydra reads it; of two of one key the last counts, as in Hydra.

    `federation=some/file.yaml` means a file of the user's, which a Hydra group alone cannot name. A directory of a run
    may begin with `~`, as all paths.

    Raises:
        ConfigError: one line that names the override, and how to quote its value.
    """
    last: dict[str, Override] = {}
    for item in items:
        override = _open(item if isinstance(item, Override) else _read(item))
        key, value = override.key_or_group, override.value()
        name = f"{key}@{override.package}"
        last.pop(name, None)
        if key in DIRECTORIES and isinstance(value, str):
            if not value.strip():
                raise ConfigError(f"{key}= is empty; give a path, or leave the key out")
            if value.startswith("~"):
                override = setting(key, str(expanded(value)))
        last[name] = override
    found = []
    for override in last.values():
        if override.key_or_group == "federation" and _names_files(override.value()):
            found += [
                _read("federation=file"),
                _read(f"federation.path={override.get_value_string()}"),
            ]
        else:
            found.append(override)
    return found


def _names_files(value: Any) -> bool:
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    texts = [item.text if isinstance(item, QuotedString) else item for item in values]
    return all(isinstance(text, str) and text.endswith((".yaml", ".yml")) for text in texts)


def _read(text: str) -> Override:
    key, equal, value = text.partition("=")
    try:
        override = _parse(text)
        if override.key_or_group in _text_keys() and (as_written := _quote_numbers(text, override)) != text:
            override = _parse(as_written)
    except (HydraException, ValueError, AssertionError, RecursionError) as error:
        if not equal or not re.fullmatch(r"[+~]{0,2}[\w.$@/-]+", key):
            raise ConfigError(f"{text!r:.200}: not an override, which is KEY=VALUE") from error
        why = re.search(r"while evaluating .*?: (.*)", str(error))
        reason = f"Hydra cannot read the value ({why[1]})" if why else "Hydra cannot read the value"
        raise ConfigError(f"{text:.200}: {reason}; {_advice(key, value)}") from error
    if not override.key_or_group:
        raise ConfigError(f"{text!r:.200}: not an override, which is KEY=VALUE")
    if not override.is_hydra_override() and (override.is_delete() or override.package is not None):
        raise ConfigError(f"{text:.200}: a key can only be set here, not taken out or moved; give KEY=VALUE")
    return override


def _parse(text: str) -> Override:
    override = _parser().parse_rule(text, "override")
    assert isinstance(override, Override)
    return override


def _advice(key: str, value: str) -> str:
    return f"if it is text, quote it for Hydra and for the shell: {shlex.quote(f'{key}={quoted(value)}')}"


class _Numbers(HydraOverrideVisitor):
    """Finds where the grammar makes a number or a truth value of a text that reads otherwise, as of 2024_10."""

    def __init__(self) -> None:
        super().__init__(_parser().functions)
        self.spans: list[tuple[int, int]] = []

    def visitPrimitive(self, ctx: Any) -> Any:
        value, first, last = super().visitPrimitive(ctx), ctx.start, ctx.stop
        tokens = [token for token in (first, last) if token.type != OverrideLexer.WS]
        if isinstance(value, int | float) and str(value) != tokens[0].text:
            self.spans.append((tokens[0].start, tokens[-1].stop + 1))
        return value


def _quote_numbers(text: str, override: Override) -> str:
    """Text stays what was written, also where it looks like a number."""
    if isinstance(override.value(), RangeSweep):
        return text
    visitor = _Numbers()
    parser = OverrideParser(CommonTokenStream(OverrideLexer(InputStream(text))))
    visitor.visit(parser.override())  # type: ignore[no-untyped-call]
    for start, stop in reversed(visitor.spans):
        text = f"{text[:start]}'{text[start:stop]}'{text[stop:]}"
    return text


# ----- and back to text


def quoted(text: str) -> str:
    """A text as Hydra's grammar has it. `${` in it is no interpolation."""
    return str(QuotedString(literal(text), Quote.double).with_quotes())


def literal(text: str) -> str:
    r"""A text that OmegaConf does not take for an interpolation: `\${` stands for `${`."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def value_text(value: Any) -> str:
    """A plain value as Hydra's grammar has it."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return f"[{','.join(value_text(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{value_text(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else str(value).lower()


def setting(key: str, value: Any) -> Override:
    """The override that gives a key this value."""
    return _open(_parse(f"{key}={value_text(value)}"))


def _is_open(key: str) -> bool:
    """Whether it is one of those of which the schema does not say what is below: model.hf, of which transformers does,
    and the domains of data.mix.
    """
    return key in ("model.hf", "data.mix") or re.fullmatch(r"model\.hf\.\w{1,64}", key, re.ASCII) is not None


def _open(override: Override) -> Override:
    """To such a key Hydra gives a value only if it is told to add it."""
    key = override.key_or_group
    if key.startswith("model.hf.") and not _is_open(key):
        whole = ".".join(key.split(".")[:3])
        raise ConfigError(
            f"{key:.80}: only whole keys of config.json can be given, {whole:.80}={{KEY: VALUE, …}}"
        )
    if not _is_open(key) or override.type == OverrideType.DEL:
        return override
    return _parse("++" + str(override.input_line).lstrip("+"))


def spelled(key: str, value: object) -> str:
    """`key=value` as the user may type it into a shell."""
    text = f"{key}={value}"
    try:
        if last_value(read_overrides([text]), key) == str(value):
            return shlex.quote(text)
    except ConfigError:
        pass
    return shlex.quote(f"{key}={quoted(str(value))}")


def texts(overrides: Iterable[Override]) -> list[str]:
    """Strings for Hydra."""
    return [str(override.input_line) for override in overrides]


# ----- looking at them


def keys_of(overrides: Iterable[str | Override]) -> frozenset[str]:
    """The keys and groups that are given."""
    return frozenset(override.key_or_group for override in read_overrides(overrides))


def last_value(overrides: Iterable[Override], key: str) -> Any:
    """The value that a key is given; None if it is given none.

    Raises:
        ConfigError: it refers to something that is not there.
    """
    given = [override for override in overrides if override.key_or_group == key]
    if not given:
        return None
    try:
        return OmegaConf.to_container(OmegaConf.create({"": given[-1].value()}), resolve=True)[""]  # type: ignore
    except OmegaConfBaseException as error:
        raise ConfigError(f"{given[-1].input_line}: {str(error).splitlines()[0]}") from error


def check_single(overrides: Iterable[Override]) -> None:
    """Refuse what stands for several runs.

    Raises:
        ConfigError: naming the override, and how to write it if one value is meant.
    """
    for override in overrides:
        if override.is_sweep_override():
            key, advice = override.key_or_group, ""
            if key in (*_text_keys(), *DIRECTORIES, "federation"):
                advice = f"; {_advice(override.get_key_element(), override.get_value_string())}"
            raise ConfigError(
                f"{override.input_line}: several values, for which there is fomoe train -m{advice}"
            )


def is_plain(override: Override) -> bool:
    """Whether it gives one of our own keys a value that stands for itself.

    No other is taken from a checkpoint, which may be somebody else's: Hydra's own keys and OmegaConf's resolvers read
    the environment and run code.
    """
    key, value = override.key_or_group, override.value()
    usual = OverrideType.FORCE_ADD if _is_open(key) else OverrideType.CHANGE
    if override.type != usual or override.value_type != ValueType.ELEMENT:
        return False
    if key in GROUPS:
        return all(
            isinstance(name, str) and is_name(name)
            for name in (value if isinstance(value, list) else [value])
        )
    return (key in known_keys() or _is_open(key)) and not interpolates(value)


def interpolates(value: Any) -> bool:
    """Whether OmegaConf would put something else into its place."""
    if isinstance(value, dict):
        return any(interpolates(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return any(interpolates(item) for item in value)
    # Backslashes in pairs, and one that takes a $ its meaning.
    return isinstance(value, str) and "${" in re.sub(r"\\\\|\\\$", "", value)


def task_overrides(overrides: Iterable[str | Override], tree: DictConfig) -> tuple[str, ...]:
    """What a later `resume=` needs to compose this configuration again: plain settings only (`is_plain`).

    Args:
        tree: what Hydra composed, from which come values that depend on something else.
    """
    kept = []
    for override in read_overrides(overrides):
        key = override.key_or_group
        if override.is_hydra_override() or key == "resume":
            continue
        # A group's choice that is not plain is said when it is resumed.
        if not is_plain(override) and key not in GROUPS:
            value = OmegaConf.select(tree, key)
            resolved = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            override = setting(key, resolved)
        if key in path_keys() and isinstance(path := last_value([override], key), str):
            override = setting(key, absolute(key, path))
        kept.append(override)
    return tuple(texts(kept))


def merge_overrides(saved: Sequence[str | Override], new: Sequence[str | Override]) -> list[Override]:
    """The saved overrides of a run with the user's new ones on top.

    Of one key the new one stays; and a new choice of a group (`federation=uniform`) replaces what was saved
    within that group (`federation.path=…`).
    """
    given = read_overrides(new)
    replaced = {override.key_or_group for override in given}
    groups = tuple(f"{name}." for name in replaced if "." not in name)
    gone = {*replaced, *REMOVED}
    return [
        override
        for override in read_overrides(saved)
        if override.key_or_group not in gone and not override.key_or_group.startswith(groups)
    ] + given


def split_sweep(
    overrides: Sequence[str | Override], config_loader: ConfigLoader | None = None
) -> list[list[str]]:
    """The single jobs of a multirun, as Hydra's basic sweeper will make them.

    Args:
        config_loader: finds the options that glob(*) stands for.

    Raises:
        ConfigError: what cannot be split.
    """
    given = read_overrides(overrides)
    for override in given:
        override.config_loader = config_loader
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(f"{override.input_line}: not a list of values, and only such can be swept over")
    try:
        batches: list[list[list[str]]] = BasicSweeper.split_arguments(given, max_batch_size=None)
    except HydraException as error:
        raise ConfigError(f"{' '.join(texts(given))}: {str(error).splitlines()[0]}") from error
    jobs = [job for batch in batches for job in batch]
    if not jobs:
        raise ConfigError(f"{' '.join(texts(given))}: no job; a choice has no values")
    return jobs
