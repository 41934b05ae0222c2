"""Data sets, the .npz format, foreign and damaged files, events, augmentation, held-out and poisoned samples."""
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from data import augment, hold_out, load, load_for, poison_indices, to_float, to_uint8
from kit import sources
from kit.sources import simulate_saccades, to_frames
from settings import preset

X, Y = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8), np.arange(12) % 3
ARRAYS = dict(x_train=X, y_train=Y, x_test=X[:6], y_test=Y[:6])


def write_own(path, **changes):
    np.savez(path, **ARRAYS | changes)
    return str(path)


def refusal(name, root="data", T=4):
    """The one line with which a set is refused."""
    with pytest.raises(ValueError) as refused:
        load(str(name), root, T)
    text = str(refused.value)
    assert text and len(text.splitlines()) == 1
    return text


def test_digits(tmp_path, monkeypatch):
    """Converted once; the statistics are those of PyTorch."""
    d = load("digits", tmp_path)
    assert d.x_train.shape == (1437, 3, 16, 16) and d.x_test.shape == (360, 3, 16, 16)
    assert d.num_classes == 10 and not d.events and d.y_test.bincount().min() >= 34 and d.x_train.dtype == torch.uint8
    monkeypatch.setattr(sources, "digits", None)
    again = load("digits", tmp_path)
    assert torch.equal(again.x_train, d.x_train) and (again.mean, again.note) == (d.mean, d.note)
    assert [p.name for p in tmp_path.iterdir()] == ["digits.npz"]          # no temporary file is left
    pixels = d.x_train.double().div(255).transpose(0, 1).flatten(1)
    assert np.abs(pixels.mean(1).numpy() - d.mean).max() < 1e-9 and np.abs(pixels.std(1).numpy() - d.std).max() < 1e-9
    assert torch.equal(to_uint8(to_float(d.x_train, None)), d.x_train)


def test_own_npz(tmp_path):
    """Its results never go into the folder of a known set; what it does not need is not read, least of all run."""
    objects = np.array([[1], "x"], dtype=object)
    d = load(write_own(tmp_path / "digits.npz", classes=objects, class_names=np.array(["cat", "dog", "car"])))
    assert torch.equal(d.x_train[5], torch.from_numpy(X[5]).permute(2, 0, 1)) and d.class_names == ["cat", "dog", "car"]
    assert d.num_classes == 3 and d.name == "own-digits"
    assert "readable" in refusal(write_own(tmp_path / "own.npz", x_train=objects))


@pytest.mark.parametrize("changes, message", [
    (dict(x_test=X[:6] // 255), "floats in [0, 1]"), (dict(x_train=X.transpose(0, 3, 1, 2)), "must be [N, H, W, 3]"),
    (dict(x_train=X[:5]), "5 samples"), (dict(x_test=np.full((6, 20, 20, 3), 9, np.uint8)), "differ in shape"),
    (dict(y_train=np.eye(12, dtype=int)), "whole numbers"), (dict(y_train=Y + 1), "all labels")])
def test_bad_npz(tmp_path, changes, message):
    text = refusal(write_own(tmp_path / "own.npz", **changes))
    assert text.startswith(f"{tmp_path / 'own.npz'}: ") and message in text


def test_no_npz_at_all(tmp_path):
    path = tmp_path / "own.npz"
    whole = Path(write_own(path)).read_bytes()
    for content in (b"", b"<!DOCTYPE html>", whole[:3000]):
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path}: not a readable .npz")
    assert "no such file" in refusal(tmp_path / "none.npz") and "unknown dataset" in refusal("mnist")


def test_an_asr_needs_test_samples_of_another_class(tmp_path):
    """Among the test samples and among those held out of training."""
    for target, y_train in ((1, Y), (0, np.array([0] * 10 + [1, 2]))):
        path = write_own(tmp_path / "own.npz", y_train=y_train, y_test=np.full(6, 1))
        with pytest.raises(ValueError, match="--target"):
            load_for(preset(path, device="cpu", poison_ratio=0.5, target=target))


@pytest.mark.parametrize("name, converter, error, hint", [
    ("cifar10", "image_set", OSError("<urlopen error: unreachable>"), "cifar-10-python.tar.gz"),
    ("nmnist", "nmnist", zipfile.BadZipFile("no\nzip"), "NMNIST/Train")])
def test_whatever_a_converter_raises_is_one_line_with_the_remedy(tmp_path, monkeypatch, name, converter, error, hint):
    monkeypatch.setattr(sources, converter, Mock(side_effect=error))
    text = refusal(name, tmp_path)
    assert type(error).__name__ in text and hint in text and not list(tmp_path.iterdir())


def test_images_of_torchvision(tmp_path, monkeypatch):
    """Resized to 32x32 by PIL, in order, with their names."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)) for i in range(6)]

    class Folder(list):
        classes = ["cat", "dog"]
    monkeypatch.setattr("torchvision.datasets.GTSRB", lambda root, split, download: Folder(
        (image, i % 2) for i, image in enumerate(images) if (split == "train") == (i < 4)))
    d = load("gtsrb", tmp_path)
    assert d.y_train.tolist() == [0, 1, 0, 1] and d.y_test.tolist() == [0, 1] and d.class_names == ["cat", "dog"]
    for x, image in zip([*d.x_train, *d.x_test], images):
        assert np.array_equal(x.permute(1, 2, 0), np.asarray(image.resize((32, 32), resample=2)))


# ----- Events

def write_recordings(folder, digits, count):
    """Recordings in the official 5-byte format, of 40 uniform events; returns the last."""
    rng = np.random.default_rng(0)
    for digit in digits:
        (folder / str(digit)).mkdir(parents=True)
        for i in range(count):
            x, y, p = rng.integers(0, [[34], [34], [2]], (3, 40))
            t = np.sort(rng.integers(0, 300_000, 40))
            raw = np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1).astype(np.uint8)
            (file := folder / f"{digit}/{i:05d}.bin").write_bytes(raw.tobytes())
    return file


def test_part_of_the_nmnist_folder(tmp_path):
    """Recordings come back as the counts that they hold; a damaged one is named, what macOS adds is not read."""
    write_recordings(tmp_path / "NMNIST/Train", (0, 1), 8)
    last = write_recordings(tmp_path / "NMNIST/Test", (0, 1), 3)
    whole, bad = last.read_bytes(), last.with_name("10000.bin")
    for content in (b"", whole[:-2], whole[:15], b"<!DOCTYPE html><html>404</html>".ljust(500)):
        bad.write_bytes(content)
        assert f"{bad} is damaged" in refusal("nmnist", tmp_path, 5)
    bad.rename(last.with_name("._00000.bin"))
    d = load("nmnist", tmp_path, T=5)
    assert d.events and len(d.x_train) + len(d.x_test) == 22 and d.x_train.shape[1:] == (5, 2, 34, 34)
    assert (d.x_train.flatten(2).sum(2) == 8).all() and "22 of N-MNIST's 70,000" in d.note      # 40 events in 5 steps


def test_framing_counts_by_hand():
    events = np.zeros(4, dtype=[("x", int), ("y", int), ("t", int), ("p", int)])
    events["x"], events["y"], events["t"], events["p"] = [1, 1, 2, 3], [5, 5, 6, 7], [10, 20, 30, 40], [1, 1, 0, 1]
    frames = to_frames([events], T=2)
    assert frames.shape == (1, 2, 2, 34, 34) and frames.sum() == 4
    assert frames[0, 0, 1, 5, 1] == 2 and frames[0, 1, 0, 6, 2] == 1 and frames[0, 1, 1, 7, 3] == 1
    with pytest.raises(ValueError, match="it needs 5 or more events"):
        to_frames([events], 5)


def test_simulated_sensor():
    """A blank image gives no events; ON and OFF mirror a moving edge; times rise within 300 ms; brighter moves more."""
    images = torch.zeros(3, 28, 28)
    images[1, 8:20, 8:20], images[2, 8:20, 8:20] = 0.3, 1.0
    blank, faint, bright = simulate_saccades(images)
    assert len(blank) == 0 < len(faint) < len(bright)
    assert (np.diff(bright["t"]) >= 0).all() and 0 < bright["t"].min() and bright["t"].max() <= 300_000
    first = bright[bright["t"] <= 30_000]            # moves right and down: the front edges brighten
    assert first[first["p"] == 1]["y"].mean() > first[first["p"] == 0]["y"].mean()


# ----- Samples

def test_augment():
    """Every sample is one of its shifts and mirror images; all occur."""
    x = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).view(2, 3, 6, 6)
    assert torch.equal(augment(x, 0, False, 0, torch.Generator()), x)
    seen = set()
    for seed in range(40):
        for out, image in zip(augment(x, 1, True, 0, torch.Generator().manual_seed(seed)), x):
            padded = torch.nn.functional.pad(image, (1,) * 4)
            shifted = {(dy, dx): padded[:, dy:dy + 6, dx:dx + 6] for dy in range(3) for dx in range(3)}
            match = [(k, f) for k, v in shifted.items() for f in (0, 1) if torch.equal(v.flip(2) if f else v, out)]
            assert len(match) == 1
            seen.update(match)
    assert len(seen) == 18


def test_augment_contrast():
    """Black is lifted by 0 to 0.5, what is left of the range keeps 0.5 to 1; pixels of an image alike; so in bytes."""
    ramp = torch.linspace(0, 1, 36).view(1, 1, 6, 6).repeat(200, 1, 1, 1)
    out = augment(ramp, 0, False, 0.5, torch.Generator().manual_seed(0)).flatten(1)
    low, high = out.aminmax(dim=1)
    gain = (high - low) / (1 - low)
    for value, (least, most) in ((low, (0, 0.5)), (gain, (0.5, 1))):
        assert least <= value.min() < least + 0.02 and most - 0.02 < value.max() <= most + 1e-6
    assert torch.allclose(out, low[:, None] + (high - low)[:, None] * ramp.flatten(1), atol=1e-6)
    stored = (ramp * 255).round().byte()
    assert (augment(stored, 0, False, 0.5, torch.Generator().manual_seed(0)).flatten(1) / 255 - out).abs().max() < 0.005


def test_augment_events():
    """Of each recording 20 to 100 % of the events are left, and at most 1, 2 or 3 in a pixel and step."""
    ones, rng = torch.ones(300, 2, 2, 8, 8, dtype=torch.uint8), torch.Generator().manual_seed(0)
    left = augment(ones, 0, False, 0.8, rng).flatten(1).float().mean(1)
    assert 0.1 < left.min() < 0.3 and 0.9 < left.max() and 0.55 < left.mean() < 0.65
    assert {*augment(200 * ones, 0, False, 0.8, rng).flatten(1).amax(1).tolist()} == {1, 2, 3}


def test_poison_counts_of_table_1():
    """P is a share of the TARGET CLASS: 100 of CIFAR-10's 5,000 at 2 %, 5 of CIFAR-100's 500, 178 of 5,923; above 1 a
    number, at most half of the class."""
    for size, ratio, count in ((5000, 0.02, 100), (500, 0.01, 5), (5923, 0.03, 178), (150, 0.05, 8), (5923, 178, 178),
                               (100, 178, 50)):
        labels = torch.cat([torch.zeros(size), torch.ones(100)]).long()
        chosen = poison_indices(labels, 0, ratio, seed=0)
        assert len(chosen) == len(chosen.unique()) == count and (labels[chosen] == 0).all()
    torch.manual_seed(123), torch.rand(100)                     # does not depend on what ran before
    assert torch.equal(chosen, poison_indices(labels, 0, 178, seed=0))
    assert not torch.equal(chosen, poison_indices(labels, 0, 178, seed=6))
    with pytest.raises(ValueError, match="selects none"):
        poison_indices(labels, 0, 0.001, seed=0)


def test_hold_out(tmp_path):
    """The two parts are the training set, cut in two per class; nobody else's random numbers are used."""
    y = np.repeat(np.arange(4), [100, 9, 2, 1])
    x = np.arange(len(y), dtype=np.uint8)[:, None, None, None] + np.zeros((1, 16, 16, 3), np.uint8)  # tells them apart
    d = load(write_own(tmp_path / "own.npz", x_train=x, y_train=y))
    state = torch.get_rng_state()
    train_data, held = hold_out(d)
    of_train, of_held = (x[:, 0, 0, 0].tolist() for x in (train_data.x_train, held.x_test))
    assert sorted(of_train + of_held) == list(range(len(y))) and y[of_train].tolist() == train_data.y_train.tolist()
    assert held.y_test.bincount(minlength=4).tolist() == [10, 1, 1, 0] and y[of_held].tolist() == held.y_test.tolist()
    assert torch.equal(held.x_train, train_data.x_train) and torch.equal(train_data.x_test, d.x_test)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(held.x_test, hold_out(d)[1].x_test)
    with pytest.raises(ValueError, match="two training samples"):
        hold_out(replace(d, x_train=d.x_train[:1], y_train=d.y_train[:1]))
