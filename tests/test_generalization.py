"""Accuracy, OoD detection, corruption errors and attacks: closed forms, laws, independent libraries."""

import copy
from types import SimpleNamespace

import foolbox
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lthlib.core.errors import UserError
from lthlib.data.corrupted import sample
from lthlib.data.corruptions import CORRUPTIONS, corrupt
from lthlib.metrics import METRICS, softmax
from lthlib.metrics.generalization import attacks
from lthlib.metrics.generalization import measure as generalization
from lthlib.metrics.generalization.accuracy import accuracy, true_class_margin
from lthlib.metrics.generalization.attacks import adversarial_logits, fgsm, pgd
from lthlib.metrics.generalization.corruption import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERROR,
    COMMON_CORRUPTIONS,
    corruption_error,
    corruption_error_alexnet,
    relative_corruption_error,
    relative_corruption_error_alexnet,
)
from lthlib.metrics.generalization.measure import inputs, measure
from lthlib.metrics.generalization.ood import (
    SCORES,
    aupr,
    detection,
    energy_score,
    fpr_at_tpr,
    max_logit_score,
    msp_score,
    roc_auc,
)
from lthlib.tickets.subject import Subject
from lthlib.tickets.ticket import Ticket
from lthlib.training.loop import as_input

ALL_CORRUPTIONS = tuple(CORRUPTIONS)

# ------------------------------------------------------------------------------------------------ accuracy


def test_accuracy_gives_ties_to_the_first_class():
    logits = [[0, 1, 0], [2, 2, 2], [2, 2, 2], [0, 0, 5]]
    assert accuracy(logits, [1, 0, 2, 1]) == 2 / 4


def test_margin_is_the_gap_to_the_best_other_class():
    logits = np.log([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    np.testing.assert_allclose(true_class_margin(logits, [0, 2]), [0.5 - 0.3, 0.2 - 0.5])


# -------------------------------------------------------------------------------------------------- scores


def test_scores_have_their_closed_forms():
    logits = np.array([[3.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    np.testing.assert_allclose(msp_score(logits), 1 - np.array([np.e**2 / (np.e**2 + 2), 1 / 3]))
    np.testing.assert_array_equal(max_logit_score(logits), [-3, -2])
    np.testing.assert_allclose(energy_score(logits), [-np.log(np.e**3 + 2 * np.e), -(2 + np.log(3))])


def test_msp_orders_confidences_that_every_softmax_rounds_to_one():
    logits = np.array([[40, 0], [60, 0], [300, 0]], dtype=np.float32)
    assert (softmax(logits).max(axis=1) == 1).all()
    scores = msp_score(logits)
    np.testing.assert_allclose(scores, np.exp(-logits[:, 0].astype(float)), rtol=1e-12)
    assert roc_auc(scores[1:], scores[:1]) == 1


@pytest.mark.parametrize("score", SCORES.values())
def test_scores_are_higher_for_less_certain_images(score):
    logits = np.array([[c, 0.0, -c] for c in (8, 4, 2, 1)])
    assert (np.diff(score(logits)) > 0).all()


def test_energy_and_max_logit_move_with_the_logits_but_msp_does_not():
    logits = np.random.default_rng(0).normal(size=(5, 4))
    np.testing.assert_allclose(energy_score(logits + 1000), energy_score(logits) - 1000)
    np.testing.assert_allclose(max_logit_score(logits + 1000), max_logit_score(logits) - 1000)
    np.testing.assert_allclose(msp_score(logits + 1000), msp_score(logits))


# --------------------------------------------------------------------------------------------------- curves


def tied_scores(seed, n_in=300, n_out=170):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 20, n_in) / 20, rng.integers(6, 26, n_out) / 20


@pytest.mark.parametrize("positive", ["ood", "id"])
@pytest.mark.parametrize("seed", range(3))
def test_detection_numbers_flag_ties_together(seed, positive):
    """From the counts at every threshold, in whole numbers."""
    known, foreign = tied_scores(seed)
    wanted, others = (foreign, known) if positive == "ood" else (-known, -foreign)
    thresholds = np.unique(np.r_[wanted, others])[::-1]
    true, false = ((side >= thresholds[:, None]).sum(axis=1) for side in (wanted, others))
    wins = (foreign[:, None] > known).sum() + (foreign[:, None] == known).sum() / 2
    assert roc_auc(known, foreign) == pytest.approx(wins / (len(known) * len(foreign)), abs=1e-14)
    precision = (np.diff(true, prepend=0) * true / (true + false)).sum() / len(wanted)
    assert aupr(known, foreign, positive) == pytest.approx(precision, abs=1e-14)
    for rate in (0.5, 0.95, 1.0):
        assert fpr_at_tpr(known, foreign, rate, positive) == (false / len(others))[true / len(wanted) >= rate][0]


def test_auroc_is_the_chance_that_a_foreign_image_scores_higher():
    known, foreign = np.array([1, 2, 2, 5]), np.array([2, 3])
    wins = (1 + 0.5 + 0.5 + 0) + (1 + 1 + 1 + 0)
    assert roc_auc(known, foreign) == pytest.approx(wins / 8)
    assert roc_auc(foreign, known) == pytest.approx(1 - wins / 8)
    assert roc_auc(np.zeros(3), np.zeros(9)) == 0.5


def test_average_precision_by_hand_and_its_chance_level():
    # Descending: out 4, in 3, out 2, in 1.
    assert aupr([1, 3], [2, 4]) == pytest.approx((1 / 1 + 2 / 3) / 2)
    # Ascending, in-distribution wanted: in 1, out 2, in 3, out 4.
    assert aupr([1, 3], [2, 4], "id") == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert aupr([1, 1, 1], [1]) == 1 / 4
    assert aupr([1, 1, 1], [1], "id") == 3 / 4


def test_the_two_conventions_of_fpr95_differ():
    known = np.arange(1, 101)
    foreign = np.array([0.5] * 10 + [200] * 90)
    assert fpr_at_tpr(known, foreign) == 10 / 100  # all up to 95 accepted, the ten among them
    assert fpr_at_tpr(known, foreign, positive="ood") == 1  # to flag 95 of 100 all above 0.5 are flagged
    assert fpr_at_tpr(known, foreign, tpr=0.9, positive="ood") == 0


@settings(max_examples=30, deadline=None)
@given(
    known=st.lists(st.integers(-5, 5), min_size=1, max_size=20),
    foreign=st.lists(st.integers(-5, 5), min_size=1, max_size=20),
)
def test_ranks_alone_decide(known, foreign):
    known, foreign = np.array(known, dtype=float), np.array(foreign, dtype=float)
    pairs = np.sign(foreign[:, None] - known).mean()
    assert roc_auc(known, foreign) == pytest.approx((1 + pairs) / 2, abs=1e-15)
    for number in (roc_auc, aupr, fpr_at_tpr):
        value = number(known, foreign)
        assert number(np.exp(known), np.exp(foreign)) == value
        assert number(known[::-1], np.roll(foreign, 1)) == value


def test_each_score_has_its_roc_auc_and_msp_the_other_numbers():
    rng = np.random.default_rng(0)
    known, foreign = rng.normal(size=(50, 3)) * 3, rng.normal(size=(40, 3)) + 2
    found, scores = detection(known, foreign), (msp_score(known), msp_score(foreign))
    assert found.keys() == {name for name in METRICS if name.startswith("ood_")}
    assert {name: found[name] for name in SCORES} == {n: roc_auc(f(known), f(foreign)) for n, f in SCORES.items()}
    assert len({found[name] for name in SCORES}) == 3
    assert (found["ood_aupr"], found["ood_aupr_id"]) == (aupr(*scores, "ood"), aupr(*scores, "id"))
    assert found["ood_fpr95"] == fpr_at_tpr(*scores, 0.95, "id")
    assert found["ood_fpr95_ood_positive"] == fpr_at_tpr(*scores, 0.95, "ood")


# --------------------------------------------------------------------------------------- corruption errors


def errors_of(value, corruptions=ALL_CORRUPTIONS):
    return {name: [value] * 5 for name in corruptions}


def test_alexnet_has_an_error_of_one_against_itself():
    spread = np.array([-0.05, -0.02, 0, 0.02, 0.05])
    errors = {name: mean + spread for name, mean in ALEXNET_ERROR.items()}
    assert corruption_error_alexnet(errors) == pytest.approx(1)
    assert corruption_error(errors) == pytest.approx(sum(ALEXNET_ERROR.values()) / 15)
    assert relative_corruption_error_alexnet(errors, ALEXNET_CLEAN_ERROR) == pytest.approx(1)


def test_the_clean_error_of_alexnet_is_torchvisions():
    from torchvision.models import AlexNet_Weights

    accuracy = AlexNet_Weights.IMAGENET1K_V1.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert pytest.approx(1 - accuracy / 100) == ALEXNET_CLEAN_ERROR


def test_the_three_meanings_differ():
    errors = errors_of(0.3) | {"fog": [0.1, 0.2, 0.3, 0.4, 1.0]}
    assert corruption_error(errors) == pytest.approx((14 * 0.3 + 0.4) / 15)
    assert relative_corruption_error(errors, 0.1) == pytest.approx((14 * 0.3 + 0.4) / 15 - 0.1)
    others = [0.3 / e for name, e in ALEXNET_ERROR.items() if name != "fog"]
    assert corruption_error_alexnet(errors) == pytest.approx((sum(others) + 0.4 / ALEXNET_ERROR["fog"]) / 15)
    added = [(0.3, 0.4)[c == "fog"] - 0.1 for c in ALEXNET_ERROR]
    to_alexnet = [error - ALEXNET_CLEAN_ERROR for error in ALEXNET_ERROR.values()]
    ratios = np.divide(added, to_alexnet)  # a mean of ratios, not a ratio of means
    assert relative_corruption_error_alexnet(errors, 0.1) == pytest.approx(ratios.mean())
    assert abs(ratios.mean() - np.mean(added) / np.mean(to_alexnet)) > 0.01


def test_fifteen_or_nineteen_is_a_parameter():
    extra = ALL_CORRUPTIONS[15:]
    errors = errors_of(0.2, COMMON_CORRUPTIONS) | errors_of(0.6, extra)
    assert (len(COMMON_CORRUPTIONS), len(ALL_CORRUPTIONS)) == (15, 19)
    assert corruption_error(errors) == pytest.approx(0.2)
    assert corruption_error(errors, ALL_CORRUPTIONS) == pytest.approx((15 * 0.2 + 4 * 0.6) / 19)


def test_images_foreign_to_some_classes_are_scored_among_these(monkeypatch):
    """By hand, four classes of which two are kept: the scores are those of a network that knows only these two."""
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=80)
    known, foreign = rng.normal(size=(80, 4)) + 3 * np.eye(4)[labels], rng.normal(size=(50, 4))

    class Given:
        data = SimpleNamespace(classes=("n01", "n02", "n03", "n04"), size=32)
        ticket = SimpleNamespace(data="imagenet", method="lth")
        is_dense = False

        def labels(self, name, n):
            return torch.from_numpy(labels)

        def logits(self, name, n):
            return known if name == "test" else foreign

    monkeypatch.setattr(generalization, "ood_classes", lambda name, like: ("n02", "n04"))
    monkeypatch.setattr(generalization, "_under_corruption", lambda *a: ([], {}))
    monkeypatch.setattr(generalization, "_attacks", lambda *a: ([], {}))
    values, arrays = measure(Given(), ood=("imagenet-o",))
    mine = (labels == 1) | (labels == 3)
    expected = detection(known[mine][:, [1, 3]], foreign[:, [1, 3]])
    value = table(values)
    assert value["ood_auroc", "imagenet-o", 0] == expected["ood_auroc"]
    assert value["ood_aupr", "imagenet-o", 0] == expected["ood_aupr"]
    assert value["test_accuracy", "none", 0] == accuracy(known, labels)
    assert {v.n for v in values if v.shift == "imagenet-o"} == {mine.sum() + 50}
    assert arrays["roc_imagenet-o"][-1] == 1


# -------------------------------------------------------------------------------------------------- attacks


class Normalize(nn.Module):
    def forward(self, x):
        return (x - 0.4) / 0.25


def small_net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            Normalize(),
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(8 * 36, 5),
        )
        net(torch.randn(64, 3, 8, 8))  # running statistics that differ from those of a batch
    return net


def batch(n=30, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=rng), torch.randint(5, (n,), generator=rng)


def linear_net(weight):
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight), bias=False))
    net[1].weight.data = weight
    return net


def test_fgsm_on_a_linear_network_is_the_sign_of_p_minus_y_times_w():
    rng = torch.Generator().manual_seed(0)
    weight, images = torch.randn(4, 12, generator=rng), torch.rand(20, 3, 2, 2, generator=rng)
    labels = torch.randint(4, (20,), generator=rng)
    p = (images.flatten(1) @ weight.T).softmax(1)
    gradient = (p - nn.functional.one_hot(labels, 4)) @ weight
    expected = (images + 8 / 255 * gradient.view_as(images).sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(linear_net(weight), images, labels, 8 / 255), expected, rtol=0, atol=0)


def test_fgsm_sees_the_true_class_where_float32_rounds_its_gradient_away():
    # p = (1 - 2e-11, 1e-11, 1e-11): in float32 p_0 - 1 is 0 and the sum over the other classes points down.
    weight = torch.tensor([[25.0 + 8.0], [8.0 - 2.0], [8.0 - 2.0]])
    images = torch.ones(1, 1, 1, 1) * 0.95
    assert linear_net(weight)(images).softmax(1)[0, 0] == 1
    moved = fgsm(linear_net(weight), images, torch.tensor([0]), 0.01)
    assert moved.item() == pytest.approx(0.94)  # less of the pixel is less of class 0


@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255, 0.3])
def test_attacks_agree_with_foolbox(epsilon):
    net, (images, labels) = small_net().eval(), batch()
    theirs = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    torch.testing.assert_close(fgsm(net, images, labels, epsilon), attack(theirs, images, labels, epsilons=epsilon)[1])
    attack = foolbox.attacks.LinfPGD(abs_stepsize=epsilon / 4, steps=20, random_start=False)
    ours = pgd(net, images, labels, epsilon, seed=None)
    torch.testing.assert_close(ours, attack(theirs, images, labels, epsilons=epsilon)[1], rtol=0, atol=1e-6)


def test_pgd_reaches_the_corner_of_the_ball_on_a_linear_network_of_two_classes():
    weight = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    images, labels = (torch.rand(20, 3, 2, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(20).long())
    corner = fgsm(linear_net(weight), images, labels, 8 / 255)
    for seed in (None, 0, 1):
        found = pgd(linear_net(weight), images, labels, 8 / 255, steps=9, seed=seed)
        torch.testing.assert_close(found, corner, rtol=0, atol=1e-7)
    short = pgd(linear_net(weight), images, labels, 8 / 255, steps=1, seed=None)
    torch.testing.assert_close(short, fgsm(linear_net(weight), images, labels, 2 / 255), rtol=0, atol=1e-7)


def test_pgd_finds_a_higher_loss_than_fgsm():
    net, (images, labels) = small_net().eval(), batch()
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(net(attack(net, images, labels, 0.1)), labels) for attack in (fgsm, pgd)]
    assert losses[1] > losses[0]


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_attacks_stay_in_the_ball_and_in_the_pixel_range(attack):
    net, (images, labels) = small_net(), batch()
    moved = attack(net, images, labels, 0.3)
    assert (moved - images).abs().max() <= 0.3 + 1e-6
    assert moved.min() == 0
    assert moved.max() == 1
    torch.testing.assert_close(attack(net, images, labels, 0.0), images)


def test_chunks_change_nothing_and_the_seed_decides_the_start(monkeypatch):
    net, (images, labels) = small_net(), batch()
    for attack in (fgsm, pgd):
        whole = attack(net, images, labels, 8 / 255)
        with monkeypatch.context() as patch:
            patch.setattr(attacks, "CHUNK", 4)
            torch.testing.assert_close(attack(net, images, labels, 8 / 255), whole)
    one_step = [pgd(net, images, labels, 8 / 255, steps=1, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(one_step[0], one_step[1])
    assert not torch.equal(one_step[0], one_step[2])


def test_random_start_is_uniform_in_the_ball():
    net = linear_net(torch.zeros(2, 768))  # no gradient: the images stay where they started
    images = torch.full((50, 3, 16, 16), 0.5)
    shift = (pgd(net, images, torch.zeros(50).long(), 0.1, steps=1) - images) / 0.1
    assert shift.min() == pytest.approx(-1, abs=1e-3)
    assert shift.max() == pytest.approx(1, abs=1e-3)
    assert shift.mean() == pytest.approx(0, abs=0.01)
    assert shift.std() == pytest.approx(3**-0.5, rel=0.01)


def test_bytes_are_pixels_over_255():
    net, labels = small_net(), batch()[1]
    pixels = torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fgsm(net, pixels, labels, 0.1), fgsm(net, pixels / 255, labels, 0.1))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_attacks_leave_network_and_random_states_as_found(attack, context):
    net, (images, labels) = small_net().train(), batch()
    net[2].eval()
    net[1].bias.requires_grad_(False)
    net(images).sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    before, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    modes, originals = [m.training for m in net.modules()], (images.clone(), labels.clone())
    random_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with context():
        adversarial_logits(net, attack(net, images, labels, 8 / 255), labels, [0])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == flags
    assert [m.training for m in net.modules()] == modes
    for p, gradient in zip(net.parameters(), gradients, strict=True):
        assert p.grad is gradient is None or torch.equal(p.grad, gradient)
    assert torch.equal(images, originals[0])
    assert torch.equal(labels, originals[1])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_training_flags_come_back_after_an_error():
    net, (images, labels) = small_net().train(), batch()
    with pytest.raises(UserError):
        fgsm(net, images, labels + 5, 0.1)
    assert all(m.training for m in net.modules())


def test_adversarial_logits_start_at_the_clean_ones_and_are_those_of_the_attacked_images():
    net, (images, labels) = small_net(), batch()
    logits = adversarial_logits(net, images, labels, (0.0, 1 / 255, 8 / 255))
    twin = copy.deepcopy(net).eval()
    with torch.no_grad():
        expected = [twin(fgsm(net, images, labels, e)).numpy() for e in (0.0, 1 / 255, 8 / 255)]
        clean = twin(images).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(logits[0], clean, atol=1e-5)
    assert (np.diff([true_class_margin(z, labels).mean() for z in logits]) < 0).all()


def test_a_network_in_float64_is_attacked_in_float64():
    net, (images, labels) = small_net().double(), batch()
    moved = pgd(net, images.double(), labels, 8 / 255, seed=None)
    assert moved.dtype == torch.float64
    pixels = torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits = adversarial_logits(net, pixels, labels, [0.0])[0]
    with torch.no_grad():
        exact = copy.deepcopy(net).eval()(pixels.double() / 255).numpy()
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, exact, rtol=1e-12)
    assert adversarial_logits(net.float(), pixels, labels, [0.0]).dtype == np.float32


def test_the_pixels_of_a_network_in_half_precision_are_not_rounded():
    net, (images, labels) = small_net().bfloat16(), batch()
    moved = fgsm(net, images, labels, 1 / 255)
    assert moved.dtype == torch.float32
    assert (moved - images).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("epsilon", [8, -1 / 255, float("nan")])
@pytest.mark.parametrize("attack", [fgsm, pgd, lambda *of: adversarial_logits(*of[:3], [of[3]])])
def test_an_epsilon_that_is_no_fraction_of_the_pixels_is_named(attack, epsilon):
    with pytest.raises(UserError, match=r"epsilon is .*: write 8 / 255, not 8"):
        attack(small_net(), *batch(), epsilon)


def test_one_backward_pass_serves_every_epsilon():
    net, (images, labels) = small_net(), batch()
    passes = {"forward": 0, "backward": 0}

    def count(module, inputs, output):
        passes["forward"] += 1
        if output.requires_grad:
            output.register_hook(lambda _: passes.__setitem__("backward", passes["backward"] + 1))

    net[1].register_forward_hook(count)
    logits = adversarial_logits(net, images, labels, [0.01, 0.02, 0.04])
    assert logits.shape == (3, 30, 5)
    assert passes == {"forward": 1 + 3, "backward": 1}


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: accuracy([[np.nan, 0]], [0]), "NaN"),
        (lambda: accuracy(np.zeros((0, 2)), []), "empty"),
        (lambda: accuracy(np.zeros((1, 2)), [2]), "2 classes"),
        (lambda: roc_auc([0.1], []), "OoD scores"),
        (lambda: roc_auc([np.inf], [0.1]), "in-distribution scores"),
        (lambda: detection(np.zeros((2, 3)), np.zeros((0, 3))), "empty"),
        (lambda: aupr([1], [2], "odo"), "Did you mean 'ood'"),
        (lambda: fpr_at_tpr([1], [2], 95), r"\(0, 1\]"),
        (lambda: corruption_error(errors_of(0.1, COMMON_CORRUPTIONS[1:])), "gaussian_noise"),
        (lambda: corruption_error(errors_of(0.1) | {"fog": [0.1]}), "same number"),
        (lambda: corruption_error(errors_of(10)), "fractions"),
        (lambda: corruption_error(errors_of(np.nan)), "NaN"),
        (lambda: corruption_error(errors_of(0.1), []), "at least one"),
        (lambda: corruption_error_alexnet({name: [0.1] for name in ALL_CORRUPTIONS}), "five severities"),
        (lambda: relative_corruption_error(errors_of(0.1), 10), "clean error"),
        (lambda: fgsm(small_net(), *batch(), 8), "8 / 255"),
        (lambda: fgsm(small_net(), batch()[0] * 2 - 1, batch()[1], 0.1), "normalisation"),
        (lambda: fgsm(small_net(), batch()[0], batch()[1] + 5, 0.1), "5 classes"),
        (lambda: fgsm(small_net(), batch()[0], batch()[1][:3], 0.1), "one per image"),
        (lambda: fgsm(small_net(), batch()[0][:0], batch()[1][:0], 0.1), "shape"),
        (lambda: pgd(small_net(), *batch(), 0.1, steps=0), "steps"),
        (lambda: pgd(small_net(), *batch(), 0.1, step_size=-1), "step_size"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_rows_tell_the_paper_from_what_stands_beside_it():
    rows = {name: row for name, row in METRICS.items() if row.dimension == "generalization"}
    verdict = {name: row.higher_is_better for name, row in rows.items() if row.in_verdict}
    assert verdict == {"test_accuracy": True, "ood_auroc": True, "corruption_error": False, "fgsm_accuracy": True}
    assert {"ood_fpr95", "relative_corruption_error", "pgd_accuracy", "adversarial_margin"} <= set(rows)


# -------------------------------------------------------------------------------------------------- a ticket

FEW = {"ood": ("photos",), "n_test": 60, "n_ood": 40, "n_corrupted": 20, "n_attack": 30, "n_pgd": 10}


@pytest.fixture
def subject(tiny, store):
    return Subject(Ticket(**tiny), store, "float32")


@pytest.fixture
def measured(subject):
    return measure(subject, **FEW)


def forward(model, pixels):
    with torch.no_grad():
        return model(as_input(torch.as_tensor(pixels))).numpy()


def table(values):
    found = {(v.metric, v.shift, v.severity): v.value for v in values}
    assert len(found) == len(values)
    return found


def test_one_image_may_be_attacked_by_steps(subject):
    value = table(measure(subject, **{**FEW, "n_pgd": 1})[0])
    assert value["pgd_accuracy", "pgd", 8] in (0, 1)
    assert value["fgsm_pgd_gap", "pgd", 8] in (-1, 0, 1)


def test_corruption_rows_are_the_accuracies_of_the_same_weights_on_corrupted_images(subject, measured):
    value, test = table(measured[0]), subject.data.test
    which = sample(test.labels, 20)
    pixels, labels = test.pixels[which].numpy(), test.labels[which]
    for name, severity in (("fog", 1), ("impulse_noise", 5), ("spatter", 3)):
        expected = accuracy(forward(subject.model, corrupt(pixels, name, severity)), labels)
        assert value["corrupted_accuracy", name, severity] == pytest.approx(expected, abs=1e-12)
    cells = {name: [1 - value["corrupted_accuracy", name, s] for s in range(1, 6)] for name in ALL_CORRUPTIONS}
    common = np.mean([cells[name] for name in COMMON_CORRUPTIONS])
    clean = 1 - accuracy(forward(subject.model, pixels), labels)
    assert value["corruption_error", "common", 0] == pytest.approx(common)
    assert value["relative_corruption_error", "common", 0] == pytest.approx(common - clean)
    assert value["corruption_error_all", "all", 0] == pytest.approx(np.mean(list(cells.values())))
    assert value["official_corruptions", "none", 0] == 0
    assert not [key for key in value if key[0] == "corruption_error_alexnet"]  # 28 pixels are no ImageNet-C


def test_the_other_rows_are_the_pure_functions_on_the_same_weights(subject, measured):
    value, test = table(measured[0]), subject.data.test
    which = sample(test.labels, 60)
    known = forward(subject.model, test.pixels[which])
    foreign = forward(subject.model, subject.images("ood:photos", 40))
    assert value["test_accuracy", "none", 0] == accuracy(known, test.labels[which])
    assert value["ood_auroc", "photos", 0] == pytest.approx(roc_auc(msp_score(known), msp_score(foreign)), abs=1e-3)
    which = sample(test.labels, 30)
    images, labels = as_input(test.pixels[which]), test.labels[which]
    logits = adversarial_logits(subject.model, images, labels, [e / 255 for e in (1, 2, 4, 8)])
    curve = [accuracy(z, labels) for z in logits]
    assert [value["adversarial_accuracy", "fgsm", e] for e in (1, 2, 4, 8)] == curve
    assert value["fgsm_accuracy", "fgsm", 8] == curve[3]
    assert value["adversarial_margin", "fgsm", 8] == pytest.approx(true_class_margin(logits[3], labels).mean())
    few = sample(labels, 10)
    after = accuracy(forward_floats(subject.model, pgd(subject.model, images[few], labels[few], 8 / 255)), labels[few])
    before = accuracy(
        forward_floats(subject.model, fgsm(subject.model, images[few], labels[few], 8 / 255)), labels[few]
    )
    assert value["pgd_accuracy", "pgd", 8] == after
    assert value["fgsm_pgd_gap", "pgd", 8] == pytest.approx(before - after)


def forward_floats(model, images):
    with torch.no_grad():
        return model(images).numpy()


def test_measuring_again_gives_the_same(subject, measured):
    again = measure(Subject(subject.ticket, subject.store, "float32"), **FEW)
    assert table(again[0]) == table(measured[0])
    assert all(np.array_equal(again[1][key], array) for key, array in measured[1].items())


def test_arrays_hold_the_roc_curve_and_of_dense_the_gallery(subject, measured):
    arrays = measured[1]
    assert {"roc_photos", "gallery"} <= set(arrays)
    area = np.trapezoid(arrays["roc_photos"], dx=0.01)
    assert area == pytest.approx(table(measured[0])["ood_auroc", "photos", 0], abs=0.02)
    clean = subject.images("test", 20)[:1].numpy()
    assert arrays["gallery"].shape == (20, 3, 28, 28, 1)
    assert np.array_equal(arrays["gallery"][0, 1], clean[0])
    row = 1 + ALL_CORRUPTIONS.index("contrast")
    for k, severity in enumerate((1, 3, 5)):
        assert np.array_equal(arrays["gallery"][row, k], corrupt(clean, "contrast", severity)[0])


def test_without_the_extra_ones_the_mean_over_fifteen_is_the_same(subject, measured):
    value = table(measure(subject, **FEW, extra=False)[0])
    assert {key[1] for key in value if key[0] == "corrupted_accuracy"} == set(COMMON_CORRUPTIONS)
    assert value["corruption_error", "common", 0] == table(measured[0])["corruption_error", "common", 0]
    assert ("corruption_error_all", "all", 0) not in value


def test_inputs_change_with_the_image_sets(subject):
    both = inputs(subject, ood=("photos",), extra=False)
    assert both == inputs(subject, ood=("photos",), extra=False, n_ood=3)
    assert (
        len({both, inputs(subject, ood=("gaussian",), extra=False), inputs(subject, ood=("photos",), extra=True)}) == 3
    )
