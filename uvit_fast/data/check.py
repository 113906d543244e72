"""Read a whole folder before a long run does."""

from collections import Counter
from pathlib import Path
from statistics import median

from uvit_fast.data import reading, shards
from uvit_fast.data.datasets import require_folder
from uvit_fast.data.reading import shown
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.progress import Bar

TINY = 16  # pixels of the shorter side; less than a quarter of the folder's median is tiny, too
NARROW = 4  # ratio of the sides from which a centre crop shows a quarter or less


def check_folder(path: str) -> int:
    """Print a line for each damaged shard of latents, or each unreadable or unusual image; return how many cannot be
    used.

    For images, also print their classes with counts, what is ignored in the folder, and how many are unusual in which
    way.

    Raises:
        UserError: no such folder, or nothing in it to check.
    """
    folder = require_folder(path, "latents or images", key="data check")
    if (folder / "manifest.json").is_file():
        faults = shards.faults(folder)
        print("\n".join(faults) or f"{shown(str(folder))}: every checksum is right")
        return len(faults)
    return _check_images(folder)


def _check_images(folder: Path) -> int:
    listing = reading.list_images(folder, labelled=False)
    unusual: dict[str, list[str]] = {}
    sizes, bad = {}, Counter[str]()
    for name in Bar(listing.files, what="check", unit="images"):
        try:
            image, oddities = reading.read_image(folder / name)
        except reading.BadImage as error:
            bad[name.split("/")[0]] += 1
            print(f"{shown(str(folder / name))}: {error}")
            continue
        sizes[name] = image.size
        if oddities:
            unusual[name] = oddities
            print(f"{shown(str(folder / name))}: {', '.join(oddities)}; read as upright RGB")
    usual_side = median(map(min, sizes.values())) if sizes else 0
    for name, (width, height) in sizes.items():
        short, long = sorted((width, height))
        kinds = ["tiny"] if short < max(TINY, usual_side / 4) else []
        if kinds := kinds + (["extreme shape"] if long >= NARROW * short else []):
            unusual.setdefault(name, []).extend(kinds)
            print(f"{shown(str(folder / name))}: {', '.join(kinds)}, {width} x {height} pixels")
    if all("/" in name for name in listing.files):
        listing = _print_classes(folder, bad) or listing
    for note in listing.notes:
        print(note)
    unreadable = bad.total()
    print(
        f"{shown(str(folder))}: {len(listing.files)} images, {unreadable} unreadable, {len(unusual)} unusual"
        + _counted(Counter(kind.split(" (")[0] for kinds in unusual.values() for kind in kinds))
    )
    return unreadable


def _print_classes(folder: Path, bad: Counter) -> reading.Listing | None:
    """Return the listing with one folder per class; None where that is impossible, and print why."""
    try:
        listing = reading.list_images(folder, labelled=True)
    except UserError as error:
        print(f"no classes: {error}")
        return None
    count = len(listing.classes)
    folders = f"{count} folder{'s' * (count != 1)}, as classes"
    print(f"{folders}: model.num_classes={count}, or {count + 1} with train.p_uncond, for its null label")
    print(f"{'label':>6}{'images':>9}{'unreadable':>12}  class")
    for label, (name, images) in enumerate(listing.counts.items()):
        print(f"{label:6}{images:9}{bad[name]:12}  {shown(name)}")
    return listing


def _counted(kinds: Counter) -> str:
    return f" ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})" if kinds else ""
