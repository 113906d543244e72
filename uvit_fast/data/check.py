"""Read a whole folder before a long run does."""

from tqdm import tqdm

from uvit_fast.data import reading, shards
from uvit_fast.data.datasets import require_folder


def check_folder(path: str) -> int:
    """Print a line for each damaged shard of latents, or each unreadable or unusual image; how many cannot be used.

    Raises:
        UserError: no such folder, or nothing in it that could be checked.
    """
    folder = require_folder(path, "latents or images", key="data check")
    if (folder / "manifest.json").is_file():
        faults = shards.faults(folder)
        print("\n".join(faults) or f"{folder}: every checksum is right")
        return len(faults)
    files, unreadable, unusual = reading.list_images(folder, labelled=False).files, 0, 0
    for name in tqdm(files, unit="image", desc="check"):
        try:
            _, oddities = reading.read_image(folder / name)
        except reading.BadImage as error:
            unreadable += 1
            print(f"{folder / name}: {error}")
        else:
            if oddities:
                unusual += 1
                print(f"{folder / name}: {', '.join(oddities)}; read as upright RGB")
    print(f"{folder}: {len(files)} images, {unreadable} unreadable, {unusual} unusual")
    return unreadable
