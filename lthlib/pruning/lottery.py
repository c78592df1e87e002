"""The lottery ticket hypothesis: iterative magnitude pruning with rewinding (LTH, IMP).

Train, remove the smallest fifth of the remaining weights, set the others back to where they were at step k of the dense
run, train again; n rounds give 1 - 0.8^n (Frankle and Carbin 2019; rewinding to k > 0: Frankle et al. 2020).
Score: ``|w|`` at the end of the previous round's training, over all layers together, among the weights still kept.

Everything is rewound: weights, batch normalisation with its running statistics, the linear layer; optimizer and
schedule start again at step k. Known slips: ranking the rewound weights; a threshold that removes one too many or all
ties; letting pruned weights move, because the gradient was not masked or momentum went on.
"""

from lthlib.pruning.registry import Found, Moment, method


@method(
    "lth",
    title="LTH",
    source="previous",
    start="rewind",
    reference="frankle2019lottery",
    family="magnitude",
    paper=True,
)
def lth(moment: Moment) -> Found:
    """Keep the largest weights of the previous round's ticket, among those it kept."""
    return Found({name: weight.detach().abs() for name, weight in moment.weights.items()})
