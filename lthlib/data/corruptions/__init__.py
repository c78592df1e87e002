"""The 15 common corruptions of Hendrycks & Dietterich (2019) and their 4 extra ones, batched, seeded and exact.

Images are uint8 arrays of shape (N, H, W, C) with C = 1 (gray) or 3 (RGB); so are the results. `corrupt` makes one set
or a part of one. Where the published CIFAR-10-C, CIFAR-100-C and ImageNet-C files exist, these should be used: the
authors ask for it, since library and JPEG versions change pixels. `lthlib.data.corrupted` reads them.

Which constants. ``"cifar"`` is the table of CIFAR-10-C (32 pixels), ``"imagenet"`` that of ImageNet-C (224 pixels).
Lengths (blur widths, shuffle distances) are pixels and are used as they are at any size; only the elastic transform,
whose published constants are fractions of the image side, scales with the shorter side.

Rounding. The published scripts truncate to bytes; so does this package, after adding a ten-thousandth of a grey level,
so that a value that is an integer in exact arithmetic does not lose a level to rounding noise.

Where it knowingly differs from the published sets: the frost photographs are replaced by synthetic textures with their
means and standard deviations; motion is ImageMagick's formula, computed without ImageMagick; random numbers are other
numbers of the same distribution.
"""

# ruff: noqa: F401, I001 (the order of the groups is that of the registry)
from lthlib.data.corruptions import noise, blur, weather, digital, extra
from lthlib.data.corruptions.registry import (
    CORRUPTIONS,
    GROUPS,
    SEVERITIES,
    Corruption,
    Draws,
    common,
    corrupt,
    corruption,
    default_constants,
)
