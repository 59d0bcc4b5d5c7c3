"Ensembles of maps: their properties over random maps, and whole stores."
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gmean

from wsss_nb.data.items import VOID, read_image
from wsss_nb.data.pets import pets
from wsss_nb.data.sample import sample
from wsss_nb.data.store import LabelStore, Maps, MapStore
from wsss_nb.refine.crf import pseudo_mask
from wsss_nb.refine.ensemble import ANY, WAYS, agreement, aligned, ensemble_maps, member_keys, write_agreement, write_ensemble

SEGMENTS = range(10)
tidy = settings(deadline=None, max_examples=40)


@st.composite
def maps(draw, size=None, general=True):
    "Maps of any size and keys, sometimes class-agnostic."
    h, w = size or (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    keys = [ANY] if general and draw(st.booleans()) else sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    return Maps(keys, rng.random((len(keys), h, w)) * draw(st.sampled_from([1, .5, 0])))


members = st.lists(maps(), min_size=2, max_size=4)
weights = st.lists(st.floats(.1, 5), min_size=4, max_size=4)


@tidy
@given(members, weights, st.booleans())
def test_product_mean_max(members, weights, normalise):
    kw = dict(weights=weights[:len(members)], tags=(2, 5), normalise=normalise)
    p, m, x = (ensemble_maps(members, how, **kw) for how in ('product', 'mean', 'max'))
    assert (p.values <= m.values + 1e-5).all() and (m.values <= x.values + 1e-5).all()
    size = tuple(max(v.values.shape[a] for v in members) for a in (1, 2))
    for v in (p, m, x):
        assert v.values.min() >= 0 and v.values.max() <= 1 and v.values.shape == (len(v.keys), *size)
        assert v.keys.tolist() == (sorted({k for q in members for k in q.keys.tolist()} - {ANY}) or [2, 5])


@tidy
@given(members, weights, st.sampled_from(list(WAYS)), st.randoms(use_true_random=False))
def test_order_does_not_matter(members, weights, how, random):
    order = list(range(len(members))); random.shuffle(order)
    a = ensemble_maps(members, how, weights[:len(members)], (1,))
    b = ensemble_maps([members[i] for i in order], how, [weights[i] for i in order], (1,))
    assert a.keys.tolist() == b.keys.tolist() and np.allclose(a.values, b.values, atol=1e-5)
    x, y = (agreement(m, SEGMENTS, (12, 10), tags=(1,)) for m in (members, [members[i] for i in order]))
    assert np.array_equal(x == VOID, y == VOID) and np.array_equal(x, y)


@tidy
@given(maps(), st.integers(2, 4), st.sampled_from(list(WAYS)))
def test_equal_maps_are_kept(one, n, how):
    same = ensemble_maps([one] * n, how, tags=(4,), normalise=False)
    expected = one.values if ANY not in one.keys else one.values[:1]
    assert np.allclose(same.values, expected, atol=1e-5)
    assert same.keys.tolist() == (one.keys.tolist() if ANY not in one.keys else [4])


@tidy
@given(maps(), maps(), st.floats(.05, .95))
def test_agreement(a, b, t):
    assert not (agreement([a, a], SEGMENTS, (9, 11), t, tags=(3,)) == VOID).any()
    both = agreement([a, b], SEGMENTS, (9, 11), t, tags=(3,))
    if ANY in a.keys or ANY in b.keys: return
    la, lb = (agreement([m, m], SEGMENTS, (9, 11), t) for m in (a, b))
    assert np.array_equal(both, np.where(la == lb, la, VOID))


@tidy
@given(st.lists(maps(size=(5, 6), general=False), min_size=2, max_size=4), weights)
def test_against_numpy_and_scipy(members, weights):
    members, a = [Maps([1], m.values[:1]) for m in members], np.array(weights[:len(members)])
    v = np.array([m.values for m in members], np.float64)
    assert np.allclose(ensemble_maps(members, 'mean', a, normalise=False).values, np.average(v, 0, a), atol=1e-5)
    assert np.allclose(ensemble_maps(members, 'max', a, normalise=False).values, reduce(np.maximum, v), atol=1e-5)
    if (v > 0).all(): assert np.allclose(ensemble_maps(members, 'product', a, normalise=False).values, gmean(v, 0, weights=np.broadcast_to(a[:, None, None, None], v.shape)), atol=1e-5)


def test_the_mask_of_one_member_is_the_threshold_mask():
    "Agreement of a map with itself is what `pseudo_mask` makes of it by threshold."
    rng = np.random.default_rng(1)
    m, image = Maps([2, 5], rng.random((2, 6, 7))), rng.integers(0, 256, (40, 30, 3), np.uint8)
    assert np.array_equal(agreement([m, m], SEGMENTS, (40, 30), .4), pseudo_mask(image, m, SEGMENTS, 'threshold', .4))


def test_a_general_object_agrees_with_any_class():
    "Also with the second class of an image, and it confirms the background only where it sees none."
    left, right, general = np.zeros((3, 1, 1, 4), np.float32)
    left[..., :2], right[..., 2:], general[..., 1:] = 1, 1, 1
    classes = Maps([1, 2], np.concatenate([left, right]))
    assert agreement([Maps([ANY], general), classes], SEGMENTS, (1, 4)).tolist() == [[VOID, 1, 2, 2]]
    with pytest.raises(ValueError, match='several classes'): agreement([Maps([ANY], general)] * 2, SEGMENTS, (1, 4), tags=(1, 2))
    assert not agreement([Maps([ANY], general)] * 2, SEGMENTS, (1, 4)).any()     # an image without tags has no object


def test_an_image_without_classes():
    empty = Maps([], np.zeros((0, 3, 4)))
    assert member_keys([empty, empty]) == [] and aligned([empty, empty], []).shape == (2, 0, 3, 4)
    for how in WAYS: assert ensemble_maps([empty, empty], how).values.shape == (0, 3, 4)
    assert not agreement([empty, empty], SEGMENTS, (5, 5)).any()


@pytest.mark.parametrize('weights', [(1,), (1, -1), (0, 0), (1, np.nan), (1, 1, 1)])
def test_impossible_weights(weights, tmp_path):
    m = Maps([1], np.ones((1, 2, 2)))
    with pytest.raises(ValueError, match='2 members need 2 weights'): ensemble_maps([m, m], weights=weights)
    with pytest.raises(ValueError, match='2 members need 2 weights'): write_ensemble([], [MapStore(tmp_path)] * 2, MapStore(tmp_path), weights=weights)


def test_stores_in_parallel_and_resumed(tmp_path):
    view = pets(sample(profile='smoke')/'pets', classes='breeds').view('tags', 'trainval')
    a, b, out, labels = MapStore(tmp_path/'a'), MapStore(tmp_path/'b'), MapStore(tmp_path/'out'), LabelStore(tmp_path/'masks')
    rng = np.random.default_rng(0)
    for o in view: a.save(o.id, Maps(o.tags, rng.random((1, 6, 6)))); b.save(o.id, Maps([ANY], rng.random((1, 9, 9))))
    lost = b.load(view[2].id); b.path(view[2].id).unlink()
    for write in (lambda: write_ensemble(view, [a, b], out, 'product', workers=2), lambda: write_agreement(view, [a, b], labels, (.3, .5), workers=2)):
        bad = write()
        assert [i for i, _ in bad] == [view[2].id] and 'no maps' in bad[0][1]
    times = {p: p.stat().st_mtime_ns for f in (out, labels) for p in f.folder.iterdir()}
    b.save(view[2].id, lost)
    assert write_ensemble(view, [a, b], out, 'product', workers=1) == write_agreement(view, [a, b], labels, (.3, .5), workers=1) == []
    assert len(out) == len(labels) == len(view) and all(p.stat().st_mtime_ns == t for p, t in times.items())
    for o in view:
        assert tuple(out.load(o.id).keys) == o.tags and labels.load(o.id).shape == read_image(o.image).shape[:2]
        assert set(np.unique(labels.load(o.id))) <= {0, 1, VOID}
    with pytest.raises(ValueError, match='mean, product, max'): write_ensemble(view, [a, b], out, 'sum')
