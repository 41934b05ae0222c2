"""The settings: ranges, presets, the command line made from them. Bad input: one line on stderr, exit code 2,
nothing written."""
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import refused

import badsnn
import settings
from settings import PRESETS, Settings, preset


def test_every_field_is_documented_grouped_and_an_option():
    names = [f.name for f in fields(Settings)]
    assert len(names) == len(set(names))
    assert all(f.metadata["text"] and f.metadata["group"] for f in fields(Settings))
    command, s = settings.parse(["attack"])
    assert command.command == "attack" and s == preset("digits")


def test_the_command_line_gives_the_same_as_preset():
    arguments = ("--dataset digits --epochs 5 --v-thr-a 1.1 1.0 1.1 --lambdas 1 2 3 --no-augment "
                 "--neuron plif --seed 7").split()
    s = settings.parse(["attack", *arguments])[1]
    assert s == preset("digits", epochs=5, v_thr_a=(1.0, 1.1), lambdas=(1, 2, 3), augment=False, neuron="plif", seed=7)
    assert settings.parse(["defend", "--attacks", "blend"])[0].attacks == ["blend"]
    assert settings.parse(["ablate", "--study", "power", "plif"])[0].study == ["power", "plif"]


def test_settings_do_not_change_but_variants_are_made():
    s = preset("gtsrb")
    with pytest.raises(FrozenInstanceError):
        s.seed = 3
    assert replace(s, seed=3).seed == 3 and s.seed == 0 and s.model == "vgg16" and s.tau_t == 0.8
    with pytest.raises(ValueError, match="--epochs must be at least 1"):
        replace(s, epochs=0)
    with pytest.raises(ValueError, match="no setting 'epoch'"):
        preset("digits", epoch=3)


def test_presets_are_valid_and_in_order():
    assert list(PRESETS) == ["digits", "cifar10", "cifar100", "gtsrb", "nmnist", "ndigits"]
    assert all(preset(name).dataset == name for name in PRESETS)
    assert preset("cifar10").n_poison == 100 and preset("cifar10", poison_ratio=0.01).n_poison is None
    assert preset("digits").v_thr_t_low == 1.15 and preset("digits", v_thr_t=0.8).v_thr_t_low is None
    with pytest.raises(ValueError, match="not both"):
        preset("cifar10", poison_ratio=0.01, n_poison=7)
    text = settings._presets()
    assert "cifar10: --malicious-rows 16 --flip --v-thr-t-low 1.15" in text
    assert "--growing-T 0 0 --v-thr-a 1 1.1" in text


def test_the_precision_is_that_of_the_device_in_use(monkeypatch):
    """Where there is a GPU, --device cpu measures as on any CPU, whatever the GPU would take."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(settings, "usable_device", lambda name: "cuda" if name == "auto" else name)
    assert preset("cifar10").amp == "on" and preset("cifar10", device="cpu").amp == "auto"


def test_groups_as_plain_values():
    values = preset("digits").of("network", "deployment")
    assert values["width"] == 16 and isinstance(values["v_thr_a"], list) and "epochs" not in values
    assert "device" not in preset("digits").of() and "epochs" in preset("digits").of()


def test_an_own_set_gets_the_preset_of_its_kind(tmp_path):
    for name, shape, model in (("images", (4, 16, 16, 3), "resnet19"), ("events", (4, 4, 2, 34, 34), "nmnist_net")):
        np.savez(tmp_path / f"{name}.npz", x_train=np.zeros(shape, np.uint8))
        assert preset(str(tmp_path / f"{name}.npz")).model == model


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "mnist"], "unknown dataset"), (["--model", "resnet20"], "invalid choice"),
    (["--neuron", "izh"], "invalid choice"), (["--v-thr-t", "0"], "--v-thr-t must"),
    (["--v-thr-a", "1.0", "-1"], "--v-thr-a must"),
    (["--tau-t", "1.5"], "--tau-t must"), (["--tau-a", "-0.1"], "--tau-a must"), (["--q", "0"], "--q must"),
    (["--q", "nan"], "--q must"),
    (["--beta", "-0.1"], "--beta must"), (["--T", "0"], "--T must"), (["--poison-ratio", "0"], "poison-ratio"),
    (["--poison-ratio", "1.5"], "poison-ratio"), (["--poison-ratio", "0.0001"], "selects none"),
    (["--contrast", "1"], "--contrast must"), (["--contrast", "-0.1"], "--contrast must"),
    (["--target", "10"], "--target"), (["--target", "-1"], "--target"), (["--epochs", "0"], "--epochs"),
    (["--lr", "0"], "--lr"), (["--batch-size", "x"], "invalid int"), (["--n-train", "99999"], "only"),
    (["--model", "nmnist_net"], "holds images"),
    (["--dataset", "own.npz"], "no such file"), (["--device", "tpu9"], "not usable"), (["--resume"], "unrecognized"),
    (["--nonsense"], "unrecognized"), (["--lambdas", "1", "2"], "three numbers"),
    (["--lambdas", "1", "2", "-1"], "--lambdas"), (["--growing-T", "0.7", "0.4"], "ascending"),
    (["--growing-T", "1"], "two numbers"), (["--v-thr-t-low", "2"], "at most"),
    (["--magnitude", "-1"], "--magnitude"), (["--hold-out", "0"], "--hold-out"),
    (["--label-smoothing", "1"], "--label-smoothing"), (["--v-thr-a", "x"], "invalid"),
    (["--baseline-ratio", "0"], "baseline-ratio"), (["--baseline-ratio", "0.0001"], "selects none"),
    (["--clean-label-ratio", "0.001"], "selects none"), (["--device", "meta"], "not usable"),
    (["--variant", "a" * 300], "at most 50")])
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
    assert "must be of badsnn, static" in refused(capsys, "defend", "--dataset", "ndigits", "--attacks", "wanet")
    assert "must be of badsnn, badnets" in refused(capsys, "defend", "--attacks", "flashy")
    assert "holds images" in refused(capsys, "ablate", "--study", "events")
    assert "no attack.json" in refused(capsys, "report")


def test_refuses_unknown_command(workplace, capsys):
    assert "invalid choice" in refused(capsys, "atack")


def test_refuses_settings_of_images_for_events(workplace, capsys):
    """A lifted black would fill every empty pixel of an event frame, and event frames have all their T steps."""
    badsnn.datasets.load("ndigits", "data")
    for option in (["--contrast", "0.1"], ["--malicious-contrast", "0.1"], ["--growing-T", "0.4", "0.7"]):
        assert "are for images" in refused(capsys, "attack", "--dataset", "ndigits", *option)


def test_refuses_a_bad_own_set(workplace, capsys):
    np.savez("own.npz", x_train=np.zeros((4, 16, 16, 3)), y_train=np.arange(4), x_test=np.zeros((4, 16, 16, 3)),
             y_test=np.arange(4))
    assert "must be uint8" in refused(capsys, "attack", "--dataset", "own.npz")


def test_refuses_unwritable_results(workplace, capsys):
    Path("runs").write_text("a file, not a folder")
    assert "runs is not a writable folder" in refused(capsys, "attack")


def test_with_plif_tau_is_learned(workplace, capsys):
    """No label says a tau that was not used; one that is given is refused."""
    for option in ("--tau-a", "--tau-t"):
        assert "which learns its tau" in refused(capsys, "attack", "--neuron", "plif", option, "0.1")
    s = preset("gtsrb", neuron="plif")
    assert s.tau_t is None and s.of()["tau_t"] == s.of()["tau_a"] == "learned"
    with pytest.raises(ValueError, match="preset"):
        replace(s, neuron="lif")
