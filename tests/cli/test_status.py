"""`status --json` is what docs/status.schema.json says, for runs, evaluations and studies."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import in_process_driver
import jsonschema
import protocol
import pytest
from status_schema import KINDS, SCHEMA, check, parts
from toy_data_sets import write_part

import leap_dist
from leap_dist.cli.main import main
from leap_dist.config.loading import resolve
from leap_dist.driver.worker_slot import WorkerSlot
from leap_dist.evaluation.early_stopping import History, Measurement
from leap_dist.storage import run_directory
from leap_dist.study import plan
from leap_dist.telemetry.progress import Progress

ROOT = Path(__file__).parents[2]


def status_of(place: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["status", "--json", str(place)]) == 0
    return json.loads(capsys.readouterr().out)


def summary(folder: Path, **changes: Any) -> dict[str, Any]:
    """The summary of a run in the middle of a task that has reported once, after a meta-update."""
    settings = protocol.config(meta__batch_size=1)
    server = protocol.serve(folder, settings)
    try:
        protocol.finish(server, protocol.grant(server), protocol.INITIAL)
        lease = protocol.grant(server)
        vector = protocol.pull(0, protocol.INITIAL)
        assert server.push(protocol.contribution(lease, vector, final=False)).accepted
        more = {**in_process_driver.OF_THE_POOL, "workers": [WorkerSlot("w0").describe()], **changes}
        found = Progress(settings, 0.0).summary(server.status(), "interrupted", more)
    finally:
        server.close()
    assert found["leases"][0]["curve"], "a lease with a learning curve"
    assert found["update_ms"]
    return found


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_directory.prepare(tmp_path / "run", resolve("smoke"))
    run_directory.write_summary(tmp_path / "run", summary(tmp_path / "server"))
    found = status_of(tmp_path / "run", capsys)
    check(found, "training")
    for measurements in ([], [Measurement(10, 0.25)]):
        history = History(measurements)
        check({**found, "early_stopping": history.describe(patience=1)}, "training")


def test_the_table_for_people_has_no_blanks_at_its_end_and_prints_a_command_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a directory with a name that does not fit into the rest of a line of 80 columns" / "run"
    run_directory.prepare(run, resolve("smoke"))
    run_directory.write_summary(run, summary(tmp_path / "server"))
    assert main(["status", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert lines[-1] == f"next      continue with: leap-dist train --run-dir '{run}' --resume"


def test_an_evaluation_and_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_process_driver.install(monkeypatch)
    write_part(tmp_path / "data", "mnist")
    settings = {
        "preset": "smoke", "tasks": "multi-cv", "games": ("mnist",), "data_dir": str(tmp_path / "data"),
        "task_steps": 64, "worker.device": "cpu", "worker.precision": "float32",
    }  # fmt: skip
    leap_dist.evaluate({"scratch": "scratch"}, settings, seeds=1, out=tmp_path / "comparison", progress=False)
    evaluation = status_of(tmp_path / "comparison", capsys)
    check(evaluation, "evaluation")
    (lease,) = summary(tmp_path / "server")["leases"]
    check({**evaluation, "leases": [{**lease, "arm": "scratch", "seed": 0}]}, "evaluation")

    given = {"tasks": "multi-cv", "data_dir": str(tmp_path / "data")}
    made = plan.make(
        preset="smoke", given=given, arms=["none", "leap"], groups=["mnist"], seeds=1, of_arms={}, test_steps=None
    )
    made.study.write(tmp_path / "study")
    check(status_of(tmp_path / "study", capsys), "study")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": "sleeping"}, "is not valid under any"),
        ({"agent_steps": -1}, "is not valid under any"),
        ({"agent_steps": "many"}, "is not valid under any"),
        ({"news": 1}, "Additional properties"),
        ({"workers": [{**WorkerSlot("w0").describe(), "mood": "good"}]}, "Additional properties"),
    ],
)
def test_what_the_schema_does_not_describe_is_noticed(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    spoilt = {**summary(tmp_path / "server"), **change}
    with pytest.raises(jsonschema.ValidationError, match=message):
        check(spoilt, "training")


def test_every_field_is_described() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for part in parts(SCHEMA):
        for name, field in part.get("properties", {}).items():
            assert field.get("description", "").endswith("."), name


def test_the_fields_that_the_page_uses_exist() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text().partition("## Status for programs")[2].partition("\n## ")[0]
    used = set(re.findall(r"[(' ]\.([a-z]\w+)", text))
    assert len(used) >= 5
    workers = KINDS["training"]["properties"]["workers"]["items"]["properties"]
    assert used <= {*KINDS["training"]["properties"], *workers}
