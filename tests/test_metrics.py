"Metrics against the originals' outputs, scikit-learn, torchmetrics, and their own laws."
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score
from torchmetrics.classification import BinaryJaccardIndex, MulticlassConfusionMatrix, MulticlassJaccardIndex
from wsss_nb.evaluate.metrics import *

GOLDEN = Path(__file__).parent / 'golden'


def golden(name):
    with np.load(GOLDEN / name, allow_pickle=False) as z: return {k: z[k] for k in z}


# ---- the originals ------------------------------------------------------------------------------------------------------

def seed1():
    g = golden('pets_seed1_metrics.npz')
    truths = np.array([1, 0, 255], np.uint8)[g['trimap_minus1']]       # 0 pet, 1 background, 2 border
    return g, list(zip(g['pred'], truths))

@pytest.mark.parametrize('column', ['cam_', 'ecs_'])
def test_half_dice_is_the_original_cam_metric(column):
    g, pairs = seed1()
    np.testing.assert_allclose([half_dice(p, t) for p, t in pairs], g[f'{column}iou_dice'], rtol=1e-7, atol=1e-9)

@pytest.mark.parametrize('column', ['ccam_', 'crf_', 'unet_', 'class_specific_'])
def test_border_as_foreground_is_the_original_ccam_metric(column):
    g, pairs = seed1()
    m = with_border(np.stack([pair_counts(p, t, 2) for p, t in pairs]), 'foreground')
    np.testing.assert_allclose(np.stack([iou(m), dice(m)], 1)[..., 1], g[f'{column}iou_dice'], atol=1e-6)

def test_bana_metrics_are_those_of_the_authors():
    "Ours, the authors' and the reproduction's evaluator agree; its function `scores` leaves out classes that are only predicted, and comes to another figure."
    g = golden('bana_metrics.npz')
    n = len(g['conf'])
    m = sum(pair_counts(p, t, n) for p, t in zip(g['pred'], g['gt']))[:n]
    assert (m == g['conf']).all()
    s = scores(m)
    np.testing.assert_allclose([s['miou'], s['mean_accuracy'], s['pixel_accuracy'], s['frequency_weighted_iou']], [g[f'author_{k}'] / 100 for k in ('mIoU', 'mACC', 'pACC', 'fwIoU')], rtol=1e-6)
    np.testing.assert_allclose([s['miou'], s['mean_accuracy']], [g['re_eval_MIOU'], g['re_eval_MACU']], rtol=1e-6)
    np.testing.assert_allclose(iou(m)[:4], g['author_perIoU'][:4] / 100, rtol=1e-6)
    np.testing.assert_allclose(np.mean(iou(m)[m.sum(1) > 0]), g['re_scores_mIoU'], rtol=1e-6)

@pytest.mark.parametrize('policy,column', [('foreground', 'ref_iou_dice_fg02'), ('background', 'ref_iou_dice_fg0'), ('ignored', 'ref_iou_dice_fg0_ignore2')])
def test_border_policies_against_references(policy, column):
    g, pairs = seed1()
    for (p, t), want in zip(pairs, g[column]):
        m = with_border(pair_counts(p, t, 2), policy)
        np.testing.assert_allclose([iou(m)[1], dice(m)[1]], want, atol=1e-7)
        np.testing.assert_array_equal(pair_counts(p, apply_border(t, policy), 2)[:2], m)

def test_half_dice_is_half_of_dice():
    _, pairs = seed1()
    for p, t in pairs:
        right = dice(with_border(pair_counts(p, t, 2), 'background'))[1]
        assert half_dice(p, t)[0] == pytest.approx(right / 2, abs=1e-9)
        assert half_dice(p, t)[0] <= .5 and half_dice(p, t)[1] <= 2 / 3

def test_deeplab_pytorch_scores():
    g = golden('pets_deeplab_scores.npz')
    gt = np.where(g['gt'] == -1, 255, g['gt'])
    c = Confusion(int(g['n_class'])).add(g['pred'], gt)
    s, present = c.scores(), c.matrix.sum(1) > 0
    assert s['pixel_accuracy'] == pytest.approx(g['pixel_acc'])
    assert s['mean_accuracy'] == pytest.approx(g['mean_acc'])
    assert s['frequency_weighted_iou'] == pytest.approx(g['fwiou'])
    np.testing.assert_allclose(s['iou'][present], g['class_iou'][present])
    assert np.nanmean(s['iou'][present]) == pytest.approx(g['miou'])

def test_spml_counts():
    g = golden('spml_metric.npz')
    m = Confusion(21).add(g['pred'], g['gt']).matrix
    for name, ours in (('tp_fn', m.sum(1)), ('tp_fp', m.sum(0)), ('tp', m.diagonal())): np.testing.assert_array_equal(ours, g[name])
    seen = m.sum(0) + m.sum(1) > 0
    np.testing.assert_allclose(100 * iou(m)[seen], g['iou'][seen])
    assert np.isnan(iou(m)[~seen]).all()


# ---- outside references on random masks ---------------------------------------------------------------------------------

def random_pair(seed, n=6, shape=(4, 23, 31)):
    "Masks with void, one class absent from both, one predicted only, and one image without any object."
    rng = np.random.default_rng(seed)
    t, p = rng.integers(0, n - 2, shape, dtype=np.uint8), rng.integers(0, n - 1, shape, dtype=np.uint8)
    p = np.where(rng.random(shape) < .5, t, p)
    t[0], p[0] = 0, 0
    t[rng.random(shape) < .15] = 255
    return p, t

@pytest.mark.parametrize('seed', range(5))
def test_torchmetrics(seed):
    p, t = random_pair(seed)
    tp, tt = torch.from_numpy(p).long(), torch.from_numpy(t).long()
    c = Confusion(6)
    for a, b in zip(p, t): c.add(a, b)
    np.testing.assert_array_equal(c.matrix, MulticlassConfusionMatrix(6, ignore_index=255)(tp, tt).numpy())
    assert c.scores()['miou'] == pytest.approx(MulticlassJaccardIndex(6, ignore_index=255, average='macro')(tp, tt).item(), abs=1e-6)
    each = MulticlassJaccardIndex(6, ignore_index=255, average='none')(tp, tt).numpy()
    np.testing.assert_allclose(iou(c.matrix, empty=0), each, atol=1e-6)

@pytest.mark.parametrize('seed', range(5))
def test_scikit_learn(seed):
    p, t = random_pair(seed)
    ok, s = t != 255, Confusion(6).add(p, t).scores()
    np.testing.assert_array_equal(Confusion(6).add(p, t).matrix, confusion_matrix(t[ok], p[ok], labels=range(6)))
    np.testing.assert_allclose(np.nan_to_num(s['iou']), jaccard_score(t[ok], p[ok], labels=range(6), average=None, zero_division=0))
    np.testing.assert_allclose(np.nan_to_num(s['dice']), f1_score(t[ok], p[ok], labels=range(6), average=None, zero_division=0))
    np.testing.assert_allclose(s['pixel_accuracy'], (p[ok] == t[ok]).mean())
    np.testing.assert_allclose(s['miou'], s['iou'][:5].mean())           # 4 is predicted only: 0; 5 is nowhere: left out
    assert s['iou'][4] == 0 and np.isnan(s['iou'][5])

@pytest.mark.parametrize('seed', range(3))
def test_foreground_per_image_is_torchmetrics_binary(seed):
    p, t = random_pair(seed)
    for a, b in zip(p[1:], t[1:]):
        want = BinaryJaccardIndex(ignore_index=255)(torch.from_numpy((a > 0).astype(int)), torch.from_numpy(np.where(b == 255, 255, b > 0).astype(int)))
        assert iou(foreground(pair_counts(a, b, 6)[:6]))[1] == pytest.approx(want.item(), abs=1e-6)

def test_empty_masks():
    z, o = np.zeros((5, 5), np.uint8), np.ones((5, 5), np.uint8)
    one = lambda p, t: iou(pair_counts(p, t, 2)[:2])[1]
    assert np.isnan(one(z, z)) and one(o, z) == 0 and one(z, o) == 0 and one(o, o) == 1
    assert iou(pair_counts(z, z, 2)[:2], empty=1)[1] == 1
    s = scores(pair_counts(z, np.full_like(z, 255), 2)[:2])               # nothing but void
    assert all(np.isnan(v) for v in s.values())
    m = np.stack([pair_counts(p, t, 2)[:2] for p, t in ((z, z), (o, z), (o, o))])
    assert foreground_scores(m)['iou'].value == .5                        # the first is left out
    assert np.isnan(foreground_scores(m[:1])['iou']).all() and np.isnan(foreground_scores(m[:0])['dataset_iou']).all()


# ---- laws ---------------------------------------------------------------------------------------------------------------

masks = lambda n, void: arrays(np.uint8, (3, 7, 9), elements=st.sampled_from([*range(n)] + [255] * void))
pairs = st.tuples(masks(4, False), masks(4, True))

@given(pairs)
@settings(max_examples=60, deadline=None)
def test_range_and_dice(pt):
    m = Confusion(4).add(*pt).matrix
    j, d = iou(m), dice(m)
    assert ((j >= 0) & (j <= 1) | np.isnan(j)).all()
    np.testing.assert_allclose(d, 2 * j / (1 + j))
    assert m.sum() == (pt[1] != 255).sum()

@given(pairs)
@settings(max_examples=60, deadline=None)
def test_merge_is_all_at_once(pt):
    p, t = pt
    parts = [Confusion(4).add(a, b) for a, b in zip(p, t)]
    whole = Confusion(4).add(p, t)
    np.testing.assert_array_equal(parts[0].merge(*parts[1:]).counts, whole.counts)
    np.testing.assert_array_equal((parts[2] + parts[0] + parts[1]).counts, whole.counts)
    np.testing.assert_array_equal(parts[0].counts, pair_counts(p[0], t[0], 4))      # the parts are untouched

@given(pairs, st.permutations(range(4)))
@settings(max_examples=60, deadline=None)
def test_renaming_classes_renames_scores(pt, order):
    lut = np.full(256, 255, np.uint8); lut[:4] = order
    a, b = Confusion(4).add(*pt).scores(), Confusion(4).add(lut[pt[0]], lut[pt[1]]).scores()
    np.testing.assert_allclose(b['iou'][order], a['iou'])
    for k in ('miou', 'pixel_accuracy', 'mean_accuracy', 'frequency_weighted_iou'): np.testing.assert_allclose(a[k], b[k])

@given(pairs)
@settings(max_examples=40, deadline=None)
def test_foreground_joins_classes(pt):
    p, t = pt
    np.testing.assert_array_equal(foreground(pair_counts(p, t, 4)[:4]), pair_counts(p > 0, np.where(t == 255, 255, t > 0), 2)[:2])

@given(masks(2, False), masks(2, True))
@settings(max_examples=40, deadline=None)
def test_mean_dice_is_bounded_by_mean_iou(p, t):
    m = np.stack([pair_counts(a, b, 2)[:2] for a, b in zip(p, t)])
    s = foreground_scores(m, n=50)
    if not np.isnan(s['iou'].value): assert s['dice'].value <= 2 * s['iou'].value / (1 + s['iou'].value) + 1e-12
    for v in s.values():
        if not np.isnan(v.value): assert 0 <= v.low <= v.high <= 1

@given(arrays(np.float32, (6, 8), elements=st.floats(0, 1, width=16)), masks(3, True), st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=80, deadline=None)
def test_sweep_is_brute_force(values, truth, thresholds):
    truth, label = truth[0, :6, :8], (truth[1, :6, :8] % 2 + 1)
    got = threshold_counts(values, truth, thresholds, label, n_classes=3)
    for t, c in zip(thresholds, got): np.testing.assert_array_equal(c, pair_counts(np.where(values > t, label, 0), truth, 3))

def test_sweep_at_the_values_themselves():
    v = np.linspace(0, 1, 21, dtype=np.float32).reshape(3, 7)
    for t, c in zip(v.ravel(), threshold_counts(v, np.ones((3, 7), np.uint8), v.ravel())): assert c[1, 1] == (v > t).sum()
    many = threshold_counts(v, np.ones((3, 7), np.uint8), [.1, .3, .7])   # 0.3 and 0.7 have no exact float32
    assert many[:, 1, 1].tolist() == [(v > .1).sum(), (v > .3).sum(), (v > .7).sum()]


# ---- bootstrap ----------------------------------------------------------------------------------------------------------

def test_bootstrap_is_seeded_and_agrees_with_scipy():
    from scipy.stats import bootstrap as reference
    x = np.random.default_rng(1).beta(4, 2, 300)
    a, want = mean_interval(x, n=4000), reference((x,), np.mean, method='percentile', n_resamples=4000, rng=np.random.default_rng(2)).confidence_interval
    assert a == mean_interval(x, n=4000) and a != mean_interval(x, n=4000, seed=1)
    np.testing.assert_allclose(a[1:], [want.low, want.high], atol=.002)
    assert str(a) == f'{a.value:.3f} [{a.low:.3f}, {a.high:.3f}]' and f'{a:.1%}'.count('%') == 3

def test_resampled_blocks_do_not_change_the_sums():
    x = np.random.default_rng(0).integers(0, 9, (1500, 2))
    many = resampled(x, n=6000)                                           # more than one block
    assert many.shape == (6000, 2)
    np.testing.assert_allclose(many.mean(0), x.sum(0), rtol=.005)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(many[0], x[rng.integers(0, 1500, (2000, 1500))[0]].sum(0))


# ---- bad input ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('p,t,says', [
    (np.zeros((3, 3), np.uint8), np.full((3, 3), 7, np.uint8), r'truth holds \[7\]'),
    (np.zeros((3, 3), np.uint8), np.full((3, 3), 254, np.uint8), r'truth holds \[254\]'),
    (np.full((3, 3), 255, np.uint8), np.zeros((3, 3), np.uint8), r'prediction holds \[255\]'),
    (np.zeros((3, 4), np.uint8), np.zeros((3, 3), np.uint8), 'shape'),
    (np.zeros((3, 3), np.float32), np.zeros((3, 3), np.uint8), 'float32'),
    (np.full((3, 3), 256), np.zeros((3, 3), np.uint8), r'outside 0\.\.255'),
    (np.full((3, 3), -1), np.zeros((3, 3), np.uint8), r'outside 0\.\.255'),
])
def test_bad_masks(p, t, says):
    with pytest.raises(ValueError, match=says): pair_counts(p, t, 2)

def test_void_in_a_prediction_counts_where_it_is_told():
    p, t = np.array([[255, 255, 1]], np.uint8), np.array([[0, 1, 255]], np.uint8)
    np.testing.assert_array_equal(pair_counts(p, t, 2, void_as=0), [[1, 0], [1, 0], [0, 1]])
    with pytest.raises(ValueError, match='differ'): Confusion(2) + Confusion(3)


def test_counts_are_64_bit():
    "More pixels of one class than 32 bits hold: 2^33 of them, from the data set of a merge."
    one = Confusion(2).add(np.zeros((2, 4), np.uint8), np.zeros((2, 4), np.uint8))
    one.counts *= 2**30
    both = one + Confusion(2).add(np.ones((1, 1), np.uint8), np.ones((1, 1), np.uint8))
    assert both.matrix.tolist() == [[2**33, 0], [0, 1]] and both.scores()['miou'] == 1
