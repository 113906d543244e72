"""What the labels, latents and text features of a model mean: the names of its classes, and the encoders that made its
data.

The dataset provides it, the run keeps it in data.json and in each checkpoint's manifest, a pipeline in its
model_index.json, and sampling reads it beside the weights. Older runs and data go without: whatever is unknown agrees
with everything.
"""

import difflib
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import write_whole
from uvit_fast.runtime.text import printable

RUN_FILE = "data.json"  # in the folder of a run; beside x.pth: x.data.json


Identities = Mapping[str, dict[str, str] | None]  # by role, "vae" and "text_encoder", from `data.encoders`


class Factors(Protocol):
    """The scaling of latents."""

    def as_json(self) -> dict[str, float | list[float]]: ...


class Described(Protocol):
    """A dataset's own account of what its values mean: the labels' names, the encoders of latents and text features,
    the scaling of latents; empty or None if unknown.
    """

    classes: tuple[str, ...]

    @property
    def encoders(self) -> Identities: ...

    @property
    def scaling(self) -> Factors | None: ...


@dataclass(frozen=True)
class Provenance:
    """What a model learned from.

    Attributes:
        classes: names by label; empty if the model has no classes or their names are unknown.
        encoders: identities by role, "vae" and "text_encoder", from `data.encoders`; only the known ones.
        scaling: of latents, `scale_factor` and `shift_factor`, each a number or a list with one per channel; empty if
            unknown.
        diffusion: "schedule" and "prediction" of the network, named as in a config's `diffusion`; empty if unknown.
    """

    classes: tuple[str, ...] = ()
    encoders: dict[str, dict[str, str]] = field(default_factory=dict)
    scaling: dict[str, float | list[float]] = field(default_factory=dict)
    diffusion: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Described, labelled: bool = True, diffusion: dict[str, str] | None = None) -> "Provenance":
        """Return a dataset's; without its classes for a model that takes none."""
        encoders = {role: who for role, who in dataset.encoders.items() if who}
        scaling = dataset.scaling.as_json() if dataset.scaling else {}
        return cls(dataset.classes if labelled else (), encoders, scaling, diffusion or {})

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Provenance":
        """Read what `as_json` returned, or a part of it.

        Raises:
            TypeError, ValueError: it is something else.
        """
        classes, encoders, scaling = value.get("classes", []), value.get("encoders", {}), value.get("scaling", {})
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError("classes: expected a list of names")
        if not all(isinstance(part, str) for who in encoders.values() for item in who.items() for part in item):
            raise TypeError("encoders: expected texts")
        numbers = [n for part in scaling.values() for n in (part if isinstance(part, list) else [part])]
        if not all(type(n) in (int, float) for n in numbers):
            raise TypeError("scaling: expected numbers")
        diffusion = value.get("diffusion", {})
        if not all(isinstance(part, str) for item in diffusion.items() for part in item):
            raise TypeError("diffusion: expected texts")
        return cls(tuple(classes), encoders, scaling, diffusion)

    def as_json(self) -> dict[str, Any]:
        return {
            "classes": list(self.classes),
            "encoders": self.encoders,
            "scaling": self.scaling,
            "diffusion": self.diffusion,
        }

    def write(self, file: Path) -> None:
        write_whole(file, lambda path: path.write_text(json.dumps(self.as_json(), indent=1), "utf-8"))

    def joined(self, other: "Provenance") -> "Provenance":
        """Return this, completed from the other where unknown."""
        return Provenance(
            self.classes or other.classes,
            {**other.encoders, **self.encoders},
            self.scaling or other.scaling,
            self.diffusion or other.diffusion,
        )

    def difference(self, now: "Provenance") -> str | None:
        """Return how `now` contradicts this, in words, or None."""
        if self.classes and now.classes and self.classes != now.classes:
            return classes_difference(self.classes, now.classes)
        for role in self.encoders.keys() & now.encoders.keys():
            if not same_encoder(before := self.encoders[role], after := now.encoders[role]):
                return f"another {ROLES[role]}: {describe_encoder(before)}, now {describe_encoder(after)}"
        if self.scaling and now.scaling and self.scaling != now.scaling:
            return f"another scaling of latents: {_in_short(self.scaling)}, now {_in_short(now.scaling)}"
        return None

    def name(self, label: int) -> str:
        """Return the name of a label, or its number if unknown."""
        return self.classes[label] if label < len(self.classes) else str(label)

    def label(self, name: str) -> int:
        """Return the label of a class's name, however its accents are encoded.

        Raises:
            UserError: no class has that name.
        """
        if (found := self._find(name)) is not None:
            return found
        if not self.classes:
            raise UserError(f"classes: expected whole numbers, such as 207,360, since no names are known, got {name!r}")
        near = difflib.get_close_matches(name, self.classes, n=1)
        some = f"did you mean {shown(near)}?" if near else f"expected whole numbers, or names: {shown(self.classes, 5)}"
        raise UserError(f"classes: none is called {name!r}; {some}")

    def labels(self, text: str, count: int) -> list[int]:
        """Return the labels that a text names: names and numbers with commas, as "ant,bee" or "0,7"; names may contain
        commas themselves.

        If a number is also the name of another label, "label:7" and "name:7" say which is meant.

        Raises:
            UserError: no such class, or an ambiguous number. A number beyond `count` is left to `check_labels`.
        """
        parts, labels, first = text.split(","), [], 0
        while first < len(parts):
            # the longest piece that is a name, else the next part alone
            ends = range(len(parts), first + 1, -1)
            last = next((end for end in ends if self._find(",".join(parts[first:end])) is not None), first + 1)
            labels.append(self._meant(",".join(parts[first:last]).strip(), count))
            first = last
        return labels

    def _find(self, name: str) -> int | None:
        if name in self.classes:  # two may differ only by how their accents are encoded
            return self.classes.index(name)
        wanted = _folded(name)
        return next((label for label, each in enumerate(self.classes) if _folded(each) == wanted), None)

    def _meant(self, text: str, count: int) -> int:
        named = self._find(text)
        how, _, rest = text.partition(":")
        if named is None and how == "name" and rest:
            return self.label(rest)
        number = rest if named is None and how == "label" else text
        if not re.fullmatch(r"[+-]?[0-9]+", number):
            return self.label(text)
        if named is None or named == int(number) or (number == text and not 0 <= int(number) < count):
            return int(number) if named is None else named
        raise UserError(
            f"classes: {text} is label {text}, {self.name(int(text))}, and the name of label {named}; "
            f"expected label:{text} or name:{text}"
        )


UNKNOWN = Provenance()
ROLES = {"vae": "autoencoder", "text_encoder": "text encoder"}


def read(weights: Path) -> Provenance:
    """Read what is stored beside a weight file: in its checkpoint's manifest, its run's or its own data.json, or its
    pipeline's index.

    Warn if one of these is damaged.
    """
    folder = weights.parent
    for file, of in (
        (weights.with_name(f"{weights.stem}.{RUN_FILE}"), lambda tree: tree),
        (folder / "manifest.json", lambda tree: tree.get("data")),
        (_above(weights, "best") / RUN_FILE, lambda tree: tree),
        (_above(weights, "checkpoints") / RUN_FILE, lambda tree: tree),
        (_above(weights, "model") / "model_index.json", _of_pipeline),
    ):
        if not file.is_file():
            continue
        try:
            if (found := of(json.loads(file.read_text("utf-8")))) is not None:
                return Provenance.from_json(found)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            warnings.warn(
                f"{file}: damaged ({error}); the names of the classes that it held are not known", stacklevel=3
            )
    return UNKNOWN


def _above(file: Path, name: str) -> Path:
    """Return the folder that holds the folder `name` in which a file lies; one that does not exist if there is none."""
    return next((folder.parent for folder in list(file.parents)[:2] if folder.name == name), file / "nowhere")


def _of_pipeline(tree: dict[str, Any]) -> dict[str, Any]:
    names = tree.get("id2label") or {}
    latent = (tree.get("vae") or [None])[0] is not None
    scaling = {"scale_factor": tree["scale_factor"], "shift_factor": tree.get("shift_factor", 0.0)} if latent else {}
    classes = [names[str(label)] for label in range(len(names))]
    diffusion = {key: tree[key] for key in ("schedule", "prediction") if tree.get(key)}
    return {"classes": classes, "encoders": tree.get("encoders") or {}, "scaling": scaling, "diffusion": diffusion}


def classes_difference(before: Iterable[str], now: Iterable[str]) -> str:
    """Describe how one list of classes differs from another, with a label whose meaning would change."""
    before, now = list(before), list(now)
    added, removed = [n for n in now if n not in set(before)], [n for n in before if n not in set(now)]
    said = [f"{len(before)} classes, now {len(now)}"] if len(before) != len(now) else []
    said += [f"removed {shown(removed, 5)}"] if removed else []
    said += [f"added {shown(added, 5)}"] if added else []
    moved = next((i for i, (a, b) in enumerate(zip(before, now)) if a != b), None)
    said += [] if moved is None else [f"label {moved} was {shown([before[moved]])}, now {shown([now[moved]])}"]
    return "; ".join(said)


def same_encoder(a: dict[str, str], b: dict[str, str]) -> bool:
    """Return whether two identities may be of one encoder: the checksums that both have agree, or there are none."""
    known = [key for key in a.keys() & b.keys() if key.endswith("sha256")]
    return not known or any(a[key] == b[key] for key in known)


def _in_short(scaling: dict[str, float | list[float]]) -> str:
    return ", ".join(
        f"{name} {shown([f'{n:g}' for n in value], 3)}" if isinstance(value, list) else f"{name} {value:g}"
        for name, value in scaling.items()
    )


def describe_encoder(who: dict[str, str]) -> str:
    checksum = next((value for key, value in who.items() if key.endswith("sha256")), "")
    return f"{who.get('name', 'unnamed')} ({checksum[:8]})"


def shown(names: Iterable[str], most: int = 10, kind: str = "in all") -> str:
    """Return names on one line, printable whatever a folder's name holds; of many, the first ones."""
    names = list(names)
    return ", ".join(map(printable, names[:most])) + (f", ... {len(names)} {kind}" if len(names) > most else "")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()
