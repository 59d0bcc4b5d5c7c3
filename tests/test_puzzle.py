"""Puzzle-CAM against the original's arrays, its properties on any size, killed runs, and a folder without masks."""
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from wsss_nb.data.pets import pets
from wsss_nb.data.sample import sample
from wsss_nb.data.store import MapStore
from wsss_nb.data.voc import voc
from wsss_nb.localize import puzzle as module
from wsss_nb.localize.cam import CamClassifier, cam, cam_learner, load_classifier, save_classifier, train_classifier, write_cams
from wsss_nb.localize.ccam import PolySchedule
from wsss_nb.localize.puzzle import (Puzzle, alpha_at, cam_form, entropy, merge, nesterov_sgd, original_cams, puzzle_learner, puzzle_terms,
                                     reconstruction_loss, tile, train_puzzle)
from wsss_nb.localize.training import fit

GOLDEN = Path(__file__).parent/'golden'


def arrays(name):
    with np.load(GOLDEN/f'silop_{name}.npz', allow_pickle=False) as z: return {k: z[k] for k in z}


@pytest.fixture(scope='module')
def golden(): return {k: torch.tensor(v) for k, v in arrays('puzzle_losses').items()}


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return sample(tmp_path_factory.mktemp('sample')/'s', profile='smoke', workers=1)


@pytest.fixture(scope='module')
def view(folder): return voc(folder/'voc/VOC2012').view('tags', 'train')


def weights(learn): return torch.cat([v.flatten().float() for v in learn.model.state_dict().values()])


def silent(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return fit(learn, *args, **kwargs)


# The original's arrays

def test_pieces_of_the_original(golden):
    assert tile(golden['x']).equal(golden['tile4']) and merge(golden['tile4']).equal(golden['merge4'])
    assert tile(golden['tile9_in'].float(), 9).equal(golden['tile9']) and merge(golden['tile9'], 9).equal(golden['merge9'])


def test_cam_form_and_entropy(golden):
    assert torch.allclose(cam_form(golden['features']), golden['make_cam'], atol=1e-6)
    assert entropy(golden['tiled_logits'].sigmoid()).item() == pytest.approx(golden['entropy'].item(), rel=1e-5)


@pytest.mark.parametrize('level', ['feature', 'cam'])
@pytest.mark.parametrize('reconstruction', ['masking', 'selection', 'none'])
def test_losses(golden, reconstruction, level):
    total, own, again, distance, unsure, alpha = golden[f'loss_{reconstruction}_{level}'].tolist()
    y, maps, merged = golden['labels'], golden['features'], golden['re_features']
    whole = BCEWithLogitsLossFlat()(golden['logits'], y).item()
    ours = [t.item() for t in puzzle_terms(maps, merged, y, reconstruction=reconstruction, level=level)]
    weight = alpha_at(100, 1000, 4., .5)
    assert (whole, *ours, weight) == pytest.approx((own, again, distance, alpha), rel=1e-5)
    assert whole + ours[0] + weight * ours[1] + unsure == pytest.approx(total, rel=1e-5)


def test_alpha(golden):
    for it, a in zip(golden['alpha_its'].tolist(), golden['alpha_max1000_s05_a4'].tolist()): assert alpha_at(it, 1000, 4., .5) == pytest.approx(a)
    assert [alpha_at(k, 10, 3., 0) for k in (0, 9)] == [3, 3]


class Given(nn.Module):
    "Classifier whose maps are given: those of the whole for whole images, those of the pieces for more of them."
    def __init__(self, maps, tiles):
        super().__init__()
        self.known, self.head = {len(maps): maps, len(tiles): tiles}, nn.Linear(1, maps.shape[1])
        nn.init.zeros_(self.head.bias)
    def maps(self, x): m = self.known[len(x)] + 0 * self.head.weight.sum(); return m, m.mean((2, 3)) + self.head.bias
    def forward(self, x): return self.maps(x)[1]


@pytest.mark.parametrize('confidence', [0, 1.])
def test_callback_gives_the_losses_of_the_original(golden, confidence):
    "The callback's sum at step 100 of 1000, from the original's maps (its logits there are not the mean of its maps)."
    maps, merged, y = golden['features'], golden['re_features'], golden['labels']
    tiles = tile(merged)
    loader = DataLoader([(torch.zeros(3, 96, 96), v) for v in y], bs=2)
    learn = Learner(DataLoaders(loader, loader), Given(maps, tiles), loss_func=BCEWithLogitsLossFlat(), cbs=Puzzle(confidence=confidence))
    seen = []
    class Look(Callback):
        order = 50
        def before_batch(self): self.learn.epoch, self.learn.n_epoch, self.learn.n_iter, self.learn.iter = 3, 40, 25, 25
        def after_loss(self): seen.append(self.loss.item())
    learn.add_cb(Look())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    _, _, again, distance, _, alpha = golden['loss_masking_feature'].tolist()
    own = F.multilabel_soft_margin_loss(maps.mean((2, 3)), y).item()
    unsure = entropy(tiles.mean((2, 3)).sigmoid()).item()
    assert seen[0] == pytest.approx(own + again + alpha * distance + confidence * unsure, rel=1e-5)


def test_poly_optimizer():
    "Weight decay in the place of the momentum (T1), under the falling rate."
    z = arrays('polyopt')
    assert float(z['effective_momentum']) == float(z['effective_wd']) == 1e-4
    for momentum, same in ((1e-4, True), (.9, False)):
        p = nn.Parameter(torch.tensor(z['w0'], dtype=torch.float32))
        opt = nesterov_sgd([[p]], float(z['base_lr']), momentum, float(z['effective_wd']))
        schedule = PolySchedule([float(z['base_lr'])]); schedule.opt = opt
        trace = []
        for k in range(int(z['max_step'])):
            schedule._update_val(k / int(z['max_step']))
            assert opt.hypers[0]['lr'] == pytest.approx(z['lr'][k], rel=1e-6)
            opt.zero_grad(); ((p - float(z['target']))**2).sum().backward(); opt.step()
            trace.append(p.detach().clone())
        assert np.allclose(torch.stack(trace).numpy(), z['w'], atol=1e-6) == same


def test_sizes_of_the_original():
    class Flat(nn.Module):
        num_features = 2
        def forward_features(self, x): return F.avg_pool2d(x[:, :2], 16, ceil_mode=True)
    z, net = arrays('sizes'), CamClassifier(Flat(), 3).eval()
    for (h, w), low, up in zip(z['orig'], z['strided4'], z['up16']):
        a, b = original_cams(net, torch.rand(1, 3, int(h), int(w)), (1.,))
        assert a.shape == (3, *low) and b.shape == (3, h, w) and [-(-h // 16) * 16, -(-w // 16) * 16] == up.tolist()


# Cutting and merging

@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 4, 9, 16]), st.integers(1, 3), st.integers(1, 33), st.integers(1, 33), st.integers(1, 9))
def test_merge_undoes_tile(pieces, n, h, w, stride):
    x = torch.rand(n, 2, h, w)
    t, side = tile(x, pieces, stride), int(pieces**.5)
    assert len(t) == pieces * n and t.shape[2] % stride == t.shape[3] % stride == 0
    assert 0 <= side * t.shape[2] - h < side * stride and 0 <= side * t.shape[3] - w < side * stride     # no more than needed
    assert merge(t, pieces, (h, w)).equal(x) and merge(t, pieces)[..., h:, :].any() == merge(t, pieces)[..., w:].any() == False   # noqa: E712


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([4, 9]), st.integers(16, 120), st.integers(16, 120))
def test_merged_maps_lie_on_the_grid_of_the_whole(pieces, h, w):
    "A network without context gives the same map for the whole and for the pieces, at any size."
    x = torch.rand(2, 3, h, w)
    def maps(x): return F.avg_pool2d(F.pad(x, (0, -x.shape[3] % 16, 0, -x.shape[2] % 16)), 16)
    assert torch.allclose(merge(maps(tile(x, pieces, 16)), pieces, maps(x).shape[2:]), maps(x), atol=1e-6)


def test_pieces_that_do_not_fit():
    for pieces in (0, 2, -4, 5, 2.5):
        with pytest.raises(ValueError, match='square number'): tile(torch.rand(1, 1, 4, 4), pieces)
    with pytest.raises(ValueError, match='no whole number'): merge(torch.rand(7, 1, 2, 2))
    with pytest.raises(ValueError, match='4×4, 5×4 is wanted'): merge(torch.rand(4, 1, 2, 2), 4, (5, 4))


def test_gradient_passes_both_ways():
    a, b = (torch.rand(2, 5, 4, 4, requires_grad=True) for _ in range(2))
    reconstruction_loss(a, merge(tile(b)), torch.ones(2, 5)).backward()
    assert torch.allclose(a.grad, -b.grad) and a.grad.abs().min() > 0


# Losses

def test_masking_and_selection():
    "With K of C classes everywhere, masking is K/C of selection (T3); an image without tags counts as zero."
    a, b, y = torch.rand(3, 20, 4, 4), torch.rand(3, 20, 4, 4), torch.zeros(3, 20)
    y[:, [2, 5]] = 1
    args = a, b, y
    assert reconstruction_loss(*args).item() == pytest.approx(reconstruction_loss(*args, 'selection').item() * 2 / 20)
    y[0] = 0
    assert torch.isfinite(reconstruction_loss(*args, 'selection'))
    assert reconstruction_loss(*args, 'none', 'l2').item() == pytest.approx(((a - b)**2).mean().item())


def test_one_tag_as_a_number_or_as_a_row():
    a, b, y = torch.rand(3, 5, 4, 4), torch.rand(3, 5, 4, 4), torch.tensor([0, 4, 2])
    again, distance = puzzle_terms(a, b, y, loss_func=CrossEntropyLossFlat())
    assert distance == reconstruction_loss(a, b, F.one_hot(y, 5)) and again == F.cross_entropy(b.mean((2, 3)), y)


def test_unknown_options():
    for wrong in (dict(reconstruction='mask'), dict(level='features'), dict(distance='l3'), dict(alpha=-1), dict(ramp=-1), dict(confidence=-1), dict(pieces=3)):
        with pytest.raises(ValueError): Puzzle(**wrong)


# Training

TINY = dict(size=64, bs=4)


def test_the_bias_is_part_of_the_pieces_logits(view):
    "With one piece the pieces' loss is the classifier's own, whatever the bias."
    learn = puzzle_learner(view, pieces=1, **TINY)
    nn.init.normal_(learn.model.head.bias)
    c = silent(learn, 1, 1e-3).puzzle.curves()
    assert np.array_equal(c['whole'], c['pieces']) and not c['reconstruction'].any()


def test_two_passes_of_the_network(view):
    "One step leaves the statistics and gradients that the image and then the pieces leave."
    plain, learn = cam_learner(view, augment=False, **TINY), puzzle_learner(view, augment=False, alpha=2., ramp=0, confidence=.5, **TINY)
    x, y = learn.dls.train.one_batch()
    x, y = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)
    net = plain.model.train()
    maps, z = net.maps(x)
    tiles, said = net.maps(tile(x))
    again = merge(tiles)
    bce, p = F.binary_cross_entropy_with_logits, said.sigmoid()
    loss = bce(z, y) + bce(again.mean((2, 3)) + net.head.bias, y) + 2 * ((maps - again).abs() * y[..., None, None]).mean() - .5 * (p * (p + 1e-5).log()).sum(1).mean()
    loss.backward()
    class OneStep(Callback):
        order = 70
        def before_batch(self): self.learn.xb, self.learn.yb = (x,), (y,)
        def before_step(self):
            assert self.loss.item() == pytest.approx(loss.item(), rel=1e-5)
            for (k, a), b in zip(self.model.named_parameters(), net.parameters()): assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), k
            for (k, a), b in zip(self.model.named_buffers(), net.buffers()): assert torch.allclose(a.float(), b.float(), atol=1e-5), k
            self.learn.checked = True
            raise KeyboardInterrupt
    with learn.no_bar(), learn.no_logging(), suppress(KeyboardInterrupt): learn.fit(1, 1e-3, cbs=OneStep())
    assert learn.checked and 'forward' not in vars(learn.model)


def test_validation_is_that_of_a_plain_classifier(view):
    learn = puzzle_learner(view, valid=view, **TINY)
    silent(learn, 1, 1e-3)
    ours, again = learn.validate(), Learner(learn.dls, learn.model, loss_func=learn.loss_func, metrics=learn.metrics)
    with again.no_bar(): assert list(ours) == list(again.validate())


class Kill(Callback):
    "A run that is killed in the middle of an epoch."
    order = 80
    def __init__(self, epoch): self.at = epoch
    def after_batch(self):
        if self.epoch == self.at: raise KeyboardInterrupt


@pytest.mark.parametrize('original', [False, True])
def test_killed_and_resumed_is_bitwise_the_same(view, tmp_path, original):
    made = []
    def learner(*args, **kwargs):
        made.append(puzzle_learner(*args, **kwargs))
        if len(made) == 2: made[1].add_cb(Kill(2))
        return made[-1]
    def train(path=None):
        if not original: return train_classifier(view, 4, 1e-3, seed=3, path=path, learner=learner, ramp=.8, **TINY)
        return train_puzzle(view, 4, 1e-3, seed=3, path=path, momentum=.9, learner=learner, ramp=.8, **TINY)
    whole = train()
    with suppress(KeyboardInterrupt): train(tmp_path/'c.pth')
    assert (tmp_path/'c.pth').is_file() and not weights(made[1]).equal(weights(whole))
    again = train(tmp_path/'c.pth')
    assert weights(again).equal(weights(whole))
    a, b = whole.puzzle.curves(), again.puzzle.curves()
    for k in a: assert len(b[k]) == 4 and np.array_equal(a[k][-4:], b[k])
    assert a['alpha'] == pytest.approx([min(4 * k / (8 * .8), 4) for k in range(8)])


def test_same_seed_same_weights(view):
    a, b, c = (silent(puzzle_learner(view, seed=s, **TINY), 1, 1e-3, seed=s) for s in (0, 0, 1))
    assert weights(a).equal(weights(b)) and not weights(a).equal(weights(c))


def test_single_label_view(folder):
    view = pets(folder/'pets', classes=2).view('tags', 'trainval')
    learn = train_classifier(view, 1, 1e-3, learner=puzzle_learner, confidence=.1, level='cam', **TINY)
    c = learn.puzzle.curves()
    assert all(np.isfinite(v).all() for v in c.values()) and c['entropy'].max() <= np.log(2) + 1e-3


def test_last_batch_may_be_small(view):
    "Nothing depends on the batch size (T9)."
    learn = puzzle_learner(view, size=64, bs=3)
    learn.dls.train.drop_last = False
    silent(learn, 1, 1e-3)
    assert len(learn.puzzle.history) == 3 and len(view) == 8


@pytest.mark.parametrize('size, pieces', [(80, 4), (72, 9), (64, 16)])
def test_sizes_that_do_not_divide(view, size, pieces):
    c = silent(puzzle_learner(view, size=size, bs=4, pieces=pieces), 1, 1e-3).puzzle.curves()
    assert np.isfinite(c['reconstruction']).all()


def test_stays_a_cam_classifier(view, tmp_path):
    learn = silent(puzzle_learner(view, **TINY), 1, 1e-3)
    assert type(learn.model) is CamClassifier and 'forward' not in vars(learn.model)
    save_classifier(learn, tmp_path/'c', dict(backbone='tf_efficientnet_lite0', output_stride=16, n_outputs=20))
    store, x = MapStore(tmp_path/'maps'), torch.rand(2, 3, 64, 64)
    assert write_cams(learn.model, view, store, size=64) == [] and len(store) == len(view)
    loaded = load_classifier(tmp_path/'c')
    with torch.inference_mode(): assert loaded(x).equal(learn.model.eval()(x)) and cam(loaded, x)[0].equal(cam(learn.model, x)[0])


def test_no_mask_is_read(folder, tmp_path):
    "Training on a folder whose masks are deleted (T4)."
    shutil.copytree(folder/'voc/VOC2012', tmp_path/'VOC2012')
    shutil.rmtree(tmp_path/'VOC2012/SegmentationClass')
    blind, seeing = (train_classifier(voc(p).view('tags', 'train'), 1, 1e-3, learner=puzzle_learner, **TINY) for p in (tmp_path/'VOC2012', folder/'voc/VOC2012'))
    assert weights(blind).equal(weights(seeing))


def test_groups_of_the_original(view):
    "Rates 1, 2, 10, 20 times the base; only what is called a weight is decayed, scales of normalisation included."
    learn = train_puzzle(view, 1, lr=1e-3, momentum=1e-4, **TINY)
    assert [h['wd'] for h in learn.opt.hypers] == [1e-4, 0, 1e-4, 0] and [h['mom'] for h in learn.opt.hypers] == [1e-4] * 4
    assert np.allclose([h['lr'] for h in learn.opt.hypers], np.array([1, 2, 10, 20]) * 1e-3 * .5**.9)
    assert [[tuple(p.shape) for p in g] for g in module._four_groups(learn.model)[2:]] == [[(20, 1280)], [(20,)]]
    assert all(s.get('do_wd', True) for s in learn.opt.state.values())
    assert sum(p.numel() for g in module._four_groups(learn.model) for p in g) == sum(p.numel() for p in learn.model.parameters())
