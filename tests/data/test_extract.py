"""Extraction: real photographs through a small random autoencoder and CLIP, saved to disk as users have them."""

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.clip import save_clip
from tests.training import tiny
from tests.training.test_command import ROOT, call
from uvit_fast.build import build_dataset
from uvit_fast.cli import main
from uvit_fast.config import load_config
from uvit_fast.data import extract, shards
from uvit_fast.data.autoencoders import Scaling, load_autoencoder
from uvit_fast.data.reading import list_images
from uvit_fast.data.transforms import center_crop
from uvit_fast.runtime.errors import UserError

# h2_256's recipe with a small model, on 64 pixels: 8 x 8 latents.
SMALL = [
    *("model.img_size=8", "model.embed_dim=32", "model.depth=2", "model.num_heads=2"),
    *("train.batch_size=4", "train.iterations=3", "train.warmup_steps=1", "sample.steps=3", "data.num_workers=0"),
]
CONFIG = "configs/h2_256.yaml"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A tiny ImageNet: two classes of six cuts each of scikit-learn's two photographs."""
    folder = tmp_path_factory.mktemp("images")
    for name, photo in zip(("n01_temple", "n02_flower"), load_sample_images().images):
        (folder / name).mkdir()
        for i in range(6):
            cut = Image.fromarray(photo).crop((60 * i, 20 * i, 60 * i + 300, 20 * i + 200 + 30 * i))
            cut.save(folder / name / f"{i}.JPEG", quality=92)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(folder)
    return str(folder)


def sets(*values):
    return [part for value in values for part in ("--set", value)]


def arguments(photos, vae, out, *more):
    common = ["extract", "--config", CONFIG, "--images", str(photos), "--out", str(out), "--vae", vae]
    return [*common, *sets(*SMALL, "device=cpu"), "--shard", "5", "--batch", "2", *more]


def make(photos, out, **options):
    """An extraction whose "autoencoder" is the mean of 8 x 8 pixels, to be fast and foreseeable; it counts what it
    encodes.
    """
    seen = SimpleNamespace(images=0)

    def encode(pixels):
        seen.images += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels.float(), 8).mean(1, keepdim=True) / 255
        return mean.expand(-1, 8, -1, -1)

    settings = dict(
        crop=center_crop, size=64, scaling=Scaling(0.2), vae={"name": "mean", "encoder_sha256": "0"}, mirror=True
    )
    settings.update(shard_images=5, batch=2, **options)
    return extract.Extraction(list_images(photos, labelled=True), out, encode, **settings), seen


def build_small(folder):
    return build_dataset(load_config(CONFIG, [*SMALL, f"data.path={folder}"]))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_tiny_imagenet_is_extracted_trained_on_and_sampled(photos, vae, tmp_path, capsys):
    assert main(arguments(photos, vae, tmp_path / "latents")) == 0
    assert "read 12 = written 12 + rejected 0" in capsys.readouterr().out
    manifest = shards.read_manifest(tmp_path / "latents")
    assert manifest["images"] == {"read": 12, "written": 12, "rejected": 0}
    assert (manifest["scale_factor"], manifest["image_size"]) == (0.18215, 64)
    assert manifest["vae"]["name"] == vae and len(manifest["vae"]["encoder_sha256"]) == 64
    assert manifest["arrays"]["moments"]["dtype"] == "float16"
    assert [shard["count"] for shard in manifest["arrays"]["moments"]["shards"]] == [10, 10, 4]
    assert shards.faults(tmp_path / "latents") == []

    overrides = [*SMALL, f"data.path={tmp_path / 'latents'}", f"latent.decoder={vae}", "device=cpu"]
    dataset = build_dataset(load_config(CONFIG, overrides))
    assert len(dataset) == 24 and dataset.labels.tolist() == [0] * 12 + [1] * 12
    # Item 2i + 1 is image i mirrored: the posterior is that of the autoencoder itself, to fp16.
    pixels = np.array(center_crop(Image.open(photos / "n01_temple" / "3.JPEG"), 64))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    expected = load_autoencoder(vae).encode(torch.cat([x, x.flip(-1)])).latent_dist.parameters
    torch.testing.assert_close(torch.from_numpy(dataset.stored.take([6, 7])).float(), expected, rtol=2e-3, atol=2e-3)

    run = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "train.py", "--config", CONFIG, "--run-dir", str(run), *sets(*overrides)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    command = ["sample", "--config", CONFIG, "--checkpoint", str(run), "--out", str(tmp_path / "samples.npz")]
    assert main([*command, "--num", "2", "--classes", "0,1", *sets(*overrides)]) == 0
    images = np.load(tmp_path / "samples.npz")["arr_0"]
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8 and images.std() > 0

    # the run knows whose latents they are: a copy in half precision decodes them, another autoencoder does not
    network = load_autoencoder(vae)
    network.half().save_pretrained(tmp_path / "half")
    next(network.encoder.parameters()).data += 1
    network.save_pretrained(tmp_path / "other")
    command = ["sample", "--checkpoint", str(run), "--num", "1", "--steps", "1", "--classes", "n02_flower"]
    assert main([*command, "--out", str(tmp_path / "a"), "--set", f"latent.decoder={tmp_path / 'half'}"]) == 0
    assert (tmp_path / "a" / "000000_class1_n02-flower.png").is_file()
    capsys.readouterr()
    for more in (["--out", str(tmp_path / "b")], ["--out", str(tmp_path / "c"), "--vae", str(tmp_path / "other")]):
        command[0] = "convert" if "--vae" in more else "sample"
        command = command[:3] if "--vae" in more else command
        assert main([*command, *more, "--set", f"latent.decoder={tmp_path / 'other'}"]) == 2
        assert f"not the one that made the latents which the model learned from, {vae}" in capsys.readouterr().err


def test_every_kind_of_bad_image_is_counted_and_named(photos, tmp_path, capsys):
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    photo = Image.open(photos / "n02_flower" / "0.JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "a" / "fine.png")
    photo.convert("L").save(folder / "a" / "grey.jpg")
    photo.convert("CMYK").save(folder / "a" / "cmyk.jpg")
    photo.save(folder / "a" / "turned.jpg", exif=exif)
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(folder / "a" / "deep.png")
    whole = (photos / "n02_flower" / "0.JPEG").read_bytes()
    (folder / "a" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "empty.png").write_bytes(b"")
    (folder / "a" / "text.jpg").write_text("not an image")
    (folder / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "a" / "readme.txt").write_text("")

    assert main(["data", "check", str(folder)]) == 1
    checked = capsys.readouterr().out
    assert "9 images, 4 unreadable, 4 unusual" in checked and "a/empty.png: zero bytes\n" in checked
    assert "a/deep.png: 16-bit, greyscale; read as upright RGB" in checked

    report = make(folder, tmp_path / "out")[0].run()
    assert (report["read"], report["written"], report["rejected"]) == (9, 5, 4)
    assert report["rejected_images"].keys() == {"a/half.jpg", "a/empty.png", "a/text.jpg", "a/gone.jpg"}
    assert report["rejected_images"]["a/empty.png"] == "zero bytes"
    assert "truncated" in report["rejected_images"]["a/half.jpg"]
    assert report["unusual"] == {"greyscale": 2, "CMYK": 1, "16-bit": 1, "EXIF-rotated": 1}
    assert report["ignored_files"] == ["a/readme.txt"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    arrays = shards.read_manifest(tmp_path / "out")["arrays"]
    assert (arrays["moments"]["count"], arrays["labels"]["count"]) == (10, 10)

    policy = extract.Policy(unusual="skip")
    report = make(folder, tmp_path / "strict", policy=policy)[0].run()
    assert (report["written"], report["rejected"]) == (1, 8)
    with pytest.raises(UserError, match="empty.png: zero bytes|(text|gone).jpg: unreadable|half.jpg: .*truncated"):
        make(folder, tmp_path / "refused", policy=extract.Policy(unreadable="refuse"))[0].run()
    with pytest.raises(UserError, match="cmyk.jpg: CMYK"):
        make(folder, tmp_path / "refused2", policy=extract.Policy(unusual="refuse"))[0].run()


def test_a_folder_that_cannot_be_written_is_one_line(photos, vae, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert main(arguments(photos, vae, tmp_path / "file" / "out")) == 2
    assert "file/out/notes: cannot be written (Not a directory); expected --out to allow it" in capsys.readouterr().err

    def read_only(folder, *content):
        raise OSError(errno.EROFS, "Read-only file system", str(folder / "x.npy"))

    monkeypatch.setattr(shards, "write_shard", read_only)
    with pytest.raises(UserError, match="out/x.npy: cannot be written .Read-only file system."):
        make(photos, tmp_path / "out")[0].run()


def test_names_that_are_not_utf8_are_extracted_continued_and_reported(photos, tmp_path, capsys):
    folder = os.fsencode(tmp_path / "images")
    os.makedirs(folder + b"/caf\xe9")
    shutil.copy(photos / "n01_temple" / "0.JPEG", folder + b"/caf\xe9/\xfc.jpg")
    open(folder + b"/caf\xe9/z\xfc.jpg", "w").close()
    for _ in range(2):
        report = make(tmp_path / "images", tmp_path / "out")[0].run()
        assert (report["written"], report["rejected"]) == (1, 1)
        print(extract.summary(tmp_path / "out", report))
        assert "rejected caf\\udce9/z\\udcfc.jpg: zero bytes" in capsys.readouterr().out
    assert shards.read_manifest(tmp_path / "out")["classes"] == ["caf\udce9"]
    assert main(["data", "check", str(tmp_path / "images")]) == 1
    assert "caf\\udce9/z\\udcfc.jpg: zero bytes" in capsys.readouterr().out


def test_an_interrupted_extraction_continues_with_nothing_doubled(photos, tmp_path):
    whole, _ = make(photos, tmp_path / "whole")
    whole.run()
    broken, _ = make(photos, tmp_path / "broken")
    encode, calls = broken.encode, []

    def interrupted(pixels):
        calls.append(len(pixels))
        if len(calls) == 5:  # in the second of three shards
            raise KeyboardInterrupt
        return encode(pixels)

    broken.encode = interrupted
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert not (tmp_path / "broken" / "manifest.json").exists()
    (tmp_path / "broken" / ".moments-00001.npy.77.tmp").write_bytes(b"half")  # as a killed process leaves it
    again, seen = make(photos, tmp_path / "broken")
    again.run()
    assert seen.images == 14  # the seven images of two shards, mirrored; the first shard was kept
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_a_damaged_shard_is_named_and_made_again(photos, tmp_path, capsys):
    make(photos, tmp_path / "out")[0].run()
    before = contents(tmp_path / "out")
    victim = tmp_path / "out" / "moments-00001.npy"
    victim.write_bytes(victim.read_bytes()[:-7])
    assert main(["data", "check", str(tmp_path / "out")]) == 1
    assert "moments-00001.npy: wrong checksum" in capsys.readouterr().out
    again, seen = make(photos, tmp_path / "out")
    again.run()
    assert "moments-00001.npy: wrong checksum" in capsys.readouterr().out and seen.images == 10
    assert contents(tmp_path / "out") == before
    assert main(["data", "check", str(tmp_path / "out")]) == 0


def test_ranks_share_the_shards_and_the_last_one_finishes(photos, tmp_path, monkeypatch):
    make(photos, tmp_path / "whole")[0].run()
    monkeypatch.setenv("WORLD_SIZE", "2")
    reports = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        reports.append(make(photos, tmp_path / "shared")[0].run())
    assert reports[0] is None and reports[1]["written"] == 12
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")


def test_torchruns_processes_share_the_shards(photos, vae, tmp_path, capsys):
    """Two at a time, as on a host with two GPUs."""
    assert main(arguments(photos, vae, tmp_path / "alone")) == 0
    command = arguments(photos, vae, tmp_path / "shared")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, "-m", "--", "uvit_fast.cli", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("read 12 = written 12 + rejected 0") >= 1  # by whoever was last, or by both
    alone, shared = (build_small(tmp_path / name) for name in ("alone", "shared"))
    assert torch.equal(torch.from_numpy(alone.labels), torch.from_numpy(shared.labels)) and len(shared) == 24
    everything = list(range(24))
    np.testing.assert_allclose(shared.stored.take(everything), alone.stored.take(everything), rtol=2e-3, atol=2e-3)
    files = [{p.name for p in (tmp_path / name).rglob("*")} for name in ("alone", "shared")]
    assert files[0] == files[1]


def test_a_full_disk_says_so_and_leaves_what_is_complete(photos, tmp_path):
    """/dev/full is a disk without space: first the settings go there, then the second of three shards."""
    make(photos, tmp_path / "whole")[0].run()
    (tmp_path / "out" / "notes").mkdir(parents=True)
    (tmp_path / "out" / "notes" / f".settings.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="the disk is full; the shards of 0 of 12 images are complete"):
        make(photos, tmp_path / "out")[0].run()
    (tmp_path / "out" / f".moments-00001.npy.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="the disk is full; the shards of 5 of 12 images are complete"):
        make(photos, tmp_path / "out")[0].run()
    assert not list((tmp_path / "out").glob(".*"))
    again, seen = make(photos, tmp_path / "out")
    again.run()
    assert seen.images == 14 and contents(tmp_path / "out") == contents(tmp_path / "whole")


def slowly(photos, out):
    torch.set_num_threads(1)  # a fork has no other threads
    extraction, _ = make(photos, out)
    encode = extraction.encode
    extraction.encode = lambda pixels: time.sleep(0.1) or encode(pixels)
    extraction.run()


def test_a_killed_extraction_continues_with_nothing_doubled(photos, tmp_path):
    """Killed in its second shard, without a chance to clean up."""
    make(photos, tmp_path / "whole")[0].run()
    process = multiprocessing.get_context("fork").Process(target=slowly, args=(photos, tmp_path / "out"))
    process.start()
    while not (tmp_path / "out" / "notes" / "00000.json").exists():
        assert process.is_alive()
    process.kill()
    process.join()
    assert not (tmp_path / "out" / "manifest.json").exists()
    again, seen = make(photos, tmp_path / "out")
    again.run()
    assert seen.images == 14 and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_settings_or_other_images_are_refused(photos, tmp_path):
    make(photos, tmp_path / "out")[0].run()
    with pytest.raises(UserError, match="holds an extraction with dtype 'float16', got 'float32'"):
        make(photos, tmp_path / "out", dtype="float32")[0].run()
    more = tmp_path / "images"
    shutil.copytree(photos, more)
    (more / "n01_temple").rename(more / "n03_temple")
    with pytest.raises(
        UserError, match="of other classes: removed n01_temple; added n03_temple; label 0 was n01_temple"
    ):
        make(more, tmp_path / "out")[0].run()
    (more / "n03_temple").rename(more / "n01_temple")
    shutil.copy(more / "n01_temple" / "0.JPEG", more / "n01_temple" / "9.JPEG")
    with pytest.raises(UserError, match="holds an extraction with images 12, got 13"):
        make(more, tmp_path / "out")[0].run()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.pdf").write_text("")
    with pytest.raises(UserError, match="expected a new or empty folder"):
        make(photos, tmp_path / "full")[0].run()


def test_captions_become_features_of_every_caption_and_of_none(photos, vae, tmp_path, capsys):
    clip = save_clip(tmp_path / "clip")
    flat = {"images": [], "annotations": []}
    for i in range(4):
        flat["images"].append({"id": 10 - i, "file_name": f"n02_flower/{i}.JPEG"})
    for number, (image, caption) in enumerate([(10, "a b"), (8, "b"), (10, "b a a"), (7, "a"), (8, "a b")]):
        flat["annotations"].append({"id": number, "image_id": image, "caption": caption})
    (tmp_path / "captions.json").write_text(json.dumps(flat))
    overrides = [*SMALL, "model.context_dim=16", "model.context_tokens=8"]
    command = [
        "extract",
        "--config",
        "configs/s2_coco.yaml",
        "--images",
        str(photos),
        "--vae",
        vae,
        "--clip",
        clip,
    ]
    command += ["--out", str(tmp_path / "out"), "--captions", str(tmp_path / "captions.json"), "--shard", "2"]
    assert main([*command, *sets(*overrides, "device=cpu")]) == 0
    assert "read 4 = written 3 + rejected 1" in capsys.readouterr().out  # image 9 has no caption
    dataset = build_dataset(load_config("configs/s2_coco.yaml", [*overrides, f"data.path={tmp_path / 'out'}"]))
    assert len(dataset) == 3 and dataset.captions.tolist() == [0, 1, 3, 5]  # in the order of the ids: 7, 8, 10

    from uvit_fast.data.encoders import load_text_encoder

    encode = load_text_encoder(clip, "cpu")
    stored = torch.from_numpy(dataset.text.all()).float()
    torch.testing.assert_close(stored, encode(["a", "b", "a b", "a b", "b a a"]), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(dataset.null_context, encode([""])[0], rtol=2e-3, atol=2e-3)
    assert not torch.allclose(stored[0], stored[1], atol=1e-2)

    command = ["--config", str(ROOT / "configs" / "s2_coco.yaml"), "--run-dir", str(tmp_path / "run")]
    overrides += [f"data.path={tmp_path / 'out'}", "train.log_every=1", f"latent.decoder={vae}", "device=cpu"]
    code, lines = tiny.launch(call, [*command, *sets(*overrides, "train.sample_every=3", "sample.prompts=[a b, b]")])
    assert code == 0, lines
    preview = np.asarray(Image.open(tmp_path / "run" / "samples" / "step_00000003.png"))
    assert (preview[4 + 64 : 4 + 64 + 14] < 128).any()  # the prompt below each sample
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and np.isfinite([row["loss"] for row in rows]).all()

    # the run remembers its text encoder, and knows another one of the same shapes
    command = ["sample", "--checkpoint", str(tmp_path / "run"), "--num", "2", "--steps", "1"]
    assert main([*command, "--out", str(tmp_path / "samples")]) == 0
    assert (tmp_path / "samples" / "prompts.txt").read_text() == "a b\nb\n"
    other = save_clip(tmp_path / "other", seed=2)
    assert main([*command, "--out", str(tmp_path / "no"), "--clip", other]) == 2
    assert (
        f"{other}: not the one that made the text features which the model learned from, {clip}"
        in capsys.readouterr().err
    )


def test_the_command_names_mistakes_in_one_line(photos, vae, tmp_path, capsys):
    def refused(*argv):
        assert main(list(argv)) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    out = ["--out", str(tmp_path / "out")]
    assert "works on pixels" in refused("extract", "--config", "configs/digits.yaml", "--images", str(photos), *out)
    assert "no captions" in refused("extract", "--config", "configs/s2_coco.yaml", "--images", str(photos), *out)
    assert "--images /nowhere: no such file or folder" in refused(
        "extract", "--config", CONFIG, "--images", "/nowhere", *out
    )
    assert "vae: no such folder; expected one, or a name on the hub" in refused(
        *arguments(photos, str(tmp_path / "no" / "vae"), tmp_path / "out")
    )
    assert "no images" in refused(*arguments(vae, vae, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
