"""The Slurm launcher: its script and what it reads, always; a real single-node Slurm where its packages are installed."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from strata import ConfigError, StrataError
from trainer.metrics import read_metrics
from trainer.sweep import Arm, Experiment, RunOf, Scale, slurm, slurm_task
from trainer.sweep.ledger import Ledger, by_run
from trainer.sweep.place import Place
from trainer.sweep.plan import make_plan
from trainer.sweep.reading import Source, read


@pytest.fixture
def sweep(acted):
    """The place and a function to the plan of the small experiment with acted runs."""
    return Place("runs", "small-smoke"), lambda: make_plan(read("experiment.py"), "smoke")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Commands that answer what a test tells them to, and write down how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def answer(name, text="", code=0):
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $@" >> {folder}/calls\ncat <<"END"\n{text}\nEND\nexit {code}\n')
        path.chmod(path.stat().st_mode | stat.S_IEXEC)

    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    answer.calls = lambda: (folder / "calls").read_text().splitlines()
    return answer


# ---- texts


def test_the_script_is_one_array_that_is_warned_requeued_and_appends(place):
    text = slurm.script(Place("runs", "x"), Path("tasks.jsonl"), 6, 2, {"partition": "gpu", "gres": "gpu:1"})
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for wanted in (
        "--array=0-5%2", "--signal=B:USR1@120", "--requeue", "--open-mode=append", "--partition=gpu", "--gres=gpu:1",
        f"--chdir={os.getcwd()}",
    ):  # fmt: skip
        assert f"#SBATCH {wanted}" in lines
    last = [line for line in lines if line and not line.startswith("#")]
    assert len(last) == 1 and last[0].startswith("exec ") and last[0].endswith('tasks.jsonl "$SLURM_ARRAY_TASK_ID"')
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_two_sweeps_have_jobs_of_two_names(place):
    assert slurm.job_name(Place("runs", "x")) != slurm.job_name(Place("other", "x"))
    assert slurm.job_name(Place("runs", "x")) == slurm.job_name(Place(str(place / "runs"), "x"))


@pytest.mark.parametrize("name", ["array", "signal", "requeue", "output", "job_name", "open-mode"])
def test_options_that_the_sweep_needs_for_itself_are_refused(name):
    with pytest.raises(ConfigError, match="sets this itself"):
        slurm.check_options({name: "1"})


def test_other_options_are_passed_on_and_lines_cannot_be_smuggled_in():
    assert slurm.check_options({"cpus_per_task": "4", "mem": "8G"}) == {"cpus-per-task": "4", "mem": "8G"}
    for name, value in (("mem", "1\n#SBATCH --wrap=x"), ("a b", "1"), ("", "1")):
        with pytest.raises(ConfigError, match="not an option"):
            slurm.check_options({name: value})


@pytest.mark.parametrize(
    ("options", "starts"),
    [({}, False), ({"ntasks": "1", "nodes": "1"}, False), ({"ntasks": "2"}, True), ({"nodes": "2-4"}, True)]
    + [({"nodes": "1", "ntasks-per-node": "8"}, True)],
)
def test_srun_starts_a_run_of_several_processes(sweep, fake, options, starts):
    place, plan = sweep
    fake("sbatch", "77")
    slurm.submit(place, plan().runs[:1], 1, options)
    task = json.loads((place.path / "slurm" / "tasks-0.jsonl").read_text())
    assert (task["command"][0] == "srun") == starts


def test_what_slurm_answers_is_read_and_the_rest_is_left_out():
    assert slurm.parse_sbatch("123\n") == "123" and slurm.parse_sbatch("123;cluster\n") == "123"
    with pytest.raises(StrataError, match="not a job id"):
        slurm.parse_sbatch("Submitted batch job 123")
    queue = "12|0|RUNNING\n12|1|PENDING\n\nslurm_load_jobs error\n13|N/A|PENDING\n12|2|COMPLETING\n"
    assert slurm.parse_squeue(queue) == {("12", 0): "RUNNING", ("12", 1): "PENDING", ("12", 2): "COMPLETING"}
    accounts = (
        "12_0|COMPLETED|0:0\n12_0.batch|COMPLETED|0:0\n12_1|CANCELLED by 0|0:15\n12_[2-5]|PENDING|0:0\n12_6|TIMEOUT|0:0\n"
    )
    assert slurm.parse_sacct(accounts) == {
        ("12", 0): "COMPLETED (exit 0:0)", ("12", 1): "CANCELLED (exit 0:15)", ("12", 6): "TIMEOUT (exit 0:0)",
    }  # fmt: skip


# ---- submitting, with commands that only answer


def test_what_is_missing_is_submitted_once(sweep, fake, capsys):
    place, plan = sweep
    fake("sbatch", "77")
    fake("squeue")
    assert slurm.launch(place, plan(), 2, {"partition": "main"}, plan, wait=False) == 0
    tasks = [json.loads(line) for line in (place.path / "slurm" / "tasks-0.jsonl").read_text().splitlines()]
    assert [task["run"] for task in tasks] == [run.directory for run in plan().runs]
    assert "submitted job 77: 4 runs, 2 at a time" in capsys.readouterr().out
    fake("squeue", "77|0|RUNNING\n77|1|PENDING\n77|2|PENDING\n77|3|PENDING")
    assert slurm.launch(place, plan(), 2, {}, plan, wait=False) == 0
    assert sum(call.startswith("sbatch") for call in fake.calls()) == 1
    fake("squeue", "77|1|PENDING\n77|3|PENDING")
    fake("sbatch", "78")
    assert slurm.launch(place, plan(), 2, {}, plan, wait=False) == 0
    again = [json.loads(line)["run"] for line in (place.path / "slurm" / "tasks-1.jsonl").read_text().splitlines()]
    assert again == [plan().runs[0].directory, plan().runs[2].directory]
    assert slurm.queued_runs(place).keys() == {plan().runs[1].directory, plan().runs[3].directory}


def test_a_run_is_submitted_when_the_one_that_it_starts_from_has_finished(sweep, fake, capsys):
    arms = [Arm("student", {"train.teacher.run": RunOf("donor")}), Arm("donor", {"optimizer.direction.learning_rate": 1e-2})]
    found = Experiment(name="small", config="small.py", arms=arms, scales={"smoke": Scale(seeds=1)})
    place, plan = sweep[0], lambda: make_plan(Source(found, Path("experiment.py"), ""), "smoke")
    fake("sbatch", "77")
    fake("squeue")
    assert slurm.launch(place, plan(), 2, {}, plan, wait=False) == 0
    assert "1 runs start from runs of these" in capsys.readouterr().out
    donor = next(run for run in plan().runs if run.arm == "donor")
    submitted = [json.loads(line)["arm"] for line in (place.path / "slurm" / "tasks-0.jsonl").read_text().splitlines()]
    assert submitted == ["donor"]
    subprocess.run(place.command(donor), check=True)
    assert slurm.launch(place, plan(), 2, {}, plan, wait=False) == 0
    submitted = [json.loads(line)["arm"] for line in (place.path / "slurm" / "tasks-1.jsonl").read_text().splitlines()]
    assert submitted == ["student"]


def test_a_start_whose_task_is_gone_is_closed_with_slurms_reason(sweep, fake):
    place, plan = sweep
    fake("sbatch", "77")
    fake("squeue")
    fake("sacct", "77_0|NODE_FAIL|0:0")
    run = plan().runs[0]
    place.ledger.append("start", run=run.directory, arm=run.arm, seed=0, stage="compare", slot={"slurm": "77_0"})
    assert slurm.launch(place, plan(), 1, {}, plan, wait=False) == 0
    end = [row for row in place.ledger.rows() if row["event"] == "end"][0]
    assert end["outcome"] == "lost" and end["message"] == "NODE_FAIL (exit 0:0)"


def test_a_refusal_by_slurm_is_passed_on_and_missing_commands_are_said(sweep, fake, monkeypatch):
    place, plan = sweep
    fake("sbatch", "", code=1)
    with pytest.raises(StrataError, match="sbatch --parsable .* failed"):
        slurm.launch(place, plan(), 1, {}, plan, wait=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch is not here"):
        slurm.launch(place, plan(), 1, {}, plan, wait=False)


# ---- a task


@pytest.fixture
def task(sweep, fake, monkeypatch):
    """A function that runs the task of the first run in a process of its own, and a handle to its place."""
    place, plan = sweep
    fake("sbatch", "77")
    fake("squeue")
    fake("scontrol")
    slurm.launch(place, plan(), 1, {}, plan, wait=False)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    script = place.runs / f"{plan().runs[0].directory}.script"

    def begin(words):
        script.write_text(words)
        command = [sys.executable, "-m", "trainer.sweep", "task", str(place.path / "slurm" / "tasks-0.jsonl"), "0"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    begin.place, begin.run = place, plan().runs[0]
    return begin


def ends(place):
    return [(row["outcome"], row["exit"], row["again"]) for row in place.ledger.rows() if row["event"] == "end"]


def test_a_task_runs_its_run_and_tries_again_after_a_crash(task, fake):
    assert task("crash finish").wait(60) == 0
    assert ends(task.place) == [("failed", 1, True), ("finished", 0, False)]
    assert not [call for call in fake.calls() if call.startswith("scontrol")]
    assert task("crash").wait(60) == 0  # it is finished: nothing is run


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_warned_task_saves_and_is_requeued_and_a_cancelled_one_is_not(task, fake, number, requeued):
    child = task("hang")
    times = task.place.runs / "times.jsonl"
    deadline = time.monotonic() + 30
    while not times.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    child.send_signal(number)
    assert child.wait(60) == 75
    calls = [call for call in fake.calls() if call.startswith("scontrol")]
    assert calls == (["scontrol requeue 77_0"] if requeued else [])
    assert ends(task.place) == [("preempted", 75, requeued)]
    assert task("finish").wait(60) == 0 and ends(task.place)[-1] == ("finished", 0, False)


def test_a_task_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "tasks").write_text("{}\n")
    with pytest.raises(ConfigError, match="has 1 tasks, none of number 3"):
        slurm_task.main([str(tmp_path / "tasks"), "3"])
    with pytest.raises(ConfigError, match="usage"):
        slurm_task.main(["x"])


# ---- a real one


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


DAEMONS = [shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") for name in ("slurmctld", "slurmd")]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Slurm of one node, this machine, for the time of a test: no munge, no accounting, ports of its own."""
    controller, port = free_ports(2)
    host = socket.gethostname()
    state = tmp_path / "slurm"
    for name in ("ctld", "d"):
        (state / name).mkdir(parents=True)
    conf = state / "slurm.conf"
    conf.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=10
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SlurmctldPort={controller}
SlurmdPort={port}
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/d
SlurmctldPidFile={state}/ctld.pid
SlurmdPidFile={state}/d.pid
SlurmctldLogFile={state}/ctld.log
SlurmdLogFile={state}/d.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={len(os.sched_getaffinity(0))} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))
    daemons = [
        subprocess.Popen([DAEMONS[0], "-D", "-c", "-f", str(conf)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
        subprocess.Popen([DAEMONS[1], "-D", "-f", str(conf)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
    ]
    try:
        deadline = time.monotonic() + 60
        while True:
            found = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
            if found.stdout.strip() == "idle":
                break
            logs = "".join(path.read_text()[-3000:] for path in state.glob("*.log"))
            assert time.monotonic() < deadline, found.stdout + found.stderr + logs
            time.sleep(0.5)
        yield
    finally:
        subprocess.run(["scancel", "--user", "root"], capture_output=True)
        deadline = time.monotonic() + 60  # slurmd ends when its last job has
        while subprocess.run(["squeue", "-h"], capture_output=True).stdout and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)


def rows(run):
    return [{key: value for key, value in row.items() if key != "timing"} for row in read_metrics(run / "metrics.jsonl")]


SWEEP = [
    "experiment.py", "--sweep.seed=0,1,2", "--slots=1", "--config.train.steps=400", "--config.checkpoint.every=50",
    "--config.evaluate.every=100",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(None in DAEMONS or not shutil.which("sbatch"), reason="Slurm is not installed (Debian: slurm-wlm)")
def test_six_runs_on_a_real_slurm_one_of_them_requeued_by_a_signal_end_with_equal_bits(place, command, begin, cluster):
    code, _, err = command(*SWEEP, "--runs=alone")
    assert code == 0, err
    wholes = {path.name: path for path in (place / "alone").glob("small-*")}
    assert len(wholes) == 6

    launcher = begin(*SWEEP, "--runs=slurm", "--launcher=slurm", "--wait", "--slurm.partition=main")
    ledger = Ledger(place / "slurm" / "sweeps" / "small-smoke")
    deadline = time.monotonic() + 300
    warned = None
    while warned is None:
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()
        for row in [row for row in ledger.rows() if row["event"] == "start"][1:2]:
            path = place / "slurm" / row["run"] / "metrics.jsonl"
            if path.is_file() and path.read_bytes().count(b"\n") > 40:
                warned = row
        time.sleep(0.02)
    # Refused while the controller still notes the start: "can not be altered now, try again later".
    while subprocess.run(["scancel", "--signal=USR1", "--batch", warned["slot"]["slurm"]]).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    out, err = launcher.communicate(timeout=420)
    assert launcher.returncode == 0, out + err
    history = [(row["event"], row.get("outcome")) for row in ledger.rows() if row.get("run") == warned["run"]]
    # Slurm itself sends the warning of `--signal` to a requeued task at times, which then goes round once more.
    again = [("start", None), ("end", "preempted")]
    assert history[:3] == [*again, ("start", None)] and history[-1] == ("end", "finished")
    assert history[:-2] == again * (len(history) // 2 - 1) and len(history) <= 8
    restarted = [row["slot"] for row in ledger.rows() if row["event"] == "start" and row["run"] == warned["run"]][1]
    assert restarted == {"slurm": warned["slot"]["slurm"], "restarts": 1}
    for name, run in wholes.items():
        assert rows(run) == rows(place / "slurm" / name)
    contents = [by_run(Ledger(place / runs / "sweeps" / "small-smoke").rows()) for runs in ("alone", "slurm")]
    assert contents[0] == contents[1]


@pytest.mark.slow
@pytest.mark.skipif(None in DAEMONS or not shutil.which("sbatch"), reason="Slurm is not installed (Debian: slurm-wlm)")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two processes need two processors")
def test_a_run_of_two_processes_inside_an_allocation_finds_itself_through_slurm(place, command, cluster):
    arguments = ["experiment.py", "--sweep.seed=0", "--arms=low", "--config.train.steps=20"]
    code, _, err = command(*arguments, "--runs=alone")
    assert code == 0, err
    options = ["--launcher=slurm", "--wait", "--slurm.ntasks=2", "--config.mesh.data=2"]
    code, out, err = command(*arguments, "--runs=slurm", *options, timeout=400)
    logs = "".join(path.read_text()[-2000:] for path in (place / "slurm").rglob("*.log"))
    assert code == 0, out + err + logs
    one, two = (next((place / runs).glob("small-*")) for runs in ("alone", "slurm"))
    assert one.name == two.name and json.loads((two / "environment.json").read_text())["processes"] == 2
    losses = [[row["loss"] for row in rows(run) if row["split"] == "val"] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(None in DAEMONS or not shutil.which("sbatch"), reason="Slurm is not installed (Debian: slurm-wlm)")
def test_a_job_of_submitit_on_a_real_slurm_is_requeued_and_ends_with_equal_bits(place, command, begin, cluster):
    pytest.importorskip("submitit", reason="submitit is not installed (extra: sweep)")
    arguments = [*SWEEP, "--sweep.seed=0", "--arms=low"]
    arguments.remove("--sweep.seed=0,1,2")
    code, _, err = command(*arguments, "--runs=alone")
    assert code == 0, err
    options = ["--submitit.cluster=slurm", "--submitit.timeout_min=30", "--submitit.slurm_partition=main"]
    launcher = begin(*arguments, "--runs=slurm", "--launcher=submitit", *options)
    ledger = Ledger(place / "slurm" / "sweeps" / "small-smoke")
    deadline = time.monotonic() + 300
    started: list[dict] = []
    while not started or not (place / "slurm" / started[0]["run"] / "metrics.jsonl").is_file():
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()
        started = [row for row in ledger.rows() if row["event"] == "start"]
        time.sleep(0.05)
    run = started[0]["run"]
    while (place / "slurm" / run / "metrics.jsonl").read_bytes().count(b"\n") < 40:
        time.sleep(0.02)
    subprocess.run(["scancel", "--signal=USR2", started[0]["slot"]["job"]], check=True)  # as its time limit would
    out, err = launcher.communicate(timeout=420)
    logs = "".join(path.read_text() for path in (place / "slurm" / "sweeps").rglob("submitit/*/*_log.*"))
    assert launcher.returncode == 0, out + err + logs
    assert "Requeued" in logs
    ends = [(row["event"], row.get("outcome")) for row in ledger.rows() if row["event"] != "plan"]
    assert ends == [("start", None), ("end", "finished")], "to the launcher it is one attempt"
    assert rows(place / "alone" / run) == rows(place / "slurm" / run)
