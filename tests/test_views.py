"Training code sees what its supervision allows and nothing else: the masks are deleted, and everything still runs."
import random
import shutil

import numpy as np
import pytest
import torch
from fastai.learner import Learner
from wsss_nb.data.blocks import image_dl, mask_dls, tags_dls
from wsss_nb.data.pets import pets
from wsss_nb.data.sample import sample
from wsss_nb.data.voc import voc


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A copy of the rendered sample that may be spoilt."
    return shutil.copytree(sample(profile='smoke'), tmp_path_factory.mktemp('views')/'sample')


def batches(dls, seed=0):
    torch.manual_seed(seed)
    dls.train.rng = random.Random(seed)
    return [(x.clone(), y.clone()) for x, y in dls.train]


@pytest.mark.parametrize('load, split, masks', [
    (lambda r: pets(r/'pets', 38, r/'background'), 'trainval', ('pets/annotations/trimaps',)),
    (lambda r: voc(r/'voc/VOC2012'), 'train', ('voc/VOC2012/SegmentationClass', 'voc/VOC2012/SegmentationObject'))])
def test_training_on_tags_works_with_every_mask_deleted(root, load, split, masks):
    view = load(root).view('tags', split)
    with_masks = batches(tags_dls(view, size=48, bs=4))
    for folder in masks: shutil.rmtree(root/folder)
    assert not [p for folder in masks for p in (root/folder).glob('*')]
    data = load(root)
    assert all(item.mask is None for item in data.items)
    dls = tags_dls(data.view('tags', split), size=48, bs=4)
    for (x, y), (a, b) in zip(batches(dls), with_masks, strict=True):
        assert torch.equal(x, a) and torch.equal(y, b)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, len(dls.vocab)))
    learn = Learner(dls, model, lr=.1)
    with learn.no_logging(): learn.fit(1)
    assert np.isfinite(float(learn.recorder.losses[-1]))


def test_a_view_of_tags_has_no_masks_boxes_points_scribbles(root):
    for data, split in ((pets(root/'pets'), 'trainval'), (voc(root/'voc/VOC2012'), 'train')):
        view = data.view('tags', split)
        assert {(i.mask, i.boxes, i.points, i.scribbles) for i in view} == {(None,) * 4}
        with pytest.raises(PermissionError): view.read_mask(view[0])
        with pytest.raises(PermissionError): mask_dls(view, view.read_mask, data.segment_classes, size=16).train_ds[0]


def test_same_seed_same_batches_bit_for_bit(root):
    view = pets(root/'pets').view('tags', 'trainval')
    one, two = (batches(tags_dls(view, size=48, bs=4), 7) for _ in range(2))
    assert all(torch.equal(x, a) and torch.equal(y, b) for (x, y), (a, b) in zip(one, two, strict=True))
    other = batches(tags_dls(view, size=48, bs=4), 8)
    assert not torch.equal(one[0][0], other[0][0])


def test_workers_give_the_same_images_without_augmentation(root):
    view = pets(root/'pets').view('tags', 'trainval')
    for (x,), (a,) in zip(image_dl(view, size=32, bs=4), image_dl(view, size=32, bs=4, workers=1), strict=True):
        assert torch.equal(x, a)
