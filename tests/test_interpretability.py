"""What `measure` adds to the pure functions: the same numbers, two floors, a layer, a concept set, small arrays."""

import copy
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lthlib.core.errors import UserError
from lthlib.data.scenes import scenes
from lthlib.figures import interpretability as drawing
from lthlib.metrics.interpretability import composition, dissection, lime, portrait
from lthlib.metrics.interpretability import measure as interpretability
from lthlib.metrics.interpretability.activations import activations, last_maps
from lthlib.metrics.interpretability.expo import SCORES as EXPO_SCORES
from lthlib.metrics.interpretability.expo import expo
from lthlib.metrics.interpretability.lime import fidelity_stability
from lthlib.metrics.interpretability.measure import concept_set, dissect, measure
from lthlib.metrics.interpretability.regions import activation_regions
from lthlib.metrics.interpretability.superpixels import segment
from lthlib.metrics.resampling import PREFIX
from lthlib.networks import build
from lthlib.results.collect import collect
from lthlib.tickets.obtain import new_model
from lthlib.tickets.study import Study
from lthlib.tickets.subject import Subject
from lthlib.tickets.ticket import Ticket

SMALL = {"n_images": 4, "n_masks": 60, "n_expo": 1, "n_concept_images": 40, "draws": 19, "formula_length": 2}


@pytest.fixture(scope="module")
def subjects(store):
    from conftest import TINY

    study = Study(methods=("snip",), rounds=(4,), seeds=(0,), recipe=TINY, train_size=500)
    return [Subject(ticket, store, "float32") for ticket in study.tickets()]


@pytest.fixture(scope="module")
def measured(subjects):
    return [measure(subject, **SMALL) for subject in subjects]


def numbers(values):
    return {value.metric: value.value for value in values}


def network(arch="resnet8", size=28, colours=1, **more):
    spec = {"mean": [0.5] * colours, "std": [0.25] * colours, "num_classes": 10, **more}
    return build(arch, in_channels=colours, image_size=size, **spec).eval()


class TestMeasure:
    def test_explanations_are_those_of_the_pure_functions(self, subjects, measured):
        images = subjects[1].images("test", 4).numpy()
        cells = np.arange(7).repeat(4)[:, None] * 7 + np.arange(7).repeat(4)
        explained = fidelity_stability(subjects[1].model, images, segments=[cells] * 4, n_masks=60)
        near = expo(subjects[1].model, images[:1], segments=[cells])
        found = numbers(measured[1][0])
        for name, value in {**explained[[*lime.SCORES]].mean(), **near[[*EXPO_SCORES]].mean()}.items():
            assert found[name] == pytest.approx(value, rel=1e-12)
        assert [v.n for v in measured[1][0] if v.metric in ("fidelity", "expo_fidelity")] == [4, 1]

    def test_images_without_a_score_leave_no_resample_empty(self, subjects, monkeypatch):
        def one_scored(*given, **named):
            found = fidelity_stability(*given, **named)
            found.loc[1:, [*lime.SCORES]] = np.nan  # as where an image is one superpixel
            return found.assign(n_segments=[7, 1, 1, 1])

        monkeypatch.setattr(lime, "fidelity_stability", one_scored)
        values, arrays = measure(subjects[1], **{**SMALL, "n_expo": 0})
        assert {v.n for v in values if v.metric == "fidelity"} == {1}
        drawn = [array for name, array in arrays.items() if name.startswith(PREFIX)]
        assert len(drawn) >= 3
        assert all(np.isfinite(array).all() for array in drawn)

    def test_units_are_those_of_the_pure_functions(self, subjects, measured):
        concepts = scenes(28, 1, 40)
        maps = activations(subjects[1].model, "layer3", concepts.images)
        limits = dissection.thresholds(maps, concepts.quantile)
        expected = dissection.summary(dissection.iou(dissection.tally(maps, limits, concepts)))
        floor = dissection.null_floor(maps, limits, concepts, draws=19)
        formulas = composition.best_formulas(composition.census(maps, limits, concepts), max_length=2)
        above = dissection.iou(dissection.tally(maps, limits, concepts)).max(1) > floor
        expected |= {"units_above_floor": above.mean()} | composition.summary(formulas)
        found = numbers(measured[1][0])
        assert {name: found[name] for name in expected} == expected

    def test_the_random_floor_is_the_dense_network_before_training(self, subjects, measured):
        untrained = new_model(subjects[0].ticket, subjects[0].data).eval()
        layer = dissect(untrained, scenes(28, 1, 40), "layer3", draws=19, formula_length=2)
        images = subjects[0].images("test", 4).numpy()
        explained = fidelity_stability(untrained, images, method="grid", n_masks=60)
        expected = {name: layer.numbers()[name] for name in ("unique_detectors", "mean_best_iou", "composition_iou")}
        expected["fidelity"] = explained["fidelity"].mean()
        for values, _ in measured:  # the sparse ticket has its dense parent's floor
            assert {name: numbers(values)[f"{name}_random"] for name in expected} == pytest.approx(expected)

    def test_the_random_floor_is_measured_once(self, subjects, measured, monkeypatch):
        dissected, real = [], interpretability.dissect
        monkeypatch.setattr(
            interpretability, "dissect", lambda model, **asked: dissected.append(model) or real(model, **asked)
        )
        measure(subjects[1], **SMALL)
        assert len(dissected) == 1  # the ticket itself
        measure(subjects[1], **{**SMALL, "draws": 20})
        assert len(dissected) == 3  # another question: its floor, too

    def test_the_seed_floor_compares_two_seeds(self, subjects, measured):
        images = subjects[0].images("test", 4).numpy()
        a, b = (
            fidelity_stability(subjects[0].model, images, method="grid", n_masks=60, seed=seed)[[*lime.SCORES]].mean()
            for seed in (0, 1)
        )
        for name in ("fidelity", "stability_relative"):
            expected = abs(a[name] - b[name]) / (a[name] / 2 + b[name] / 2)
            assert numbers(measured[0][0])[f"{name}_seed_floor"] == pytest.approx(expected, rel=1e-9)
            assert numbers(measured[1][0])[f"{name}_seed_floor"] > 0

    def test_it_repeats_itself_and_leaves_the_network(self, subjects, measured):
        model, state = subjects[1].model, copy.deepcopy(subjects[1].model.state_dict())
        rng, numpy_rng = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        values, arrays = measure(subjects[1], **SMALL)
        assert values == measured[1][0]
        assert arrays.keys() == measured[1][1].keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, measured[1][1][name])
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
        assert not any(module.training or module._forward_hooks for module in model.modules())
        assert torch.equal(rng, torch.get_rng_state())
        assert (numpy_rng == np.random.get_state()[1]).all()  # noqa: NPY002

    def test_a_constant_network_has_no_scale_free_rows(self, subjects):
        subject = Subject(subjects[1].ticket, subjects[1].store, "float32")
        subject.model.fc.weight.data.zero_()
        values, _ = measure(subject, **SMALL)
        found = numbers(values)
        assert found["fidelity"] < 1e-12
        assert found["stability"] < 1e-12
        assert not {"fidelity_r2", "stability_relative", "lime_r2", "expo_r2"} & found.keys()
        assert {"fidelity_r2_random", "mean_best_iou"} <= found.keys()

    def test_units_of_a_dead_network_have_no_concept(self, subjects):
        subject = Subject(subjects[1].ticket, subjects[1].store, "float32")
        for parameter in subject.model.parameters():
            parameter.data.zero_()
        values, arrays = measure(subject, **SMALL)
        found = numbers(values)
        assert found["unique_detectors"] == found["composition_iou"] == found["units_above_floor"] == 0
        assert not arrays["unit_regions"].any()
        figure = drawing.units({"dead": arrays})
        titles = [axis.get_title(loc="left") for axis in figure.axes]
        assert all("no concept\nIoU 0.000, shuffled 0.000" in title for title in titles)

    def test_images_of_one_superpixel_are_refused(self, subjects):
        class Blank(Subject):
            def images(self, name, n):
                return torch.zeros(n, 28, 28, 1, dtype=torch.uint8)

        blank = Blank(subjects[0].ticket, subjects[0].store, "float32")
        with pytest.raises(UserError, match=r"single superpixel.*another segmentation"):
            measure(blank, **{**SMALL, "n_images": 3, "segmentation": "felzenszwalb"})

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"segmentation": "felzenszwab"}, "Did you mean 'felzenszwalb'"),
            ({"layer": "layer4"}, "no layer 'layer4'.*layer3"),
            ({"concepts": "scene"}, "Did you mean 'scenes'"),
            ({"n_concept_images": 5}, "at least 20"),
            ({"draws": 5}, "at least 19 draws"),
        ],
    )
    def test_wrong_parameters_are_named(self, subjects, wrong, message):
        with pytest.raises(UserError, match=message):
            measure(subjects[0], **{**SMALL, **wrong})


class TestLastMaps:
    @pytest.mark.parametrize(
        ("arch", "size", "layer"),
        [
            ("resnet8", 28, "layer3"),
            ("resnet20s", 32, "layer3"),
            ("resnet18", 32, "layer4"),
            ("wrn-28-10", 32, "relu"),
            ("resnet50", 224, "layer4"),
        ],
    )
    def test_it_is_the_last_stage(self, arch, size, layer):
        slim = {"channels": {f"stage{i}": 16 for i in (1, 2, 3)}} if arch == "wrn-28-10" else {}
        assert last_maps(network(arch, size, 3, **slim), (3, size, size)) == layer

    def test_a_chain_ends_before_its_maps_get_too_small(self):
        model = network("vgg16-bn", 32, 3)
        layer = last_maps(model, (3, 32, 32))
        assert activations(model, layer, np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 512, 4, 4)
        assert isinstance(model.get_submodule(layer), torch.nn.ReLU)

    def test_larger_maps_lie_earlier(self):
        assert last_maps(network(), (1, 28, 28), least=7) == "layer2"
        with pytest.raises(UserError, match="99x99"):
            last_maps(network(), (1, 28, 28), least=99)

    def test_a_module_that_is_called_twice_is_passed_over(self):
        class Twice(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.relu = torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()

            def forward(self, x):
                return self.relu(self.relu(self.conv(x)))

        assert last_maps(Twice(), (1, 8, 8)) == "conv"


class TestDissection:
    def test_streamed_maps_give_the_same(self, monkeypatch):
        model, concepts = network(seed=3), scenes(28, 1, 70)
        whole = dissect(model, concepts, "layer3", draws=19)
        monkeypatch.setattr(interpretability, "IN_MEMORY", 0)
        streamed = dissect(model, concepts, "layer3", draws=19)
        np.testing.assert_array_equal(streamed.peaks, whole.peaks)
        assert streamed.numbers() == whole.numbers()
        for name, replicates in whole.replicates.items():
            np.testing.assert_array_equal(streamed.replicates[name], replicates)

    def test_the_units_shown_exceed_chance_first_and_on_the_images_they_like_most(self, subjects, measured):
        arrays, concepts = measured[0][1], scenes(28, 1, 40)
        found = dissect(subjects[0].model, concepts, "layer3", draws=19, formula_length=2)
        label, score = dissection.best_labels(found.scores)
        units = arrays["unit_number"]
        above = found.above
        assert above.any()
        assert score[units[0]] == score[above].max()
        assert len(units) == min(portrait.SHOWN_UNITS, len(label))
        assert list(arrays["unit_label"]) == [concepts.labels[label[u]] for u in units]
        for k, u in enumerate(units):
            better = (label == label[u]) & ((above > above[u]) | (above == above[u]) & (score > score[u]))
            assert not better.any()  # of each label the best unit
            top = np.argsort(-found.peaks[:, u], kind="stable")[:3]
            np.testing.assert_array_equal(arrays["unit_images"][k], concepts.images[top])
            maps = activations(subjects[0].model, "layer3", concepts.images[top])
            expected = activation_regions(maps, found.limits, (28, 28))[:, u]
            np.testing.assert_array_equal(arrays["unit_regions"][k], expected)

    def test_detectors_by_category_add_up(self, measured):
        for values, arrays in measured:
            assert arrays["detectors"].sum() == numbers(values)["unique_detectors"]
            assert arrays["by_length"][-1] == pytest.approx(numbers(values)["composition_iou"])

    def test_explained_pixels_carry_their_superpixels_coefficient(self, subjects, measured):
        images = subjects[0].images("test", 4).numpy()
        explained = fidelity_stability(subjects[0].model, images, method="grid", n_masks=60)
        for i, by_pixel in enumerate(measured[0][1]["explained_maps"]):
            expected = explained.coef[i][segment(images[i], "grid")]
            np.testing.assert_allclose(by_pixel, expected, atol=1e-3 * np.abs(expected).max())

    def test_the_gallery_names_every_pixels_concept(self, measured):
        arrays, concepts = measured[0][1], scenes(28, 1, 40)
        for c, category in enumerate(concepts.categories):
            for n in np.unique(arrays["gallery_planes"][:, c]):
                if n > 0:
                    assert concepts.categories[concepts.category_of[n - 1]] == category
                    mask = concepts.mask(str(arrays["gallery_labels"][n - 1]))[: len(arrays["gallery_images"])]
                    np.testing.assert_array_equal(arrays["gallery_planes"][:, c] == n, mask)
        assert "gallery_images" not in measured[1][1]


@pytest.fixture
def broden(tmp_path, monkeypatch):
    """Thirty 40-pixel colour pictures, half of them with a bright left part labelled at 20 pixels."""
    monkeypatch.setenv("LTHLIB_DATA", str(tmp_path))
    rng = np.random.default_rng(0)
    tables = {
        "category.csv": "name\nobject\n",
        "label.csv": "number,name\n7,glow\n",
        "c_object.csv": "code,number,name,frequency,coverage\n0,7,glow,30,1.0\n",
        "index.csv": "image,split,ih,iw,sh,sw,object\n",
    }
    with zipfile.ZipFile(tmp_path / "glows.zip", "w") as file:
        for i in range(30):
            width = int(rng.integers(5, 15))
            picture, mask = rng.integers(0, 60, (40, 40, 3)), np.zeros((20, 20, 3))
            picture[:, : 2 * width] += 190
            mask[:, :width, 0] = 7
            for name, pixels in ((f"{i}.png", picture), (f"{i}_object.png", mask)):
                with file.open(f"images/{name}", "w") as handle:
                    Image.fromarray(pixels.astype(np.uint8)).save(handle, "PNG")
            tables["index.csv"] += f"{i}.png,train,40,40,20,20,{i}_object.png\n"
        for name, text in tables.items():
            file.writestr(name, text)
    return tmp_path


class TestForeignConcepts:
    def test_pictures_fit_the_network_and_labels_stay(self, broden):
        concepts = concept_set("glows", 28, 1, 25)
        assert concepts.images[0:25].shape == (25, 28, 28, 1)
        assert concepts.mask_shape == (20, 20)
        bright = concepts.images[3][..., 0] > 128
        mask = concepts.mask("glow")[3]
        assert bright.mean() == pytest.approx(mask.mean(), abs=0.03)

    def test_fewer_pictures_are_evenly_spaced(self, broden):
        every, some = (concept_set("glows", 40, 3, n) for n in (30, 20))
        expected = [i * 30 // 20 for i in range(20)]
        assert all((some.images[k] == every.images[i]).all() for k, i in enumerate(expected))
        assert all((some.planes[k] == every.planes[i]).all() for k, i in enumerate(expected))

    def test_a_unit_of_brightness_detects_the_bright_part(self, broden):
        model = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Conv2d(1, 2, 1, bias=False))
        model[1].weight.data = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
        found = dissect(model, concept_set("glows", 28, 1, 30), "1", quantile=0.4, draws=19)
        assert found.scores[0, 0] > 0.6
        assert found.scores[1, 0] < 0.2

    def test_its_files_are_part_of_the_version(self, broden, subjects):
        before = interpretability.inputs(subjects[0], concepts="glows")
        with zipfile.ZipFile(broden / "glows.zip", "a") as file:
            file.writestr("more.txt", "more")
        assert interpretability.inputs(subjects[0], concepts="glows") != before
        assert interpretability.inputs(subjects[0], concepts="scenes") == ""

    def test_an_unknown_set_names_what_there_is(self, broden):
        with pytest.raises(UserError, match=r"Did you mean 'glows.zip'.*holds: glows.zip"):
            concept_set("glow", 28, 1, 30)


def test_the_table_of_floors_is_arithmetic_on_the_rows(subjects, store):
    ticket = subjects[1].ticket
    study = Study(methods=("snip",), rounds=(4,), recipe=ticket.recipe, train_size=500)
    results = collect(study, "interpretability", store, parameters=SMALL, precision="float32")
    line = drawing.floors(results).iloc[0]
    dense = results.rows[results.rows["method"] == "dense"].set_index("metric")["value"]
    assert float(line["dense"]) == pytest.approx(dense["fidelity"], rel=5e-3)
    assert float(line["± mask seed"]) == pytest.approx(dense["fidelity"] * dense["fidelity_seed_floor"], rel=5e-3)
    assert float(line["random weights"]) == pytest.approx(dense["fidelity_random"], rel=5e-3)
    scores = results.arrays[Ticket(recipe=ticket.recipe, train_size=500).id]["scores"][:, 0]
    assert float(line["± 95 % (images)"]) == pytest.approx(1.96 * scores.std(ddof=1) / 2, rel=5e-3)
    assert line["measured on"] == "4 test images"


def test_no_panel_cuts_off_detectors(monkeypatch):
    import pandas as pd

    lines = [("dense", 0, "colour", 2), ("random", 0, "colour", 1), ("omp", 2, "colour", 0), ("lth", 2, "colour", 7)]
    frame = pd.DataFrame(lines, columns=["method", "round", "category", "detectors"])
    monkeypatch.setattr(drawing, "_by_category", lambda results: frame)
    figure = drawing.detectors_by_category(None)
    assert len(figure.axes) == 2
    for axis in figure.axes:
        low, high = axis.get_ylim()
        drawn = np.concatenate([line.get_ydata() for line in axis.lines])
        assert low < drawn.min()
        assert drawn.max() < high
    assert figure.axes[0].get_ylim()[1] > 7  # the panels share their axis
