"""How the tests call the launch scripts: with no cloud's tool on PATH, mostly through --dry_run."""

import subprocess
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"
WHERE = ["--name=reader", "--zone=us-east5-a"]
WORKDIR = "gs://bucket/runs/a b"
TRAIN = ["--", "train", "--config=configs/stage2.py:llama31_8b", f"--workdir={WORKDIR}"]
ON_GKE = ["create", "--name=reader", "--image=i/x:1"]
XPK = ["--cluster=c", "--name=a", "--type=v5p-128"]
AWKWARD = """--a="b c" $HOME $(X) $$ 'd' \\e @NAME@ \t& ; *"""
"""A value that every shell, YAML and Kubernetes would like to change."""


def run(
    script: str, *args: str, path: str = "/usr/bin:/bin", **env: str
) -> subprocess.CompletedProcess:
    """Returns the finished script."""
    return subprocess.run(
        [LAUNCH / script, *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": path, **env},
    )


def lines(script: str, *args: str) -> list[str]:
    """Returns the commands that a dry run prints, each on one line."""
    end = args.index("--") if "--" in args else len(args)
    done = run(script, *args[:end], "--dry_run", *args[end:])
    assert done.returncode == 0, done.stderr
    return unbroken(done.stdout)


def unbroken(printed: str) -> list[str]:
    """Returns the lines of a text, those together that a shell reads as one."""
    return printed.replace(" \\\n    ", " ").splitlines()


def words(line: str) -> list[str]:
    """Returns what a shell makes of a printed command."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


def value(printed: list[str], flag: str) -> str:
    """Returns the value of the one word that is this flag."""
    (found,) = [word for word in printed if word.startswith(f"{flag}=")]
    return found.removeprefix(f"{flag}=")
