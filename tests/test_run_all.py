"""run_all.sh on machines that lack something. The Python that it calls is a small stand-in that plays each of them."""
import os
import subprocess
from pathlib import Path

import pytest
from common import ROOT

# answers like Python: packages are there once a file "packages" lies beside it; "-m venv" makes a .venv with pip
STAND_IN = """#!/bin/bash
here=$(dirname "$(realpath "$0")")
case "$*" in
    *find_spec*) [ -e "$here/packages" ] ;;
    *version_info*) [ ! -e "$here/old" ] ;;
    *ensurepip*) [ ! -e "$here/no_ensurepip" ] ;;
    "-m pip --version") [ -e "$here/pip" ] ;;
    "-m pip install"*) echo installed >> "$here/log"; [ ! -e "$here/../../offline" ] && touch "$here/packages" ;;
    "-m venv"*)
        echo "$*" >> "$here/log"
        [ ! -e "$here/no_venv" ] || exit 1
        rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; touch .venv/bin/pip
        case "$*" in *system-site*) touch .venv/bin/packages ;; esac ;;
    *) echo "ran: $*" ;;
esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder with run_all.sh, and a folder in front of PATH with a python3 to be furnished."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "run_all.sh").write_text((ROOT / "run_all.sh").read_text())
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def run(machine, *arguments):
    return subprocess.run(["bash", str(machine / "work/run_all.sh"), *arguments], capture_output=True, text=True)


def test_a_bare_machine_is_set_up(machine):
    done = run(machine, "setup")
    assert done.returncode == 0 and "Installing" in done.stdout and (machine / "work/.venv/bin/packages").exists()
    again = run(machine, "setup")
    assert again.returncode == 0 and "Installing" not in again.stdout


def test_a_venv_without_pip_is_made_anew(machine):
    broken = machine / "work/.venv/bin"
    broken.mkdir(parents=True)
    (broken / "python").write_text(STAND_IN)
    (broken / "python").chmod(0o755)
    assert run(machine, "setup").returncode == 0 and (broken / "packages").exists()


def test_a_half_finished_installation_is_finished(machine):
    (machine / "work/offline").touch()
    failed = run(machine, "setup")
    assert failed.returncode == 2 and "run this again" in failed.stderr
    (machine / "work/offline").unlink()
    assert run(machine, "setup").returncode == 0


def test_packages_of_the_system_are_used_through_a_venv(machine):
    """So that .venv/bin/python, which the README names, is always there; also where the system lacks ensurepip."""
    for name in ("packages", "no_ensurepip"):
        (machine / "bin" / name).touch()
    done = run(machine, "setup")
    assert done.returncode == 0 and "Installing" not in done.stdout and (machine / "work/.venv/bin/python").exists()
    assert "--without-pip" in (machine / "bin/log").read_text()


@pytest.mark.parametrize("lacks, message", [("no_venv", "python3-venv"), ("old", "3.10 or newer")])
def test_what_cannot_be_repaired_is_said_in_one_line(machine, lacks, message):
    (machine / "bin" / lacks).touch()
    done = run(machine, "setup")
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not Path(machine / "work/.venv").exists()


def test_commands_and_options(machine):
    for arguments, ran in (((), "badsnn.py story"), (("--seed", "3"), "badsnn.py story --seed 3"),
                           (("gtsrb", "--epochs", "2"), "badsnn.py attack --dataset gtsrb --epochs 2"),
                           (("gtsrb", "--results", "my own"), "badsnn.py report --results my own"),
                           (("test", "-k", "lif"), "tests -k lif")):
        assert ran in run(machine, *arguments).stdout
