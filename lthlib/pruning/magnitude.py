"""One-shot magnitude pruning (OMP): train the dense network, keep its largest weights, retrain once.

Score: ``|w|`` of the trained network, ranked over all layers together. Taylor's expansion explains the choice where all
weights matter alike: removing w changes the loss by g w + h w^2 / 2, at a minimum g = 0, and with one h for all the
change is proportional to w^2. That h differs between layers is the method's weakness: a layer behind a batch
normalisation may be scaled by any c without changing the function, and yet loses or keeps its weights by c.

The paper does not say how it retrains; here the ticket starts from the shared rewind point, as that of LTH does, so
that the two differ in the mask alone.
"""

from torch import Tensor

from lthlib.pruning.registry import Found, Moment, method


def magnitudes(moment: Moment) -> dict[str, Tensor]:
    """Return ``|w|`` of every prunable weight."""
    return {name: weight.detach().abs() for name, weight in moment.weights.items()}


@method("omp", title="OMP", source="dense", start="rewind", reference="han2015learning", family="magnitude", paper=True)
def omp(moment: Moment) -> Found:
    """Keep the largest weights of the trained dense network."""
    return Found(magnitudes(moment))
