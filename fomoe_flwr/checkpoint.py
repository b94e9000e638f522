"""Checkpoints that are either whole or not there: written aside, flushed to disk, renamed.

    checkpoints/round_00003/
        parameters.safetensors    the global state by name, fp32 (LocalAdamW: with its moments)
        outer.safetensors         the outer optimizer's buffers
        public.safetensors        what the sites hold, bf16, where strategy.down sends differences to it
        manifest.json             round, tokens, configuration, placement, RNG, and SHA-256 of each file and of itself

The manifest is read first, and nothing is believed that does not match its digest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from torch import Tensor

from fomoe_flwr.compose import Composed, as_in_conf, compose, renamed
from fomoe_flwr.config import TAKEN, path_keys
from fomoe_flwr.data.tokenizer import at_hand
from fomoe_flwr.errors import CheckpointError, ConfigError, WireError
from fomoe_flwr.files import expanded, flush, naming, whole_folder
from fomoe_flwr.mapped import map_file
from fomoe_flwr.overrides import (
    check_single,
    is_plain,
    keys_of,
    last_value,
    merge_overrides,
    read_overrides,
    setting,
    spelled,
)
from fomoe_flwr.reading import Amount, Number, load_json, reason
from fomoe_flwr.wire import decode, write_tensors

log = logging.getLogger("fomoe")

FORMAT = 2
_PATTERN = re.compile(r"round_(\d{5,})")


class _Site(TypedDict):
    name: str


class _Sites(TypedDict):
    sites: list[_Site]


class SavedConfig(TypedDict):
    """What a resume holds against its own configuration."""

    model: dict[str, Any]
    strategy: dict[str, Any]
    data: dict[str, Any]
    train: dict[str, Any]
    federation: _Sites
    seed: int


class _Sizes(TypedDict):
    norms: list[dict[str, float]]
    usual: dict[str, Amount]


class Memory(TypedDict, total=False):
    """What `Server.memory` gives; earlier versions kept less."""

    counted: dict[str, int]
    last_losses: dict[str, Number]
    corpus: str
    own_corpora: dict[str, str]
    norms: list[dict[str, float]]
    usual: dict[str, Amount]
    keys: dict[str, str]
    experts: dict[str, Any]
    load: list[list[Amount]] | None
    discarded: int
    public: dict[str, list[list[int]]]
    resting: list[str]
    turns: dict[str, _Sizes]
    placement: list[list[list[int]]]


class _Best(TypedDict):
    round: int
    val_loss: Number


class _Line(TypedDict, total=False):
    best: _Best | None


class Facts(TypedDict, total=False):
    """What a run says of itself in a manifest; only a resumed run needs it."""

    run: str
    tokens: int
    memory: Memory
    metrics: _Line
    config: dict[str, Any]
    overrides: list[Any]
    placement: dict[str, list[list[int]]]


class Origin(TypedDict):
    """The checkpoint with whose model a run began (`init_from=`)."""

    path: str
    run: str
    round: int
    sha256: str  # of its parameters.safetensors


class _Version(TypedDict):
    format: int


class _Head(_Version):
    round: int
    sha256: dict[str, str]


class Manifest(_Head, Facts, total=False):
    """`manifest.json`."""

    inputs: dict[str, str]  # see inputs.py; not in those of an earlier version
    init_from: Origin


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, verified. Its tensors are read where they lie in its files, and must not be written to."""

    path: Path
    manifest: dict[str, Any]
    parameters: dict[str, Tensor]
    outer: dict[str, Tensor]
    public: dict[str, Tensor] = field(default_factory=dict)

    @property
    def round(self) -> int:
        return int(self.manifest["round"])


def checkpoint_path(run_dir: Path, round_: int) -> Path:
    """Where a round's checkpoint lives."""
    return run_dir / "checkpoints" / f"round_{round_:05d}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Of all that the manifest says but its own digest; layout does not count."""
    files = {file: digest for file, digest in manifest["sha256"].items() if file != "manifest.json"}
    return hashlib.sha256(json.dumps({**manifest, "sha256": files}).encode()).hexdigest()


def save_checkpoint(
    run_dir: Path,
    round_: int,
    parameters: Mapping[str, Tensor],
    outer: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    keep: int,
    best: int | None = None,
    public: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Later ones are removed, too: the run was resumed before them, so they are of rounds that are played again. Nothing
    is removed before this one is on the disk.

    Args:
        best: a round whose checkpoint stays, too.
        public: the public model, where there is one.
        facts: what else belongs to it, as JSON values (configuration, placement, RNG, tokens).

    Raises:
        OSError: it cannot be written, naming the file; nothing of it is left, and nothing was removed.
    """
    final = checkpoint_path(run_dir, round_)
    aside = final.with_name(f".partial-{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    digests = {}
    try:
        with naming(final):
            aside.mkdir(parents=True)
            files = {"parameters": parameters, "outer": outer} | ({"public": public} if public else {})
            for name, tensors in files.items():
                file = aside / f"{name}.safetensors"
                digest = hashlib.sha256()
                write_tensors(file, tensors, seen=digest.update)
                flush(file)
                digests[file.name] = digest.hexdigest()
            manifest = {"format": FORMAT, "round": round_, "sha256": digests, **facts}
            digests["manifest.json"] = _manifest_digest(manifest)
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
            flush(aside / "manifest.json")
            flush(aside)
    except BaseException:
        # The disk may be full.
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _remove(final)  # a resumed run passes a round again
    aside.rename(final)
    flush(final.parent)
    found = list_checkpoints(run_dir)
    newest = found.index(final) + 1
    for later in found[newest:]:
        log.warning("round %d: removing %s, which is of before the run was resumed", round_, later.name)
        _remove(later)
    for old in found[: max(newest - keep, 0)]:
        if best is None or old != checkpoint_path(run_dir, best):
            _remove(old)
    return final


def _remove(path: Path) -> None:
    """A checkpoint, if it is there; of one that somebody has moved elsewhere and linked to, the link."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def copy_checkpoint(path: Path, run_dir: Path, round_: int) -> None:
    """Have a checkpoint in another run directory, too: whole or not at all."""
    final = checkpoint_path(run_dir, round_)
    with whole_folder(final) as aside:
        shutil.copytree(path, aside, dirs_exist_ok=True)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _PATTERN.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round_")))


def read_checkpoint(path: Path, tensors: bool = True) -> Checkpoint:
    """One checkpoint, verified.

    Args:
        tensors: False: the manifest alone is read and verified, which takes no time.

    Raises:
        CheckpointError: what is wrong with which file.
    """
    manifest = read_manifest(path)
    found: dict[str, dict[str, Tensor]] = {"parameters": {}, "outer": {}}
    if "public.safetensors" in manifest["sha256"]:
        found["public"] = {}
    for name in found if tensors else ():
        file = path / f"{name}.safetensors"
        try:
            if not file.exists():
                raise CheckpointError(f"checkpoint {path}: {file.name} is missing")
            if _digest(file) != manifest["sha256"].get(file.name):
                raise CheckpointError(
                    f"checkpoint {path}: {file.name} is damaged (its SHA-256 differs from the manifest's)"
                )
            found[name] = decode(map_file(file))
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path}: {file.name} cannot be read ({reason(error)})"
            ) from error
        except (WireError, ValueError) as error:  # as it was written, but not by this program
            raise CheckpointError(
                f"checkpoint {path}: {file.name} holds no tensors ({reason(error)})"
            ) from error
    return Checkpoint(path, manifest, **found)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest alone, without the tensors.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    file = path / "manifest.json"
    try:
        if not file.exists():
            raise CheckpointError(f"checkpoint {path}: manifest.json is missing")
        version: int = load_json(file, _Version)["format"]
        if version != FORMAT:
            raise CheckpointError(f"checkpoint {path}: format {version}, this version reads {FORMAT}")
        manifest: dict[str, Any] = load_json(file, Manifest)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: manifest.json is damaged ({reason(error)})") from error
    if manifest["sha256"].get("manifest.json") != _manifest_digest(manifest):
        raise CheckpointError(
            f"checkpoint {path}: manifest.json is damaged (it differs from its own SHA-256)"
        )
    if _PATTERN.fullmatch(path.name) and path.name != checkpoint_path(path, manifest["round"]).name:
        raise CheckpointError(f"checkpoint {path}: is of round {manifest['round']}; give the folder its name")
    return manifest


def resume_from(where: str, tensors: bool = True) -> tuple[Path, Checkpoint]:
    """What `resume=` names; see `find_checkpoint`."""
    return find_checkpoint(where, spelled("resume", where), tensors)


def named_checkpoint(where: str, asked: str, tensors: bool = True) -> Checkpoint:
    """The checkpoint alone; it may have been copied from its run into a folder of any name.

    Raises:
        CheckpointError: as `find_checkpoint`.
    """
    folder = expanded(where).absolute()
    try:
        copied = (folder / "manifest.json").exists()
    except OSError as error:
        raise ConfigError(f"{asked:.200}: cannot be read ({reason(error)})") from error
    return read_checkpoint(folder, tensors) if copied else find_checkpoint(where, asked, tensors)[1]


def find_checkpoint(where: str, asked: str, tensors: bool = True) -> tuple[Path, Checkpoint]:
    """The run directory and its newest whole checkpoint, or just the checkpoint that is named.

    A damaged checkpoint of a run directory is named in the log and the one before it is used.

    Args:
        where: a run directory, its `checkpoints` folder, or one checkpoint.
        asked: what the user wrote, for the error lines.
        tensors: see `read_checkpoint`.

    Raises:
        CheckpointError: there is none, or the one that was named is damaged.
    """
    path = expanded(where).absolute()
    try:
        if path.is_file():
            raise CheckpointError(f"{asked}: is a file; give a run directory or one of its checkpoints")
        if not path.is_dir():
            raise CheckpointError(f"{asked}: no such directory")
        if path.name == "checkpoints" and not (path / "checkpoints").is_dir():
            path = path.parent
        if _PATTERN.fullmatch(path.name):
            return path.parent.parent, read_checkpoint(path, tensors)
        candidates = list_checkpoints(path)
    except OSError as error:
        raise CheckpointError(f"{asked}: cannot be read ({reason(error)})") from error
    if not candidates:
        raise CheckpointError(
            f"{asked}: no checkpoint in {path / 'checkpoints'}; a run that ended before its first can only be begun "
            "again, also in the same directory, without resume="
        )
    problems = []
    for candidate in reversed(candidates):
        try:
            return path, read_checkpoint(candidate, tensors)
        except CheckpointError as error:
            log.warning("%s; trying the one before it", error)
            problems.append(str(error))
    raise CheckpointError(f"{asked}: no checkpoint is whole; newest: {problems[0]}")


# ----- resume=RUN_DIR_OR_CHECKPOINT


def resumed_overrides(overrides: Sequence[str | Override]) -> list[Override]:
    """The overrides as they are, or completed by those of the run that `resume=` names.

    Raises:
        ConfigError: an override cannot be read, or another run is named by `init_from`.
        CheckpointError: nothing there to resume from, or an override in it that is not taken from a file.
    """
    given = read_overrides(overrides)
    check_single(override for override in given if override.key_or_group == "resume")
    where = last_value(given, "resume")
    # An empty one, or none: `compose` says what is wrong with it.
    if not isinstance(where, str) or not where.strip():
        return given
    if any(override.key_or_group == "init_from" for override in given):
        raise ConfigError(
            "init_from: begins a new run, and resume= goes on with one that has its model; give one of them"
        )
    # The tensors are verified when they are read.
    run_dir, checkpoint = resume_from(where, tensors=False)
    saved, config = checkpoint.manifest.get("overrides"), checkpoint.manifest.get("config")
    if not isinstance(saved, list) or not isinstance(config, dict):
        raise CheckpointError(f"checkpoint {checkpoint.path}: manifest.json has no list of overrides")
    items: list[str | Override] = [str(item) for item in saved]
    items += [setting(key, value) for key, value in renamed(config).items()]
    for key, value in _read_elsewhere(config, given, run_dir):
        try:
            items.append(setting(key, value))
        except HydraException as error:
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: {key}: {value!r:.80} is no value"
            ) from error
    try:
        kept = merge_overrides(items, given)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {checkpoint.path}: its override {error}") from error
    for override in kept:
        if override not in given and not is_plain(override):
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: its override {override.input_line} is refused: from a checkpoint only "
                "plain values for keys of this program are taken; if you want it, give it yourself"
            )
    kept = merge_overrides([*_as_it_was(kept, config), *kept], given)
    if not any(override.key_or_group == "hydra.run.dir" for override in kept):
        kept.append(setting("hydra.run.dir", str(run_dir)))
    return kept


def _read_elsewhere(
    config: Mapping[str, Any], given: Sequence[Override], run_dir: Path
) -> Iterator[tuple[str, Any]]:
    """What the run that goes on read in a folder that may be gone."""
    data = config.get("data")
    spec = data.get("tokenizer") if isinstance(data, dict) else None
    named = last_value(given, "data.tokenizer") is not None
    if isinstance(spec, str) and not named and (copy := at_hand(spec, run_dir)) != spec:
        yield "data.tokenizer", copy
    model, begun = config.get("model"), config.get("init_from") is not None
    if not isinstance(model, dict):
        return
    if model.get("hf") and last_value(given, "model.path") is None:
        yield "model.hf", model["hf"]
    if begun:
        for key in TAKEN:
            section, _, name = key.partition(".")
            if isinstance(values := config.get(section), dict) and name in values:
                yield key, values[name]


def _as_it_was(overrides: Sequence[Override], config: Mapping[str, Any]) -> list[Override]:
    """What the run had from the files of `conf/` of its version, where those of this one have something else."""
    now, asked = as_in_conf(overrides), keys_of(overrides)
    found = []
    # What else a run goes by is compared with what is on the disk (`inputs.py`), or may change.
    for section in ("model", "strategy", "train"):
        saved = config.get(section)
        if isinstance(saved, dict) and saved.get("hf"):
            # Sizes follow from it. Earlier versions had no stand-ins.
            saved = {"standins": saved.get("standins", 0)}
        for key, value in saved.items() if isinstance(saved, dict) else ():
            name = f"{section}.{key}"
            if (
                name == "model.document_end"
                or name in asked
                or key not in now[section]
                or name in path_keys()
                or now[section][key] == value
            ):
                continue
            if value is None or isinstance(value, str | int | float):
                found.append(setting(name, value))
    return found


def compose_run(overrides: Sequence[str | Override]) -> Composed:
    """`compose`, with `resume=` followed."""
    return replace(compose(resumed_overrides(overrides)), asked=keys_of(overrides))
