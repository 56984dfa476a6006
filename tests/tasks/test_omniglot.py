"""Omniglot: one set of arrays out of both forms of the files, and the protocol's draws as functions of a seed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leap_dist.config.loading import ConfigError
from leap_dist.config.registry import partition
from leap_dist.datasets import omniglot
from leap_dist.datasets.omniglot import Omniglot, rotated
from leap_dist.datasets.splits import Split

SHARED = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not (SHARED / "omniglot").is_dir(), reason="needs the real files")

# In the published order, which is not that of the names, as in the table of rows.
PUBLISHED = {
    "images_background": {"Greek": 24, "Blackfoot_(Canadian_Aboriginal_Syllabics)": 3, "Alphabet_of_the_Magi": 20},
    "images_evaluation": {"Ge_ez": 4},
}
CHARACTERS = 51


@pytest.fixture
def fewer_characters(monkeypatch):
    monkeypatch.setattr(omniglot, "CHARACTERS", CHARACTERS)
    monkeypatch.setattr(omniglot, "ALPHABETS", {part: len(sizes) for part, sizes in PUBLISHED.items()})


def ink(seed: int = 0) -> np.ndarray:
    """Drawings of strokes, bool (51, 20, 105, 105), no two of them alike."""
    rng = np.random.default_rng(seed)
    drawings = np.zeros((CHARACTERS, 20, 105, 105), bool)
    for row in range(CHARACTERS):
        for drawing in range(20):
            for _ in range(3):
                top, left, height, width = rng.integers((5, 5, 2, 20), (80, 60, 8, 40))
                drawings[row, drawing, top : top + height, left : left + width] = True
    return drawings


def write_archive(folder: Path, drawings: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows, first = [], 0
    for part, sizes in PUBLISHED.items():
        for name, size in sizes.items():
            split = part.removeprefix("images_")
            rows.append({"alphabet": name, "first": first, "last": first + size - 1, "split": split})
            first += size
    (folder / "alphabets.json").write_text(json.dumps(rows))
    packed = np.packbits(drawings.reshape(CHARACTERS, 20, -1), axis=2)
    np.savez_compressed(folder / "omniglot.npz", ink=packed)


def write_folders(folder: Path, drawings: np.ndarray) -> None:
    """As they are published: one bit per pixel, ink black, named by the character's number and the drawer's."""
    row = 0
    for part, sizes in PUBLISHED.items():
        for name, size in sizes.items():
            for character in range(1, size + 1):
                place = folder / part / name / f"character{character:02d}"
                place.mkdir(parents=True)
                for drawer in range(20):
                    image = Image.fromarray(~drawings[row, drawer])
                    assert image.mode == "1"
                    image.save(place / f"{row + 1:04d}_{drawer + 1:02d}.png")
                row += 1


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    write_archive(folder / "omniglot", ink())
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    write_folders(folder / "omniglot", ink())
    return folder


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resampling", ["lanczos", "nearest"])
def test_both_forms_of_the_files_give_the_same_arrays(fewer_characters, archive, folders, resampling):
    one, other = (omniglot.find(data_dir, resampling).drawings for data_dir in (archive, folders))
    assert list(one) == list(other) == sorted(name for sizes in PUBLISHED.values() for name in sizes)
    for name in one:
        assert np.array_equal(one[name], other[name])


def test_drawings_are_those_that_were_written(fewer_characters, archive):
    """Ink is bright, and each character is in its place."""
    found = omniglot.find(archive, "lanczos").drawings
    for name, start in (("Greek", 0), ("Alphabet_of_the_Magi", 27), ("Ge_ez", 47)):
        drawings = found[name]
        assert (drawings.dtype, drawings.shape[1:]) == (np.uint8, (20, 28, 28))
        for character in (0, len(drawings) - 1):
            image = Image.fromarray(ink()[start + character, 7].astype(np.uint8) * 255)
            wanted = np.asarray(image.resize((28, 28), Image.Resampling.LANCZOS))
            assert np.array_equal(drawings[character, 7], wanted)


def test_nearest_is_what_pillow_makes_of_one_bit_per_pixel_when_it_is_asked_for_lanczos(fewer_characters, folders):
    """As the authors' script does, on the files as they are; their ink is dark."""
    path = folders / "omniglot" / "images_background" / "Greek" / "character02" / "0002_05.png"
    theirs = np.asarray(Image.open(path).resize((28, 28), Image.Resampling.LANCZOS).convert("L"))
    assert np.array_equal(omniglot.find(folders, "nearest").drawings["Greek"][1, 4], 255 - theirs)


def test_other_places_of_the_folders(fewer_characters, folders, tmp_path):
    place = tmp_path / "omniglot" / "omniglot-py"
    place.parent.mkdir()
    place.symlink_to(folders / "omniglot")
    (tmp_path / "omniglot" / ".DS_Store").write_bytes(b"")
    assert set(omniglot.find(tmp_path).drawings) == set(omniglot.find(folders).drawings)


def test_alphabets_with_fewer_characters_are_dropped(fewer_characters, archive):
    assert omniglot.find(archive).alphabets == ("Alphabet_of_the_Magi", "Greek")


# --- damage ----------------------------------------------------------------------------------------------------------


def refusal(data_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        omniglot.find(data_dir)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data_dir: ")
    assert "https://github.com/brendenlake/omniglot" in message
    assert f"{data_dir / 'omniglot'} must hold images_background/" in message
    return message


def test_what_is_not_there_is_said(tmp_path):
    assert "is not a folder" in refusal(tmp_path)
    (tmp_path / "omniglot").mkdir()
    assert "images_background is missing" in refusal(tmp_path)
    (tmp_path / "omniglot" / "images_background").mkdir()
    assert "images_background has 0 alphabets, not 30" in refusal(tmp_path)


def damaged_archives() -> list[tuple[str, bytes | None, str]]:
    rows = [{"alphabet": "Greek", "first": 0, "last": CHARACTERS - 1}]
    twice = [{"alphabet": "Greek", "first": 0, "last": 30}, {"alphabet": "Latin", "first": 30, "last": CHARACTERS - 1}]
    return [
        ("omniglot.npz", b"", "is damaged, or not a usable .npz file"),
        ("omniglot.npz", pickle.dumps(np.zeros(3)), "is damaged, or not a usable .npz file"),
        ("omniglot.npz", None, "images_background is missing"),
        ("alphabets.json", None, "alphabets.json: No such file"),
        ("alphabets.json", b"[" * 100_000, "is not the table of 51 rows"),
        ("alphabets.json", b"{}", "is not the table of 51 rows"),
        ("alphabets.json", b"7", "is not the table of 51 rows"),
        ("alphabets.json", b'[{"alphabet": "Greek", "first": 0, "last": 1e400}]', "is not the table of 51 rows"),
        ("alphabets.json", b'[{"alphabet": "Greek", "first": 0, "last": 99999999999999}]', "is not the table"),
        ("alphabets.json", json.dumps([*rows, *rows]).encode(), "do not have valid, distinct names"),
        ("alphabets.json", json.dumps(twice).encode(), "do not cover each of the 51 rows exactly once"),
        ("alphabets.json", json.dumps(rows).replace("Greek", "../up").encode(), "do not have valid, distinct names"),
        ("alphabets.json", json.dumps(rows).encode(), "1 alphabets and 51 characters, not 4 and 51"),
    ]


@pytest.mark.parametrize(("file", "content", "message"), damaged_archives())
def test_a_damaged_archive_is_refused(fewer_characters, archive, tmp_path, file, content, message):
    shutil.copytree(archive / "omniglot", tmp_path / "omniglot")
    (tmp_path / "omniglot" / file).unlink()
    if content is not None:
        (tmp_path / "omniglot" / file).write_bytes(content)
    assert message in refusal(tmp_path)


def test_bits_of_another_shape_or_the_wrong_way_round_are_refused(fewer_characters, archive, tmp_path):
    shutil.copytree(archive / "omniglot", tmp_path / "omniglot")
    path = tmp_path / "omniglot" / "omniglot.npz"
    packed = np.packbits(ink().reshape(CHARACTERS, 20, -1), axis=2)
    for arrays, message in (
        ({"ink": packed[:-1]}, "ink is |u1 (50, 20, 1379), not |u1 (51, 20, 1379)"),
        ({"ink": packed.astype(np.int16)}, "ink is <i2 (51, 20, 1379)"),
        ({"other": packed}, "ink.npy"),
        ({"ink": ~packed}, "is ink, which is implausible for drawings"),
        ({"ink": np.zeros_like(packed)}, "0% of Alphabet_of_the_Magi is ink"),
    ):
        np.savez(path, **arrays)
        assert message in refusal(tmp_path), message


def test_a_cut_archive_is_refused_wherever_it_is_cut(fewer_characters, archive, tmp_path):
    shutil.copytree(archive / "omniglot", tmp_path / "omniglot")
    path = tmp_path / "omniglot" / "omniglot.npz"
    data = path.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(data[: int(share * len(data))])
        refusal(tmp_path)
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    refusal(tmp_path)


def test_damaged_folders_are_refused(fewer_characters, folders, tmp_path):
    shutil.copytree(folders / "omniglot", tmp_path / "omniglot")
    greek = tmp_path / "omniglot" / "images_background" / "Greek"
    drawing = greek / "character03" / "0003_05.png"
    data = drawing.read_bytes()
    Image.new("1", (104, 105)).save(tmp_path / "small.png")
    for content, message in (
        (data[:60], "0003_05.png cannot be read as PNG"),
        (b"", "0003_05.png cannot be read as PNG"),
        (pickle.dumps(data), "0003_05.png cannot be read as PNG"),
        ((tmp_path / "small.png").read_bytes(), "0003_05.png has 104 × 105 pixels, not 105 × 105"),
    ):
        drawing.write_bytes(content)
        assert message in refusal(tmp_path)
    drawing.unlink()
    assert "character03 does not hold drawings NNNN_01.png to NNNN_20.png, but 19 others" in refusal(tmp_path)
    shutil.rmtree(drawing.parent)
    assert "4 alphabets and 50 characters, not 4 and 51" in refusal(tmp_path)
    shutil.rmtree(greek)
    assert "images_background has 2 alphabets, not 3" in refusal(tmp_path)


# --- tasks -----------------------------------------------------------------------------------------------------------


def numbered(characters: int = 30) -> Omniglot:
    """Drawings that say who they are: the first pixel is the character, the second the drawer."""
    drawings = np.zeros((characters, 20, 28, 28), np.uint8)
    drawings[..., 0, 0] = np.arange(characters)[:, None]
    drawings[..., 0, 1] = np.arange(20)
    return Omniglot({"Greek": drawings, "Latin": drawings})


def who(split: Split) -> list[tuple[int, int, int]]:
    """Class, character and drawer of every image."""
    assert split.images.shape[1:] == (28, 28, 1)
    pixels = split.images[:, 0, :2, 0]
    return [(int(label), int(a), int(b)) for label, (a, b) in zip(split.labels, pixels, strict=True)]


def test_a_task_is_20_characters_with_five_drawings_of_each_held_out():
    task = numbered().task("Greek", seed=0)
    assert (task.name, task.classes, task.mean, task.std) == ("omniglot/Greek", 20, (0.0,), (1.0,))
    train, test = who(task.train), who(task.test)
    assert (len(train), len(test)) == (300, 100)
    of_class = {label: character for label, character, _ in train}
    assert sorted(of_class) == list(range(20))
    assert len(set(of_class.values())) == 20
    for label, character in of_class.items():
        drawers = [[b for c, a, b in part if (c, a) == (label, character)] for part in (train, test)]
        assert (len(drawers[0]), len(drawers[1])) == (15, 5)
        assert sorted(drawers[0] + drawers[1]) == list(range(20))


def test_a_task_is_a_function_of_alphabet_and_seed():
    everything = numbered()
    first = who(everything.task("Greek", seed=0).train)
    assert first == who(everything.task("Greek", seed=0).train)
    assert first == who(Omniglot({"Greek": everything.drawings["Greek"]}).task("Greek", seed=0).train)
    assert first != who(everything.task("Greek", seed=1).train)
    assert first != who(everything.task("Latin", seed=0).train)
    with pytest.raises(KeyError):
        everything.task("Klingon", seed=0)


def test_over_seeds_every_character_and_every_drawer_takes_part():
    seen = [entry for seed in range(40) for entry in who(numbered().task("Greek", seed).test)]
    assert {character for _, character, _ in seen} == set(range(30))
    assert {drawer for _, _, drawer in seen} == set(range(20))
    assert len({label for label, character, _ in seen if character == 3}) > 5  # classes are in no fixed order


NAMES = tuple(f"alphabet{number:02d}" for number in range(46))


@pytest.mark.parametrize(("pretraining", "validation"), [(1, 10), (10, 10), (20, 10), (26, 10), (30, 6), (35, 1)])
def test_alphabets_are_for_one_thing_each(pretraining, validation):
    found = partition(NAMES, pretraining, seed=3)
    assert [len(part) for part in (found.pretraining, found.validation, found.held_out)] == [
        pretraining,
        validation,
        10,
    ]
    everything = found.pretraining + found.validation + found.held_out
    assert len(set(everything)) == len(everything)
    assert set(everything) <= set(NAMES)


def test_who_is_held_out_depends_on_the_seed_alone_and_more_pretraining_includes_less():
    one, more = partition(NAMES, 4, seed=3), partition(NAMES, 30, seed=3)
    assert one.held_out == more.held_out
    assert one.pretraining == more.pretraining[:4]
    assert one == partition(NAMES, 4, seed=3)
    assert one.held_out != partition(NAMES, 4, seed=4).held_out


@pytest.mark.parametrize("pretraining", [0, -1, 36, 46])
def test_there_have_to_be_enough_alphabets(pretraining):
    with pytest.raises(
        ValueError, match=f"{pretraining} is not a valid number of pretraining alphabets; choose 1 to 35"
    ):
        partition(NAMES, pretraining, seed=0)


# --- rotations -------------------------------------------------------------------------------------------------------


def test_rotations_go_all_the_way_round():
    """A dot to the right of the middle shows by which angle it was turned."""
    images = np.zeros((40, 29, 29, 1), np.uint8)
    images[:, 12:17, 23:28] = 255
    split = rotated(Split(images, np.arange(40)), seed=0)
    assert split.images.shape == (1440, 29, 29, 1)
    assert np.array_equal(split.labels, np.repeat(np.arange(40), 36))
    y, x = np.mgrid[14:-15:-1, -14:15]
    mass = split.images[..., 0].sum(axis=(1, 2), dtype=float)
    angles = (
        np.degrees(np.arctan2((split.images[..., 0] * y).sum((1, 2)), (split.images[..., 0] * x).sum((1, 2)))) % 360
    )
    distance = np.hypot((split.images[..., 0] * y).sum((1, 2)), (split.images[..., 0] * x).sum((1, 2))) / mass
    assert np.abs(distance - 11).max() < 0.5
    assert np.histogram(angles, bins=8, range=(0, 360))[0].min() > 130
    assert len(np.unique(angles.round(3))) > 1400


def test_rotations_are_a_function_of_the_seed():
    split = numbered().task("Greek", seed=0).train.take(np.arange(5))
    first = rotated(split, seed=0, count=4)
    assert np.array_equal(first.images, rotated(split, seed=0, count=4).images)
    split.images[:, 10:14, 5:20] = 200
    first, other = rotated(split, seed=0, count=4), rotated(split, seed=1, count=4)
    assert not np.array_equal(first.images, other.images)


# --- the real files, where they are there ----------------------------------------------------------------------------


@real
def test_the_real_archive_and_folders_of_some_of_it(tmp_path):
    found = omniglot.find(SHARED)
    assert len(found.drawings) == 50
    assert sum(map(len, found.drawings.values())) == 1623
    assert len(found.alphabets) == 46
    table = {row["alphabet"]: row for row in json.loads((SHARED / "omniglot" / "alphabets.json").read_text())}
    packed = np.load(SHARED / "omniglot" / "omniglot.npz")["ink"]
    for name in ("Greek", "Ge_ez"):
        row = table[name]["first"] + 2
        place = tmp_path / name
        place.mkdir()
        bits = np.unpackbits(packed[row], axis=1, count=105 * 105).reshape(20, 105, 105).astype(bool)
        for drawer in range(20):
            Image.fromarray(~bits[drawer]).save(place / f"{row + 1:04d}_{drawer + 1:02d}.png")
        read = omniglot._shrink(omniglot._drawn(place), "lanczos")
        assert np.array_equal(read, found.drawings[name][2])
