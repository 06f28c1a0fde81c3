"""Torchvision's datasets, from tiny files in the formats that it reads."""

import pickle
import re
import struct
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

from lsa.runtime.errors import InputError
from lsa.training import data, torchvision_data


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network\nhere")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("LSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LSA_DATA", str(tmp_path / "data"))


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def mnist(tmp_path):
    """Twelve training and four test images in the files of MNIST, below `$LSA_DATA`."""
    for kind, n in (("train", 12), ("t10k", 4)):
        raw = tmp_path / "data" / "MNIST" / "raw"
        write_idx(raw / f"{kind}-images-idx3-ubyte", random_bytes(n, 28, 28, seed=n))
        write_idx(raw / f"{kind}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 3)
    return tmp_path / "data"


def test_mnist_is_read_from_its_files(mnist):
    train, test = torchvision_data.read("MNIST")
    assert torch.equal(train.images, torch.from_numpy(random_bytes(12, 28, 28, seed=12))[:, None])
    assert torch.equal(test.images, torch.from_numpy(random_bytes(4, 28, 28, seed=4))[:, None])
    assert train.labels.tolist() == [0, 1, 2] * 4 and test.labels.tolist() == [0, 1, 2, 0]


def test_mnist_loads_as_a_dataset(mnist):
    found = data.load("MNIST", train_limit=6)
    assert found.x_train.shape == (6, 1, 28, 28) and found.x_val.shape == (4, 1, 28, 28)
    assert found.y_train.bincount().tolist() == [2, 2, 2] and found.classes == 3


def test_root_may_be_named(mnist, tmp_path, monkeypatch):
    monkeypatch.delenv("LSA_DATA")
    assert len(torchvision_data.read("MNIST", root=str(mnist))) == 2
    monkeypatch.chdir(mnist.parent)
    assert len(torchvision_data.read("MNIST", root="data")) == 2


def test_size_resizes_item_by_item(mnist):
    train, _ = torchvision_data.read("MNIST", size=7)
    expected = [
        np.asarray(Image.fromarray(image).resize((7, 7), Image.Resampling.BILINEAR))
        for image in random_bytes(12, 28, 28, seed=12)
    ]
    assert torch.equal(train.images, torch.from_numpy(np.stack(expected))[:, None])
    assert train.labels.tolist() == [0, 1, 2] * 4


def test_cifar_is_turned_from_channels_last(tmp_path, monkeypatch):
    cifar = torchvision.datasets.cifar
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
    folder = tmp_path / "data" / cifar.CIFAR10.base_folder
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}))
    pixels = random_bytes(5, 2, 3 * 32 * 32)
    for number in range(5):
        batch = {"data": pixels[number], "labels": [0, 1]}
        (folder / f"data_batch_{number + 1}").write_bytes(pickle.dumps(batch))
    (folder / "test_batch").write_bytes(pickle.dumps({"data": pixels[0], "labels": [1, 0]}))
    train, test = torchvision_data.read("CIFAR10")
    assert torch.equal(train.images, torch.from_numpy(pixels).view(10, 3, 32, 32))
    assert train.images.is_contiguous() and test.labels.tolist() == [1, 0]


def test_svhn_has_splits_by_name(tmp_path, monkeypatch):
    svhn = torchvision.datasets.svhn
    monkeypatch.setattr(svhn, "check_integrity", lambda path, md5=None: True)
    (tmp_path / "data").mkdir()
    for split, n in (("train", 6), ("test", 2)):
        pixels = random_bytes(32, 32, 3, n, seed=n)
        labels = np.resize([1, 10], (n, 1))  # 10 stands for the digit zero
        savemat(tmp_path / "data" / f"{split}_32x32.mat", {"X": pixels, "y": labels})
    train, test = torchvision_data.read("SVHN")
    pixels = torch.from_numpy(random_bytes(32, 32, 3, 6, seed=6))
    assert torch.equal(train.images, pixels.permute(3, 2, 0, 1))
    assert test.labels.tolist() == [1, 0]


def test_dataset_without_splits_is_divided(tmp_path):
    folder = tmp_path / "data" / "caltech101" / "101_ObjectCategories"
    (folder / "BACKGROUND_Google").mkdir(parents=True)
    for label in ("ant", "bee"):
        (folder / label).mkdir(parents=True)
        for i in range(1, 6):
            pixels = random_bytes(3, 4, 3, seed=i)
            Image.fromarray(pixels).save(folder / label / f"image_{i:04}.jpg")
            (folder.parent / "Annotations" / label).mkdir(parents=True, exist_ok=True)
    found = data.load("Caltech101", size=3)
    assert found.x_train.shape == (8, 3, 3, 3) and found.y_val.bincount().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("MNIST", "MNIST/raw/train-images-idx3-ubyte.gz, MNIST/raw/train-labels-idx1-ubyte.gz"),
        ("FashionMNIST", "FashionMNIST/raw/train-images-idx3-ubyte.gz"),
        ("CIFAR10", "cifar-10-python.tar.gz"),
        ("CIFAR100", "cifar-100-python.tar.gz"),
        ("SVHN", "train_32x32.mat, test_32x32.mat"),
        ("STL10", "stl10_binary.tar.gz"),
        ("DTD", "the files that torchvision's page on DTD names"),
    ],
)
def test_failed_download_says_why_and_what_to_put_where(name, files, tmp_path, capsys):
    with pytest.raises(InputError) as caught:
        data.load(name)
    message = str(caught.value)
    assert f"dataset {name} is not in {tmp_path / 'data'} and could not be downloaded" in message
    assert "no network here" in message and f"put {files}" in message and "\n" not in message
    assert capsys.readouterr().out == ""


def test_a_checkpoint_alone_fetches_nothing_and_makes_no_folder(mnist, tmp_path, monkeypatch):
    """Its dataset is read below the user's data folder; the rest needs a word of theirs."""
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("it downloads"))
    elsewhere = tmp_path / "elsewhere"
    for name, root, word in (
        ("CIFAR10", None, "CIFAR10"),
        ("CIFAR10", str(elsewhere), f"CIFAR10:{elsewhere}"),
        ("INaturalist", str(elsewhere), f"INaturalist:{elsewhere}"),
        ("Caltech101", str(tmp_path), f"Caltech101:{tmp_path}"),
        ("MNIST", str(mnist / ".." / "elsewhere"), "MNIST:"),
    ):
        before = set(tmp_path.rglob("*"))
        options = {"root": root} if root else {}
        with pytest.raises(InputError, match=re.escape(f"--trust {word}")):
            data.load(name, ours=False, **options)
        assert set(tmp_path.rglob("*")) == before
    (tmp_path / "link").symlink_to(mnist)
    for options in ({}, {"root": str(mnist)}, {"root": str(tmp_path / "link")}):
        assert data.load("MNIST", ours=False, **options).hash == data.load("MNIST").hash


@pytest.mark.parametrize("root", ["x" * 5000, "~nobody_of_that_name/x", "a\0b", "/dev/null/x"])
@pytest.mark.parametrize("name", ["image_folder", "MNIST"])
def test_a_root_that_no_machine_has_gets_one_line(name, root):
    with pytest.raises(InputError) as caught:
        data.load(name, root=root)
    assert str(caught.value).isprintable()


def test_damaged_files_give_one_line(mnist):
    (mnist / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"short")
    with pytest.raises(InputError, match="dataset MNIST") as caught:
        data.load("MNIST")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("EMNIST", {}, "needs the option 'split'"),
        ("EMNIST", {"split": "bad"}, "cannot be read: Unknown value 'bad' for argument split"),
        ("SVHN", {"split": "extra"}, "no option 'split'"),
        ("MNIST", {"train": False}, "no option 'train'"),
        ("FER2013", {}, "torchvision does not download it"),
    ],
)
def test_options_that_do_not_fit_are_explained(name, options, message):
    with pytest.raises(InputError, match=message):
        data.load(name, **options)


def test_labels_that_are_no_class_are_refused():
    class Boxes:
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return Image.new("RGB", (2, 2)), {"boxes": []}

    with pytest.raises(InputError, match="dataset Boxes is not one of images with a class"):
        torchvision_data._as_split("Boxes", Boxes(), None)


def test_labels_with_gaps_become_consecutive_and_strange_ones_are_refused(mnist):
    raw = mnist / "MNIST" / "raw"
    write_idx(raw / "train-labels-idx1-ubyte", np.resize(np.uint8([3, 7, 9]), 12))
    write_idx(raw / "t10k-labels-idx1-ubyte", np.uint8([9, 3, 7, 7]))
    found = data.load("MNIST")
    assert found.classes == 3
    assert found.y_train.tolist() == [0, 1, 2] * 4 and found.y_val.tolist() == [2, 0, 1, 1]
    write_idx(raw / "t10k-labels-idx1-ubyte", np.uint8([9, 3, 8, 7]))
    with pytest.raises(InputError, match="class 8 of the validation split has no training images"):
        data.load("MNIST")
