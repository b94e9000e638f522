"""The console command: `fomoe train [overrides]`, `plan`, `bench`, `eval`, `import`, `export`, `generate`, `report` and
those of a deployment, `fomoe server`, `site`, `submit`.

Everything that can be refused is refused before Hydra starts a job, in one line.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from fomoe_flwr import __version__
from fomoe_flwr.compose import (
    Composed,
    compose,
    conf_dir,
    from_tree,
    register_schema,
)
from fomoe_flwr.console import print_whole, setup_logging
from fomoe_flwr.deploy.flower import past_the_proxy
from fomoe_flwr.errors import ConfigError, FomoeError
from fomoe_flwr.files import check_writable, expanded, is_machine_error, machine_error
from fomoe_flwr.keys import keys_table
from fomoe_flwr.overrides import (
    keys_of,
    last_value,
    merge_overrides,
    read_overrides,
    setting,
    split_sweep,
    task_overrides,
    texts,
)
from fomoe_flwr.report import report

USAGE = """usage: fomoe train [OVERRIDE ...]      one run, e.g. fomoe train model=tiny strategy.overlap=2
       fomoe train -m OVERRIDE ...    a run for each combination, e.g. strategy.overlap=1,2,4
       fomoe train --cfg job          show the configuration (Hydra's other flags work too)
       fomoe plan [OVERRIDE ...]      what a run would cost each site, and advice (--help: pictures, JSON)
       fomoe bench [OVERRIDE ...]     a site's training step alone: tokens/s, MFU, memory, where the time goes
       fomoe eval CHECKPOINT [OVERRIDE ...]   a checkpoint judged on any text (--help: reference, JSON)
       fomoe import OWNER/NAME|DIR --to DIR                a checkpoint of Hugging Face, looked through, for model.path
       fomoe export CHECKPOINT --to DIR [--dtype bf16]     a checkpoint as transformers loads it
       fomoe generate CHECKPOINT|DIR --prompt TEXT         text by a checkpoint or an export (--help: sampling)
       fomoe report DIR               tables and picture of a run, or the table of a sweep
       fomoe server [OPTION ...]      Flower's SuperLink, with flower-superlink's options
       fomoe site --superlink HOST:PORT --name NAME ...    a site of a federation (--help: its options)
       fomoe submit CONNECTION [OVERRIDE ...]              a run on the sites that are connected
       fomoe --version
TAB completes after  eval "$(fomoe train -sc install=bash)"  (or zsh=, fish=)"""
COMMANDS = (
    "train",
    "plan",
    "bench",
    "eval",
    "import",
    "export",
    "generate",
    "report",
    "server",
    "site",
    "submit",
)
KEYS_HELP = """Every key, with its default, what is allowed, and what it means. A file of conf/ may say otherwise: --cfg
job shows the values of a run. null is none, and a path is kept absolute."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 0: done; 1: the run failed; 2: the command cannot be right."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    setup_logging("hydra.verbose=true" in arguments)
    os.environ.update(past_the_proxy(os.environ))
    os.environ["MPLBACKEND"] = "agg"  # pictures are files; a backend that is not there would end their import
    try:
        match arguments:
            case ["train", *overrides]:
                train(overrides)
            case ["plan", *options]:
                from fomoe_flwr.plan.command import plan

                plan(options)
            case ["bench", *options]:
                from fomoe_flwr.bench_command import bench_command

                bench_command(options)
            case ["eval", *options]:
                from fomoe_flwr.eval_command import evaluate_command

                evaluate_command(options)
            case ["import", *options]:
                from fomoe_flwr.import_command import import_command

                import_command(options)
            case ["export", *options]:
                from fomoe_flwr.export import export_command

                export_command(options)
            case ["generate", *options]:
                from fomoe_flwr.generate import generate_command

                generate_command(options)
            case ["report", directory] if not directory.startswith("-"):
                if not directory.strip():
                    raise ConfigError("fomoe report: '' is empty; give the directory of a run or of a sweep")
                report(Path(directory), Console())
            case ["server", *options]:
                from fomoe_flwr.deploy.server import server

                server(options)
            case ["site", *options]:
                from fomoe_flwr.deploy.site import site

                sys.exit(site(options))
            case ["submit", *options]:
                from fomoe_flwr.deploy.submit import submit

                submit(options)
            case ["--version"]:
                print(f"fomoe-flwr {__version__}")
            case ["--help" | "-h"] | ["report" | "submit", "--help" | "-h"]:
                print(USAGE)
            case ["-sc" | "--shell-completion", request]:
                complete(request)
            case _:
                print(USAGE, file=sys.stderr)
                sys.exit(2)
    except FomoeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, UnicodeError, MemoryError, RuntimeError) as error:
        if not is_machine_error(error):
            raise
        print(f"error: {machine_error(error)}", file=sys.stderr)
        # A name too long for any is a wrong command.
        sys.exit(2 if getattr(error, "errno", None) == errno.ENAMETOOLONG else 1)
    except KeyboardInterrupt:
        hint = (
            "; resume=RUN_DIR goes on from the last checkpoint"
            if arguments[:1] in (["train"], ["submit"])
            else ""
        )
        print(f"interrupted{hint}", file=sys.stderr, flush=True)
        # Not sys.exit: it would wait for a thread of Flower's engine that may wait for a site that is gone.
        os._exit(130)


def train(arguments: Sequence[str]) -> None:
    """Check the configuration (each job's of a multirun), then let Hydra run it."""
    given = hydra_arguments(arguments)
    if given.shell_completion:
        complete(*given.overrides)
        return
    if given.help:
        print(USAGE, KEYS_HELP, sep="\n\n")
        print_whole(keys_table(), Console())
        return
    # PyTorch and Flower take seconds to import: not for --help, not for a plan.
    from fomoe_flwr.checkpoint import resumed_overrides
    from fomoe_flwr.report.tables import all_ok
    from fomoe_flwr.server.run import check_unused

    if importlib.util.find_spec("strategies") is None:
        raise ConfigError(
            "fomoe train: the Flower app (strategies/, clients/) is not in the wheel; run it from a clone that is "
            "installed by `pip install -e .`"
        )
    overrides = read_overrides(given.overrides)
    if given.config_dir is not None:
        # As an override our own checks know it, too.
        if not given.config_dir.strip():
            raise ConfigError("--config-dir is empty; give a directory, or leave it out")
        found = expanded(given.config_dir).absolute()
        if not found.is_dir():
            raise ConfigError(f"--config-dir {given.config_dir}: no such directory")
        overrides = merge_overrides([setting("hydra.searchpath", [f"file://{found}"])], overrides)
    runs = not (given.cfg or given.info or given.hydra_help)
    sweep_dir = None
    if given.multirun or last_value(overrides, "hydra.mode") == "MULTIRUN":
        if last_value(overrides, "resume") is not None:
            raise ConfigError("resume: one run is resumed at a time, without -m")
        if any(override.key_or_group == "hydra.sweep.subdir" for override in overrides):
            raise ConfigError(
                "hydra.sweep.subdir: the jobs of a sweep are 0/, 1/, … in hydra.sweep.dir, where its table looks for "
                "them; leave it out"
            )
        register_schema()
        loader = ConfigLoaderImpl(create_config_search_path(str(conf_dir())))
        jobs = [compose(job) for job in split_sweep(overrides, loader)]
        for job in jobs:
            check_job(job)
        if any(jobs[0].sweep_dir.glob("*/checkpoints")):
            raise ConfigError(f"hydra.sweep.dir={jobs[0].sweep_dir}: holds runs already; choose another")
        if runs:
            check_writable(jobs[0].sweep_dir)
        # Said to Hydra outright: its default holds the time, and the table at the end must find the folder.
        sweep_dir = jobs[0].sweep_dir
        overrides = merge_overrides(overrides, [setting("hydra.sweep.dir", str(sweep_dir))])
    else:
        overrides = resumed_overrides(overrides)
        composed = compose(overrides)
        if runs:
            if not composed.config.resume:
                check_unused(composed)
            check_job(composed)
            check_writable(composed.run_dir)
            # Its default holds the time, which goes on.
            overrides = merge_overrides(overrides, [setting("hydra.run.dir", str(composed.run_dir))])
    register_schema()
    _failed.clear()
    _asked[:] = keys_of(given.overrides)
    try:
        # Hydra itself wants its options together; one of them may take a word that follows.
        _hydra("fomoe train", *texts(overrides), *given.flags)
    finally:
        if sweep_dir is not None and any(sweep_dir.glob("*/config.yaml")):
            report(sweep_dir, Console())
    if sweep_dir is not None and (_failed or not all_ok(sweep_dir)):
        sys.exit(1)


def _hydra(*words: str) -> None:
    """Hydra's own command, with these words."""
    sys.argv = list(words)
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_job)()


def complete(request: str) -> None:
    """What may follow on a command line of ours (`COMP_LINE`), or the script that asks for it, by Hydra.

    Args:
        request: as Hydra has it, `install=bash` or `query=bash`.
    """
    program, _, words = os.environ.get("COMP_LINE", "").partition(" ")
    command, space, rest = words.lstrip().partition(" ")
    if request.startswith("query=") and not space:
        print(*(known for known in COMMANDS if known.startswith(command)), sep="\n")
        return
    # Hydra knows of programs only, not of their commands.
    os.environ["COMP_LINE"] = f"{program} {rest}"
    register_schema()
    _hydra("fomoe", request, "--shell-completion")


def hydra_arguments(arguments: Sequence[str]) -> Namespace:
    """What Hydra's own parser finds, its options at any place; `flags` are they as they were given.

    Raises:
        ConfigError: an option that is not there, or two that exclude each other.
    """

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"fomoe train: {message}")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    given = parser.parse_intermixed_args(list(arguments))
    for option in ("config_path", "config_name", "experimental_rerun"):
        if getattr(given, option) is not None:
            refuse(
                f"--{option.replace('_', '-')}: the configuration is the program's own, with --config-dir beside it"
            )
    commands = {
        "--run": given.run, "--multirun": given.multirun, "--cfg": given.cfg, "--info": given.info,
        "--shell-completion": given.shell_completion,
    }  # fmt: skip
    if len(asked := [name for name, value in commands.items() if value]) > 1:
        refuse(f"only one of {' and '.join(asked)} can be asked for")
    if given.resolve and not given.cfg:
        refuse("--resolve: needs --cfg")
    rest = list(given.overrides)
    given.flags = []
    for word in arguments:
        if rest and word == rest[0]:
            rest.pop(0)
        else:
            given.flags.append(word)
    return given


def check_job(composed: Composed) -> None:
    """What can be known to fail on this machine before a site is started.

    Raises:
        FomoeError: missing data, a tokenizer that does not fit, a GPU that is not there.
    """
    from fomoe_flwr.engine.device import gpus_of_a_site, resolve_device
    from fomoe_flwr.server.run import open_validation

    config = composed.config
    resolve_device(config.train.device)
    if config.runtime.name == "flower":
        gpus_of_a_site(config)
    for site in config.federation.sites:
        if site.device is not None:
            resolve_device(site.device, f"federation.sites: device of {site.name}")
        # Simulated sites have no operators who could give it.
        if site.data_path is None and config.data.partition == "own":
            raise ConfigError(f"data.partition=own: site {site.name} has no data_path in the federation file")
        if site.data_path is not None and not expanded(site.data_path).exists():
            raise ConfigError(
                f"federation.sites: data_path={site.data_path} of site {site.name}: no such file or folder"
            )
    open_validation(config, whole=True)


_failed: list[Path] = []  # jobs of this process
_asked: list[str] = []  # keys that its command gave


def _job(tree: DictConfig) -> None:
    launch = importlib.import_module("strategies.launch").launch

    hydra_config = HydraConfig.get()
    # A path counts from where the command was given, also with hydra.job.chdir=true.
    with contextlib.chdir(hydra_config.runtime.cwd):
        composed = Composed(
            from_tree(tree, given=keys_of(hydra_config.overrides.task)),
            run_dir=Path(hydra_config.runtime.output_dir).absolute(),
            sweep_dir=Path(hydra_config.sweep.dir).absolute(),
            asked=frozenset(_asked),
            overrides=task_overrides(hydra_config.overrides.task, tree),
        )
    try:
        launch(composed)
    except (FomoeError, OSError, UnicodeError, MemoryError, RuntimeError) as error:
        if not isinstance(error, FomoeError) and not is_machine_error(error):
            raise
        print(f"error: {error if isinstance(error, FomoeError) else machine_error(error)}", file=sys.stderr)
        _failed.append(composed.run_dir)
        # The other jobs of a sweep go on.
        if hydra_config.mode != RunMode.MULTIRUN:
            sys.exit(1)


if __name__ == "__main__":
    main()
