"""Data sets, the .npz format, foreign and damaged files, events, augmentation, held-out and poisoned samples."""
import csv
import io
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import augment, hold_out, load, load_for, poison_indices, simulate_saccades, to_frames
from settings import preset


def arrays(**changes):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    y = np.arange(12) % 3
    return {**dict(x_train=x, y_train=y, x_test=x[:6], y_test=y[:6]), **changes}


def one_line(refused):
    """The text of a refusal: one line, whatever the file holds."""
    text = str(refused.value)
    assert text and len(text.splitlines()) == 1
    return text


def write_own(path, **changes):
    np.savez(path, **arrays(**changes))
    return str(path)


def test_digits(tmp_path):
    d = load("digits", tmp_path)
    assert d.x_train.shape == (1437, 3, 16, 16) and d.x_test.shape == (360, 3, 16, 16)
    assert d.num_classes == 10 and not d.events and d.y_test.bincount().min() >= 34 and d.x_train.dtype == torch.uint8
    before = (tmp_path / "digits.npz").stat().st_mtime_ns
    again = load("digits", tmp_path)
    assert torch.equal(again.x_train, d.x_train) and (tmp_path / "digits.npz").stat().st_mtime_ns == before
    assert {**vars(again), **vars(d)}.keys() == vars(d).keys() and (again.mean, again.note) == (d.mean, d.note)
    assert [p.name for p in tmp_path.iterdir()] == ["digits.npz"]          # no temporary file is left


def test_own_npz(tmp_path):
    d = load(write_own(tmp_path / "own.npz"))
    assert d.num_classes == 3 and torch.equal(d.x_train[5], torch.from_numpy(arrays()["x_train"][5]).permute(2, 0, 1))


@pytest.mark.parametrize("stem, name", [
    ("flowers", "flowers"), ("digits2", "digits2"), ("digits", "own-digits"), ("Digits", "own-Digits"),
    ("digits-binary", "own-digits-binary"), ("digits_x", "own-digits_x"), ("cifar10_10k", "own-cifar10_10k"),
    ("nmnist-binary", "own-nmnist-binary"), (" digits", "own-digits"), ("digits.v2", "own-digits_v2"),
    ("my own set", "my_own_set"), (".hidden", "hidden"), ("...", "own"), ("%%%", "own"), ("a:b*c?", "a_b_c")])
def test_own_results_never_go_into_a_known_sets_folder(tmp_path, stem, name):
    """Nor into a variant's, which is the known set's name and what follows - or _; and every name makes a folder."""
    assert load(write_own(tmp_path / f"{stem}.npz")).name == name
    (tmp_path / "results" / name).mkdir(parents=True)


OBJECTS = np.array([[1], "x"], dtype=object)
X = arrays()["x_train"]


@pytest.mark.parametrize("changes, message", [
    (dict(x_train=OBJECTS), "readable"),
    (dict(x_train=X.astype(np.float32)), r"must be uint8.*\(x \* 255\).astype\(np.uint8\)"),
    (dict(x_train=X[..., 0]), r"must be \[N, H, W, 3\].*np.repeat\(x\[..., None\], 3, 3\)"),
    (dict(x_train=X.transpose(0, 3, 1, 2)), r"must be \[N, H, W, 3\].*x.transpose\(0, 2, 3, 1\)"),
    (dict(x_train=np.uint8(3)), r"must be \[N, H, W, 3\]"), (dict(x_train=X[:, :8]), r"at least 16.*x.repeat"),
    (dict(x_train=X[:5]), "5 samples"), (dict(x_train=X[:0], y_train=np.arange(0)), "0 samples"),
    (dict(x_test=np.zeros((6, 20, 20, 3), np.uint8)), "differ in shape"),
    (dict(y_train=np.arange(12) / 3), r"whole numbers.*astype\(int\)"),
    (dict(y_train=np.eye(12, dtype=int)), r"whole numbers.*argmax\(1\)"),
    (dict(y_train=np.array(["cat"] * 12)), "whole numbers"), (dict(y_train=np.int64(3)), "whole numbers")])
def test_bad_npz(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        load(write_own(tmp_path / "own.npz", **changes))
    assert one_line(refused).startswith(f"{tmp_path / 'own.npz'}: ")


@pytest.mark.parametrize("y_train, y_test, outside", [
    ([1, 2, 3, 4], [1, 2], "4"), ([0, 10, 20, 30], [0, 10], "10, 20, 30"), ([-1, 0, 1, 2], [0, 1], "-1"),
    ([0, 1, 2, 2], [0, 9], "9"), ([0, 1, 3, 3], [2, 2], "3"), ([0, 0, 0, 0], [0, 0], "none"),
    ([0, 1, 0, 10 ** 12], [0, 1], "1000000000000")])
def test_every_class_has_training_samples(tmp_path, y_train, y_test, outside):
    own = dict(x_train=X[:4], y_train=np.array(y_train), x_test=X[:2], y_test=np.array(y_test))
    with pytest.raises(ValueError, match=f"labels.*outside are {outside};") as refused:
        load(write_own(tmp_path / "own.npz", **own))
    assert "y = np.unique(y, return_inverse=True)[1]" in one_line(refused)
    y = np.unique(np.concatenate([y_train, y_test]), return_inverse=True)[1]        # the remedy helps where it can
    if set(y_test) <= set(y_train) and len(set(y_train)) > 1:
        own.update(y_train=y[:4], y_test=y[4:])
        assert load(write_own(tmp_path / "own.npz", **own)).num_classes == len(set(y_train))


def test_missing_truncated_and_incomplete_npz(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load(str(tmp_path / "own.npz"))
    write_own(tmp_path / "own.npz")
    whole = (tmp_path / "own.npz").read_bytes()
    (tmp_path / "own.npz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="readable"):
        load(str(tmp_path / "own.npz"))
    some = arrays()
    del some["y_test"]
    np.savez(tmp_path / "own.npz", **some)
    with pytest.raises(ValueError, match="'y_test'"):
        load(str(tmp_path / "own.npz"))
    for name in ("mnist", "own.npy", ""):
        with pytest.raises(ValueError, match="unknown dataset"):
            load(name)


def of_bytes(**entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(x):
    file = io.BytesIO()
    np.save(file, x, allow_pickle=True)
    return file.getvalue()


HUGE = npy(X[:1]).replace(b"(1, 16, 16, 3), }" + b" " * 14, b"(99999999999, 16, 16, 3), }    ")
assert b"999" in HUGE
PACKED = {key: npy(x) for key, x in arrays().items()}


@pytest.mark.parametrize("content", [
    b"", b"<!DOCTYPE html>", npy(X), npy(OBJECTS), of_bytes(), of_bytes(x_train=b"<html>"), of_bytes(x_train=b""),
    of_bytes(**{**PACKED, "x_train": HUGE}), of_bytes(**{**PACKED, "y_test": b"0 1 2"}), b"PK" + bytes(100)])
def test_no_npz_at_all(tmp_path, content):
    (tmp_path / "own.npz").write_bytes(content)
    with pytest.raises(ValueError) as refused:
        load(str(tmp_path / "own.npz"))
    assert one_line(refused).startswith(f"{tmp_path / 'own.npz'}: ") and "context manager" not in str(refused.value)


def test_a_folder_is_no_npz(tmp_path):
    (tmp_path / "own.npz").mkdir()
    with pytest.raises(ValueError, match="own.npz: not a file"):
        load(str(tmp_path / "own.npz"))


def test_what_a_data_set_does_not_need_is_not_read(tmp_path):
    np.savez(tmp_path / "own.npz", **arrays(), classes=OBJECTS, class_names=np.array("cat"))
    assert load(str(tmp_path / "own.npz")).class_names == ["0", "1", "2"]
    np.savez(tmp_path / "own.npz", **arrays(), class_names=np.array(["cat", "dog", "car"]))
    assert load(str(tmp_path / "own.npz")).class_names == ["cat", "dog", "car"]


def test_mean_and_std_are_those_of_the_pixels(tmp_path):
    d = load(write_own(tmp_path / "own.npz"))
    pixels = d.x_train.double().div(255).transpose(0, 1).flatten(1)
    assert np.abs(pixels.mean(1).numpy() - d.mean).max() < 1e-9 and np.abs(pixels.std(1).numpy() - d.std).max() < 1e-9


def in_another_process(code, *arguments):
    """What Python code, run beside data.py, prints."""
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                         cwd=Path(data.__file__).parent)
    assert run.returncode == 0, run.stderr
    return run.stdout


MEMORY = """
import sys, data
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
data.load(sys.argv[1])
before = peak()
data.load(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_loading_takes_at_most_three_times_the_memory_of_the_images(tmp_path):
    x = np.zeros((20_000, 32, 32, 3), np.uint8)                     # 61 MB
    small = write_own(tmp_path / "small.npz")
    large = write_own(tmp_path / "large.npz", x_train=x, y_train=np.arange(len(x)) % 3, x_test=x[:6])
    assert int(in_another_process(MEMORY, small, large)) < 3 * x.nbytes


def test_two_processes_convert_at_the_same_time(tmp_path, monkeypatch):
    """While this process converts, another begins and ends its own conversion of the same set."""
    def slow():
        code = "import sys, data; print(len(data.load('digits', sys.argv[1]).x_train))"
        seen.append(in_another_process(code, tmp_path))
        return digits()
    digits, seen = data.digits, []
    monkeypatch.setattr(data, "digits", slow)
    assert len(load("digits", tmp_path).x_train) == int(seen[0].split()[-1]) == 1437
    assert [p.name for p in tmp_path.iterdir()] == ["digits.npz"]


def settings_for(path, **changes):
    return preset(str(path), **{**dict(device="cpu", poison_ratio=0.5, baseline_ratio=0.5), **changes})


def test_an_asr_needs_test_samples_of_another_class(tmp_path):
    own = write_own(tmp_path / "own.npz", y_test=np.full(6, 1))
    with pytest.raises(ValueError, match="target class 1.*--target") as refused:
        load_for(settings_for(own, target=1))
    one_line(refused)
    assert (load_for(settings_for(own, target=0)).y_test != 0).all()         # without the target class is fine
    own = write_own(tmp_path / "own.npz", y_train=np.array([0] * 10 + [1, 2]))
    with pytest.raises(ValueError, match="held out"):
        load_for(settings_for(own, target=0))


@pytest.mark.parametrize("name, hint", [("cifar10", "cifar-10-python.tar.gz"), ("gtsrb", "gtsrb/"),
                                        ("nmnist", r"NMNIST/Train.*nmnist-T4\.npz")])
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


ERRORS = (KeyError("Filename"), IndexError(), AssertionError(), zipfile.BadZipFile("no zip"), csv.Error("a\nline"),
          EOFError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ImportError("No module"), SyntaxError("PNG"))


@pytest.mark.parametrize("name, converter", [
    ("cifar10", "image_set"), ("gtsrb", "image_set"), ("nmnist", "nmnist"), ("digits", "digits"),
    ("ndigits", "digits")])
def test_whatever_a_converter_raises_is_one_line(tmp_path, monkeypatch, name, converter):
    def convert(*args):
        raise error
    monkeypatch.setattr(data, converter, convert)
    for error in ERRORS:
        expected = f"{name} could not be downloaded or read.*{type(error).__name__}.*; put "
        with pytest.raises(ValueError, match=expected) as refused:
            load(name, tmp_path)
        one_line(refused)
    for error in (KeyboardInterrupt(), MemoryError()):
        with pytest.raises(type(error)):
            load(name, tmp_path)
    assert not list(tmp_path.iterdir())


def write_gtsrb(root, header="Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId", row="{};30;30;5;5;25;25;{}"):
    """Four training images of two classes and two test images, as the archives unpack."""
    base, rng = root / "gtsrb", np.random.default_rng(0)
    test, rows = base / "GTSRB/Final_Test/Images", [header]
    for i in range(6):
        folder = base / f"GTSRB/Training/{i % 2:05d}" if i < 4 else test
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)).save(folder / f"{i:05d}.ppm")
        if i >= 4:
            rows.append(row.format(f"{i:05d}.ppm", i % 2))
    (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return base / "GTSRB"


def test_gtsrb_folder(tmp_path):
    image = Image.open(write_gtsrb(tmp_path) / "Training/00001/00003.ppm").resize((32, 32), resample=2)
    d = load("gtsrb", tmp_path)
    assert d.x_train.shape == (4, 3, 32, 32) and d.y_train.tolist() == [0, 0, 1, 1] and d.y_test.tolist() == [0, 1]
    assert np.array_equal(d.x_train[3].permute(1, 2, 0), np.asarray(image)) and d.class_names == ["0", "1"]


@pytest.mark.parametrize("damage", ["commas", "header", "no rows", "no number", "class", "image", "no image", "html"])
def test_foreign_and_damaged_gtsrb_files(tmp_path, damage):
    """What cannot be read, and what reads but makes no data set, is refused before anything is written."""
    base = write_gtsrb(tmp_path, **{"commas": dict(header="Width,Height,Filename,ClassId", row="30,30,{},{}"),
                                    "header": dict(header="Path;Label", row="{};{}"),
                                    "no number": dict(row="{};30;30;5;5;25;25;x{}")}.get(damage, {}))
    table, image = tmp_path / "gtsrb/GT-final_test.csv", base / "Training/00001/00003.ppm"
    if damage == "no rows":
        table.write_text(table.read_text().splitlines()[0])
    if damage == "class":                           # test images of a class without training images
        table.write_text(table.read_text().replace(";1\n", ";7\n"))
    if damage == "image":
        image.write_bytes(image.read_bytes()[:100])
    if damage == "no image":
        (base / "Final_Test/Images/00005.ppm").unlink()
    if damage == "html":
        image.write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match="gtsrb could not be downloaded or read.*put GTSRB") as refused:
        load("gtsrb", tmp_path)
    one_line(refused)
    assert not list(tmp_path.glob("*.npz"))


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


def test_partial_nmnist_folder(tmp_path):
    """Recordings in the official 5-byte format, written here, come back as the counts that they hold."""
    write_recordings(tmp_path)
    d = load("nmnist", tmp_path, T=5)
    assert d.events and len(d.x_train) + len(d.x_test) == 22 and d.x_train.shape[1:] == (5, 2, 34, 34)
    assert (d.x_train.flatten(2).sum(2) == 8).all()              # 40 events in 5 steps of 8
    assert "22 of N-MNIST's 70,000" in d.note


@pytest.mark.parametrize("parts", ["NMNIST/Train", "NMNIST/Test", "NMNIST/train NMNIST/test", "nmnist/TRAIN"])
@pytest.mark.parametrize("count", [2, 8])
def test_any_part_of_the_nmnist_folder_works(tmp_path, parts, count):
    """Two recordings per digit are enough: one to train and one to test."""
    write_recordings(tmp_path, (count, count), range(10), parts)
    (tmp_path / parts.split()[0] / "0" / "._00000.bin").write_bytes(bytes(4096))
    d = load("nmnist", tmp_path)
    assert len(d.x_train) + len(d.x_test) == 10 * count * len(parts.split())
    assert len(d.y_train.unique()) == len(d.y_test.unique()) == d.num_classes == 10


def test_damaged_recordings_are_left_out_and_named(tmp_path, capsys):
    folder = write_recordings(tmp_path)
    whole = (folder / "00000.bin").read_bytes()
    for i, content in enumerate((b"", whole[:-2], whole[:15], b"<!DOCTYPE html><html>404</html>".ljust(500), bytes(200),
                                 whole[:100] + bytes(100))):
        (folder / f"1000{i}.bin").write_bytes(content)
    (folder / "20000.bin").mkdir()
    d = load("nmnist", tmp_path)
    assert len(d.x_train) == 17 and "22 of N-MNIST's 70,000 recordings, 7 damaged or too short ones left out" in d.note
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert said[0].startswith("nmnist left out 7 of 29 recordings: Test/1/10000.bin (0 events for 4 steps), "
                              "Test/1/10001.bin (cut off within an event), Test/1/10002.bin (3 events for 4 steps), ")
    assert len(said) == 1 and said[0].count("Test/1/") == 7 and "more" not in said[0]


@pytest.mark.parametrize("counts, digits, found", [
    ((1, 0), (0, 1), "[1, 1]"), ((8, 0), (0,), "[8, 0]"), ((5, 0), (0, 2), "[5, 0, 5]")])
def test_too_few_recordings_are_refused(tmp_path, counts, digits, found):
    write_recordings(tmp_path, counts, digits)
    with pytest.raises(ValueError, match="each needs 2 or more.*put the recordings as") as refused:
        load("nmnist", tmp_path)
    assert f"{tmp_path}/NMNIST has {found} usable recordings" in one_line(refused)
    assert not list(tmp_path.glob("*.npz"))


def test_more_steps_than_events_are_refused(tmp_path, capsys):
    images = torch.zeros(1, 28, 28)
    images[0, 8:20, 8:20] = 1
    for T in (0, 5000):
        with pytest.raises(ValueError, match=f"events for {T} steps"):
            to_frames(simulate_saccades(images), T)
    write_recordings(tmp_path)
    with pytest.raises(ValueError, match=r"\[0, 0\] usable"):
        load("nmnist", tmp_path, T=41)
    assert "left out 22 of 22" in capsys.readouterr().out and not list(tmp_path.glob("*.npz"))


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
    assert set(bright["p"]) == {0, 1} and (np.diff(bright["t"]) >= 0).all()
    assert 0 < bright["t"].min() and bright["t"].max() <= 300_000
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
    """P is a share of the TARGET CLASS: 100 of CIFAR-10's 5,000 at 2 %, 5 of CIFAR-100's 500, 178 of 5,923."""
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


@pytest.mark.parametrize("share, counts", [(0.1, [10, 1, 1, 0]), (0.25, [25, 2, 1, 0]), (0.99, [99, 8, 1, 0])])
def test_hold_out(tmp_path, share, counts):
    """The two parts are the training set, cut in two per class; the test samples stay where they were."""
    y = np.repeat(np.arange(4), [100, 9, 2, 1])
    x = np.arange(len(y), dtype=np.uint8)[:, None, None, None] + np.zeros((1, 16, 16, 3), np.uint8)  # tells them apart
    d = load(write_own(tmp_path / "own.npz", x_train=x, y_train=y))
    train_data, held = hold_out(d, share)
    of_train, of_held = (x[:, 0, 0, 0].tolist() for x in (train_data.x_train, held.x_test))
    assert sorted(of_train + of_held) == list(range(len(y))) and y[of_train].tolist() == train_data.y_train.tolist()
    assert held.y_test.bincount(minlength=4).tolist() == counts and y[of_held].tolist() == held.y_test.tolist()
    assert torch.equal(held.x_train, train_data.x_train) and torch.equal(train_data.x_test, d.x_test)
    assert (train_data.name, held.mean, held.num_classes) == (d.name, d.mean, d.num_classes)


def test_hold_out_is_drawn_by_its_own_generator(digits):
    d = load("digits", digits)
    torch.manual_seed(1)
    first, state = hold_out(d)[1], torch.get_rng_state()
    torch.manual_seed(2), torch.rand(7)
    assert torch.equal(first.x_test, hold_out(d)[1].x_test)
    torch.manual_seed(1)
    hold_out(d)
    assert torch.equal(torch.get_rng_state(), state)                # and it takes nothing from anyone else
    with pytest.raises(ValueError, match="two training samples"):
        hold_out(replace(d, x_train=d.x_train[:1], y_train=d.y_train[:1]))
