"""Images from files: both formats, those that are damaged or lie, and what a task sees of them."""

import gzip
import io
import math
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from jaxcl import schema
from jaxcl.data import pixels
from jaxcl.schema import UserError

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"


def made(**options):
    return schema.make("jaxcl.data.sources", {"name": "images", **options}, field="sources.x")


def numbered(count, shape=(4, 5), classes=4, start=0):
    """Images that are all different; the first pixels tell the number, labels go round."""
    pixel = np.random.default_rng(start).integers(0, 256, (count, *shape), np.uint8)
    pixel.reshape(count, -1)[:, 0] = np.arange(start, start + count)
    return pixel, (np.arange(start, start + count) % classes).astype(np.uint8)


def numbers(columns):
    return np.rint(columns["inputs"][:].reshape(len(columns["inputs"][:]), -1)[:, 0] * 255).astype(int).tolist()


def idx(array, *, code=8, sizes=None):
    sizes = array.shape if sizes is None else sizes
    return struct.pack(f">HBB{len(sizes)}I", 0, code, len(sizes), *sizes) + array.tobytes()


def put(folder, name, data):
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def pair(folder, split, rows, ending=""):
    put(folder, f"{split}-labels-idx1-ubyte{ending}", idx(rows[1]))
    return put(folder, f"{split}-images-idx3-ubyte{ending}", idx(rows[0]))


@pytest.fixture
def archive(tmp_path):
    path = str(tmp_path / "data.npz")
    x, y = numbered(60)
    np.savez_compressed(path, x=x, y=y)
    return path


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_folder_of_idx_files(tmp_path, ending):
    rows, rest = numbered(30), numbered(10, start=100)
    pair(tmp_path, "train", rows, ending)
    pair(tmp_path, "t10k", rest, ending)
    table = made(path=str(tmp_path), licence="CC0-1.0")
    for columns, (x, y) in ((table.train, rows), (table.held_out, rest)):
        kinds = {name: value.dtype.name for name, value in columns.items()}
        assert kinds == dict.fromkeys(("inputs", "weights"), "float32") | dict.fromkeys(
            ("targets", "segments", "positions"), "int32"
        )
        np.testing.assert_array_equal(columns["inputs"][:], x[..., None].astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(columns["targets"], y)
        assert (columns["weights"].min(), columns["segments"].min(), columns["positions"].max()) == (1, 1, 0)
    assert table.description == {"name": "images", "path": str(tmp_path)}
    assert table.licence == "CC0-1.0"
    own = made(path=str(tmp_path), held_out=6)  # test rows stay unseen
    assert sorted(numbers(own.train) + numbers(own.held_out)) == list(range(30))
    both = made(path=str(tmp_path / f"train-images-idx3-ubyte{ending}"), held_out_path=str(tmp_path))
    assert numbers(both.held_out) == numbers(both.train) == list(range(30))


def test_archives_by_usual_names_and_by_given_ones(tmp_path):
    (x, y), (x_test, y_test) = numbered(12), numbered(6, start=50)
    usual = str(tmp_path / "usual.npz")
    np.savez(usual, x_train=x, y_train=y[:, None].astype(np.int64), x_test=x_test, y_test=y_test)
    table = made(path=usual)
    assert (numbers(table.train), numbers(table.held_out)) == (list(range(12)), list(range(50, 56)))
    np.testing.assert_array_equal(table.train["targets"], y)
    odd = str(tmp_path / "odd.npz")
    flat = x.reshape(12, 20).astype(np.float64) / 255
    np.savez(odd, pictures=flat, kinds=y)
    table = made(path=odd, image="pictures", label="kinds", held_out=3, permutation=5)
    assert table.train["inputs"].shape == (9, 20)
    order = np.random.default_rng(5).permutation(20)
    found = np.concatenate([table.train["inputs"][:], table.held_out["inputs"][:]])[:, np.argsort(order)]
    assert {row.tobytes() for row in found} == {row.tobytes() for row in flat.astype(np.float32)}


def test_held_out_rows_are_drawn_by_seed_and_equal_images_stay_together(tmp_path, archive):
    table = made(path=archive)
    assert len(table.held_out["targets"]) == 6
    for options in ({"held_out": 0.25}, {"held_out": 15}, {"held_out": 15, "seed": 3}):
        table = made(path=archive, **options)
        train, rest = numbers(table.train), numbers(table.held_out)
        assert len(rest) == 15
        assert sorted(train + rest) == list(range(60))  # disjoint, and nothing is lost
        assert [n % 4 for n in train] == table.train["targets"].tolist()
    assert rest != numbers(made(path=archive, held_out=15).held_out)
    parts = [made(path=archive, held_out=15, classes=c) for c in ([0, 1], [2, 3])]
    whole = made(path=archive, held_out=15)
    assert sorted(n for part in parts for n in numbers(part.held_out)) == sorted(numbers(whole.held_out))
    x, y = numbered(20)
    twice = str(tmp_path / "twice.npz")
    np.savez(twice, x=np.concatenate([x, x, x]), y=np.concatenate([y, y, y]))
    for seed in range(5):
        table = made(path=twice, held_out=0.3, seed=seed)
        assert not {*numbers(table.train)} & {*numbers(table.held_out)}
        assert len(table.held_out["targets"]) == 18


def test_classes_are_chosen_and_numbered_in_the_order_given(archive):
    for options, names in (({}, {3: 0, 1: 1}), ({"relabel": False}, {3: 3, 1: 1})):
        table = made(path=archive, held_out=15, classes=[3, 1], **options)
        for columns in (table.train, table.held_out):
            assert {n % 4 for n in numbers(columns)} == {1, 3}
            assert columns["targets"].tolist() == [names[n % 4] for n in numbers(columns)]
    assert table.description == {"name": "images", "path": archive, "held_out": 15, "classes": [3, 1], "relabel": False}
    few = [made(path=archive, held_out=15, classes=[0], limit=5, seed=s) for s in (0, 0, 1)]
    assert [len(t.train["targets"]) for t in few] == [5, 5, 5]
    assert numbers(few[0].train) == numbers(few[1].train) != numbers(few[2].train)
    assert {n % 4 for n in numbers(few[0].train)} == {0}
    assert len(made(path=archive, limit=1000).train["targets"]) == 54


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.integers(1, 3), st.floats(-720, 720), st.integers(0, 99)
)
def test_rotation_is_that_of_scipy(n, height, width, channels, degrees, seed):
    x = np.random.default_rng(seed).random((n, height, width, channels)).astype(np.float32)
    wanted = ndimage.rotate(
        x.astype(np.float64), degrees, axes=(2, 1), reshape=False, order=1, mode="grid-constant", prefilter=False
    )
    found = pixels.rotated(x, degrees)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert -1e-6 <= found.min() <= found.max() <= 1 + 1e-6


def test_a_quarter_turn_is_counterclockwise():
    x = np.random.default_rng(0).random((2, 6, 6, 1)).astype(np.float32)
    np.testing.assert_allclose(pixels.rotated(x, 90), np.rot90(x, axes=(1, 2)), atol=1e-6)


def test_tasks_that_see_one_file_in_several_ways_take_the_memory_of_the_file(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (2000, 28, 28), np.uint8)  # 1.6 MB, as float32 6.3
    np.savez(
        tmp_path / "all.npz", x_train=x[:1800], y_train=np.arange(1800) % 10, x_test=x[1800:], y_test=np.arange(200)
    )
    path = str(tmp_path / "all.npz")
    made(path=path)
    tracemalloc.start()
    tables = [made(path=path, pad=2, permutation=seed, rotation=10.0 * seed) for seed in range(10)]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 10 * 8 * 5 * 2000  # index and labels of every task
    assert peak < held + x.nbytes
    for seed, table in enumerate(tables):
        want = pixels.seen(x[[5, 3, 1799], ..., None], pixels.View(2, 10.0 * seed, seed))
        rows = table.train["inputs"]
        np.testing.assert_array_equal(rows[np.array([5, 3, 1799])], want)
        np.testing.assert_array_equal(rows[1790:][-1], want[-1])
        assert (rows.shape, rows.dtype, rows.nbytes, len(rows)) == ((1800, 32, 32, 1), np.float32, 1800 * 4096, 1800)


def test_a_task_of_some_rows_holds_no_others(tmp_path):
    x, labels = np.random.default_rng(0).integers(0, 256, (4000, 28, 28), np.uint8), np.arange(4000) % 10
    np.savez(tmp_path / "one.npz", x=x, y=labels)
    tracemalloc.start()
    tables = [made(path=str(tmp_path / "one.npz"), classes=[label]) for label in range(10)]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(t.train["inputs"]) + len(t.held_out["inputs"]) for t in tables) == 4000
    assert held < 2.5 * x.nbytes  # the file, which is kept for the next task, and every row once


@pytest.mark.parametrize("view", [pixels.View(permutation=3), pixels.View(rotation=20.0), pixels.View(pad=1)])
def test_a_row_by_itself_is_that_of_the_table(archive, view):
    rows = made(path=archive, **view._asdict()).train["inputs"]
    np.testing.assert_array_equal(rows[3], rows[:][3])
    np.testing.assert_array_equal(np.asarray(rows), rows[:])
    assert rows[:0].shape == (0, *rows.shape[1:])
    assert rows[np.zeros(len(rows), bool)].shape == (0, *rows.shape[1:])


def test_what_else_lies_in_a_folder_does_not_matter(archive, tmp_path):
    before = made(path=archive).train["inputs"][:]
    (tmp_path / "lock-ubyte").symlink_to(tmp_path / "nowhere")
    np.testing.assert_array_equal(made(path=archive).train["inputs"][:], before)
    with pytest.raises(UserError, match="no such file or folder"):
        made(path=str(tmp_path / "nowhere" / "train-images-idx3-ubyte"))
    path = pair(tmp_path, "train", numbered(12))
    assert len(made(path=path).train["inputs"]) == 11


def test_a_file_that_has_changed_is_read_again(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for fill in (1, 2):
        pair(folder, "train", (np.full((6, 2, 2), fill, np.uint8), np.arange(6, dtype=np.uint8)))
        pair(folder, "t10k", (np.full((6, 2, 2), 10 * fill, np.uint8), np.arange(6, dtype=np.uint8)))
        table = made(path=str(folder))
        assert np.unique(np.rint(table.train["inputs"][:] * 255)).tolist() == [fill]
        assert np.unique(np.rint(table.held_out["inputs"][:] * 255)).tolist() == [10 * fill]


def test_pixels_are_padded_then_rotated_then_permuted_then_standardised(archive):
    """Against the same steps one by one, per image."""
    x, _ = numbered(60)
    view = pixels.View(pad=2, rotation=30.0, permutation=8)
    order = np.random.default_rng(8).permutation(8 * 9)
    wanted = []
    for image in x:
        wide = np.zeros((8, 9))
        wide[2:-2, 2:-2] = image / 255
        turned = ndimage.rotate(wide, 30.0, reshape=False, order=1, mode="grid-constant", prefilter=False)
        wanted.append(turned.reshape(-1)[order].reshape(8, 9, 1))
    np.testing.assert_allclose(pixels.seen(x[..., None], view), wanted, atol=1e-6)
    plain = made(path=archive, held_out=10)
    raw = plain.train["inputs"][:].astype(np.float64)
    full = made(path=archive, held_out=10, classes=[2], pad=2, rotation=30.0, permutation=8, standardise=True)
    kept = [i for i, n in enumerate(numbers(plain.train)) if n % 4 == 2]
    seen = np.asarray(wanted)[[numbers(plain.train)[i] for i in kept]]
    np.testing.assert_allclose(full.train["inputs"][:], (seen - raw.mean()) / raw.std(), atol=1e-5)  # of all classes
    assert full.description["permutation"] == 8
    zero = made(path=archive, permutation=0).train["inputs"][:]
    assert np.any(zero != made(path=archive).train["inputs"][:])
    colours = np.random.default_rng(1).integers(0, 256, (3, 4, 5, 3), np.uint8)
    mixed = pixels.seen(colours, pixels.View(permutation=1)).reshape(3, 20, 3)
    whole = colours.reshape(3, 20, 3).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(mixed, whole[:, np.random.default_rng(1).permutation(20)])  # channels stay together


def test_an_archive_that_claims_more_than_deflate_can_make_is_refused_before_it_is_in_memory(tmp_path):
    """Its headers agree with each other, 256 MiB, and its file has some hundred bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**20, 16, 16)})
    np.savez_compressed(tmp_path / "bomb.npz", y=np.zeros(2**20, np.uint8))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(256))
        archive.getinfo("x.npy").file_size = len(header.getvalue()) + 2**28
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"bomb\.npz: x declares 268,435,584 bytes and has not that many"):
            made(path=str(tmp_path / "bomb.npz"))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_files_that_are_no_images_or_lie_are_refused(tmp_path, archive):
    x, y = numbered(6)
    whole = idx(x)

    def file(name, data):
        put(tmp_path, name.replace("images", "labels").replace("idx3", "idx1"), idx(y))
        return put(tmp_path, name, data)

    def npz(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        return str(tmp_path / name)

    alone = put(tmp_path, "alone-images-idx3-ubyte", whole)
    pointer = file("lfs-images-idx3-ubyte.gz", whole)
    Path(pointer).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    cases = [
        ("no such file or folder", str(tmp_path / "none")),
        ("holds no train-images", str(tmp_path)),
        ("is no .npz", file("data.txt", b"")),
        ("ends after 119 bytes", file("a-images-idx3-ubyte", whole[:-1])),
        ("declares 120 bytes and is longer", file("b-images-idx3-ubyte", whole + b"x")),
        ("ends within its header", file("c-images-idx3-ubyte.gz", whole[:9])),
        ("no IDX file of bytes .*7f454c46", file("d-images-idx3-ubyte", b"\x7fELF" + whole)),
        ("no IDX file of bytes", file("e-images-idx3-ubyte", idx(x, code=13))),
        ("declares 4,294,836,225 bytes, more than", file("f-images-idx3-ubyte", idx(x, sizes=(65535, 65535, 1)))),
        ("declares 4,294,836,225 bytes, more than", file("g-images-idx3-ubyte.gz", idx(x, sizes=(65535, 65535, 1)))),
        ("its labels are not beside it; copy alone-labels-idx1-ubyte", alone),
        ("Git LFS pointer", pointer),
        ("holds a, b; say which", npz("names.npz", a=x, b=y)),
        ("Python objects, which are not loaded", npz("objects.npz", x=x, y=np.array([{}] * 6))),
        ("6 images, but 5 labels; give the labels of these images", npz("short.npz", x=x, y=y[:5])),
        (r"6 images, but labels of shape \(6, 2\); give", npz("wide.npz", x=x, y=np.stack([y, y], 1))),
        ("labels of float64", npz("floats.npz", x=x, y=y.astype(float))),
        ("labels of int64; expected whole numbers from 0", npz("negative.npz", x=x, y=y.astype(int) - 1)),
        ("images of float32 from 0 to 255", npz("large.npz", x=np.float32([[0, 255]] * 6), y=y)),
        ("images of float64 from nan to nan", npz("nan.npz", x=np.full((6, 2), np.nan), y=y)),
        ("images of int64; store uint8", npz("ints.npz", x=x.astype(int), y=y)),
        (r"images of shape \(6,\)", npz("flat.npz", x=y, y=y)),
        (r"images of shape \(0, 4\)", npz("empty.npz", x=np.zeros((0, 4)), y=y[:0])),
        ("cannot be read", file("text.npz", b"text")),
    ]
    for words, path in cases:
        with pytest.raises(UserError, match=words) as error:
            made(path=path)
        assert "\n" not in str(error.value)
    cut = Path(pair(tmp_path, "train", (x, y), ".gz"))
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz: cannot be read"):
        made(path=str(tmp_path))
    put(tmp_path, "emnist-train-images-idx3-ubyte", whole)
    with pytest.raises(UserError, match=r"holds emnist-train.* and train-.*; name one of them"):
        made(path=str(tmp_path))


def _patched(path, name, old, new, method=zipfile.ZIP_DEFLATED):
    """Rewrites a member of an archive, its size and checksum with it."""
    with zipfile.ZipFile(path) as source:
        members = {n: source.read(n) for n in source.namelist()}
    assert old in members[name]
    with zipfile.ZipFile(path, "w", method) as out:
        for n, data in members.items():
            out.writestr(n, data.replace(old, new) if n == name else data)


def test_nothing_large_is_allocated_for_a_header_that_lies(tmp_path):
    x, y = numbered(6)
    path = tmp_path / "lie.npz"
    np.savez(path, x=x, y=y)
    _patched(path, "x.npy", b"(6, 4, 5), }         ", b"(60000, 28000, 5), } ")
    put(tmp_path, "bomb-labels-idx1-ubyte", idx(y))
    bomb = put(tmp_path, "bomb-images-idx3-ubyte.gz", idx(x) + bytes(20_000_000))
    other = tmp_path / "lzma.npz"
    np.savez(other, x=x, y=y)
    _patched(other, "x.npy", b"(6", b"(6", zipfile.ZIP_LZMA)
    tracemalloc.start()
    try:
        for words, place in (
            ("x declares 8,400,000,128 bytes and has not that many", str(path)),
            ("declares 120 bytes and is longer", bomb),
            ("x is compressed in a way that NumPy does not write", str(other)),
        ):
            with pytest.raises(UserError, match=words):
                made(path=place)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_options_that_do_not_fit_are_refused(tmp_path, archive):
    flat = str(tmp_path / "flat.npz")
    np.savez(flat, x=np.zeros((6, 4), np.uint8) + np.arange(6, dtype=np.uint8)[:, None], y=np.arange(6))
    for words, options in (
        ("images need one of them", {}),
        ("path='': is empty; give a file", {"path": ""}),
        ("dataset='': is empty", {"dataset": ""}),
        ("held_out_path='': is empty", {"path": archive, "held_out_path": ""}),
        (r"held_out_path='.*none': no such file", {"path": archive, "held_out_path": str(tmp_path / "none")}),
        ("images need one of them", {"path": archive, "dataset": "mnist"}),
        ("split='train': of a dataset, but path is given", {"path": archive, "split": "train"}),
        ("held_out_path='x': of files, but dataset is given", {"dataset": "mnist", "held_out_path": "x"}),
        ("held_out=0.1: of a dataset it is a split", {"dataset": "mnist", "held_out": 0.1}),
        ("held_out='test': of files a share or a number", {"path": archive, "held_out": "test"}),
        ("held_out=0: of files", {"path": archive, "held_out": 0}),
        ("held_out=nan: of files", {"path": archive, "held_out": math.nan}),
        ("held_out=60: of 60 images; leave some", {"path": archive, "held_out": 60}),
        ("held_out=0.001: of 60 images", {"path": archive, "held_out": 0.001}),
        ("held_out=5: held_out_path is given as well", {"path": archive, "held_out": 5, "held_out_path": flat}),
        ("is path as well", {"path": archive, "held_out_path": f"{tmp_path}/../{tmp_path.name}/data.npz"}),
        (r"shape \(4, 5, 1\) and held-out rows \(4,\)", {"path": archive, "held_out_path": flat}),
        ("rotation=5.0: rows of .* are no images", {"path": flat, "rotation": 5.0}),
        ("pad=1: rows of .* are no images", {"path": flat, "pad": 1}),
        ("pad=-1: must be at least 0", {"path": archive, "pad": -1}),
        ("permutation=-1: must be at least 0", {"path": archive, "permutation": -1}),
        ("limit=0: must be at least 1", {"path": archive, "limit": 0}),
        ("rotation=inf: must be a finite", {"path": archive, "rotation": math.inf}),
        (r"classes=\[1, 1\]: name at least one", {"path": archive, "classes": [1, 1]}),
        (r"classes=\[\]: name at least one", {"path": archive, "classes": []}),
        (r"classes=\[1, 7\]: no training row has a label of \[7\]", {"path": archive, "classes": [1, 7]}),
        ("no held-out row has a label of", {"path": archive, "held_out": 1, "classes": [0, 1]}),
        ("image='x': an .npz needs both", {"path": archive, "image": "x"}),
        ("no column 'z'", {"path": archive, "image": "z", "label": "y"}),
    ):
        with pytest.raises(UserError, match=words):
            made(**options)


@pytest.mark.skipif(not MNIST.is_dir(), reason="no MNIST here")
def test_mnist():
    table = made(path=str(MNIST), classes=[4, 9], limit=500)
    assert table.train["inputs"].shape == (500, 28, 28, 1)
    assert np.bincount(table.held_out["targets"]).tolist() == [982, 1009]  # LeCun et al., test set
    assert table.held_out["inputs"][:].max() == 1
