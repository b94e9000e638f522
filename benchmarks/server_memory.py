"""Memory of a server that carries a model of more than 2 GB in bf16. `python -m benchmarks.server_memory`

OLMoE-1B-7B's shapes, cut in layers: a σ-MoE of four layers for all that a server does, and OLMoE itself with two for
the import. Two sites with half of the experts each have answered with random numbers in bf16, which lie in the inbox as
they would. Each step is taken in a process of its own, with `checkpoint.state` memory and files, and both must write
the same bits. Needs about 35 GB of disk and 14 GB of memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import write_result
from fomoe_flwr import wire
from fomoe_flwr.checkpoint import checkpoint_path, read_checkpoint, save_checkpoint
from fomoe_flwr.codecs import CASTS
from fomoe_flwr.compose import compose
from fomoe_flwr.config import RunConfig
from fomoe_flwr.eval_command import load
from fomoe_flwr.export import export
from fomoe_flwr.hf_files import on_disk
from fomoe_flwr.model.spec import expert_of, parameter_counts, parameter_shapes
from fomoe_flwr.placement import full_residents
from fomoe_flwr.server.outer import Contribution, commit
from fomoe_flwr.server.replies import Inbox
from fomoe_flwr.server.rounds import Server
from fomoe_flwr.server.run import first_state
from fomoe_flwr.units import count, in_bytes

KIB, GB = 1024, 1e9
SIGMA = (
    "model=tiny", "model.d_model=2048", "model.num_heads=16", "model.num_layers=4", "model.num_experts=64",
    "model.top_k=8", "model.d_expert=1024", "model.vocab_size=50304",
)  # fmt: skip
SITES = ("federation.num_sites=2", "strategy.overlap=1", "train.eval_batches=0", "data.tokenizer=bytes")
# config.json of allenai/OLMoE-1B-7B-0125, but for the number of layers.
OLMOE = {
    "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "vocab_size": 50304, "max_position_embeddings": 4096, "norm_topk_prob": False, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "hidden_act": "silu",
}  # fmt: skip
STEPS = {
    "draw": "drawing the initial state",
    "import": "importing OLMoE (bf16 on disk)",
    "send": "encoding a round's messages",
    "commit": "one commit, nesterov",
    "checkpoint": "writing a checkpoint",
    "resume": "verifying and loading it",
    "export": "export to bf16",
}


def config_of(folder: Path, state: str, *model: str) -> RunConfig:
    return compose([*model, *SITES, f"checkpoint.state={state}", f"hydra.run.dir={folder}"]).config


def server_of(folder: Path, config: RunConfig) -> Server:
    folder.mkdir(exist_ok=True)
    return Server(config, "run", str(folder), folder / "inbox")


def resumed(folder: Path, config: RunConfig, round_: int) -> Server:
    """As `fomoe train resume=` does."""
    server, checkpoint = server_of(folder, config), read_checkpoint(checkpoint_path(folder, round_))
    server.load(checkpoint.parameters, checkpoint.outer, round_)
    return server


def save(folder: Path, server: Server, config: RunConfig, round_: int) -> dict[str, str]:
    """Digests of the checkpoint's files."""
    sections: dict[str, Any] = {"strategy": {"routing": config.strategy.routing}, "train": {}, "data": {}}
    facts = {"config": {**sections, "model": vars(config.model)}, "placement": {}}
    outer = server.state.outer.state_tensors()
    path = save_checkpoint(folder, round_, server.state.tensors, outer, facts, keep=1)
    digests: dict[str, str] = read_checkpoint(path).manifest["sha256"]
    return {name: digest for name, digest in digests.items() if name != "manifest.json"}


# ----- what the sites answered, and a checkpoint to import


def answers(folder: Path) -> None:
    """Two replies of random numbers: the dense part, and the even or the odd experts."""
    config = config_of(folder, "memory", *SIGMA)
    model = config.model
    shapes = parameter_shapes(model, full_residents(model.num_layers, model.num_experts), "skip")
    inbox = Inbox(folder / "inbox", CASTS["bf16"])
    inbox.begin(1)
    for site in range(2):
        generator = torch.Generator().manual_seed(site)
        named = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 1e-3, generator=generator)
            for name, shape in shapes.items()
            if (expert := expert_of(name)) is None or expert[1] % 2 == site
        }
        blobs, _ = wire.encode_update(named, CASTS["bf16"], {})
        inbox.put(site, "{}", blobs)


def contributions(config: RunConfig) -> dict[int, Contribution]:
    model = config.model
    shape = (model.num_layers, model.num_experts)
    tokens, steps = 1000, config.train.local_steps
    held = [np.broadcast_to(np.arange(model.num_experts) % 2 == site, shape) for site in range(2)]
    names = parameter_shapes(model, full_residents(*shape), "skip")
    return {
        site: Contribution(tokens, steps, np.ones(shape, np.int64), held[site], dict.fromkeys(names, 1.0))
        for site in range(2)
    }


def olmoe(folder: Path) -> None:
    """A checkpoint as it is on Hugging Face, in one file, of random numbers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OLMOE))
    model = compose(["model=hf", f"model.path={folder}"]).config.model
    shapes = parameter_shapes(model, full_residents(model.num_layers, model.num_experts), "skip")
    blank = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    tensors = {name: make(blank) for name, make in on_disk(model).items()}

    def drawn(name: str) -> Tensor:
        return torch.empty(tensors[name].shape, dtype=torch.bfloat16).normal_(0.0, 0.02)

    wire.write_tensors(folder / "model.safetensors", tensors, read=drawn)


# ----- a step, in a process of its own


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return KIB * next(int(line.split()[1]) for line in lines if line.startswith(field))


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Peaks within: VmHWM is the system's own figure, the other two are looked at every few milliseconds."""
    figures: dict[str, float] = {"anon": 0, "file": 0, "before": status("VmRSS")}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            figures["anon"] = max(figures["anon"], status("RssAnon"))
            figures["file"] = max(figures["file"], status("RssFile"))

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    thread, started = threading.Thread(target=look), time.perf_counter()
    thread.start()
    yield figures
    figures["seconds"] = time.perf_counter() - started
    figures["peak"] = status("VmHWM")
    done.set()
    thread.join()


def step(name: str, state: str, root: Path) -> None:
    """Take one step and print its figures; what it needs beforehand is not in them."""
    folder, written = root / state, dict[str, str]()
    config = config_of(folder, state, *SIGMA)
    if name == "draw":
        with watched() as figures:
            server = server_of(folder, config)
            server.load(first_state(config))
        save(folder, server, config, 1)
    elif name == "import":
        config = config_of(folder, state, "model=hf", f"model.path={root / 'olmoe'}")
        with watched() as figures:
            server_of(folder, config).load(first_state(config))
    elif name == "send":
        server = resumed(folder, config, 1)
        sites = server.begin(2, range(2), 60.0)
        with watched() as figures:
            sent = server.outgoing(sites, training=True)
        del sent
    elif name == "commit":
        server, inbox = resumed(folder, config, 1), Inbox(root / "inbox", CASTS["bf16"])
        inbox.begin(1)
        experts = {(layer, expert) for layer in range(config.model.num_layers) for expert in range(64)}
        with watched() as figures:
            commit(1, server.state.outer, inbox, config, contributions(config), experts, {})
        written = save(folder, server, config, 2)
    elif name == "checkpoint":
        server = resumed(folder, config, 2)
        with watched() as figures:
            written = save(folder / "again", server, config, 2)
        shutil.rmtree(folder / "again")
    elif name == "resume":
        with watched() as figures:
            resumed(folder, config, 2)
    else:
        with watched() as figures:
            export(load(str(folder), "export"), folder / "export", torch.bfloat16)
        for file in sorted((folder / "export").glob("*.safetensors*")):
            with file.open("rb") as opened:
                written[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    print(json.dumps(figures | {"written": written}))


def in_a_process(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.server_memory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    torch.set_num_threads(2)
    makers: dict[str, Callable[[Path], None]] = {"answers": answers, "olmoe": olmoe}
    if len(sys.argv) == 3:
        makers[sys.argv[1]](Path(sys.argv[2]))
        return
    if len(sys.argv) == 4:
        step(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="fomoe-memory-") as name:
        root = Path(name)
        in_a_process("answers", str(root))
        in_a_process("olmoe", str(root / "olmoe"))
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for state in ("memory", "files"):
            for own in STEPS:
                found[own, state] = json.loads(in_a_process(own, state, str(root)).splitlines()[-1])
                print(own, state, found[own, state], file=sys.stderr, flush=True)
            shutil.rmtree(root / state)
        config, stock = (
            config_of(root, "files", *SIGMA),
            compose(["model=hf", f"model.path={root / 'olmoe'}"]),
        )
    for own, meaning in STEPS.items():
        cells = [meaning]
        for state in ("memory", "files"):
            figures = found[own, state]
            cells += [f"{figures[key] / GB:.2f}" for key in ("peak", "anon", "file")]
            cells.append(f"{figures['seconds']:.0f}")
        rows.append(f"| {' | '.join(cells)} |")
        assert found[own, "memory"]["written"] == found[own, "files"]["written"], own
    total, imported = (parameter_counts(each.model).total for each in (config, stock.config))
    most = max(
        figures["peak"] for (own, state), figures in found.items() if state == "files" and own != "send"
    )
    write_result(
        "server_memory",
        f"A server with a model of {count(total)} parameters, in memory and in mapped files",
        "σ-MoE with OLMoE-1B-7B's d_model 2048, 64 experts of 1024, top 8, vocabulary 50304, cut to four layers: "
        f"{count(total)} parameters, {in_bytes(2 * total)} in bf16, {in_bytes(4 * total)} in fp32, as much again for "
        f"Nesterov's momentum. Import: OLMoE with two layers, {count(imported)} parameters, {in_bytes(2 * imported)} "
        "in bf16. Two sites with half of the experts each. Each step in a process of its own, Python and PyTorch "
        f"({found['draw', 'files']['before'] / GB:.2f} GB) included; GB (10^9). Peak is VmHWM, begun anew before the "
        "step; anonymous memory and pages of files are the highest RssAnon and RssFile seen in looks 5 ms apart, which "
        "need not be of one moment. Seconds are of one run, with files in the system's cache as it happened.\n\n"
        "| step | memory: peak | anonymous | of files | s | files: peak | anonymous | of files | s |\n"
        "|---|---|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"Highest peak with files, without the messages: {most / GB:.2f} GB. Checkpoint and export of both have the "
        "same SHA-256. The messages of a round (the whole model once, in the wire's dtype) are in memory with both.",
        "a whole run (its messages in Flower's hands, replies while they are checked), a machine whose memory is "
        "really that small (file pages that are given back stay in the system's cache here), other outer "
        "optimizers, all sixteen layers.",
    )


if __name__ == "__main__":
    main()
