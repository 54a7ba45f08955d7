"""The launch scripts through --dry_run, and babysit.sh with a cloud that takes its slice away."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
WHERE = ["--name=reader", "--zone=us-east5-a"]
TRAIN = ["--", "train", "--config=configs/stage2.py:llama31_8b", "--workdir=bucket/runs/a b"]


def run(script: str, *args: str, path: str = "/usr/bin:/bin", **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [LAUNCH / script, *args], capture_output=True, text=True, timeout=60, env={"PATH": path, **env}
    )


def lines(script: str, *args: str) -> list[str]:
    """What a dry run prints. No cloud's tool is on PATH."""
    done = run(script, *args, "--dry_run") if "--" not in args else run(
        script, *args[: args.index("--")], "--dry_run", *args[args.index("--") :]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# TPU VM.

CREATE = "gcloud compute tpus queued-resources create reader --node-id=reader"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--type=v5p-128"], "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --zone=us-east5-a"),
        (
            ["--type=v6e-256", "--spot", "--project=p"],
            "--accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e --spot --zone=us-east5-a --project=p",
        ),
        (["--type=v5litepod-32", "--runtime=mine"], "--accelerator-type=v5litepod-32 --runtime-version=mine"),
    ],
)
def test_create(flags, expected):
    (line,) = lines("tpu_vm.sh", "create", *WHERE, *flags)
    assert line.startswith(f"{CREATE} {expected}")
    assert ("--spot" in line) == ("--spot" in flags)


def test_setup_copies_installs_and_mounts():
    pack, copy, install = lines("tpu_vm.sh", "setup", *WHERE, "--bucket=pages")
    assert "git" in pack and "/tmp/reader.tgz" in pack
    assert copy == (
        "gcloud compute tpus tpu-vm scp /tmp/reader.tgz reader:alignvlm_jax.tgz --zone=us-east5-a --worker=all"
    )
    assert "--worker=all" in install
    for part in ("python3.11-venv", "tar xzf alignvlm_jax.tgz", "make PYTHON=python3.11 tpu-compiler", "gcsfuse"):
        assert part in install.replace("\\", "")


def test_run_is_detached_on_all_hosts_and_keeps_words_whole():
    (line,) = lines("tpu_vm.sh", "run", *WHERE, *TRAIN)
    assert "--worker=all" in line
    said = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout
    command = next(part for part in said.splitlines() if part.startswith("--command=")).removeprefix("--command=")
    assert "ALIGNVLM_AUTO_DISTRIBUTED=1 setsid nohup .venv/bin/python -m alignvlm_jax train " in command
    assert r"--workdir=bucket/runs/a\ b >run.log 2>&1 </dev/null &" in command


def test_run_ends_what_is_still_at_work(tmp_path):
    """The very text that the host's shell is given; the old process does not end of itself."""
    (line,) = lines("tpu_vm.sh", "run", *WHERE, *TRAIN)
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True).stdout
    command = next(part for part in said.split("\0") if part.startswith("--command=")).removeprefix("--command=")
    folder = tmp_path / "alignvlm_jax"
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    with subprocess.Popen(["sleep", "50"]) as old:
        (folder / "run.pid").write_text(str(old.pid))
        threading.Thread(target=old.wait).start()  # or it would stay a zombie
        assert subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=30).returncode == 0
        assert old.poll() == -signal.SIGTERM
    log = folder / "run.log"
    while not (log.exists() and log.read_text()):
        time.sleep(0.02)
    assert log.read_text().endswith("--workdir=bucket/runs/a b\n")
    assert (folder / "run.pid").read_text().strip() != str(old.pid)


def test_status_logs_delete():
    assert lines("tpu_vm.sh", "status", *WHERE) == [
        r"gcloud compute tpus queued-resources describe reader --format=value\(state.state\) --zone=us-east5-a"
    ]
    (logs,) = lines("tpu_vm.sh", "logs", *WHERE)
    assert "--worker=0" in logs and "run.log" in logs
    assert lines("tpu_vm.sh", "delete", *WHERE) == [
        "gcloud compute tpus queued-resources delete reader --force --quiet --zone=us-east5-a"
    ]


def test_health_tells_done_running_and_failed(tmp_path):
    """The very text that the host's shell is given, in a shell."""
    (line,) = lines("tpu_vm.sh", "health", *WHERE)
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True).stdout
    command = next(part for part in said.split("\0") if part.startswith("--command=")).removeprefix("--command=")
    folder = tmp_path / "alignvlm_jax"
    folder.mkdir()

    def health(log: str, pid: int) -> str:
        (folder / "run.log").write_text(log)
        (folder / "run.pid").write_text(str(pid))
        return subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    nobody = 2**22 + 1  # above every pid
    assert health("step 1\ndone: 100 steps, runs/a\n", nobody) == "done"
    assert health("step 1\n", os.getpid()) == "running"
    assert health("Traceback\n", nobody) == "failed"


# GKE, xpk, Slurm.


@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "accelerator"),
    [
        ("v5p:4x4x4", 16, 4, "tpu-v5p-slice"),
        ("v5e:2x4", 1, 8, "tpu-v5-lite-podslice"),
        ("v6e:4x4", 4, 4, "tpu-v6e-slice"),
    ],
)
def test_jobset(topology, hosts, chips, accelerator):
    text = lines(
        "gke_jobset.sh", "create", "--name=reader", f"--topology={topology}", "--image=i/x:1", "--spot", *TRAIN
    )
    assert text[-2:] == ["---", "kubectl apply --filename=-"]
    body = "\n".join(text)
    assert "@" not in re.sub(r"between @ and @", "", body)
    assert f"parallelism: {hosts}" in body and f"completions: {hosts}" in body
    assert f"google.com/tpu: {chips}" in body
    assert f"gke-tpu-accelerator: {accelerator}" in body and f"gke-tpu-topology: {topology.split(':')[1]}" in body
    assert 'cloud.google.com/gke-spot: "true"' in body and "maxRestarts: 10" in body
    command = re.search(r'command: \["bash", "-c", (".*")\]', body)[1]
    assert json.loads(command).endswith(r"--workdir=bucket/runs/a\ b")  # a JSON string is a YAML one


def test_jobset_on_demand_asks_for_no_spot_node():
    body = "\n".join(lines("gke_jobset.sh", "create", "--name=a", "--topology=v5p:2x2x1", "--image=i", *TRAIN))
    assert "spot" not in body
    assert lines("gke_jobset.sh", "delete", "--name=a") == ["kubectl delete jobset/a"]


def test_xpk():
    (line,) = lines(
        "xpk.sh", "--cluster=c", "--name=a", "--type=v5p-128", "--base_image=i", "--slices=2", "--zone=z", *TRAIN
    )
    assert line.startswith("xpk workload create --cluster=c --workload=a --tpu-type=v5p-128 --num-slices=2 ")
    assert "ALIGNVLM_AUTO_DISTRIBUTED=1" in line and "--zone=z" in line


def test_slurm_job(tmp_path):
    """The job's own text, run with a scheduler of shell functions."""
    *job, submit = lines("slurm_gpu.sh", "--nodes=3", "--gpus=4", "--partition=p", "--time=2-00:00:00", *TRAIN)
    assert submit == "sbatch"
    for option in ("nodes=3", "ntasks-per-node=1", "gpus-per-node=4", "partition=p", "requeue", "signal=TERM@120"):
        assert f"#SBATCH --{option}" in job
    assert job.index("#SBATCH --partition=p") < job.index("set -uo pipefail")
    for name, text in {
        "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> asked; fi',
        "srun": 'shift; SLURM_PROCID=2; export SLURM_PROCID; "$@"',
        "python": 'env | grep ALIGNVLM | sort; echo "$@"; echo "stopped; go on with: x" > slurm-77.log; exit 1',
    }.items():
        tool = tmp_path / (".venv/bin" if name == "python" else "bin") / name
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", "\n".join(job)], capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "77", "SLURM_NNODES": "3",
             "SLURM_JOB_NODELIST": "node[7-9]"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "ALIGNVLM_COORDINATOR=node7:20077",
        "ALIGNVLM_NUM_PROCESSES=3",
        "ALIGNVLM_PROCESS_ID=2",
        "-m alignvlm_jax train --config=configs/stage2.py:llama31_8b --workdir=bucket/runs/a b",
    ]
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


# babysit.sh.

# States are played back one a question; a host's health likewise.
CLOUD = """#!/bin/sh
echo "$*" | sed 's/--command=.*grep.*/HEALTH/; s/--command=.*nohup.*/START/; s/--command=.*make.*/INSTALL/' >> calls
next() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$*" in
    *describe*) state=$(next states)
        case "$state" in
            NONE) echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1 ;;
            BROKEN) echo "ERROR: (gcloud) token expired" >&2; exit 1 ;;
        esac
        echo "$state" ;;
    *run.pid*grep*|*grep*run.log*) next healths ;;
esac
exit 0
"""


@pytest.fixture
def cloud(tmp_path):
    """Returns babysit.sh's result and what it asked the cloud, given states and healths."""
    tool = tmp_path / "bin" / "gcloud"
    tool.parent.mkdir()
    tool.write_text(CLOUD)
    tool.chmod(0o755)

    def babysit(states: str, healths: str, *flags: str):
        (tmp_path / "states").write_text("\n".join(states.split()) + "\n")
        (tmp_path / "healths").write_text("\n".join(healths.split()) + "\n")
        sleep = tool.with_name("sleep")
        sleep.write_text("#!/bin/sh\n")
        sleep.chmod(0o755)
        done = subprocess.run(
            [LAUNCH / "babysit.sh", *WHERE, "--type=v5p-128", "--spot", *flags, *TRAIN],
            capture_output=True, text=True, timeout=60, cwd=tmp_path, env={"PATH": f"{tool.parent}:/usr/bin:/bin"},
        )  # fmt: skip
        words = {"create": "create", "delete": "delete", "START": "start", "INSTALL": "setup", "HEALTH": "health"}
        asked = (tmp_path / "calls").read_text().splitlines()
        return done, [word for call in asked for key, word in words.items() if key in call]

    return babysit


def test_a_slice_that_is_taken_away_is_rented_again(cloud):
    done, asked = cloud(
        "NONE WAITING_FOR_RESOURCES ACTIVE ACTIVE SUSPENDED PROVISIONING ACTIVE ACTIVE ACTIVE", "running running done"
    )
    assert done.returncode == 0, done.stderr
    assert asked == [
        "create", "setup", "start", "health",
        "delete", "create", "setup", "start", "health", "health", "delete",
    ]  # fmt: skip


def test_a_command_that_fails_again_and_again_is_given_up(cloud):
    done, asked = cloud("ACTIVE " * 6, "failed failed failed", "--max_failures=2")
    assert done.returncode == 1
    assert "the command failed 3 times" in done.stderr
    assert asked.count("start") == 3 and "delete" not in asked


def test_a_question_that_fails_starts_nothing(cloud):
    """The run may be at work: neither is another started beside it, nor another slice rented."""
    done, asked = cloud("ACTIVE ACTIVE BROKEN BROKEN ACTIVE", "running done")
    assert done.returncode == 0, done.stderr
    assert asked == ["setup", "start", "health", "health", "delete"]


def test_a_cloud_that_never_answered_is_given_up(cloud):
    done, asked = cloud("BROKEN", "")
    assert done.returncode == 1 and "token expired" in done.stderr
    assert asked == []


def test_no_more_slices_than_asked(cloud):
    done, asked = cloud("NONE SUSPENDED SUSPENDED", "", "--max_creates=2")
    assert done.returncode == 1 and "rented 2 slices, which is --max_creates" in done.stderr
    assert asked.count("create") == 2


def test_dry_run_of_a_round():
    text = lines("babysit.sh", *WHERE, "--type=v5p-128", "--spot", "--bucket=pages", *TRAIN)
    assert [line.split("tpus ")[1].split()[1] for line in text if "tpus" in line] == [
        "create", "describe", "scp", "ssh", "ssh", "ssh", "delete",
    ]  # fmt: skip


# Bad input.


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        ("tpu_vm.sh", ["make", *WHERE], "launch/tpu_vm.sh create --name=NAME"),
        ("tpu_vm.sh", ["create", "--zone=z", "--type=v5p-8"], "--name=... is missing"),
        ("tpu_vm.sh", ["create", *WHERE, "--type=v5p"], "--type is 'v5p'; it must be v5litepod-CHIPS"),
        ("tpu_vm.sh", ["create", *WHERE, "--typ=v5p-8"], "unknown flag --typ=v5p-8; flags: --name --zone"),
        ("tpu_vm.sh", ["create", *WHERE, "--spot=yes"], "unknown flag --spot=yes"),
        ("tpu_vm.sh", ["run", *WHERE], "no command after --"),
        ("gke_jobset.sh", ["create", "--name=a", "--image=i", "--topology=v5p:4x4", *TRAIN], "v5p has 3 dimensions"),
        ("gke_jobset.sh", ["create", "--name=a", "--image=i", "--topology=v5e:1x1", *TRAIN], "1 chips"),
        ("gke_jobset.sh", ["create", "--name=a", "--image=i", "--topology=h100", *TRAIN], "--topology is 'h100'"),
        ("gke_jobset.sh", ["status", "--name=A_b"], "--name is 'A_b'; Kubernetes takes"),
        (
            "xpk.sh",
            ["--cluster=c", "--name=a", "--type=v5p-8", "--base_image=i", "--slices=0", *TRAIN],
            "--slices is '0'",
        ),
        ("xpk.sh", [], "launch/xpk.sh --cluster=CLUSTER"),
        ("slurm_gpu.sh", ["--nodes=0", *TRAIN], "--nodes is '0'; it must be a whole number of at least 1"),
        ("slurm_gpu.sh", ["--nodes=1", "--name=a b", *TRAIN], "--name is 'a b'; it takes letters"),
        ("slurm_gpu.sh", ["--nodes=1", "--time=soon", *TRAIN], "--time is 'soon'"),
        ("babysit.sh", [*WHERE, "--type=v5p-8", "--every=never", *TRAIN], "--every is 'never'"),
    ],
)
def test_bad_input_has_status_2(script, args, message):
    done = run(script, *args)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("script", "args", "tool"),
    [
        ("tpu_vm.sh", ["status", *WHERE], "gcloud"),
        ("gke_jobset.sh", ["status", "--name=a"], "kubectl"),
        ("xpk.sh", ["--cluster=c", "--name=a", "--type=v5p-8", "--base_image=i", *TRAIN], "xpk"),
        ("slurm_gpu.sh", ["--nodes=1", *TRAIN], "sbatch"),
    ],
)
def test_a_tool_that_is_not_installed(tmp_path, script, args, tool):
    for name in ("bash", "cat", "dirname", "sed"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = run(script, *args, path=str(tmp_path))
    assert done.returncode == 1
    assert f"{tool} is not installed; --dry_run prints what it would be asked" in done.stderr
