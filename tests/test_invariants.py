"""What must hold when a method mixes: every method with every kind of mixing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssl_samix.errors import ConfigError
from ssl_samix.models.backbone import Backbone
from ssl_samix.types import Batch, MixPlan
from tests.conftest import METHODS, MIXINGS, mixed_method

PAIRS = [(name, mixing) for name in sorted(METHODS) for mixing in sorted(MIXINGS)]
LEARNED = [(name, mixing) for name, mixing in PAIRS if mixing in ("samix", "samix_c")]
everywhere = pytest.mark.parametrize(("name", "mixing"), PAIRS)
learned = pytest.mark.parametrize(("name", "mixing"), LEARNED)
placements = pytest.mark.parametrize("placement", ["add", "replace"])


def batch(size=8):
    generator = torch.Generator().manual_seed(3)
    views = tuple(torch.randn(size, 3, 16, 16, generator=generator) for _ in range(2))
    return Batch(views, torch.full((size,), -1), torch.arange(size))


def terms_of(method, step=0, seed=5, images=None):
    torch.manual_seed(seed)
    with method.memory.step():
        return method.mixing(method, images or batch(), step, 10)


def with_gradient(module):
    return {n for n, p in module.named_parameters() if p.grad is not None}


def buffers(module):
    return {n: b.clone() for n, b in module.named_buffers()}


@everywhere
@placements
def test_encoder_losses_give_the_mixer_no_gradient(name, mixing, placement):
    method = mixed_method(name, mixing, placement=placement)
    losses = terms_of(method).losses
    sum(loss for term, loss in losses.items() if term != "mixer").backward()
    reached = with_gradient(method)
    assert {n for n in reached if n.startswith(("mixing.", "twin."))} == set()
    assert {n for n, _ in method.backbone.named_parameters()} <= {
        n.removeprefix("backbone.") for n in reached
    }
    assert ("own" in losses) == (placement == "add")


@learned
@placements
def test_mixer_losses_give_the_mixer_alone_a_gradient(name, mixing, placement):
    method = mixed_method(name, mixing, placement=placement)
    terms_of(method).losses["mixer"].backward()
    reached = with_gradient(method)
    assert reached == {n for n, p in method.named_parameters() if n.startswith("mixing.")}
    weights = dict(method.mixing.policy.named_parameters())
    # A bias in front of a softmax over keys or of BatchNorm has no effect: the others must have.
    for part in ("block.gamma", "block.query.weight", "block.key.weight", "block.value.3.weight"):
        assert weights[part].grad.abs().max() > 0, part


@learned
def test_a_negative_eta_turns_the_global_term_around(name, mixing):
    def gradient(eta):
        torch.manual_seed(0)
        method = mixed_method(name, mixing, eta=eta)
        terms_of(method).losses["mixer"].backward()
        return method.mixing.policy.block.value[3].weight.grad

    local = gradient(0.0)
    towards, away = gradient(0.5) - local, gradient(-0.5) - local
    assert towards.abs().max() > 1e-6
    torch.testing.assert_close(away, -towards, atol=1e-6, rtol=1e-2)


@learned
def test_mixers_pass_leaves_teacher_and_encoder_as_they_are(name, mixing):
    method = mixed_method(name, mixing)
    images = batch()
    torch.manual_seed(0)
    with method.memory.step():
        method.own_loss(images.views)
        method.mixing.mixtures(method, images, method.mixing.draw(images.views[0]), 0, 1)
        before = buffers(method)
        weights = {n: p.clone() for n, p in method.twin.named_parameters()}
        method.mixing.learn(method, images, 0.0).losses["mixer"].backward()
    for key, buffer in method.named_buffers():
        if not key.startswith("mixing."):
            assert torch.equal(buffer, before[key]), key
    for key, weight in method.twin.named_parameters():
        assert torch.equal(weight, weights[key]), key


@pytest.mark.parametrize("mixing", sorted(MIXINGS))
def test_a_batch_of_one_is_refused(mixing):
    method = mixed_method("moco", mixing).eval()
    with pytest.raises(ConfigError, match="at least 2"):
        terms_of(method, images=batch(1))


def fixed(method, plan):
    method.mixing.draw = lambda images: plan


@everywhere
def test_a_mixture_does_not_know_who_else_is_mixed(name, mixing):
    """With fixed normalisation, row 0's embedding depends on its own pair alone."""
    method = mixed_method(name, mixing).eval()
    images, seen = batch(), []
    for others in ([2, 3, 4, 5, 6, 7, 0], [0, 5, 6, 2, 3, 4, 2]):
        plan = MixPlan(torch.full((8,), 0.3), torch.tensor([1, *others]), torch.arange(8))
        with method.memory.step():
            mixed = method.mixing.mixtures(method, images, plan, 0, 1)
            seen.append((mixed.images[0], method.query(mixed.images)[0].detach()))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-4, atol=1e-5)


@everywhere
def test_mixtures_lie_between_their_parents(name, mixing):
    method = mixed_method(name, mixing)
    images = batch()
    plan = method.mixing.draw(images.views[0])
    with method.memory.step():
        mixed = method.mixing.mixtures(method, images, plan, 0, 1)
    own, other = images.views[0][plan.rows], images.views[1][plan.partner]
    low, high = torch.minimum(own, other), torch.maximum(own, other)
    assert ((mixed.images >= low - 1e-6) & (mixed.images <= high + 1e-6)).all()
    assert torch.equal(mixed.partner, plan.partner)
    assert mixed.lam.shape == (8,)
    assert mixed.lam.unique().numel() == 8, "one ratio per sample"


@everywhere
@placements
def test_bfloat16_agrees_with_float32(name, mixing, placement):
    # Statistics of a handful of random images would magnify every rounding.
    method, images = mixed_method(name, mixing, placement=placement), batch(64)
    state = {k: v.clone() for k, v in method.state_dict().items() if hasattr(v, "clone")}
    plain = terms_of(method, images=images)
    method.load_state_dict(state, strict=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = terms_of(method, images=images)
    assert plain.losses.keys() == low.losses.keys()
    for term, loss in plain.losses.items():
        # Cosines of SimSiam lie around 0: relative to their range there. Barlow Twins divides by
        # the standard deviation over the batch, which is small in an untrained network.
        scale = max(abs(loss.item()), 1.0) * (2 if name == "barlow_twins" else 1)
        assert abs(low.losses[term].item() - loss.item()) <= 1e-2 * scale, term


@everywhere
@placements
def test_same_seed_same_losses(name, mixing, placement):
    method = mixed_method(name, mixing, placement=placement).eval()
    first, second, third = (terms_of(method, seed=seed).losses for seed in (1, 1, 2))
    method.after_batch()
    assert all(torch.equal(first[term], second[term]) for term in first)
    assert first["mix"] != third["mix"]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_is_not_mixed_costs_what_it_costs_plain(name):
    """In place of the views, lam = 1 and a mask of zero is the method's own criterion."""
    method = mixed_method(name, "mixup", placement="replace").eval()
    images = batch()
    fixed(method, MixPlan(torch.ones(8), torch.arange(8).roll(1), torch.arange(8)))
    parents = torch.arange(8)[:, None]
    expected = torch.stack([
        method.pair_loss(method.query(images.views[q]), method.targets(images.views[k]), parents)
        for q, k in method.directions
    ]).mean()  # fmt: skip
    if name not in ("moco", "byol", "simsiam", "barlow_twins"):
        # The partner is left out of the negatives, though it has no share.
        parents = torch.stack([torch.arange(8), torch.arange(8).roll(1)], dim=1)
        expected = torch.stack([
            method.pair_loss(
                method.query(images.views[q]), method.targets(images.views[k]), parents
            )[:, 0]
            for q, k in method.directions
        ]).mean()  # fmt: skip
    torch.testing.assert_close(terms_of(method).losses["mix"], expected)
    method.after_batch()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_rows_outside_the_fraction_stay_plain(name):
    method = mixed_method(name, "mixup", placement="replace", fraction=0.25).eval()
    images, seen = batch(), []
    original = method.query
    method.query = lambda given: seen.append(given) or original(given)
    terms_of(method, images=images)
    queries = [given for given in seen if not any(given is view for view in images.views)]
    assert len(queries) == len(method.directions)
    for given, (first, _) in zip(queries, method.directions, strict=True):
        same = (given == images.views[first]).flatten(1).all(dim=1)
        assert same.tolist() == [False, True, True, True, False, True, True, True]


KINDS_OF_PAIRS = [
    # pairs, targets, view of the partner's pixels, view of its target
    ("cross", "shared", 1, 1),
    ("cross", "sibling", 1, 0),
    ("same", "shared", 0, 1),
    ("same", "sibling", 0, 1),
]
kinds_of_pairs = pytest.mark.parametrize(("pairs", "targets", "shown", "told"), KINDS_OF_PAIRS)


@pytest.mark.parametrize("name", sorted(METHODS))
@placements
@kinds_of_pairs
def test_each_parent_is_told_by_the_view_that_is_asked_for(
    name, placement, pairs, targets, shown, told
):
    """Mixtures that show one parent alone cost what it costs against that view of it."""
    method = mixed_method(name, "mixup", placement=placement, pairs=pairs, targets=targets).eval()
    method.directions = method.directions[:1]
    images = batch()
    partner = torch.arange(8).roll(1)
    parents = torch.stack([torch.arange(8), partner], dim=1)
    for lam, column, pixels, target in ((1.0, 0, 0, 1), (0.0, 1, shown, told)):
        fixed(method, MixPlan(torch.full((8,), lam), partner, torch.arange(8)))
        given = terms_of(method, images=images).losses["mix"]
        query = method.query(images.views[pixels][parents[:, column]])
        costs = [
            method.pair_loss(query, method.targets(view), parents)[:, column].mean()
            for view in images.views
        ]
        torch.testing.assert_close(given, costs[target])
        assert not torch.isclose(given, costs[1 - target], rtol=1e-5)
        method.after_batch()


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("mixing", ["mixup", "samix"])
@pytest.mark.parametrize(("placement", "chosen"), [("add", "cross"), ("replace", "same")])
def test_partners_are_of_the_same_view_where_views_are_replaced(name, mixing, placement, chosen):
    def losses(pairs):
        torch.manual_seed(0)
        method = mixed_method(name, mixing, placement=placement, pairs=pairs)
        return torch.stack(list(terms_of(method).losses.values())).detach()

    other = {"cross": "same", "same": "cross"}[chosen]
    torch.testing.assert_close(losses("auto"), losses(chosen), rtol=0, atol=0)
    assert ((losses("auto") - losses(other)).abs() > 1e-5).sum() >= (2 if mixing == "samix" else 1)


@kinds_of_pairs
def test_the_mixer_is_told_of_parents_by_the_same_views(pairs, targets, shown, told):
    method = mixed_method("simclr", "samix", pairs=pairs, targets=targets).eval()
    images, seen = batch(), []
    original = method.likeness
    method.likeness = lambda query, target, parents, temperature: (
        seen.append(target) or original(query, target, parents, temperature)
    )
    terms_of(method, images=images)
    expected = [1] if told == 1 else [1, 0]
    assert len(seen) == len(expected)
    for target, view in zip(seen, expected, strict=True):
        torch.testing.assert_close(target, method.targets(images.views[view]))


def count_passes(method):
    """Count images that pass the whole online and teacher backbones, and their third stages."""
    counted = {"online": 0, "teacher": 0, "maps": 0}

    def count(kind):
        def hook(_module, given, _output):
            counted[kind] += len(given[0])

        return hook

    branches = {"online": method.backbone}
    if method.twin is not None:
        branches["teacher"] = method.teacher[0]
    for branch, backbone in branches.items():
        backbone.trunk.layer4.register_forward_hook(count(branch))
        backbone.trunk.layer3.register_forward_hook(count("maps"))
    return counted


@pytest.mark.parametrize(
    ("name", "mixing", "settings", "passes"),
    [
        # images of a batch of 8 through: whole online encoder, whole teacher
        ("moco", "mixup", {}, (16, 8)),  # 1 plain + 1 mixed; keys
        ("moco", "mixup", {"placement": "replace"}, (8, 8)),  # what plain MoCo costs
        ("simclr", "mixup", {"placement": "replace"}, (16, 0)),  # what plain SimCLR costs
        ("byol", "mixup", {"placement": "replace"}, (16, 16)),  # what plain BYOL costs
        ("moco", "mixup", {"targets": "sibling"}, (16, 16)),  # keys of both views
        ("simclr", "mixup", {"targets": "sibling"}, (24, 0)),  # both are embedded anyway
        ("byol", "mixup", {"targets": "sibling"}, (24, 16)),
        (
            "simclr",
            "mixup",
            {"targets": "sibling", "placement": "replace", "pairs": "cross"},
            (24, 0),
        ),
        ("simclr", "mixup", {"targets": "sibling", "placement": "replace"}, (16, 0)),
        ("moco", "samix", {}, (16, 16)),  # keys, and the Mixer's own pass
        ("moco", "samix", {"placement": "replace"}, (8, 16)),
        ("moco", "samix", {"fraction": 0.5}, (12, 12)),
        ("simclr", "samix", {}, (24, 8)),
    ],
)
def test_placement_and_fraction_cost_what_they_say(name, mixing, settings, passes):
    method = mixed_method(name, mixing, **settings)
    counted = count_passes(method)
    terms_of(method)
    assert (counted["online"], counted["teacher"]) == passes


def maps_only(method, **settings):
    """Count images that pass a backbone as far as the Mixer's stage and no further."""
    counted = count_passes(method)
    terms_of(method, **settings)
    return counted["maps"] - counted["online"] - counted["teacher"]


@pytest.mark.parametrize(
    ("name", "features", "images"),
    [
        ("moco", "teacher", 8),  # the key encoder has seen view b, not view a
        ("moco", "online", 0),
        ("byol", "teacher", 0),  # the target encoder has seen both
        ("simclr", "teacher", 16),
        ("simclr", "online", 0),
    ],
)
def test_features_of_passes_that_happen_anyway_are_not_computed_again(name, features, images):
    assert maps_only(mixed_method(name, "samix", features=features)) == images


def test_keys_of_both_views_give_the_maps_of_both():
    assert maps_only(mixed_method("moco", "samix", features="teacher", targets="sibling")) == 0


def steps_that_move_the_mixer(method, count):
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    moved = []
    for step in range(count):
        before = [p.detach().clone() for p in method.mixing.parameters()]
        optimizer.zero_grad()
        sum(terms_of(method, step=step).losses.values()).backward()
        method.mixing.before_step()
        optimizer.step()
        method.after_batch()
        after = method.mixing.parameters()
        if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            moved.append(step)
    return moved


@learned
def test_the_mixer_rests_between_its_steps(name, mixing):
    method = mixed_method(name, mixing, update_every=3)
    assert steps_that_move_the_mixer(method, 7) == [0, 3, 6]


@everywhere
@placements
def test_outside_its_part_of_the_run_a_step_is_a_plain_one(name, mixing, placement):
    plain = METHODS[name](Backbone("resnet18", image_size=16, width=4))
    passes = count_passes(plain)
    with plain.memory.step():
        plain.own_loss(batch().views)
    method = mixed_method(name, mixing, placement=placement, during=[0.2, 0.5])
    mixes = []
    for step in range(10):
        counted = count_passes(method)
        losses = dict(terms_of(method, step=step).losses)
        mixes.append("mix" in losses)
        if not mixes[-1]:
            assert counted == passes
            assert losses.pop("own").requires_grad
            assert all(loss == 0 for loss in losses.values())  # the Mixer's
    assert mixes == [False] * 2 + [True] * 3 + [False] * 5


@learned
def test_the_mixer_learns_in_the_part_of_the_run_that_mixes(name, mixing):
    method = mixed_method(name, mixing, update_every=2, during=[0.2, 0.7])
    assert steps_that_move_the_mixer(method, 10) == [2, 4, 6]


@pytest.mark.parametrize("mixing", ["samix", "samix_c"])
@placements
def test_the_mask_is_of_the_pair_whose_pixels_are_mixed(mixing, placement):
    """Maps and pixels that name their own view and row."""
    method = mixed_method("moco", mixing, placement=placement)
    rows = torch.arange(8.0)[:, None, None, None]
    views = (rows.expand(8, 3, 16, 16), (rows + 100).expand(8, 3, 16, 16))
    images = Batch(views, torch.full((8,), -1), torch.arange(8))
    method.maps = lambda given, stage, source: given[:, :1, :4, :4].expand(-1, 16, -1, -1)
    asked = []

    class Spy(torch.nn.Module):
        value = 0.0

        def forward(self, own, partner, lam, size):
            asked.append((own[:, 0, 0, 0], partner[:, 0, 0, 0], lam))
            return torch.full((len(own), 1, size, size), self.value)

    spy = method.mixing.policy.block = Spy()
    method.mixing.plain = lambda plan, given: None
    for view, spy.value in enumerate((0.0, 1.0)):
        for attached in (False, True):
            plan = method.mixing.draw(images.views[0])
            maps = method.mixing.maps(method, *views)
            mix = method.mixing.policy.attached if attached else method.mixing.policy
            mixed = mix(*views, plan, maps)
            # A mask of 0 shows the image, of 1 the partner: the pixels name who it was.
            assert torch.equal(mixed.images[:, 0, 0, 0], asked[-1][view])
            assert torch.equal(asked[-1][0], plan.rows.float())
            assert torch.equal(asked[-1][1], plan.partner.float() + 100)
            assert torch.equal(asked[-1][2], plan.lam)


@pytest.mark.parametrize("mixing", sorted(MIXINGS))
def test_shuffled_batch_gives_the_shuffled_mixtures(mixing):
    method = mixed_method("byol", mixing).eval()
    images = batch()
    order = torch.tensor([3, 0, 6, 1, 7, 5, 2, 4])
    place = order.argsort()
    plan = method.mixing.draw(images.views[0])
    shuffled = MixPlan(plan.lam[order], place[plan.partner[order]], plan.rows)
    views = tuple(view[order] for view in images.views)
    with method.memory.step():
        straight = method.mixing.mixtures(method, images, plan, 0, 1)
        other = method.mixing.mixtures(method, Batch(views, order, order), shuffled, 0, 1)
    torch.testing.assert_close(other.images, straight.images[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.mask, straight.mask[order], rtol=1e-4, atol=1e-5)


def test_pairs_of_one_cluster_have_a_flat_mask():
    method = mixed_method("moco", "samix_c")
    torch.nn.init.normal_(method.mixing.policy.block.value[3].weight, std=5.0)
    images = batch()
    # ids are 0 1 2 0 1 2 0 1: rows 0 and 3 are of one cluster, 1 and 2 are not
    partner = torch.tensor([3, 2, 4, 5, 6, 7, 1, 0])
    plan = MixPlan(torch.full((8,), 0.25), partner, torch.arange(8))
    with method.memory.step():
        mask = method.mixing.mixtures(method, images, plan, 0, 1).mask
    assert torch.equal(mask[0], torch.full((1, 16, 16), 0.75))
    assert mask[1].std() > 1e-4


def test_lam_margin_makes_extreme_masks_flat_for_the_encoder_only():
    method = mixed_method("moco", "samix", lam_margin=0.1)
    torch.nn.init.normal_(method.mixing.policy.block.value[3].weight, std=5.0)
    images = batch()
    lam = torch.tensor([0.05, 0.95, 0.2, 0.8, 0.5, 0.5, 0.5, 0.5])
    plan = MixPlan(lam, torch.arange(8).roll(1), torch.arange(8))
    with method.memory.step():
        maps = method.mixing.maps(method, *images.views)
        encoder = method.mixing.policy(*images.views, plan, maps).mask
        own = method.mixing.policy.attached(*images.views, plan, maps).mask
    spread = encoder.flatten(1).std(dim=1)
    assert (spread[:2] == 0).all()
    assert (spread[2:] > 0).all()
    assert (own.flatten(1).std(dim=1) > 0).all()


@everywhere
def test_the_encoder_reads_mixtures_at_their_own_size(name, mixing):
    """Masks and pixels are of the views' size; what the encoder reads is shrunk afterwards."""
    method = mixed_method(name, mixing, size=0.5)
    made, read = [], []
    policy, query = method.mixing.policy, method.mixed_query
    policy.register_forward_hook(lambda module, given, mixed: made.append(mixed.images))
    method.mixed_query = lambda images: read.append(images) or query(images)
    losses = terms_of(method).losses
    (images,) = read
    assert images.shape == (8, 3, 8, 8)
    whole = made[0].detach()
    assert whole.shape == (8, 3, 16, 16)
    expected = F.interpolate(whole, (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(images, expected)
    sum(losses.values()).backward()
    assert not images.requires_grad
    if "mixer" in losses:
        assert any(p.grad.abs().sum() > 0 for p in method.mixing.parameters())


@pytest.mark.parametrize("mixing", ["mixup", "samix"])
@placements
def test_lam_can_be_what_the_teacher_sees(mixing, placement):
    """The mean of the ratio and of the softmax of both cosines over 0.2, parent by parent."""
    method = mixed_method("moco", mixing, placement=placement, pairs="same", lam="seen").eval()
    images, weights = batch(), []
    original = method.mixing.weights
    method.mixing.weights = lambda *given: (
        weights.append((given, original(*given))) or weights[0][1]
    )
    terms_of(method, images=images)
    (_, mixed, plan, _), found = weights[0]
    query = method.frozen_query(mixed.images)
    target = method.targets(images.views[1])
    for row, (image, partner) in enumerate(plan.parents.tolist()):
        own, other = ((query[row] @ target[k] / 0.2).exp().item() for k in (image, partner))
        expected = (mixed.lam[row].item() + own / (own + other)) / 2
        assert found[row].item() == pytest.approx(expected, abs=1e-4)
    assert not found.requires_grad


def test_lam_can_be_the_share_of_the_mask():
    method = mixed_method("moco", "samix", mask="paper", lam="mask")
    images = batch()
    with method.memory.step():
        plan = method.mixing.draw(images.views[0])
        mixed = method.mixing.mixtures(method, images, plan, 0, 1)
    torch.testing.assert_close(mixed.lam, 1 - mixed.mask.mean(dim=(1, 2, 3)))
    assert not torch.allclose(mixed.lam, plan.lam)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"stage": 9}, "no stage 9; its stages: 1, 2, 3, 4"),
        ({"alpha": 0.0}, "mixup.alpha must be"),
        ({"placement": "ad"}, "unknown mixup.placement 'ad': did you mean 'add'"),
        ({"features": "student"}, "unknown mixup.features"),
        ({"fraction": 0.0}, "mixup.fraction must be"),
        ({"during": [0.5]}, r"mixup.during must be \[from, to\]"),
        ({"during": [0.5, 0.5]}, "mixup.during must be"),
        ({"during": [0, 1.5]}, "mixup.during must be"),
        ({"during": ["a", 1]}, "mixup.during must be"),
        ({"during": 0.5}, "mixup.during must be .* got 0.5"),
        ({"update_every": 0}, "mixup.update_every must be"),
        ({"eta": -11.0}, "mixup.eta must be"),
        ({"lam": "image"}, "unknown mixup.lam"),
        ({"mask": "exakt"}, "unknown mixup.mask 'exakt': did you mean 'exact'"),
        ({"optimizer": "adamm"}, "unknown mixup.optimizer 'adamm': did you mean 'adam'"),
        ({"optimizer": "adamw", "lr": 0.0}, "mixup.lr must be a number at least 1e-08, got 0.0"),
        ({"lr": -1.0}, "mixup.lr must be"),
        ({"targets": "siblings"}, "unknown mixup.targets 'siblings': did you mean 'sibling'"),
    ],
)
def test_settings_are_checked(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        mixed_method("moco", "samix", **settings)


def test_a_mask_that_is_no_number_is_named_by_its_step():
    method = mixed_method("simclr", "samix", features="teacher")
    assert method.mixing.error_message() is None
    terms_of(method, step=6)
    assert method.mixing.error_message() is None
    with torch.no_grad():
        method.mixing.policy.block.query.weight[0, 0] = float("nan")
    for step in (7, 8):
        terms_of(method, step=step)
    assert "NaN in step 7" in method.mixing.error_message()


def test_clusters_are_no_buffers():
    """DDP sends every buffer in every step; clusters live on the CPU, where NCCL cannot."""
    method = mixed_method("moco", "samix_c")
    assert method.mixing.ids.shape == (64,)
    assert not {"mixing.ids", "mixing.centroids"} & dict(method.named_buffers()).keys()


@everywhere
@placements
def test_every_weight_learns_in_mixed_precision(name, mixing, placement):
    """Casts of weights that a pass without gradient has cached must not be those of the others."""
    method = mixed_method(name, mixing, placement=placement)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = terms_of(method).losses
    torch.stack(list(losses.values())).sum().backward()
    wanted = [*method.online.named_parameters(), *method.mixing.named_parameters()]
    assert [n for n, p in wanted if p.requires_grad and p.grad is None] == []


def test_simsiam_makes_no_pass_twice_where_mixtures_replace_the_views(monkeypatch):
    method = mixed_method("simsiam", "samix", placement="replace", features="online")
    made = []

    def counted(name):
        whole = getattr(method, name)

        def count(*given):
            made.append((name, torch.is_grad_enabled()))
            return whole(*given)

        return count

    for name in ("_online", "_only_maps"):
        monkeypatch.setattr(method, name, counted(name))
    terms_of(method)
    # Mixtures and targets of both views; maps of the first alone are wanted before its targets.
    passes = [("_online", False)] * 2 + [("_online", True)] * 2
    assert sorted(made) == sorted([*passes, ("_only_maps", True)])
