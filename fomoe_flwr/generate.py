"""`fomoe generate`: text by a checkpoint, or by a folder that `transformers` loads, as it is made.

Nothing but text goes to stdout. No code of a folder is ever run: an export of ours is loaded with the class of this
program, and only if the class that came with it is the same one to the last byte.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from fomoe_flwr.console import Parser, at_least_1
from fomoe_flwr.engine.device import resolve_device
from fomoe_flwr.errors import CheckpointError, ConfigError
from fomoe_flwr.eval_command import Saved, load
from fomoe_flwr.export import CODE, hf_config, whole_state, write_tokenizer
from fomoe_flwr.files import expanded
from fomoe_flwr.hf_files import INDEX, indexed
from fomoe_flwr.reading import reason
from fomoe_flwr.untrusted import parse_json_file

MAX_TOKENS = 200
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def generate_command(arguments: Sequence[str]) -> None:
    """The command.

    Raises:
        ConfigError: an argument is wrong, or transformers is not installed.
        CheckpointError: the checkpoint or the folder is missing, damaged, or brings code that is not ours.
        BrokenPipeError: nobody reads on.
    """
    given = parse(arguments)
    where = f"fomoe generate {given.model}"
    # Read when transformers is imported: a folder's configuration may name things of a hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError("fomoe generate: needs transformers; pip install 'fomoe-flwr[hf]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = resolve_device(given.device, "fomoe generate --device")
    prompt = read_prompt(given.prompt)
    folder = expanded(given.model).absolute()
    if is_exported(folder, where):
        model, tokenizer = from_folder(folder, where)
    else:
        model, tokenizer = from_checkpoint(load(given.model, where))
    stream(model.to(device), tokenizer, prompt, given)


def stream(model: Any, tokenizer: Any, prompt: str, given: argparse.Namespace) -> None:
    """Print the text that follows the prompt, up to the token that ends a document.

    Args:
        model: of transformers, on its device.
        given: max_tokens, temperature (None: the likeliest token), top_p, seed (None: another text each time).

    Raises:
        ConfigError: the prompt leaves no room for a token.
        CheckpointError: the tokenizer has ids that the model has not.
    """
    transformers = importlib.import_module("transformers")

    class Printer(transformers.TextStreamer):  # type: ignore[misc, name-defined]
        """Holds back what is no whole letter yet; only a terminal is protected from control characters."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            shown = visible(text) if sys.stdout.isatty() else text
            print(shown, end="\n" if stream_end else "", flush=True)

    model.eval()
    config = model.config.get_text_config()
    ids = prompt_ids(tokenizer, prompt, model.config.model_type)
    if max(ids) >= config.vocab_size:
        raise CheckpointError(
            f"fomoe generate: the tokenizer does not fit: it has token {max(ids)}, the model {config.vocab_size} tokens"
        )
    longest, room = getattr(config, "max_position_embeddings", None), given.max_tokens
    if longest is not None:
        room = min(room, longest - len(ids))
        if room < 1:
            raise ConfigError(
                f"fomoe generate --prompt: has {len(ids)} tokens; the model is made for texts of {longest}, so at "
                f"most {longest - 1}"
            )
        if room < given.max_tokens:
            print(
                f"warning: --max-tokens {given.max_tokens}: only {room}, for the model is made for texts of "
                f"{longest} tokens",
                file=sys.stderr,
            )
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends in (None, []) else ends
    sampling = {}
    if given.temperature is not None:
        # The folder's own defaults (a top_k, say) are not asked for.
        sampling = {"do_sample": True, "temperature": given.temperature, "top_p": given.top_p, "top_k": 0}
        torch.manual_seed(torch.seed() if given.seed is None else given.seed)
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=room,
        eos_token_id=ends,
        pad_token_id=ends[0] if isinstance(ends, list) else ends,
        **sampling,
    )
    ids_1S = torch.tensor([ids], device=model.device)
    printer = Printer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    model.generate(ids_1S, attention_mask=torch.ones_like(ids_1S), streamer=printer)


def prompt_ids(tokenizer: Any, prompt: str, model_type: str) -> list[int]:
    """The prompt's tokens; of an empty one the token that begins a document, or the one that ended the last.

    Raises:
        ConfigError: the prompt is empty, and there is no such token.
    """
    # Ours are trained without what a tokenizer puts around a text.
    ids: list[int] = tokenizer(prompt, add_special_tokens=model_type != "fomoe")["input_ids"]
    if ids:
        return ids
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ConfigError(
            "fomoe generate --prompt '': the tokenizer has no token that begins a text; give one letter"
        )
    return [start]


def visible(text: str) -> str:
    """What a terminal would obey is escaped: a model of bytes may write any."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


# ----- model and tokenizer


def from_checkpoint(saved: Saved) -> tuple[Any, Any]:
    """What an export would hold, without writing it, fp32.

    Raises:
        CheckpointError: the checkpoint's tensors are not those of its model, or the tokenizer has changed since.
        DataError: the tokenizer is not there.
    """
    transformers = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory() as folder:
        eos = write_tokenizer(Path(folder), saved)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    if not saved.judged.model.hf:
        ours = our_class()
        config = ours.FomoeConfig(**hf_config(saved, eos, torch.float32))
        # The checkpoint's tensors become the parameters; there is no second set.
        with torch.device("meta"):
            model = ours.FomoeForCausalLM(config)
        model.load_state_dict(whole_state(saved), assign=True)
    else:
        whole: Any = saved.judged.module(saved.judged.everything, "cpu")
        model = whole.stock
    # A stock configuration may name the end token of somebody else's tokenizer.
    model.generation_config.eos_token_id = eos
    return model, tokenizer


def our_class() -> Any:
    """The module that goes along with an export, as it is in this program."""
    return importlib.import_module(f"fomoe_flwr.model.{CODE.removesuffix('.py')}")


def is_exported(folder: Path, where: str) -> bool:
    """Whether it is a folder for transformers; else it is a run directory or a checkpoint.

    Raises:
        CheckpointError: it is none of them.
    """
    try:
        if (folder / "config.json").is_file():
            return True
        known = ("manifest.json", "checkpoints", "config.yaml")
        # `load` says what is wrong with the rest.
        if (
            folder.is_dir()
            and folder.name != "checkpoints"
            and not any((folder / name).exists() for name in known)
        ):
            raise CheckpointError(
                f"{where}: is no run directory or checkpoint, and no folder of a model either (no config.json)"
            )
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({reason(error)})") from error
    return False


def check_files(folder: Path, where: str) -> None:
    """What is to be held against transformers, which opens whatever is there, and whatever an index names.

    Raises:
        CheckpointError: something is neither file nor folder, or the index leads out of the folder.
    """
    for file in sorted(folder.iterdir()):
        if not (file.is_file() or file.is_dir()):
            raise CheckpointError(f"{where}: {file.name} is no regular file")
    if (folder / INDEX).exists():
        try:
            indexed(folder, where)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error


def from_folder(folder: Path, where: str) -> tuple[Any, Any]:
    """A folder as `fomoe export` writes it, or of an architecture that transformers has.

    Raises:
        CheckpointError: it is not whole, or brings code that is not ours.
    """
    transformers = importlib.import_module("transformers")
    try:
        content = parse_json_file(folder / "config.json")
        model_type = content.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: config.json is no configuration ({reason(error)})") from error
    check_files(folder, where)
    if "transformers_weights" in content:
        raise CheckpointError(f"{where}: transformers_weights of config.json is not followed; leave it out")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(f"{where}: has no tokenizer ({', '.join(_TOKENIZERS)})")
    loader, tokenizers = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    if model_type == "fomoe":
        ours = files("fomoe_flwr") / "model" / CODE
        code = folder / CODE
        if not code.is_file() or code.read_bytes() != ours.read_bytes():
            raise CheckpointError(
                f"{where}: its {CODE} is not the one of this version, and is not run; export the checkpoint again"
            )
        loader, tokenizers = our_class().FomoeForCausalLM, transformers.PreTrainedTokenizerFast
    elif not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{where}: model_type={model_type!s:.80} is none of transformers {transformers.__version__}; code "
            "that a folder brings is not run here: read it, then load it yourself with trust_remote_code=True"
        )
    try:
        # Never None: transformers would ask on the terminal.
        tokenizer = tokenizers.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # A tensor of another shape is named below.
        model, found = loader.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # nothing narrower is promised
        raise CheckpointError(f"{where}: transformers cannot load it: {error}") from error
    # transformers invents what is missing.
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found[problem]:
            first = min(map(str, found[problem]))
            raise CheckpointError(
                f"{where}: its weights are not those of its config.json: {problem.replace('_', ' ')}, as {first}"
            )
    return model, tokenizer


# ----- arguments


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments. They are checked before anything is read.

    Raises:
        ConfigError: an argument is wrong.
    """
    parser = Parser(
        prog="fomoe generate",
        description="Text by a model, printed as it is made; the prompt is not repeated.",
    )
    parser.add_argument(
        "model", metavar="CHECKPOINT|DIR",
        help="a run directory, its checkpoints folder, one checkpoint, or a folder of fomoe export or of transformers",
    )  # fmt: skip
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="what the text begins with; -: read from stdin; may be ''",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=at_least_1, default=MAX_TOKENS,
        help="it ends after N tokens, or earlier where the model ends the document; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", metavar="T", type=_temperature,
        help="draw each token, from chances sharpened by T < 1 or flattened by T > 1; default: the likeliest token",
    )  # fmt: skip
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=_share,
        help="draw among the likeliest tokens that have P of the chances together",
    )
    parser.add_argument(
        "--seed", metavar="S", type=_seed, help="the same text again; default: another each time"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: %(default)s")
    given = parser.parse_args(list(arguments))
    if given.temperature is None and given.top_p is not None:
        raise ConfigError("fomoe generate --top-p: needs --temperature; without it nothing is drawn")
    given.top_p = 1.0 if given.top_p is None else given.top_p
    return given


def read_prompt(text: str) -> str:
    """The prompt, from stdin where it is `-`, every byte of it.

    Raises:
        ConfigError: it is not UTF-8.
    """
    try:
        if text == "-":
            return sys.stdin.buffer.read().decode()
        # Of a command line, other bytes come as surrogates.
        text.encode()
    except UnicodeError as error:
        raise ConfigError("fomoe generate --prompt: is not UTF-8") from error
    return text


def _temperature(text: str) -> float:
    # Logits divided by much less are infinite.
    if not 0.001 <= (value := _number(text)) <= 1000:
        raise argparse.ArgumentTypeError(
            f"{text:.40}: needs a number from 0.001 to 1000; leave it out for the likeliest token"
        )
    return value


def _share(text: str) -> float:
    if not 0 < (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text:.40}: needs a number above 0, at most 1")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text:.40}: needs a whole number from 0 to 999999999999999999")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
