"""Datasets: what is read, how it is divided and normalised, batches and augmentation."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lsa.runtime.errors import InputError
from lsa.training import data


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LSA_DATA", raising=False)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_shapes_and_types(digits):
    assert digits.x_train.shape == (1437, 1, 8, 8) and digits.x_val.shape == (360, 1, 8, 8)
    assert digits.x_train.dtype == digits.x_val.dtype == torch.float32
    assert digits.y_train.dtype == digits.y_val.dtype == torch.int64
    assert digits.classes == 10


def test_digits_are_normalised_by_the_training_split(digits):
    # The sum of 91,968 numbers, each rounded to 2⁻²⁴ of itself.
    assert abs(digits.x_train.double().mean()) < 2**-24 * 10
    assert digits.x_train.double().var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert abs(digits.x_val.double().mean()) > 1e-4  # not by its own statistics


def test_digits_splits_are_the_dataset_without_overlap(digits):
    pixels, labels = load_digits(return_X_y=True)
    x = torch.cat([digits.x_train, digits.x_val]).flatten(1).double().numpy()
    raw = np.rint((x - x.min()) * (16 / (x.max() - x.min()))).astype(int)
    ours = Counter((*row, label) for row, label in zip(raw.tolist(), _labels(digits), strict=True))
    theirs = Counter(
        (*row, label)
        for row, label in zip(pixels.astype(int).tolist(), labels.tolist(), strict=True)
    )
    assert ours == theirs


def _labels(found):
    return torch.cat([found.y_train, found.y_val]).tolist()


def test_digits_splits_are_stratified(digits):
    counts = digits.y_train.bincount() + digits.y_val.bincount()
    # Webster's apportionment deviates from the exact share by less than one here.
    assert (digits.y_val.bincount() - counts * 360 / 1797).abs().max() < 1


def test_loading_is_reproducible_and_leaves_the_random_state_alone(digits):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    again = data.load("digits")
    assert torch.equal(again.x_train, digits.x_train) and torch.equal(again.y_val, digits.y_val)
    assert again.hash == digits.hash and len(again.hash) == 64
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_limits_take_nested_stratified_subsets(digits):
    small, large = (data.load("digits", train_limit=n, val_limit=50) for n in (95, 200))
    assert len(small.x_train) == 95 and len(large.x_train) == 200 and len(small.x_val) == 50
    share = digits.y_train.bincount() * 95 / 1437
    assert (small.y_train.bincount() - share).abs().max() < 1
    assert small.hash != large.hash != digits.hash
    assert small.classes == 10

    # Undo the normalisation, which is each subset's own, by ranks: pixels are grey levels 0 … 16.
    def rows(found):
        x = found.x_train.flatten(1).double()
        return {tuple(row) for row in ((x - x.min()) / (x.max() - x.min()) * 16).round().tolist()}

    assert rows(small) <= rows(large)


def test_all_of_a_split_may_be_asked_for(digits):
    assert data.load("digits", train_limit=1437, val_limit=360).hash == digits.hash


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, "unknown dataset 'digit'. Did you mean 'digits'"),
        ("cifar10", {}, "Did you mean 'CIFAR10'"),
        ("ImageFolder", {}, "Did you mean 'image_folder'"),
        ("digits", {"root": "x"}, "dataset digits has no option 'root'. It has none"),
        ("digits", {"train_limit": 1438}, "train_limit=1438 .* choose 1 to 1437"),
        ("digits", {"val_limit": 0}, "val_limit=0 .* choose 1 to 360"),
        ("digits", {"val_limit": "few"}, "val_limit='few'"),
        ("image_folder", {}, "needs the option 'root'"),
        ("CIFAR10", {"rot": "x"}, "no option 'rot'"),
        ("image_folder", {"root": "x", "size": 0}, "size=0 must be greater than 0"),
    ],
)
def test_bad_requests_are_refused_in_one_line(name, options, message):
    with pytest.raises(InputError, match=message) as caught:
        data.load(name, **options)
    assert "\n" not in str(caught.value)


def folder_of(root, pixels):
    """Images as PNG, from {split/class/name: array}."""
    for name, array in pixels.items():
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return str(root)


def random_images(n, shape=(4, 5, 3), seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8)


def test_image_folder_is_normalised_per_channel(tmp_path):
    images = random_images(6)
    images[..., 2] = 7  # a constant channel
    names = ["train/a/0", "train/a/1", "train/b/2", "train/b/3", "val/a/4", "val/b/5"]
    pixels = dict(zip(names, images, strict=True))
    found = data.load("image_folder", root=folder_of(tmp_path / "set", pixels))
    raw = images.astype(np.float64).transpose(0, 3, 1, 2)
    mean, std = raw[:4].mean((0, 2, 3)), np.maximum(raw[:4].std((0, 2, 3)), 1)
    expected = torch.from_numpy((raw - mean[:, None, None]) / std[:, None, None]).float()
    torch.testing.assert_close(found.x_train, expected[:4], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.x_val, expected[4:], rtol=0, atol=1e-6)
    assert not found.x_train[:, 2].any()
    assert found.y_train.tolist() == [0, 0, 1, 1] and found.y_val.tolist() == [0, 1]


def test_hash_sees_one_grey_level_and_one_label(tmp_path):
    images = random_images(4)
    names = ["train/a/0", "train/b/1", "val/a/2", "val/b/3"]

    def hash_of(name, pixels):
        return data.load("image_folder", root=folder_of(tmp_path / name, pixels)).hash

    base = dict(zip(names, images, strict=True))
    darker = base | {"val/b/3": images[3] ^ np.uint8([[[1, 0, 0]]] + [[[0, 0, 0]]] * 3)}
    moved = {("val/a/3" if name == "val/b/3" else name): image for name, image in base.items()}
    assert hash_of("base", base) == hash_of("same", base)
    assert len({hash_of("base", base), hash_of("darker", darker), hash_of("moved", moved)}) == 3


def test_folder_without_splits_is_divided_80_20_by_class(tmp_path):
    images = random_images(50)
    pixels = {f"{'ab'[i % 5 == 0]}/{i}": images[i] for i in range(50)}
    found = data.load("image_folder", root=folder_of(tmp_path / "set", pixels))
    assert found.y_train.bincount().tolist() == [32, 8]
    assert found.y_val.bincount().tolist() == [8, 2]


# ------------------------------------------------------------------------- batches, augment


def test_batches_are_one_permutation_per_epoch():
    rng = torch.Generator().manual_seed(0)
    epoch, other = (list(data.batches(10, 4, rng)) for _ in range(2))
    assert [len(b) for b in epoch] == [4, 4, 2]
    assert sorted(torch.cat(epoch).tolist()) == list(range(10))
    assert torch.cat(epoch).tolist() != torch.cat(other).tolist()
    again = list(data.batches(10, 4, torch.Generator().manual_seed(0)))
    assert all(torch.equal(a, b) for a, b in zip(epoch, again, strict=True))


def test_batch_size_must_be_positive():
    with pytest.raises(InputError, match="batch_size=0"):
        data.batches(10, 0, torch.Generator())


def crops(image, crop):
    """All crops of a padded image, plain and mirrored: {(dy, dx, flip): image}, by slicing."""
    padded = np.pad(image, ((0, 0), (crop, crop), (crop, crop)))
    h, w = image.shape[1:]
    found = {}
    for dy in range(2 * crop + 1):
        for dx in range(2 * crop + 1):
            window = padded[:, dy : dy + h, dx : dx + w]
            found[dy, dx, False] = window
            found[dy, dx, True] = window[:, :, ::-1]
    return found


@pytest.mark.parametrize(("crop", "flip"), [(2, True), (2, False), (0, True), (5, False)])
def test_augment_draws_uniformly_from_all_crops_and_mirrors(crop, flip):
    n = 4000
    image = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    x = image.expand(n, 2, 4, 5)
    y = data.augment(x, torch.Generator().manual_seed(0), crop=crop, flip=flip).numpy()
    candidates = crops(image.numpy(), crop)
    # Images shifted out of sight are all zero and equal, so count by content.
    expected = Counter()
    for (_, _, mirrored), candidate in candidates.items():
        if flip or not mirrored:
            expected[candidate.tobytes()] += 1
    total = sum(expected.values())
    counts = Counter(np.ascontiguousarray(sample).tobytes() for sample in y)
    assert set(counts) <= set(expected)
    chi2 = sum((counts[k] - n * m / total) ** 2 / (n * m / total) for k, m in expected.items())
    degrees = len(expected) - 1
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees)  # mean and five standard deviations


def test_augment_moves_every_image_on_its_own():
    x = torch.arange(1.0, 1 + 64 * 9).view(64, 1, 3, 3)
    y = data.augment(x, torch.Generator().manual_seed(0), crop=1, flip=True)
    shown = {
        key
        for image, original in zip(y, x, strict=True)
        for key, candidate in crops(original.numpy(), 1).items()
        if np.array_equal(candidate, image)
    }
    assert len(shown) > 9  # of 18, and of the draws of 64 images


def test_augment_is_reproducible_and_can_do_nothing():
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    one, two = (
        data.augment(x, torch.Generator().manual_seed(3), crop=1, flip=True) for _ in range(2)
    )
    assert torch.equal(one, two) and not torch.equal(one, x)
    assert data.augment(x, torch.Generator()) is x
    with pytest.raises(InputError, match="crop=-1 is negative"):
        data.augment(x, torch.Generator(), crop=-1)


def test_a_normalisation_that_is_asked_for_is_that_of_the_pixels() -> None:
    own, asked = data.load("digits"), data.load("digits", mean=0.5, std=0.5)
    levels = torch.from_numpy(load_digits().images).float() / 255
    assert asked.x_train.min() == -1
    assert asked.x_train.max().item() == pytest.approx((levels.max().item() - 0.5) / 0.5)
    assert asked.hash == own.hash  # of the images, not of their scale
    per_channel = data.load("digits", mean=[0.5], std=[0.5])
    assert torch.equal(per_channel.x_val, asked.x_val)


@pytest.mark.parametrize(
    "options",
    [
        {"mean": 0.5},
        {"std": 0.5},
        {"mean": 0.5, "std": 0},
        {"mean": [0.5, 0.5], "std": 1.0},
        {"mean": "half", "std": 1.0},
    ],
)
def test_a_normalisation_that_is_none_is_refused(options: dict) -> None:
    with pytest.raises(InputError, match="of pixels between 0 and 1"):
        data.load("digits", **options)
