"Thresholds from maps alone: against scikit-image and brute force, and without any mask."
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.filters import threshold_otsu

from wsss_nb.data.pets import pets
from wsss_nb.data.sample import sample
from wsss_nb.data.store import Maps, MapStore
from wsss_nb.refine.threshold import RULES, area, choose_threshold, histogram, mixture, otsu, pooled_histogram, quantiles

tidy = settings(deadline=None, max_examples=30)


def two_groups(seed, low=.1, high=.7, part=.4, n=20000):
    rng = np.random.default_rng(seed)
    return np.clip(np.where(rng.random(n) < part, rng.normal(high, .08, n), rng.normal(low, .08, n)), 0, 1)


@tidy
@given(st.integers(0, 999), st.floats(.2, .8))
def test_otsu_is_scikit_images(seed, part):
    "Between the groups the variance is nearly flat, so the variances are compared and not the places."
    x = two_groups(seed, part=part)
    within = lambda t: np.var(x[x <= t]) * (x <= t).mean() + np.var(x[x > t]) * (x > t).mean() if 0 < (x > t).mean() < 1 else np.inf
    found = within(otsu(histogram(x)))
    assert found < within(threshold_otsu(x)) * 1.01
    assert found < min(map(within, np.linspace(.01, .99, 197))) * 1.01


@tidy
@given(st.integers(0, 999), st.floats(.02, .98), st.integers(1, 500))
def test_area_is_the_stated_part(seed, share, n):
    x = np.random.default_rng(seed).random(n)
    assert abs((x > area(histogram(x), share)).mean() - share) <= histogram(x).shares.max() + 1e-6
    q = np.sort(np.random.default_rng(seed + 1).random(9))
    assert (np.diff(quantiles(histogram(x), q)) >= 0).all()


@pytest.mark.parametrize('part', [.2, .4, .6])
def test_mixture_finds_the_valley(part):
    "Equal widths: the crossing is at the middle, moved by the log of the ratio of the parts."
    t = mixture(histogram(two_groups(0, part=part)))
    assert abs(t - (.4 + .08**2 / .6 * np.log((1 - part) / part))) < .03


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('values', [np.zeros(50), np.ones(50), np.full(50, .3), np.r_[np.zeros(40), np.ones(10)], np.linspace(0, 1, 50)])
def test_poor_distributions_give_a_number(rule, values):
    assert 0 <= RULES[rule](histogram(values)) <= 1


def test_each_image_has_the_same_weight(tmp_path):
    store = MapStore(tmp_path)
    store.save('small', Maps([1], np.full((1, 2, 2), .95))); store.save('large', Maps([1, 2], np.stack([np.full((20, 20), .15), np.full((20, 20), .25)])))
    store.save('none', Maps([], np.zeros((0, 5, 5))))
    h = pooled_histogram(store, ['small', 'large', 'none'], 10)
    assert np.allclose(h.shares, np.eye(10)[[9, 2, 0]].mean(0))
    with pytest.raises(ValueError, match='no image'): pooled_histogram(store, [])


def test_no_mask_is_opened_and_the_order_does_not_matter(tmp_path):
    shutil.copytree(sample(profile='smoke')/'pets', tmp_path/'pets')
    shutil.rmtree(tmp_path/'pets'/'annotations'/'trimaps')
    view = pets(tmp_path/'pets', classes='breeds').view('tags', 'trainval')
    store, rng = MapStore(tmp_path/'maps'), np.random.default_rng(0)
    for o in view: store.save(o.id, Maps(o.tags, rng.random((1, 7, 7))))
    for rule in RULES: assert np.isclose(choose_threshold(store, view.ids, rule), choose_threshold(store, view.ids[::-1], rule), atol=1e-6)
    with pytest.raises(ValueError, match='otsu, mixture, area'): choose_threshold(store, view.ids, 'best')
    with pytest.raises(ValueError, match='between 0 and 1'): choose_threshold(store, view.ids, 'area', share=1.)
