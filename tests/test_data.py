"""Data sets, the .npz format, events, augmentation, and which samples are poisoned."""
import numpy as np
import pytest
import torch

import data
from data import augment, load, poison_indices, simulate_saccades, to_frames


def arrays(**changes):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    y = np.arange(12) % 3
    return {**dict(x_train=x, y_train=y, x_test=x[:6], y_test=y[:6]), **changes}


def test_digits(tmp_path):
    d = load("digits", tmp_path)
    assert d.x_train.shape == (1437, 3, 16, 16) and d.x_test.shape == (360, 3, 16, 16) and d.x_train.dtype == torch.uint8
    assert d.num_classes == 10 and not d.events and d.y_test.bincount().min() >= 34
    assert np.allclose(d.mean, d.x_train.double().mean((0, 2, 3)) / 255)
    before = (tmp_path / "digits.npz").stat().st_mtime_ns
    again = load("digits", tmp_path)
    assert torch.equal(again.x_train, d.x_train) and (tmp_path / "digits.npz").stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == ["digits.npz"]          # no temporary file is left


def test_own_npz(tmp_path):
    np.savez(tmp_path / "own.npz", **arrays())
    d = load(str(tmp_path / "own.npz"))
    assert d.num_classes == 3 and torch.equal(d.x_train[5], torch.from_numpy(arrays()["x_train"][5]).permute(2, 0, 1))


OBJECTS = np.array([[1], "x"], dtype=object)


@pytest.mark.parametrize("changes, message", [
    (dict(x_train=OBJECTS), "readable"), (dict(x_train=arrays()["x_train"].astype(np.float32)), "must be uint8"),
    (dict(x_train=arrays()["x_train"][..., 0]), r"must be \[N, H, W, 3\]"), (dict(x_train=arrays()["x_train"][:5]), "5 samples"),
    (dict(y_train=np.arange(12) / 3), "whole numbers"), (dict(y_train=np.arange(12) - 1), "labels"),
    (dict(y_test=np.full(6, 9)), "labels"), (dict(y_train=np.zeros(12, int), y_test=np.zeros(6, int)), "labels"),
    (dict(x_test=np.zeros((6, 20, 20, 3), np.uint8)), "differ in shape"), (dict(x_train=arrays()["x_train"][:, :8]), "at least 16"),
    (dict(x_train=arrays()["x_train"][:0], y_train=arrays()["y_train"][:0]), "0 samples")])
def test_bad_npz(tmp_path, changes, message):
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "own.npz"))


def test_missing_truncated_and_incomplete_npz(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load(str(tmp_path / "own.npz"))
    np.savez(tmp_path / "own.npz", **arrays())
    whole = (tmp_path / "own.npz").read_bytes()
    (tmp_path / "own.npz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="readable"):
        load(str(tmp_path / "own.npz"))
    some = arrays()
    del some["y_test"]
    np.savez(tmp_path / "own.npz", **some)
    with pytest.raises(ValueError, match="'y_test'"):
        load(str(tmp_path / "own.npz"))
    with pytest.raises(ValueError, match="unknown dataset"):
        load("mnist")


@pytest.mark.parametrize("name, hint", [("cifar10", "cifar-10-python.tar.gz"), ("gtsrb", "gtsrb/"), ("nmnist", "NMNIST/Train")])
def test_no_network_says_where_to_put_the_file(tmp_path, monkeypatch, name, hint):
    from tonic import datasets as events
    from torchvision import datasets as images

    def unreachable(*args, **kwargs):
        raise OSError("<urlopen error: network is unreachable>")
    for module, cls in ((images, "CIFAR10"), (images, "GTSRB"), (events, "NMNIST")):
        monkeypatch.setattr(module, cls, unreachable)
    with pytest.raises(ValueError, match=hint):
        load(name, tmp_path)
    assert not list(tmp_path.glob("*.npz"))


def test_partial_nmnist_folder(tmp_path):
    """Recordings in the official 5-byte format, written here, come back as the counts that they hold."""
    rng = np.random.default_rng(0)
    for part, count in (("Train", 8), ("Test", 3)):
        for digit in (0, 1):
            folder = tmp_path / "NMNIST" / part / str(digit)
            folder.mkdir(parents=True)
            for i in range(count):
                x, y, p = rng.integers(0, 34, 40), rng.integers(0, 34, 40), rng.integers(0, 2, 40)
                t = np.sort(rng.integers(0, 300_000, 40))
                raw = np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1).astype(np.uint8)
                (folder / f"{i:05d}.bin").write_bytes(raw.tobytes())
    d = load("nmnist", tmp_path, T=5)
    assert d.events and len(d.x_train) + len(d.x_test) == 22 and d.x_train.shape[1:] == (5, 2, 34, 34)
    assert (d.x_train.flatten(2).sum(2) == 8).all()              # 40 events in 5 steps of 8
    assert "22 of N-MNIST's 70,000" in d.note


def test_framing_counts_by_hand():
    events = np.zeros(4, dtype=[("x", int), ("y", int), ("t", int), ("p", int)])
    events["x"], events["y"], events["t"], events["p"] = [1, 1, 2, 3], [5, 5, 6, 7], [10, 20, 30, 40], [1, 1, 0, 1]
    frames = to_frames([events], T=2)
    assert frames.shape == (1, 2, 2, 34, 34) and frames.sum() == 4
    assert frames[0, 0, 1, 5, 1] == 2 and frames[0, 1, 0, 6, 2] == 1 and frames[0, 1, 1, 7, 3] == 1


def test_simulated_sensor():
    """A blank image gives no events; ON and OFF mirror a moving edge; times rise within 300 ms; brighter moves more."""
    images = torch.zeros(3, 28, 28)
    images[1, 8:20, 8:20], images[2, 8:20, 8:20] = 0.3, 1.0
    blank, faint, bright = simulate_saccades(images)
    assert len(blank) == 0 < len(faint) < len(bright)
    assert set(bright["p"]) == {0, 1} and (np.diff(bright["t"]) >= 0).all() and 0 < bright["t"].min() and bright["t"].max() <= 300_000
    assert bright["x"].max() < 34 and bright["y"].max() < 34
    first = bright[bright["t"] <= 30_000]            # moves right and down: the front edges brighten
    assert first[first["p"] == 1]["y"].mean() > first[first["p"] == 0]["y"].mean()


def test_augment():
    x = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).view(2, 3, 6, 6)
    assert torch.equal(augment(x, 0, False, 0, torch.Generator()), x)
    seen = set()
    for seed in range(40):
        for out, image in zip(augment(x, 1, True, 0, torch.Generator().manual_seed(seed)), x):
            padded = torch.nn.functional.pad(image, (1,) * 4)
            options = {(dy, dx, f): (padded[:, dy:dy + 6, dx:dx + 6].flip(2) if f else padded[:, dy:dy + 6, dx:dx + 6])
                       for dy in range(3) for dx in range(3) for f in (0, 1)}
            match = [k for k, v in options.items() if torch.equal(v, out)]
            assert len(match) == 1
            seen.update(match)
    assert len(seen) == 18
    frames = torch.randint(0, 9, (2, 4, 2, 34, 34), dtype=torch.uint8)
    assert augment(frames, 1, False, 0, torch.Generator().manual_seed(0)).shape == frames.shape


def test_augment_contrast():
    """Black is lifted by 0 to 0.5, what is left of the range keeps 0.5 to 1; every pixel of an image the same way; the same in bytes."""
    ramp = torch.linspace(0, 1, 36).view(1, 1, 6, 6).repeat(200, 1, 1, 1)
    out = augment(ramp, 0, False, 0.5, torch.Generator().manual_seed(0)).flatten(1)
    low, high = out.aminmax(dim=1)
    gain = (high - low) / (1 - low)
    for value, (least, most) in ((low, (0, 0.5)), (gain, (0.5, 1))):
        assert least <= value.min() < least + 0.02 and most - 0.02 < value.max() <= most + 1e-6
    assert torch.allclose(out, low[:, None] + (high - low)[:, None] * ramp.flatten(1), atol=1e-6)
    stored = (ramp * 255).round().byte()
    assert (augment(stored, 0, False, 0.5, torch.Generator().manual_seed(0)).flatten(1) / 255 - out).abs().max() < 0.005


def test_poison_counts_of_table_1():
    """P is a share of the TARGET CLASS: 100 of CIFAR-10's 5,000 at 2 %, 5 of CIFAR-100's 500 at 1 %, 178 of N-MNIST's 5,923 at 3 %."""
    for size, ratio, count in ((5000, 0.02, 100), (500, 0.01, 5), (5923, 0.03, 178), (150, 0.05, 8)):
        labels = torch.cat([torch.zeros(size), torch.ones(100)]).long()
        chosen = poison_indices(labels, 0, ratio, seed=0)
        assert len(chosen) == len(chosen.unique()) == count and (labels[chosen] == 0).all()


def test_poison_indices_do_not_depend_on_what_ran_before():
    labels = torch.arange(1000) % 10
    first = poison_indices(labels, 3, 0.2, seed=5)
    torch.manual_seed(123), torch.rand(100)
    assert torch.equal(first, poison_indices(labels, 3, 0.2, seed=5))
    assert not torch.equal(first, poison_indices(labels, 3, 0.2, seed=6))
    for ratio in (0, -0.1, 1.1, 0.001):
        with pytest.raises(ValueError):
            poison_indices(labels, 3, ratio, seed=0)


def test_every_set_has_a_hint():
    assert set(data.BY_HAND) == set(data.IMAGE_SETS + data.EVENT_SETS) - {"digits", "ndigits"}
