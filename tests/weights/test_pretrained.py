"""Initializations that come with the package, warm starts, encoders of other libraries, and model cards."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import in_process_driver
import numpy as np
import pytest
import torch
import yaml
from initialization_files import written
from safetensors.torch import save_file
from toy_data_sets import write_part

import leap_dist
from leap_dist.config import pretrained
from leap_dist.config.loading import ConfigError, resolve
from leap_dist.evaluation import initializations
from leap_dist.storage.atomic import unpack
from leap_dist.weights import hub
from leap_dist.weights.export import export
from leap_dist.weights.warm_start import initial_vector

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two initializations, `leap-atari` and `leap-pong`. Returns the file of the first."""
    root = tmp_path / "pretrained"
    written(tmp_path / "run")
    hub.save_pretrained(tmp_path / "run", root / "leap-atari", summary="A toy.")
    hub.save_pretrained(written(tmp_path / "other", "rgb1"), root / "leap-pong", license="mit")
    monkeypatch.setattr(pretrained, "ROOT", root)
    return tmp_path / "run" / "init.safetensors"


def test_the_package_tells_what_comes_with_it_and_each_has_all_that_belongs_to_it():
    for one in pretrained.available():
        assert one.path == pretrained.path_of(f"pretrained:{one.name}")
        assert {"README.md", "LICENSE"} <= {path.name for path in one.folder.iterdir()}
        assert leap_dist.read_initialization(f"pretrained:{one.name}").metadata["version"] > 0
        card = (one.folder / "README.md").read_text()
        assert one.summary in card
        assert one.test_steps is not None
        assert f"trained from this initialization for {one.test_steps:,} " in card


def test_names_are_taken_wherever_an_initialization_is_asked_for(shipped, tmp_path):
    images = torch.rand(2, 4, 84, 84)
    expected = leap_dist.load_encoder(shipped)(images)
    assert torch.equal(leap_dist.load_encoder("pretrained:leap-atari")(images), expected)
    assert torch.equal(leap_dist.from_pretrained("pretrained:leap-atari").encoder()(images), expected)
    labels, files = initializations.read(["pretrained:leap-atari", "own=pretrained:leap-atari", "scratch"])
    assert labels == ["leap-atari", "own", "scratch"]
    settings = initializations.settings(files, {}, None)
    assert settings["agent.envs"] == 4, "those of the run that made it, from its config.yaml"
    config = initializations.resolve({"games": "pong"}, {}, settings)
    arms = initializations.arms(labels, files, config)
    assert [arm.source for arm in arms] == ["pretrained:leap-atari", "pretrained:leap-atari", "scratch"]
    vectors = initializations.vectors(arms)
    assert np.array_equal(vectors["own"], initial_vector(resolve("smoke", {"init": "pretrained:leap-atari"})))
    assert "README.md" in export(Path("pretrained:leap-atari"), "torch", tmp_path / "exported")


@pytest.mark.parametrize(
    "ask",
    [
        leap_dist.load_encoder,
        leap_dist.from_pretrained,
        lambda name: initializations.read([name]),
        lambda name: initial_vector(resolve("smoke", {"init": name})),
        lambda name: export(Path(name), "torch", Path("nowhere")),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(shipped, ask):
    with pytest.raises(ConfigError, match=r"^init: no pretrained 'leap-atrai'; did you mean leap-atari\?$"):
        ask("pretrained:leap-atrai")
    with pytest.raises(ConfigError, match=r"no pretrained 'x'; there are leap-atari, leap-pong$"):
        ask("pretrained:x")


def test_without_any_the_answer_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "ROOT", tmp_path)
    with pytest.raises(ConfigError, match=r"no pretrained 'leap'; no initialization comes with this version$"):
        leap_dist.load_encoder("pretrained:leap")


def test_changed_weights_and_damaged_manifests_are_refused(shipped):
    folder = pretrained.ROOT / "leap-atari"
    (folder / "init.safetensors").write_bytes((pretrained.ROOT / "leap-pong" / "init.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="are not those of the release; install the package again"):
        leap_dist.load_encoder("pretrained:leap-atari")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest.json is damaged"):
        list(pretrained.available())


# --- warm start ----------------------------------------------------------------------------------------------------


def test_a_run_starts_from_another_one_s_initialization_and_says_so(tmp_path, monkeypatch):
    in_process_driver.install(monkeypatch)
    write_part(tmp_path / "data", "mnist")
    settings: dict[str, Any] = {
        "preset": "smoke", "tasks": "multi-cv", "games": ("mnist",), "data_dir": str(tmp_path / "data"),
        "task_steps": 64, "meta_updates": 1, "worker.device": "cpu", "worker.precision": "float32",
    }  # fmt: skip
    first = leap_dist.train(settings, run_dir=tmp_path / "first", progress=False)
    start = tmp_path / "first" / "init.safetensors"

    class Stop(leap_dist.Callback):
        def on_report(self, run: leap_dist.LiveRun) -> None:
            run.stop()

    again = {**settings, "init": str(tmp_path / "first"), "seed": 7, "meta_updates": 2}
    second = leap_dist.train(again, run_dir=tmp_path / "second", callbacks=[Stop()], progress=False)
    begun, _ = unpack((tmp_path / "second/checkpoints/000000/init.safetensors").read_bytes(), "init.safetensors")
    assert all(np.array_equal(begun[name], wanted) for name, wanted in first.initialization.tensors.items())
    session = json.loads((tmp_path / "second" / "manifest.json").read_text())["sessions"][0]
    assert session["init"] == {"source": str(tmp_path / "first"), "sha256": first.initialization.sha256}
    assert yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())["init"] == str(tmp_path / "first")

    start.unlink()  # a run that has begun does not need it any more
    resumed = leap_dist.train(run_dir=second.path, resume=True, progress=False)
    assert resumed.outcome == "done"
    assert resumed.config.init == str(tmp_path / "first")
    with pytest.raises(ConfigError, match="these settings cannot change during a run: init"):
        leap_dist.train({"init": ""}, run_dir=second.path, resume=True)


def test_the_vector_is_that_of_the_file_and_a_file_that_does_not_fit_is_refused(shipped, tmp_path):
    found = leap_dist.read_initialization(shipped)
    config = resolve("smoke", {"init": str(shipped)})
    assert np.array_equal(initial_vector(config), found.vector(found.manifest))
    assert initial_vector(resolve("smoke")) is None
    with pytest.raises(ConfigError, match=r"does not fit this run's network: .*conv1.weight: \(16, 4, 8, 8\) instead"):
        initial_vector(resolve("smoke", {"init": str(shipped), "atari.frames": "rgb1"}))
    with pytest.raises(ConfigError, match=r"init: nowhere cannot be read \(No such file"):
        initial_vector(resolve("smoke", {"init": "nowhere"}))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ConfigError, match="text is"):
        initial_vector(resolve("smoke", {"init": str(tmp_path / "text")}))


# --- other libraries -----------------------------------------------------------------------------------------------


def layers(names: tuple[str, str, str], encoder: Any) -> dict[str, torch.Tensor]:
    own = encoder.state_dict()
    return {
        f"{name}.{kind}": own[f"{layer}.{kind}"].contiguous()
        for name, layer in zip(names, ("conv1", "conv2", "linear"), strict=True)
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    "names",
    [
        ("features_extractor.conv1", "features_extractor.conv2", "features_extractor.linear"),
        ("policy.features_extractor.cnn.0", "policy.features_extractor.cnn.2", "policy.features_extractor.linear.0"),
        ("network.0", "network.2", "network.5"),
        ("conv1", "conv2", "linear"),
    ],
)
def test_encoders_of_other_libraries_are_arms(shipped, tmp_path, names):
    encoder = leap_dist.load_encoder(shipped)
    heads = {"actor.weight": torch.zeros(4, 256), "action_net.bias": torch.zeros(4)}
    save_file({**layers(names, encoder), **heads}, tmp_path / "agent.safetensors")
    images = torch.rand(2, 4, 84, 84)
    assert torch.equal(leap_dist.load_encoder(tmp_path / "agent.safetensors")(images), encoder(images))
    labels, files = initializations.read([str(tmp_path / "agent.safetensors"), "scratch"])
    config = initializations.resolve({"games": "pong"}, {}, initializations.settings(files, {}, None))
    assert config.atari.frames == "gray4"
    arms = initializations.arms(labels, files, config)
    assert np.array_equal(
        initializations.vectors(arms)["agent"], leap_dist.read_initialization(shipped).vector(files[0].content.manifest)
    )


def test_other_networks_are_refused_with_their_shapes(tmp_path):
    nature = {
        "features_extractor.cnn.0": (32, 4, 8, 8), "features_extractor.cnn.2": (64, 32, 4, 4),
        "features_extractor.cnn.4": (64, 64, 3, 3), "features_extractor.linear.0": (512, 3136),
    }  # fmt: skip
    tensors = {f"{name}.weight": torch.zeros(shape) for name, shape in nature.items()}
    tensors |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in nature.items()}
    save_file(tensors, tmp_path / "nature.safetensors")
    with pytest.raises(leap_dist.CorruptFile, match=r"is \(32, 4, 8, 8\), not \(16, 'C', 8, 8\): only the paper's"):
        leap_dist.load_encoder(tmp_path / "nature.safetensors")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(leap_dist.CorruptFile, match=r"no encoder of .* is among its tensors \(weight\)"):
        leap_dist.load_encoder(tmp_path / "other.safetensors")


# --- cards and the Hub ---------------------------------------------------------------------------------------------

RESULTS = {
    "arms": ["leap", "scratch"],
    "cells": {
        "breakout": {"leap": {"seeds": [0, 1, 2], "final": {"point": 12.5, "low": 11.0, "high": 14.0}}},
        "pong": {"leap": {"seeds": [0], "final": {"point": -20.0, "low": -21.0, "high": -19.0}}},
    },
}


def front(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    found: dict[str, Any] = yaml.safe_load(match[1])
    return found


def test_a_folder_has_weights_card_license_and_settings(shipped, tmp_path):
    folder = leap_dist.save_pretrained(shipped, tmp_path / "model", results=RESULTS, summary="A toy.")
    assert {path.name for path in folder.iterdir()} == {
        "init.safetensors", "README.md", "manifest.json", "LICENSE", "config.yaml"
    }  # fmt: skip
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    shown, whole = (yaml.safe_load((place / "config.yaml").read_text()) for place in (folder, shipped.parent))
    assert whole.keys() - shown.keys() == {"data_dir", "address", "init"}, "nobody else needs to know these"
    assert shown.items() <= whole.items()
    about = front((folder / "README.md").read_text())
    assert about["license"] == "apache-2.0"
    assert about["model-index"][0]["results"][0]["dataset"] == {"name": "breakout", "type": "atari"}
    assert about["model-index"][0]["results"][0]["metrics"][0]["value"] == 12.5
    names = [one["metrics"][0]["name"] for one in about["model-index"][0]["results"]]
    assert names == ["return, 3 seeds", "return, 1 seed"]
    assert "&id" not in (folder / "README.md").read_text(), "aliases of YAML are hard to read"
    again = leap_dist.from_pretrained(folder)
    assert again.metadata == leap_dist.read_initialization(shipped).metadata
    assert all(np.array_equal(again.tensors[name], found) for name, found in
               leap_dist.read_initialization(shipped).tensors.items())  # fmt: skip
    with pytest.raises(ConfigError, match="is not empty"):
        leap_dist.save_pretrained(again, folder)


def errors(**of_arms: float) -> dict[str, Any]:
    return {
        arm: {"runs": 1, "intervals": {"test_error": {"point": error, "low": error, "high": error}}}
        for arm, error in of_arms.items()
    }


def test_the_card_of_a_network_counts_examples_and_has_the_baseline_and_the_length_of_the_test(tmp_path):
    results = {
        "arms": ["leap", "none"],
        "baseline": "none",
        "described": [{"label": "leap", "source": "runs/leap"}, {"label": "none", "source": "scratch"}],
        "budgets": {"greek": 10_000, "latin": 10_000},
        "games": {"greek": errors(leap=0.1, none=0.3), "latin": errors(leap=0.2, none=0.5)},
    }
    folder = leap_dist.save_pretrained("pretrained:leap-omniglot", tmp_path / "model", results=results, arm="leap")
    card = (folder / "README.md").read_text()
    for line in (
        "| examples per task | 2,000 |",
        "| examples in all | 1,600,000 |",
        "Fresh networks, trained from this initialization for 10,000 examples each, beside random networks trained for "
        "as long:",
        "| | metric | this initialization | random networks |",
        "| greek | test error, 1 seed | 0.1 | 0.3 |",
        "| latin | test error, 1 seed | 0.2 | 0.5 |",
        "| **mean** | test error, 1 seed | 0.15 | 0.4 |",
    ):
        assert line in card.splitlines(), line
    assert not re.search("agent|steps", card.partition("# model")[2])
    assert [one["dataset"]["name"] for one in front(card)["model-index"][0]["results"]] == ["greek", "latin"]
    assert json.loads((folder / "manifest.json").read_text())["test_steps"] == 10_000


def test_the_card_of_an_encoder_has_the_baseline_and_the_length_of_the_test(shipped, tmp_path):
    theirs = {"seeds": [0, 1, 2], "final": {"point": 1234.5, "low": 1200.0, "high": 1300.0}}
    results = {**RESULTS, "baseline": "scratch", "budgets": {"breakout": 500_000, "pong": 500_000}, "described": []}
    results["cells"] = {"breakout": {**RESULTS["cells"]["breakout"], "scratch": theirs}}
    folder = leap_dist.save_pretrained(shipped, tmp_path / "model", results=results)
    card = (folder / "README.md").read_text()
    assert "Fresh agents, trained from this initialization for 500,000 agent steps each, beside random encoders" in card
    assert "| breakout | return, 3 seeds | 12.5 | 1,234 |" in card.splitlines()
    assert "| agent steps per task | 400 |" in card.splitlines()


@pytest.mark.parametrize(
    ("given", "preset", "expected"),
    [
        ({}, None, 10_000),
        ({"task_steps": 4000}, None, 4000),
        ({}, "quick", resolve("quick", {"tasks": "omniglot"}).task_steps),
    ],
)
def test_weights_of_the_package_are_tested_for_as_long_as_in_their_card(given, preset, expected):
    labels, files = initializations.read(["pretrained:leap-omniglot", "pretrained:finetune-multi-omniglot", "scratch"])
    asked = {"tasks": "omniglot", **given}
    config = initializations.resolve(asked, {}, initializations.settings(files, asked, preset))
    assert config.task_steps == expected
    assert [arm.label for arm in initializations.arms(labels, files, config)] == labels


@pytest.mark.parametrize("kind", ["foreign", "another run", "a list", "secret"])
def test_only_the_settings_of_the_run_itself_are_published(shipped, tmp_path, kind):
    """What lies beside a copied file may be anybody's, and a URL may hold a password."""
    place = tmp_path / "copy"
    shutil.copytree(shipped.parent, place)
    whole = yaml.safe_load((place / "config.yaml").read_text())
    content = {
        "foreign": {"wandb": {"api_key": "hunter2"}, "database": "postgres://me:hunter2@host/db"},
        "another run": {**whole, "games": ["breakout", "qbert"], "data_dir": "hunter2"},
        "a list": ["hunter2"],
        "secret": {**whole, "telemetry": {**whole["telemetry"], "project": "https://me:hunter2@host/x"}},
    }[kind]
    (place / "config.yaml").write_text(yaml.safe_dump(content))
    folder = leap_dist.save_pretrained(place / "init.safetensors", tmp_path / "model")
    assert (folder / "config.yaml").exists() == (kind == "secret")
    assert not any(b"hunter2" in path.read_bytes() for path in folder.iterdir())


def test_what_early_stopping_has_chosen_is_what_a_run_directory_means(shipped, tmp_path):
    run_dir = shipped.parent
    chosen = written(tmp_path / "chosen", task_steps=800)  # its metadata, and so its checksum, differ
    best = leap_dist.read_initialization(chosen)
    assert best.sha256 != leap_dist.read_initialization(shipped).sha256
    shutil.copy(chosen, run_dir / "best.safetensors")
    _, (evaluated,) = initializations.read([str(run_dir)])
    folder = leap_dist.save_pretrained(run_dir, tmp_path / "model")
    for found in (evaluated.content, leap_dist.read_initialization(folder / "init.safetensors"),
                  leap_dist.read_initialization(run_dir), leap_dist.from_pretrained(run_dir)):  # fmt: skip
        assert found.sha256 == best.sha256


@pytest.mark.parametrize("kind", ["returns", "errors"])
def test_metrics_of_other_weights_are_not_published(shipped, tmp_path, kind):
    arm = {"label": "leap", "source": "runs/other/init.safetensors", "sha256": "0" * 64}
    results = {**(RESULTS if kind == "returns" else {"arms": ["leap"]}), "described": [arm]}
    own = leap_dist.read_initialization(shipped).sha256
    with pytest.raises(ConfigError) as caught:
        leap_dist.save_pretrained(shipped, tmp_path / "model", results=results)
    assert str(caught.value) == (
        "results: leap started from runs/other/init.safetensors with SHA-256 000000000000, not from these weights "
        f"({own[:12]}); evaluate these, or publish those"
    )
    assert not (tmp_path / "model").exists()
    leap_dist.save_pretrained(shipped, tmp_path / "model", results={**results, "described": [{**arm, "sha256": own}]})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"license": "Apache 2.0"}, "license: 'Apache 2.0' is not an identifier; did you mean apache-2.0?"),
        ({"results": "nowhere.json"}, "results: nowhere.json cannot be read"),
        ({"results": RESULTS, "arm": "other"}, "results: no arm 'other'; there are leap, scratch"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(shipped, tmp_path, more, message):
    with pytest.raises(ConfigError) as caught:
        leap_dist.save_pretrained(shipped, tmp_path / "model", **more)
    assert message in str(caught.value)
    assert not (tmp_path / "model").exists()


class Hub:
    """What the functions use of huggingface_hub, as a folder on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.errors = self

    HfHubHTTPError = RuntimeError

    def create_repo(self, repo_id: str, *, private: bool, token: str | None, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: Path, token: str | None) -> str:
        for path in Path(folder_path).iterdir():
            (self.root / repo_id / path.name).write_bytes(path.read_bytes())
        return f"https://huggingface.co/{repo_id}/commit/1"

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None, token: str | None) -> str:
        if not (self.root / repo_id).exists():
            raise self.HfHubHTTPError("404 Client Error.\n\nRepository Not Found")
        return str(self.root / repo_id / filename)


def test_up_and_down(shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_hub", lambda: Hub(tmp_path / "hub"))
    address = leap_dist.push_to_hub(shipped, "me/leap-toy", license="mit", results=RESULTS)
    assert address == "https://huggingface.co/me/leap-toy/commit/1"
    card = (tmp_path / "hub" / "me/leap-toy" / "README.md").read_text()
    assert front(card)["model-index"][0]["name"] == "leap-toy"
    assert 'leap_dist.from_pretrained("me/leap-toy")' in card
    found = leap_dist.from_pretrained("me/leap-toy")
    assert np.array_equal(found.vector(found.manifest), initial_vector(resolve("smoke", {"init": str(shipped)})))
    with pytest.raises(ConfigError, match="me/other is neither a folder nor a repository that can be read: 404 Client"):
        leap_dist.from_pretrained("me/other")


def test_without_the_extra_the_answer_names_it(shipped, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r'huggingface_hub is not installed; pip install "leap-dist\[hub\]"'):
        leap_dist.push_to_hub(shipped, "me/leap-toy")


def test_the_hub_s_own_reader_understands_the_card(shipped, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="optional extra")
    folder = leap_dist.save_pretrained(shipped, tmp_path / "leap-toy", results=RESULTS)
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    found = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert found == [("breakout", "mean_return", 12.5), ("pong", "mean_return", -20.0)]
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "leap-dist")


def test_the_command_line_finds_names_and_answers_wrong_ones_early(shipped, tmp_path, capsys):
    from leap_dist.cli.main import main

    assert main(["export", "--init", "pretrained:leap-atari", "--to", "torch", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "README.md").exists()
    for command in (
        ["evaluate", "--init", "pretrained:leap-atrai"],
        ["export", "--init", "pretrained:x", "--to", "sb3"],
    ):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--out", str(tmp_path / "nothing")])
        assert caught.value.code == 2
        assert "init: no pretrained" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
