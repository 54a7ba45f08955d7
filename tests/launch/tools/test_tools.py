"""What GKE and xpk themselves say of what the launch scripts print: schemas, xpk's own parser and
tables."""

import argparse
import copy
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from docker.utils import build
from xpk.core.docker_resources import parse_env_config
from xpk.core.system_characteristics import UserFacingNameToSystemCharacteristics
from xpk.parser.core import set_parser

from tests.launch.scripts import AWKWARD, LAUNCH, ON_GKE, TRAIN, XPK, lines, words

SCHEMA = yaml.safe_load((Path(__file__).parent / "jobset_schema.yaml").read_text())

# JobSet.

EVERYTHING = [
    "--topology=v5p:4x4x4",
    "--num_slices=2",
    "--spot",
    "--service_account=trainer",
    "--mount=pages:/data",
]
EVERYTHING += [f"--env=ODD={AWKWARD}", "--env=EMPTY=", "--grace=900"]


def jobset(*flags: str) -> dict:
    text = lines("gke_jobset.sh", *ON_GKE, *flags, *TRAIN)
    return yaml.safe_load("\n".join(text[: text.index("---")]))


def check(body: dict) -> None:
    """Raises ValidationError where the JobSet or the Job in it is none, or holds a field that does
    not exist."""
    jsonschema.validate(body, SCHEMA)
    for replicated in body["spec"]["replicatedJobs"]:
        spec = copy.deepcopy(replicated["template"]["spec"])
        # What JobSet itself writes into it.
        spec["template"]["spec"]["subdomain"] = body["metadata"]["name"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": spec}
        kubernetes_validate.validate(job, "1.31", strict=True)


@pytest.mark.parametrize(
    "flags",
    [EVERYTHING, ["--topology=v5e:2x2"], ["--topology=tpu7x:2x2x2", "--reservation=mine"]],
    ids=len,
)
def test_the_jobset_is_one(flags):
    check(jobset(*flags))


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ("spec", "maxRestarts", 3),
        ("spec failurePolicy", "maxRestarts", "3"),
        ("spec failurePolicy rules 0", "action", "Restart"),
        ("spec failurePolicy rules 0", "name", "not a name"),
        ("spec replicatedJobs 0 template spec", "completionMode", 1),
        (
            "spec replicatedJobs 0 template spec podFailurePolicy rules 1 onExitCodes",
            "values",
            ["1"],
        ),
        ("spec replicatedJobs 0 template spec template spec", "terminationGracePeriod", 600),
        (
            "spec replicatedJobs 0 template spec template spec",
            "terminationGracePeriodSeconds",
            "600",
        ),
        ("spec replicatedJobs 0 template spec template spec containers 0", "environment", []),
        ("spec replicatedJobs 0 template spec template spec volumes 0 csi", "read_only", True),
    ],
)
def test_the_check_would_see(path, key, value):
    body = jobset(*EVERYTHING)
    where = body
    for name in path.split():
        where = where[int(name) if name.isdigit() else name]
    where[key] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(body)


def systems() -> dict[str, object]:
    """Returns xpk's TPU slices of the kinds that we know, by topology as we write it."""
    kinds = {
        "tpu-v5-lite-podslice": "v5e",
        "tpu-v5p-slice": "v5p",
        "tpu-v6e-slice": "v6e",
        "tpu7x": "tpu7x",
    }
    return {
        f"{kinds[system.gke_accelerator]}:{system.topology}": system
        for system in UserFacingNameToSystemCharacteristics.values()
        if system.gke_accelerator in kinds and system.vms_per_slice * system.chips_per_vm > 1
    }


def test_every_slice_that_xpk_knows_has_its_hosts_chips_and_label():
    """All but eight v5e or v6e chips: xpk takes two machines of four of them, we one of eight; GKE
    has both."""
    program = (
        f'source {LAUNCH}/common.sh; for t in "$@"; do parse_topology $t; echo $kind $chips '
        "$hosts; done"
    )
    known = systems()
    assert {"v5e", "v5p", "v6e", "tpu7x"} == {topology.split(":")[0] for topology in known} and len(
        known
    ) > 500
    said = subprocess.run(
        ["bash", "-c", program, "common.sh", *known], capture_output=True, text=True, check=True
    )
    for (topology, system), line in zip(known.items(), said.stdout.splitlines(), strict=True):
        kind, chips, hosts = line.split()
        assert (
            topology.startswith(f"{kind}:")
            and int(chips) == system.vms_per_slice * system.chips_per_vm
        )
        if topology in ("v5e:2x4", "v6e:2x4"):
            assert hosts == "1"
        else:
            assert int(hosts) == system.vms_per_slice, topology
    for topology in ("v5e:4x4", "v5p:2x2x2", "v6e:4x4", "tpu7x:2x2x2"):
        pod = jobset(f"--topology={topology}")["spec"]["replicatedJobs"][0]["template"]["spec"][
            "template"
        ]["spec"]
        label = pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]
        assert label == known[topology].gke_accelerator


# xpk.


def parse(*flags: str) -> argparse.Namespace:
    """Returns what xpk's own parser makes of what xpk.sh prints."""
    (line,) = lines("xpk.sh", *XPK, *flags, *TRAIN)
    program, *arguments = words(line)
    assert program == "xpk"
    parser = argparse.ArgumentParser(exit_on_error=False)
    set_parser(parser)
    args, unknown = parser.parse_known_args(arguments)
    assert not unknown
    return args


@pytest.mark.parametrize(
    "flags",
    [
        ["--image=i"],
        [
            "--base_image=i",
            "--num_slices=2",
            "--zone=z",
            "--project=p",
            "--spot",
            "--priority=high",
        ],
        ["--image=i", "--reservation=r", "--storage=a", "--storage=b", "--restarts=3"],
    ],
    ids=len,
)
def test_xpk_takes_the_flags(flags):
    args = parse(*flags)
    given = dict(flag.lstrip("-").split("=", 1) for flag in flags if "=" in flag)
    assert args.num_slices == int(given.get("num_slices", 1)) and args.tpu_type == "v5p-128"
    assert args.termination_grace_period_seconds == "600" and args.max_restarts == given.get(
        "restarts", "10"
    )
    assert args.docker_image == given.get("image") and args.spot == ("--spot" in flags)
    assert args.storage == [flag.split("=")[1] for flag in flags if "--storage" in flag]


def test_xpk_reads_the_environment():
    args = parse("--image=i", "--env=XLA_FLAGS=--a=b c", "--env=B=")
    parse_env_config(args, {})
    assert args.env == {"XLA_FLAGS": "--a=b c", "B": ""}


def test_xpk_knows_the_types():
    for name in ("v5litepod-16", "v6e-16", "v5p-128", "tpu7x-128"):
        assert parse("--image=i", f"--type={name}").tpu_type == name


# Images.


def test_an_image_holds_the_code_and_nothing_large(tmp_path):
    """As docker's client, and xpk, read .dockerignore."""
    large = [
        "data/shard",
        "runs/a/checkpoints/1",
        "weights/a",
        ".venv/bin/python",
        ".venv-tpu/lib/a",
        ".git/objects/a",
    ]
    kept = [
        "alignvlm_jax/data/shards.py",
        "alignvlm_jax/weights/names.py",
        "configs/stage2.py",
        "launch/common.sh",
    ]
    kept += ["requirements.txt", "requirements-tpu.txt", "launch/Dockerfile"]
    for name in [*large, *kept, "alignvlm_jax/__pycache__/a.pyc"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = (LAUNCH.parent / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in text if line.strip() and not line.startswith("#")]
    found = {
        name for name in build.exclude_paths(str(tmp_path), patterns) if (tmp_path / name).is_file()
    }
    assert found == set(kept)
