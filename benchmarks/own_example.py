"""The report that the chapter *Your own pruned network* shows: two networks, compared as anybody's would be.

    python benchmarks/own_example.py [--record]

A ResNet-8 learns MNIST-5k; one-shot magnitude pruning takes 95 % of its weights, and it learns on. `--record` puts what
`lthlib.compare` finds into book/own-example, of which the book makes the report.
"""

from __future__ import annotations

import argparse
import copy

import lthlib
from lthlib import data, networks
from lthlib.book.labs import EXAMPLE
from lthlib.core.store import Store
from lthlib.own.words import summary
from lthlib.pruning import masks
from lthlib.training.loop import train
from lthlib.training.recipe import Recipe

RECIPE = Recipe(epochs=8, batch_size=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="put it into the book")
    options = parser.parse_args()
    store = Store()
    images = data.load("mnist5k", store)
    shape = {"in_channels": images.channels, "num_classes": len(images.classes), "image_size": images.size}
    dense = networks.build("resnet8", **shape, mean=images.mean, std=images.std, seed=0)
    train(dense, images.train, RECIPE, seed=0)
    pruned = copy.deepcopy(dense)
    kept = lthlib.prune(pruned, "omp", sparsity=0.95)
    train(pruned, images.train, RECIPE, seed=0, masks=kept)
    assert masks.n_kept(kept) == sum(int(w.count_nonzero()) for w in masks.weights_of(pruned, kept).values())
    found = lthlib.compare(
        dense.eval(), {"95 % pruned": pruned.eval()}, "mnist5k", store=store, again="python benchmarks/own_example.py"
    )
    print(summary(found, "95 % pruned"))
    if options.record:
        EXAMPLE.mkdir(exist_ok=True)
        found.save(EXAMPLE)


if __name__ == "__main__":
    main()
