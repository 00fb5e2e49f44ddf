"""Says what is wrong with a tree of renders in Zero-1-to-3's layout, and lists the sound objects.

    python -m tools.check --data data/shapes
    python -m tools.check --data DIR --list sound.json     # also where DIR has its valid_paths.json

Every image and pose is read. Defects are counted by kind, with the first paths at fault. What is
only odd is noted: poses that look like camera-to-world, images without alpha, and the like. The
exit code is 1 if there are defects. An object is sound if it has two sound views or more, and every
view of it that has an image and a pose is readable.
"""

import argparse
import json
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import DataLoader

import data
from lib.cli import (
    ArgumentParser,
    InputError,
    default_workers,
    nonnegative_int,
    progress,
    run_script,
)
from lib.files import write_atomically
from lib.images import IMAGE_EXTENSIONS, open_image

Finding = tuple[str, str, str]  # "defect" or "note", what it is, the path


class Report(NamedTuple):
    """What was found about one object."""

    findings: list[Finding]
    sound_views: int
    sound: bool


def check_image(path: Path) -> list[str]:
    """What is odd about an image. Raises InputError where it can't be read."""
    image = open_image(path)
    lowest, highest = image.convert("RGBA").getchannel("A").getextrema()
    notes = []
    if lowest == 255:
        notes.append("image without alpha")
    if highest == 0:
        notes.append("nothing visible in image")
    if image.width != image.height:
        notes.append("image not square")
    return notes


def check_file(path: Path, look) -> list[Finding]:
    """The findings of look(path), which returns notes or raises InputError."""
    try:
        return [("note", note, str(path)) for note in look(path)]
    except InputError as error:
        kind = str(error).removeprefix(f"{path}: ").split(" (")[0]
        return [("defect", kind, str(path))]


def check_object(root: Path, name: str) -> Report:
    folder = Path(root, name)
    try:
        images = data.indexed(folder, IMAGE_EXTENSIONS)
        poses = data.indexed(folder, (".npy",))
    except OSError:
        return Report([("defect", "missing folder", str(folder))], 0, False)
    findings = []
    for index, path in images.items():
        if index not in poses:
            findings.append(("defect", "missing pose", str(path)))
    for index, path in poses.items():
        if index not in images:
            findings.append(("defect", "missing image", str(path)))
    complete = sorted(images.keys() & poses.keys())
    sound_views = 0
    for index in complete:
        of_view = check_file(images[index], check_image)
        of_view += check_file(poses[index], lambda path: data.check_pose(data.read_pose(path)))
        findings += of_view
        if not any(severity == "defect" for severity, _, _ in of_view):
            sound_views += 1
    if sound_views < 2:
        findings.append(("defect", "fewer than two sound views", str(folder)))
    return Report(findings, sound_views, 2 <= sound_views == len(complete))


def check(root: Path, workers: int) -> tuple[int, list[str]]:
    """Prints what is wrong with a tree. Returns the number of defects, and the sound objects."""
    names = data.list_objects(root)
    # The DataLoader serves as an ordered parallel map: collate_fn runs in its workers.
    reports = DataLoader(
        names, batch_size=None, collate_fn=partial(check_object, root), num_workers=workers
    )
    bar = progress(reports, desc="check", unit="object", total=len(names))
    counts = Counter()  # by (severity, kind)
    examples = defaultdict(list)
    sound = []
    views = 0
    for name, report in zip(names, bar, strict=True):
        views += report.sound_views
        if report.sound:
            sound.append(name)
        for severity, kind, path in report.findings:
            counts[severity, kind] += 1
            if len(examples[severity, kind]) < 3:
                examples[severity, kind].append(path)

    print(f"{root}: {len(names)} objects, {len(sound)} of them sound; {views} sound views")
    for severity, kind in sorted(counts, key=lambda found: (found[0], -counts[found])):
        count = counts[severity, kind]
        paths = ", ".join(examples[severity, kind])
        more = ", ..." if count > 3 else ""
        print(f"{severity}: {kind}: {count} ({paths}{more})")
    defects = sum(count for (severity, _), count in counts.items() if severity == "defect")
    return defects, sound


def write_list(root: Path, names: list[str]) -> None:
    """ROOT/valid_paths.json, whole or not at all. Raises InputError naming it."""
    write_names(root / "valid_paths.json", names)


def write_names(path: Path, names: list[str]) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(names)))


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The flag --workers, of what reads or renders a tree."""
    parser.add_argument(
        "--workers",
        type=nonnegative_int,
        default=default_workers(16),
        help="processes; 0: this one only",
    )


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="the tree, in Zero-1-to-3's layout"
    )
    parser.add_argument(
        "--list",
        type=Path,
        help="where to write the names of the sound objects, as a valid_paths.json; without this "
        "flag it is DIR/valid_paths.json, where there is none",
    )
    add_workers(parser)
    args = parser.parse_args()

    if args.list and Path(args.list).exists() and Path(args.list).suffix != ".json":
        raise InputError(f"--list {args.list}: exists, and is no .json that could be overwritten")
    had_list = (args.data / "valid_paths.json").exists()
    defects, sound = check(args.data, args.workers)
    if args.list:
        write_names(args.list, sound)
        print(f"wrote {args.list} with {len(sound)} objects")
    elif sound and not had_list:
        try:
            write_list(args.data, sound)
            print(f"wrote valid_paths.json with {len(sound)} objects")
        except InputError as error:  # a tree that may only be read
            print(f"note: {error}")
    raise SystemExit(int(defects > 0))


if __name__ == "__main__":
    run_script(main)
