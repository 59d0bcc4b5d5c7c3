"""Traps of the originals that no other test shows: each of these fails when its trap comes back."""
from types import SimpleNamespace

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from PIL import Image
from torch import nn
from torch.nn import functional as F

from wsss_nb.data.blocks import tag_names
from wsss_nb.data.items import images_in
from wsss_nb.data.pets import pets
from wsss_nb.data.sample import sample
from wsss_nb.data.voc import voc
from wsss_nb.localize import ccam
from wsss_nb.localize.cam import cam_learner
from wsss_nb.localize.ecs import ecs_learner
from wsss_nb.localize.training import fit
from wsss_nb.study import main
from wsss_nb.study.runs import Run


@pytest.fixture(scope='module')
def root(): return sample(profile='smoke')


def quietly(learn, epochs, lr=1e-2):
    with learn.no_bar(), learn.no_logging(): fit(learn, epochs, lr)
    return learn.model


# The classifier

@pytest.mark.parametrize('kind', ['single label', 'several labels', 'with the second look'])
def test_the_loss_reaches_the_head(root, kind):
    "T1: not on the pooled features. T15: as many outputs as there are breeds, and the head is in the optimiser."
    view = voc(root/'voc/VOC2012').view('tags', 'train') if kind == 'several labels' else pets(root/'pets').view('tags', 'trainval')
    learn = (ecs_learner if kind == 'with the second look' else cam_learner)(view, size=64, bs=4, pretrained=False)
    x, y = (v.as_subclass(torch.Tensor) for v in learn.dls.one_batch())
    z = learn.model(x)
    assert z.shape == (4, len(tag_names(view)))
    loss = learn.loss_func(z, y)
    want = F.cross_entropy(z, y) if view.single_label else F.binary_cross_entropy_with_logits(z, y)
    assert torch.isclose(loss, want)
    loss.backward()
    head = learn.model.head.weight
    assert head.grad is not None and head.grad.abs().sum() > 0
    learn.create_opt()
    assert any(p is head for p, *_ in learn.opt.all_params())


def test_a_validation_set_is_only_reported(root):
    "T2, T7: the weights are those of the last epoch, with a validation set or without, and nothing of it chooses them."
    data = pets(root/'pets')
    view, kw = data.view('tags', 'trainval'), dict(size=64, bs=4, pretrained=False, augment=False)
    watched = cam_learner(view, valid=data.view('tags', 'test'), **kw)
    a, b = quietly(watched, 2), quietly(cam_learner(view, **kw), 2)
    assert len(watched.recorder.values) == 2            # it was measured after both epochs
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# Background photos

def test_label_images_of_a_background_archive_are_not_read(root, tmp_path):
    "T21: photos are those of the folder itself, not of folders in it."
    (tmp_path/'labels').mkdir()
    for name in ('a.jpg', 'b.jpg', 'labels/a.png', 'labels/c.png'): Image.new('RGB', (40, 30)).save(tmp_path/name)
    assert [p.name for p in images_in(tmp_path)] == ['a.jpg', 'b.jpg']
    added = [o.id for o in pets(root/'pets', 38, tmp_path).items if o.tags == ()]
    assert added == ['a', 'b']


# Pseudo masks against true masks

def test_one_schedule_for_pseudo_masks_and_true_masks(root, monkeypatch, tmp_path):
    "T17: the two networks of the main job differ in nothing but the labels."
    calls = []
    def train(view, read_label, *args, path, **kwargs): calls.append((view.ids, args, kwargs))
    def stage(folder, name, config, work, say):
        run = Run(folder, name, config)
        if name.startswith('segment'): work(run)
        return run
    for name, stand_in in (('train_segmenter', train), ('run_stage', stage), ('segmenter', lambda _: SimpleNamespace(save=lambda folder: None)),
                           ('_score', lambda *_: []), ('_report', lambda *_: None)): monkeypatch.setattr(main, name, stand_in)
    main.main_job(pets(root/'pets', 'breeds'), tmp_path, main.profile_settings('smoke'), say=lambda text: None)
    pseudo, true = calls
    assert pseudo == true and pseudo[1] and pseudo[2]['seed'] == 0


# CCAM

def a_head(n=4):
    torch.manual_seed(0)
    return ccam.CCAM(nn.Linear(1, 1), n, frozen=True)


def test_intended_momentum_and_decay_are_torchs():
    "C-1: with nine tenths of momentum, and the weight decay where it belongs."
    recipe = ccam.find_recipe('intended')
    assert (recipe.momentum, recipe.weight_decay) == (.9, 1e-4)
    ours, theirs = a_head(), a_head()
    learn = ccam._learner(ours, DataLoaders(DataLoader([], bs=1), DataLoader([], bs=1)), recipe)
    learn.create_opt()
    learn.opt.set_hypers(lr=.1, wd=recipe.weight_decay)
    reference = torch.optim.SGD([theirs.head.conv.weight], lr=.1, momentum=.9, weight_decay=1e-4)
    for k in range(5):
        g = torch.randn(ours.head.conv.weight.shape, generator=torch.Generator().manual_seed(k))
        ours.head.conv.weight.grad, theirs.head.conv.weight.grad = g.clone(), g.clone()
        learn.opt.step(), reference.step()
    assert torch.allclose(ours.head.conv.weight, theirs.head.conv.weight, atol=1e-6)


def test_half_of_the_places_at_the_start_and_full_batches():
    "C-5: the normalisation's prior of one half of a batch, whatever the photos show; no poor last batch."
    net = a_head().train()
    for part in (.1, .5, .9):
        f = torch.rand(32, 4, 7, 7, generator=torch.Generator().manual_seed(1)) + 3 * (torch.rand(32, 1, 7, 7) < part)
        assert abs(net.head.logits(f).mean()) < 1e-4
    table = ccam.FeatureCache(torch.rand(11, 1, 4, 7, 7), range(11))
    assert [len(f) for f, _ in ccam._feature_dls(table, 4).train] == [4, 4]
