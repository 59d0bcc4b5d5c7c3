"PerimeterFit: the original's arrays, the exact fill against Pillow, regions inside against both, stores and hostile files."
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import ndimage

from wsss_nb.data.sample import sample
from wsss_nb.data.store import LabelStore, Maps, MapStore
from wsss_nb.data.voc import voc
from wsss_nb.refine.perimeter import combine, original_flood, original_perimeterfit, perimeterfit, regions_inside, write_perimeterfit
from wsss_nb.refine.regions import original_paint, perimeters
from wsss_nb.refine.walk import EDGE, walk_maps, write_walks

GOLDEN = Path(__file__).parent/'golden'
tidy = settings(deadline=None, max_examples=60)
IMAGES = ['2007_000002', '2007_000003']
CASES = [(n, m) for n in IMAGES for m in ('slic', 'quick')]


def golden(name): return dict(np.load(GOLDEN/f'silop_perimeterfit_{name}.npz'))


# The original's arrays

@pytest.mark.parametrize('name, method', CASES)
def test_masks_of_the_original(name, method):
    z = golden(name)
    assert np.array_equal(255. * original_perimeterfit(z[f'uss_{method}_rgb'], z[f'pm_{method}'], z['hr_cam'], method), z[f'perimeterfit_{method}'])


@pytest.mark.parametrize('method', ['slic', 'quick'])
def test_masks_of_the_original_on_flat_regions(method):
    "The flood and the regions inside, both equal to the original where there is no noise."
    z = golden('flat')
    expected = z[f'perimeterfit_{method}'] > 0
    assert np.array_equal(original_perimeterfit(z['uss_rgb'], z['pm'], z['hr_cam'], method), expected)
    threshold, cut, within = (.05, 250, True) if method == 'slic' else (0, 200, False)
    values = np.concatenate([0 * z['hr_cam'][:1], z['hr_cam']])
    assert np.array_equal(perimeterfit(z['label'], values, threshold, z['pm'] > cut, within, border=False), expected)


@pytest.mark.parametrize('name', IMAGES)
def test_combined_maps_of_the_original(name):
    z = golden(name)
    masks = [z[f'perimeterfit_{m}'][1:] > 0 for m in ('slic', 'quick')]
    for key in ('hr_cam', 'cam'):
        got = combine(Maps(z['keys'][1:], z[key]), masks, normalise=None)
        assert np.abs(got.values - z[f'combined_{key}']).max() < 1e-5 and np.array_equal(got.keys, z['combined_keys'][1:])


# Properties

def pillow(picture, zero, tolerance=10, border=False, order=None):
    "Pillow's flood fill from each zero, in reading order or another."
    im, (h, w) = Image.fromarray(picture), zero.shape
    places = np.argwhere(zero[:h - 1 + border, :w - 1 + border])
    for y, x in places if order is None else places[order.permutation(len(places))]: ImageDraw.floodfill(im, (int(x), int(y)), (0, 0, 0), thresh=tolerance)
    return np.array(im).any(2)


seeds, sizes = st.integers(0, 2**32 - 1), st.integers(1, 14)

@tidy
@given(seeds, sizes, sizes, st.sampled_from([2, 6, 12, 25, 200]), st.sampled_from([0, 3, 10, 40]), st.booleans())
def test_the_exact_fill_is_pillows(seed, h, w, amplitude, tolerance, border):
    rng = np.random.default_rng(seed)
    picture = (rng.integers(0, 55, 3) + rng.integers(0, amplitude, (h, w, 3))).astype(np.uint8)
    zero, before = rng.random((h, w)) < rng.random(), picture.copy()
    assert np.array_equal(original_flood(picture, zero, tolerance, border), pillow(picture, zero, tolerance, border))
    assert np.array_equal(picture, before)


@pytest.mark.parametrize('row, kept', [
    ([(60, 60, 60), (60, 60, 60), (52, 64, 64), (60, 60, 60)], [False, False, True, True]),     # only the fourth form tells the third apart; it is no bridge
    ([(3, 3, 3), (60, 60, 60), (3, 3, 3)], [True, True, True]),             # nearly black is not filled
    ([(60, 60, 60), (66, 60, 60), (72, 60, 60)], [False, False, True])])    # compared with the seed, not with the neighbour
def test_what_a_fill_takes(row, kept):
    picture, zero = np.uint8([row]), np.arange(len(row))[None] == 0
    assert original_flood(picture, zero, border=True).tolist() == [kept] == pillow(picture, zero, border=True).tolist()


def test_perimeters_are_cut_at_250_or_200():
    "A stored perimeter of 230 counts for quickshift and not for SLIC."
    painted, stored, values = np.full((3, 4, 3), 200, np.uint8), np.full((3, 4), 230, np.uint8), np.ones((1, 3, 4), np.float32)
    values[0, 0, 0] = 0         # everything is washed away from here
    assert not original_perimeterfit(painted, stored, values, 'slic').any()
    assert original_perimeterfit(painted, stored, values, 'quick').all()


def drawn(seed, h, w, labels=5):
    "Random regions of a few pixels each and a random support."
    rng = np.random.default_rng(seed)
    regions = np.kron(rng.integers(0, labels, (-(-h // 3), -(-w // 3))), np.ones((3, 3), int))[:h, :w]
    return rng, regions.astype(np.uint8), np.maximum(0, rng.random((2, h, w)) - rng.random() * .2).astype(np.float32)


@tidy
@given(seeds, sizes, sizes, st.booleans())
def test_regions_inside_are_what_the_fill_leaves(seed, h, w, border):
    "On paintings without noise, and then the order of the seeds does not matter."
    rng, regions, values = drawn(seed, h, w)
    picture, got = original_paint(regions), perimeterfit(regions, values, .05, np.zeros((h, w), bool), border=border)
    for mask, v in zip(got, values):
        assert np.array_equal(mask, (original_flood(picture, v <= .05, border=border)) & (v > .05))
        assert np.array_equal(mask, (pillow(picture, v <= .05, border=border, order=rng)) & (v > .05))


@tidy
@given(seeds, sizes, sizes)
def test_regions_inside_by_brute_force(seed, h, w):
    _, regions, values = drawn(seed, h, w)
    mask = perimeterfit(regions, values)
    assert np.array_equal(mask & ~perimeters(regions), mask & ~perimeters(regions) & (values > .05))
    for m, v in zip(mask, values):
        expected = np.zeros((h, w), bool)
        for k in np.unique(regions):
            pieces, n = ndimage.label(regions == k)
            for i in range(1, n + 1): expected |= (pieces == i) & (v[pieces == i] > .05).all()
        assert np.array_equal(m, expected | (perimeters(regions) & (v > .05)))


@tidy
@given(seeds, sizes, sizes)
def test_what_does_not_matter(seed, h, w):
    "Names of regions, order of classes; more support never takes a region away."
    rng, regions, values = drawn(seed, h, w)
    mask = perimeterfit(regions, values)
    assert np.array_equal(perimeterfit(rng.permutation(5)[regions], values), mask)
    assert np.array_equal(perimeterfit(regions, values[::-1]), mask[::-1])
    assert (perimeterfit(regions, values + .1) >= mask).all() and (perimeterfit(regions, values, within=False) >= mask).all()
    assert perimeterfit(regions, values + 1).all() and not perimeterfit(regions, 0 * values).any()


@tidy
@given(seeds, sizes, sizes)
def test_combined_maps(seed, h, w):
    rng, _, values = drawn(seed, h, w)
    masks = [rng.random(values.shape) < .6 for _ in range(2)]
    m = Maps([2, 5], values)
    raw, half, top = (combine(m, masks, n).values for n in (None, 'half', 'max'))
    assert np.allclose(raw, values * np.where(masks[0] & masks[1], 2, 1)) and np.allclose(half * 2, raw)
    assert half.max(initial=0) <= 1 and np.allclose(top.max((1, 2)), (values.max((1, 2)) > 0))
    for a, b in zip(top, raw): assert np.array_equal(a.argmax(), b.argmax())
    assert np.array_equal(combine(m, masks[::-1]).values, half)


def test_the_last_row_and_column():
    regions, values = np.zeros((3, 4), int), np.ones((1, 3, 4), np.float32)
    values[0, 2, 3] = 0
    assert not perimeterfit(regions, values).any()
    assert perimeterfit(regions, values, within=False, border=False).all()      # the original's seed would be in the last row
    values[0, 1, 1] = 0
    assert not perimeterfit(regions, values, border=False).any()


# Images without classes, hostile input

def test_the_threshold_itself_is_zero():
    "A map is zero up to the threshold, the threshold included; 0 is zero."
    regions, values = np.array([[0, 0, 1, 1]]), np.array([[[.5, .6, .6, .7]]])
    none = np.zeros(regions.shape, bool)
    assert perimeterfit(regions, values, .5, none).tolist() == [[[False, False, True, True]]]
    assert perimeterfit(regions, values - .5, 0, none).tolist() == [[[False, False, True, True]]]


def test_an_image_without_classes():
    nothing = Maps([], np.zeros((0, 4, 6)))
    masks = [perimeterfit(np.zeros((8, 12), int), np.zeros((0, 8, 12)))] * 2
    assert masks[0].shape == (0, 8, 12)
    for n in (None, 'half', 'max'): assert combine(nothing, masks, n).values.shape == (0, 4, 6)
    assert original_perimeterfit(np.zeros((8, 12, 3), np.uint8), np.zeros((8, 12), np.uint8), np.zeros((0, 8, 12))).shape == (1, 8, 12)


def test_sizes_that_do_not_fit():
    regions, values = np.zeros((4, 6), int), np.zeros((1, 2, 3))
    with pytest.raises(ValueError, match='resize the maps'): perimeterfit(regions, values)
    with pytest.raises(ValueError, match='resize the map'): regions_inside(regions, values[0] > 0)
    with pytest.raises(ValueError, match='differ in size'): original_flood(np.zeros((4, 6, 3), np.uint8), values[0] > 0)
    with pytest.raises(ValueError, match='need masks of shape'): combine(Maps([1], values), [np.zeros((2, 4, 6))])
    with pytest.raises(ValueError, match='need masks of shape'): combine(Maps([1], values), [])
    with pytest.raises(ValueError, match='half'): combine(Maps([1], values), [values], 'sum')
    with pytest.raises(ValueError, match='slic'): original_perimeterfit(None, None, None, 'watershed')


@pytest.fixture
def filled(tmp_path):
    "A view of the sample with maps and two region maps for each item."
    view = voc(sample(profile='smoke')/'voc'/'VOC2012').view('tags', 'train')
    maps, regions, rng = MapStore(tmp_path/'maps'), [LabelStore(tmp_path/n) for n in 'ab'], np.random.default_rng(0)
    for o in view:
        maps.save(o.id, Maps(o.tags, rng.random((len(o.tags), 6, 8))))
        for r in regions: r.save(o.id, np.kron(rng.integers(0, 4, (6, 8)), np.ones((4, 4), int)).astype(np.uint8))
    return view, maps, regions


def test_only_the_combined_maps_are_stored(filled, tmp_path):
    "One file an image, arrays of plain numbers; and they are what the pieces give by hand."
    view, maps, regions = filled
    before, out = {p for p in tmp_path.rglob('*') if p.is_file()}, MapStore(tmp_path/'out')
    assert write_perimeterfit(view, maps, regions, out, (.3, .1), 'max', workers=1) == []
    assert {p for p in tmp_path.rglob('*') if p.is_file()} - before == {out.path(o.id) for o in view}
    for o in view:
        with np.load(out.path(o.id), allow_pickle=False) as z: assert (z['keys'].dtype, z['values'].dtype) == (np.int64, np.float16)
        labels, m = [r.load(o.id) for r in regions], maps.load(o.id)
        full = Maps(m.keys, np.array([cv2.resize(v, (32, 24)) for v in m.values]).reshape(-1, 24, 32))
        expected = combine(full, [perimeterfit(l, full.values, t) for l, t in zip(labels, (.3, .1))], 'max')
        assert np.allclose(out.load(o.id).values, expected.values, atol=1e-3)


def test_the_thresholds_belong_to_slic_and_quickshift(filled, tmp_path):
    "By default .05 for the first store and 0 for the second."
    view, maps, regions = filled
    for o in view: maps.save(o.id, Maps(o.tags, np.random.default_rng(2).choice([0, .04, .5, .9], (len(o.tags), 6, 8))))
    outs = [MapStore(tmp_path/n) for n in ('default', 'named', 'other')]
    for out, options in zip(outs, ({}, dict(thresholds=(.05, 0.)), dict(thresholds=(0., .05)))): assert write_perimeterfit(view, maps, regions, out, workers=1, **options) == []
    default, named, other = ([out.load(o.id).values for o in view] for out in outs)
    assert all(map(np.array_equal, default, named)) and not all(map(np.array_equal, default, other))


def test_the_walk_reads_the_maps_it_is_given(filled, tmp_path):
    "With or without PerimeterFit: both ways can be asked for, and they differ."
    view, maps, regions = filled
    edges, out, walked = MapStore(tmp_path/'edges'), MapStore(tmp_path/'out'), [MapStore(tmp_path/n) for n in ('plain', 'fitted')]
    for o in view: edges.save(o.id, Maps([EDGE], np.random.default_rng(1).random((1, 12, 16))))
    assert write_perimeterfit(view, maps, regions, out, (.3, .1), workers=1) == []
    for source, target in zip((maps, out), walked):
        assert write_walks(view, source, edges, target, workers=1, exp_times=2) == []
        for o in view: assert np.allclose(target.load(o.id).values, walk_maps(source.load(o.id), edges.load(o.id).values[0], exp_times=2).values, atol=1e-3)
    assert any(o.tags and not np.allclose(*(w.load(o.id).values for w in walked), atol=.01) for o in view)


def test_stores_resumed_and_bad_files_named(tmp_path):
    view = voc(sample(profile='smoke')/'voc'/'VOC2012').view('tags', 'train')
    maps, out, regions = MapStore(tmp_path/'maps'), MapStore(tmp_path/'out'), [LabelStore(tmp_path/n) for n in 'ab']
    rng = np.random.default_rng(0)
    for o in view:
        maps.save(o.id, Maps(o.tags, rng.random((len(o.tags), 6, 8)) * (rng.random((len(o.tags), 6, 8)) > .3)))
        for r in regions: r.save(o.id, np.kron(rng.integers(0, 4, (6, 8)), np.ones((4, 4), int)).astype(np.uint8))
    lost, torn, other = view[0].id, view[1].id, view[2].id
    kept = maps.load(lost); maps.path(lost).unlink()
    regions[0].path(torn).write_bytes(b'not a PNG')
    regions[1].save(other, np.zeros((5, 5), np.uint8))
    bad = dict(write_perimeterfit(view, maps, regions, out, workers=2))
    assert sorted(bad) == sorted([lost, torn, other]) and all(i in text for i, text in bad.items())
    assert 'no maps' in bad[lost] and 'not a readable mask' in bad[torn] and '(5, 5)' in bad[other]
    times = {i: out.path(i).stat().st_mtime_ns for i in out.ids()}
    maps.save(lost, kept)
    assert sorted(i for i, _ in write_perimeterfit(view, maps, regions, out, workers=1)) == sorted([torn, other])
    assert lost in out and all(out.path(i).stat().st_mtime_ns == t for i, t in times.items())
    for i in out.ids():
        m = out.load(i)
        assert m.values.shape[1:] == (24, 32) and 0 <= m.values.min() and m.values.max() <= 1 and tuple(m.keys) == view[i].tags
    with pytest.raises(ValueError, match='as many thresholds'): write_perimeterfit(view, maps, regions[:1], out)
    with pytest.raises(ValueError, match='half'): write_perimeterfit(view, maps, regions, out, normalise='sum')
