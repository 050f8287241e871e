"""Tar shards: which are meant, what they hold, and what is said of bad ones."""

from __future__ import annotations

import io
import os
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
import torch
from PIL import Image

from ssl_samix.data import shards
from ssl_samix.data.datamodule import StepLoader, StepReader, StepSampler
from ssl_samix.data.datasets import load_splits
from ssl_samix.data.images import FileImages, MemoryImages
from ssl_samix.data.layout import check_layout
from ssl_samix.data.shards import cache_folder, expand_braces, find, index
from ssl_samix.data.sources import ShardSource, windowed
from ssl_samix.errors import DataError, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_SAMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def memory():
    """An empty file system in memory."""
    store = fsspec.filesystem("memory")
    yield store
    store.rm("/", recursive=True)


@pytest.fixture
def served(tmp_path):
    """The address of a server of ``tmp_path``, and the requests that it has answered."""
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append((self.command, self.path))

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def picture(value, size=(32, 32), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(file, kind)
    return file.getvalue()


def tar(*members):
    """The bytes of a tar file of (name, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def write_shards(folder, count=3, each=4, labels=None, **options):
    """Shard k holds ``each`` images, of the gray values 0, 1, 2 ... over all shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        members = []
        for value in range(k * each, (k + 1) * each):
            members.append((f"{value:05}.png", picture(value, **options)))
            if labels:
                members.append((f"{value:05}.cls", str(labels(value)).encode()))
        (folder / f"train-{k:03}.tar").write_bytes(tar(*members))
    return folder


def grays(images):
    half = images.image_size // 2
    return images.load(range(len(images)))[:, 0, half, half].tolist()


def labelled_grays(images):
    return zip(grays(images), images.labels.tolist(), strict=True)


def names(root):
    return [os.path.basename(found.shard.url) for found in find(str(root))]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a", ["a"]),
        ("t-{008..010}.tar", ["t-008.tar", "t-009.tar", "t-010.tar"]),
        ("t-{8..10}", ["t-8", "t-9", "t-10"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{a}/x", ["{a}/x"]),
        ("{3..1}", []),
    ],
)
def test_braces(pattern, expected):
    assert expand_braces(pattern) == expected


def test_every_way_to_name_shards(tmp_path, monkeypatch):
    write_shards(tmp_path / "s", 12)
    (tmp_path / "s" / "notes.txt").touch()
    every = [f"train-{k:03}.tar" for k in range(12)]
    assert names(tmp_path / "s") == every
    assert names(f"{tmp_path}/s/") == every
    assert names(tmp_path / "s" / "train-{009..011}.tar") == every[9:]
    assert names(tmp_path / "s" / "train-{000,003}.tar") == [every[0], every[3]]
    assert names(tmp_path / "s" / "train-00[12].tar") == every[1:3]
    assert names(tmp_path / "*" / "*-01?.tar") == every[10:]
    assert names(tmp_path / "s" / "train-005.tar") == [every[5]]
    assert names(f"file://{tmp_path}/s/*.tar") == every
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/s/*1.tar") == [every[1], every[11]]
    (tmp_path / "s").rename(tmp_path / "s{0..1}[x]")
    assert names(tmp_path / "s{0..1}[x]") == every


def test_members_and_their_labels(tmp_path):
    pieces = [picture(v) for v in range(8)]
    long = "x" * 150 + ".JPEG"
    (tmp_path / "a.tar").write_bytes(
        tar(
            ("./dir/one.png", pieces[0]),
            ("dir/one.json", b"{}"),
            ("later.cls", b"7\n"),
            ("later.png", pieces[1]),
            ("later.mask.png", pieces[3]),
            ("last.WebP", pieces[2]),
            ("._hidden.png", pieces[3]),
            (".git/x.png", pieces[3]),
            (long, pieces[4]),
            ("ünï.gif", pieces[5]),
            ("ünï.CLS", b" a word\n"),
            ("dir/later.png", pieces[6]),
            ("dir/later.mask.cls", b"8"),
        )
    )
    ((_, members),) = index(str(tmp_path))
    assert members.names == [
        *("./dir/one.png", "later.png", "last.WebP"),
        *(long, "ünï.gif", "dir/later.png"),
    ]
    assert members.labels == [None, 7, None, None, "a word", None]
    data = (tmp_path / "a.tar").read_bytes()
    found = [data[o : o + s] for o, s in zip(members.offsets, members.sizes, strict=True)]
    assert found == [pieces[i] for i in (0, 1, 2, 4, 5, 6)]


def test_what_tar_itself_writes(tmp_path):
    (tmp_path / "photos" / "day").mkdir(parents=True)
    for value in range(6):
        (tmp_path / "photos" / "day" / f"{value}.png").write_bytes(picture(value))
    (tmp_path / "photos" / "day" / "link.png").symlink_to("0.png")
    os.link(tmp_path / "photos" / "day" / "0.png", tmp_path / "photos" / "day" / "zz.png")
    command = ["tar", "--sort=name", "-cf", "../a.tar", "."]
    subprocess.run(command, cwd=tmp_path / "photos", check=True)
    splits = load_splits("webdataset", tmp_path / "a.tar", "auto", None)
    assert grays(splits.train) == [0, 1, 2, 3, 4, 5]
    assert splits.train.name(5) == f"{tmp_path}/a.tar/./day/5.png"


def test_the_index_is_made_once_and_again_for_what_changes(tmp_path, cache, monkeypatch):
    root = write_shards(tmp_path / "s")
    read = []
    original = shards.read_members
    monkeypatch.setattr(
        shards, "read_members", lambda shard: read.append(shard.url[-7:]) or original(shard)
    )
    first = index(str(root))
    assert sorted(read) == ["000.tar", "001.tar", "002.tar"]
    assert index(str(root)) == first
    assert index(str(root / "train-*.tar")) == first
    assert len(read) == 3
    (root / "train-001.tar").write_bytes(tar(("new.png", picture(99))))
    assert index(str(root))[1][1].names == ["new.png"]
    assert read[3:] == ["001.tar"]
    for file in cache.glob("*.json"):
        file.write_text(file.read_text()[:40])
    assert index(str(root))[0] == first[0]
    assert len(read) == 7
    for file in cache.glob("*.json"):
        file.write_text('{"format": 1, "names": ["a"], "offsets": []}')
    assert index(str(root))[0] == first[0]
    assert len(read) == 10


def test_a_cache_that_cannot_be_written_is_needed_for_remote_shards_only(tmp_path, memory):
    (tmp_path / "cache").write_text("a file where the folder should be")
    root = write_shards(tmp_path / "s")
    assert len(load_splits("webdataset", root, "auto", None).train) == 12
    memory.pipe("/a.tar", tar(("a.png", picture(1))))
    with pytest.raises(UserError, match="set SSL_SAMIX_CACHE to a folder with enough space"):
        index("memory://a.tar")


def test_images_without_labels(tmp_path):
    root = write_shards(tmp_path / "s")
    splits = load_splits("webdataset", root, "auto", None)
    assert isinstance(splits.train, MemoryImages)
    assert (splits.bank, splits.val, splits.classes) == (None, None, ())
    assert splits.train.labels.tolist() == [-1] * 12
    assert splits.image_size == 32
    assert grays(splits.train) == list(range(12))
    assert grays(load_splits("webdataset", root, 16, 5).train) == sorted(
        set(grays(load_splits("webdataset", root, 16, 5).train))
    )
    assert len(load_splits("webdataset", root, 16, 5).train) == 5
    with pytest.raises(DataError, match=r"12 of 12 images have no number or name in a \.cls"):
        load_splits("webdataset", root, "auto", None, labels=True)


def test_labels_hold_out_a_tenth(tmp_path):
    root = write_shards(tmp_path / "s", 4, 10, labels=lambda value: 5 + 3 * (value % 2))
    splits = load_splits("webdataset", root, "auto", None)
    assert splits.classes == ("5", "8")
    assert (len(splits.train), len(splits.val)) == (36, 4)
    assert splits.bank is splits.train
    assert splits.val.labels.bincount().tolist() == [2, 2]
    for images in (splits.train, splits.val):
        assert [value % 2 for value in grays(images)] == images.labels.tolist()
    assert sorted(grays(splits.train) + grays(splits.val)) == list(range(40))
    unlabelled = load_splits("webdataset", root, "auto", None, labels=False)
    assert (unlabelled.classes, len(unlabelled.train)) == ((), 40)


def test_some_labels_are_none(tmp_path, caplog):
    some = tar(("a.png", picture(1)), ("a.cls", b"0"), ("b.png", picture(2)))
    (tmp_path / "a.tar").write_bytes(some)
    assert load_splits("webdataset", tmp_path, "auto", None).classes == ()
    assert "1 of 2 images have no label" in caplog.text
    with pytest.raises(DataError, match="1 of 2 images have no number or name"):
        load_splits("webdataset", tmp_path, "auto", None, labels="true")


def shard(tmp_path, *names, **labels):
    """Write one shard: images of the gray values 0, 1, 2 ..., and labels by their keys."""
    images = [(name, picture(value)) for value, name in enumerate(names)]
    texts = [(f"{key}.cls", text) for key, text in labels.items()]
    (tmp_path / "a.tar").write_bytes(tar(*images, *texts))
    return tmp_path / "a.tar"


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        (["img.0001.jpg", "img.0002.jpg"], "img.0001.jpg", "img.0002.jpg"),
        (["d.x/a.jpg", "d.x/a.JPG"], "d.x/a.jpg", "d.x/a.JPG"),
        (["b.png", "a.jpg", "c.png", "a.png"], "a.jpg", "a.png"),
        (["a.left.png", "b.png", "a.right.png"], "a.left.png", "a.right.png"),
    ],
)
def test_several_images_of_one_sample_are_refused(names, first, second, tmp_path):
    path = shard(tmp_path, *names, a=b"1")
    said = f"in {path}, {first} and {second} are images of one sample, whose name ends at the first"
    with pytest.raises(DataError, match=re.escape(said)):
        index(str(path))


def test_masks_are_left_out_and_counted(tmp_path, caplog):
    names = ["1.seg.png", "1.png", "2.png", "2.SEG.PNG", "2.depth.png", "3.png"]
    path = shard(tmp_path, *names, **{"1": b"4", "2": b"5", "3": b"5"})
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        ((_, members),) = index(str(path))
        assert members.names == ["1.png", "2.png", "3.png"]
        assert members.labels == [4, 5, 5]
        assert "3 images are left out, such as 1.seg.png" in caplog.text
    assert grays(load_splits("webdataset", path, 32, None, labels=False).train) == [1, 2, 5]


def test_masks_alone_are_no_images(tmp_path):
    with pytest.raises(DataError, match=r"after the first dot .*, unlike 1\.seg\.png"):
        index(str(shard(tmp_path, "1.seg.png", "2.seg.png")))


def test_words_are_classes_by_name(tmp_path):
    names = ["1.png", "2.png", "3.png", "4.png"]
    words = {"1": b"tabby cat\n", "2": b"dog", "3": b"Zebra", "4": b"dog"}
    path = shard(tmp_path, *names, **words)
    splits = load_splits("webdataset", path, 32, None)
    assert splits.classes == ("Zebra", "dog", "tabby cat")
    pairs = {pair for part in (splits.train, splits.val) for pair in labelled_grays(part)}
    assert pairs == {(0, 2), (1, 1), (2, 0), (3, 1)}


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (b"12", r"\.cls members hold numbers, such as 12, and names, such as cat: use one kind"),
        (b"\xff\xfe", r"one number or one name, as text, but one holds '\ufffd\ufffd': correct"),
        (b"\x03\x00\x00", r"one number or one name, as text, but one holds '\\x03\\x00\\x00'"),
    ],
)
def test_labels_of_several_kinds_are_refused_unless_they_are_ignored(second, sentence, tmp_path):
    path = shard(tmp_path, "1.png", "2.png", **{"1": b"cat", "2": second})
    with pytest.raises(DataError, match=sentence):
        load_splits("webdataset", path, 32, None)
    assert load_splits("webdataset", path, 32, None, labels=False).classes == ()


@pytest.mark.parametrize("system", ["posix", "windows"])
def test_large_images_are_decoded_on_demand(system, tmp_path, monkeypatch):
    if system == "windows":
        monkeypatch.delattr(os, "pread")
    root = write_shards(tmp_path / "s", size=(300, 200), kind="JPEG")
    splits = load_splits("webdataset", root, "auto", None)
    assert isinstance(splits.train, FileImages)
    assert splits.image_size == 192
    assert splits.train.original(3).shape == (3, 200, 300)
    again = pickle.loads(pickle.dumps(splits.train))
    assert grays(again) == grays(splits.train)
    with ThreadPoolExecutor(8) as pool:  # of one process, with the same open files
        values = pool.map(lambda i: int(splits.train.original(i % 12)[0, 0, 0]), range(480))
    assert [round(v) for v in values] == list(range(12)) * 40


def test_more_shards_than_files_are_open_at_once(tmp_path):
    root = write_shards(tmp_path / "s", count=80, each=2)
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    images = load_splits("webdataset", root, 16, None, memory_gb=0).train
    assert grays(images) == list(range(160))
    if open_before is not None:
        assert len(os.listdir("/proc/self/fd")) <= open_before + 32


def test_a_damaged_image_is_replaced_on_demand_and_skipped_in_memory(tmp_path, caplog):
    members = [(f"{v:03}.png", picture(v)) for v in range(200)]
    members[7] = ("007.png", members[7][1][:40])
    (tmp_path / "a.tar").write_bytes(tar(*members))
    on_demand = load_splits("webdataset", tmp_path, 32, None, memory_gb=0).train
    assert grays(on_demand)[6:9] == [6, 8, 8]
    in_memory = load_splits("webdataset", tmp_path, 32, None).train
    assert in_memory.unreadable == 1
    assert sorted(in_memory.order(generator(0)).tolist()) == list(range(199))
    assert f"{tmp_path}/a.tar/007.png" in caplog.text


def test_workers_read_what_this_process_reads(tmp_path):
    images = load_splits("webdataset", write_shards(tmp_path / "s"), 16, None, memory_gb=0).train
    here = [images[i][0] for i in range(12)]
    loader = torch.utils.data.DataLoader(images, batch_size=None, num_workers=2)
    for pixels, (there, _) in zip(here, loader, strict=True):
        assert torch.equal(pixels, there)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_an_epoch_goes_through_few_shards_at_a_time():
    group = torch.arange(40).repeat_interleave(25)
    order = windowed(group, 4, generator(0))
    assert sorted(order.tolist()) == list(range(1000))
    spans = group[order].view(10, 100)  # ten windows of four shards
    assert all(len(span.unique()) == 4 for span in spans)
    assert len({tuple(span.unique().tolist()) for span in spans}) == 10
    assert all((span.bincount(minlength=40)[span.unique()] == 25).all() for span in spans)
    assert not torch.equal(spans[0], spans[0].sort().values), "shuffled jointly"
    assert torch.equal(order, windowed(group, 4, generator(0)))
    assert not torch.equal(order, windowed(group, 4, generator(1)))


def test_unequal_shards_are_gone_through_once():
    group = torch.tensor([0] * 5 + [3] * 1 + [9] * 30 + [4] * 7)
    for seed in range(20):
        assert sorted(windowed(group, 2, generator(seed)).tolist()) == list(range(43))


def test_the_order_is_the_same_on_any_number_of_ranks(tmp_path):
    root = write_shards(tmp_path / "s", 40, 5)
    images = load_splits("webdataset", root, 16, None, memory_gb=0).train
    assert isinstance(images.source, ShardSource)
    samplers = [
        StepSampler(200, 12, 3, rank, ranks, order=images.order)
        for rank, ranks in ((0, 1), (0, 2), (1, 2))
    ]
    for sampler in samplers:
        sampler.set_epoch(2)
    seen = []
    for (_, whole), (_, first), (_, second) in zip(*samplers, strict=True):
        assert first + second == whole
        seen += whole
    assert len(set(seen)) == len(seen) == 192
    early = {index // 5 for index in seen[:80]}
    assert len(early) == 16, "the first window's shards"


def test_the_order_is_the_same_in_memory_and_on_disk(tmp_path):
    root = write_shards(tmp_path / "s", 40, 5)
    images = [load_splits("webdataset", root, 16, None, memory_gb=gb).train for gb in (0, 1)]
    assert [type(one) for one in images] == [FileImages, MemoryImages]
    assert torch.equal(*(one.order(generator(5)) for one in images))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_epoch_has_its_own_order(workers):
    """As Lightning does it: an iterator, then the epoch, then the batches."""
    images = MemoryImages(torch.zeros(50, 3, 8, 8, dtype=torch.uint8), torch.zeros(50), ["x"] * 50)
    sampler = StepSampler(50, 10, 1, 0, 1)
    loader = StepLoader(
        StepReader(images, None, 1, 0), sampler=sampler, batch_size=None, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    for epoch in (3, 4):
        batches = iter(loader)
        sampler.set_epoch(epoch)
        read = [(step, index.tolist()) for _, _, index, step in batches]
        assert read == list(sampler)
        assert [step for step, _ in read] == list(range(5 * epoch, 5 * epoch + 5))


def test_other_images_are_shuffled_as_ever():
    images = MemoryImages(torch.zeros(50, 3, 8, 8, dtype=torch.uint8), torch.zeros(50), ["x"] * 50)
    ours, plain = (
        [list(s) for s in StepSampler(50, 10, 1, 0, 1, order=order)]
        for order in (images.order, None)
    )
    assert ours == plain
    assert ours[0][1] == [26, 22, 38, 1, 40, 48, 39, 7, 45, 11], "as in every earlier version"


def test_shards_in_a_file_system_of_fsspec_are_copied_once(memory, cache, monkeypatch):
    for k in range(3):
        content = tar(*((f"{v}.png", picture(v)) for v in range(4 * k, 4 * k + 4)))
        memory.pipe(f"/bucket/train-{k}.tar", content)
    fetched = []
    original = type(memory).get_file

    def get_file(self, source, *rest, **settings):
        fetched.append(source)
        return original(self, source, *rest, **settings)

    monkeypatch.setattr(type(memory), "get_file", get_file)
    for root in ("memory://bucket/train-{0..2}.tar", "memory://bucket/*.tar", "memory://bucket"):
        images = load_splits("webdataset", root, "auto", None).train
        assert grays(images) == list(range(12))
        assert images.name(4) == "memory:///bucket/train-1.tar/4.png"
    assert load_splits("webdataset", "filecache::memory://bucket", "auto", None).train.name(0)
    assert sorted(fetched) == [f"/bucket/train-{k}.tar" for k in range(3)]
    stale = set(cache.glob("*.tar"))
    memory.pipe("/bucket/train-1.tar", tar(("new.png", picture(200))))
    assert grays(load_splits("webdataset", root, "auto", None).train)[4] == 200
    (copy,) = set(cache.glob("*.tar")) - stale
    copy.unlink()
    assert len(load_splits("webdataset", root, "auto", None).train) == 9
    assert len(fetched) == 5


def test_shards_behind_a_web_server(tmp_path, served):
    url, requests = served
    write_shards(tmp_path / "s")
    for root in (f"{url}/s/train-{{000..002}}.tar", f"{url}/s/*.tar", f"{url}/s/"):
        check_layout("webdataset", root, False)
        images = load_splits("webdataset", root, "auto", None).train
        assert grays(images) == list(range(12))
    gets = [path for command, path in requests if command == "GET" and path.endswith(".tar")]
    assert sorted(gets) == [f"/s/train-{k:03}.tar" for k in range(3)]
    with pytest.raises(DataError, match=r"missing\.tar.*404"):
        check_layout("webdataset", f"{url}/s/missing.tar", False)


def test_nothing_found_is_a_sentence(tmp_path):
    (tmp_path / "x.txt").touch()
    for root in (tmp_path, tmp_path / "*.tar", "memory://nowhere/*.tar"):
        with pytest.raises(DataError, match=r"no shard matches data\.root="):
            check_layout("webdataset", str(root), False)
    for root in (tmp_path / "gone", tmp_path / "a-{0..2}.tar", "memory://nowhere/a.tar"):
        with pytest.raises(DataError, match="does not exist"):
            check_layout("webdataset", str(root), False)
    with pytest.raises(DataError, match=r"give data.root=<folder or pattern of shards>"):
        check_layout("webdataset", None, False)


def test_a_protocol_without_its_package_names_it(monkeypatch):
    with pytest.raises(
        DataError, match=r"unknown protocol 'htpp': did you mean 'http', 'https' or"
    ):
        check_layout("webdataset", "htpp://server/a.tar", False)

    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"s3://: pip install s3fs$"):
        check_layout("webdataset", "s3://bucket/train-{0..9}.tar", False)


def test_an_unreachable_server_is_a_sentence():
    with socket.socket() as taken:  # bound, and never listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for name in ("a.tar", "*.tar", ""):
            with pytest.raises(DataError, match=r"data\.root=http://127.*Cannot connect to host"):
                check_layout("webdataset", f"{url}/{name}", False)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a tar file" * 100,
        tar(("a.png", picture(1)), ("b.png", picture(2)))[:700],
        tar(("a.png", picture(1)), ("b.png", picture(2)))[:1100],
        tar(("a.png", picture(1)), ("b.png", picture(2)))[:1024],
    ],
)
def test_truncated_shards_and_other_files(content, tmp_path, memory, cache):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar is truncated or not an uncompressed tar file"):
        load_splits("webdataset", tmp_path, "auto", None)
    memory.pipe("/a.tar", content)
    with pytest.raises(DataError, match=r"a\.tar is truncated or not an uncompressed tar file"):
        load_splits("webdataset", "memory://a.tar", "auto", None)
    assert not list(cache.glob("*.tar")), "a damaged copy is not kept"


def test_compressed_and_empty_shards(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.add(__file__)
    with pytest.raises(DataError, match="not an uncompressed tar"):
        load_splits("webdataset", tmp_path, "auto", None)
    (tmp_path / "a.tar").write_bytes(tar(("notes.txt", b"words")))
    with pytest.raises(DataError, match="no image in the 1 shards"):
        load_splits("webdataset", tmp_path, "auto", None)
    (tmp_path / "b.tar").write_bytes(tar(("a.png", picture(1))))
    assert len(load_splits("webdataset", tmp_path, "auto", None).train) == 1
    assert "1 of 2 shards hold no image" in caplog.text


def test_the_early_check_imports_no_torch(tmp_path):
    write_shards(tmp_path / "s", 1)
    code = (
        "import sys; from ssl_samix.data.layout import check_layout; "
        f"check_layout('webdataset', {str(tmp_path / 's')!r}, False); "
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_SAMIX_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SSL_SAMIX_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "ssl_samix"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ssl_samix"
