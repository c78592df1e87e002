"""Named data sets, as uint8 pixels in memory or read on demand, and out-of-distribution sets.

``load("mnist5k")`` gives the embedded set, ``load("cifar10")`` and the like come through torchvision, and any other
name is a folder or zip of class-named image folders in ``$LTHLIB_DATA`` (default ``data``): ``<name>/train/<class>/*``
and ``<name>/test/<class>/*`` (``val`` will do for ``test``), or ``<name>/<class>/*``, split 80/20 by class. Test images
that lie together in one folder need a list of their classes (`lthlib.data.listing`). Images of many sizes need a size
in the name: ``imagenet@224`` scales the shorter side to 8/7 of 224 and takes the central square.
"""

# ruff: noqa: F401
from lthlib.data import builtin  # registers what has a name of its own
from lthlib.data.files import data_folder
from lthlib.data.images import Images, OnDemand, Pixels, stratified
from lthlib.data.ood import OOD, check_ood, ood_classes, ood_images, ood_set, ood_version
from lthlib.data.sets import DATASETS, DataSet, Source, check_name, dataset, load, source, title_of
