"""The command line: what it refuses, in one line, with exit code 2, before Ray starts."""

from __future__ import annotations

import json
import pwd
import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import status_schema
from commands import no_ray, refused  # noqa: F401
from toy_data_sets import write_part

from leap_dist.cli import commands, parser, results, setting_flags
from leap_dist.cli.help_texts import OTHER_WORDS
from leap_dist.cli.main import main
from leap_dist.config import loading, registry
from leap_dist.config.loading import ConfigError
from leap_dist.config.presets import PRESETS, TASKS
from leap_dist.config.settings import Config
from leap_dist.driver import driver, placement
from leap_dist.driver.signals import Stopped
from leap_dist.storage import auth_token, location, run_directory
from leap_dist.storage.locks import RunDirectoryBusy, RunLock
from leap_dist.study.games import FIGURE_4
from leap_dist.study.plan import make
from leap_dist.study.spec import ARMS


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Without --run-dir, a run is made below the current directory, which is not to be the checkout."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--preset", "quik"], r"preset: no preset 'quik'; did you mean quick\?"),
        (["--games", "breakot"], r"games: no game 'breakot'; the nearest are breakout, .*"),
        (["--preset", "nope"], r"preset: no preset 'nope'; choose from paper, paper-5m, .*, quick, smoke"),
        (["--preset", "nope", "--tasks", "multi-cv"], r"preset: no preset 'nope'; choose from paper, quick, smoke"),
        (["--preset="], r"preset: is empty; name a preset, or leave it out"),
        (["--meta-updates", "1e13"], r"meta_updates: .* is too large; the largest valid value is 1,000,000,000,000"),
        (["--worker.device", "gpu"], r"worker.device: 'gpu' is not one of auto, cpu, cuda; did you mean cuda\?"),
        (["--games", "all"], r"games: no game 'all'; sets of games are seed24, camera25, moving4; the command .*"),
        (["--games", "xxxyyy"], r"games: no game 'xxxyyy'; the command `games` lists all"),
        (["--games", "Pong"], r"games: no game 'Pong'; did you mean pong\?"),
        (["--games", "PongNoFrameskip-v4"], r"games: no game 'PongNoFrameskip-v4'; did you mean pong\?"),
        (["--games", "ALE/MsPacman-v5"], r"games: no game 'ALE/MsPacman-v5'; did you mean ms_pacman\?"),
        (["--games", "ms pacman"], r"games: no game 'ms pacman'; did you mean ms_pacman\?"),
        (["--games", "pong", "MsPacman"], r"games: no game 'MsPacman'; did you mean ms_pacman\?"),
        (["--games", "pong", "joust"], r"games: 'joust' is a two-player game .*"),
        (["--games", "combat"], r"games: 'combat' is a two-player game .*"),
        (["--games", "maze_craze"], r"games: 'maze_craze' is a two-player game .*"),
        (["--games", "warlords"], r"games: 'warlords' is a two-player game .*"),
        (["--mode", "asink"], r"mode: 'asink' is not one of sync, buffered, async, .*; did you mean async\?"),
        (["--workers", "two"], r"workers: 'two' is neither auto nor a whole number"),
        (["--workers", "0"], r"workers: 0 is too small; the smallest valid value is 1"),
        (["--seed", "-1"], r"seed: -1 is too small; the smallest valid value is 0"),
        (["--agent.discount", "1.5"], r"agent.discount: 1.5 is too large; the largest valid value is 1"),
        (["--agent.learning-rate", "nan"], r"agent.learning_rate: 'nan' is not a number"),
        (["--meta.learning-rate", "0"], r"meta.learning_rate: 0 is too small; it must be greater than 0"),
        (["--leap.stabilize", "perhaps"], r"leap.stabilize: 'perhaps' is neither true nor false"),
        (["--task-steps", "10"], r"task_steps: 10 is less than 2 rollouts .* use at least 160"),
        (["--agent.learning-rat", "1"], r"--agent.learning-rat: no such flag; did you mean --agent.learning-rate\?"),
        (["--learning-rate", "1"], r"--learning-rate: no such flag; did you mean --(agent|meta).learning-rate\?"),
        (["--agent.lr", "1e-3"], r"--agent.lr: no such flag; did you mean --agent.learning-rate\?"),
        (["--num-workers", "2"], r"--num-workers: no such flag; did you mean --workers\?"),
        (["pong"], r"pong: unexpected argument; flags begin with --"),
        (["--workers", "2", "--workers", "2"], r"--workers: given twice; give it once"),
        (["--task-steps", "500", "--steps", "600"], r"--steps: given twice; give it once"),
        (["--resume", "--resume"], r"--resume: given twice; give it once"),
        (["--insecure", "--insecure", "no"], r"--insecure: given twice; give it once"),
        (["--preset", "quick", "--preset=smoke"], r"--preset: given twice; give it once"),
        (["--run-dir", ""], r"--run-dir: is empty; name a file or directory"),
        (["--config", " "], r"--config: is empty; name a file or directory"),
        (
            ["--run-dir", "~nobody-here/x"],
            r"--run-dir: '~nobody-here/x' begins with the home directory of an unknown user; .*",
        ),
        (
            ["--data-dir", "~nobody-here/x"],
            r"data_dir: '~nobody-here/x' begins with the home directory of an unknown user; .*",
        ),
        (
            ["--worker.device", "cuda"],
            r"worker.device: cuda requested, but the cluster has 0 GPUs; use --worker.device cpu",
        ),
        (["--worker.gpus", "0.5"], r"worker.gpus: 0.5 requested, but the cluster has 0 GPUs; use --worker.device cpu"),
        (["--workers", "2", "--min-workers", "3"], r"min_workers: 3 is more than workers \(2\); use at most 2"),
        (
            ["--worker.labels", "spot"],
            r"worker.labels: spot is neither LABEL=VALUE nor LABEL!=VALUE; write, .*",
        ),
        (
            ["--worker.labels", "pool=a", "pool!=b"],
            r"worker.labels: pool is given twice; write, .*pool=spot",
        ),
        (["--server.storage", "nod"], r"server.storage: 'nod' is not one of shared, node; did you mean node\?"),
        (["--preset", "../quick"], r"preset: no preset '../quick'; did you mean quick\?"),
        (["--games", "../pong"], r"games: no game '../pong'; did you mean pong\?"),
        (["--games", "/etc/passwd"], r"games: no game '/etc/passwd'.*"),
        (["--address", "6379"], r"address: '6379' is not one of local, auto and HOST:PORT"),
        (["--address", "head:"], r"address: 'head:' is not one of local, auto and HOST:PORT"),
        (["--address", "head:99999"], r"address: 'head:99999' has no valid port; ports are between 1 and 65535, .*"),
        (["--address", "me:hunter2@head:6379"], r"address: takes no URL, user or password; use local, .*"),
        (["--address", "ray://head:10001"], r"address: takes no URL, user or password; use local, auto or HOST:PORT"),
        (["--insecure", "perhaps"], r"insecure: 'perhaps' is neither true nor false"),
        (["--resume"], r"resume: name the run with --run-dir"),
        (["--resume", "auto"], r"resume: name the run with --run-dir"),
        (["--resume", "yes"], r"--resume: 'yes' is not auto; give auto, or nothing"),
        (["--workers"], r"--workers: expected one argument"),
    ],
)
def test_bad_flags(capsys, monkeypatch, arguments, pattern):
    monkeypatch.setattr(driver.torch.cuda, "device_count", lambda: 0)
    line = refused(capsys, "train", *arguments)
    assert re.fullmatch(pattern, line), line


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("modes: sync", r"modes: no such setting; did you mean mode\?"),
        ("meta: {learning_rat: 1}", r"meta.learning_rat: no such setting; did you mean meta.learning_rate\?"),
        ("workers: [1, 2]", r"workers: \[1, 2\] is neither auto nor a whole number"),
        ("games: 3", r"games: 3 is not a list of names"),
        ("preset: nope", r"preset: no preset 'nope'.*"),
        ("- a\n- b", r"config: .* holds a list, not settings by name"),
        ("a: [", r"config: cannot read .*"),
    ],
)
def test_bad_config_files(capsys, tmp_path, text, pattern):
    (tmp_path / "c.yaml").write_text(text)
    line = refused(capsys, "train", "--config", str(tmp_path / "c.yaml"))
    assert re.fullmatch(pattern, line), line


def test_missing_config_file(capsys, tmp_path):
    assert "cannot read" in refused(capsys, "train", "--config", str(tmp_path / "none.yaml"))


def test_no_command_and_unknown_command(capsys):
    assert refused(capsys).startswith("name a command: train, evaluate, ")
    assert refused(capsys, "trian") == "trian: no such command; did you mean train?"
    assert refused(capsys, "resume", "runs/mine") == "resume: no such command; did you mean train --resume?"
    line = "name a command before the flags; for example, train --preset smoke"
    for flags in (["--train"], ["--preset", "smoke"], ["--preset=smoke"], ["-x"], ["--help-all"]):
        assert refused(capsys, *flags) == line
    assert refused(capsys, "help", "trian") == "trian: no such command; did you mean train?"
    assert refused(capsys, "xyzzy") == f"xyzzy: no such command; choose from {', '.join(parser.NAMES)}"


def test_help_and_version_are_commands_too(capsys):
    for words, flags in (
        (["help"], ["--help"]),
        (["help", "train"], ["train", "--help"]),
        (["version"], ["--version"]),
    ):
        assert printed(capsys, *words) == printed(capsys, *flags)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["evaluate", "--inti", "runs/mine"], "--inti: no such flag; did you mean --init?"),
        (["evaluate", "--inti=runs/mine"], "--inti: no such flag; did you mean --init?"),
        (["export", "runs/mine", "--too", "sb3", "--out", "x"], "--too: no such flag; did you mean --to?"),
        (["study", "--oout", "x"], "--oout: no such flag; did you mean --out?"),
        (["evaluate"], "init: name what to compare; for example, evaluate --init runs/mine --init scratch"),
        (
            ["evaluate", "runs/smoke", "scratch"],
            "runs/smoke: unexpected argument; for example, evaluate --init runs/smoke --init scratch",
        ),
        (["evaluate", "runs/a", "--init", "x"], "runs/a: unexpected argument; for example, evaluate --init runs/a"),
        (["evaluate", "--init", "scratch", "--seeds", "1e9"], "seeds: 1,000,000,000 is not between 1 and 1,000"),
        (["evaluate", "--init", "scratch", "--seeds", "1.5"], "--seeds: '1.5' is not a whole number"),
        (["evaluate", "--init", "scratch", "--seeds", "inf"], "--seeds: 'inf' is not a whole number"),
        (["presets", "quik"], "presets: no preset 'quik'; did you mean quick?"),
        (["games", "pogn"], "games: no game 'pogn'; the nearest are pong, pooyan, phoenix"),
        (["weights", "nope"], "weights: no initialization 'nope'; the command `weights` lists the 3 that there are"),
    ],
)
def test_the_mistake_itself_is_reported_and_not_what_it_leads_to(capsys, arguments, line):
    assert refused(capsys, *arguments) == line


def test_a_preset_of_the_command_line_replaces_that_of_the_file_with_a_note(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("preset: paper\nmeta_updates: 3\n")
    command = ["train", "--config", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "run")]
    config, _ = commands.training(parser.parse([*command, "--preset", "smoke"]))
    assert (config.preset, config.meta_updates) == ("smoke", 3)
    note = f"leap-dist: note: --preset smoke replaces preset paper of {tmp_path / 'c.yaml'}\n"
    assert capsys.readouterr().err == note
    for same in ([], ["--preset", "paper"]):
        assert commands.training(parser.parse([*command, *same]))[0].preset == "paper"
        assert capsys.readouterr().err == ""


def test_a_game_that_is_named_twice_gets_a_note(capsys, tmp_path):
    for names, noted in ((["pong", "pong"], True), (["seed24", "pong"], False)):
        commands.training(parser.parse(["train", "--run-dir", str(tmp_path / "x"), "--games", *names]))
        note = "leap-dist: note: games: pong is given more than once, and counts once\n"
        assert capsys.readouterr().err == (note if noted else "")


def test_an_export_of_a_run_that_has_only_begun_says_so(capsys):
    run_directory.prepare(Path("runs/mine"), loading.resolve("smoke"))
    Path("runs/mine2").mkdir()
    Path("runs/mine2/init.safetensors").write_text("")
    line = refused(capsys, "export", "runs/mine", "--to", "sb3", "--out", "x")
    began = "runs/mine holds no init.safetensors yet: the run has only begun; wait for its first meta-update"
    assert line == f"init: {began}"


def test_the_words_of_other_programs_lead_to_commands():
    assert not OTHER_WORDS.keys() & set(parser.NAMES)
    for meant in OTHER_WORDS.values():
        commands_meant = [word for word in re.split(r", | or | --\w+", meant) if word]
        assert commands_meant
        assert set(commands_meant) <= set(parser.NAMES)


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ("nowhere", r"init: nowhere cannot be read \(No such file or directory\); give .*"),
        ("pretrained:leap-omniglot", r"init: pretrained:leap-omniglot was meta-learned on omniglot, and its network is "
                                     r"not for atari; give --tasks omniglot, or another initialization"),
        ("pretrained:leap-omniglt", r"init: .*did you mean .*leap-omniglot\?"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", [[], ["--run-dir", "mine"]], ids=["unnamed", "named"])
def test_an_initialization_that_cannot_be_used_is_refused_before_anything_is_written(capsys, source, pattern, where):
    line = refused(capsys, "train", "--preset", "smoke", "--init", source, *where)
    assert re.fullmatch(pattern, line), line
    assert not list(Path().rglob("*.yaml"))
    assert not Path("mine").exists()


@pytest.mark.parametrize(
    ("command", "scratch"),
    [
        ("train --preset smoke --init nowhere", False),
        ("evaluate --init nowhere", True),
        ("export nowhere --to sb3 --out policy", False),
        ("enjoy nowhere", True),
    ],
)
def test_a_missing_initialization_gets_the_same_advice_from_every_command(capsys, command, scratch):
    choices = "a URL, pretrained:NAME or scratch" if scratch else "a URL or pretrained:NAME"
    reason = "init: nowhere cannot be read (No such file or directory)"
    assert refused(capsys, *command.split()) == f"{reason}; give a run directory, an init.safetensors, {choices}"


@pytest.mark.parametrize(
    "command", ["train --preset smoke --init", "evaluate --init", "export --to sb3 --out x", "enjoy"]
)
def test_a_damaged_initialization_is_named_with_its_path(capsys, command):
    Path("made").mkdir()
    Path("made/init.safetensors").write_bytes(b"nothing")
    line = refused(capsys, *command.split(), "made")
    assert re.fullmatch(
        r"init: \S*made/init.safetensors is not a leap-dist file, or is damaged: its size is wrong", line
    )


def test_a_run_directory_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(capsys, "train", "--preset", "smoke", "--run-dir", str(tmp_path / "file" / "run"))
    assert re.fullmatch(r"run-dir: .*file/run cannot be written \(Not a directory\); choose another", line), line


LONG = 300 * "a"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "--preset", "smoke", "--run-dir", LONG], f"run-dir: {LONG} cannot be written (File name too long)"),
        (["evaluate", "--init", "scratch", "--preset", "smoke", "--out", LONG], f"out: {LONG} cannot be written (File"),
        (["train", "--resume", "--run-dir", LONG], f"resume: {LONG} holds no run"),
        (["study", "--tasks", "atari", "--out", LONG], f"out: {LONG} cannot be written (File name too long)"),
        (["status", LONG], f"run-dir: {LONG} has no summary.json; no run was started there"),
        (["plot", LONG], f"run-dir: {LONG} holds no run"),
        (["train", "--init", LONG], f"init: {LONG} cannot be read (File name too long)"),
        (["evaluate", "--init", LONG], f"init: {LONG} cannot be read (File name too long)"),
        (["export", LONG, "--to", "torch", "--out", "exported"], f"init: {LONG} cannot be read (File name too long)"),
        (["enjoy", LONG, "--game", "pong"], f"init: {LONG} cannot be read (File name too long)"),
    ],
)
def test_a_name_that_is_too_long(capsys, arguments, line):
    assert refused(capsys, *arguments).startswith(line)


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_a_directory_with_other_files_is_not_taken_for_a_run(capsys, tmp_path, resume):
    (tmp_path / "docs" / "tensorboard").mkdir(parents=True)
    (tmp_path / "docs" / "page.md").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    end = f"{tmp_path}/docs is not empty (page.md) and holds no run; choose a new or an empty directory"
    train = ["train", "--preset", "smoke", *resume, "--run-dir", str(tmp_path / "docs")]
    assert refused(capsys, *train) == f"run-dir: {end}"
    evaluate = ["evaluate", "--init", "scratch", "--preset", "smoke", "--out", str(tmp_path / "docs")]
    assert refused(capsys, *evaluate) == f"out: {end}"
    study = ["study", "--tasks", "atari", "--preset", "smoke", "--yes", "--out", str(tmp_path / "docs")]
    assert refused(capsys, *study) == f"out: {end}"
    assert sorted(tmp_path.rglob("*")) == before


def test_hidden_files_logs_and_the_rest_of_a_failed_start_are_in_the_way_of_no_run(tmp_path):
    (tmp_path / "lost+found").mkdir()
    for name in (".nfs00001", ".launch", "leap-4711.out", "start.log"):
        (tmp_path / name).touch()
    run_directory.require_free(tmp_path)
    run_directory.prepare(tmp_path, loading.resolve("smoke"))
    run_directory.require_free(tmp_path)
    (tmp_path / "init.safetensors").touch()
    with pytest.raises(ConfigError, match=r"is not empty \(init.safetensors\) and holds no run"):
        run_directory.require_free(tmp_path)


def test_a_run_whose_configuration_is_gone_is_called_damaged(capsys, tmp_path):
    (tmp_path / "ledger.jsonl").touch()
    for more in ([], ["--resume"], ["--resume", "auto"]):
        line = refused(capsys, "train", *more, "--run-dir", str(tmp_path))
        assert re.fullmatch(
            rf"(run-dir|resume): {tmp_path} holds a run without config.yaml: it is damaged, or .*", line
        )


def test_a_new_run_in_the_directory_of_an_evaluation(capsys, tmp_path):
    run_directory.prepare(tmp_path, loading.resolve("smoke"))
    (tmp_path / "arms.json").write_text('{"arms": []}')
    line = refused(capsys, "train", "--preset", "smoke", "--run-dir", str(tmp_path))
    assert line == f"run-dir: {tmp_path} holds an evaluation; choose another directory"


@pytest.mark.parametrize("command", ["train --run-dir", "evaluate --init scratch --out"])
@pytest.mark.parametrize("there", [False, True])
def test_a_stop_before_anything_was_trained_leaves_nothing_and_says_so(capsys, monkeypatch, command, there):
    def stopped(*_, **__):
        raise Stopped

    for name in ("train", "evaluate"):
        monkeypatch.setattr(driver, name, stopped)
    place = Path("reports/first")
    if there:
        place.mkdir(parents=True)
        (place / "start.log").touch()
    assert main([*command.split(), str(place), "--preset", "smoke"]) == 130
    removed = "what this launch has written was removed" if there else f"{place} was removed"
    assert capsys.readouterr().err == f"\nstopped before anything was trained; {removed}\n"
    assert [path.name for path in place.glob("*")] == there * ["start.log"]


def test_a_stop_before_a_resumed_run_goes_on_keeps_it(capsys, monkeypatch, tmp_path):
    def stopped(*_, **__):
        raise Stopped

    monkeypatch.setattr(driver, "train", stopped)
    run_directory.prepare(tmp_path, loading.resolve("smoke"))
    (tmp_path / "ledger.jsonl").touch()
    assert main(["train", "--resume", "--run-dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith(f"trained; what {tmp_path} held before is kept\n")
    assert run_directory.has_begun(tmp_path)


def test_resuming_a_finished_run_ends_at_once_and_says_how_to_train_longer(capsys, tmp_path):
    run_directory.prepare(tmp_path, loading.resolve("smoke"))
    for name in ("ledger.jsonl", "init.safetensors"):
        (tmp_path / name).touch()
    counts = {"tasks": 4, "tasks_wanted": 4, "tasks_waiting": 0, "meta_updates": 2}
    run_directory.write_summary(tmp_path, {"state": "done", **counts})
    assert main(["train", "--resume", "--run-dir", str(tmp_path), "--meta-updates", "1"]) == 0
    first, _, longer = capsys.readouterr().out.splitlines()
    assert first == "nothing is left to do: the run has made 2 meta-updates (meta_updates: 1)"
    assert longer.endswith(f"train --run-dir {tmp_path} --resume --meta-updates 4")
    assert run_directory.load_config(tmp_path, {}).meta_updates == 2, "it is not saved, because nothing was done"


@pytest.mark.parametrize(
    ("out", "line"),
    [
        ("nodir/p.png", "there is no directory nodir; make it first"),
        ("p.txt", "p.txt does not end in .png, the only format of the picture; give another name"),
        ("taken.png", "taken.png cannot be written (Is a directory); choose another"),
    ],
)
def test_a_picture_that_cannot_be_written_is_a_mistake_in_out(capsys, out, line):
    run_directory.prepare(Path("run"), loading.resolve("smoke"))
    Path("taken.png").mkdir()
    assert refused(capsys, "plot", "run", "--out", out) == f"out: {line}"


def test_the_output_of_an_evaluation_is_called_out_in_every_refusal(capsys, tmp_path):
    (tmp_path / "README.md").touch()
    evaluate = ["evaluate", "--init", "scratch", "--preset", "smoke", "--out"]
    line = refused(capsys, *evaluate, str(tmp_path / "README.md"))
    assert line == f"out: {tmp_path}/README.md cannot be written (File exists); choose another"
    with run_directory.claimed(tmp_path / "used"):
        assert refused(capsys, *evaluate, str(tmp_path / "used")).startswith(f"out: {tmp_path}/used is in use by")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".launch").symlink_to("elsewhere")
    assert refused(capsys, *evaluate, str(tmp_path / "linked")).startswith("out: .launch in ")


def test_a_file_system_that_takes_no_files(capsys):
    line = refused(capsys, "train", "--preset", "smoke", "--run-dir", "/proc/leap/run")
    assert "/proc/leap/run cannot be written" in line


def test_a_directory_that_holds_a_run_already(capsys, tmp_path):
    run_directory.prepare(tmp_path, loading.resolve("smoke"))
    (tmp_path / "ledger.jsonl").touch()  # a start that failed leaves none, and may be repeated
    line = refused(capsys, "train", "--preset", "smoke", "--run-dir", str(tmp_path))
    assert "already holds a run; add --resume" in line


def test_a_directory_that_a_live_server_holds(capsys, monkeypatch, tmp_path):
    run_directory.prepare(tmp_path, loading.resolve("smoke"))
    lock = RunLock(tmp_path)
    monkeypatch.setattr(run_directory, "ORPHAN_SECONDS", 0.2)
    line = refused(capsys, "train", "--resume", "--run-dir", str(tmp_path))
    assert re.match(r"run-dir: .* is in use by a live server \(process \d+ on .+\); stop it or choose another", line)
    lock.release()


def test_a_resume_waits_for_the_server_of_a_driver_that_was_killed(monkeypatch, tmp_path):
    run_directory.prepare(tmp_path, loading.resolve("smoke"))
    holders = iter(["process 1", "process 1", None])
    monkeypatch.setattr(run_directory, "lock_holder", lambda _: next(holders))
    run_directory.prepare(tmp_path, loading.resolve("smoke"), patience=60.0)
    assert list(holders) == []


def test_a_resume_does_not_wait_for_a_run_whose_driver_lives(monkeypatch, tmp_path):
    run_directory.prepare(tmp_path, loading.resolve("smoke"))
    asked = []

    def held(run_dir):
        run_directory.write_summary(run_dir, {"reports": asked.append("process 1")})
        return "process 1"

    monkeypatch.setattr(run_directory, "lock_holder", held)
    with pytest.raises(RunDirectoryBusy, match=r"in use by a live server \(process 1\)"):
        run_directory.prepare(tmp_path, loading.resolve("smoke"), patience=60.0)
    assert len(asked) == 1


def test_resume_refuses_what_would_change_the_run(capsys, tmp_path):
    assert "holds no run" in refused(capsys, "train", "--resume", "--run-dir", str(tmp_path))
    run_directory.prepare(tmp_path, loading.resolve("smoke"))
    line = refused(capsys, "train", "--resume", "--run-dir", str(tmp_path), "--seed", "5", "--games", "pong")
    assert line.startswith("resume: these settings cannot change during a run: ")
    assert "seed: 0 -> 5" in line
    assert "games: ('pong', 'freeway') -> ('pong',)" in line
    assert "a resumed run keeps its preset and config; omit --preset" in refused(
        capsys, "train", "--resume", "--run-dir", str(tmp_path), "--preset", "quick"
    )


def launched(run_dir, *arguments):
    """The configuration and the run of `train --resume auto`, and whether an earlier launch has begun it."""
    parsed = parser.parse(["train", "--resume", "auto", "--run-dir", str(run_dir), *arguments])
    config, run = commands.training(parsed)
    return config, run.continues


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_resume_auto_starts_a_run_or_continues_it(capsys, tmp_path, scheme):
    command = [f"{scheme}{tmp_path / 'run'}", "--preset", "smoke", "--meta-updates", "3", "--workers", "1"]
    started, continues = launched(*command)
    assert not continues
    run_directory.prepare(tmp_path / "run", started)
    assert launched(*command) == (started, False), "the launch ended before anything was trained"

    (tmp_path / "run" / "checkpoints" / "000001").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "000001" / "state.json").write_text("{}")
    assert launched(*command) == (started, True)
    longer, continues = launched(command[0], "--meta-updates", "9")
    assert (longer.preset, longer.workers, longer.meta_updates, continues) == ("smoke", 1, 9, True)
    for more, line in (
        (["--seed", "5"], "resume: these settings cannot change during a run: seed: 0 -> 5"),
        (
            ["--preset", "quick"],
            "resume: the run has preset smoke, not quick; leave the preset out, or use another directory",
        ),
    ):
        assert refused(capsys, "train", "--resume", "auto", "--run-dir", command[0], *more) == line


@pytest.mark.parametrize(("terminal", "expected"), [(True, "loading PyTorch and Ray\n"), (False, "")])
def test_a_terminal_is_told_what_it_waits_for(capsys, monkeypatch, terminal, expected):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    commands.training(parser.parse(["train", "--preset", "smoke"]))
    commands.evaluation(parser.parse(["evaluate", "--init", "scratch", "--preset", "smoke"]))
    assert capsys.readouterr().out == 2 * expected


def test_resume_lets_length_and_placement_change(tmp_path):
    run_directory.prepare(tmp_path, loading.resolve("smoke"))
    config = run_directory.load_config(tmp_path, {"meta_updates": "50", "workers": "7", "worker.cpus": "0.5"})
    assert (config.meta_updates, config.workers, config.worker.cpus) == (50, 7, 0.5)
    assert config.task_steps == loading.resolve("smoke").task_steps


def test_flags_override_the_file_and_the_file_overrides_the_preset(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: quick\nworkers: 5\nmeta: {batch_size: 7}\n")
    parsed = parser.parse(["train", "--config", str(tmp_path / "c.yaml"), "--workers", "9"])
    config, run = commands.training(parsed)
    assert (config.preset, config.workers, config.meta.batch_size, config.task_steps) == ("quick", 9, 7, 10_000)
    assert run.folder.name.startswith("quick-")
    assert commands.training(parser.parse(["train", "--games", "pong,qbert", "seed24"]))[0].games[:2] == (
        "pong",
        "qbert",
    )


def test_lists_that_are_given_twice_add_up():
    given = parser.parse(
        ["train", "--games", "pong", "--games", "freeway", "qbert", "--worker.labels", "a=b", "--worker.labels=c=d"]
    )
    assert parser.settings(given) == {"games": "pong,freeway,qbert", "worker.labels": "a=b,c=d"}
    given = parser.parse(["study", "--out", "x", "--arms", "leap", "--arms", "none", "--groups", "4", "--groups", "10"])
    assert (given.arms, given.groups) == (["leap", "none"], ["4", "10"])
    again = parser.parse(["study", "--out", "x", "--arms", "reptile"])
    assert again.arms == ["reptile"], "nothing of the command line before"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["train", "--run-dir", "~/x"], "run_dir"),
        (["train", "--config", "~/x"], "config"),
        (["status", "--run-dir", "~/x"], "run_dir"),
        (["plot", "--run-dir", "y", "--out", "~/x"], "out"),
        (["evaluate", "--init", "scratch", "--out", "~/x"], "out"),
        (["evaluate", "--init", "~/x"], "init"),
        (["study", "--out", "~/x"], "out"),
        (["export", "--init", "~/x", "--to", "sb3", "--out", "y"], "init"),
        (["export", "--init", "y", "--to", "sb3", "--out", "~/x"], "out"),
    ],
)
def test_a_tilde_is_the_home_directory_in_every_path(monkeypatch, tmp_path, arguments, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    value = getattr(parser.parse(arguments), name)
    assert (value if not isinstance(value, list) else value[0]) in (str(tmp_path / "x"), tmp_path / "x")
    assert parser.parse(["evaluate", "--init", "mine=~/x"]).init == [f"mine={tmp_path}/x"]
    assert loading.resolve("smoke", {"data_dir": "~/data"}).data_dir == f"{tmp_path}/data"
    assert parser.parse(["status", "--run-dir", "s3://bucket/~/x"]).run_dir == "s3://bucket/~/x"


def test_a_user_without_a_home_directory_gets_one_line(capsys, monkeypatch, tmp_path):
    """As in a container that runs under a number which no user has."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, "trian") == "trian: no such command; did you mean train?"
    line = refused(capsys, "status", "--run-dir", "~/x")
    assert line == "--run-dir: '~/x' begins with the home directory of an unknown user; give the full path"
    with pytest.raises(ConfigError, match=r"^address: this user has no home directory for Ray's token; set HOME"):
        auth_token.find()
    config, _ = commands.training(parser.parse(["train", "--preset", "smoke", "--run-dir", "run"]))
    assert config.preset == "smoke"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "insecure"),
    [([], False), (["--insecure"], True), (["--insecure", "no"], False), (["--insecure", "--workers", "2"], True)],
)
def test_a_flag_of_yes_or_no_alone_means_yes(arguments, insecure):
    config, _ = commands.training(parser.parse(["train", "--preset", "smoke", *arguments]))
    assert config.insecure is insecure


def printed(capsys, *arguments: str) -> str:
    """What a command prints that ends with code 0."""
    try:
        code = main(list(arguments))
    except SystemExit as ended:  # --help
        code = ended.code
    assert code == 0
    return capsys.readouterr().out


def test_the_whole_help_shows_every_setting(capsys):
    text = printed(capsys, "train", "--help-all")
    for name, _, _ in loading.fields():
        assert f"--{name.replace('_', '-')}" in text
    for flag in (
        "--mode {sync,buffered,async,fedasync,delayed-nesterov,stream}",
        "--agent.learning-rate X",
        "--meta.batch-size N",
        "--insecure, --no-insecure",
    ):
        assert flag in text


@pytest.mark.parametrize("command", ["train", "evaluate", "study"])
def test_the_help_of_a_command_is_one_screen(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed(capsys, command, "--help").splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for name in setting_flags.SHOWN[command]:
        assert f"--{name.replace('_', '-')}" in text
    assert "exit codes" in text
    assert "--server.lease-seconds" not in text
    if command == "train":
        assert all(f"\n  {preset} " in text for preset in PRESETS)


def defaults(text: str) -> dict[str, str]:
    """The default that a help text states for each flag."""
    found = re.findall(r"^  --([\w.-]+)(?:(?!^  -).)*?\(default:\s+(.*?)\)$", text, re.MULTILINE | re.DOTALL)
    return {flag: " ".join(default.split()) for flag, default in found}


def test_the_help_of_a_command_shows_its_own_defaults(capsys):
    train = defaults(printed(capsys, "train", "--help"))
    assert (train["task-steps"], train["agent.envs"], train["games"]) == ("10000", "16", "assault,asterix,ms_pacman")
    paper = defaults(printed(capsys, "train", "--help", "--preset", "paper"))
    assert (paper["task-steps"], paper["agent.envs"], paper["games"]) == ("1000000", "32", "seed24")
    omniglot = defaults(printed(capsys, "train", "--help", "--tasks=omniglot", "--preset=paper"))
    assert (omniglot["meta-updates"], omniglot["games"]) == ("1000", "pretraining")
    evaluate = defaults(printed(capsys, "evaluate", "--help-all"))
    assert (evaluate["games"], evaluate["seeds"]) == ("breakout,qbert,space_invaders", "5")
    assert {evaluate[name] for name in ("task-steps", "agent.envs", "atari.frames")} == {"that of the first --init"}
    assert (evaluate["workers"], evaluate["worker.device"]) == (str(Config.workers), "auto")
    of_images = defaults(printed(capsys, "evaluate", "--help", "--tasks", "omniglot"))
    assert of_images["games"] == "held_out"
    quick = defaults(printed(capsys, "evaluate", "--help-all", "--preset", "quick"))
    assert (quick["task-steps"], quick["agent.envs"], quick["atari.frames"]) == ("10000", "16", "gray4")
    study = defaults(printed(capsys, "study", "--help"))
    assert (study["seeds"], study["data-dir"]) == ("3", "data")


def as_text(value: object) -> str:
    """A setting's value as the help shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (",".join(value) if isinstance(value, tuple) else str(value)) or "none"


CHOICES = [
    *(("atari", preset, {}) for preset in PRESETS),
    *((tasks, preset, {}) for tasks, presets in TASKS.items() for preset in presets),
    *(("atari", "fast", {"mode": mode}) for mode in get_args(get_type_hints(Config)["mode"])),
    *((tasks, "fast", {"meta_learner": name}) for tasks in ("atari", "gymnasium") for name in ARMS),
    *(("omniglot", "paper", {"meta_learner": name}) for name in ARMS),
    ("atari", "quick", {"mode": "delayed-nesterov", "meta_learner": "reptile"}),
    ("atari", "quick", {"mode": "async", "meta.optimizer": "adam"}),
    ("atari", "paper-async", {"mode": "stream", "meta.shift": "trajectory"}),
]
"""Kinds of tasks, presets, and other settings of a command line on which defaults depend."""


@pytest.mark.parametrize(("tasks", "preset", "more"), CHOICES)
def test_the_defaults_that_the_help_shows_are_those_that_training_gets(capsys, monkeypatch, tasks, preset, more):
    monkeypatch.setenv("COLUMNS", "1000")
    own = {"games": ("x",)} if tasks in registry.OWN else {}
    try:
        config = loading.resolve(preset, {"tasks": tasks, **own, **more})
    except ConfigError:
        assert (tasks, more) in [
            ("atari", {"mode": "fedasync"}),  # Leap has settings with which it is refused
            ("gymnasium", {"meta_learner": "finetune-single"}),
        ]
        return
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {"tasks": tasks, **more}.items()]
    shown = defaults(printed(capsys, "train", "--help-all", "--preset", preset, *flags))
    for name, _, _ in loading.fields():
        if name == "init":
            assert shown[name] == "a random one"
        elif name not in ("preset", "games"):
            assert shown[name.replace("_", "-")] == as_text(loading.look_up(config, name)), name


@pytest.mark.parametrize("tasks", registry.OWN)
@pytest.mark.parametrize("help_flag", ["--help", "--help-all"])
def test_the_help_says_that_own_tasks_have_to_be_named(capsys, tasks, help_flag):
    text = " ".join(printed(capsys, "train", help_flag, "--tasks", tasks).split())
    about = re.search(r" --games NAME \[NAME \.\.\.\] (.*?\)) --", text)
    assert about
    assert about[1].endswith("(required)")
    assert "launch.py games" not in about[1]
    assert refused(capsys, "train", "--tasks", tasks).startswith("games: name your ")


@pytest.mark.parametrize("tasks", ["", "atari", "omniglot", "multi-cv"])
@pytest.mark.parametrize("preset", ["", "paper", "figure4"])
def test_the_help_of_studies_shows_what_all_arms_get_and_says_on_what_the_rest_depends(
    capsys, monkeypatch, tasks, preset
):
    monkeypatch.setenv("COLUMNS", "1000")
    if preset == "figure4" and tasks != "atari":
        return
    flags = [*(["--tasks", tasks] if tasks else []), *(["--preset", preset] if preset else [])]
    shown = defaults(printed(capsys, "study", "--help-all", *flags))
    arms = [arm for arm in ARMS if arm not in ("multitask", "none")]
    arms_of = {"atari": ["leap"], "omniglot": arms, "multi-cv": [arm for arm in arms if arm != "finetune-single"]}
    for kind in [tasks] if tasks else arms_of:
        planned = make(
            preset="paper", given={"tasks": kind}, arms=[], groups=[], seeds=1, of_arms={}, test_steps=None
        )  # fmt: skip
        assert [arm for arm in planned.study.arms if arm != "none"] == arms_of[kind]
    of_kinds = [
        [loading.resolve("paper", {"tasks": kind, "meta_learner": arm}) for arm in arms_of[kind]]
        for kind in ([tasks] if tasks else arms_of)
    ]
    for name, _, _ in loading.fields():
        if name in ("preset", "tasks", "games", "meta_learner", "seed"):
            continue
        values = [{loading.look_up(config, name) for config in configs} for configs in of_kinds]
        if any(value != values[0] for value in values):
            assert shown[name.replace("_", "-")] == "depends on --tasks", name
        elif len(values[0]) > 1:
            assert shown[name.replace("_", "-")] == "depends on the arm", name
        else:
            assert shown[name.replace("_", "-")] == as_text(*values[0]), name
    expected = {
        "": "depends on --tasks", "atari": ",".join(FIGURE_4), "omniglot": "pretraining", "multi-cv": "all"
    }  # fmt: skip
    assert shown["games"] == expected[tasks]


def test_the_help_of_studies_says_that_the_kind_of_tasks_is_required(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = " ".join(printed(capsys, "study", "--help").split())
    assert "--tasks NAME atari, omniglot or multi-cv (required)" in text
    shown = defaults(printed(capsys, "study", "--help", "--tasks", "atari"))
    assert shown["meta-updates"] == "100"
    assert shown["games"] == ",".join(FIGURE_4)


def test_bare_train_is_the_preset_for_a_laptop():
    config, run = commands.training(parser.parse(["train"]))
    assert config.preset == "quick"
    assert run.folder.name.startswith("quick-")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], True),
        (["--no-leap.stabilize"], False),
        (["--leap.stabilize"], True),
        (["--leap.stabilize", "no"], False),
        (["--leap.stabilize", "true"], True),
    ],
)
def test_a_switch_has_a_positive_and_a_negative_form(arguments, expected):
    config, _ = commands.training(parser.parse(["train", *arguments]))
    assert config.leap.stabilize is expected


def test_mistakes_with_a_switch_get_one_line(capsys):
    line = refused(capsys, "train", "--no-insecure", "yes please")
    assert line == "--no-insecure: takes no value; leave out 'yes please'"
    assert refused(capsys, "train", "--insecure", "--no-insecure") == "--no-insecure: given twice; give it once"
    assert "did you mean --no-insecure?" in refused(capsys, "train", "--no-insecur")
    assert refused(capsys, "train", "--no-workers") == "--no-workers: no such flag; did you mean --workers?"


@pytest.mark.parametrize("command", ["status", "plot"])
def test_a_place_is_named_alone_or_with_a_flag(capsys, command):
    assert parser.parse([command, "runs/x"]).run_dir == parser.parse([command, "--run-dir", "runs/x"]).run_dir
    assert refused(capsys, command) == f"{command}: needs a path or URL; for example, {command} runs/mine"
    assert "one path or URL" in refused(capsys, command, "a", "--run-dir", "b")


def test_status(capsys, tmp_path):
    assert "no run was started there" in refused(capsys, "status", "--run-dir", str(tmp_path))
    run_directory.prepare(tmp_path, loading.resolve("smoke"))
    assert "its launch ended before its first report" in refused(capsys, "status", "--run-dir", str(tmp_path))
    for text in ('{"state": "runn', "[]"):
        (tmp_path / "summary.json").write_text(text)
        assert "summary.json is damaged" in refused(capsys, "status", "--run-dir", str(tmp_path))
    run_directory.write_summary(tmp_path, {"state": "done", "meta_updates_wanted": 2})
    assert "of another version" in refused(capsys, "status", "--run-dir", str(tmp_path))
    run_directory.write_summary(tmp_path, {"state": "running", "tasks_wanted": 4})
    assert main(["status", "--json", "--run-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"state": "died", "tasks_wanted": 4}, (
        "running, but no server holds the directory"
    )
    lock = RunLock(tmp_path)
    assert main(["status", "--json", "--run-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"state": "running", "tasks_wanted": 4}
    lock.release()


def test_the_status_of_a_run_that_is_starting(capsys, tmp_path):
    with run_directory.claimed(tmp_path / "run"):
        run_directory.prepare(tmp_path / "run", loading.resolve("smoke"))
        assert main(["status", str(tmp_path / "run")]) == 0
        assert capsys.readouterr().out == f"starting: {tmp_path}/run has not reported yet\n"
        assert main(["status", "--json", str(tmp_path / "run")]) == 0
        status_schema.check(json.loads(capsys.readouterr().out), "starting")


def test_status_says_what_is_there_instead_of_a_run(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "file is a file; name the directory" in refused(capsys, "status", str(tmp_path / "file"))
    (tmp_path / "service").mkdir()
    (tmp_path / "service" / "ledger.jsonl").touch()
    assert "the MetaServer of a program made it" in refused(capsys, "status", str(tmp_path / "service"))
    for name in ("b", "a"):
        run_directory.prepare(tmp_path / name, loading.resolve("smoke"))
    line = refused(capsys, "status", str(tmp_path))
    assert line == f"run-dir: {tmp_path} holds a, b; name one, as in {tmp_path}/a"


@pytest.mark.parametrize(
    ("device", "asked", "there", "expected"),
    [("cpu", 0, 4, 0), ("auto", 0, 0, 0), ("auto", 0, 1, 0.25), ("auto", 0, 8, 1), ("cuda", 0, 2, 0.5),
     ("cuda", 0.125, 1, 0.125), ("auto", 1, 4, 1)],
)  # fmt: skip
def test_gpus_per_worker(device, asked, there, expected):
    config = loading.resolve("paper", {"workers": 4, "worker.device": device, "worker.gpus": asked})
    assert placement.gpus_per_worker(config, there) == expected


@pytest.mark.parametrize(
    ("settings", "expected"), [({"worker.gpus": 0.25}, 0.25), ({"worker.device": "cuda"}, 1.0), ({}, 0)]
)
def test_gpus_may_come_with_the_nodes_that_are_waited_for(settings, expected):
    config = loading.resolve("paper", {"wait_for_nodes": True, "address": "auto"}, settings)
    assert placement.gpus_per_worker(config, 0) == expected
    if settings:
        with pytest.raises(ConfigError, match="requested, but the cluster has 0 GPUs"):
            placement.gpus_per_worker(loading.resolve("paper", {"wait_for_nodes": True}, settings), 0)


def test_too_few_gpus():
    config = loading.resolve("paper", {"worker.gpus": 2})
    with pytest.raises(ConfigError, match=r"worker.gpus: 2 requested, but the cluster has 1 GPU;"):
        placement.gpus_per_worker(config, 1)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"measure": "error"}, "8 contributions, 1,600 examples in 0:00:14"),
        ({"measure": "return"}, "8 contributions, 1,600 agent steps in 0:00:14"),
        ({}, "8 contributions, 1,600 agent steps in 0:00:14"),
    ],
)
def test_the_end_of_a_run_says_what_its_steps_were(capsys, tmp_path, more, words):
    counts = {"tasks": 8, "tasks_wanted": 8, "meta_updates": 4, "contributions_applied": 8, "agent_steps": 1600}
    results.print_training(
        loading.resolve("smoke"), location.Run(tmp_path), "done", {**counts, "wall_seconds": 14.2, "alerts": [], **more}
    )
    assert f"done: 8 of 8 tasks, 4 meta-updates, {words}\n" in capsys.readouterr().out
    assert (tmp_path / "progress.png").exists()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["train", "--tasks", "omniglto"], r"tasks: 'omniglto' is not one of atari, .*; did you mean omniglot\?"),
        (["train", "--tasks", "omniglot", "--preset", "fast"], r"preset: fast does not exist for tasks omniglot; .*"),
        (["train", "--tasks", "omniglot", "--games", "grek"], r"games: no alphabet 'grek'; the nearest are greek, .*"),
        (["train", "--tasks", "omniglot", "--data-dir", "s3://data"], r"data_dir: 's3://data' is a URL; give .*"),
        (["train", "--tasks", "omniglot", "--data-dir", "nowhere"], r"data_dir: nowhere/omniglot is no.*"),
        (["train", "--tasks", "multi-cv", "--games", "mnist", "--data-dir", "nowhere"], r"data_dir: nowhere/mnist .*"),
        (["train", "--tasks", "multi-cv", "--meta.shared", "model"], r"meta\.shared: model has one head for all .*"),
        (["train", "--meta.shared", "model"], r"meta\.shared: model has one head for all tasks, .*; use encoder"),
        (["study", "--out", "s"], r"tasks: name the kind of tasks to study: atari, .*"),
        (["study", "--tasks", "omniglot", "--out", "s", "--arms", "lepa"], r"arms: no meta-learner 'lepa' among .*"),
        (["study", "--tasks", "omniglot", "--out", "s", "--groups", "0"], r"groups: '0' is not a number of .*"),
        (["study", "--tasks", "omniglot", "--out", "s", "--with", "leap"], r"with: 'leap' is not ARM:SETTING=VALUE.*"),
        (["study", "--tasks", "omniglot", "--out", "s", "--data-dir", "nowhere"], r"data_dir: nowhere/omniglot .*"),
        (["study", "--tasks", "omniglot", "--out", "s3://s"], r"out: must be a path on this machine, not a URL; .*"),
        (["study", "--tasks", "omniglot", "--oout", "s", "--out", "s"], r"--oout: no such flag; did you mean --out\?"),
    ],
)  # fmt: skip
def test_supervised_tasks_and_studies_are_refused_in_one_line_too(capsys, tmp_path, monkeypatch, arguments, pattern):
    monkeypatch.chdir(tmp_path)
    assert re.fullmatch(pattern, refused(capsys, *arguments))
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_a_study_does_not_go_where_a_run_is(capsys, tmp_path):
    write_part(tmp_path / "data", "mnist")
    write_part(tmp_path / "data", "cifar10")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("preset: paper\n")
    study = ["study", "--tasks", "multi-cv", "--preset", "smoke", "--games", "mnist,cifar10", "--out", str(run)]
    assert "holds a run or an evaluation" in refused(capsys, *study, "--data-dir", str(tmp_path / "data"))


def test_a_damaged_study_is_refused_by_all_who_read_it(capsys, tmp_path):
    (tmp_path / "study.json").write_text("{}")
    for command in ("status", "plot"):
        assert "study.json is not the file of a study, or is damaged" in refused(
            capsys, command, "--run-dir", str(tmp_path)
        )
