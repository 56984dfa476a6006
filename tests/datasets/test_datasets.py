"""Multi-CV's data sets: what is in the files is what is read, and damage gets one line."""

from __future__ import annotations

import gzip
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import image_files
import numpy as np
import pytest
from image_files import Raw, lay_out, matrix, packed
from PIL import Image

from leap_dist.config.loading import ConfigError
from leap_dist.datasets import __main__ as listing
from leap_dist.datasets import formats, multicv
from leap_dist.datasets.splits import Split, divide, hold_out

ORIGINAL = multicv.SOURCES
NAMES = tuple(ORIGINAL)
SHARED = Path(__file__).parents[3] / "shared" / "data" / "multicv"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real files")


@pytest.fixture(autouse=True)
def fewer_images(monkeypatch, request):
    """Every data set is a small one, but where a test is of the real files."""
    if request.node.get_closest_marker("skipif") is None:
        monkeypatch.setattr(multicv, "SOURCES", {name: image_files.small(name) for name in NAMES})


def refusal(data_dir: Path, name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        multicv.find(data_dir, name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data_dir: ")
    source = multicv.SOURCES[name]
    assert f"{source.title} comes from {source.home}; {data_dir / name} must hold {source.layout}" in message
    return message


# --- what is read ----------------------------------------------------------------------------------------------------


def expected(name: str, raw: Raw) -> Raw:
    """The images as they are to come out."""
    if name == "gtsrb":  # in the order of classes, by folder
        order = np.argsort(raw.train_labels, kind="stable")
        return raw._replace(train_images=raw.train_images[order], train_labels=raw.train_labels[order])
    if multicv.SOURCES[name].enlarge is None:
        return raw
    grey = []
    for images in (raw.train_images, raw.test_images):
        if name == "notmnist":
            made = [np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.LANCZOS)) for i in images]
            grey.append(np.stack(made))
        else:
            around = np.zeros((len(images), 32, 32), np.uint8)
            around[:, 2:30, 2:30] = images
            grey.append(around)
    three = [np.repeat(images[..., None], 3, axis=3) for images in grey]
    return raw._replace(train_images=three[0], test_images=three[1])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "facescrub"])
def test_a_data_set_comes_back_as_it_was_written(tmp_path, name):
    wanted = expected(name, lay_out(tmp_path / name, name))
    found = multicv.find(tmp_path, name)
    source = multicv.SOURCES[name]
    assert (found.name, found.classes, found.part) == (name, source.classes, "")
    assert np.array_equal(found.train.images, wanted.train_images)
    assert np.array_equal(found.train.labels, wanted.train_labels)
    assert np.array_equal(found.test.images, wanted.test_images)
    assert np.array_equal(found.test.labels, wanted.test_labels)
    assert found.train.images.shape[1:] == (32, 32, 3)
    assert len(found.mean) == len(found.std) == 3


def test_faces_are_those_of_the_people_with_most_pictures(tmp_path):
    lay_out(tmp_path / "facescrub", "facescrub")
    found = multicv.find(tmp_path, "facescrub")
    assert found.classes == 5
    for split, counts in ((found.train, [19, 19, 19, 20, 19]), (found.test, [2] * 5)):
        assert np.array_equal(np.bincount(split.labels), counts)
        # Person 2 has fewest, and the others keep the order of their names; red says who it is.
        assert np.abs(split.images[:, 16, 16, 0].astype(int) - np.array([0, 40, 120, 160, 200])[split.labels]).max() < 3
    again, other = multicv.find(tmp_path, "facescrub"), multicv.find(tmp_path, "facescrub", seed=1)
    assert np.array_equal(found.train.images, again.train.images)
    assert not np.array_equal(found.test.images, other.test.images)


def test_pictures_are_brought_to_one_size_whole(tmp_path):
    """Left half dark, right half bright: so they stay, whatever the proportion was."""
    lay_out(tmp_path / "gtsrb", "gtsrb")
    table = tmp_path / "gtsrb" / "GT-final_test.csv"
    lines = table.read_text().splitlines()
    wide = np.zeros((30, 90, 3), np.uint8)
    wide[:, 45:] = 200
    Image.fromarray(wide).save(tmp_path / "gtsrb/GTSRB/Final_Test/Images/00000.ppm")
    lines[1] = image_files.sign("00000.ppm", int(lines[1].split(";")[-1]), (90, 30))
    table.write_text("\n".join(lines))
    image = multicv.find(tmp_path, "gtsrb").test.images[0]
    assert (image[:, :14] == 0).all()
    assert (image[:, 18:] == 200).all()


def test_grey_images_hold_one_channel_in_memory(tmp_path):
    lay_out(tmp_path / "mnist", "mnist")
    found = multicv.find(tmp_path, "mnist")
    kept, held = hold_out(found.train, 0.15, seed=0)
    for split in (found.train, found.test, kept, held, found.train.take(np.arange(3))):
        assert (split.images.shape[3], split.images.strides[3]) == (3, 0)
        assert not split.images.flags.writeable


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("mnist", {"train-images-idx3-ubyte.gz": "raw/train-images.idx3-ubyte"}),
        ("cifar10", {f"cifar-10-batches-bin/data_batch_{n}.bin": f"data_batch_{n}.bin" for n in range(1, 6)}),
        ("cifar100", {"train.bin": "cifar-100-binary/train.bin", "test.bin": "cifar-100-binary/test.bin"}),
        ("gtsrb", {"GTSRB/Final_Training": "Final_Training", "GTSRB/Final_Test": "Final_Test"}),
        ("gtsrb", {"GT-final_test.csv": "GTSRB/Final_Test/Images/GT-final_test.csv"}),
        ("facescrub", {f"Person {n}": f"facescrub_aligned/Person {n}" for n in range(6)}),
    ],
)
def test_other_layouts_that_people_have(tmp_path, name, names):
    lay_out(tmp_path / name, name)
    before = multicv.find(tmp_path, name)
    for old, new in names.items():
        target = tmp_path / name / new
        target.parent.mkdir(parents=True, exist_ok=True)
        content = tmp_path / name / old
        if name == "mnist":  # unpacked too, though the name may still say that it is not
            target.write_bytes(gzip.decompress(content.read_bytes()))
            content.unlink()
        else:
            content.rename(target)
    if name == "cifar10":
        (tmp_path / name / "cifar-10-batches-bin/test_batch.bin").rename(tmp_path / name / "test_batch.bin")
    after = multicv.find(tmp_path, name)
    assert np.array_equal(before.train.images, after.train.images)
    assert np.array_equal(before.test.images, after.test.images)


def test_a_link_to_the_data_is_followed(tmp_path):
    lay_out(tmp_path / "elsewhere", "svhn")
    (tmp_path / "svhn").symlink_to(tmp_path / "elsewhere")
    assert multicv.find(tmp_path, "svhn").name == "svhn"
    assert multicv.at_hand(tmp_path) == ("svhn",)


@pytest.mark.parametrize("pack", [bytes, packed])
@pytest.mark.parametrize("kind", [np.uint8, np.float64])
def test_matlab_may_pack_or_not_and_have_other_arrays_too(tmp_path, pack, kind):
    raw = lay_out(tmp_path / "svhn", "svhn")
    digits = np.where(raw.train_labels == 0, 10, raw.train_labels).astype(kind)[:, None]
    arrays = (
        ("other", np.zeros((2, 2))),
        ("y", digits),
        ("X", np.ascontiguousarray(raw.train_images.transpose(1, 2, 3, 0))),
    )
    data = image_files.mat(*(pack(matrix(name, array)) for name, array in arrays))
    (tmp_path / "svhn" / "train_32x32.mat").write_bytes(data)
    found = multicv.find(tmp_path, "svhn").train
    assert np.array_equal(found.images, raw.train_images)
    assert np.array_equal(found.labels, raw.train_labels)


def test_matlab_arrays_of_any_rank_and_name(tmp_path):
    """Elements begin at multiples of eight bytes, whatever the length of the one before."""
    array = np.random.default_rng(0).integers(0, 256, (2, 3, 5)).astype(np.uint8)
    for name in ("x", "four", "seven", "some_name"):
        (tmp_path / "a.mat").write_bytes(image_files.mat(matrix("before", np.eye(3)), matrix(name, array)))
        assert np.array_equal(formats.read(tmp_path / "a.mat", {name: (2, 3, 5)}, most=100)[name], array)


# --- parts of data sets ----------------------------------------------------------------------------------------------


def test_the_test_images_alone_are_divided_and_say_so(tmp_path):
    raw = lay_out(tmp_path / "notmnist", "notmnist")
    for path in (tmp_path / "notmnist").glob("train-*"):
        path.unlink()
    found = multicv.find(tmp_path, "notmnist")
    assert found.name == "notmnist_t10k"
    assert found.part == "the 200 test images of notMNIST, a fifth of them held out"
    assert np.array_equal(np.bincount(found.train.labels), [16] * 10)
    assert np.array_equal(np.bincount(found.test.labels), [4] * 10)
    everything = np.concatenate([found.train.images, found.test.images])
    wanted = expected("notmnist", raw).test_images
    assert sorted(image.tobytes() for image in everything) == sorted(image.tobytes() for image in wanted)
    again, other = multicv.find(tmp_path, "notmnist"), multicv.find(tmp_path, "notmnist", seed=1)
    assert np.array_equal(found.test.images, again.test.images)
    assert not np.array_equal(found.test.images, other.test.images)


def test_test_images_alone_need_two_of_each_class(tmp_path):
    raw = lay_out(tmp_path / "mnist", "mnist")
    for path in (tmp_path / "mnist").glob("train-*"):
        path.unlink()
    labels = np.where(raw.test_labels == 3, 4, raw.test_labels)
    labels[0] = 3
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(image_files.idx(labels))
    assert "class 3 has a single image, which cannot be divided" in refusal(tmp_path, "mnist")


def part_of(raw: Raw, train: int, test: int) -> dict[str, np.ndarray]:
    return {
        "train_images": raw.train_images[:train],
        "train_labels": raw.train_labels[:train].astype(np.uint8),
        "test_images": raw.test_images[:test],
        "test_labels": raw.test_labels[:test].astype(np.uint8),
    }


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_subset_says_so_in_its_name(tmp_path, name, save):
    raw = lay_out(tmp_path / "elsewhere", name)
    (tmp_path / name).mkdir()
    save(tmp_path / name / f"{name}_250.npz", **part_of(raw, 150, 100))
    found = multicv.find(tmp_path, name)
    assert (found.name, len(found.train), len(found.test)) == (f"{name}_250", 150, 100)
    assert found.part == f"250 images of {multicv.SOURCES[name].title}"
    assert np.array_equal(found.train.images, expected(name, raw).train_images[:150])
    assert np.array_equal(found.test.labels, raw.test_labels[:100])


def test_the_whole_is_taken_before_a_part_and_the_larger_part_before_the_smaller(tmp_path):
    raw = drawn = lay_out(tmp_path / "cifar10", "cifar10")
    np.savez(tmp_path / "cifar10" / "cifar10_250.npz", **part_of(raw, 150, 100))
    np.savez(tmp_path / "cifar10" / "cifar10_60.npz", **part_of(drawn, 40, 20))
    assert multicv.find(tmp_path, "cifar10").name == "cifar10"
    (tmp_path / "cifar10" / "cifar10-batches-bin").mkdir()
    (tmp_path / "cifar10" / "cifar-10-batches-bin").rename(tmp_path / "gone")
    assert multicv.find(tmp_path, "cifar10").name == "cifar10_250"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": None}, "train_images.npy"),
        ({"train_images": np.zeros((150, 32, 32, 3), np.float32)}, r"train_images is <f4 \(150, 32, 32, 3\), not \|u1"),
        (
            {"train_images": np.zeros((150, 28, 28), np.uint8)},
            r"is \|u1 \(150, 28, 28\), not \|u1 \(1 to 249, 32, 32, 3\)",
        ),
        ({"train_images": np.zeros((1, 32, 32, 3), np.uint8)}, "1 train images and 150 labels"),
        ({"train_labels": np.full(150, 10, np.uint8)}, "training labels are not from 0 to 9"),
        ({"train_labels": np.zeros(150, np.uint8)}, "no training image of class 1"),
        ({"train_labels": np.array([object()] * 150)}, "train_labels is not an array of plain numbers"),
        (
            {"test_images": np.zeros((99, 32, 32, 3), np.uint8), "test_labels": np.arange(99, dtype=np.uint8) % 10},
            "249 images, not the 250",
        ),
        ({"train_images": np.asfortranarray(np.zeros((150, 32, 32, 3), np.uint8))}, "not an array of plain numbers"),
    ],
)
def test_a_subset_of_another_form_is_refused(tmp_path, change, message):
    (tmp_path / "cifar10").mkdir()
    arrays = part_of(image_files.drawn(multicv.SOURCES["cifar10"]), 150, 100) | change
    np.savez(tmp_path / "cifar10" / "cifar10_250.npz", **{name: a for name, a in arrays.items() if a is not None})
    with pytest.raises(ConfigError, match=message):
        multicv.find(tmp_path, "cifar10")


def test_a_subset_larger_than_the_whole_is_refused(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar10_601.npz").write_bytes(b"")
    assert "more images than CIFAR-10 has" in refusal(tmp_path, "cifar10")


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_there_is_said_with_where_to_get_it(tmp_path, name):
    assert f"{tmp_path / name} is not a folder" in refusal(tmp_path, name)
    (tmp_path / name).mkdir()
    assert re_not_there(refusal(tmp_path, name))


def re_not_there(message: str) -> bool:
    return " is missing" in message or "has no folder of pictures" in message


def test_an_unknown_name_is_told_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="no 'minst' among cifar10, cifar100, mnist"):
        multicv.find(tmp_path, "minst")


FILES = {
    "mnist": [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte",
    ],
    "cifar10": [f"cifar-10-batches-bin/{n}.bin" for n in ("data_batch_1", "data_batch_5", "test_batch")],
    "cifar100": ["train.bin", "test.bin"],
    "svhn": ["train_32x32.mat", "test_32x32.mat"],
    "gtsrb": [
        "GTSRB/Final_Training/Images/00002/GT-00002.csv",
        "GTSRB/Final_Training/Images/00002/00000_00003.ppm",
        "GTSRB/Final_Test/Images/00007.ppm",
        "GT-final_test.csv",
    ],
    "facescrub": ["Person 1/1.png", "Person 1/2.jpg"],
}
CASES = [(name, file) for name, files in FILES.items() for file in files]


@pytest.mark.parametrize(("name", "file"), CASES)
@pytest.mark.parametrize("damage", ["gone", "empty", "half", "pickle", "noise", "folder", "pipe", "device", "sparse"])
def test_a_damaged_file_is_named(tmp_path, name, file, damage):
    lay_out(tmp_path / name, name)
    path = tmp_path / name / file
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "device":
        path.symlink_to("/dev/zero")
    elif damage == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif damage != "gone":
        noise = np.random.default_rng(0).bytes(len(data))
        path.write_bytes(
            {"empty": b"", "half": data[: len(data) // 2], "pickle": pickle.dumps(data), "noise": noise}[damage]
        )
    if name == "facescrub" and damage == "gone":  # a picture fewer is not damage, and people differ in their number
        multicv.find(tmp_path, name)
        return
    message = refusal(tmp_path, name)
    assert path.name.removesuffix(".gz") in message or path.parent.name in message
    if damage in ("folder", "pipe"):
        assert "not a regular file" in message
    if damage == "pickle" and name.startswith("cifar"):
        assert "a pickle, which is not supported" in message


def rewritten(name: str, **change: object) -> Raw:
    return image_files.drawn(replace(multicv.SOURCES[name], **change))


def write_idx(folder: Path, file: str, array: np.ndarray) -> None:
    (folder / file).write_bytes(image_files.idx(array))


def test_wrong_contents_under_the_right_names_of_idx(tmp_path):
    folder, raw = tmp_path / "mnist", lay_out(tmp_path / "mnist", "mnist")
    images = "train-images-idx3-ubyte.gz"
    cases = [
        (images, image_files.idx(raw.test_images), "holds an array of 200 × 28 × 28, not 400 × 28 × 28"),
        (images, image_files.idx(raw.train_images[:, :27]), "400 × 27 × 28"),
        (images, image_files.idx(raw.train_labels), "not an IDX file of images: it begins with 00000801"),
        (images, image_files.idx(raw.train_images) + b"!", "longer than its header says"),
        (images, gzip.compress(image_files.idx(raw.train_images) + b"!"), "longer than its header says"),
        (images, image_files.idx(raw.train_images)[:-1], "cut short"),
        (images, gzip.compress(image_files.idx(raw.train_images))[:-9], "damaged or cut short"),
        (images, b"\x00\x00\x08\x03\x00", "0 × 0 × 0"),
        ("train-labels-idx1-ubyte", image_files.idx(raw.train_labels + 1), "training labels are not from 0 to 9"),
        ("t10k-labels-idx1-ubyte", image_files.idx(raw.test_labels % 9), "no test image of class 9"),
    ]
    for file, data, message in cases:
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(data)
        assert message in refusal(tmp_path, "mnist"), message
        (folder / file).write_bytes(before)
    assert multicv.find(tmp_path, "mnist").name == "mnist"


def test_one_half_of_a_pair_is_not_taken_for_a_subset(tmp_path):
    lay_out(tmp_path / "mnist", "mnist")
    (tmp_path / "mnist" / "train-labels-idx1-ubyte").unlink()
    assert "train-labels-idx1-ubyte is missing, though other files" in refusal(tmp_path, "mnist")


@pytest.mark.parametrize(
    ("name", "other"), [("mnist", "fashion_mnist"), ("fashion_mnist", "notmnist"), ("notmnist", "mnist")]
)
def test_another_data_set_with_the_same_names_is_noticed(tmp_path, name, other):
    lay_out(tmp_path / name, other)
    title = multicv.SOURCES[name].title
    assert f"the training images are not {title}: their mean is 0." in refusal(tmp_path, name)


def test_wrong_contents_of_cifar(tmp_path):
    folder, raw = tmp_path / "cifar100", lay_out(tmp_path / "cifar100", "cifar100")
    train = image_files.cifar(*raw[:1], raw.train_labels // 5, raw.train_labels)
    cases = [
        (train + b"!", "has 1,229,601 bytes, not the 1,229,600 of 400 images"),
        (image_files.cifar(raw.train_images, raw.train_labels // 5, raw.train_labels + 1), "has the label 100"),
        (image_files.cifar(raw.train_images, raw.train_labels // 4, raw.train_labels), "has the label 24"),
        (
            image_files.cifar(raw.train_images, raw.train_labels // 5, raw.train_labels // 2 * 2),
            "no training image of class 1",
        ),
        (
            image_files.cifar(raw.train_images, raw.train_labels // 5, np.maximum(raw.train_labels - 1, 0)),
            "no training image of class 99",
        ),
    ]
    for data, message in cases:
        (folder / "train.bin").write_bytes(data)
        assert message in refusal(tmp_path, "cifar100"), message
    labels = raw.train_labels.copy()
    labels[np.flatnonzero(labels == 3)[0]] = 4
    (folder / "train.bin").write_bytes(image_files.cifar(raw.train_images, labels // 5, labels))
    assert "from 3 to 5 training images of a class, not 4 of each" in refusal(tmp_path, "cifar100")


@pytest.mark.parametrize(("name", "pickled"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_the_python_version_of_cifar_is_recognized(tmp_path, name, pickled):
    (tmp_path / name / pickled).mkdir(parents=True)
    assert f"{pickled} is the Python version (a pickle), which is not supported" in refusal(tmp_path, name)


def test_wrong_contents_of_matlab_files(tmp_path):
    folder, raw = tmp_path / "svhn", lay_out(tmp_path / "svhn", "svhn")
    images = np.ascontiguousarray(raw.train_images.transpose(1, 2, 3, 0))
    digits = np.where(raw.train_labels == 0, 10, raw.train_labels).astype(np.uint8)[:, None]
    x, y = matrix("X", images), matrix("y", digits)
    cases = [
        (image_files.mat(x, y, text=b"MATLAB 7.3 MAT-file"), "MATLAB 7.3 file (HDF5)"),
        (image_files.mat(x, y, end=b"\x01\x00MI"), "not a MATLAB 5 file"),
        (image_files.mat(x), "it has no array y"),
        (image_files.mat(x, matrix("y", digits[:-1])), "y is 399 × 1, not 400 × 1"),
        (image_files.mat(matrix("X", images[..., :-1]), y), "X is 32 × 32 × 3 × 399"),
        (image_files.mat(x, matrix("y", digits, flags=8)), "y is not an array of real numbers"),
        (image_files.mat(x, matrix("y", digits, kind=1)), "y is not an array of real numbers"),
        (image_files.mat(x, matrix("y", digits - 1)), "labels are not whole numbers from 1 to 10"),
        (image_files.mat(x, matrix("y", digits + 0.5)), "labels are not whole numbers from 1 to 10"),
        (image_files.mat(matrix("X", images.astype(float)), y), "more than any that is expected"),
        (image_files.mat(packed(matrix("X", images.astype(float))), y), "unpacks to more than"),
        (image_files.mat(x, y)[:-100], "cut short"),
        (image_files.mat(packed(x), packed(y))[:-9], "cut short"),
        (image_files.mat(packed(x[:-8]), y), "an array of"),
        (image_files.mat(packed(b""), y), "damaged, or holds other data"),
        (image_files.mat(b"\x01\x00\x00\x00\x00\x00\x00\x00", y), "an element of type 1 where an array should be"),
    ]
    for data, message in cases:
        (folder / "train_32x32.mat").write_bytes(data)
        assert message in refusal(tmp_path, "svhn"), message
    (folder / "train_32x32.mat").write_bytes(image_files.mat(packed(x), y))
    assert multicv.find(tmp_path, "svhn").name == "svhn"


def test_wrong_tables_of_signs(tmp_path):
    lay_out(tmp_path / "gtsrb", "gtsrb")
    table = tmp_path / "gtsrb/GTSRB/Final_Training/Images/00001/GT-00001.csv"
    lines = table.read_text().splitlines()
    cases = [
        ([image_files.HEADER.replace(";ClassId", ""), *lines[1:]], "not a table with the columns"),
        (
            [lines[0], "00000_00000.ppm;32;32;5;5;27;27", *lines[2:]],
            "GT-00001.csv:2 is not a name and seven whole numbers",
        ),
        ([lines[0], lines[1] + ";1", *lines[2:]], "GT-00001.csv:2 is not a name and seven whole numbers"),
        ([lines[0], lines[1][:-1] + "x", *lines[2:]], "GT-00001.csv:2 is not a name and seven whole numbers"),
        ([*lines[:-1], lines[-1][:-1] + "2"], "has class 2, not 1…1"),
        ([lines[0], "../00000/00000_00000.ppm;32;32;5;5;27;27;1", *lines[2:]], "which is not a .ppm file beside it"),
        ([lines[0], "00000_00000.ppm;32;32;5;5;33;27;1", *lines[2:]], "a region that is not inside its picture"),
        (
            [lines[0], "00000_00000.ppm;31;32;5;5;27;27;1", *lines[2:]],
            "has (32, 32) pixels, not the (31, 32) of its table",
        ),
        (lines[:-1], "lists 79 pictures, not 80"),
    ]
    for content, message in cases:
        table.write_text("\r\n".join(content))
        assert message in refusal(tmp_path, "gtsrb"), message


def test_too_few_people_are_refused(tmp_path):
    lay_out(tmp_path / "facescrub", "facescrub")
    for number in (0, 1):
        (tmp_path / "facescrub" / "Person 0" / f"{number}.{'png' if number else 'jpg'}").unlink()
        (tmp_path / "facescrub" / "Person 2" / f"{number}.{'png' if number else 'jpg'}").unlink()
    assert "4 people with at least 20 pictures, not 5" in refusal(tmp_path, "facescrub")


# --- what unpacks to more than it should -----------------------------------------------------------------------------

LARGE = 64 * 2**20


def npz_bomb(path: Path) -> None:
    """A header that promises what is expected, and ten times more behind it."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (150, 32, 32, 3), }\n"
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", start + bytes(LARGE))


def bombs(folder: Path, kind: str) -> str:
    if kind == "gzip":
        lay_out(folder / "mnist", "mnist")
        start = image_files.idx(np.zeros((400, 28, 28)))
        (folder / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(start + bytes(LARGE), 1))
        return "mnist"
    if kind == "zlib":
        lay_out(folder / "svhn", "svhn")
        bomb = image_files.mat(packed(matrix("X", np.zeros((LARGE,), np.uint8))))
        (folder / "svhn" / "train_32x32.mat").write_bytes(bomb)
        return "svhn"
    if kind == "npz":
        (folder / "cifar10").mkdir()
        npz_bomb(folder / "cifar10" / "cifar10_250.npz")
        return "cifar10"
    lay_out(folder / "facescrub", "facescrub")
    Image.new("1", (9000, 9000)).save(folder / "facescrub" / "Person 1" / "1.png")
    return "facescrub"


@pytest.mark.parametrize("kind", ["gzip", "zlib", "npz", "png"])
def test_nothing_is_unpacked_beyond_what_is_expected(tmp_path, kind):
    name = bombs(tmp_path, kind)
    tracemalloc.start()
    try:
        message = refusal(tmp_path, name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20
    assert any(word in message for word in ("longer than", "unpacks to more", "more bytes than", "pixels"))


# --- chance damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES])
def test_damage_anywhere_is_refused_in_one_line_or_harmless(tmp_path, name):
    """Bytes changed, cut out and put in: a line, or a data set of the right form, and never anything else."""
    lay_out(tmp_path / name, name)
    rng = np.random.default_rng(7)
    files = FILES[name]
    refused = 0
    for trial in range(40):
        path = tmp_path / name / files[trial % len(files)]
        data = path.read_bytes()
        # What describes the content is at the beginning or, packed, anywhere.
        end = min(len(data), 200) if trial % 2 else len(data)
        position, length = int(rng.integers(end)), int(rng.integers(1, 9))
        middle = (rng.bytes(length), b"", data[position : position + length] + rng.bytes(length))[trial % 3]
        path.write_bytes(data[:position] + middle + data[position + length :])
        try:
            found = multicv.find(tmp_path, name)
            assert found.train.labels.max() < found.classes
        except ConfigError:  # one line, by its making
            refused += 1
        path.write_bytes(data)
    assert refused >= 10


# --- splits ----------------------------------------------------------------------------------------------------------


def test_rows_divide_by_class():
    labels = np.array([0] * 10 + [1] * 30 + [2] * 2)
    kept, held = divide(labels, 0.2, seed=3)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(42))
    assert np.array_equal(np.bincount(labels[held]), [2, 6, 1])
    assert np.array_equal(np.bincount(labels[kept]), [8, 24, 1])
    assert all(np.array_equal(a, b) for a, b in zip(divide(labels, 0.2, seed=3), (kept, held), strict=True))
    assert not np.array_equal(divide(labels, 0.2, seed=4)[1], held)
    for fraction in (0.01, 0.99):  # something stays on either side
        assert all(set(labels[rows]) == {0, 1, 2} for rows in divide(labels, fraction, seed=3))
    with pytest.raises(ValueError, match="class 1 has a single image"):
        divide(np.array([0, 0, 1]), 0.5, seed=0)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int64)),
        (np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, np.int64)),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int64)),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.uint8)),
    ],
)
def test_a_split_is_what_it_says(images, labels):
    with pytest.raises(ValueError, match="not"):
        Split(images, labels)


def test_neither_torch_nor_ray_is_imported():
    code = (
        "import sys; from leap_dist.datasets import multicv, omniglot; "
        "sys.exit(sum(name in sys.modules for name in ('torch', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_the_page_has_every_data_set():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name, source in ORIGINAL.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"{source.train:,} + {source.test:,}" in row or name == "facescrub"
        assert str(source.classes) in row
        assert source.home.split(" ")[0] in row


# --- the real files, where they are there ----------------------------------------------------------------------------


@real
@pytest.mark.parametrize(
    ("name", "part", "train", "test"),
    [
        ("cifar10", "cifar10_5000", 4000, 1000),
        ("mnist", "mnist_t10k", 8000, 2000),
        ("notmnist", "notmnist_t10k", 8000, 2000),
    ],
)
def test_the_real_files(name, part, train, test):
    found = multicv.find(SHARED, name)
    assert (found.name, len(found.train), len(found.test)) == (part, train, test)
    # Serrà et al.'s means and standard deviations are those of the prepared images, of all channels alike here.
    images = np.concatenate([found.train.images, found.test.images])
    assert images.mean() / 255 == pytest.approx(np.mean(found.mean), abs=0.005)
    assert images.std() / 255 == pytest.approx(np.mean(found.std), abs=0.01)


# --- the check that a user runs --------------------------------------------------------------------------------------


def test_a_folder_of_data_sets_is_listed(tmp_path, capsys):
    lay_out(tmp_path / "mnist", "mnist")
    lay_out(tmp_path / "svhn", "svhn")
    (tmp_path / "anything").mkdir()
    assert listing.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "mnist: 400 + 200 images, 1 MiB",  # 600 × 32 × 32 bytes: the grey channel once
        "svhn: 400 + 200 images, 2 MiB",
        lines[2],
    ]
    (tmp_path / "svhn" / "test_32x32.mat").unlink()
    assert listing.main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("mnist: ")
    assert captured.err.startswith("data_dir: ")
    assert "test_32x32.mat: No such file" in captured.err
    assert len(captured.err.splitlines()) == 1


def test_an_empty_folder_is_told_the_names(tmp_path, capsys):
    assert listing.main([str(tmp_path)]) == 2
    assert "has no folder named after any of omniglot, cifar10" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
def test_a_file_that_never_ends_is_refused_in_one_line(tmp_path, capsys, kind):
    lay_out(tmp_path / "svhn", "svhn")
    path = tmp_path / "svhn" / "train_32x32.mat"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    tracemalloc.start()
    assert listing.main([str(tmp_path)]) == 2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_home_directory_may_be_written_as_a_tilde(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert listing.main(["~/nowhere"]) == 2
    assert f"data_dir: {tmp_path}/nowhere has no folder" in capsys.readouterr().err
