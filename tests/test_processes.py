"""tools.processes: worker processes leave Ctrl-C to their parent, from their first moment on."""
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker
from pathlib import Path

from tools import cli, processes

ROOT = Path(__file__).parent.parent

CTRL_C_WHILE_STARTING = """
import os, signal, time
from tools.processes import WorkerPool

if __name__ == "__main__":
    pool = WorkerPool(2)
    futures = [pool.submit(abs, -1) for _ in range(2)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # here alone: the workers have been started
    while not all(future.done() for future in futures):
        os.killpg(0, signal.SIGINT)
        time.sleep(0.01)
    print(sum(future.result() for future in futures))
"""


def test_ctrl_c_while_workers_start_does_not_reach_them(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(CTRL_C_WHILE_STARTING)
    done = subprocess.run([sys.executable, script], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, start_new_session=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


def test_a_system_without_signal_masks(monkeypatch):
    """Windows."""
    monkeypatch.setattr(processes, "_HAS_MASKS", False)
    for name in ("pthread_sigmask", "SIG_BLOCK", "SIG_SETMASK"):
        monkeypatch.delattr(signal, name)
    monkeypatch.setattr(resource_tracker, "_HAVE_SIGMASK", False)
    monkeypatch.delattr(resource_tracker, "ensure_running")
    with processes.WorkerPool(1) as pool:
        assert pool.submit(abs, -1).result() == 1


def test_ctrl_c_while_an_object_is_freed(capsys):
    """What a destructor raises is dropped by Python; the command is stopped all the same."""
    class Freed:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def main(argv):
        freed = Freed()
        del freed
        for _ in range(500):
            time.sleep(0.01)

    assert cli.run(main, []) == 130
    assert capsys.readouterr().err == "stopped\n"
