"""ECS in its three forms: against the original's arrays, against the plain classifier, and its properties."""
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.nn import functional as F

from wsss_nb.data.pets import pets
from wsss_nb.data.sample import sample
from wsss_nb.data.store import MapStore
from wsss_nb.data.voc import voc
from wsss_nb.localize.backbones import create_backbone
from wsss_nb.localize.cam import CamClassifier, cam, cam_learner, write_cams
from wsss_nb.localize.ecs import (ECS, FILLS, KeepingClassifier, blur, ecs_cam, ecs_learner, ecs_map_loss, ecs_target, erase,
                                  original_ecs_cam, pixel_labels, present_classes, score_map, second_look, train_ecs_classifier,
                                  write_ecs_cams)
from wsss_nb.localize.training import fit

GOLDEN = Path(__file__).parent/'golden'
CATS = {0, 5, 6, 7, 9, 11, 20, 23, 26, 27, 32, 33}      # class numbers of the cat breeds, from 0
MEAN_STD = (.485, .456, .406), (.229, .224, .225)


def arrays(name):
    with np.load(GOLDEN/name, allow_pickle=False) as z: return {k: z[k] for k in z}


class Small(nn.Module):
    "The stand-in backbone of the golden arrays: one 16×16 convolution with stride 16, ReLU."
    def __init__(self, weight):
        super().__init__()
        self.conv, self.num_features = nn.Conv2d(*weight.shape[1::-1], 16, stride=16, bias=False), len(weight)
        with torch.no_grad(): self.conv.weight.copy_(torch.tensor(weight))
    def forward_features(self, x): return self.conv(x).relu()


def classifier(conv, weight, bias):
    net = CamClassifier(Small(conv), len(weight))
    with torch.no_grad(): net.head.weight.copy_(torch.tensor(weight)), net.head.bias.copy_(torch.tensor(bias))
    return net


def normalised(images, mean=MEAN_STD[0], std=MEAN_STD[1]):
    mean, std = (torch.as_tensor(s, dtype=torch.float32).reshape(3, 1, 1) for s in (mean, std))
    return (torch.tensor(images).float() / 255 - mean) / std


@pytest.fixture(scope='module')
def eval_step():
    z = arrays('pets_seed1_cam_ecs.npz')
    return z, classifier(z['conv_weight'], z['fc_weight'], z['fc_bias']).eval(), normalised(z['images_u8'], z['mean'], z['std'])


# At evaluation

@pytest.mark.parametrize('i', [0, 1])
def test_surgery_of_the_pets_system(eval_step, i):
    z, net, x = eval_step
    maps, first, seen = original_ecs_cam(net, x[i:i + 1], (z['mean'].ravel(), z['std'].ravel()))
    c = int(z[f'cls{i}'])
    assert np.allclose(first[0, c].numpy(), z[f'cam{i}'], atol=1e-4)
    assert np.allclose(maps[0, c].numpy(), z[f'ecs_cam{i}'], atol=1e-4)
    far = np.abs(z[f'ecs_cam{i}'] - .05) > 1e-4
    assert (maps[0, c].numpy() > .05)[far].tolist() == (z[f'ecs_mask{i}'] > 0)[far].tolist()
    assert seen.region.any() and not torch.equal(maps, first)


def test_axes_by_hand(eval_step):
    "Both axes from the first and second map with plain numpy; they differ on these images."
    z, net, x = eval_step
    for axis in ('classes', 'rows'):
        maps, first, seen = original_ecs_cam(net, x, (z['mean'].ravel(), z['std'].ravel()), axis=axis)
        for i in range(2):
            m, again = first[i, int(z[f'cls{i}'])].numpy(), seen.again[i, int(z[f'cls{i}'])].numpy()
            score = again if axis == 'classes' else np.broadcast_to(again.max(0), m.shape)
            assert np.array_equal(maps[i, int(z[f'cls{i}'])].numpy(), np.where((score > .8) & ~(m > .5), again, m))
    by = {axis: original_ecs_cam(net, x, (z['mean'].ravel(), z['std'].ravel()), axis=axis)[0] for axis in ('classes', 'rows')}
    assert not torch.equal(by['classes'], by['rows'])


def test_no_reliable_place_is_cam(eval_step):
    z, net, x = eval_step
    for theta in (1., 2.): assert torch.equal(ecs_cam(net, x, scales=(1., 2.), theta=theta)[0], cam(net, x, (1., 2.))[0])
    old, first, _ = original_ecs_cam(net, x, theta=1.)
    assert torch.equal(old, first)


def test_a_map_that_is_nowhere_positive(eval_step):
    "Trap T13: NaN without the constant, zeros with it."
    z, net, x = eval_step
    dark = classifier(z['conv_weight'], -np.abs(z['fc_weight']), z['fc_bias']).eval()
    maps, _, seen = ecs_cam(dark, x, scales=(1.,))
    assert torch.equal(maps, torch.zeros_like(maps)) and not seen.region.any()
    assert original_ecs_cam(dark, x)[0].isnan().all()
    assert ecs_target(dark, x).isfinite().all() and ecs_target(dark, x, eps=0.).isnan().all()


def test_several_classes_and_none():
    "The score is the maximum over the classes present, and only those."
    maps = torch.rand(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    score = score_map(maps, present)
    assert torch.equal(score[0, 0], torch.maximum(maps[0, 0], maps[0, 2])) and torch.equal(score[1], maps[1, 1:2]) and not score[2].any()
    assert torch.equal(score_map(maps, present, 'rows')[0, 0], score[0, 0].max(0).values.expand(5, 6))
    with pytest.raises(ValueError, match='classes, rows'): score_map(maps, present, 'columns')
    seen = second_look(torch.rand(3, 3, 80, 96), maps, lambda x: maps.flip(1), present, delta=.5, theta=.8)
    assert seen.region.shape == (3, 1, 80, 96) and not (seen.reliable & (score > .5)).any() and not seen.region[2].any()


# Erasing

@settings(deadline=None, max_examples=30)
@given(st.integers(4, 40), st.integers(4, 40), st.floats(0, .5), st.sampled_from(list(FILLS)), st.integers(0, 99))
def test_erase(h, w, strength, fill, seed):
    g = torch.Generator().manual_seed(seed)
    x, region = torch.randn(2, 3, h, w, generator=g), torch.rand(2, 1, h, w, generator=g) > .5
    out = erase(x, region, fill, strength)
    assert torch.equal(torch.where(region, x, out), x)
    assert torch.equal(erase(x, torch.zeros_like(region), fill, strength), x)
    everything = erase(x, torch.ones_like(region), fill, strength)
    assert torch.equal(torch.where(region, everything, x), out) and out.isfinite().all()
    if fill == 'zero': assert not everything.any()
    if fill == 'mean': assert torch.allclose(everything, x.mean((2, 3), keepdim=True))
    assert everything.abs().max() <= x.abs().max() * (1 + 1e-5)
    assert torch.allclose(erase(x.flip(3), region.flip(3), fill, strength), out.flip(3), atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(8, 40), st.integers(8, 40), st.floats(.01, .3))
def test_blur_is_scipys(h, w, strength):
    x = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(h * w))
    sigma = strength * min(h, w)
    expected = x[0].numpy()
    for axis, n in ((1, h), (2, w)):
        kw = dict(mode='mirror', radius=min(int(np.ceil(4 * sigma)), n - 1))
        expected = np.stack([gaussian_filter(c, (sigma, 0) if axis == 1 else (0, sigma), **(kw | {'radius': (kw['radius'], 0) if axis == 1 else (0, kw['radius'])})) for c in expected])
    assert np.allclose(blur(x, strength)[0].numpy(), expected, atol=1e-4)


def test_strength_is_a_part_of_the_image_or_drawn():
    x, region = torch.rand(1, 3, 32, 32), torch.ones(1, 32, 32, dtype=torch.bool)
    torch.manual_seed(5); a = erase(x, region, strength=(.01, .2))
    torch.manual_seed(5); s = torch.empty(1).uniform_(.01, .2).item()
    assert torch.equal(a, erase(x, region, strength=s))
    big = F.interpolate(x, scale_factor=2, mode='nearest')
    small_then_big = F.interpolate(blur(x, .1), scale_factor=2, mode='nearest')
    assert (blur(big, .1) - small_then_big).abs().max() < .05 < (blur(big, .02) - small_then_big).abs().max()


@pytest.mark.parametrize('region', [torch.ones(2, 1, 8, 8), torch.ones(2, 3, 8, 8).bool(), torch.ones(1, 1, 8, 8).bool(), torch.ones(8, 8).bool()[None, :4]])
def test_wrong_regions_are_refused(region):
    with pytest.raises(ValueError, match='give a bool'): erase(torch.rand(2, 3, 8, 8), region)


# Training: the target for another network

@pytest.fixture(scope='module')
def train_step():
    z = arrays('pets_seed1_train_step.npz')
    w = {k.split('.', 1)[1]: z[k] for k in z if k.startswith('init.')}
    return z, w, normalised(z['images_u8'])


def stand_in(w):
    return classifier(w['backbone.init_model.conv.weight'], w['backbone.init_model.fc.weight'], w['backbone.init_model.fc.bias']).train()


def original_target(net, x):
    torch.manual_seed(100)
    return ecs_target(net, x, strength=(.1 / 224, 2 / 224), eps=0.)


def test_target_of_the_pets_system(train_step):
    z, w, x = train_step
    t = original_target(stand_in(w), x)
    assert t.shape == (3, 1, 14, 14) and np.allclose(t[:, 0].numpy(), z['ecs_target'], atol=1e-4)


def ccam_losses(f, p, alpha=.8):
    "CCAM's three terms, from the formulas."
    def unit(v): return F.normalize(v, dim=1)
    def similar(a, b): return (unit(a) @ unit(b).T).clamp(.0005, .9995)
    def pull(v):
        s = similar(v, v)
        rank = s.argsort(1, descending=True).argsort(1) - 1
        return ((-alpha * rank.float()).exp() * -s.log()).mean()
    fg, bg = ((q * f).mean((2, 3)) for q in (p, 1 - p))
    return pull(fg), -(1 - similar(bg, fg)).log().mean(), pull(bg)


def test_one_step_of_the_pets_systems_training(train_step):
    "CCAM with the second look as target and cross-entropy: losses and weights after one step."
    z, w, x = train_step
    net = stand_in(w)
    conv, bn = nn.Conv2d(6, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1)
    with torch.no_grad(): conv.weight.copy_(torch.tensor(w['ac_head.activation_head.weight']))
    opt = torch.optim.SGD([net.backbone.conv.weight, conv.weight], lr=1e-3, weight_decay=1e-3)
    f = net.backbone.forward_features(x)
    p = bn(conv(f)).sigmoid()
    terms = ccam_losses(f, p)
    for ours, name in zip(terms, ('l1', 'l2', 'l3')): assert np.isclose(ours.item(), z[name], atol=1e-5)
    term = ecs_map_loss(p, original_target(net, x))
    assert np.isclose(term.item(), z['loss_ecs'], atol=1e-5)
    species = torch.tensor([int(c not in CATS) for c in z['labels']])      # two labels on all outputs (trap T15)
    loss = sum(terms) + F.cross_entropy(net.head(f.mean((2, 3))), species) + term
    assert np.isclose(loss.item(), z['ecs_running_loss'], atol=1e-4)
    loss.backward(); opt.step()
    assert np.allclose(net.backbone.conv.weight.detach(), z['ecs_after.backbone.init_model.conv.weight'], atol=1e-6)
    assert np.allclose(conv.weight.detach(), z['ecs_after.ac_head.activation_head.weight'], atol=1e-6)
    assert np.allclose(bn.running_mean, z['ecs_after.ac_head.bn_head.running_mean'], atol=1e-6)


def test_true_classes_and_shapes(train_step):
    z, w, x = train_step
    net = stand_in(w)
    present = F.one_hot(torch.tensor([0, 1, 3]), 4).bool()
    t = ecs_target(net, x, present)
    first = net.maps(x)[0].relu()[present]
    first = first / (first.amax((1, 2), keepdim=True) + 1e-5)
    assert (t[:, 0] >= first).all() and t.max() <= 1 and not t.requires_grad
    with pytest.raises(ValueError, match='its target'): ecs_map_loss(t[:, 0], t)


def test_the_target_leaves_the_mode_alone():
    net = CamClassifier(create_backbone(pretrained=False), 3).train()
    net.backbone.blocks[0].eval()
    modes = [m.training for m in net.modules()]
    pixel_labels(net, torch.randn(2, 3, 64, 64), torch.rand(2, 3, 4, 4), torch.ones(2, 3).bool(), theta=.1)
    assert [m.training for m in net.modules()] == modes


# Training: the reading of ECS-Net

VIEWS = {
    'single-label': lambda: pets(sample(profile='smoke')/'pets', classes='breeds').view('tags', 'trainval'),
    'multi-label': lambda: voc(sample(profile='smoke')/'voc/VOC2012').view('tags', 'train'),
}


def after(learn, epochs=1, **kw):
    with learn.no_bar(), learn.no_logging(): fit(learn, epochs, 1e-3, seed=1, **kw)
    return torch.cat([v.flatten().float() for v in learn.model.state_dict().values()])


@pytest.mark.parametrize('kind', VIEWS)
def test_nothing_reliable_is_the_baseline_bit_for_bit(kind):
    view, small = VIEWS[kind](), dict(size=64, bs=4)
    plain = after(cam_learner(view, **small))
    assert torch.equal(after(ecs_learner(view, theta=1., start=0., **small)), plain)
    assert torch.equal(after(ecs_learner(view, theta=.3, start=1.1, **small)), plain)
    assert torch.equal(after(ecs_learner(view, theta=.3, start=0., weight=0., **small)), plain)
    changed = after(ecs_learner(view, theta=.3, start=0., **small))
    assert not torch.equal(changed, plain) and changed.isfinite().all()
    assert torch.equal(after(ecs_learner(view, theta=.3, start=0., **small)), changed)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    view, kw = VIEWS['single-label'](), dict(size=64, bs=4, theta=.3, start=.4)
    whole = after(ecs_learner(view, **kw), 2)
    from fastai.callback.core import Callback
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1: raise KeyboardInterrupt
    learn = ecs_learner(view, **kw); learn.add_cb(Stop())
    with pytest.raises(KeyboardInterrupt): after(learn, 2, path=tmp_path/'c.pth')
    assert torch.equal(after(ecs_learner(view, **kw), 2, path=tmp_path/'c.pth'), whole)


def test_pixel_loss_by_hand():
    "Features that are given, so that every map is known: the term is the mean of -log softmax on the reliable places."
    torch.manual_seed(0)
    w, erased = torch.rand(5, 3, 16, 16).numpy() - .5, []
    net = KeepingClassifier(classifier(w, np.float32(np.random.default_rng(0).standard_normal((4, 5))), np.zeros(4, np.float32)))
    x, y = torch.randn(3, 3, 64, 80), torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]).float()
    cb = ECS(3, delta=.5, theta=.4)
    eraser = cb.eraser
    cb.eraser = lambda images, region: erased.append((images, region)) or eraser(images, region)
    cb.learn = type('L', (), {'model': net})()
    net.train()(x)
    term = cb.pixel_loss(x, y)
    def scaled(images):
        m = net.maps(images)[0].detach().relu().numpy()
        low, high = m.min((2, 3), keepdims=True), m.max((2, 3), keepdims=True)
        return (m - low) / (high - low + 1e-5)
    score = lambda m, i: m[i, [c for c in range(3) if y[i, c]]]
    first, again = scaled(x), scaled(eraser(*erased[0]))
    scores, total, n = net.maps(x)[0] + net.head.bias[:, None, None], 0, 0
    for i in range(2):
        kinds = [c for c in range(3) if y[i, c]]
        for r, c in np.argwhere((score(again, i).max(0) > .4) & (score(first, i).max(0) <= .5)):
            total -= scores[i, :, r, c].log_softmax(0)[kinds[again[i, kinds, r, c].argmax()]].item(); n += 1
    assert n >= 3 and np.isclose(term.item(), total / n, rtol=1e-4)
    assert not erased[0][1][2].any()        # the third image has only the background output: nothing is erased
    term.backward()
    assert net.head.weight.grad.abs().sum() > 0 and net.backbone.conv.weight.grad.abs().sum() > 0


def test_classes_of_targets():
    assert present_classes(torch.tensor([0, 2, 3]), 4, 3).int().tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert present_classes(torch.tensor([[1., 0, 1]]), 3, 3).tolist() == [[True, False, True]]


def test_the_term_raises_the_reliable_places():
    "A few steps on one batch: the class score there rises more than without the term."
    view = VIEWS['single-label']()
    def gain(weight):
        learn = ecs_learner(view, size=64, bs=8, theta=.3, start=0., weight=weight, augment=False)
        x, y = (b.as_subclass(torch.Tensor) for b in learn.dls.train.one_batch())
        present, net = present_classes(y, len(view.classes), len(view.classes)), learn.model
        maps = cam(net.eval(), x, (1.,), False)[0]
        label = pixel_labels(net, x, maps, present, theta=.3)
        ok = label >= 0
        def score(): return net.maps(x)[0].log_softmax(1).gather(1, label.clamp(min=0)[:, None])[:, 0][ok].mean().item()
        before = score()
        with learn.no_bar(), learn.no_logging(): fit(learn, 2, 3e-3)
        net.eval()
        assert ok.any()
        with torch.no_grad(): return score() - before
    assert gain(5.) > gain(0.)


# Over a view

def test_store_is_that_of_cam_where_nothing_is_reliable(tmp_path):
    view = VIEWS['multi-label']()
    net = CamClassifier(create_backbone(pretrained=False), len(view.classes)).eval()
    kw = dict(size=64, scales=(1., 2.), bs=4)
    a, b, c = (MapStore(tmp_path/n) for n in 'abc')
    assert write_cams(net, view, a, **kw) == write_ecs_cams(net, view, b, theta=1., **kw) == write_ecs_cams(net, view, c, theta=.3, **kw) == []
    for o in view:
        m, n, k = a.load(o.id), b.load(o.id), c.load(o.id)
        assert tuple(m.keys) == tuple(n.keys) == tuple(k.keys) == o.tags and np.array_equal(m.values, n.values)
        assert 0 <= k.values.min() and k.values.max() <= 1
    assert any(not np.array_equal(a.load(i).values, c.load(i).values) for i in view.ids)


def test_broken_photos_are_listed_and_the_rest_is_done(tmp_path):
    shutil.copytree(sample(profile='smoke')/'pets', tmp_path/'pets')
    view = pets(tmp_path/'pets', classes='breeds').view('tags', 'trainval')
    view[1].image.write_bytes(b'\xff\xd8 no')
    net, store = CamClassifier(create_backbone(pretrained=False), len(view.classes)), MapStore(tmp_path/'maps')
    for choice in ('tags', 'predicted'):
        bad = write_ecs_cams(net, view, store, size=64, scales=(1.,), bs=4, choice=choice)
        assert [i for i, _ in bad] == [view[1].id] and view[1].image.name in bad[0][1] and len(store) == len(view) - 1
    times = {p: p.stat().st_mtime_ns for p in store.folder.iterdir()}
    write_ecs_cams(net, view, store, size=64, scales=(1.,), bs=4)
    assert {p: p.stat().st_mtime_ns for p in store.folder.iterdir()} == times


def test_masks_are_not_needed(tmp_path):
    shutil.copytree(sample(profile='smoke')/'pets', tmp_path/'pets')
    shutil.rmtree(tmp_path/'pets'/'annotations'/'trimaps')
    view = pets(tmp_path/'pets', classes='breeds').view('tags', 'trainval')
    learn = ecs_learner(view, size=64, bs=4, pretrained=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert write_ecs_cams(learn.model, view, MapStore(tmp_path/'maps'), size=64, scales=(1.,)) == []


def test_train_ecs_classifier_is_the_learner_fitted():
    view, kw = VIEWS['single-label'](), dict(size=64, bs=4, theta=.3, start=0.)
    learn = train_ecs_classifier(view, 1, 1e-2, seed=2, pretrained=False, **kw)
    other = ecs_learner(view, seed=2, pretrained=False, **kw)
    with other.no_bar(), other.no_logging(): fit(other, 1, slice(1e-3, 1e-2), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(learn.model.state_dict().values(), other.model.state_dict().values()))
    assert learn.model.features is None
