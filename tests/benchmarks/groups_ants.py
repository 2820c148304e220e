"""ANTs' ``build_template`` of a folder, judged as ``groups.py`` judges: time, sharpness, Dice of all pairs.

    python tests/benchmarks/groups_ants.py DATA

Images are scaled to [0, 1] first. Each is registered (SyN) to the last template once more, as its transforms are not
kept; labels are carried by nearest neighbour, once, to the fixed image's own grid. ANTs sharpens its template: the
sharpness of the plain mean of the warped images is told too. Seconds are the processor's, of all threads.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import ants
import numpy as np
from groups import interval

from regpipe.group.means import sharpness
from regpipe.group.subjects import list_subjects
from regpipe.io.images import normalise, read_image
from regpipe.io.labels import read_label
from regpipe.metrics.measures import dice, mean_of, shared_labels
from regpipe.transforms.displacement import write_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    subjects = list_subjects(chosen.data)
    labels = [read_label(str(one.label))[0] for one in subjects]
    scaled, maps = [], []
    with tempfile.TemporaryDirectory() as aside:
        for one, label in zip(subjects, labels, strict=True):
            image, path = read_image(one.image), Path(aside) / "one.nii.gz"
            write_image(path, normalise(image.array), image.affine)
            scaled.append(ants.image_read(str(path)))
            write_image(path, label.array.astype(np.float32), label.affine)
            maps.append(ants.image_read(str(path)))
    begun = time.process_time()
    template = ants.build_template(image_list=scaled, iterations=chosen.rounds, type_of_transform="SyN")
    built = time.process_time() - begun
    ways = [ants.registration(template, image, "SyN") for image in scaled]
    print(f"{built:.0f} s of processor, {time.process_time() - begun:.0f} s with all transforms")
    mean = np.mean([way["warpedmovout"].numpy() for way in ways], axis=0)
    told = [sharpness(image, template.spacing) for image in (template.numpy(), mean)]
    print("sharpness {:.4f}, of the plain mean {:.4f}".format(*told), flush=True)
    found = []
    for i, j in itertools.permutations(range(len(subjects)), 2):  # fixed, moving
        chain = ways[i]["invtransforms"] + ways[j]["fwdtransforms"]
        inverted = [path.endswith(".mat") for path in ways[i]["invtransforms"]] + [False] * len(
            ways[j]["fwdtransforms"]
        )
        nearest = ants.apply_transforms(scaled[i], maps[j], chain, "nearestNeighbor", whichtoinvert=inverted)
        carried = nearest.numpy().round().astype(int)
        true = labels[i].array
        found.append(mean_of(dice(true, carried, shared_labels(true, labels[j].array)).values()))
    print(f"Dice of all {len(found)} pairs: {interval(found)}")


if __name__ == "__main__":
    main()
