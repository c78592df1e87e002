import dataclasses
import importlib
import itertools
import re

import pytest
import torch

from lthlib import data
from lthlib.core.errors import UserError
from lthlib.core.store import ROOT, Store
from lthlib.pruning import METHODS, masks
from lthlib.tickets.obtain import _rewind_point, new_model, obtain, training_batch
from lthlib.tickets.ticket import Ticket
from lthlib.training.recipe import Recipe


@pytest.fixture
def tiny(tiny):
    return {**tiny, "train_size": 200}


def make(tiny, method="dense", round=0, **more):
    return Ticket(method=method, round=round, **{**tiny, **more})


def equal(a, b):
    return all(torch.equal(a.model.state_dict()[k], b.model.state_dict()[k]) for k in a.model.state_dict())


def test_ids_do_not_change():
    """Stores outlive versions: a new field must leave these as they are."""
    assert Ticket().id == "mnist5k-resnet8-dense-r00-s0-7984aec16134"
    lth = Ticket("cifar10", "resnet20s", "lth", 3, 1, Recipe(epochs=182), 9)
    assert lth.id == "cifar10-resnet20s-lth-r03-s1-03bdbd19974c"


def test_the_identity_knows_what_matters_and_ignores_what_does_not():
    base = Ticket(method="lth", round=2)
    assert dataclasses.replace(base, rewind_epoch=2).id != base.id
    snip = Ticket(method="snip", round=2)
    assert dataclasses.replace(snip, rewind_epoch=2).id == snip.id  # it starts from initial weights
    assert (
        Ticket(method="rigl", round=2, options=(("alpha", METHODS["rigl"].options["alpha"]),)).id
        == Ticket(method="rigl", round=2).id
    )


def test_lth_is_nested_counted_and_rewound(tiny, store):
    """Each round's mask lies within the last; its count is the recurrence's; training starts at the rewind point."""
    rounds = [obtain(make(tiny, "lth", n), store) for n in (1, 2, 3)]
    images = data.load("mnist5k", store, tiny["train_size"])
    n_weights = rounds[0].info["n_prunable"]
    for n, found in enumerate(rounds, 1):
        assert masks.n_kept(found.masks) == masks.kept(n_weights, n) == found.info["n_kept"]
        for name, weight in masks.prunable(found.model).items():
            assert (weight[~found.masks[name]] == 0).all()
    for wider, narrower in itertools.pairwise(rounds):
        assert all((narrower.masks[name] <= wider.masks[name]).all() for name in wider.masks)
    dense = obtain(make(tiny), store)
    scores = {name: w.detach().abs() for name, w in masks.prunable(dense.model).items()}
    expected = masks.keep_top(scores, masks.kept(n_weights, 1))
    assert all(torch.equal(expected[name], rounds[0].masks[name]) for name in expected)
    assert [r.info["cost"]["trainings"] for r in rounds] == pytest.approx([1.5, 2.0, 2.5])  # rewound to half-way
    point = _rewind_point(make(tiny, "lth", 1), images, store)
    assert point.epoch == 1


def test_the_rewind_point_lies_on_the_dense_run(tiny, store):
    """Training on from it gives the dense network bit for bit."""
    from lthlib.training.loop import train

    images = data.load("mnist5k", store, tiny["train_size"])
    ticket = make(tiny, "lth", 1)
    model = new_model(ticket, images)
    state, _ = train(model, images.train, ticket.recipe, seed=0, state=_rewind_point(ticket, images, store))
    dense = obtain(make(tiny), store).model.state_dict()
    assert all(torch.equal(state.model[name], dense[name]) for name in dense)


def test_a_rewind_point_without_momentum_is_read_again(tiny, store):
    still = {**tiny, "recipe": dataclasses.replace(tiny["recipe"], momentum=0.0)}
    images = data.load("mnist5k", store, tiny["train_size"])
    first, again = (_rewind_point(make(still, "lth", 1), images, store) for _ in range(2))
    assert first.momentum == again.momentum == {}
    assert all(torch.equal(first.model[name], again.model[name]) for name in first.model)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dense"])
def test_every_method_becomes_a_ticket(tiny, store, method):
    options = (("delta_t", 4),) if "delta_t" in METHODS[method].options else ()
    found = obtain(make(tiny, method, 3, options=options), store)
    info = found.info
    if found.masks is not None:
        assert info["n_kept"] == masks.kept(info["n_prunable"], 3)
        assert masks.n_kept(found.masks) == info["n_kept"]
        assert all((w[~found.masks[n]] == 0).all() for n, w in masks.prunable(found.model).items())
        assert info["macs"] < info["macs_dense_kernel"] == info["macs_parent"]
        assert info["density_by_layer"] == masks.density_by_layer(found.masks)
    elif METHODS[method].family == "dense":
        assert info["n_kept"] == info["n_prunable"]
        assert len(info["history"]) == tiny["recipe"].epochs + 3 * (tiny["recipe"].epochs - found.ticket.rewind_epoch)
    else:
        if method.endswith("-macs"):
            assert info["macs"] == pytest.approx(obtain(make(tiny, "omp", 3), store).info["macs"], rel=0.1)
        else:
            assert info["n_kept"] == pytest.approx(masks.kept(info["n_prunable"], 3), rel=0.1)
        assert info["macs"] == info["macs_dense_kernel"] < info["macs_parent"]
        parent = masks.prunable(obtain(found.ticket.dense, store).model)
        assert info["density_by_layer"] == {
            name: weight.numel() / parent[name].numel() for name, weight in masks.prunable(found.model).items()
        }
    again = obtain(found.ticket, Store(store.root))
    assert equal(found, again)
    whole = (store.root / "tickets" / found.ticket.id / "weights.safetensors").stat().st_size
    assert info["cost"]["bytes"] == whole
    # the header names two arrays of a masked weight, not one
    spared = 0 if found.masks is None else 4 * (info["n_prunable"] - info["n_kept"]) - info["n_prunable"] / 8
    assert info["cost"]["bytes_compressed"] == pytest.approx(whole - spared, abs=2000)
    logits = found.model(torch.rand(2, 1, 28, 28))
    assert logits.isfinite().all()


def test_the_books_example_of_a_method_prunes_while_it_trains(tiny, store, tmp_path, monkeypatch):
    page = (ROOT / "book" / "adding.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.S) if '"gradual"' in c)
    (tmp_path / "gradual_example.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        example = importlib.import_module("gradual_example")
        found = obtain(make(tiny, "gradual", 3, options=(("delta_t", 2),)), store)
        monkeypatch.setattr(example.Gradual, "update", lambda *a: False)
        with pytest.raises(ValueError, match="gradual ended with 76432 weights, not 31307"):
            obtain(make(tiny, "gradual", 4), store)
    finally:
        METHODS.pop("gradual", None)
    assert masks.n_kept(found.masks) == masks.kept(76_432, 3) == found.info["n_kept"]
    assert all((w[~found.masks[n]] == 0).all() for n, w in masks.prunable(found.model).items())


def test_the_same_description_gives_the_same_bits_in_another_store(tiny, store, tmp_path):
    ticket = make(tiny, "snip", 2)
    assert equal(obtain(ticket, store), obtain(ticket, Store(tmp_path)))


def test_slimming_looks_at_a_dense_run_of_its_own_and_starts_from_the_common_one():
    recipe = Recipe(epochs=2)
    ticket = Ticket(method="slimming", round=3, recipe=recipe)
    assert ticket.source == Ticket(recipe=dataclasses.replace(recipe, bn_l1=1e-4))
    assert ticket.source == dataclasses.replace(ticket, method="slimming-macs", round=9).source
    assert ticket.dense == Ticket(recipe=recipe)
    assert dataclasses.replace(ticket, options=(("bn_l1", 0.0),)).source == ticket.dense
    assert dataclasses.replace(ticket, method="filter-l1").source == ticket.dense


def test_seeds_differ(tiny, store):
    one, two = (obtain(make(tiny, seed=s), store) for s in (0, 1))
    assert not equal(one, two)


def test_batches_for_methods(store):
    images = data.load("mnist5k", store, 500).train
    batch = training_batch(images, 0)
    x, y = batch(32)
    assert torch.equal(x, batch(64)[0][:32])
    assert x.dtype == torch.float32
    assert 0 <= x.min() < x.max() <= 1
    _, classes = batch(per_class=3)
    assert classes.tolist() == [c for c in range(10) for _ in range(3)]
    assert not torch.equal(y, training_batch(images, 1)(32)[1])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "snipe", "round": 1}, "Did you mean 'snip'"),
        ({"arch": "resnet20"}, "Did you mean 'resnet20s'"),
        ({"data": "../cifar10"}, "cannot name a data set"),
        ({"method": "lth", "round": 0}, "round 0 is the dense"),
        ({"method": "dense", "round": 2}, "round 0 is the dense"),
        ({"method": "lth", "round": -1}, "whole number"),
        ({"method": "lth", "round": 1.5}, "whole number"),
        ({"seed": -1}, "whole number"),
        ({"rewind_epoch": 99}, "epochs"),
        ({"method": "rigl", "round": 1, "options": (("alhpa", 0.3),)}, "Did you mean 'alpha'"),
        ({"method": "rigl", "round": 1, "options": (("alpha", "big"),)}, "a number above 0, at most 1"),
    ],
)
def test_a_description_that_cannot_be_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        Ticket(**fields)
