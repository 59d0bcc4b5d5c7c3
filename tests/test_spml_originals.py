"Traps of SPML's release that no other test shows: what it does, and what is done instead."
from dataclasses import replace

import numpy as np
import pydensecrf.densecrf as densecrf
import pytest
import torch
from PIL import Image

from wsss_nb.data.items import UNLABELLED, Dataset, Item
from wsss_nb.refine.crf import crf_probabilities
from wsss_nb.refine.embedding_walk import SPML_CRF, peak_normalised, walked_labels
from wsss_nb.segment.clusters import colour_features, retrieve
from wsss_nb.segment.contrast import original_nll, segment_contrast
from wsss_nb.segment.spml import PAPER, SPML, spml_dls, spml_learner


@pytest.fixture
def view(tmp_path):
    "Two photos with two tags each; the scribbles tell of one class only, and there is no mask."
    items = []
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path/f'p{i}.png')
        items.append(Item(f'p{i}', tmp_path/f'p{i}.png', tags=(1, 3)))
    return Dataset('tagged', ['a', 'b', 'c'], items, {'train': [o.id for o in items]}).view('scribbles', 'train')


def read_label(item):
    m = np.full((20, 24), UNLABELLED, np.uint8)
    m[4:6], m[14:16] = 1, 0
    return m


def read_region(item): return np.arange(480, dtype=np.int16).reshape(20, 24) // 100


def test_training_needs_no_mask(view):
    "S2: the view has no mask to build a memory from; batches and losses come from the weak labels."
    with pytest.raises(Exception, match='masks'): view.read_mask(view[0])
    learn = spml_learner(view, read_label, read_region, backbone='resnet18', size=32, bs=2, dim=8, pretrained=False)
    x, *y = learn.dls.train.one_batch()
    assert learn.loss_func(learn.model(x), *y).isfinite()


def test_the_protocol_is_an_argument():
    "S3: the same maps with and without CRF are two results, and the caller says which."
    rng = np.random.default_rng(0)
    image = np.zeros((32, 40, 3), np.uint8)
    image[:, 20:] = 200
    scores = rng.dirichlet([1, 1], (32, 40)).transpose(2, 0, 1).astype(np.float32)
    views = [torch.from_numpy(rng.normal(size=(4, 4, 5)).astype(np.float32))]
    plain, smooth = (walked_labels(image, scores, views, steps=0, settings=s) for s in (None, SPML_CRF))
    assert not np.array_equal(plain, smooth)
    assert np.array_equal(smooth, walked_labels(image, scores, views, steps=0))


def test_a_badly_placed_relative_is_kept():
    "S4: own cosine 1, one relative at -.3, a stranger at .2."
    cos = torch.tensor([1., -.3, .2])
    e, p = torch.tensor([[1., 0.]]), torch.stack([cos, (1 - cos**2).sqrt()], 1)
    args, related = (e, torch.zeros(1).long()), torch.tensor([[True, True, False]])
    for kappa, want in ((6, np.log1p(np.exp(3))), (12, np.log1p(np.exp(6))), (16, np.log1p(np.exp(8)))):
        got = segment_contrast(e, torch.zeros(1).long(), torch.zeros(1).long(), p, related, kappa, reduce=False)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        released = float(original_nll(*args, p, related, kappa))
        if kappa == 16: assert released < 1e-3      # the stranger counts for nothing beside the own segment
        else: np.testing.assert_allclose(released, want, rtol=1e-4 if kappa == 6 else .05)
    half = (torch.tensor(16., dtype=torch.float16)).exp()
    assert half.isinf()


def test_true_tags_are_preferred(view):
    "S6: class 3 stands in the tags and nowhere in the label map; a crop without any label keeps both tags."
    for label in (read_label, lambda o: np.full((20, 24), UNLABELLED, np.uint8)):
        for tags in spml_dls(view, label, read_region, 16, 2).train.one_batch()[2]: assert tags.tolist() == [1., 0., 1.]


def test_the_colour_filter():
    "S9: a bright dot stays where it is and is brightest there; as released its own pixel is the one without it."
    x = torch.zeros(1, 1, 15, 15)
    x[0, 0, 6, 9] = 1
    here, released = colour_features(x)[0, :, :, 0], colour_features(x, original=True)[0, :, :, 0]
    assert here.shape == (15, 15) and divmod(int(here.argmax()), 15) == (6, 9)
    assert released.shape == (11, 11)
    dot = released[4, 7]        # two pixels up and left: no padding
    assert dot == released.min() and released.max() == released[2, 5]


def test_one_segment_has_no_other_neighbour():
    "S10: no neighbour is nobody, not a division by zero; without its own entry a segment finds the other one."
    p = torch.eye(2)
    assert retrieve(p[:1], p[:1], 10, own=torch.tensor([0]))[1].tolist() == [[-1]]
    assert retrieve(p, p, 1)[1].tolist() == [[0], [1]] and retrieve(p, p, 1, own=torch.arange(2))[1].tolist() == [[1], [0]]


def test_an_unknown_setting_is_an_error(view):
    "S15: no setting is a word that nobody replaced."
    with pytest.raises(TypeError, match='USE_SYNCBN'): spml_learner(view, read_label, read_region, USE_SYNCBN='TRUE')
    for preset in PAPER.values():
        for k, v in vars(preset).items(): assert type(v) is type(getattr(SPML(), k)), k
    with pytest.raises(TypeError): replace(SPML(), use_crf=True)


def test_unaries_are_what_the_peaks_leave():
    "S17: values that do not sum to 1 reach the CRF as -log of themselves, cut at 1e-5."
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 15, 3), np.uint8)
    p = peak_normalised(rng.dirichlet(np.ones(3) * .3, (12, 15)).transpose(2, 0, 1), floor=.15)
    p[1, :6] = 0
    assert np.abs(p.sum(0) - 1).max() > .3
    d = densecrf.DenseCRF2D(15, 12, 3)
    d.setUnaryEnergy(np.ascontiguousarray(-np.log(np.clip(p, 1e-5, 1)).reshape(3, -1).astype(np.float32)))
    d.addPairwiseGaussian(sxy=1, compat=3)
    d.addPairwiseBilateral(sxy=67, srgb=3, rgbim=image, compat=4)
    want = np.array(d.inference(10)).reshape(3, 12, 15)
    assert np.abs(crf_probabilities(image, p, SPML_CRF) - want).max() < 1e-4
