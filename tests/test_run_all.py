"""run_all.sh on machines that lack something. The Python that it calls is a small stand-in that plays each of them."""
import os
import subprocess

import pytest
from common import ROOT

# answers like Python: packages are there once a file "packages" lies beside it; "-m venv" makes a .venv with pip
STAND_IN = """#!/bin/bash
here=$(dirname "$(realpath "$0")")
case "$*" in
    *find_spec*) [ -e "$here/packages" ] ;;
    *ensurepip*) [ ! -e "$here/no_ensurepip" ] ;;
    "-m pip --version") [ -e "$here/pip" ] ;;
    "-m pip install"*) [ ! -e "$here/../../offline" ] && touch "$here/packages" ;;
    "-m venv"*)
        echo "$*" >> "$here/log"
        [ ! -e "$here/no_venv" ] || exit 1
        rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; touch .venv/bin/pip
        case "$*" in *system-site*) touch .venv/bin/packages ;; esac ;;
    *) echo "$*" ;;
esac
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs run_all.sh beside a python3 that files in bin/ furnish."""
    (tmp_path / "bin").mkdir(), (tmp_path / "work").mkdir()
    (tmp_path / "bin/python3").write_text(STAND_IN)
    (tmp_path / "bin/python3").chmod(0o755)
    (tmp_path / "work/run_all.sh").write_text((ROOT / "run_all.sh").read_text())
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    command = ["bash", str(tmp_path / "work/run_all.sh")]
    return lambda *arguments: subprocess.run([*command, *arguments], capture_output=True, text=True)


def test_a_bare_machine_is_set_up_once(run, tmp_path):
    """A half-finished installation is finished; a broken .venv, without pip, is made anew."""
    (tmp_path / "work/offline").touch()
    failed = run("setup")
    assert failed.returncode == 2 and "run this again" in failed.stderr
    (tmp_path / "work/offline").unlink()
    assert "Installing" in run("setup").stdout and "Installing" not in run("setup").stdout
    for name in ("pip", "packages"):
        (tmp_path / "work/.venv/bin" / name).unlink()
    assert "Installing" in run("setup").stdout and (tmp_path / "work/.venv/bin/packages").exists()


def test_packages_of_the_system_are_used_through_a_venv(run, tmp_path):
    """So that .venv/bin/python, which the README names, is always there; also where the system lacks ensurepip."""
    for name in ("packages", "no_ensurepip"):
        (tmp_path / "bin" / name).touch()
    done = run("setup")
    assert done.returncode == 0 and "Installing" not in done.stdout and (tmp_path / "work/.venv/bin/python").exists()
    assert "--without-pip" in (tmp_path / "bin/log").read_text()
    for arguments, ran in (("--seed 3", "badsnn.py story --seed 3"), ("test -k lif", "tests -k lif"),
                           ("gtsrb --epochs 2", "badsnn.py attack --dataset gtsrb --epochs 2"),
                           ("gtsrb --results mine", "badsnn.py report --results mine")):
        assert ran in run(*arguments.split()).stdout


def test_what_cannot_be_repaired_is_said_in_one_line(run, tmp_path):
    (tmp_path / "bin/no_venv").touch()
    done = run("setup")
    assert done.returncode == 2 and "python3-venv" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "work/.venv").exists()
