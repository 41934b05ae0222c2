"""Data sets, the .npz format, foreign and damaged files, events, augmentation, held-out and poisoned samples."""
import io
import zipfile
from dataclasses import replace

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


def refusal(name, *arguments, **options):
    """The one line with which a set is refused."""
    with pytest.raises(ValueError) as refused:
        load(str(name), *arguments, **options)
    text = str(refused.value)
    assert text and len(text.splitlines()) == 1
    return text


def test_digits(tmp_path, monkeypatch):
    """Converted once, while another process converts it, too."""
    def slow():
        monkeypatch.setattr(sources, "digits", lambda: arrays)
        load("digits", tmp_path)                                    # the other one begins and ends meanwhile
        return arrays

    d, arrays = load("digits", tmp_path), sources.digits()
    (tmp_path / "digits.npz").unlink()
    monkeypatch.setattr(sources, "digits", slow)
    assert d.x_train.shape == (1437, 3, 16, 16) and d.x_test.shape == (360, 3, 16, 16)
    assert d.num_classes == 10 and not d.events and d.y_test.bincount().min() >= 34 and d.x_train.dtype == torch.uint8
    for _ in range(2):          # converts, then reads
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
    assert "/" not in load(write_own(tmp_path / "a set: 100 %.npz")).name
    assert "readable" in refusal(write_own(tmp_path / "own.npz", x_train=objects))


@pytest.mark.parametrize("changes, message", [
    (dict(x_train=X.astype(np.float32)), "must be uint8"), (dict(x_train=X > 127), "must be uint8"),
    (dict(x_train=X.astype(np.int64)), "must be uint8"), (dict(x_test=X[:6] // 255), "nothing but 0 and 1"),
    (dict(x_train=X[..., 0]), "must be [N, H, W, 3]"), (dict(x_train=X.transpose(0, 3, 1, 2)), "must be [N, H, W, 3]"),
    (dict(x_train=np.uint8(3)), "must be [N, H, W, 3]"), (dict(x_train=X[:, :8]), "at least 16"),
    (dict(x_train=X[:5]), "5 samples"), (dict(x_train=X[:0], y_train=Y[:0]), "0 samples"),
    (dict(x_test=np.full((6, 20, 20, 3), 9, np.uint8)), "differ in shape"), (dict(y_train=Y / 3), "whole numbers"),
    (dict(y_train=np.eye(12, dtype=int)), "whole numbers"), (dict(y_train=np.array(["cat"] * 12)), "whole numbers"),
    (dict(y_train=Y + 1), "outside are 3"), (dict(y_train=Y * 10), "outside are 10, 20"),
    (dict(y_train=Y * 0, y_test=Y[:6] * 0), "outside are none"), (dict(y_test=Y[:6] - 1), "outside are -1")])
def test_bad_npz(tmp_path, changes, message):
    text = refusal(write_own(tmp_path / "own.npz", **changes))
    assert text.startswith(f"{tmp_path / 'own.npz'}: ") and message in text


def npy(x):
    file = io.BytesIO()
    np.save(file, x, allow_pickle=True)
    return file.getvalue()


def of_bytes(**entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(f"{name}.npy", content)
    return file.getvalue()


PACKED = {key: npy(x) for key, x in ARRAYS.items()}
HUGE = npy(X[:1]).replace(b"(1, 16, 16, 3), }" + b" " * 14, b"(99999999999, 16, 16, 3), }    ")


@pytest.mark.parametrize("content", [
    b"", b"<!DOCTYPE html>", npy(X), of_bytes(), of_bytes(x_train=b"<html>"), of_bytes(**PACKED | {"x_train": HUGE}),
    of_bytes(**PACKED | {"y_test": b"0 1 2"}), of_bytes(**PACKED)[:3000], None], ids=range(9))
def test_no_npz_at_all(tmp_path, content):
    path = tmp_path / "own.npz"
    path.write_bytes(content) if content is not None else path.mkdir()
    text = refusal(path)
    assert text.startswith(f"{path}: ") and "context manager" not in text
    assert "no such file" in refusal(tmp_path / "none.npz") and "unknown dataset" in refusal("mnist")


def test_an_asr_needs_test_samples_of_another_class(tmp_path):
    def settings_for(**changes):
        own = write_own(tmp_path / "own.npz", **changes)
        return lambda target: preset(own, device="cpu", poison_ratio=0.5, target=target)
    of_one_class = settings_for(y_test=np.full(6, 1))
    assert (load_for(of_one_class(0)).y_test != 0).all()         # without the target class is fine
    with pytest.raises(ValueError, match="--target"):
        load_for(of_one_class(1))
    with pytest.raises(ValueError, match="--target"):            # of the held-out samples, too
        load_for(settings_for(y_train=np.array([0] * 10 + [1, 2]))(0))


@pytest.mark.parametrize("name, converter, hint", [
    ("cifar10", "image_set", "cifar-10-python.tar.gz"), ("gtsrb", "image_set", "gtsrb/"),
    ("nmnist", "nmnist", "NMNIST/Train"), ("digits", "digits", "requirements.txt")])
def test_whatever_a_converter_raises_is_one_line_with_the_remedy(tmp_path, monkeypatch, name, converter, hint):
    def convert(*args):
        raise error
    monkeypatch.setattr(sources, converter, convert)
    for error in (OSError("<urlopen error: unreachable>"), KeyError("Filename"), AssertionError(), SyntaxError("PNG"),
                  zipfile.BadZipFile("no\nzip"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ImportError("No")):
        text = refusal(name, tmp_path)
        assert type(error).__name__ in text and hint in text
    for error in (KeyboardInterrupt(), MemoryError()):
        with pytest.raises(type(error)):
            load(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_gtsrb_folder(tmp_path):
    """Four training images of two classes and two test images, as the archives unpack; then one of them damaged."""
    base, rng = tmp_path / "gtsrb/GTSRB", np.random.default_rng(0)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i in range(6):
        folder = base / (f"Training/{i % 2:05d}" if i < 4 else "Final_Test/Images")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)).save(folder / f"{i:05d}.ppm")
        rows += [f"{i:05d}.ppm;30;30;5;5;25;25;{i % 2}"] * (i >= 4)
    (tmp_path / "gtsrb/GT-final_test.csv").write_text("\n".join(rows) + "\n")
    last = base / "Training/00001/00003.ppm"
    image, whole = Image.open(last).resize((32, 32), resample=2), last.read_bytes()
    last.write_bytes(whole[:100])
    assert "put GTSRB" in refusal("gtsrb", tmp_path) and not list(tmp_path.glob("*.npz"))
    last.write_bytes(whole)
    d = load("gtsrb", tmp_path)
    assert d.x_train.shape == (4, 3, 32, 32) and d.y_train.tolist() == [0, 0, 1, 1] and d.y_test.tolist() == [0, 1]
    assert np.array_equal(d.x_train[3].permute(1, 2, 0), np.asarray(image)) and d.class_names == ["0", "1"]


def test_cifar_is_stored_as_it_is(tmp_path, monkeypatch):
    from torchvision import datasets
    x = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)

    class Fake(datasets.CIFAR10):
        def __init__(self, root, train, download):
            self.data, self.targets = x if train else x[:6], [0, 1, 2] * (4 if train else 2)
            self.classes, self.transform, self.target_transform = ["cat", "dog", "car"], None, None
    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    d = load("cifar10", tmp_path)
    assert np.array_equal(d.x_train.permute(0, 2, 3, 1), x) and d.y_test.tolist() == [0, 1, 2] * 2
    assert d.class_names == load("cifar10", tmp_path).class_names == ["cat", "dog", "car"]


# ---------------------------------------------------------------------------------------------------------
# Events

def write_recordings(root, counts=(8, 3), digits=(0, 1), parts="NMNIST/Train NMNIST/Test", events=40):
    """Recordings in the official 5-byte format, of uniform events."""
    rng = np.random.default_rng(0)
    for part, count in zip(parts.split(), counts):
        for digit in digits:
            folder = root / part / str(digit)
            folder.mkdir(parents=True)
            for i in range(count):
                x, y, p = rng.integers(0, 34, events), rng.integers(0, 34, events), rng.integers(0, 2, events)
                t = np.sort(rng.integers(0, 300_000, events))
                raw = np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1).astype(np.uint8)
                (folder / f"{i:05d}.bin").write_bytes(raw.tobytes())
    return folder


def test_part_of_the_nmnist_folder(tmp_path, capsys):
    """Recordings come back as the counts that they hold; damaged ones are left out and named; two per digit do."""
    folder = write_recordings(tmp_path)
    whole = (folder / "00000.bin").read_bytes()
    for i, content in enumerate((b"", whole[:-2], whole[:15], b"<!DOCTYPE html><html>404</html>".ljust(500))):
        (folder / f"1000{i}.bin").write_bytes(content)
    d = load("nmnist", tmp_path, T=5)
    assert d.events and len(d.x_train) + len(d.x_test) == 22 and d.x_train.shape[1:] == (5, 2, 34, 34)
    assert (d.x_train.flatten(2).sum(2) == 8).all()              # 40 events in 5 steps of 8
    assert "22 of N-MNIST's 70,000" in d.note and capsys.readouterr().out.count("leaves out Test/1/1000") == 4
    write_recordings(tmp_path / "b", (2,), range(10), "nmnist/TRAIN")
    (tmp_path / "b/nmnist/TRAIN/0/._00000.bin").write_bytes(bytes(4096))
    d = load("nmnist", tmp_path / "b")
    assert len(d.x_train) == len(d.x_test) == 10 == len(d.y_train.unique()) == len(d.y_test.unique())
    assert "[0, 0] usable" in refusal("nmnist", tmp_path, T=41)
    write_recordings(tmp_path / "c", (5, 0), (0, 2))
    assert "[5, 0, 5] usable recordings" in refusal("nmnist", tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.npz"))


def test_framing_counts_by_hand():
    events = np.zeros(4, dtype=[("x", int), ("y", int), ("t", int), ("p", int)])
    events["x"], events["y"], events["t"], events["p"] = [1, 1, 2, 3], [5, 5, 6, 7], [10, 20, 30, 40], [1, 1, 0, 1]
    frames = to_frames([events], T=2)
    assert frames.shape == (1, 2, 2, 34, 34) and frames.sum() == 4
    assert frames[0, 0, 1, 5, 1] == 2 and frames[0, 1, 0, 6, 2] == 1 and frames[0, 1, 1, 7, 3] == 1
    for T in (0, 5):
        with pytest.raises(ValueError, match=f"4 events for {T} steps"):
            to_frames([events], T)


def test_simulated_sensor():
    """A blank image gives no events; ON and OFF mirror a moving edge; times rise within 300 ms; brighter moves more."""
    images = torch.zeros(3, 28, 28)
    images[1, 8:20, 8:20], images[2, 8:20, 8:20] = 0.3, 1.0
    blank, faint, bright = simulate_saccades(images)
    assert len(blank) == 0 < len(faint) < len(bright)
    assert set(bright["p"]) == {0, 1} and (np.diff(bright["t"]) >= 0).all()
    assert 0 < bright["t"].min() and bright["t"].max() <= 300_000
    assert bright["x"].max() < 34 and bright["y"].max() < 34
    first = bright[bright["t"] <= 30_000]            # moves right and down: the front edges brighten
    assert first[first["p"] == 1]["y"].mean() > first[first["p"] == 0]["y"].mean()


# ---------------------------------------------------------------------------------------------------------
# Samples

def test_augment():
    """Every sample is one of its shifts and mirror images, all of which occur."""
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
    frames = torch.randint(0, 9, (2, 4, 2, 34, 34), dtype=torch.uint8)
    assert augment(frames, 1, False, 0, torch.Generator().manual_seed(0)).shape == frames.shape


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


@pytest.mark.parametrize("share, counts", [(0.1, [10, 1, 1, 0]), (0.25, [25, 2, 1, 0]), (0.99, [99, 8, 1, 0])])
def test_hold_out(tmp_path, share, counts):
    """The two parts are the training set, cut in two per class; the test samples stay where they were; no random
    numbers of anyone else are used."""
    y = np.repeat(np.arange(4), [100, 9, 2, 1])
    x = np.arange(len(y), dtype=np.uint8)[:, None, None, None] + np.zeros((1, 16, 16, 3), np.uint8)  # tells them apart
    d = load(write_own(tmp_path / "own.npz", x_train=x, y_train=y))
    state = torch.get_rng_state()
    train_data, held = hold_out(d, share)
    of_train, of_held = (x[:, 0, 0, 0].tolist() for x in (train_data.x_train, held.x_test))
    assert sorted(of_train + of_held) == list(range(len(y))) and y[of_train].tolist() == train_data.y_train.tolist()
    assert held.y_test.bincount(minlength=4).tolist() == counts and y[of_held].tolist() == held.y_test.tolist()
    assert torch.equal(held.x_train, train_data.x_train) and torch.equal(train_data.x_test, d.x_test)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(held.x_test, hold_out(d, share)[1].x_test)
    with pytest.raises(ValueError, match="two training samples"):
        hold_out(replace(d, x_train=d.x_train[:1], y_train=d.y_train[:1]))
