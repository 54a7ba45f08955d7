"""babysit.sh with a cloud that takes its slices away, and hosts that fail, hang and finish."""

import json
import subprocess

import pytest

from tests.launch.scripts import LAUNCH, TRAIN, WHERE, WORKDIR, lines

# States are played back one a question; what two hosts say, and their heartbeats, likewise. A word
# that ends in + is said for ever.
CLOUD = r"""#!/bin/bash
words="$*"
next() {
    local word
    word=$(head -n 1 "$1")
    if [[ "$word" == *+ ]]; then word=${word%+}; else sed -i 1d "$1"; fi
    echo "$word"
}
case "$words" in
    *"storage cat"*)
        echo "$words" >> reads
        [[ -s beats ]] || exit 1
        IFS=: read -r time step < <(next beats)
        for url in "${@:3}"; do printf '{"step": %s, "time": %s.5, "phase": "train"}' "$step" "$time"; done ;;
    *describe*)
        state=$(next states)
        case "$state" in
            NONE) echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1 ;;
            BROKEN) echo "ERROR: (gcloud) token expired" >&2; exit 1 ;;
        esac
        echo "$state" ;;
    *"echo health:"*)
        echo health >> calls
        said=$(next healths)
        [[ "$said" == none ]] && exit 1
        IFS=, read -ra hosts <<<"$said"
        for host in "${hosts[@]}"; do echo "health: ${host/-/ }"; done ;;
    *nohup*) echo start >> calls; echo "$words" >> starts ;;
    *" make "*) echo setup >> calls; [[ ! -e broken ]] ;;
    *" create "*) echo create >> calls; echo "$words" >> rents ;;
    *" delete "*) echo delete >> calls ;;
esac
"""
RUNNING = "running,running"


@pytest.fixture
def cloud(tmp_path):
    """Returns babysit.sh's result and what it asked the cloud, given states, healths and
    heartbeats."""
    for name, text in {
        "gcloud": CLOUD,
        "sleep": "#!/bin/sh\n",
        "tar": "#!/bin/sh\ncat >/dev/null\n",
    }.items():
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(text)
        tool.chmod(0o755)

    def babysit(
        states: str, healths: str, *flags: str, beats: str = "", command: list[str] = TRAIN
    ):
        for name, text in {"states": states, "healths": healths, "beats": beats}.items():
            (tmp_path / name).write_text("".join(f"{word}\n" for word in text.split()))
        done = subprocess.run(
            [LAUNCH / "babysit.sh", *WHERE, "--type=v5p-16", "--spot", *flags, *command],
            capture_output=True, text=True, timeout=60, cwd=tmp_path, env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
        )  # fmt: skip
        calls = tmp_path / "calls"
        return done, calls.read_text().split() if calls.exists() else []

    return babysit


def test_a_slice_that_is_taken_away_is_rented_again(cloud):
    done, asked = cloud(
        "NONE WAITING_FOR_RESOURCES ACTIVE ACTIVE SUSPENDED PROVISIONING ACTIVE ACTIVE ACTIVE",
        f"absent,absent {RUNNING} absent,absent {RUNNING} status-0,status-0",
    )
    assert done.returncode == 0, done.stderr
    once = ["health", "setup", "start", "health"]
    assert asked == ["create", *once, "delete", "create", *once, "health", "delete"]


def test_started_again_beside_a_run_that_is_at_work_it_joins_it(cloud):
    """It did setup and run, which ended the run that was at work."""
    done, asked = cloud("ACTIVE+", f"{RUNNING} {RUNNING} status-0,status-0")
    assert done.returncode == 0, done.stderr
    assert asked == ["health", "health", "health", "delete"]
    assert "at work already" in done.stdout


def test_a_run_that_it_joined_and_whose_input_is_wrong_is_not_started_again(cloud):
    done, asked = cloud("ACTIVE+", f"{RUNNING} status-1,status-1")
    assert done.returncode == 1 and "its input is wrong" in done.stderr
    assert asked == ["health", "health"]


def test_another_command_on_the_slice_is_let_alone(cloud):
    done, asked = cloud("ACTIVE+", "other,other")
    assert done.returncode == 1 and "another command is at work on reader" in done.stderr
    assert asked == ["health"]


def test_an_old_failure_does_not_keep_it_from_starting(cloud):
    """What the hosts say of an earlier start says nothing about this one: its input may have been
    mended."""
    done, asked = cloud("ACTIVE+", "status-1,status-1 status-0,status-0")
    assert done.returncode == 0, done.stderr
    assert asked == ["health", "setup", "start", "health", "delete"]


def test_an_evaluation_that_is_done_deletes_the_slice(cloud):
    """It prints no line that only training prints."""
    evaluate = ["--", "evaluate", f"--checkpoint={WORKDIR}"]
    done, asked = cloud("ACTIVE+", f"absent,absent {RUNNING} status-0,status-0", command=evaluate)
    assert done.returncode == 0, done.stderr
    assert asked == ["health", "setup", "start", "health", "health", "delete"]


@pytest.mark.parametrize("status", [1, 2])
def test_wrong_input_is_not_started_again(cloud, status):
    done, asked = cloud("ACTIVE+", f"absent,absent {RUNNING} status-{status},running")
    assert done.returncode == 1 and "its input is wrong" in done.stderr
    assert asked.count("start") == 1 and "delete" not in asked


@pytest.mark.parametrize(
    "failure", ["status-70,running", "status-75,status-75", "status-137,status-134"]
)
def test_a_command_that_fails_again_and_again_is_given_up(cloud, failure):
    done, asked = cloud("ACTIVE+", f"absent,absent {failure}+", "--max_failures=2")
    assert done.returncode == 1
    assert "the command failed 3 times" in done.stderr
    assert asked.count("start") == 3 and "delete" not in asked
    assert ("stalled" in done.stdout) == ("75" in failure)


def test_a_run_that_was_told_to_stop_goes_on_uncounted(cloud):
    done, asked = cloud(
        "ACTIVE+", "absent,absent" + " status-143,status-143" * 5 + " status-0,status-0"
    )
    assert done.returncode == 0, done.stderr
    assert asked.count("start") == 6


def test_failures_between_which_it_got_on_are_forgotten(cloud):
    healths = "absent,absent " + f"{RUNNING} status-70,status-70 " * 6 + "status-0,status-0"
    done, asked = cloud(
        "ACTIVE+", healths, "--max_failures=2", beats="1:10 2:20 3:30 4:40 5:50 6:60"
    )
    assert done.returncode == 0, done.stderr
    assert asked.count("start") == 7


def test_failures_at_the_same_step_are_not(cloud):
    """It is seen at work before each of them, and its heartbeat beats."""
    healths = "absent,absent " + f"{RUNNING} status-70,status-70 " * 6
    done, asked = cloud("ACTIVE+", healths, "--max_failures=2", beats="1:10 2:10 3:10 4:10 5:10")
    assert done.returncode == 1 and "failed 3 times" in done.stderr
    assert asked.count("start") == 3


def test_a_run_that_hangs_is_started_again(cloud, tmp_path):
    """The process is there, and its heartbeat stands still."""
    healths = f"absent,absent {' '.join([RUNNING] * 14)} status-0,status-0"
    done, asked = cloud(
        "ACTIVE+", healths, "--stall=300", beats=f"1:1 {'2:2 ' * 8} 3:3 4:4 5:5 6:6 7:7"
    )
    assert done.returncode == 0, done.stderr
    assert "no heartbeat for 360 s" in done.stdout
    assert asked.count("start") == 2 and asked.count("setup") == 1
    read = (tmp_path / "reads").read_text().splitlines()[0]
    assert read == f"storage cat {WORKDIR}/heartbeats/host-0.json {WORKDIR}/heartbeats/host-1.json"


def test_a_run_without_a_heartbeat_yet_is_let_alone(cloud):
    done, asked = cloud(
        "ACTIVE+", f"absent,absent {' '.join([RUNNING] * 30)} status-0,status-0", "--stall=60"
    )
    assert done.returncode == 0, done.stderr
    assert asked.count("start") == 1


def test_hosts_that_cannot_be_set_up_are_given_up(cloud, tmp_path):
    (tmp_path / "broken").touch()
    done, asked = cloud("ACTIVE+", "absent,absent+")
    assert done.returncode == 1 and "setting up failed 4 times" in done.stderr
    assert asked.count("setup") == 4 and "start" not in asked


def test_a_question_that_fails_starts_nothing(cloud):
    """The run may be at work: neither is another started beside it, nor another slice rented."""
    done, asked = cloud(
        "ACTIVE ACTIVE BROKEN BROKEN ACTIVE ACTIVE",
        f"absent,absent {RUNNING} none status-0,status-0",
    )
    assert done.returncode == 0, done.stderr
    assert asked == ["health", "setup", "start", "health", "health", "health", "delete"]


def test_a_cloud_that_never_answered_is_given_up(cloud):
    done, asked = cloud("BROKEN", "")
    assert done.returncode == 1 and "token expired" in done.stderr
    assert asked == []


def test_no_more_slices_than_asked(cloud):
    done, asked = cloud("NONE SUSPENDED SUSPENDED", "", "--max_creates=2")
    assert done.returncode == 1 and "rented 2 slices, which is --max_creates" in done.stderr
    assert asked.count("create") == 2


def test_flags_go_to_the_command_that_takes_them(cloud, tmp_path):
    flags = [
        "--num_slices=2",
        "--network=n",
        "--env=A=b c",
        "--env=D=e",
        "--grace=77",
        "--project=p",
    ]
    done, _ = cloud("NONE ACTIVE+", "absent,absent status-0,status-0", *flags)
    assert done.returncode == 0, done.stderr
    rent = (tmp_path / "rents").read_text()
    start = (tmp_path / "starts").read_text()
    assert (
        "--node-count=2" in rent
        and "--network=n" in rent
        and "--spot" in rent
        and "--project=p" in rent
    )
    assert r"A=b\\\ c\ D=e" in start and "timeout 77 " in start and "--project=p" in start


def test_dry_run_of_a_round():
    text = lines("babysit.sh", *WHERE, "--type=v5p-128", "--spot", *TRAIN)
    assert [line.split("queued-resources ")[1].split()[0] for line in text if "queued-resources" in line] == [
        "create", "describe", "ssh", "scp", "ssh", "ssh", "delete",
    ]  # fmt: skip
    assert json.dumps(TRAIN[-1])[1:-1].replace(" ", "") in text[-2].replace("\\", "").replace(
        " ", ""
    )
