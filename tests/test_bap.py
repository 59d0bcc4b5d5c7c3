"Background-aware pooling against the original's arrays; odd boxes, odd backgrounds; a learner that opens no mask."
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from wsss_nb.data.boxes import BoxBatch
from wsss_nb.data.items import InputError
from wsss_nb.data.sample import sample
from wsss_nb.data.voc import voc
from wsss_nb.localize.bap import (CAFFE, Stage1, rate_groups, train_bap_sgd, BapClassifier, BapLoss, Rois, attention, bap_learner, bin_windows, boxes_on_map, cell_sums,
                                  corner_coordinates, fit_bap_head, grid_queries, load_bap, pad_for_grid, pool_boxes, roi_lengths,
                                  save_bap, train_bap)

GOLDEN = Path(__file__).parent/'golden'


def golden(name):
    with np.load(GOLDEN/f'bana_{name}.npz', allow_pickle=False) as z: return {k: torch.from_numpy(z[k]) for k in z if z[k].dtype.kind in 'fiub'}


class Plain(nn.Module):
    "A backbone that hands its input on."
    num_features = 16
    def forward_features(self, x): return x


# The original's arrays

@pytest.mark.parametrize('k', range(6))
def test_padding_as_recorded(k):
    g = golden('pad_for_grid')
    assert torch.equal(pad_for_grid(g[f'in{k}'], g[f'grid{k}'].item()), g[f'out{k}'])


@pytest.mark.parametrize('k', range(8))
def test_weighted_pooling_as_recorded(k):
    g = golden('weighted_avg_pool')
    x, w, bins = g[f'x{k}'], g[f'w{k}'], g[f'roi{k}'].item()
    h, l = x.shape[2:]
    whole = Rois(torch.eye(h)[None], torch.eye(l)[None], torch.tensor([h]), torch.tensor([l]), torch.tensor([0]))
    assert torch.allclose(pool_boxes(x, whole, w[:, 0], bins), g[f'out{k}'], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope='module')
def stage1(): return golden('bap_stage1')


def batch(g): return BoxBatch([g['bg_mask'][:, 0] > 0, g['boxes_px'][:, :4], g['boxes_px'][:, 4].long(), g['batch_id']])


def classifier(g, **options):
    net = BapClassifier(Plain(), 20, original=True, **options)
    with torch.no_grad(): net.head.weight.copy_(g['cls_weight'])
    return net


def test_queries_as_recorded(stage1):
    g = stage1
    queries, valid = grid_queries(g['features'], g['bg_mask'][:, 0])
    mask = F.interpolate(g['bg_mask'], (13, 13))
    assert torch.equal(pad_for_grid(mask, 4), g['padded_mask'])
    assert torch.equal(cell_sums(mask, 4)[..., 0], g['grid_bg'].flatten(1))
    assert torch.allclose(queries, g['bg_protos'][..., 0, 0], rtol=1e-5, atol=1e-6)
    assert torch.equal(valid.flatten().nonzero()[:, 0], g['valid_ids'])


def test_coordinates_as_recorded(stage1):
    g, t = stage1, golden('transforms')
    assert torch.allclose(corner_coordinates(g['boxes_px'][:, :4], 97), g['boxes_norm'][:, :4], atol=1e-7)
    assert torch.allclose(corner_coordinates(t['boxes'][:, [0, 2]], 80), t['norm_boxes'][:, [0, 2]], atol=1e-6)
    assert torch.allclose(corner_coordinates(t['boxes'][:, [1, 3]], 60), t['norm_boxes'][:, [1, 3]], atol=1e-6)
    rois = boxes_on_map(g['boxes_px'][:, :4], g['batch_id'], (97, 97), (13, 13), align_corners=False, original=True)
    assert (rois.n_rows[0], rois.n_cols[0]) == g['grid_box0'].shape[1:3]
    theirs = F.grid_sample(g['features'][:1], g['grid_box0'], align_corners=False)
    assert torch.allclose(rois.read(g['features'])[0, :, :rois.n_rows[0], :rois.n_cols[0]], theirs[0], atol=1e-5)


@pytest.mark.parametrize('aware, name', [(True, 'fg_protos'), (False, 'fg_protos_gap')])
def test_pooled_boxes_as_recorded(stage1, aware, name):
    g = stage1
    with torch.no_grad(): rows = classifier(g, background_aware=aware).samples(g['features'], batch(g))
    assert torch.allclose(rows[:20].unflatten(0, (5, 4)).mT.unflatten(2, (2, 2)), g[name], rtol=1e-5, atol=1e-5)


def test_logits_and_loss_as_recorded(stage1):
    g, loss, y = stage1, BapLoss(), batch(stage1)
    z = classifier(g)(g['features'], y)
    assert torch.allclose(z, g['logits'][..., 0, 0], rtol=1e-5, atol=1e-6)
    assert torch.equal(loss.targets(z, y), g['target'])
    assert torch.allclose(loss(z, y), g['loss'], rtol=1e-5)


def test_corners_aligned_differ_from_the_original(stage1):
    g = stage1
    net = classifier(g); net.original = False
    with torch.no_grad(): assert not torch.allclose(net.samples(g['features'], batch(g))[:20], g['fg_protos'].flatten(2).mT.flatten(0, 1), atol=1e-2)


# Against plain forms

@st.composite
def scenes(draw):
    h, w, size, n = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(2, 60)), draw(st.integers(1, 3))
    side = st.floats(0, size, width=32)
    boxes = draw(st.lists(st.tuples(side, side, side, side, st.integers(0, n - 1)), max_size=6))
    rows = torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d, _ in boxes]).reshape(-1, 4)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.rand(n, 5, h, w, generator=generator), rows, torch.tensor([b[4] for b in boxes]).long(), size, draw(st.integers(1, 5)), draw(st.integers(1, 3))


@settings(max_examples=30, deadline=None)
@given(scenes(), st.integers(0, 60))
def test_all_boxes_at_once_as_one_by_one(scene, edge):
    f, boxes, image, size, grid, bins = scene
    background = torch.zeros(len(f), size, size, dtype=torch.bool); background[:, :edge] = True
    queries, valid = grid_queries(f, background, grid)
    rois = boxes_on_map(boxes, image, (size, size), f.shape[2:])
    a, r = attention(f, queries, valid, rois), rois.read(f)
    pooled = pool_boxes(f, rois, 1 - a, bins)
    assert pooled.shape == (len(boxes), 5, bins, bins)
    for k in range(len(boxes)):
        h, w = rois.n_rows[k], rois.n_cols[k]
        one = r[k, :, :h, :w]
        assert torch.allclose(roi_lengths(f, rois)[k, :h, :w], one.norm(dim=0), atol=1e-5)
        q = F.normalize(queries[image[k]][valid[image[k]]], dim=1)
        plain = torch.einsum('jf,fhw->jhw', q, F.normalize(one, dim=0)).relu().mean(0) if len(q) else torch.zeros(h, w)
        assert torch.allclose(a[k, :h, :w], plain, atol=1e-5)
        assert one.min() >= f[image[k]].min() - 1e-5, 'nothing is read from outside of the map'
        if bins == 2 and min(h, w) > 1 and (1 - plain).min() > 1e-3:
            W = 1 - plain[None]
            assert torch.allclose(pooled[k], F.adaptive_avg_pool2d(W * one, 2) / F.adaptive_avg_pool2d(W, 2), atol=1e-4)


@pytest.mark.parametrize('align, original', [(True, False), (False, True)])
def test_reading_is_grid_sample(align, original):
    torch.manual_seed(0)
    f, boxes = torch.rand(1, 4, 7, 9), torch.tensor([[3., 5, 40, 31], [0, 0, 64, 48], [10, 8, 63, 47]])
    rois = boxes_on_map(boxes, torch.zeros(3).long(), (48, 64), (7, 9), align, original)
    for k, (x0, y0, x1, y1) in enumerate(boxes - (0 if original else torch.tensor([0., 0, 1, 1]))):
        x, y = (torch.linspace(a, b, n) for a, b, n in ((corner_coordinates(x0, 64), corner_coordinates(x1, 64), rois.n_cols[k]), (corner_coordinates(y0, 48), corner_coordinates(y1, 48), rois.n_rows[k])))
        points = torch.stack(torch.meshgrid(y, x, indexing='ij')[::-1], 2)[None]
        assert torch.allclose(rois.read(f)[k, :, :len(y), :len(x)], F.grid_sample(f, points, align_corners=align)[0], atol=1e-5)


def test_a_place_like_the_background_counts_nothing():
    "Left half of the map like the background above, right half at a right angle to it."
    f = torch.zeros(1, 16, 8, 8); f[:, 0] = 1; f[:, 0, 4:, 4:] = 0; f[:, 1, 4:, 4:] = 1
    background = torch.zeros(1, 64, 64, dtype=torch.bool); background[:, :30] = True
    y = BoxBatch([background, torch.tensor([[0., 36, 64, 64]]), torch.tensor([1]), torch.tensor([0])])
    aware, plain = (BapClassifier(Plain(), 3, roi=1, background_aware=b).samples(f, y)[0] for b in (True, False))
    assert aware[1] > .9 and aware[0] < .1 and plain[0] > .4        # one sample of seven lies between the halves


def test_the_gate():
    "An eighth of background is too little; then the plain average."
    torch.manual_seed(0)
    f, net = torch.rand(1, 16, 8, 8), BapClassifier(Plain(), 3)
    gap = BapClassifier(Plain(), 3, background_aware=False)
    for rows, same in ((8, True), (9, False)):
        background = torch.zeros(1, 64, 64, dtype=torch.bool); background[:, :rows] = True
        y = BoxBatch([background, torch.tensor([[0., 20, 64, 64]]), torch.tensor([1]), torch.tensor([0])])
        assert torch.equal(net.samples(f, y)[:4], gap.samples(f, y)[:4]) == same
        assert len(net.samples(f, y)) > 4, 'the queries stay examples'


def test_a_box_with_one_sample_is_read_in_its_middle():
    "A ramp of ten places on 100 pixels; the original reads at the upper left corner."
    f, box = torch.arange(10.).expand(1, 1, 10, 10), torch.tensor([[34., 34, 38, 38]])
    for original, x in ((False, 35.5), (True, 34.)):
        rois = boxes_on_map(box, torch.zeros(1).long(), (100, 100), (10, 10), original=original)
        assert rois.n_cols[0] == 1 and rois.n_rows[0] == 1
        assert torch.allclose(rois.read(f).flatten(), torch.tensor(x / 99 * 9), atol=1e-4)


def test_bins_without_a_sample_of_their_own():
    "Two samples for three bins: across the first is repeated, down the last, as in the original."
    f, box = torch.stack([torch.arange(10.).expand(10, 10), torch.arange(10.)[:, None].expand(10, 10)])[None], torch.tensor([[40., 40, 56, 56]])
    rois = boxes_on_map(box, torch.zeros(1).long(), (100, 100), (10, 10))
    assert rois.n_cols[0] == 2 and rois.n_rows[0] == 2
    across, down = pool_boxes(f, rois, torch.ones(1, 2, 2), 3)[0]
    lo, hi = 40 / 11, 5.
    assert torch.allclose(across[0], torch.tensor([lo, lo, hi]), atol=1e-4) and torch.allclose(down[:, 0], torch.tensor([lo, hi, hi]), atol=1e-4)


# Odd batches

def some(boxes, background=None, n=2):
    background = torch.ones(n, 32, 32, dtype=torch.bool) if background is None else background
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return BoxBatch([background, boxes, torch.ones(len(boxes)).long(), torch.arange(len(boxes)) % n])


NOTHING = torch.zeros(2, 32, 32, dtype=torch.bool)
ODD = {'no boxes': some([]), 'boxes everywhere': some([[0, 0, 32, 32]] * 2, NOTHING), 'neither': some([], NOTHING), 'a pixel': some([[31, 31, 32, 32], [0, 0, 1, 1]]),
       'less': some([[8.2, 8.2, 8.3, 8.3]]), 'no area': some([[8, 8, 8, 8]]), 'thousands': some([[k % 20, k % 17, k % 20 + 9, k % 17 + 11] for k in range(3000)])}


@pytest.mark.parametrize('original', [False, True])
@pytest.mark.parametrize('roi, grid', [(2, 4), (3, 1), (1, 5)])
@pytest.mark.parametrize('kind', ODD)
def test_odd_batches(kind, roi, grid, original):
    torch.manual_seed(0)
    y, f = ODD[kind], torch.rand(2, 16, 4, 5)
    f[0, :, :2] = 0                 # a part without any feature: no direction, no length
    f.requires_grad_()
    net, loss = BapClassifier(Plain(), 3, grid, roi, original=original), BapLoss(roi)
    z = net(f, y)
    value = loss(z, y)
    value.backward()
    assert len(z) >= roi**2 * len(y.boxes) and torch.isfinite(z).all() and torch.isfinite(f.grad).all()
    assert kind != 'neither' or (value == 0 and len(z) == 0)


def test_no_cells_is_refused():
    with pytest.raises(ValueError, match='grid=0'): grid_queries(torch.rand(1, 2, 4, 4), torch.ones(1, 8, 8), 0)


def test_windows_cover_every_sample():
    for n in range(1, 12):
        for bins in (1, 2, 3):
            w = bin_windows(torch.tensor([n]), bins, n)[0]
            assert (w.sum(1) > 0).all() and (n < bins or (w.sum(0) > 0).all())


# The learner

@pytest.fixture(scope='module')
def ds(tmp_path_factory):
    "The sample without its masks: training must not miss them."
    root = tmp_path_factory.mktemp('boxes')/'VOC2012'
    shutil.copytree(sample(profile='smoke')/'voc/VOC2012', root)
    for mask in (root/'SegmentationClass').iterdir(): mask.unlink()
    return voc(root)


SMALL = dict(size=64, bs=4, backbone='tf_efficientnet_lite0')


@pytest.mark.parametrize('aware', [True, False])
def test_training_twice_gives_the_same(ds, aware):
    view = ds.view('boxes', 'train')
    view = view.keep(lambda o: o.id in view.ids[:4])
    a, b = (train_bap(view, 1, head_epochs=2, background_aware=aware, **SMALL).model.state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    before = bap_learner(view, background_aware=aware, **SMALL).model.state_dict()
    assert not torch.equal(a['head.weight'], before['head.weight']) and not torch.equal(a['backbone.conv_head.weight'], before['backbone.conv_head.weight'])
    assert torch.equal(a['backbone.bn1.running_mean'].cpu(), before['backbone.bn1.running_mean']), 'normalisation stays'


def test_the_head_learns_and_the_network_is_kept(ds, tmp_path):
    view = ds.view('boxes', 'train')
    learn = bap_learner(view, grid=3, **SMALL)
    x, y = learn.dls.one_batch()
    learn.model.eval()
    before = learn.loss_func(learn.model(x, y), y).item()
    backbone = {k: v.clone() for k, v in learn.model.backbone.state_dict().items()}
    fit_bap_head(learn, 10, passes=1)
    assert learn.loss_func(learn.model(x, y), y).item() < before - .5
    assert all(torch.equal(v, backbone[k]) for k, v in learn.model.backbone.state_dict().items())
    save_bap(learn.model, tmp_path, dict(backbone='tf_efficientnet_lite0', output_stride=16, n_classes=20))
    net = load_bap(tmp_path)
    with torch.no_grad(): assert net.grid == 3 and torch.equal(net(x, y), learn.model.eval()(x, y))
    assert net.weight.shape == (21, 1280) and net.features(x).min() >= 0 and net(x).shape[1] == 21
    (tmp_path/'bap.json').write_text('{}')
    with pytest.raises(InputError, match='classifier of boxes'): load_bap(tmp_path)


# The published training

def test_rates_drop_after_five_eighths(ds):
    "A tenth of the rate from there on, twice for biases, ten times for the head; the statistics of batch normalisation stay."
    view = ds.view('boxes', 'train')
    view = view.keep(lambda o: o.id in set(view.ids[:8]))
    learn = train_bap_sgd(view, Stage1(lr=1e-3, iterations=8, drop=5), epochs=2, size=64, bs=1, backbone='tf_efficientnet_lite0')
    groups = {m: p for p, m in rate_groups(learn.model)}
    assert set(groups) == {1, 10} and sum(p.numel() for p in groups[10]) == learn.model.head.weight.numel()
    assert sum(len(p) for p in groups.values()) == sum(p.requires_grad for p in learn.model.parameters())
    assert np.allclose(learn.recorder.lrs[:10], 1e-2) and np.allclose(learn.recorder.lrs[10:], 1e-3)
    two = nn.ModuleDict({'backbone': nn.Linear(2, 3), 'head': nn.Linear(3, 2)})
    assert [(tuple(p.shape for p in ps), m) for ps, m in rate_groups(two)] == [(((3, 2),), 1), (((3,),), 2), (((2, 3),), 10), (((2,),), 20)]
    fresh = bap_learner(view, size=64, backbone='tf_efficientnet_lite0').model
    assert torch.equal(learn.model.backbone.bn1.running_mean.cpu(), fresh.backbone.bn1.running_mean)


def test_a_network_of_ones_own(ds):
    "It is used as it is."
    net = Plain()
    assert bap_learner(ds.view('boxes', 'train'), net, size=64).model.backbone is net


def test_caffe_is_the_mean_in_bgr_not_divided():
    photo, (mean, std) = torch.randint(0, 256, (1, 3, 4, 4)).float(), (torch.tensor(v).view(1, 3, 1, 1) for v in CAFFE)
    weight = torch.randn(2, 3, 1, 1)
    theirs = F.conv2d(photo.flip(1) - torch.tensor([104.008, 116.669, 122.675]).view(1, 3, 1, 1), weight)
    assert torch.allclose(F.conv2d((photo / 255 - mean) / std, weight.flip(1)), theirs, atol=1e-2)
