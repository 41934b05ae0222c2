"""The experiment end to end: training, resuming, metrics, results, the command line and everything that it refuses."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import badsnn

ROOT = Path(badsnn.__file__).parent
TINY = ("--width 4 --T 2 --epochs 2 --warmup 0 --seeds 1 --n-train 300 --n-test 100 --poison-ratio 0.1 --malicious-rows 8 --q 8 "
        "--v-thr-d 1.15").split()           # the last three: presets that expectations below rely on


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    badsnn.datasets.load("digits", folder)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch, digits):
    """An empty folder to run in, with the digits at hand."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits, "data")
    return tmp_path


def attack(*more):
    badsnn.main(["attack", *TINY, *more])
    return json.loads(Path("results/digits/attack.json").read_text())


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


def test_studies_and_report(workplace, monkeypatch):
    monkeypatch.setattr(badsnn, "HEATMAP", dict(v_thr_t=(0.8, 1.5), v_thr_a=(1.0, 1.2), tau_a=(0.4, 0.5)))
    monkeypatch.setattr(badsnn, "POISON_RATIOS", (0.1, 0.2))
    monkeypatch.setattr(badsnn, "POWERS", (2.0, 4.0))
    monkeypatch.setattr(badsnn, "wanted_perturbations", partial(badsnn.wanted_perturbations, max_iter=5))
    short = ["--epochs", "1", "--n-o", "40", "--epochs-o", "1"]
    attack("--v-thr-a", "1.1", *short)
    for study in badsnn.STUDIES:
        try:
            badsnn.main(["ablate", "--study", study, *TINY, *short, "--v-thr-a", "1.0", "1.1"])
        except SystemExit:
            assert study in ("magnitude", "trigger")        # a network this small may leave nothing to blend
    rows = json.loads(Path("results/digits/heatmap.json").read_text())["rows"]
    assert len(rows) == 8 and len({(row["v_thr_t"], row["v_thr"], row["tau"]) for row in rows}) == 8
    rows = json.loads(Path("results/digits/poison.json").read_text())["rows"]
    assert [row["n_poison"] for row in rows] == [2, 5]
    rows = json.loads(Path("results/digits/plif.json").read_text())["rows"]
    assert [(row["neuron"], row["v_thr"]) for row in rows] == [("lif", 1.0), ("lif", 1.1), ("plif", 1.0), ("plif", 1.1)]
    assert rows[0]["mean_tau"] == 0.5 and 0 < rows[2]["mean_tau"] < 1
    rows = json.loads(Path("results/digits/power.json").read_text())["rows"]
    assert [(row["q"], row["renormalize"]) for row in rows] == [(2.0, False), (2.0, True), (4.0, False), (4.0, True)]
    assert all(0 <= row[key] <= 100 for row in rows for key in ("asr_p", "asr_p_clean_model", "read"))
    rows = json.loads(Path("results/digits/threshold.json").read_text())["rows"]
    assert len(rows) == 33 and rows[0]["spikes"] > rows[-3]["spikes"] > 0       # a higher threshold, fewer spikes
    Path("README.md").write_text("before <!-- table1 -->old<!-- /table1 --> after")
    badsnn.main(["report"])
    text = Path("README.md").read_text()
    assert "**digits**" in text and "old" not in text and text.startswith("before") and text.endswith("after")
    assert Path("results/digits/attack.png").stat().st_size > 10_000
    assert all(Path(f"results/digits/{study}.png").exists() for study in ("threshold", "heatmap", "poison", "plif", "power"))


def test_defend(workplace, capsys, monkeypatch):
    """Every cell is filled, finished cells are not run again, and the report draws them. (What the defences do: test_defenses.py.)"""
    for name, budget in dict(fine_tune=dict(epochs=1), anp=dict(iterations=2), tsbd=dict(epochs=1, max_unlearn=1),
                             nad=dict(epochs=1, teacher_epochs=1)).items():
        monkeypatch.setitem(badsnn.DEFENSES, name, partial(badsnn.DEFENSES[name], **budget))
    monkeypatch.setattr(badsnn, "pgd", partial(badsnn.pgd, steps=2))
    monkeypatch.setattr(badsnn, "wanted_perturbations", partial(badsnn.wanted_perturbations, max_iter=5))
    monkeypatch.setattr(badsnn.defenses, "strip", partial(badsnn.defenses.strip, overlays=4))
    arguments = ["defend", *TINY, "--epochs", "1", "--n-test", "200", "--n-o", "40", "--epochs-o", "1"]
    badsnn.main(arguments)
    result = json.loads(Path("results/digits/defend.json").read_text())
    assert [(row["attack"], row["defense"]) for row in result["rows"]] == [
        (attack, defense) for attack in ("badsnn", *badsnn.BASELINES) for defense in badsnn.DEFENSES]
    assert result["n_defender"] == 100                       # 10 per class, not 5 % of 200
    for row in result["rows"]:
        assert {"v_thr", "ca", "asr", "target_rate", "destroyed"} <= set(row) and 0 <= row["asr"] <= 100
        assert row["v_thr"] == (1.15 if row["attack"] == "badsnn" and row["defense"] != "restore" else 1.0)
        assert ("asr_clean_model" in row) == (row["defense"] == "none")
    assert {d["attack"] for d in result["detectors"]} == {"badsnn", *badsnn.BASELINES}
    assert all(0 <= d[key] <= 1 for d in result["detectors"] for key in ("strip_auroc", "spikes_auroc"))
    assert "defense" in capsys.readouterr().out
    cells = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("cells/*.json")}
    assert len(cells) >= 40
    badsnn.main(arguments)
    assert cells == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("cells/*.json")}
    assert json.loads(Path("results/digits/defend.json").read_text())["rows"] == result["rows"]
    shutil.copy(ROOT / "results/digits/attack.json", "results/digits")      # report wants one
    Path("README.md").write_text("<!-- table2 --><!-- /table2 -->")
    badsnn.main(["report"])
    assert "clean_label" in Path("README.md").read_text() and Path("results/digits/defend.png").stat().st_size > 10_000
    badsnn.main([*arguments, "--attacks", "badnets"])
    badsnn.main(["report"])
    assert "| badnets |" in Path("README.md").read_text() and "badsnn" not in Path("README.md").read_text()


def test_baselines_keep_their_contrast(workplace, monkeypatch):
    """The preset's loss of contrast belongs to BadSNN and the clean model; a baseline is trained, and recorded, without it."""
    data, a = prepared("--epochs", "1")
    seen, original = [], badsnn.augment
    monkeypatch.setattr(badsnn, "augment", lambda x, pad, flip, contrast, generator: (
        seen.append(contrast), original(x, pad, flip, contrast, generator))[1])
    for attack in ("badsnn", "badnets"):
        badsnn.train(data, a, attack)
    assert a.contrast > 0 and set(seen[:len(seen) // 2]) == {a.contrast} and set(seen[len(seen) // 2:]) == {0.0}


def test_poison_is_as_published(workplace, monkeypatch):
    """Who is poisoned, with what, and with which label; the same for the same seed; nothing else is touched."""
    data, a = badsnn.prepare(badsnn.get_args(["attack", "--dataset", "digits", "--width", "4", "--T", "2"]))
    monkeypatch.setattr(badsnn, "pgd", partial(badsnn.pgd, steps=11))       # 16 / 255 and more, in steps of 1.5 / 255
    reference = badsnn.fresh_model(data, a)
    for name in ("badnets", "blend", "clean_label"):
        x, y, _ = badsnn.poison(data, a, name, reference)
        changed = (x != data.x_train).flatten(1).any(1)
        assert torch.equal(x, badsnn.poison(data, a, name, reference)[0])
        assert changed.sum() == round(0.05 * len(y)) == 72
        assert (y[changed] == a.target).all() and torch.equal(y[~changed], data.y_train[~changed])
        if name == "clean_label":                            # labels were right to begin with
            assert torch.equal(y, data.y_train)
            inside = (x[changed].int() - data.x_train[changed].int()).abs()[:, :, 3:-3]
            assert inside.max() == 16                        # PGD's ball, away from the corner patterns
        else:
            marked = badsnn.BASELINES[name](reference, a.seed)(data.x_train[changed].float() / 255)
            assert torch.equal(x[changed], marked.mul(255).round().byte())
            assert (data.y_train[changed] == a.target).sum() < 20            # drawn from all classes
    a.baseline_ratio = 0.5
    x, y, about = badsnn.poison(data, a, "clean_label", reference)           # half of all is more than the class has
    assert (x != data.x_train).flatten(1).any(1).sum() == round(0.5 * (y == 0).sum().item()) and "too small" in about


def test_wanet_batch(workplace):
    """A share is warped by the field and relabelled, twice as many get noise and keep their label, the rest is untouched."""
    data, a = badsnn.prepare(badsnn.get_args(["attack", "--dataset", "digits", "--baseline-ratio", "0.1"]))
    field = badsnn.wanet_field((16, 16))
    x, y = data.x_train[data.y_train != 0][:100], data.y_train[data.y_train != 0][:100]
    x2, y2 = badsnn.wanet_batch(x, y, a, field, torch.Generator().manual_seed(0))
    assert (y2 == 0).sum() == 10 and torch.equal(y2[10:], y[10:]) and torch.equal(x2[30:], x[30:])
    assert torch.equal(x2[:10], badsnn.wanet(x[:10].float() / 255, field).mul(255).round().byte())
    assert not torch.equal(x2[10:30], badsnn.wanet(x[10:30].float() / 255, field).mul(255).round().byte())
    counts = [(badsnn.wanet_batch(x[:4], y[:4], a, field, torch.Generator().manual_seed(i))[1] == 0).sum().item() for i in range(200)]
    assert set(counts) == {0, 1} and 0.3 < sum(counts) / 200 < 0.5           # 0.4 of a sample per batch, on average


def test_readme_table_is_what_results_say():
    """The README's tables are those that `report` makes from the committed results."""
    readme = (ROOT / "README.md").read_text()
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(ROOT.glob("results/*/attack.json"))}
    assert badsnn.table1(found) in readme and badsnn.table_runs(found) in readme
    assert badsnn.table2(ROOT / "results") in readme
    if (ROOT / "results/benchmark.json").exists():
        assert badsnn.benchmark_table(json.loads((ROOT / "results/benchmark.json").read_text())) in readme


def test_attack_on_events(workplace):
    badsnn.main(["attack", "--dataset", "ndigits", *TINY, "--v-thr-a", "1.1"])
    row = json.loads(Path("results/ndigits/attack.json").read_text())["rows"][0]
    assert row["asr_o"] is None and 0 <= row["asr_clip_only"] <= 100
    badsnn.main(["attack", "--dataset", "ndigits", *TINY, "--v-thr-a", "1.1", "--frames", "binary"])
    row = json.loads(Path("results/ndigits-binary/attack.json").read_text())["rows"][0]
    assert row["asr_clip_only"] == row["target_rate"], "clamped frames are not changed by the clip"
    badsnn.main(["report"])


def prepared(*more):
    return badsnn.prepare(badsnn.get_args(["attack", *TINY, *more]))


def test_resumed_equals_uninterrupted(workplace, monkeypatch):
    """Stopped after epoch 1 and started again, training ends with bit-identical weights."""
    data, a = prepared("--runs", "whole", "--epochs", "3")
    whole = badsnn.train(data, a, "badsnn").state_dict()
    a.runs = Path("parts")
    save = badsnn.write_checkpoint

    def save_then_die(*args):
        save(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(badsnn, "write_checkpoint", save_then_die)
        badsnn.train(data, a, "badsnn")
    resumed = badsnn.train(data, a, "badsnn").state_dict()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    again = badsnn.train(data, a, "badsnn").state_dict()        # finished: read, not trained
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_killed_run_goes_on(workplace):
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
    data, a = prepared("--epochs", "6")
    said = []
    a.device = torch.device("cpu")
    original, badsnn.say = badsnn.say, said.append
    try:
        badsnn.train(data, a)
    finally:
        badsnn.say = original
    assert f"resumed after epoch {epochs}" in said[0]


def test_malicious_rows_are_target_samples_at_the_malicious_setting(workplace, monkeypatch):
    """What the network is shown in one step of dual-spike training: nominal rows at S_n, then D_t^p at S_t."""
    data, a = prepared("--epochs", "1", "--target", "3", "--v-thr-t", "1.4", "--tau-t", "0.7", "--no-augment", "--batch-size", "100")
    seen = []

    def spy(model, v_thr=None, tau=None):
        seen.append((v_thr, tau))
        return real(model, v_thr, tau)
    real = badsnn.neurons
    monkeypatch.setattr(badsnn, "neurons", spy)
    forward = badsnn.to_float
    batches = []
    monkeypatch.setattr(badsnn, "to_float", lambda x, a: (batches.append(x), forward(x, a))[1])
    badsnn.train(data, a, "badsnn")
    v_thr, tau = seen[0]
    assert v_thr.tolist() == pytest.approx([1.0] * 100 + [1.4] * 8) and tau.tolist() == pytest.approx([0.5] * 100 + [0.7] * 8)
    poisoned = badsnn.poison_indices(data.y_train, 3, a.poison_ratio, a.seed)
    allowed = data.x_train[poisoned]
    assert all(any(torch.equal(row, x) for x in allowed) for row in batches[0][100:])
    assert (data.y_train[poisoned] == 3).all()


def test_attack_success_rate_leaves_out_the_target_class():
    guess, labels = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 2])
    assert badsnn.attack_success_rate(guess, labels, target=0) == pytest.approx(33.33)


def test_asr_triggers_only_samples_of_other_classes(workplace):
    data, a = prepared()
    model, shown = badsnn.fresh_model(data, a), []
    badsnn.asr(model, data, a, 1.0, 0.5, lambda x: (shown.append(len(x)), x)[1])
    assert sum(shown) == (data.y_test != a.target).sum()
    with pytest.raises(ValueError, match="valid range"):
        badsnn.asr(model, data, a, 1.0, 0.5, lambda x: x + 1)


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
    data, a = prepared("--epochs", "8", "--n-train", "1000", "--n-test", "297", "--width", "8", "--amp", "off", "--no-augment")
    model = badsnn.train(data, a)
    answers = []
    for a.amp in (False, True):
        answers.append(badsnn.predict(model, data.x_test, a, 1.0, 0.5))
    off, on = (badsnn.share(answer == data.y_test) for answer in answers)
    assert off > 30 and abs(on - off) <= 8
    assert len(answers[0].unique()) >= 5 and (answers[0] == answers[1]).float().mean() > 0.9


# ---------------------------------------------------------------------------------------------------------
# Bad input: one line on stderr, exit code 2, nothing written

def refused(capsys, *arguments):
    before = sorted(Path(".").rglob("*"))
    with pytest.raises(SystemExit) as stop:
        badsnn.main(list(arguments))
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert len(err.strip().splitlines()) == 1 and err.startswith("badsnn: ") and "Traceback" not in err
    assert sorted(Path(".").rglob("*")) == before
    return err


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "mnist"], "unknown dataset"), (["--model", "resnet20"], "invalid choice"), (["--neuron", "izh"], "invalid choice"),
    (["--v-thr-t", "0"], "v_thr"), (["--v-thr-a", "1.0", "-1"], "v_thr"), (["--tau-t", "1.5"], "tau"), (["--tau-a", "-0.1"], "tau"),
    (["--q", "0"], "--q must"), (["--q", "nan"], "--q must"), (["--beta", "-0.1"], "--beta must"), (["--T", "0"], "--T must"),
    (["--poison-ratio", "0"], "poison-ratio"), (["--poison-ratio", "1.5"], "poison-ratio"), (["--poison-ratio", "0.0001"], "selects none"),
    (["--contrast", "1"], "--contrast must"), (["--contrast", "-0.1"], "--contrast must"),
    (["--target", "10"], "--target"), (["--target", "-1"], "--target"), (["--epochs", "0"], "--epochs"), (["--lr", "0"], "--lr"),
    (["--batch-size", "x"], "invalid int"), (["--n-train", "99999"], "only"), (["--model", "nmnist_net"], "holds images"),
    (["--dataset", "own.npz"], "no such file"), (["--device", "tpu9"], "not usable"), (["--resume", "--fresh"], "exclude"),
    (["--nonsense"], "unrecognized"), (["--lambdas", "1", "2"], "expected 3"), (["--lambdas", "1", "2", "-1"], "--lambdas"),
    (["--v-thr-o", "0"], "v_thr"), (["--magnitude", "-1"], "--magnitude"), (["--v-thr-d", "-1"], "v_thr"), (["--v-thr-a", "x"], "invalid"),
    (["--baseline-ratio", "0"], "baseline-ratio"), (["--baseline-ratio", "0.0001"], "selects none")])
def test_refuses(workplace, capsys, arguments, message):
    assert message in refused(capsys, "attack", *arguments)


def test_refuses_cuda_without_one(workplace, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert "--device cuda is not usable here" in refused(capsys, "attack", "--device", "cuda")


def test_refuses_unknown_study_and_missing_results(workplace, capsys):
    assert "invalid choice" in refused(capsys, "ablate", "--study", "everything")
    badsnn.datasets.load("ndigits", "data")
    assert "holds events" in refused(capsys, "ablate", "--study", "threshold", "--dataset", "ndigits")
    assert "holds events" in refused(capsys, "defend", "--dataset", "ndigits")
    assert "no attack.json" in refused(capsys, "report")


def test_refuses_unknown_command(workplace, capsys):
    assert "invalid choice" in refused(capsys, "atack")


def test_refuses_a_bad_own_set(workplace, capsys):
    np.savez("own.npz", x_train=np.zeros((4, 16, 16, 3)), y_train=np.arange(4), x_test=np.zeros((4, 16, 16, 3)), y_test=np.arange(4))
    assert "must be uint8" in refused(capsys, "attack", "--dataset", "own.npz")


def test_refuses_unwritable_results(workplace, capsys):
    Path("results").write_text("a file, not a folder")
    assert "results is not a writable folder" in refused(capsys, "attack")


def test_refuses_damaged_and_foreign_checkpoints(workplace, capsys):
    data, a = prepared("--epochs", "1")
    badsnn.train(data, a)
    (path,) = Path("runs/digits").iterdir()
    good = path.read_bytes()
    for bad, message in ((good[:100], "not a checkpoint of this run"), (b"", "not a checkpoint"), (None, "other settings")):
        if bad is None:
            state = torch.load(path, weights_only=True) if path.write_bytes(good) else None
            state["config"]["width"] = 99
            torch.save(state, path)
        else:
            path.write_bytes(bad)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            badsnn.main(["attack", *TINY, "--epochs", "1"])
        assert stop.value.code == 2 and message in capsys.readouterr().err
        assert not Path("results").exists()


def test_a_checkpoint_with_code_in_it_is_not_run(workplace, capsys):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("exploded",)
    data, a = prepared("--epochs", "1")
    path = badsnn.checkpoint_path(badsnn.training_config("clean model", data, a, None, badsnn.fresh_model(data, a), None), a)
    path.parent.mkdir(parents=True)
    torch.save(dict(config=Bomb()), path)
    with pytest.raises(ValueError, match="not a checkpoint"):
        badsnn.train(data, a)
    assert not Path("exploded").exists()


def test_results_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "r" / "a.json"
    badsnn.write_json(path, dict(a=1))
    with pytest.raises(TypeError):
        badsnn.write_json(path, dict(a=SimpleNamespace()))
    assert json.loads(path.read_text()) == dict(a=1)


# ---------------------------------------------------------------------------------------------------------
# Two processes

WORKER = """
import sys, json, torch
sys.path.insert(0, {root!r})
import badsnn
data, a = badsnn.prepare(badsnn.get_args(json.loads(sys.argv[1])))
with badsnn.processes(a):
    model = badsnn.train(data, a, "badsnn")
    if badsnn.rank_and_ranks()[0] == 0:
        print("LOSSES", json.dumps([row["loss"] for row in torch.load(next(a.runs.rglob("*.pt")), weights_only=True)["history"]]))
"""


def torchrun(n, script, *arguments, timeout=150):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", str(script), *arguments]
    env = dict(os.environ, OMP_NUM_THREADS="1", BADSNN_COMPILE="0")
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


def test_two_processes_train_the_same_model(workplace):
    """The same global batch on one and on two processes: the same losses, up to the order of float32 sums."""
    script = workplace / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    same = "--no-augment --amp off --batch-size 60 --lr 0.01".split()
    data, a = prepared(*same, "--runs", "one")
    badsnn.train(data, a, "badsnn")
    (path,) = Path("one").rglob("*.pt")
    losses = [[row["loss"] for row in torch.load(path, weights_only=True)["history"]]]
    done = torchrun(2, script, json.dumps(["attack", *TINY, *same, "--runs", "two"]))
    assert done.returncode == 0, done.stderr[-2000:]
    losses.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("LOSSES"))[7:]))
    assert len(losses[0]) == 2
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3) and losses[0][1] == pytest.approx(losses[1][1], rel=2e-2)


def test_a_dead_process_ends_the_run(workplace):
    script = workplace / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)).replace(
        "    model = badsnn.train", "    import os; os.environ['RANK'] == '1' and os._exit(9)\n    model = badsnn.train"))
    started = time.time()
    done = torchrun(2, script, json.dumps(["attack", *TINY, "--batch-size", "60"]))
    assert done.returncode != 0 and time.time() - started < 120
