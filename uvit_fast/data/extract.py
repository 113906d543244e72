"""From images to latents and text features: packed shards that training reads.

Shard s covers a fixed range of the images, so its content does not depend on who makes it, or when: processes started
by torchrun (RANK, WORLD_SIZE) share the shards without communicating, and an interrupted extraction continues with the
missing ones. Each finished shard has a note, `notes/00000.json`, written after its data; the process that finds all
notes writes the manifest.
"""

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uvit_fast.data import shards
from uvit_fast.data.autoencoders import Pixels, Scaling, measured
from uvit_fast.data.reading import WHITE, BadImage, Listing, read_image, shown
from uvit_fast.provenance import classes_difference
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.processes import World
from uvit_fast.runtime.progress import Bar

NO_CAPTION = "no caption"


@dataclass(frozen=True)
class Policy:
    """How to treat images that are damaged or unusual.

    Attributes:
        unreadable: skip (rejected, in the report) or refuse (end).
        unusual: convert (accepted, in the report), skip or refuse those that read_image has to convert.
    """

    unreadable: str = "skip"
    unusual: str = "convert"


@dataclass(frozen=True)
class Text:
    """Captions to encode with the images.

    Attributes:
        captions: of each image of the listing, in order. encode: captions -> (len, T, C) features.
        identity: of the text encoder, for the manifest.
    """

    captions: list[list[str]]
    encode: Callable[[list[str]], Tensor]
    identity: dict[str, str]


class Extraction:
    """One extraction into the folder `out`.

    Args:
        listing: the images. crop: (image, size) -> image of size x size pixels. background: behind transparent pixels,
            8-bit RGB.
        encode: pixels (B, 3, size, size) uint8 -> posteriors (B, 2C, h, w), mean and log variance; or, if `kind` is
            "latents", (B, C, h, w).
        vae: the autoencoder's identity. scaling: of the latents, recorded but not applied; None: from the measured
            channels.
        mirror: also store each image's mirror image. dtype: of what is stored.
        shard_images, batch, workers: images per shard, images per batch, decoding threads.
    """

    def __init__(
        self,
        listing: Listing,
        out: Path,
        encode: Callable[[Pixels], Tensor],
        *,
        crop: Callable[[Image.Image, int], Image.Image],
        size: int,
        background: tuple[int, int, int] = WHITE,
        scaling: Scaling | None,
        vae: dict[str, str],
        mirror: bool,
        kind: str = "moments",
        text: Text | None = None,
        policy: Policy = Policy(),  # noqa: B008 (frozen)
        dtype: str = "float16",
        shard_images: int = 4096,
        batch: int = 32,
        workers: int = 2,
    ):
        assert not (mirror and text), "captions do not describe mirror images"
        self.listing, self.out, self.encode, self.crop, self.size = listing, out, encode, crop, size
        self.background = background
        self.mirror, self.text, self.policy, self.dtype = mirror, text, policy, np.dtype(dtype)
        self.scaling, self.kind = scaling, kind
        self.shard_images, self.batch, self.workers = shard_images, batch, workers
        self.world = World()
        self.about: dict[str, Any] = {
            "vae": vae,
            "text_encoder": text.identity if text else None,
            "image_size": size,
            "crop": crop.__name__,
            "background": list(background),
            "mirror_images": mirror,
            "classes": listing.classes,
        }
        self.parts = [
            range(i, min(i + shard_images, len(listing.files))) for i in range(0, len(listing.files), shard_images)
        ]

    def run(self) -> dict[str, Any] | None:
        """Make this rank's missing shards. The rank that completes the folder gets the report, others None.

        Raises:
            UserError: `out` holds an extraction of other images or with other settings, the disk is full, or the policy
                refuses an image. Finished shards stay.
        """
        mine = range(self.world.rank, len(self.parts), self.world.size)
        total = sum(len(self.parts[shard]) for shard in mine)
        try:
            self._agree()
            missing = [shard for shard in mine if not self._is_intact(shard)]
            left = sum(len(self.parts[shard]) for shard in missing)
            with (
                ThreadPoolExecutor(max(1, self.workers)) as pool,
                Bar(what="extract", unit="images", total=total, done=total - left, quiet=self.world.rank > 0) as bar,
            ):
                for shard in missing:
                    self._make(shard, pool, bar)
            if all(self._note(shard).is_file() for shard in range(len(self.parts))):
                return self._finish()
            return None
        except OSError as error:
            if not shards.is_full(error):
                where = shown(str(error.filename or self.out))
                raise UserError(
                    f"{where}: cannot be written ({error.strerror or error}); expected --out to allow it"
                ) from None
            done = sum(len(self.parts[shard]) for shard in mine if self._note(shard).is_file())
            raise UserError(
                f"{self.out}: the disk is full; the shards of {done} of {total} images are complete and stay: "
                "free some space and run the same command again"
            ) from None

    def _agree(self) -> None:
        """Create the folder, or check that the existing one belongs to this extraction."""
        names = "".join(f"{name}\n" for name in self.listing.classes)
        names += "".join(f"{name}\0{_size(self.listing.folder / name)}\n" for name in self.listing.files)
        settings = {
            "images": len(self.listing.files),
            "images_digest": hashlib.sha256(os.fsencode(names)).hexdigest(),
            "captions_digest": _digest(self.text.captions) if self.text else None,
            "vae_encoder": self.about["vae"]["encoder_sha256"],
            "text_encoder": self.text.identity["sha256"] if self.text else None,
            **{name: self.about[name] for name in ("image_size", "crop", "background", "mirror_images")},
            "dtype": str(self.dtype),
            "shard_images": self.shard_images,
        }
        file = self.out / "notes" / "settings.json"
        if file.is_file():
            before = json.loads(file.read_text())
            classes = before.get("classes", self.listing.classes)  # older extractions recorded none
            if classes != self.listing.classes:
                difference = classes_difference(classes, self.listing.classes)
                raise UserError(
                    f"{self.out}: holds an extraction of other classes: {difference}; expected a new folder"
                )
            for name, value in settings.items():
                if before.get(name) != value:
                    raise UserError(
                        f"{self.out}: holds an extraction with {name} {before.get(name)!r}, got {value!r}; "
                        "expected the same settings, or a new folder"
                    )
            return
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / "notes").is_dir():
            raise UserError(f"{self.out}: expected a new or empty folder, or one of an interrupted extraction")
        file.parent.mkdir(parents=True, exist_ok=True)
        shards.write_json(file, {**settings, "classes": self.listing.classes})

    def _note(self, shard: int) -> Path:
        return self.out / "notes" / f"{shard:05d}.json"

    def _is_intact(self, shard: int) -> bool:
        """Return whether a shard is there with the right checksum; name a damaged one, which will be made again."""
        if not self._note(shard).is_file():
            return False
        written = json.loads(self._note(shard).read_text())["arrays"].values()
        damaged = [fault for entry in written if (fault := shards.shard_fault(self.out, entry))]
        for fault in damaged:
            Bar.write(f"{fault}; extracted again")
        if damaged:
            self._note(shard).unlink()
        return not damaged

    def _make(self, shard: int, pool: ThreadPoolExecutor, bar: Bar) -> None:
        encoded, text, labels, captions = [], [], [], []
        rejected: list[list[str]] = []
        unusual: list[list[str]] = []
        for batch in self._batches(self.parts[shard], pool):
            bar.update(len(batch))
            kept = []
            for index, (pixels, oddities, reason) in batch:
                name = self.listing.files[index]
                if oddities:
                    unusual.append([name, ", ".join(oddities)])
                if pixels is None:
                    rejected.append([name, reason])
                else:
                    kept.append((index, pixels))
            if not kept:
                continue
            encoded.append(self._encode(torch.stack([pixels for _, pixels in kept])))
            for index, _ in kept:
                if self.listing.labels is not None:
                    labels += [self.listing.labels[index]] * (2 if self.mirror else 1)
                if self.text:
                    captions.append(len(self.text.captions[index]))
                    text.append(self.text.encode(self.text.captions[index]).cpu().numpy().astype(self.dtype))
        arrays = {self.kind: encoded, "text": text}
        written = {
            name: {
                **shards.write_shard(self.out, f"{name}-{shard:05d}.npy", np.concatenate(parts)),
                "item": parts[0].shape[1:],
            }
            for name, parts in arrays.items()
            if parts
        }
        note = {
            "read": len(self.parts[shard]),
            "written": len(self.parts[shard]) - len(rejected),
            "rejected": rejected,
            "unusual": unusual,
            "labels": labels,
            "captions": captions,
            "channels": _channel_sums(encoded, self.kind),
            "arrays": written,
        }
        shards.write_json(self._note(shard), note)

    def _batches(self, part: range, pool: ThreadPoolExecutor) -> Iterator[list[tuple[int, tuple]]]:
        """Yield decoded images, a batch at a time; the next three are decoded while one is encoded."""
        ahead: deque[list[tuple[int, Future]]] = deque()
        for first in range(part.start, part.stop, self.batch):
            ahead.append([(i, pool.submit(self._read, i)) for i in range(first, min(first + self.batch, part.stop))])
            if len(ahead) > 3:
                yield [(i, job.result()) for i, job in ahead.popleft()]
        for batch in ahead:
            yield [(i, job.result()) for i, job in batch]

    def _read(self, index: int) -> tuple[Tensor | None, list[str], str]:
        """Return an image's pixels, (3, size, size) uint8, or None; what is unusual about it; why there are none."""
        if self.text and not self.text.captions[index]:
            return None, [], NO_CAPTION
        file = self.listing.folder / self.listing.files[index]
        try:
            image, oddities = read_image(file, self.background)
            pixels = np.array(self.crop(image, self.size))
        except BadImage as error:
            if self.policy.unreadable == "refuse":
                raise UserError(f"{shown(str(file))}: {error}") from None
            return None, [], str(error)
        except UserError as error:  # from the crop
            raise UserError(f"{shown(str(file))}: {error}") from None
        if oddities and self.policy.unusual == "refuse":
            raise UserError(f"{shown(str(file))}: {', '.join(oddities)}")
        if oddities and self.policy.unusual == "skip":
            return None, oddities, ", ".join(oddities)
        return torch.from_numpy(pixels).permute(2, 0, 1), oddities, ""

    def _encode(self, pixels: Pixels) -> np.ndarray:
        """Encode (B, 3, H, W) to (B or 2B, 2C or C, h, w): each image, followed by its mirror image."""
        views = torch.stack([pixels, pixels.flip(-1)], dim=1).flatten(0, 1) if self.mirror else pixels
        encoded = self.encode(views).cpu()
        if not torch.isfinite(encoded.to(getattr(torch, self.dtype.name))).all():
            what = "posteriors" if self.kind == "moments" else "latents"
            raise UserError(f"{self.out}: {what} that {self.dtype} cannot hold; expected --dtype float32")
        return encoded.numpy().astype(self.dtype)

    def _finish(self) -> dict[str, Any]:
        """Write the small arrays, the report and, last, the manifest."""
        notes = [json.loads(self._note(shard).read_text()) for shard in range(len(self.parts))]
        for name in (self.kind, "text"):  # of killed writers; nobody writes these shards any more
            for left in self.out.glob(f".{name}-*.npy.*.tmp"):
                left.unlink(missing_ok=True)
        arrays = {}
        for name in (self.kind, "text"):
            entries = [note["arrays"][name] for note in notes if name in note["arrays"]]
            if entries:
                item = tuple(entries[0]["item"])
                files = [{key: entry[key] for key in ("file", "count", "sha256")} for entry in entries]
                arrays[name] = shards.describe(files, self.dtype, item)
        small = {}
        if self.listing.labels is not None:
            small["labels"] = np.array([label for note in notes for label in note["labels"]], np.int64)
        if self.text:
            counts = [count for note in notes for count in note["captions"]]
            small["captions"] = np.cumsum([0, *counts], dtype=np.int64)
            small["null_text"] = self.text.encode([""]).cpu().numpy().astype(self.dtype)
        for name, array in small.items():
            entry = shards.write_shard(self.out, f"{name}.npy", array)
            arrays[name] = shards.describe([entry], array.dtype, array.shape[1:])
        report = self._report(notes)
        shards.write_json(self.out / "report.json", report)
        if not report["written"]:
            raise UserError(f"{self.out}: not one of {report['read']} images could be used; see report.json there")
        made = {name: report[name] for name in ("read", "written", "rejected")}
        shards.write_manifest(self.out, arrays, **self.about, **self._channels(notes), images=made)
        return report

    def _channels(self, notes: list[dict]) -> dict[str, Any]:
        """Return the channels' mean and deviation over all images, and the scaling."""
        sums = [note["channels"] for note in notes if note.get("channels")]
        whole = len(sums) == sum(bool(note["arrays"]) for note in notes)  # some may be of before channels were measured
        found: dict[str, Any] = {}
        if not whole and self.scaling is None:
            raise UserError(
                f"{self.out}: its shards are of before channels were measured; expected numbers for "
                "latent.scale_factor, or a new folder"
            )
        if sums and whole:
            count = sum(each["count"] for each in sums)
            mean, square = (
                np.sum([each[name] for each in sums], axis=0) / count for name in ("sum", "squares")
            )  # (C,)
            found = {"channel_mean": mean.tolist(), "channel_std": np.sqrt(np.maximum(square - mean**2, 0)).tolist()}
        scaling = self.scaling or measured(found["channel_mean"], found["channel_std"], str(self.out))
        return {**scaling.as_json(), **found}

    def _report(self, notes: list[dict]) -> dict[str, Any]:
        rejected = [entry for note in notes for entry in note["rejected"]]
        unusual = [entry for note in notes for entry in note["unusual"]]
        report = {
            "read": sum(note["read"] for note in notes),
            "written": sum(note["written"] for note in notes),
            "rejected": len(rejected),
            "unusual": dict(Counter(kind.split(" (")[0] for _, kinds in unusual for kind in kinds.split(", "))),
            "rejected_images": dict(rejected),
            "unusual_images": dict(unusual),
            "notes": self.listing.notes,
            "ignored_files": self.listing.ignored,
        }
        assert report["read"] == report["written"] + report["rejected"] == len(self.listing.files)
        return report


def _channel_sums(encoded: list[np.ndarray], kind: str) -> dict[str, Any] | None:
    """Return, for the latents as stored, the number of values per channel, their sum and the sum of their squares; for
    posteriors, the expected sums. None if there are no latents.
    """
    if not encoded:
        return None
    sums: Any = 0  # (C,) from the first on
    squares: Any = 0
    for values in encoded:
        values = values.astype(np.float64)  # (B, 2C or C, h, w)
        mean, logvar = np.split(values, 2, axis=1) if kind == "moments" else (values, -np.inf)
        sums += mean.sum((0, 2, 3))  # (C,)
        squares += (mean**2 + np.exp(np.clip(logvar, -np.inf, 20))).sum((0, 2, 3))
    count = sum(len(values) for values in encoded) * int(np.prod(encoded[0].shape[2:]))
    return {"count": count, "sum": sums.tolist(), "squares": squares.tolist()}


def summary(out: Path, report: dict[str, Any]) -> str:
    """Format a report in a few lines; if more than 20 images were rejected, only report.json lists their files."""
    lines = ["{}: read {read} = written {written} + rejected {rejected}".format(out, **report)]
    lines += [f"  {count} {kind}" for kind, count in report["unusual"].items()]
    lines += [f"  rejected {shown(file)}: {reason}" for file, reason in list(report["rejected_images"].items())[:20]]
    lines += [f"  {note}" for note in report["notes"]]
    return "\n".join([*lines, f"  all names: {out / 'report.json'}"])


def _size(file: Path) -> int:
    """Return a file's size, which reveals most changes at no cost; -1: a broken link, which reading will report."""
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
