"""A minute of `make soak`."""

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).with_name("soak.py")


def test_a_minute_of_good_bad_and_impatient_clients(tmp_path):
    log = tmp_path / "server.log"
    run = subprocess.run(
        [sys.executable, str(SOAK), "--seconds", "60", "--server-log", str(log)], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}\nthe server's last lines:\n{log.read_text()[-3000:]}"
    assert "failures    0" in run.stdout
