"""What the launch scripts refuse: wrong flags, commands and folders; and tools that are not
there."""

import shutil

import pytest

from tests.launch.scripts import ON_GKE, TRAIN, WHERE, XPK, run


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        ("tpu_vm.sh", ["make", *WHERE], "launch/tpu_vm.sh create --name=NAME"),
        ("tpu_vm.sh", ["create", "--zone=z", "--type=v5p-8"], "--name=... is missing"),
        (
            "tpu_vm.sh",
            ["create", *WHERE, "--type=v5p"],
            "--type is 'v5p'; it must be v5litepod-CHIPS",
        ),
        (
            "tpu_vm.sh",
            ["create", *WHERE, "--typ=v5p-8"],
            "unknown flag --typ=v5p-8; flags: --name --zone",
        ),
        ("tpu_vm.sh", ["create", *WHERE, "--spot=yes"], "unknown flag --spot=yes"),
        (
            "tpu_vm.sh",
            ["create", *WHERE, "--type=tpu7x-8"],
            "the Cloud TPU API has no TPU7x; gke_jobset.sh",
        ),
        (
            "tpu_vm.sh",
            ["create", *WHERE, "--type=v5p-8", "--spot", "--reserved"],
            "exclude each other",
        ),
        ("tpu_vm.sh", ["setup", *WHERE, "--bucket=b"], "unknown flag --bucket=b"),
        ("tpu_vm.sh", ["run", *WHERE], "no command after --"),
        ("tpu_vm.sh", ["run", *WHERE, "--env=A", *TRAIN], "--env is 'A'; it must be NAME=VALUE"),
        ("tpu_vm.sh", ["run", *WHERE, "--env=1A=b", *TRAIN], "--env is '1A=b'"),
        ("tpu_vm.sh", ["run", *WHERE, "--grace=0", *TRAIN], "--grace is '0'"),
        (
            "tpu_vm.sh",
            ["run", *WHERE, "--", "inspect", "--data=a"],
            "'inspect' cannot be started on several hosts",
        ),
        (
            "tpu_vm.sh",
            ["run", *WHERE, "--", "report"],
            "'report' cannot be started on several hosts; these can: train",
        ),
        ("gke_jobset.sh", [*ON_GKE, "--topology=tpu7x:4x4", *TRAIN], "tpu7x has 3 dimensions"),
        (
            "gke_jobset.sh",
            [*ON_GKE, "--topology=v5e:2x2", "--num_slices=2", *TRAIN],
            "--topology=v5e:2x2 is one host",
        ),
        (
            "gke_jobset.sh",
            [*ON_GKE, "--topology=v5e:4x4", "--mount=data", *TRAIN],
            "it must be BUCKET:/PATH",
        ),
        (
            "gke_jobset.sh",
            [*ON_GKE, "--topology=v5e:4x4", "--service_account=A b", *TRAIN],
            "a Kubernetes service",
        ),
        (
            "gke_jobset.sh",
            ["create", "--name=a", "--image=i", "--topology=v5p:4x4", *TRAIN],
            "v5p has 3 dimensions",
        ),
        (
            "gke_jobset.sh",
            ["create", "--name=a", "--image=i", "--topology=v5e:1x1", *TRAIN],
            "1 chips",
        ),
        (
            "gke_jobset.sh",
            ["create", "--name=a", "--image=i", "--topology=h100", *TRAIN],
            "--topology is 'h100'",
        ),
        ("gke_jobset.sh", ["status", "--name=A_b"], "--name is 'A_b'; Kubernetes takes"),
        (
            "xpk.sh",
            ["--cluster=c", "--name=a", "--type=v5p-8", "--base_image=i", "--num_slices=0", *TRAIN],
            "--num_slices is '0'",
        ),
        ("xpk.sh", [*XPK, *TRAIN], "one of --image and --base_image is needed"),
        ("xpk.sh", [*XPK, "--image=i", '--env=A="b"', *TRAIN], "xpk takes no"),
        ("xpk.sh", [], "launch/xpk.sh --cluster=CLUSTER"),
        (
            "slurm_gpu.sh",
            ["--nodes=0", *TRAIN],
            "--nodes is '0'; it must be a whole number of at least 1",
        ),
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
    "script", ["babysit.sh", "gke_jobset.sh", "local.sh", "slurm_gpu.sh", "tpu_vm.sh", "xpk.sh"]
)
def test_help_is_no_error(script):
    done = run(script, "--help")
    assert done.returncode == 0 and f"launch/{script} " in done.stderr


ON_HOSTS = {
    "tpu_vm.sh": ["run", *WHERE],
    "babysit.sh": [*WHERE, "--type=v5p-16"],
    "gke_jobset.sh": [*ON_GKE, "--topology=v5p:2x2x2"],
    "xpk.sh": [*XPK, "--image=i"],
}


@pytest.mark.parametrize("script", ON_HOSTS)
@pytest.mark.parametrize(
    "command",
    [
        ["train", "--workdir=runs/mine"],
        ["train", "--workdir", "/data/runs/mine"],
        ["train", "--workdir=gs://"],
        ["train", "--workdir=gs://bucket/a", "--workdir=runs/mine"],
        ["evaluate", "--checkpoint=runs/mine"],
    ],
)
def test_a_workdir_on_each_host_s_own_disk_is_refused(script, command):
    """Its checkpoints would each be of one host, and lost with it."""
    done = run(script, *ON_HOSTS[script], "--dry_run", "--", *command)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is each host's own disk; give gs://BUCKET/..." in done.stderr


@pytest.mark.parametrize("script", ON_HOSTS)
def test_a_folder_that_all_hosts_share_is_taken(script):
    shared = [*ON_HOSTS[script], "--shared_disk=/mnt/nfs/", "--dry_run", "--", "train"]
    assert run(script, *shared, "--workdir=/mnt/nfs/runs").returncode == 0
    assert run(script, *shared, "--workdir=/mnt/nfs2/runs").returncode == 2


def test_a_workdir_on_a_bucket_that_is_mounted_to_be_read_is_refused():
    flags = [
        "--topology=v5p:2x2x2",
        "--mount=pages:/data",
        "--shared_disk=/data",
        "--",
        "train",
        "--workdir=/data/a",
    ]
    done = run("gke_jobset.sh", *ON_GKE, *flags)
    assert done.returncode == 2 and "mounted read-only; give gs://pages/..." in done.stderr


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
    for name in ("bash", "cat", "dirname", "sed", "tail", "git"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = run(script, *args, path=str(tmp_path))
    assert done.returncode == 1
    assert f"{tool} is not installed; --dry_run prints what it would be asked" in done.stderr
