"""The launch scripts for GKE, xpk and Slurm through --dry_run.

What GKE and xpk themselves say of it, tests/launch/tools asks.
"""

import re
import subprocess

import pytest
import yaml

from alignvlm_jax import __main__ as main_lib
from tests.launch.scripts import (
    AWKWARD,
    LAUNCH,
    ON_GKE,
    TRAIN,
    WHERE,
    WORKDIR,
    XPK,
    lines,
    run,
    value,
    words,
)


def expand(text: str) -> str:
    """Returns what Kubernetes makes of a container's command or environment, where no variable is
    known."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else found[0], text)


def said_by(program: str, **env: str) -> list[str]:
    """Returns the words that a python in the place of ours is given by a shell's program."""
    python = 'python() { printf \'%s\\0\' "$@"; }; exec() { "$@"; }; export -f python; '
    done = subprocess.run(
        ["bash", "-c", python + program],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", **env},
    )
    return done.stdout.split("\0")[:-1]


# GKE.


def jobset(*flags: str, command: list[str] = TRAIN) -> dict:
    *body, rule, apply = lines("gke_jobset.sh", *ON_GKE, *flags, *command)
    assert rule == "---" and apply == "kubectl apply --filename=-"
    return yaml.safe_load("\n".join(body))


def job_of(jobset: dict) -> dict:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "accelerator"),
    [
        ("v5p:4x4x4", 16, 4, "tpu-v5p-slice"),
        ("v5e:2x4", 1, 8, "tpu-v5-lite-podslice"),
        ("v6e:4x4", 4, 4, "tpu-v6e-slice"),
        ("tpu7x:2x2x2", 2, 4, "tpu7x"),
    ],
)
def test_jobset(topology, hosts, chips, accelerator):
    body = jobset(f"--topology={topology}", "--spot")
    job = job_of(body)
    pod = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": chips}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
        "cloud.google.com/gke-spot": "true",
    }
    # One host needs no other, and `jax.distributed` would ask for them.
    assert pod["containers"][0]["env"] == [
        {"name": "ALIGNVLM_AUTO_DISTRIBUTED", "value": str(int(hosts > 1))}
    ]
    assert pod["terminationGracePeriodSeconds"] == 600
    assert body["spec"]["failurePolicy"]["maxRestarts"] == 10


def test_jobset_keeps_words_and_environment_whole():
    command = [*TRAIN, f"--config.note={AWKWARD}", "--config.lines=a\nb"]
    body = jobset(
        "--topology=v5p:2x2x2", f"--env=ODD={AWKWARD}", "--env=LINES=a\nb", command=command
    )
    (container,) = job_of(body)["template"]["spec"]["containers"]
    *shell, program = container["command"]
    assert shell == ["bash", "-c"]
    assert said_by(expand(program)) == ["-m", "alignvlm_jax", *command[1:]]
    variables = {one["name"]: expand(one["value"]) for one in container["env"]}
    assert variables == {"ALIGNVLM_AUTO_DISTRIBUTED": "1", "ODD": AWKWARD, "LINES": "a\nb"}


def test_jobset_on_demand_asks_for_no_spot_node():
    assert "spot" not in str(jobset("--topology=v5p:2x2x1"))
    selector = job_of(jobset("--topology=v5p:2x2x1", "--reservation=mine"))["template"]["spec"][
        "nodeSelector"
    ]
    assert selector["cloud.google.com/reservation-name"] == "mine"


def test_jobset_with_a_service_account_and_a_bucket():
    template = job_of(
        jobset(
            "--topology=v5p:2x2x2",
            "--service_account=trainer",
            "--mount=pages:/data",
            "--mount=more:/more",
        )
    )["template"]
    pod = template["spec"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["serviceAccountName"] == "trainer"
    # A pod on its node's network has the node's identity.
    assert "hostNetwork" not in pod
    assert [
        (one["mountPath"], one["readOnly"]) for one in pod["containers"][0]["volumeMounts"]
    ] == [
        ("/data", True),
        ("/more", True),
    ]
    assert [one["csi"]["volumeAttributes"]["bucketName"] for one in pod["volumes"]] == [
        "pages",
        "more",
    ]


def test_jobset_of_several_slices_starts_only_where_the_pods_know_of_each_other():
    body = jobset("--topology=v6e:4x4", "--num_slices=3", "--grace=900", "--restarts=5")
    assert body["spec"]["replicatedJobs"][0]["replicas"] == 3 and job_of(body)["parallelism"] == 4
    assert body["spec"]["failurePolicy"]["maxRestarts"] == 5
    pod = job_of(body)["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 900
    program = expand(pod["containers"][0]["command"][2])
    assert said_by(program, MEGASCALE_NUM_SLICES="3")[-1] == f"--workdir={WORKDIR}"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        said_by(program)
    assert (
        failed.value.returncode == 2 and "MEGASCALE_NUM_SLICES is '', not 3" in failed.value.stderr
    )


def action(jobset: dict, status: int | None) -> str:
    """Returns what the set does when a pod ends with a status, or is preempted (None).

    As the Job controller (pod_failure_policy.go) and JobSet's (failure_policy.go) read it: the
    first rule that fits; a Job that fails for another reason than its podFailurePolicy has the
    reason BackoffLimitExceeded.
    """
    reason = "BackoffLimitExceeded"
    message = "Job has reached the specified backoff limit"
    for index, rule in enumerate(job_of(jobset)["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        conditions = rule.get("onPodConditions", [])
        if codes and status in codes["values"]:
            message = f"Container alignvlm for pod default/a failed with exit code {status}"
        elif conditions and status is None:
            message = f"Pod default/a has condition {conditions[0]['type']}"
        else:
            continue
        reason = "PodFailurePolicy"
        message = f"{message} matching {rule['action']} rule at index {index}"
        break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(
            re.search(pattern, message) for pattern in patterns
        ):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (None, "RestartJobSetAndIgnoreMaxRestarts"),
        (143, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, "FailJobSet"),
        (2, "FailJobSet"),
        (70, "RestartJobSet"),
        (75, "RestartJobSet"),
        (134, "RestartJobSet"),
        (137, "RestartJobSet"),
    ],
)
def test_what_starts_a_jobset_again(status, expected):
    """A preemption is not counted, a lost host and a stall are, and wrong input is not tried ten
    times."""
    assert action(jobset("--topology=v5p:2x2x2"), status) == expected


def test_logs_are_those_of_the_first_host_of_the_first_slice():
    (line,) = lines("gke_jobset.sh", "logs", "--name=a")
    assert value(words(line), "--selector").split(",") == [
        "jobset.sigs.k8s.io/jobset-name=a",
        "jobset.sigs.k8s.io/job-index=0",
        "batch.kubernetes.io/job-completion-index=0",
    ]
    assert lines("gke_jobset.sh", "delete", "--name=a") == ["kubectl delete jobset/a"]


def test_build_names_the_commit():
    build, push = lines("gke_jobset.sh", "build", "--image=i/x:1")
    assert re.search(r"--build-arg=COMMIT=([0-9a-f]{40}(-dirty)?|unknown) ", build)
    assert push == "docker push i/x:1"


# xpk.


def test_xpk():
    (line,) = lines(
        "xpk.sh",
        *XPK,
        "--base_image=i",
        "--num_slices=2",
        "--zone=z",
        "--storage=pages",
        "--spot",
        *TRAIN,
    )
    printed = words(line)
    assert line.startswith(
        "xpk workload create --cluster=c --workload=a --tpu-type=v5p-128 --num-slices=2 "
    )
    assert value(printed, "--termination-grace-period-seconds") == "600"
    assert value(printed, "--script-dir") == str(LAUNCH.parent)
    assert "--storage=pages" in printed and "--spot" in printed and "--zone=z" in printed
    # xpk starts again after 42 and from 127 on, and else not.
    again = {int(status) for status in value(printed, "--restart-on-exit-codes").split(",")} | {
        42,
        *range(127, 256),
    }
    assert {70, 75, 143} <= again and not {0, 1, 2} & again


def test_xpk_keeps_words_and_environment_whole():
    odd = AWKWARD.replace('"', "").replace("\\", "")
    (line,) = lines(
        "xpk.sh", *XPK, "--image=i", f"--env=ODD={odd}", *TRAIN, f"--config.note={AWKWARD}"
    )
    program = expand(value(words(line), "--command"))
    said = said_by('env() { shift; "$@"; }; ' + program)
    assert said == ["-m", "alignvlm_jax", *TRAIN[1:], f"--config.note={AWKWARD}"]
    assert expand(value(words(line), "--env")) == f"ODD={odd}"
    assert "--script-dir" not in line


def test_under_xpk_the_process_hears_sigterm(tmp_path):
    """xpk starts the command in a subshell and signals that one; the process has to take its
    place."""
    (line,) = lines("xpk.sh", *XPK, "--image=i", *TRAIN)
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\ntrap "echo saved; exit 143" TERM\necho up >up\nwhile true; do sleep 0.1; '
        "done\n"
    )
    python.chmod(0o755)
    program = f"""
        ({expand(value(words(line), "--command"))}) & PID=$!
        until [ -e up ]; do sleep 0.05; done
        kill -SIGTERM $!
        wait $PID
        echo status $?
    """
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=30,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout == "saved\nstatus 143\n"


# Slurm.


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [(143, 50, True), (75, 0, True), (75, 10, False), (1, 0, False), (2, 0, False), (0, 0, False)],
)
def test_slurm_job(tmp_path, status, restarts, again):
    """The job's own text, run with a scheduler of shell functions."""
    flags = [
        "--nodes=3",
        "--gpus=4",
        "--partition=p",
        "--time=2-00:00:00",
        "--qos=q",
        f"--env=ODD={AWKWARD}",
    ]
    *job, submit = lines("slurm_gpu.sh", *flags, *TRAIN)
    assert submit == "sbatch"
    options = (
        "nodes=3",
        "ntasks-per-node=1",
        "gpus-per-node=4",
        "partition=p",
        "qos=q",
        "requeue",
        "signal=TERM@600",
    )
    for option in options:
        assert f"#SBATCH --{option}" in job
    assert job.index("#SBATCH --partition=p") < job.index("set -uo pipefail")
    for name, text in {
        "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> asked; fi',
        "srun": 'shift; SLURM_PROCID=2; export SLURM_PROCID; "$@"',
        "python": f'env | grep ALIGNVLM | sort; echo "$@"; printf %s "$ODD" >odd; exit {status}',
    }.items():
        tool = tmp_path / (".venv/bin" if name == "python" else "bin") / name
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", "\n".join(job)], capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "77", "SLURM_NNODES": "3",
             "SLURM_JOB_NODELIST": "node[7-9]", "SLURM_RESTART_COUNT": str(restarts)},
    )  # fmt: skip
    assert done.returncode == status
    assert done.stdout.splitlines() == [
        "ALIGNVLM_COORDINATOR=node7:20077",
        "ALIGNVLM_NUM_PROCESSES=3",
        "ALIGNVLM_PROCESS_ID=2",
        f"-m alignvlm_jax train --config=configs/stage2.py:llama31_8b --workdir={WORKDIR}",
    ]
    assert (tmp_path / "odd").read_text() == AWKWARD
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 77\n" if again else "")


# All of them.


def test_the_scripts_know_which_commands_join():
    program = f"source {LAUNCH}/common.sh; printf '%s\\n' \"${{joining[@]}}\""
    said = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True
    ).stdout.splitlines()
    assert said == [f"{command} {flag}".strip() for command, flag in main_lib.JOINING.items()]
    analysis = ["--", "inspect", "--analysis=noise", f"--checkpoint={WORKDIR}"]
    assert run("tpu_vm.sh", "run", *WHERE, "--dry_run", *analysis).returncode == 0


def test_flags_are_taken_with_either_stroke():
    assert lines("xpk.sh", *XPK, "--base_image=i", *TRAIN) == lines(
        "xpk.sh", *XPK, "--base-image=i", *TRAIN
    )
    assert run("xpk.sh", *XPK, "--base-image=i", "--dry-run", *TRAIN).returncode == 0
