"""Image folders: decoding, class folders, sizes, and the cache."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lsa.runtime.errors import InputError
from lsa.training import images


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LSA_DATA", raising=False)


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def colour(seed, h=6, w=6):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def grey(seed, h=6, w=6):
    return colour(seed, h, w)[:, :, 0].copy()


@pytest.fixture
def pets(tmp_path):
    root = tmp_path / "pets"
    for i, name in enumerate(["train/dog/1", "train/cat/2", "train/cat/more/0", "test/dog/3"]):
        save(root / f"{name}.png", colour(i))
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    (root / "train" / ".hidden").mkdir()
    return root


def chw(array):
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def test_class_folders_become_labels_in_alphabetical_order(pets):
    train, test = images.image_folder(str(pets))
    assert train.labels.tolist() == [0, 0, 1] and test.labels.tolist() == [1]
    assert torch.equal(train.images, torch.stack([chw(colour(1)), chw(colour(2)), chw(colour(0))]))
    assert torch.equal(test.images, chw(colour(3))[None])
    assert train.images.dtype == torch.uint8


def test_val_is_preferred_to_test(pets):
    save(pets / "val" / "cat" / "9.png", colour(9))
    assert torch.equal(images.image_folder(str(pets))[1].images, chw(colour(9))[None])


def test_class_folders_alone_are_one_split(pets):
    (split,) = images.image_folder(str(pets / "train"))
    assert split.labels.tolist() == [0, 0, 1]


def test_cache_is_used_until_a_file_changes(pets, monkeypatch):
    first = images.image_folder(str(pets))
    with monkeypatch.context() as without:
        without.setattr(images, "decode", None)  # a second decoding would fail
        again = images.image_folder(str(pets))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    path = save(pets / "train" / "dog" / "1.png", colour(7))
    os.utime(path, ns=(1, 1))
    assert torch.equal(images.image_folder(str(pets))[0].images[2], chw(colour(7)))


def test_cache_knows_the_size_option(pets):
    assert images.image_folder(str(pets), size=4)[0].images.shape == (3, 3, 4, 4)
    assert images.image_folder(str(pets), size=3)[0].images.shape == (3, 3, 3, 3)
    assert images.image_folder(str(pets))[0].images.shape == (3, 3, 6, 6)


def test_cache_does_not_depend_on_where_the_folder_is(pets, monkeypatch):
    images.image_folder(str(pets))
    moved = pets.rename(pets.with_name("moved"))
    monkeypatch.setattr(images, "decode", None)
    assert images.image_folder(str(moved))[0].labels.tolist() == [0, 0, 1]


def test_cache_leaves_no_temporary_files(pets, tmp_path):
    images.image_folder(str(pets))
    (kept,) = (tmp_path / "cache" / "images").iterdir()
    assert kept.suffix == ".safetensors"


def test_damaged_cache_is_made_anew(pets, tmp_path, caplog):
    first, _ = images.image_folder(str(pets))
    (cached,) = (tmp_path / "cache" / "images").iterdir()
    cached.write_bytes(b"not safetensors")
    again, _ = images.image_folder(str(pets))
    assert torch.equal(first.images, again.images)
    assert "made anew" in caplog.text
    assert cached.stat().st_size > 100


def test_cache_that_cannot_be_written_costs_time_only(pets, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LSA_CACHE", str(tmp_path / "file"))
    assert images.image_folder(str(pets))[0].labels.tolist() == [0, 0, 1]
    assert "set LSA_CACHE to a writable folder" in caplog.text


def test_relative_root_is_looked_up_in_lsa_data_else_in_the_current_folder(pets, monkeypatch):
    monkeypatch.chdir(pets.parent)
    assert len(images.image_folder("pets")) == 2
    monkeypatch.setenv("LSA_DATA", str(pets))
    assert len(images.image_folder("train")) == 1
    with pytest.raises(InputError, match=r"there is no folder .*pets/pets"):
        images.image_folder("pets")


def test_differing_sizes_are_named_with_the_files(pets):
    save(pets / "train" / "dog" / "4.png", colour(4, h=5, w=9))
    with pytest.raises(InputError, match=r"2\.png is 6×6 and .*4\.png is 9×5; .*size: 6"):
        images.image_folder(str(pets))


def test_size_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    array = np.zeros((4, 12, 3), np.uint8)
    array[:, 4:8] = 255  # the middle third, which is all that a centre crop shows
    save(tmp_path / "set" / "a" / "1.png", array)
    save(tmp_path / "set" / "b" / "1.png", colour(0, h=9, w=4))
    (split,) = images.image_folder(str(tmp_path / "set"), size=4)
    assert split.images.shape == (2, 3, 4, 4)
    assert (split.images[0] == 255).all()
    assert torch.equal(split.images[1], chw(colour(0, h=9, w=4)[2:6]))


def test_grey_images_have_one_channel_and_three_among_coloured_ones(tmp_path):
    save(tmp_path / "set" / "a" / "1.png", grey(0))
    save(tmp_path / "set" / "b" / "1.png", grey(1))
    (split,) = images.image_folder(str(tmp_path / "set"))
    assert torch.equal(split.images, torch.from_numpy(np.stack([grey(0), grey(1)]))[:, None])
    save(tmp_path / "set" / "b" / "2.png", colour(2))
    (split,) = images.image_folder(str(tmp_path / "set"))
    assert torch.equal(split.images[0], torch.from_numpy(grey(0)).expand(3, 6, 6))
    assert torch.equal(split.images[2], chw(colour(2)))


def test_palette_and_transparency_become_plain_colours(tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    array = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)
    palette = Image.fromarray(array).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    palette.save(tmp_path / "set" / "a" / "1.png", transparency=bytes([128, 255]))
    opaque = np.dstack([array, np.full((1, 2), 9, np.uint8)])
    save(tmp_path / "set" / "a" / "2.png", opaque)
    (split,) = images.image_folder(str(tmp_path / "set"))
    assert torch.equal(split.images, torch.stack([chw(array), chw(array)]))


@pytest.mark.parametrize("content", [b"", b"not an image", "half"])
def test_undecodable_file_is_named_in_one_line(pets, content):
    path = pets / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:90] if content == "half" else content)
    with pytest.raises(InputError, match=r"1\.png cannot be decoded \(.*\); convert") as caught:
        images.image_folder(str(pets))
    assert "\n" not in str(caught.value)


def test_more_than_eight_bits_are_refused_not_clipped(tmp_path):
    save(tmp_path / "set" / "a" / "1.png", np.full((3, 3), 1000, np.uint16))
    with pytest.raises(InputError, match=r"1\.png.*more than 8 bits"):
        images.image_folder(str(tmp_path / "set"))


def test_folders_that_do_not_fit_are_explained(pets, tmp_path):
    save(pets / "test" / "bird" / "1.png", colour(5))
    with pytest.raises(InputError, match="class 'bird', which has no training images"):
        images.image_folder(str(pets))
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="has no images in class folders"):
        images.image_folder(str(tmp_path / "empty"))
    (tmp_path / "half" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="neither val/ nor test/"):
        images.image_folder(str(tmp_path / "half"))


def test_order_survives_more_images_than_one_task_takes():
    n = 3 * images.TASK + 5

    def read(i):
        return Image.fromarray(np.full((1, 1), i, np.uint8)), i

    split = images.decode(n, read, str)
    assert split.images.flatten().tolist() == split.labels.tolist() == list(range(n))
