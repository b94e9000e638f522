"""A federation in which no site holds the model trains a stock architecture, and anyone's tools load what comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fomoe_flwr.cli import main
from fomoe_flwr.data import prepare
from fomoe_flwr.eval_command import load
from fomoe_flwr.evaluation import text_of
from fomoe_flwr.model.spec import expert_of
from tests.conftest import SMALL_TRAIN
from tests.e2e.test_flower import train
from tests.strategies.helpers import metrics

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("runtime", ["local", pytest.param("flower", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", ["olmoe_tiny", "qwen3_moe_tiny"])
def test_trained_resumed_exported_and_loaded_by_transformers(
    model: str,
    runtime: str,
    corpus_dir: Path,
    cache_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    usual = [
        *SMALL_TRAIN, "data=text", f"data.path={corpus_dir}",
        f"data.cache_dir={cache_dir}", "wandb.mode=disabled", "federation.num_sites=2", "strategy.overlap=1",
        "checkpoint.keep=9", "train.lr=0.01", "train.warmup_steps=0",
        # One site a round: the experts of the other are not updated.
        "strategy.fraction_train=0.5", "strategy.min_train_nodes=1", "strategy.quorum=0",
    ]  # fmt: skip
    overrides = [f"model={model}", "model.hf.hidden_size=32", *usual]

    def go(*items: str) -> None:
        if runtime == "flower":
            done = train([*items], run_dir)
            assert done.returncode == 0, done.stderr
        else:
            main(["train", *items, "runtime=local", f"hydra.run.dir={run_dir}"])

    go(*overrides)
    go(f"resume={run_dir}", "train.rounds=4")
    lines = metrics(run_dir)
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
    placement = json.loads((run_dir / "checkpoints/round_00004/manifest.json").read_text())["placement"]
    layers = [1, 2, 3] if model == "qwen3_moe_tiny" else [0, 1, 2, 3]
    still, moved = 0, 0
    for number in (2, 3, 4):
        before, after = (
            load_file(run_dir / f"checkpoints/round_{round_:05d}/parameters.safetensors")
            for round_ in (number - 1, number)
        )
        asked = {site["site"] for site in lines[number]["sites"]}
        assert len(asked) == 1
        for name, value in after.items():
            expert = expert_of(name)
            if expert is None or any(expert[1] in placement[site][layers.index(expert[0])] for site in asked):
                moved += not value.equal(before[name])
            else:
                assert value.equal(before[name]), name
                still += 1
    assert still >= 3 * len(layers) * 8 * 3
    assert moved > still / 2

    capsys.readouterr()
    main(["eval", str(run_dir), "--json", "--draws", "1"])
    printed = json.loads(capsys.readouterr().out)["all_experts"]
    main(["export", str(run_dir), "--to", str(tmp_path / "out")])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__module__.startswith("transformers.models.")
    saved = load(str(run_dir), "the run")
    corpus = prepare(saved.data)
    text = text_of(corpus, corpus.val_documents, saved.train.seq_len, saved.train.batch_size, None)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for tokens_BT, _ in text.batches():
            logits_BTV = loaded(input_ids=tokens_BT[:, :-1]).logits
            total += float(
                F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="sum")
            )
            tokens += tokens_BT[:, 1:].numel()
    assert tokens == printed["tokens"]
    assert total / tokens == pytest.approx(printed["loss"], abs=1e-4)
    prompt_BS = torch.tensor([[72, 101, 108]])
    made = loaded.generate(prompt_BS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert made.shape == (1, 7)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("Hel") == [72, 101, 108]

    # The export goes on as a new run, of other sites, and is not needed once that has begun.
    if runtime == "local":
        again = tmp_path / "again"
        given = ["model=hf", f"model.path={tmp_path / 'out'}", *usual]
        given += [
            "federation.num_sites=3",
            "strategy.overlap=1",
            "strategy.routing=skip",
            "model.standins=8",
            "train.rounds=1",
        ]
        main(["train", *given, "runtime=local", f"hydra.run.dir={again}"])
        assert metrics(again)[0]["val_loss"] == pytest.approx(lines[-1]["val_loss"], abs=1e-6)
        shutil.rmtree(tmp_path / "out")
        main(["train", f"resume={again}", "train.rounds=2"])
        assert [line["round"] for line in metrics(again)] == [0, 1, 2]
        main(["export", str(again), "--to", str(tmp_path / "more")])
        assert "skip, stand-ins of rank 8" in (tmp_path / "more/README.md").read_text()
