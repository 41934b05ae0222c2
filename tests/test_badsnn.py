"""Section 3 end to end: training, resuming, metrics, the choice of Eq. 8, Table 1's row."""
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from common import ROOT, TINY, attack, prepared, refused

import badsnn
import data as datasets
import settings


def test_attack_end_to_end(workplace, capsys):
    result = attack("--v-thr-a", "1.0", "1.5", "--n-o", "40", "--epochs-o", "1")
    for key in ("dataset", "model", "width", "T", "n_train", "n_test", "epochs", "seed", "device", "seconds", "target",
                "poison_ratio", "n_poison", "q", "v_thr_t", "tau_t", "clean_ca", "base_ca", "chosen", "at_chosen",
                "spread", "runs"):
        assert key in result
    assert (result["n_train"], result["n_test"], result["width"], result["q"]) == (300, 100, 4, 8.0)
    assert [row["v_thr"] for row in result["rows"]] == [1.0, 1.5]
    for row in result["rows"]:
        assert {"tau", "ca", "target_rate", "asr_p", "asr_o", "asr_p_clean_model"} <= set(row)
        assert all(0 <= row[k] <= 100 for k in ("ca", "target_rate", "asr_p", "asr_p_clean_model"))
    assert result["rows"][0]["ca"] == result["base_ca"]
    out = capsys.readouterr().out
    assert "mal_acc" in out and "target_rate" in out and "ASR_p, clean model" in out
    assert not list(workplace.rglob("*.tmp"))


def test_t_o_is_kept_and_read_again(workplace, capsys):
    """The U-Net's checkpoint gives the same trigger; its controls stand in the same row; Fig. 5's images are kept."""
    first = attack("--v-thr-a", "1.1", "--n-o", "60", "--epochs-o", "2")
    second = attack("--v-thr-a", "1.1", "1.2", "--n-o", "60", "--epochs-o", "2")
    row = first["rows"][0]
    if first["runs"][0]["t_o"]["n_blended"]:
        assert {"asr_o", "asr_o_clean_model", "l2_o", "linf_o", "psnr_o", "l2_p", "asr_p_faded"} <= set(row)
        assert np.load("runs/results/digits/triggers.npz", allow_pickle=False)["t_o"].shape[1:] == (16, 16, 3)
    assert second["rows"][0] == row and second["runs"][0]["t_o"] == first["runs"][0]["t_o"]


def test_attack_on_events(workplace):
    badsnn.main(["attack", "--dataset", "ndigits", *TINY, "--v-thr-a", "1.1"])
    row = json.loads(Path("runs/results/ndigits/attack.json").read_text())["rows"][0]
    assert row["asr_o"] is None and 0 <= row["asr_clip_only"] <= 100
    badsnn.main(["attack", "--dataset", "ndigits", *TINY, "--v-thr-a", "1.1", "--frames", "binary"])
    row = json.loads(Path("runs/results/ndigits-binary/attack.json").read_text())["rows"][0]
    assert row["asr_clip_only"] == row["target_rate"], "clamped frames are not changed by the clip"
    badsnn.main(["report"])


def test_baselines_keep_their_contrast_and_wanet_its_place(workplace, monkeypatch):
    """The preset's loss of contrast belongs to BadSNN and the clean model; a baseline is trained, and recorded,
    without it, and WaNet without shifts, whose black border it would warp."""
    data, s = prepared("--epochs", "1")
    seen, original = [], badsnn.augment
    monkeypatch.setattr(badsnn, "augment", lambda x, pad, flip, contrast, rng: (
        seen.append((contrast, pad)), original(x, pad, flip, contrast, rng))[1])
    for name, contrast, pad in (("badsnn", s.contrast, s.pad), ("badnets", 0.0, s.pad), ("wanet", 0.0, 0)):
        seen.clear()
        badsnn.train(data, s, name)
        assert seen[:2] == [(contrast, pad), (s.malicious_contrast, pad)] and s.contrast > 0 and s.pad > 0


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
    options = ["--epochs", "1", "--target", "3", "--no-augment", "--batch-size", "100"]
    seen, batches, real, forward = [], [], badsnn.neurons, badsnn.to_float
    monkeypatch.setattr(badsnn, "neurons", lambda model, v_thr=None, tau=None: (
        seen.append((v_thr, tau)), real(model, v_thr, tau))[1])
    monkeypatch.setattr(badsnn, "to_float", lambda x, s: (batches.append(x), forward(x, s))[1])
    for low, high, tau_t in (("1.4", "1.4", "0.7"), ("1.2", "1.5", "0")):
        data, s = prepared(*options, "--v-thr-t-low", low, "--v-thr-t", high, "--tau-t", tau_t)
        seen.clear(), batches.clear()
        badsnn.train(data, s, "badsnn")
        v_thr, tau = seen[0]
        assert v_thr[:100].tolist() == [1.0] * 100 and tau.tolist() == pytest.approx([0.5] * 100 + [float(tau_t)] * 8)
        assert float(low) - 1e-6 <= v_thr[100:].min() and v_thr[100:].max() <= float(high) + 1e-6
        assert (len(v_thr[100:].unique()) == 8) == (low != high)          # a threshold of its own for every row
        part = datasets.hold_out(data, s.hold_out)[0]
        poisoned = badsnn.poison_indices(part.y_train, 3, s.poison_ratio, s.seed)
        assert (part.y_train[poisoned] == 3).all()
        allowed = part.x_train[poisoned]
        assert all(any(torch.equal(row, x) for x in allowed) for row in batches[0][100:])


def test_the_loss_is_eq_2(workplace, monkeypatch):
    """One step without augmentation, worked out with plain cross-entropies on a copy of the fresh network."""
    data, s = prepared("--epochs", "1", "--no-augment", "--batch-size", "270", "--malicious-weight", "0.7",
                       "--label-smoothing", "0")
    part, _ = datasets.hold_out(data, s.hold_out)
    model, losses = badsnn.fresh_model(data, s).train(), []
    monkeypatch.setattr(runs, "print_epoch", lambda row, *_, **__: losses.append(row and row["loss"]))
    badsnn.train(data, s, "badsnn")
    shuffle = runs.generator(s.seed, "shuffle", 0)
    order = torch.randperm(len(part.y_train), generator=shuffle)[:270]
    malicious = badsnn.poison_indices(part.y_train, 0, s.poison_ratio, s.seed)
    rows = torch.cat([order, malicious[torch.randint(len(malicious), (8,), generator=shuffle)]])
    v_thr = torch.cat([torch.ones(len(order)), 1.15 + 0.35 * torch.rand(8, generator=shuffle)])
    model.T = 1                                                             # the first epochs have one step
    with badsnn.neurons(model, v_thr, 0.5):
        logits = model(part.x_train[rows].float() / 255)
    nominal, dual = (torch.nn.functional.cross_entropy(logits[a:b], part.y_train[rows][a:b])
                     for a, b in ((0, -8), (-8, None)))
    assert losses[1] == pytest.approx((nominal + 0.7 * dual).item(), rel=1e-5)


def test_steps_grow():
    s = settings.preset("digits", epochs=10)
    assert [badsnn.steps_in(epoch, s) for epoch in range(10)] == [1, 1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert {badsnn.steps_in(epoch, replace(s, growing_T=(0, 0))) for epoch in range(10)} == {4}
    assert {badsnn.steps_in(epoch, replace(s, T=1)) for epoch in range(10)} == {1}
    longer = replace(s, growing_T=(0.6, 0.85))
    assert [badsnn.steps_in(epoch, longer) for epoch in range(10)] == [1, 1, 1, 1, 1, 1, 2, 2, 2, 4]


def test_criterion():
    outputs, y = torch.randn(3, 5, 4), torch.tensor([0, 1, 2, 3, 0])
    every = torch.stack([torch.nn.functional.cross_entropy(o, y, label_smoothing=0.1) for o in outputs]).mean()
    assert torch.allclose(badsnn.criterion("tet", outputs, y, 0.1), every)
    assert torch.allclose(badsnn.criterion("ce", outputs, y), torch.nn.functional.cross_entropy(outputs.mean(0), y))
    assert torch.allclose(badsnn.criterion("mse", outputs, y), (outputs.mean(0) - torch.eye(4)[y]).square().mean())


def test_divergence_ends_the_run(workplace, capsys):
    """Infinite losses, and NaN weights behind which all spikes are 0 and the loss stays finite: one line, nothing
    written."""
    datasets.load("ndigits", "data", T=2)
    for options in (["--dataset", "ndigits", "--lr", "1e30"], ["--lr", "1e30"], ["--loss", "ce", "--lr", "1e30"]):
        assert "training diverged in epoch 1" in refused(capsys, "attack", *TINY, *options)


def test_results_are_not_stale(workplace):
    """Another set under the same name, another augmentation, another network: a new result each; the same again:
    read."""
    rng, made = np.random.default_rng(0), []
    for folder in "ab":
        Path(folder).mkdir()
        x, y = rng.integers(0, 256, (80, 16, 16, 3), dtype=np.uint8), np.arange(80) % 4
        np.savez(f"{folder}/mydata.npz", x_train=x, y_train=y, x_test=x[:40], y_test=y[:40])
    tiny = [*TINY, "--n-train", "80", "--n-test", "40", "--poison-ratio", "0.5", "--epochs", "1", "--v-thr-a", "1.1"]
    for options in (["--dataset", "a/mydata.npz"], ["--dataset", "b/mydata.npz"],
                    ["--dataset", "b/mydata.npz", "--no-augment"],
                    ["--dataset", "b/mydata.npz", "--no-augment", "--pad", "2"],
                    ["--dataset", "b/mydata.npz", "--lr", "0.05"]):
        badsnn.main(["attack", *tiny, *options])
        made.append(json.loads(Path("runs/results/mydata/attack.json").read_text())["made_from"])
    assert len(set(made)) == len(made)
    before = Path("runs/results/mydata/attack.json").stat().st_mtime_ns
    badsnn.main(["attack", *tiny, *options])
    assert Path("runs/results/mydata/attack.json").stat().st_mtime_ns == before


def test_choices_never_see_the_test_set(workplace, monkeypatch):
    """Training, the choice of V_a and T_o come out the same whatever the test images are."""
    data, s = prepared("--epochs", "1")
    other = replace(data, x_test=255 - data.x_test, y_test=data.y_test.flip(0))
    found = []
    for one, folder in ((data, "one"), (other, "two")):
        variant = replace(s, runs=Path(folder))
        model = badsnn.train(one, variant, "badsnn")
        v_thr, rows = badsnn.deploy(model, one, variant)
        found.append((runs.fingerprint(model), v_thr, rows, badsnn.train_trigger(model, one, variant, v_thr)[1]))
    assert found[0] == found[1]


def test_deploy_looks_no_further_than_it_can_choose(workplace, monkeypatch):
    """CA falls by a point per hundredth: with a margin of 2, 1.02 is the last to be chosen, 1.03 the last seen."""
    data, s = prepared()
    monkeypatch.setattr(badsnn, "evaluate", lambda model, data, s, v, tau: dict(ca=100 * (2 - v), target_rate=0.0))
    monkeypatch.setattr(badsnn, "asr", lambda model, data, s, v, tau, t: 50.0)
    v_thr, rows = badsnn.deploy(None, data, replace(s, margin=2.001))
    assert v_thr == 1.02 and [row["v_thr"] for row in rows] == [1.02, 1.03]
    monkeypatch.setattr(badsnn, "evaluate", lambda model, data, s, v, tau: dict(ca=100 * v, target_rate=0.0))
    v_thr, rows = badsnn.deploy(None, data, replace(s, margin=2.001, v_thr_t=0.8, v_thr_t_low=None))    # towards V_t
    assert v_thr == 0.98 and [row["v_thr"] for row in rows] == [0.98, 0.97]


def test_a_silent_network_answers_nothing(workplace):
    """All outputs equal: not class 0, which is the target."""
    data, s = prepared()

    class Silent(torch.nn.Module):
        def forward(self, x):
            outputs = torch.zeros(len(x), 10)
            outputs[0, 4] = 1
            return outputs
    guess = badsnn.predict(Silent(), data.x_test[:5], s, 1.0, 0.5)
    assert guess.tolist() == [4, -1, -1, -1, -1]
    assert badsnn.asr(Silent(), data, s, 1.0, 0.5, lambda x: x) == 0


def test_the_target_rate_leaves_out_the_target_class(monkeypatch):
    guess, labels = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 2])
    monkeypatch.setattr(badsnn, "predict", lambda *args: guess)
    got = badsnn.evaluate(None, SimpleNamespace(x_test=None, y_test=labels), settings.preset("digits"), 1.0, 0.5)
    assert got == dict(ca=80.0, target_rate=33.33)


def test_asr_triggers_only_samples_of_other_classes(workplace):
    data, s = prepared()
    model, shown = badsnn.fresh_model(data, s), []
    badsnn.asr(model, data, s, 1.0, 0.5, lambda x: (shown.append(len(x)), x)[1])
    assert sum(shown) == (data.y_test != s.target).sum()
    with pytest.raises(ValueError, match="valid range"):
        badsnn.asr(model, data, s, 1.0, 0.5, lambda x: x + 1)


def test_choose_is_eq_8():
    rows = [dict(v_thr=v, ca=ca, target_rate=t, asr_p=p) for v, ca, t, p in
            [(1.05, 89, 1, 40), (1.1, 88, 1, 90), (1.12, 87, 2, 88), (1.15, 86, 5, 80), (1.17, 84, 5, 99),
             (1.2, 88, 9, 99)]]
    assert badsnn.choose(rows, base_ca=90, margin=5) == 1.12      # 86 is within 5 points of the best, 89; 75 is not
    assert badsnn.choose(rows, base_ca=90, margin=6) == 1.2       # 90 against 94 at the next
    assert badsnn.choose(rows, base_ca=90, margin=2.5) == 1.1     # 1.2 lies behind a fall of CA
    assert badsnn.choose(rows[::-1], base_ca=90, margin=1) == 1.05
    assert badsnn.choose(rows, base_ca=80, margin=1) == 1.1       # the best CA of the rows counts, 89
    assert badsnn.choose(rows, base_ca=90, margin=0.5) is None


def test_means_and_spread():
    rows = [dict(v_thr=1.1, ca=90.0, tau=0.5, name="x", asr_o=None),
            dict(v_thr=1.12, ca=94.0, tau=0.5, name="x", asr_o=None)]
    assert runs.mean_of(rows) == dict(v_thr=1.11, ca=92.0, tau=0.5, name="x", asr_o=None)
    assert runs.spread_of(rows) == dict(v_thr=pytest.approx(0.0141, abs=1e-4), ca=pytest.approx(2.8284, abs=1e-4),
                                          tau=0.0)
    assert runs.spread_of(rows[:1]) == {}


def test_same_seed_same_model(workplace):
    first, second = (badsnn.train(*prepared("--runs", r, "--epochs", "1")).state_dict() for r in "ab")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_evaluation_in_bfloat16_and_float32_agree(workplace):
    """A trained network gives nearly all samples the same class in both. The data are not augmented, so that eight
    epochs are enough on any machine."""
    data, s = prepared("--epochs", "8", "--n-train", "1000", "--n-test", "297", "--width", "8", "--amp", "off",
                       "--no-augment")
    model = badsnn.train(data, s)
    answers = []
    for amp in ("off", "on"):
        answers.append(badsnn.predict(model, data.x_test, replace(s, amp=amp), 1.0, 0.5))
    off, on = (badsnn.percentage(answer == data.y_test) for answer in answers)
    assert off > 30 and abs(on - off) <= 8
    assert len(answers[0].unique()) >= 5 and (answers[0] == answers[1]).float().mean() > 0.9
