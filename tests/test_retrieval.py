"Stage 2 of BANA: its own outputs, the plain formulation on enlarged features, properties over random features and boxes, whole views."
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsss_nb.data.items import Box, Dataset, Item
from wsss_nb.data.store import LabelStore
from wsss_nb.refine.crf import crf_probabilities
from wsss_nb.refine.retrieval import (
    BANA_CRF, OtherClasses, agreed, background_attention, box_maps, box_masks, box_pixels, box_unary, correlations, enlarge, interpolated_norm, prototypes,
    reduce_adjoint, retrieve, stage2_unary, write_box_masks)

GOLDEN = Path(__file__).parent/'golden'
tidy = settings(deadline=None, max_examples=25)


def golden(name):
    with np.load(GOLDEN/f'bana_{name}.npz', allow_pickle=False) as z: return {k: z[k] for k in z}


def run(z, **options):
    "Our stage 2 on the original's inputs, in the original's way."
    boxes = [Box(int(c), x0, y0, x1, y1) for x0, y0, x1, y1, c in z['boxes_long'].tolist()]
    f, w = torch.tensor(z['features_lowres'][0]), torch.tensor(z['cls_weight'][:, :, 0, 0])
    return retrieve(f, w, boxes, z['rgb'], background=z['bg_mask'][0] > 0, **dict(overlap='last', fit_size=False) | options)


def enlarged(features, size): return F.interpolate(features[None], size=size, mode='bilinear', align_corners=True)[0]


# The original's own outputs

@pytest.mark.parametrize('name', 'ab')
def test_masks_of_bana(name):
    z = golden(f'stage2_{name}')
    r = run(z)
    assert r.keys == tuple(sorted(set(z['gt_labels'].tolist())))
    for ours, theirs in ((r.u0, 'bg_attn'), (r.unary, 'unary'), (r.corr, 'corr_maps')): assert np.abs(ours - z[theirs]).max() < 1e-5, theirs
    assert np.abs(r.posterior - z['refined']).max() < 1e-4
    assert np.array_equal(r.y_crf, z['Y_crf']) and np.array_equal(r.y_ret, z['Y_ret'])
    assert np.array_equal(r.y_crf, z['re_Y_crf']) and np.array_equal(r.y_ret, z['re_Y_ret'])
    assert r.y_crf.dtype == r.y_ret.dtype == np.uint8


@pytest.mark.parametrize('name', 'ab')
def test_pieces_of_bana(name):
    z = golden(f'stage2_{name}')
    f, w, size = torch.tensor(z['features_lowres'][0]), torch.tensor(z['cls_weight'][:, :, 0, 0]), z['rgb'].shape[:2]
    background = torch.tensor(z['bg_mask'][0] > 0)
    assert np.abs(background_attention(f, background).numpy() - z['bg_attn'][0]).max() < 1e-5
    pixels, keys = z['boxes_long'][:, [4, 0, 1, 2, 3]], sorted(set(z['gt_labels'].tolist()))
    maps = box_maps(enlarge(torch.einsum('kf,fhw->khw', w[keys], f), size).relu(), pixels, keys, 'last')
    assert np.abs(maps.numpy() - z['fg_unary']).max() < 1e-5
    first = torch.tensor(z['bg_unary'][0])
    assert np.abs(box_unary(first, torch.tensor(z['fg_unary']), background).numpy() - z['unary']).max() < 1e-6


@pytest.mark.parametrize('name', 'ab')
def test_reproduction_without_u0(name):
    z = golden(f'stage2_{name}')
    r = run(z, use_u0=False)
    assert np.abs(r.unary - z['re_unary_wo_u0']).max() < 1e-5
    outside = z['bg_mask'][0] > 0
    assert np.abs(r.unary[0] - z['re_normed_cam_bg'][0])[outside].max() < 1e-5
    assert np.array_equal(r.y_crf, z['re_Y_crf_wo_u0'])
    assert not r.u0.any()


@pytest.mark.parametrize('use_u0', [True, False])
def test_a_box_over_everything_gives_a_mask(use_u0):
    "The original's record is NaN and all background (trap T2)."
    z = golden('stage2_full')
    assert np.isnan(z['unary']).any() and not z['Y_crf'].any() and not z['Y_ret'].any()
    r = run(z, use_u0=use_u0)
    for m in (r.u0, r.unary, r.posterior, r.corr): assert np.isfinite(m).all()
    assert not r.u0.any()
    assert set(np.unique(r.y_crf)) <= {0, 12} and (r.y_crf == 12).mean() > .5
    assert set(np.unique(r.y_ret)) <= {0, 12} and (r.y_ret == 12).any()
    assert np.abs(r.unary[1] - np.exp(z['fg_unary'][0]) / (1 + np.exp(z['fg_unary'][0]))).max() < 1e-5     # no attention


def test_crf_of_bana():
    z = golden('dense_crf')
    s = BANA_CRF
    assert [s.bilateral_compat, s.bilateral_sxy, s.srgb, s.gaussian_compat, s.gaussian_sxy] == z['args_stage2'].tolist() and s.iterations == 10
    assert np.abs(crf_probabilities(z['image'], z['prob'], s) - z['Q_stage2']).max() < 1e-4


# Small grid against enlarged features

grids = st.tuples(st.integers(1, 7), st.integers(1, 7))
sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))


@tidy
@given(grids, sizes, st.integers(0, 999))
def test_norm_of_enlarged_features(grid, size, seed):
    f = torch.randn(33, *grid, generator=torch.Generator().manual_seed(seed)).relu()
    assert torch.allclose(interpolated_norm(f, size), enlarged(f, size).norm(dim=0), rtol=1e-5, atol=1e-5)


@tidy
@given(grids, sizes, st.integers(0, 999))
def test_reducing_is_the_adjoint_of_enlarging(grid, size, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, *grid, generator=g), torch.randn(2, *size, generator=g)
    assert torch.allclose((enlarged(x, size) * y).sum().double(), (x.double() * reduce_adjoint(y, grid)).sum(), rtol=1e-5, atol=1e-4)
    x.requires_grad_()
    outside = torch.autograd.grad((enlarged(x, size) * y).sum(), x)[0]      # torch's own adjoint
    assert torch.allclose(reduce_adjoint(y, grid).float(), outside, atol=1e-4)


@tidy
@given(grids, sizes, st.integers(0, 999))
def test_plain_formulation(grid, size, seed):
    g = torch.Generator().manual_seed(seed)
    f, w = torch.randn(16, *grid, generator=g).relu(), torch.randn(3, 16, generator=g)
    masks = torch.rand(3, *size, generator=g) > .6
    up = enlarged(f, size)
    means = torch.stack([up[:, m].mean(1) if m.any() else v for m, v in zip(masks, w)])
    assert torch.allclose(prototypes(f, masks, w), means, atol=1e-5)
    for v in (w, means):
        plain = F.cosine_similarity(up[None], v[:, :, None, None], dim=1).relu()
        sure = up.norm(dim=0) > 1e-3            # a cosine of nothing is arbitrary
        assert ((correlations(f, v, size) - plain).abs() * sure).max() < 1e-5
    q = means[0] if masks[0].any() else None
    u = background_attention(f, masks[0], threshold=0)
    assert not u.any() if q is None else ((u - F.cosine_similarity(up, q[:, None, None], dim=0).relu()).abs() * sure).max() < 1e-5


def plain_unary(f, w, boxes, size):
    "Steps 1 to 5 of BANA on enlarged features, written after the paper and not after our code."
    up, keys = enlarged(f, size), sorted({b[0] for b in boxes})
    background = torch.ones(size, dtype=torch.bool)
    for _, x0, y0, x1, y1 in boxes: background[y0:y1, x0:x1] = False
    u = F.cosine_similarity(up, up[:, background].mean(1)[:, None, None], dim=0).relu()
    u[u < .99 * u.max()] = 0
    u[background] = 1
    fg = torch.zeros(len(keys), *size)
    for c, x0, y0, x1, y1 in boxes:
        cam = (w[c][:, None, None] * up).sum(0).relu()[y0:y1, x0:x1]
        fg[keys.index(c), y0:y1, x0:x1] = cam / (cam.max() + 1e-12)
    p = torch.cat([u[None], fg])
    p[:, ~background] = p[:, ~background].softmax(0)
    return p


@pytest.mark.parametrize('seed', range(5))
def test_unary_of_the_plain_formulation(seed):
    g = torch.Generator().manual_seed(seed)
    f, w = torch.rand(16, 7, 9, generator=g), torch.randn(5, 16, generator=g)
    boxes = [(2, 3, 4, 30, 20), (4, 20, 10, 45, 38), (2, 10, 12, 25, 33)]
    size = (40, 50)
    _, ours = stage2_unary(f, w, np.array(boxes), ~box_masks(boxes, [2, 4], size).any(0), overlap='last')
    assert (ours - plain_unary(f, w, boxes, size)).abs().max() < 1e-5


# Properties

def boxes_in(h, w):
    "Boxes inside an image, from one pixel to the whole of it."
    def box(c, x, y): return Box(c, min(x), min(y), max(x) + 1, max(y) + 1)
    span = lambda n: st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))
    return st.lists(st.builds(box, st.integers(1, 3), span(w), span(h)), max_size=5)


@tidy
@given(boxes_in(12, 15), grids, st.integers(0, 999), st.sampled_from([0., 1e-30, 1e-6, 1., 1e6, 1e30]), st.booleans(), st.sampled_from(['max', 'last']))
def test_never_a_nan(boxes, grid, seed, scale, use_u0, overlap):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(5, *grid, generator=g).relu() * scale
    f[:, torch.rand(grid, generator=g) < .3] = 0         # places without any feature
    image = np.random.default_rng(seed).integers(0, 256, (12, 15, 3), np.uint8)
    r = retrieve(f, torch.randn(4, 5, generator=g), boxes, image, use_u0=use_u0, overlap=overlap)
    for m in (r.u0, r.unary, r.posterior, r.corr): assert np.isfinite(m).all() and m.min() >= 0 and m.max() <= 1 + 1e-5
    inside = np.zeros((12, 15), bool)
    for b in boxes: inside[b.ymin:b.ymax, b.xmin:b.xmax] = True
    present = {0, *(b.label for b in boxes)}
    for y in (r.y_crf, r.y_ret): assert not y[~inside].any() and set(np.unique(y)) <= present


@tidy
@given(boxes_in(12, 15).filter(bool), st.integers(0, 999), st.randoms())
def test_order_of_the_boxes_does_not_matter(boxes, seed, random):
    f = torch.rand(5, 4, 5, generator=torch.Generator().manual_seed(seed))
    w, image = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)), np.random.default_rng(seed).integers(0, 256, (12, 15, 3), np.uint8)
    other = random.sample(boxes, len(boxes))
    a, b = (retrieve(f, w, bs, image) for bs in (boxes, other))
    assert np.array_equal(a.unary, b.unary) and np.array_equal(a.y_crf, b.y_crf) and np.array_equal(a.y_ret, b.y_ret)


def test_the_last_box_wins_in_the_original():
    maps, pair = torch.arange(1., 9).repeat(1, 6, 1), np.array([[1, 0, 0, 5, 6], [1, 3, 0, 8, 6]])
    a, b = (box_maps(maps, p, [1], 'last')[0] for p in (pair, pair[::-1]))
    assert not torch.equal(a, b)
    assert torch.equal(box_maps(maps, pair, [1])[0], torch.maximum(a, b))


def test_a_box_of_one_pixel():
    r = retrieve(torch.rand(5, 4, 5), torch.rand(3, 5), [Box(2, 7, 3, 8, 4)], np.full((12, 15, 3), 90, np.uint8))
    assert r.unary[1, 3, 7] > .2 and np.isfinite(r.unary).all()
    assert (r.unary[1] > 0).sum() == 1 and set(np.unique(r.y_ret)) <= {0, 2}


def test_no_boxes():
    r = retrieve(torch.rand(5, 4, 5), torch.rand(3, 5), [], np.zeros((12, 15, 3), np.uint8))
    assert r.keys == () and not r.y_crf.any() and not r.y_ret.any() and r.unary.shape == r.corr.shape == (1, 12, 15)


def test_thousands_of_boxes():
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 10, (3000, 2))
    boxes = [Box(1 + k % 3, x, y, x + 2 + k % 3, y + 2) for k, (x, y) in enumerate(corner.tolist())]
    r = retrieve(torch.rand(5, 4, 5), torch.rand(4, 5), boxes, rng.integers(0, 256, (12, 15, 3), np.uint8))
    assert np.isfinite(r.unary).all() and r.keys == (1, 2, 3)


@pytest.mark.parametrize('box, said', [
    (Box(1, 20, 2, 30, 9), 'box 2 of 2 has no pixel'), (Box(1, -9, 2, 0, 9), 'has no pixel'), (Box(1, 5, 2, 5, 9), 'has no pixel'),
    (Box(1, 9, 2, 5, 9), 'has no pixel'), (Box(1, float('nan'), 2, 5, 9), 'has no pixel'), (Box(1, 2, 2, float('inf'), 9), 'has no pixel'),
    (Box(0, 1, 2, 5, 9), 'class 0'), (Box(4, 1, 2, 5, 9), 'class 4; classes are 1 to 3'), (Box(1.5, 1, 2, 5, 9), 'class 1.5')])
def test_impossible_boxes_are_named(box, said):
    with pytest.raises(ValueError, match=said): box_pixels([Box(1, 0, 0, 3, 3), box], (12, 15), 3)


def test_boxes_are_rounded_and_cut():
    "Truncation of a float that stands for a whole number makes it one too small (trap T10)."
    assert box_pixels([Box(1, 8.999999, 2.0000001, 30, 11.6)], (12, 15)).tolist() == [[1, 9, 2, 15, 12]]


def test_wrong_input_is_refused():
    image, f, w = np.zeros((12, 15, 3), np.uint8), torch.rand(5, 4, 5), torch.rand(3, 5)
    with pytest.raises(TypeError, match='uint8'): retrieve(f, w, [], image.astype(np.float32))
    with pytest.raises(ValueError, match='F×h×w'): retrieve(f[None], w, [], image)
    with pytest.raises(ValueError, match='do not fit'): retrieve(f, torch.rand(3, 6), [], image)
    with pytest.raises(ValueError, match='NaN'): retrieve(f * float('inf'), w, [], image)
    with pytest.raises(ValueError, match="'max' or 'last'"): retrieve(f, w, [Box(1, 0, 0, 3, 3)], image, overlap='first')


def test_agreement():
    assert agreed(np.uint8([[0, 1, 2]]), np.uint8([[0, 2, 2]])).tolist() == [[0, 255, 2]]


# A whole view

class Net(torch.nn.Module):
    "Colours as features."
    def __init__(self, n=3):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(n, 3, generator=torch.Generator().manual_seed(0)))
        self.seen = 0
    def features(self, x):
        self.seen += len(x)
        return F.avg_pool2d(x, 4).abs()


def view_of(folder, supervision='boxes'):
    rng, items = np.random.default_rng(0), []
    for k, boxes in enumerate([(Box(1, 2, 3, 12, 14),), (), (Box(2, 0, 0, 20, 16), Box(1, 4, 4, 9, 9)), None, (Box(2, 30, 0, 40, 5),), (Box(1, 1, 1, 5, 5),)]):
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8)).save(folder/f'{k}.png')
        items.append(Item(str(k), folder/f'{k}.png', tags=(), boxes=boxes))
    (folder/'5.png').write_bytes(b'no image')
    return Dataset('made', ['cat', 'dog'], items, {'train': [o.id for o in items]}, segment_classes=['animal'], segment_of=(0, 1, 1)).view(supervision, 'train')


@pytest.mark.parametrize('size, workers', [(16, 1), (None, 1), (16, None)])
def test_a_view_is_written_resumed_and_reported(tmp_path, size, workers):
    view, stores, net = view_of(tmp_path), [LabelStore(tmp_path/n) for n in ('crf', 'ret')], Net()
    bad = write_box_masks(net, view, *stores, size, bs=2, workers=workers)
    assert [i for i, _ in bad] == ['3', '4', '5']
    assert 'boxes are unknown' in bad[0][1] and '4.png' in bad[1][1] and 'no pixel in the image' in bad[1][1] and 'not a readable image' in bad[2][1]
    for s in stores:
        assert s.ids() == ['0', '1', '2']
        assert not s.load('1').any() and set(np.unique(s.load('2'))) <= {0, 1}       # no box: background; segment ids, not class ids
        assert s.load('2').shape == (16, 20)
    stores[1].path('0').unlink()
    kept, seen = stores[0].path('2').stat().st_mtime_ns, net.seen
    assert len(write_box_masks(net, view, *stores, size, bs=2, workers=1)) == 3
    assert stores[1].ids() == ['0', '1', '2'] and stores[0].path('2').stat().st_mtime_ns == kept and net.seen - seen == 3      # 0, and the two with bad boxes


def test_a_view_is_the_same_from_one_process_and_from_two(tmp_path):
    view = view_of(tmp_path)
    stores = [LabelStore(tmp_path/n) for n in 'abcd']
    write_box_masks(Net(), view, *stores[:2], 16, workers=1)
    write_box_masks(Net(), view, *stores[2:], 16, workers=2, bs=1)
    for a, b in zip(stores[:2], stores[2:]):
        for i in a.ids(): assert np.array_equal(a.load(i), b.load(i))


def test_the_whole_view_is_refused_before_any_work(tmp_path):
    view, stores, net = view_of(tmp_path), [LabelStore(tmp_path/n) for n in ('crf', 'ret')], Net()
    with pytest.raises(ValueError, match='for boxes, not for tags'): write_box_masks(net, view_of(tmp_path, 'tags'), *stores)
    with pytest.raises(ValueError, match='4 rows of weights; background and 2 classes need 3'): write_box_masks(Net(4), view, *stores)
    with pytest.raises(TypeError): write_box_masks(net, view, *stores, treshold=.5)
    with pytest.raises(ValueError, match="'max' or 'last'"): write_box_masks(net, view, *stores, overlap='first')
    assert net.seen == 0 and not stores[0].ids()


def test_classes_that_the_classifier_does_not_know():
    "Rows in the order of the other data set; an unknown class is what does not look like background, whatever the weights are."
    f, weight = torch.rand(4, 6, 8), torch.rand(3, 4)
    other = OtherClasses(SimpleNamespace(features=None, weight=weight), (0, 2, 0))
    assert torch.equal(other.weight, torch.stack([weight[0], weight[2], torch.zeros(4)]))
    image = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    r = retrieve(f, other.weight, [Box(2, 4., 4., 20., 18.)], image, threshold=0.)
    inside = np.zeros((24, 32), bool); inside[4:18, 4:20] = True
    given = 1 - r.u0[inside]
    want = torch.stack([torch.from_numpy(r.u0[inside]), torch.from_numpy(given / given.max())]).softmax(0)
    assert np.allclose(r.unary[:, inside], want, atol=1e-5) and np.isfinite(r.corr).all()
    known = retrieve(f, weight, [Box(2, 4., 4., 20., 18.)], image, threshold=0.)
    assert not np.allclose(known.unary, r.unary)
