"""One-shot magnitude pruning (OMP): train the dense network, keep its largest weights, retrain once.

Score: |w| of the trained network, ranked over all layers together. Taylor's expansion explains the choice
where all weights matter alike: removing w changes the loss by g w + h w^2 / 2, at a minimum g = 0, and with
one h for all the change is proportional to w^2. That h differs between layers is the method's weakness: a
layer behind a batch normalisation may be scaled by any c without changing the function, and yet loses or
keeps its weights by c.

Only ranks matter: one positive factor for the whole network changes nothing. The paper does not say how it
retrains; here the ticket starts from the shared rewind point, as that of LTH does, so that the two differ in
the mask alone.
"""

from torch import nn

from lthlib.pruning import Found, Moment, method
from lthlib.pruning import masks as masking
from lthlib.pruning.masks import Masks


def largest(model: nn.Module, n_keep: int) -> Masks:
    """Return the masks that keep the ``n_keep`` largest weights of a network."""
    scores = {name: weight.detach().abs() for name, weight in masking.prunable(model).items()}
    return masking.keep_top(scores, n_keep)


@method("omp", title="OMP", source="dense", start="rewind", reference="han2015learning", family="magnitude", paper=True)
def find(moment: Moment) -> Found:
    """Keep the largest weights of the trained dense network."""
    return Found(largest(moment.model, moment.n_keep))
