"""tpu_vm.sh: what it prints, and the very texts that the hosts' shells are given, in shells."""

import os
import runpy
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.scripts import AWKWARD, LAUNCH, TRAIN, WHERE, lines, run, unbroken, value, words

GCLOUD_FLAGS = {
    "create": "accelerator-type runtime-version node-id node-count node-prefix spot reserved "
    "network subnetwork internal-ips service-account valid-until-duration",
    "scp": "node worker batch-size internal-ip tunnel-through-iap",
    "ssh": "node worker batch-size internal-ip tunnel-through-iap command",
    "describe": "",
    "delete": "force",
}
"""Flags of `gcloud compute tpus queued-resources`, as
docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/ queued-resources says of each command
(release 528.0.0); `--zone` all take."""
EVERYWHERE = {"project", "quiet", "format", "zone"}
RENT = [
    "--type=v5p-128",
    "--reserved",
    "--network=n",
    "--subnetwork=s",
    "--internal_ips",
    "--service_account=a@b",
]
RENT += ["--valid_until_duration=6h", "--num_slices=2"]
CALLS = [
    ("create", *RENT, "--project=p"),
    ("create", "--type=v6e-16", "--spot"),
    ("setup", "--tunnel_through_iap"),
    ("setup", "--internal-ip"),
    ("run", "--env=A=b", *TRAIN),
    ("health", *TRAIN),
    ("status",),
    ("logs",),
    ("delete",),
]


def calls() -> list[tuple[str, set[str]]]:
    """Returns each command of gcloud that CALLS print, and its flags."""
    found = []
    for action, *flags in CALLS:
        for line in lines("tpu_vm.sh", action, *WHERE, *flags):
            if line.startswith("gcloud compute tpus queued-resources "):
                _, _, _, _, command, *rest = words(line)
                found.append(
                    (command, {word[2:].split("=")[0] for word in rest if word.startswith("--")})
                )
    return found


def test_every_flag_is_one_of_gcloud():
    found = calls()
    assert {command for command, _ in found} == set(GCLOUD_FLAGS)
    for command, flags in found:
        assert flags - EVERYWHERE <= set(GCLOUD_FLAGS[command].split()), command


def test_the_list_of_flags_is_that_of_the_gcloud_that_is_installed():
    gcloud = shutil.which("gcloud")
    tree = Path(gcloud).resolve().parents[1] / "data/cli/gcloud_completions.py" if gcloud else None
    if tree is None or not tree.exists():
        pytest.skip("no gcloud here")
    commands = runpy.run_path(str(tree))["STATIC_COMPLETION_CLI_TREE"]
    for name in ("compute", "tpus", "queued-resources"):
        commands = commands["commands"][name]
    for command, flags in GCLOUD_FLAGS.items():
        known = set(commands["commands"][command]["flags"])
        assert {f"--{flag}" for flag in flags.split()} <= known, command


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--type=v5p-128"],
            "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --node-id=reader",
        ),
        (["--type=v6e-256", "--spot"], "--runtime-version=v2-alpha-tpuv6e --node-id=reader --spot"),
        (
            ["--type=v5litepod-32", "--runtime=mine"],
            "--accelerator-type=v5litepod-32 --runtime-version=mine",
        ),
        (["--type=v5p-128", "--num_slices=2"], "--node-count=2 --node-prefix=reader"),
        (["--type=v5p-8", "--internal-ips", "--network=n"], "--internal-ips --network=n"),
    ],
)
def test_create(flags, expected):
    (line,) = lines("tpu_vm.sh", "create", *WHERE, *flags)
    assert line.startswith("gcloud compute tpus queued-resources create reader ")
    assert expected in line and line.endswith("--zone=us-east5-a")
    assert ("--spot" in line) == ("--spot" in flags)


# On the hosts.


@pytest.fixture
def host(tmp_path):
    """Returns a function that runs what a printed command tells a host, and the host's checkout."""
    python = tmp_path / "alignvlm_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)

    def tell(program: str, *args: str) -> str:
        if program:
            python.write_text(f"#!/bin/bash\n{program}\n")
            python.chmod(0o755)
        (line,) = lines("tpu_vm.sh", *args)
        done = subprocess.run(
            ["bash", "-c", value(words(line), "--command")],
            cwd=tmp_path,
            timeout=30,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    yield tell, python.parents[2]
    pid = python.parents[2] / "run.pid"
    if pid.exists():
        subprocess.run(
            ["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], stderr=subprocess.DEVNULL
        )


def wait_for(path: Path) -> str:
    until = time.monotonic() + 20
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < until, f"no {path.name}"
        time.sleep(0.02)
    return path.read_text().strip()


def test_run_is_detached_and_keeps_words_and_environment_whole(host):
    tell, folder = host
    program = (
        'printf "%s\\n" "$@" >said; printf %s "$ODD" >odd; echo "$ALIGNVLM_AUTO_DISTRIBUTED" >joins'
    )
    tell(program, "run", *WHERE, f"--env=ODD={AWKWARD}", *TRAIN)
    assert wait_for(folder / "run.status") == "0"
    assert (folder / "said").read_text().splitlines() == ["-m", "alignvlm_jax", *TRAIN[1:]]
    assert (folder / "odd").read_text() == AWKWARD
    assert (folder / "joins").read_text() == "1\n"


HEALTH = ("health", *WHERE, *TRAIN)


@pytest.mark.parametrize("status", [0, 1, 75, 143])
def test_health_says_the_status_of_any_command(host, status):
    """Not only `train` says that it is done."""
    tell, folder = host
    assert tell("", *HEALTH) == "health: absent"
    tell(f"echo working; sleep 0.3; exit {status}", "run", *WHERE, *TRAIN)
    assert tell("", *HEALTH) == "health: running"
    wait_for(folder / "run.status")
    assert tell("", *HEALTH) == f"health: status {status}"


def test_health_tells_another_command(host):
    tell, folder = host
    tell("echo up >up; sleep 20", "run", *WHERE, *TRAIN[:-1], "--workdir=gs://bucket/runs/other")
    wait_for(folder / "up")
    assert tell("", *HEALTH) == "health: other"
    assert tell("", *HEALTH[:3]) == "health: running"
    os.killpg(int((folder / "run.pid").read_text()), 9)
    time.sleep(0.2)
    # Neither done nor failed: this command was not started yet.
    assert tell("", *HEALTH) == "health: absent"


def test_a_run_whose_shell_was_killed_has_failed(host):
    tell, folder = host
    tell("echo up >up; sleep 20", "run", *WHERE, *TRAIN)
    wait_for(folder / "up")
    os.killpg(int(wait_for(folder / "run.pid")), 9)
    time.sleep(0.2)
    assert tell("", *HEALTH) == "health: status 137"


def test_a_number_that_another_process_has_after_a_restart_is_no_run(host):
    tell, folder = host
    with subprocess.Popen(["sleep", "20"], start_new_session=True) as stranger:
        (folder / "run.pid").write_text(str(stranger.pid))
        (folder / "run.command").write_text("")
        assert tell("", *HEALTH[:3]) == "health: status 137"
        tell("exit 0", "run", *WHERE, *TRAIN)
        assert stranger.poll() is None
        stranger.kill()


def test_run_lets_what_is_at_work_save_first(host):
    tell, folder = host
    saving = (
        'trap "sleep 1; echo saved >>saved; exit 143" TERM; echo up >>up; while true; do '
        "sleep 0.1; done"
    )
    tell(saving, "run", *WHERE, *TRAIN)
    wait_for(folder / "up")
    tell("exit 0", "run", *WHERE, "--grace=20", *TRAIN)
    assert (folder / "saved").read_text() == "saved\n"
    assert wait_for(folder / "run.status") == "0"


def test_a_run_that_the_machine_stops_says_so(host):
    """The signal reaches the whole group: the shell that writes the status down, too."""
    tell, folder = host
    tell('trap "exit 143" TERM; echo up >up; while true; do sleep 0.1; done', "run", *WHERE, *TRAIN)
    wait_for(folder / "up")
    os.killpg(int(wait_for(folder / "run.pid")), signal.SIGTERM)
    assert wait_for(folder / "run.status") == "143"


def test_run_ends_what_does_not_end_of_itself(host):
    tell, folder = host
    tell('trap "" TERM; echo $$ >old; while true; do sleep 0.1; done', "run", *WHERE, *TRAIN)
    old = int(wait_for(folder / "old"))
    tell("exit 0", "run", *WHERE, "--grace=1", *TRAIN)
    status = Path(f"/proc/{old}/stat")
    until = time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < until, "it is still at work"
        time.sleep(0.02)


def test_run_without_setup_starts_nothing(tmp_path):
    (line,) = lines("tpu_vm.sh", "run", *WHERE, *TRAIN)
    command = value(words(line), "--command")
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True).returncode
    assert not list(tmp_path.iterdir())


# Health over all hosts.


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("running running", "running on 2 hosts"),
        ("status-0 running", "running on 2 hosts"),
        ("status-0 status-0", "done"),
        ("status-0 status-70 running", "failed with status 70"),
        ("status-134 status-1 status-75", "failed with status 1"),
        ("running absent", "failed with status 137"),
        ("absent absent", "absent"),
        ("running other", "other"),
    ],
)
def test_health_is_the_worst_of_all_hosts(tmp_path, said, expected):
    gcloud = tmp_path / "gcloud"
    told = "".join(f"health: {word}\n" for word in said.split()).replace("-", " ")
    gcloud.write_text(f"#!/bin/sh\necho Using ssh batch size of 2 >&2\nprintf '{told}'\n")
    gcloud.chmod(0o755)
    done = run("tpu_vm.sh", "health", *WHERE, *TRAIN, path=f"{tmp_path}:/usr/bin:/bin")
    assert done.stdout == f"{expected}\n"


def test_health_of_hosts_that_do_not_answer(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text("#!/bin/sh\nexit 1\n")
    gcloud.chmod(0o755)
    assert run("tpu_vm.sh", "health", *WHERE, path=f"{tmp_path}:/usr/bin:/bin").returncode == 1


# setup.


@pytest.fixture
def checkout(tmp_path):
    """Returns a small checkout with the launch scripts, some of its files changed, and a `git` in
    it."""
    root = tmp_path / "checkout"
    shutil.copytree(LAUNCH, root / "launch")
    (root / "configs").mkdir()
    for name in ("configs/stage2.py", "gone.py", ".gitignore"):
        (root / name).write_text("data/\n" if name == ".gitignore" else "")

    def git(*args: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", root, *identity, *args], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=a")
    return root, git


def script(root: Path, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [root / "launch/tpu_vm.sh", *args], capture_output=True, text=True, cwd=cwd
    )


def test_setup_copies_new_files_and_the_commit(checkout, tmp_path):
    root, git = checkout
    done = script(root, "setup", *WHERE, "--dry_run", cwd=tmp_path)
    assert f"echo {git('rev-parse', 'HEAD')} >COMMIT" in done.stdout.replace("\\", "")
    (root / "configs/mine.py").write_text("new")
    (root / "gone.py").unlink()
    (root / "data").mkdir()
    (root / "data/shard").write_text("large")
    done = script(root, "setup", *WHERE[1:], f"--name=test{os.getpid()}", "--dry_run", cwd=tmp_path)
    pack, copy, install = unbroken(done.stdout)
    assert f"echo {git('rev-parse', 'HEAD')}-dirty >COMMIT" in install.replace("\\", "")
    archive = words(copy)[5]
    subprocess.run(words(pack), check=True, cwd=tmp_path)
    packed = subprocess.run(
        ["tar", "tzf", archive], capture_output=True, text=True, check=True
    ).stdout.split()
    Path(archive).unlink()
    assert "configs/mine.py" in packed and "launch/tpu_vm.sh" in packed
    assert "gone.py" not in packed and "data/shard" not in packed


def test_a_config_that_would_not_be_copied_is_refused(checkout):
    root, _ = checkout
    (root / "data").mkdir()
    (root / "data/mine.py").write_text("")
    for config, message in {
        "data/mine.py:a": "--config=data/mine.py is ignored by git",
        "configs/mine.py": "--config=configs/mine.py is not in ",
        "/tmp/mine.py": "--config=/tmp/mine.py is no path from the root",
        "stage9": "--config=configs/stage9.py is not in ",
    }.items():
        done = script(
            root,
            "run",
            *WHERE,
            "--dry_run",
            "--",
            "train",
            f"--config={config}",
            "--workdir=gs://b/a",
        )
        assert done.returncode == 2 and message in done.stderr


def test_a_config_may_be_named_as_on_any_machine(checkout):
    root, _ = checkout
    command = ["--dry_run", "--", "train", "--config=stage2:llama31_8b", "--workdir=gs://b/a"]
    done = script(root, "run", *WHERE, *command)
    assert done.returncode == 0, done.stderr
    assert "--config=stage2:llama31_8b" in done.stdout.replace("\\", "")
