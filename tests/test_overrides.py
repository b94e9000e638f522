"""Override strings: read once, by Hydra's rules; what becomes text again reads the same."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.compose import compose, conf_dir
from fomoe_flwr.errors import LONGEST, ConfigError
from fomoe_flwr.overrides import (
    GROUPS,
    is_plain,
    known_keys,
    last_value,
    quoted,
    read_overrides,
    spelled,
    split_sweep,
    texts,
)

# What Hydra's grammar does not take as it stands, or takes for something else.
PATHS = [
    "/tmp/a=b/run", "/tmp/a,b/run", "/tmp/a(b)/run", "/tmp/a#b/run", "~/run", "/tmp/a~b", "/tmp/ü/run",
    "/tmp/it's", '/tmp/say "run"', "/tmp/{a}/run", "run(1)", "/tmp/[a",
]  # fmt: skip
READ_AS_THEY_ARE = ["/tmp/a b/run", "/tmp/$a/run", "/tmp/a-b_c.d/run", "/tmp/a+b%c@d"]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    (line,) = str(error.value).splitlines()
    return line


@settings(max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_quoted_text_reads_the_same(text: str) -> None:
    assert last_value(read_overrides([f"resume={quoted(text)}"]), "resume") == text


@pytest.mark.parametrize(
    "text", [*PATHS, *READ_AS_THEY_ARE, "/tmp/${x}", r"/tmp/\${x}", "/tmp/a\\", "null", "1_0"]
)
def test_what_is_spelled_for_a_shell_reads_the_same(text: str) -> None:
    (word,) = shlex.split(spelled("data.path", text))
    assert last_value(read_overrides([word]), "data.path") == text


def test_a_path_of_any_kind_is_composed() -> None:
    """Hydra and OmegaConf read it again."""
    path = "/tmp/a=b, (c)#~ü '$' ${x} \"q\"/run"
    composed = compose(
        ["data=text", f"resume={quoted(path)}", f"hydra.run.dir={quoted(path)}", f"data.path={quoted(path)}"]
    )
    assert (composed.config.resume, str(composed.run_dir), composed.config.data.path) == (path, path, path)
    assert compose(composed.overrides).config.data.path == path


@pytest.mark.parametrize("path", PATHS)
def test_what_hydra_cannot_read_is_said_with_a_spelling_that_it_can(path: str) -> None:
    line = refusal(f"resume={path}")
    assert line.startswith(f"resume={path}: ")
    (word,) = shlex.split(line[line.rindex("for the shell: ") :].removeprefix("for the shell: "))
    assert last_value(read_overrides([word]), "resume") == path


@pytest.mark.parametrize("word", ["foo", "", "-1", "=", "a b=c", "model proxy"])
def test_what_is_no_override_is_one_line_without_a_grammar(word: str) -> None:
    assert refusal(word) == f"{word!r}: not an override, which is KEY=VALUE"


def test_a_line_has_an_end() -> None:
    for word in ("x" * 10**4, f"resume={'a' * 10**4}=", f"seed={'9' * 10**4}", f"nope={'a' * 10**4}"):
        assert len(refusal(word)) < LONGEST + 10


def test_of_one_key_twice_the_last_counts_for_groups_too() -> None:
    composed = compose(
        ["seed=1", "model=tiny", "++seed=2", "model=proxy", "federation=a.yaml", "federation=labs"]
    )
    assert (composed.config.seed, composed.config.model.name, composed.config.federation.name) == (
        2,
        "proxy",
        "labs",
    )
    assert composed.overrides == ("seed=2", "model=proxy", "federation=labs")
    assert last_value(read_overrides(["resume=a", "resume=b"]), "resume") == "b"


def test_text_that_looks_like_a_number_stays_text() -> None:
    keys = ("data.config_name", "data.name", "data.split", "data.domain_key", "wandb.group", "wandb.project")
    written = ("2024_10", "1e5", "0x10", "1.50", "TRUE", "inf")
    composed = compose(
        ["data=huggingface", *(f"{key}={text}" for key, text in zip(keys, written, strict=True))]
    )
    data, wandb = composed.config.data, composed.config.wandb
    found = (data.config_name, data.name, data.split, data.domain_key, wandb.group, wandb.project)
    assert found == written
    assert compose(composed.overrides).config == composed.config


def test_text_within_a_list_and_a_sweep() -> None:
    sites = "federation.sites=[{name: 1_0 , speed: 2, domain: 2024_10},{name: b, domain: null}]"
    found = compose(["federation.num_sites=null", sites]).config.federation.sites
    assert [(site.name, site.speed, site.domain) for site in found] == [
        ("1_0", 2.0, "2024_10"),
        ("b", 1.0, None),
    ]
    for sweep in ("2024_10,2024_11", "choice(2024_10,2024_11)"):
        jobs = split_sweep([f"data.config_name={sweep}"])
        assert [last_value(read_overrides(job), "data.config_name") for job in jobs] == ["2024_10", "2024_11"]


def test_a_users_file_may_have_any_path(tmp_path: Path) -> None:
    file = tmp_path / "a=b, c" / "sites.yaml"
    file.parent.mkdir()
    file.write_text("num_sites: 2\n")
    assert len(compose([f"federation='{file}'"]).config.federation.sites) == 2


def test_a_directory_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    composed = compose(["hydra.run.dir='~/run'", "hydra.sweep.dir='~/sweep'"])
    assert (str(composed.run_dir), str(composed.sweep_dir)) == ("/home/me/run", "/home/me/sweep")


def test_what_is_saved_stands_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/a=b")
    composed = compose(
        [
            "data=text",
            "data.path=${oc.env:WHERE}/text",
            "++seed=3",
            "train.lr=${train.eps}",
            "wandb.group=null",
        ]
    )
    assert all(is_plain(override) for override in read_overrides(composed.overrides))
    monkeypatch.delenv("WHERE")
    assert compose(composed.overrides).config == composed.config
    assert composed.config.data.path == "/a=b/text"


def test_nothing_is_taken_out_or_moved() -> None:
    for word in ("~model", "~seed", "model@data=tiny"):
        assert refusal(word).startswith(f"{word}: a key can only be set")


NOT_PLAIN = [
    "hydra.launcher._target_=os.system", "hydra/sweeper=x", "hydra/launcher=x", "hydra.run.dir=/x",
    "hydra.searchpath=[file:///x]", "+x.y=1", "++seed=1", "nope=1", "model=../../x", "data=/x", "seed=1,2",
    "data.path=${oc.env:HOME}", "data.path='a${oc.env:HOME}'", r"data.path='\\${oc.env:HOME}'",
    "federation.sites=[{name: '${oc.env:HOME}'}]", "data._target_=x", "seed=range(1,3)",
]  # fmt: skip


@pytest.mark.parametrize("word", NOT_PLAIN)
def test_what_is_not_taken_from_a_file(word: str) -> None:
    (override,) = read_overrides([word])
    assert not is_plain(override)


@pytest.mark.parametrize(
    "word", ["model=tiny", "seed=1", "data.path='/a=b'", "data.path='\\${x}'", "federation.sites=[{name: a}]"]
)
def test_what_is_taken_from_a_file(word: str) -> None:
    (override,) = read_overrides([word])
    assert is_plain(override)
    assert texts(read_overrides(texts([override]))) == [word]


def test_a_sweep_of_what_has_no_end_or_no_value_is_one_line() -> None:
    for word in ("train.lr=interval(0.1,1)", "seed=range(1,1)", "seed=range(0.1,1,0)"):
        with pytest.raises(ConfigError, match=r"^\S+: "):
            split_sweep([word])


def test_the_groups_are_the_folders_of_conf() -> None:
    assert set(GROUPS) == {path.name for path in conf_dir().iterdir() if path.is_dir()}
    assert set(GROUPS) <= known_keys()
