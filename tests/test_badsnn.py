"""Section 3 end to end: training, resuming, metrics, the choice of Eq. 8, Table 1's row."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import badsnn
import runs
from common import ROOT, TINY, attack, prepared


def test_attack_end_to_end(workplace, capsys):
    result = attack("--v-thr-a", "1.0", "1.5", "--n-o", "40", "--epochs-o", "1")
    for key in ("dataset", "model", "width", "T", "n_train", "n_test", "epochs", "seed", "device", "seconds", "target", "poison_ratio",
                "n_poison", "q", "v_thr_t", "tau_t", "clean_ca", "base_ca"):
        assert key in result
    assert (result["n_train"], result["n_test"], result["width"], result["q"]) == (300, 100, 4, 8.0)
    assert [row["v_thr"] for row in result["rows"]] == [1.0, 1.5]
    for row in result["rows"]:
        assert {"tau", "ca", "target_rate", "asr_p", "asr_o", "asr_p_clean_model"} <= set(row)
        assert all(0 <= row[k] <= 100 for k in ("ca", "target_rate", "asr_p", "asr_p_clean_model"))
    assert result["rows"][0]["ca"] == result["base_ca"]
    out = capsys.readouterr().out
    assert "mal_acc" in out and "target_rate" in out and "clean model, same trigger" in out
    assert not list(workplace.rglob("*.tmp"))


def test_t_o_is_kept_and_read_again(workplace, capsys):
    """The U-Net's checkpoint gives the same trigger; its controls stand in the same row; Fig. 5's images are kept."""
    first = attack("--v-thr-a", "1.1", "--n-o", "60", "--epochs-o", "2")
    second = attack("--v-thr-a", "1.1", "1.2", "--n-o", "60", "--epochs-o", "2")
    row = first["rows"][0]
    if first["runs"][0]["t_o"]["n_blended"]:
        assert {"asr_o", "asr_o_clean_model", "l2_o", "linf_o", "psnr_o", "l2_p", "asr_p_faded"} <= set(row)
        assert np.load("results/digits/triggers.npz", allow_pickle=False)["t_o"].shape[1:] == (16, 16, 3)
    assert second["rows"][0] == row and second["runs"][0]["t_o"] == first["runs"][0]["t_o"]


def test_attack_on_events(workplace):
    badsnn.main(["attack", "--dataset", "ndigits", *TINY, "--v-thr-a", "1.1"])
    row = json.loads(Path("results/ndigits/attack.json").read_text())["rows"][0]
    assert row["asr_o"] is None and 0 <= row["asr_clip_only"] <= 100
    badsnn.main(["attack", "--dataset", "ndigits", *TINY, "--v-thr-a", "1.1", "--frames", "binary"])
    row = json.loads(Path("results/ndigits-binary/attack.json").read_text())["rows"][0]
    assert row["asr_clip_only"] == row["target_rate"], "clamped frames are not changed by the clip"
    badsnn.main(["report"])


def test_baselines_keep_their_contrast(workplace, monkeypatch):
    """The preset's loss of contrast belongs to BadSNN and the clean model; a baseline is trained, and recorded, without it."""
    data, s = prepared("--epochs", "1")
    seen, original = [], badsnn.augment
    monkeypatch.setattr(badsnn, "augment", lambda x, pad, flip, contrast, generator: (
        seen.append(contrast), original(x, pad, flip, contrast, generator))[1])
    for attack in ("badsnn", "badnets"):
        badsnn.train(data, s, attack)
    assert s.contrast > 0 and set(seen[:len(seen) // 2]) == {s.contrast} and set(seen[len(seen) // 2:]) == {0.0}


def test_resumed_equals_uninterrupted(workplace, monkeypatch):
    """Stopped after epoch 1 and started again, training ends with bit-identical weights."""
    data, s = prepared("--runs", "whole", "--epochs", "3")
    whole = badsnn.train(data, s, "badsnn").state_dict()
    s = replace(s, runs=Path("parts"))
    save = runs.write_checkpoint

    def save_then_die(*args, **state):
        save(*args, **state)
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(runs, "write_checkpoint", save_then_die)
        badsnn.train(data, s, "badsnn")
    resumed = badsnn.train(data, s, "badsnn").state_dict()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    again = badsnn.train(data, s, "badsnn").state_dict()        # finished: read, not trained
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_killed_run_goes_on(workplace, capsys):
    """kill -9 in the middle of a real process leaves a whole checkpoint, and the same command finishes the run."""
    command = [sys.executable, str(ROOT / "badsnn.py"), "attack", *TINY, "--epochs", "6", "--v-thr-a", "1.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(Path(".").glob("runs/digits/*.pt")) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (checkpoint,) = Path(".").glob("runs/digits/*.pt")
    epochs = len(torch.load(checkpoint, weights_only=True)["history"])
    assert 1 <= epochs < 6 and not Path("results").exists()
    data, s = prepared("--epochs", "6")
    badsnn.train(data, s)
    assert f"resumed after epoch {epochs}" in capsys.readouterr().out


def test_malicious_rows_are_target_samples_at_the_malicious_setting(workplace, monkeypatch):
    """What the network is shown in one step of dual-spike training: nominal rows at S_n, then D_t^p at S_t."""
    data, s = prepared("--epochs", "1", "--target", "3", "--v-thr-t", "1.4", "--tau-t", "0.7", "--no-augment", "--batch-size", "100")
    seen = []

    def spy(model, v_thr=None, tau=None):
        seen.append((v_thr, tau))
        return real(model, v_thr, tau)
    real = badsnn.neurons
    monkeypatch.setattr(badsnn, "neurons", spy)
    forward = badsnn.to_float
    batches = []
    monkeypatch.setattr(badsnn, "to_float", lambda x, s: (batches.append(x), forward(x, s))[1])
    badsnn.train(data, s, "badsnn")
    v_thr, tau = seen[0]
    assert v_thr.tolist() == pytest.approx([1.0] * 100 + [1.4] * 8) and tau.tolist() == pytest.approx([0.5] * 100 + [0.7] * 8)
    poisoned = badsnn.poison_indices(data.y_train, 3, s.poison_ratio, s.seed)
    allowed = data.x_train[poisoned]
    assert all(any(torch.equal(row, x) for x in allowed) for row in batches[0][100:])
    assert (data.y_train[poisoned] == 3).all()


def test_attack_success_rate_leaves_out_the_target_class():
    guess, labels = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 2])
    assert badsnn.attack_success_rate(guess, labels, target=0) == pytest.approx(33.33)


def test_asr_triggers_only_samples_of_other_classes(workplace):
    data, s = prepared()
    model, shown = badsnn.fresh_model(data, s), []
    badsnn.asr(model, data, s, 1.0, 0.5, lambda x: (shown.append(len(x)), x)[1])
    assert sum(shown) == (data.y_test != s.target).sum()
    with pytest.raises(ValueError, match="valid range"):
        badsnn.asr(model, data, s, 1.0, 0.5, lambda x: x + 1)


def test_choose_is_eq_8():
    rows = [dict(v_thr=v, ca=ca, target_rate=t, asr_p=s) for v, ca, t, s in
            [(1.0, 90, 0, 99), (1.05, 89, 1, 40), (1.1, 86, 5, 80), (1.15, 70, 20, 99), (1.2, 88, 90, 99)]]
    assert badsnn.choose(rows, base_ca=90, margin=5) == 1.1
    assert badsnn.choose(rows, base_ca=90, margin=0.5) is None
    rows[1]["asr_o"], rows[2]["asr_o"] = 100, 20             # two triggers count equally: 70 - 1 against 50 - 5
    assert badsnn.choose(rows, base_ca=90, margin=5) == 1.05
    rows[2]["asr_p_renormalized"] = 100                      # the better reading of T_p counts: 60 - 5 against 70 - 1, then 100 - 5
    assert badsnn.choose(rows, base_ca=90, margin=5) == 1.05
    rows[2]["asr_o"] = 100
    assert badsnn.choose(rows, base_ca=90, margin=5) == 1.1


def test_same_seed_same_model(workplace):
    first, second = (badsnn.train(*prepared("--runs", r, "--epochs", "1")).state_dict() for r in "ab")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_evaluation_in_bfloat16_and_float32_agree(workplace):
    """A trained network gives nearly all samples the same class in both. The data are not augmented, so that eight epochs are enough
    on any machine."""
    data, s = prepared("--epochs", "8", "--n-train", "1000", "--n-test", "297", "--width", "8", "--amp", "off", "--no-augment")
    model = badsnn.train(data, s)
    answers = []
    for amp in ("off", "on"):
        answers.append(badsnn.predict(model, data.x_test, replace(s, amp=amp), 1.0, 0.5))
    off, on = (badsnn.percentage(answer == data.y_test) for answer in answers)
    assert off > 30 and abs(on - off) <= 8
    assert len(answers[0].unique()) >= 5 and (answers[0] == answers[1]).float().mean() > 0.9
