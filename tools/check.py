"""What is wrong with a tree of renders, for any tree.

Every image and pose is read; defects are counted by kind with the first paths at fault, and what is only odd (poses
that look like camera-to-world, images without alpha, ...) is noted.
"""

import argparse
import json
import math
import os
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from lib.cli import HelpFormatter, InputError, require_positive, run_script
from lib.images import IMAGE_EXTENSIONS, open_image

NOTES = ("image without alpha", "nothing visible in image", "image not square", "pose looks like camera-to-world",
         "object behind camera (OpenCV axes?)", "camera does not look at the origin")  # fmt: skip
# An object is sound if it has two sound views or more, and all of its views that have image and pose are readable.


def check_pose(pose: np.ndarray, tolerance: float = 5) -> str | None:
    """The note that a rigid (3,4) deserves, if any; tolerance in degrees.

    b, the origin seen from a world-to-camera, is (0,0,-r); read as camera-to-world, -A^T b is. OpenCV's is (0,0,r).
    """
    w2c, c2w = (
        math.degrees(math.atan2(math.hypot(x, y), -z))
        for x, y, z in (pose[:, 3], -pose[:, 3] @ pose[:, :3])
    )
    return (
        None
        if w2c <= tolerance
        else NOTES[3 if c2w <= tolerance else 4 if w2c >= 180 - tolerance else 5]
    )


def check_object(root: Path, name: str) -> tuple[str, list[tuple[str, str]], int, bool]:
    """-> name, [(finding, path)], number of sound views, whether the object is sound."""

    def check_image(path):
        image = open_image(path)
        low, high = image.convert("RGBA").getchannel("A").getextrema()
        return [
            n
            for n, so in zip(
                NOTES, (low == 255, high == 0, image.width != image.height), strict=False
            )
            if so
        ]

    folder, findings, n_sound, n_bad = Path(root, name), [], 0, 0
    try:
        images, poses = data.indexed(folder, IMAGE_EXTENSIONS), data.indexed(folder, (".npy",))
    except OSError:
        return name, [("missing folder", str(folder))], 0, False
    findings += [("missing pose", path) for index, path in images.items() if index not in poses]
    findings += [("missing image", path) for index, path in poses.items() if index not in images]
    for index in sorted(images.keys() & poses.keys()):
        bad = False
        for path, test in (
            (images[index], check_image),
            (poses[index], lambda p: [check_pose(data.read_pose(p))]),
        ):
            try:
                findings += [(note, path) for note in test(path) if note]
            except InputError as error:
                findings.append((str(error).removeprefix(f"{path}: ").split(" (")[0], path))
                bad = True
        n_sound, n_bad = n_sound + (not bad), n_bad + bad
    findings += [("fewer than two sound views", folder)] if n_sound < 2 else []
    return name, [(kind, str(path)) for kind, path in findings], n_sound, n_sound >= 2 and not n_bad


def check(root: Path, workers: int) -> int:
    """Prints what is wrong with a tree; writes its valid_paths.json if it has none. Returns the number of defects."""
    names, counts, first, sound, views = (
        data.list_objects(root),
        Counter(),
        defaultdict(list),
        [],
        0,
    )
    # The DataLoader as an ordered parallel map: collate_fn runs in the workers.
    loader = DataLoader(
        names, batch_size=None, collate_fn=partial(check_object, root), num_workers=workers
    )
    for name, findings, n_sound, is_sound in tqdm(loader, desc="check", unit="object"):
        views += n_sound
        sound += [name] if is_sound else []
        for kind, path in findings:
            counts[kind] += 1
            first[kind] += [path] if len(first[kind]) < 3 else []
    print(f"{root}: {len(names)} objects, {len(sound)} of them sound; {views} sound views")
    for kind in sorted(counts, key=lambda kind: (kind in NOTES, -counts[kind])):
        title, more = "note" if kind in NOTES else "defect", ", ..." * (counts[kind] > 3)
        print(f"{title}: {kind}: {counts[kind]} ({', '.join(first[kind])}{more})")
    if not (root / "valid_paths.json").exists() and sound:
        try:
            write_list(root, sound)
            print(f"wrote valid_paths.json with {len(sound)} objects")
        except InputError as error:
            print(f"note: {error}")
    return sum(count for kind, count in counts.items() if kind not in NOTES)


def write_list(root: Path, names: list[str]):
    """ROOT/valid_paths.json, whole or not at all."""
    try:
        (root / "valid_paths.json.tmp").write_text(json.dumps(names))
        os.replace(root / "valid_paths.json.tmp", root / "valid_paths.json")
    except OSError as error:
        raise InputError(
            f"{root / 'valid_paths.json'}: cannot be written ({error.strerror})"
        ) from None


def main() -> None:
    text = "Validate a tree; exit code 1 if it has defects. Write a valid_paths.json of what is sound if it has none."
    parser = argparse.ArgumentParser(description=text, formatter_class=HelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="the tree, in Zero-1-to-3's layout"
    )
    add_workers(parser)
    args = parser.parse_args()
    require_positive(args)
    raise SystemExit(int(check(args.data, args.workers) > 0))


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, default=min(os.cpu_count(), 16), help="processes; 0: this one only"
    )


if __name__ == "__main__":
    run_script(main)
