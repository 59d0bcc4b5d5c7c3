"The dense CRF: equal to the originals' outputs, to the exact sum, and sane on anything."
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from wsss_nb.data.items import UNLABELLED, VOID, Dataset, InputError, Item
from wsss_nb.data.store import LabelStore, Maps, MapStore
from wsss_nb.refine.crf import (PRESETS, CRFSettings, agreement_labels, background_power, check_guide, crf_labels, crf_present,
                                crf_probabilities, label_probabilities, pseudo_mask, refine_store, segment_maps, with_background,
                                write_pseudo_masks)

GOLDEN = Path(__file__).parent / 'golden'
G = np.load(GOLDEN / 'pets_crf.npz', allow_pickle=False)
NO_PAIRS = CRFSettings(gaussian_compat=0, bilateral_compat=0)


# --- the originals' own outputs: exact, it is the same library ---

def test_probabilities_are_the_originals():
    np.testing.assert_array_equal(crf_probabilities(G['img'], G['probs'], 'psa'), G['crf_softmax_t10'])
    np.testing.assert_array_equal(crf_probabilities(G['img'], G['probs'], 'deeplab'), G['deeplab_crf'])


def test_scale_factor_divides_both_widths():
    want = G['crf_softmax_t10_sf2']
    np.testing.assert_array_equal(crf_probabilities(G['img'], G['probs'], replace(PRESETS['psa'], scale_factor=2)), want)
    np.testing.assert_array_equal(crf_probabilities(G['img'], G['probs'], PRESETS['psa'].scaled(.5)), want)
    assert not np.array_equal(want, G['crf_softmax_t10'])


@pytest.mark.parametrize('iterations', [1, 5, 10])
def test_labels_are_the_originals(iterations):
    got = crf_labels(G['img'], G['lab'], 2, settings=replace(PRESETS['irn'], iterations=iterations))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, G[f'crf_label_t{iterations}'])


def test_belief_and_number_of_labels_are_the_originals():
    np.testing.assert_array_equal(crf_labels(G['img'], G['lab'], 2, gt_prob=.9), G['crf_label_t10_gt0.9'])
    np.testing.assert_array_equal(crf_labels(G['img'], G['lab3'], 3), G['crf_label3_t10'])
    np.testing.assert_array_equal(crf_labels(G['img'], G['lab3']), G['crf_label3_t10'])


def test_label_unary_is_the_librarys():
    unary = -np.log(label_probabilities(G['lab'], 2)).reshape(2, -1)
    np.testing.assert_allclose(unary, G['unary_labels_gt0.7'], rtol=1e-6)


@pytest.mark.parametrize('threshold', [.05, .25, .3, .4])
def test_constant_background_is_the_originals(threshold):
    start = with_background(G['cam'][None], threshold).argmax(0)
    np.testing.assert_array_equal(start, G[f'argmax_bg{threshold}'])
    np.testing.assert_array_equal(crf_labels(G['img'], start, 2), G[f'crf_label_bg{threshold}_t10'])


@pytest.mark.parametrize('alpha', [4, 24, 32])
def test_power_background_is_the_originals(alpha):
    got = crf_probabilities(G['img'], with_background(G['cam'][None], alpha=alpha), 'psa')
    np.testing.assert_allclose(got, G[f'crf_with_alpha{alpha}'], rtol=1e-5, atol=1e-8)     # the last bit of a power depends on the processor


@pytest.mark.parametrize('fg, bg', [(.3, .05), (.4, .1), (.6, .2)])
def test_agreement_is_the_originals(fg, bg):
    want = np.load(GOLDEN / 'pets_seed1_crf_irlabel.npz', allow_pickle=False)[f'ir_fg{fg}_bg{bg}']
    np.testing.assert_array_equal(agreement_labels(G['img'], G['cam'][None], fg, bg), want)
    maps = Maps(np.array([3]), G['cam'][None])
    mask = pseudo_mask(G['img'], maps, (0, 0, 0, 2), 'agreement', threshold=fg, background=bg, fit_size=False)
    np.testing.assert_array_equal(mask, np.where(want == 1, 2, want))


def test_wrapped_guide_of_the_pets_system_reproduced():
    "T4: the original's guide is the normalised image, wrapped; with it we get the original's result, to the pixel."
    g = np.load(GOLDEN / 'pets_seed1_crf_guide.npz', allow_pickle=False)
    wrapped = (g['image'][0] * 255).astype(np.int64).astype(np.uint8).transpose(1, 2, 0)
    np.testing.assert_array_equal(wrapped, g['crf_uint8_image_as_original'])
    start = with_background(g['hr_cam'], .3).argmax(0)
    np.testing.assert_array_equal(crf_labels(wrapped, start, 2), g['calc_cam_crfs'][0])


def test_pseudo_mask_is_labels_then_crf():
    maps = Maps(np.array([1]), G['cam'][None])
    plain = partial(pseudo_mask, G['img'], maps, (0, 1), fit_size=False)
    np.testing.assert_array_equal(plain(threshold=.25), G['crf_label_bg0.25_t10'])
    np.testing.assert_array_equal(plain(method='threshold', threshold=.25), G['argmax_bg0.25'])
    np.testing.assert_array_equal(plain(alpha=4), G['crf_with_alpha4'].argmax(0))


# --- the exact sum over all pairs ---

def exact(image, p, s):
    n, h, w = p.shape
    position = np.stack(np.mgrid[:h, :w][::-1], -1).reshape(-1, 2) * s.scale_factor
    colour = image.reshape(-1, 3) / s.srgb

    def kernel(f):
        k = np.exp(-((f[:, None] - f[None])**2).sum(-1) / 2)
        d = k.sum(1)**-.5
        return d[:, None] * k * d

    k = s.gaussian_compat * kernel(position / s.gaussian_sxy)
    k = k + s.bilateral_compat * kernel(np.concatenate([position / s.bilateral_sxy, colour], 1))
    unary = -np.log(np.clip(p, 1e-5, 1)).reshape(n, -1)
    q = np.exp(-unary) / np.exp(-unary).sum(0)
    for _ in range(s.iterations):
        e = -unary + q @ k
        q = np.exp(e - e.max(0)) / np.exp(e - e.max(0)).sum(0)
    return q.reshape(p.shape)


@pytest.mark.parametrize('probabilities, preset', [('probs', 'psa'), ('probs', 'deeplab'), ('lab', 'irn'), ('lab3', 'irn')])
def test_agrees_with_the_exact_sum(probabilities, preset):
    x = G[probabilities]
    p = x if x.ndim == 3 else label_probabilities(x, x.max() + 1)
    agree = (crf_probabilities(G['img'], p, preset).argmax(0) == exact(G['img'], p, PRESETS[preset]).argmax(0)).mean()
    assert agree >= .98


# --- properties ---

@st.composite
def problem(draw, most_labels=4):
    n, h, w = draw(st.integers(1, most_labels)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    image = draw(arrays(np.uint8, (h, w, 3)))
    p = draw(arrays(np.float32, (n, h, w), elements=st.floats(0, 1, width=32)))
    return image, p


@settings(max_examples=60, deadline=None)
@given(problem(), st.sampled_from(sorted(PRESETS)))
def test_output_is_a_distribution(problem, preset):
    q = crf_probabilities(*problem, preset)
    assert q.shape == problem[1].shape and q.dtype == np.float32
    assert (q >= 0).all()
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(problem())
def test_without_pairs_nothing_changes(problem):
    image, p = problem
    floor = np.clip(p, 1e-5, 1)
    np.testing.assert_allclose(crf_probabilities(image, p, NO_PAIRS), floor / floor.sum(0), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(problem())
def test_uniform_stays_uniform(problem):
    image, p = problem
    np.testing.assert_allclose(crf_probabilities(image, np.full(p.shape, 1 / len(p))), 1 / len(p), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(problem(), st.randoms())
def test_order_of_labels_does_not_matter(problem, random):
    image, p = problem
    order = list(range(len(p)))
    random.shuffle(order)
    np.testing.assert_allclose(crf_probabilities(image, p[order]), crf_probabilities(image, p)[order], atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(arrays(np.uint8, (5, 6), elements=st.sampled_from([0, 1, 2, UNLABELLED, VOID])), st.floats(.05, .95))
def test_label_probabilities(labels, belief):
    p = label_probabilities(labels, 3, belief)
    np.testing.assert_allclose(p.sum(0), 1)
    for k in range(3): np.testing.assert_allclose(p[k][labels == k], belief)
    np.testing.assert_allclose(p[:, labels >= UNLABELLED], 1 / 3)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (2, 4, 4), elements=st.floats(0, 1, width=32)), st.floats(.5, 40), st.floats(0, 1))
def test_backgrounds(values, alpha, threshold):
    b = background_power(values, alpha)
    assert (b >= 0).all() and (b <= 1).all()
    assert (background_power(values, alpha * 2) <= b + 1e-6).all()
    np.testing.assert_array_equal(with_background(values, threshold).argmax(0) > 0, values.max(0) > np.float32(threshold))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from(['threshold', 'crf', 'agreement']), st.data())
def test_mask_holds_only_segments_of_its_maps(k, h, w, method, data):
    values = data.draw(arrays(np.float32, (k, h, w), elements=st.floats(0, 1, width=32)))
    keys = data.draw(st.permutations([1, 2, 3]))[:k]
    image = np.random.default_rng(0).integers(0, 256, (10, 13, 3), np.uint8)
    segment_of = (0, 5, 0, 5)
    mask = pseudo_mask(image, Maps(np.array(keys), values), segment_of, method)
    assert mask.shape == image.shape[:2] and mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, VOID} | {segment_of[t] for t in keys}
    if method != 'agreement': assert VOID not in mask


def test_potts_removes_a_lone_pixel():
    p = np.stack([np.full((15, 15), .7), np.full((15, 15), .3)])
    p[:, 7, 7] = .3, .7
    image = np.full((15, 15, 3), 90, np.uint8)
    assert not crf_probabilities(image, p).argmax(0).any()
    image[7, 7] = 255, 0, 0
    assert crf_probabilities(image, p, replace(PRESETS['psa'], gaussian_compat=0)).argmax(0)[7, 7] == 1


def test_border_moves_to_the_edge_of_the_image():
    "Map's border 3 pixels beside the image's: after the CRF it stands at the image's."
    image = np.zeros((24, 32, 3), np.uint8)
    image[:, 16:] = 200
    m = np.zeros((1, 24, 32), np.float32)
    m[..., 19:], m[..., 13:19] = .9, .31
    m[..., 13:16] = .35
    truth = np.arange(32)[None] >= 16
    before = pseudo_mask(image, Maps(np.array([1]), m), (0, 1), 'threshold') != truth
    after = pseudo_mask(image, Maps(np.array([1]), m), (0, 1), fit_size=False, settings='psa') != truth
    assert before.sum() == 24 * 3 and after.sum() == 0


def test_absent_classes_do_not_matter():
    p = np.zeros((21, 24, 32), np.float32)
    p[[0, 15]] = G['probs']
    got = crf_present(G['img'], p, 'psa')
    np.testing.assert_array_equal(got[[0, 15]], G['crf_softmax_t10'])
    assert not got[np.setdiff1d(np.arange(21), [0, 15])].any()
    assert (got.argmax(0) == crf_probabilities(G['img'], p, 'psa').argmax(0)).mean() > .99


def test_margin_only_adds_void():
    maps = Maps(np.array([1]), G['cam'][None])
    plain = pseudo_mask(G['img'], maps, (0, 1), alpha=4)
    shares = []
    for margin in (0., .2, .9, .999):
        mask = pseudo_mask(G['img'], maps, (0, 1), alpha=4, void_margin=margin)
        np.testing.assert_array_equal(mask[mask != VOID], plain[mask != VOID])
        shares.append((mask == VOID).mean())
    assert shares == sorted(shares) and shares[0] == 0 and 0 < shares[-1] < 1


def test_segments_merge_by_maximum():
    values = np.random.default_rng(0).random((3, 4, 4), np.float32)
    m = segment_maps(Maps(np.array([2, 1, 3]), values), (0, 1, 1, 4), (4, 4))
    np.testing.assert_array_equal(m.keys, [1, 4])
    np.testing.assert_array_equal(m.values, np.stack([values[:2].max(0), values[2]]))


def test_maps_of_no_segment_are_dropped():
    m = segment_maps(Maps(np.array([1, 2]), np.ones((2, 3, 3))), (0, 1, 0), (3, 3))
    np.testing.assert_array_equal(m.keys, [1])
    mask = pseudo_mask(np.zeros((3, 3, 3), np.uint8), Maps(np.array([2]), np.ones((1, 3, 3))), (0, 1, 0))
    assert not mask.any()


def test_widths_follow_the_longer_side():
    s = PRESETS['irn'].for_size(100, 250)
    assert s.scale_factor == 2 and s.for_size(500, 10).scale_factor == 2
    assert replace(s, scale_factor=1) == PRESETS['irn']


def test_maps_are_enlarged_as_torch_does():
    torch = pytest.importorskip('torch')
    values = np.random.default_rng(0).random((2, 5, 7), np.float32)
    want = torch.nn.functional.interpolate(torch.from_numpy(values)[None], (31, 44), mode='bilinear', align_corners=False)[0]
    got = segment_maps(Maps(np.array([1, 2]), values), (0, 1, 2), (31, 44)).values
    np.testing.assert_allclose(got, want, atol=1e-5)


# --- refusals ---

@pytest.mark.parametrize('image', [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 3), np.int64), [[0]], None])
def test_guide_must_be_uint8(image):
    with pytest.raises(TypeError, match='Undo the normalisation'): check_guide(image)
    with pytest.raises(TypeError): pseudo_mask(image, Maps(np.array([1]), np.ones((1, 2, 2))), (0, 1))


@pytest.mark.parametrize('shape', [(4, 4), (4, 4, 4), (3, 4, 4), (0, 4, 3)])
def test_guide_must_be_rgb(shape):
    with pytest.raises(ValueError, match='H×W×3'): check_guide(np.zeros(shape, np.uint8))


def test_broken_values_are_refused():
    image, p = np.zeros((4, 5, 3), np.uint8), np.full((2, 4, 5), .5)
    with pytest.raises(ValueError, match='differ in size'): crf_probabilities(image, np.full((2, 5, 4), .5))
    with pytest.raises(ValueError, match='NaN'): crf_probabilities(image, p * np.nan)
    with pytest.raises(ValueError, match='L×H×W'): crf_probabilities(image, p[0])
    with pytest.raises(ValueError, match='unknown CRF settings'): crf_probabilities(image, p, 'irnet')
    with pytest.raises(ValueError, match='label 3 is not among 0..2'): crf_labels(image, np.full((4, 5), 3), 3)
    with pytest.raises(ValueError, match='gt_prob'): crf_labels(image, np.zeros((4, 5), int), 2, gt_prob=1)
    with pytest.raises(ValueError, match='at least 2'): crf_labels(image, np.zeros((4, 5), int), 1)
    with pytest.raises(ValueError, match='map of tag 9'): pseudo_mask(image, Maps(np.array([9]), p[:1]), (0, 1))
    with pytest.raises(ValueError, match='NaN'): pseudo_mask(image, Maps(np.array([1]), p[:1] * np.nan), (0, 1))
    with pytest.raises(ValueError, match='above the foreground'): agreement_labels(image, p, .1, .2)


@pytest.mark.parametrize('wrong', [dict(srgb=0), dict(bilateral_sxy=-1), dict(iterations=-1), dict(iterations=2.5), dict(scale_factor=0),
                                   dict(gaussian_compat=float('nan'))])
def test_impossible_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): CRFSettings(**wrong)


# --- over a store ---

def make_view(folder, n=8, size=(24, 32)):
    rng = np.random.default_rng(0)
    items, maps = [], MapStore(folder / 'maps')
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f'photo {i}.png')
        items.append(Item(f'photo {i}', folder / f'photo {i}.png', tags=(1,)))
        maps.save(f'photo {i}', Maps(np.array([1]), rng.random((1, 3, 4), np.float32)))
    view = Dataset('tiny', ['cat'], items, {'train': [o.id for o in items]}).view('tags', 'train')
    return view, maps, LabelStore(folder / 'masks')


def contents(store): return {i: store.path(i).read_bytes() for i in store.ids()}


@pytest.mark.parametrize('workers', [1, 2])
def test_store_is_filled_as_one_by_one(tmp_path, workers):
    view, maps, labels = make_view(tmp_path)
    assert write_pseudo_masks(view, maps, labels, workers=workers, alpha=4) == []
    for item in view:
        want = pseudo_mask(np.array(Image.open(item.image)), maps.load(item.id), (0, 1), alpha=4)
        np.testing.assert_array_equal(labels.load(item.id), want)


def test_finished_masks_are_kept(tmp_path):
    view, maps, labels = make_view(tmp_path)
    labels.save('photo 2', np.full((24, 32), 7, np.uint8))
    assert write_pseudo_masks(view, maps, labels, workers=1) == []
    assert (labels.load('photo 2') == 7).all()
    assert len(labels.ids()) == len(view)


def test_the_good_are_finished_and_the_bad_named(tmp_path):
    view, maps, labels = make_view(tmp_path)
    maps.path('photo 0').unlink()
    maps.path('photo 1').write_bytes(maps.path('photo 1').read_bytes()[:100])
    maps.save('photo 3', Maps(np.array([5]), np.ones((1, 2, 2))))
    np.savez(maps.path('photo 4'), keys=np.array([1]), values=np.full((1, 2, 2), np.nan, np.float16))    # a store refuses to save these
    view['photo 5'].image.write_bytes(b'not an image')
    view['photo 6'].image.unlink()
    failed = dict(write_pseudo_masks(view, maps, labels, workers=2))
    assert sorted(failed) == [f'photo {i}' for i in (0, 1, 3, 4, 5, 6)]
    assert all(i in str(e) for i, e in failed.items())     # each names its file
    assert 'tag 5' in str(failed['photo 3']) and 'NaN' in str(failed['photo 4'])
    assert labels.ids() == ['photo 2', 'photo 7']


def test_wrong_options_fail_before_the_run(tmp_path):
    view, maps, labels = make_view(tmp_path, 2)
    for wrong in (dict(settings='x'), dict(method='x'), dict(method='agreement', alpha=4), dict(method='agreement', void_margin=.1)):
        with pytest.raises(ValueError) as e: write_pseudo_masks(view, maps, labels, workers=1, **wrong)
        assert not isinstance(e.value, InputError)
    with pytest.raises(TypeError): write_pseudo_masks(view, maps, labels, workers=1, tresh=.3)
    assert labels.ids() == []


def refine_to_ones(image, maps): return np.ones(image.shape[:2], np.uint8)


def test_any_refiner(tmp_path):
    view, maps, labels = make_view(tmp_path, 3)
    assert refine_store(refine_to_ones, view, maps, labels, workers=1) == []
    assert all((labels.load(i) == 1).all() for i in view.ids)


def test_masks_are_never_opened(tmp_path):
    view, maps, labels = make_view(tmp_path, 3)
    assert all(o.mask is None for o in view)
    assert write_pseudo_masks(view, maps, labels, workers=1) == []


@pytest.mark.skipif(os.name != 'posix', reason='needs SIGKILL')
def test_killed_half_way_and_called_again(tmp_path):
    view, maps, labels = make_view(tmp_path, 40, size=(120, 160))
    whole = LabelStore(tmp_path / 'whole')
    assert write_pseudo_masks(view, maps, whole, workers=1) == []
    code = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_crf import *
        folder = Path({str(tmp_path)!r})
        items = [Item(f'photo {{i}}', folder / f'photo {{i}}.png', tags=(1,)) for i in range(40)]
        view = Dataset('tiny', ['cat'], items, {{'train': [o.id for o in items]}}).view('tags', 'train')
        write_pseudo_masks(view, MapStore(folder / 'maps'), LabelStore(folder / 'masks'), workers=1)""")
    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 120
    while len(labels.ids()) < 5 and child.poll() is None and time.time() < until: time.sleep(.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    made = contents(labels)
    assert 5 <= len(made) < 40, f'{len(made)} masks when killed'
    for i, png in made.items(): assert png == whole.path(i).read_bytes()
    assert write_pseudo_masks(view, maps, labels, workers=2) == []
    assert contents(labels) == contents(whole)
