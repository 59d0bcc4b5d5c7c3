"A classifier on a frozen embedding."
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from scipy.ndimage import correlate

from wsss_nb.data.items import UNLABELLED, InputError, read_image, read_mask
from wsss_nb.data.voc import voc
from wsss_nb.segment.frozen import Degrade, blur, frozen_learner, train_frozen
from wsss_nb.segment.learner import train_segmenter
from wsss_nb.segment.predict import load_segmenter, segmenter
from wsss_nb.segment.spml import load_spml, save_spml, spml_learner
from wsss_nb.segment.spread import load_embedder, named


def scribble(o): return read_mask(o.scribbles)
def one_region(o): return np.zeros(scribble(o).shape, int)


@pytest.fixture(scope='module')
def view(photos): return voc(photos).view('scribbles', 'train').keep(lambda o: o.scribbles is not None)


@pytest.fixture(scope='module')
def embedding(view, tmp_path_factory):
    folder = tmp_path_factory.mktemp('embedding')
    save_spml(spml_learner(view, scribble, one_region, size=32, bs=4, dim=8), folder)
    return folder


@pytest.fixture
def options(embedding): return dict(embedding=embedding, size=32, bs=4)


@pytest.mark.parametrize('sigma', [.5, 1., 4.])
def test_blur_is_scipys(sigma):
    x = np.random.default_rng(0).integers(0, 256, (11, 14, 3)).astype(np.uint8)
    r = np.hypot(*np.mgrid[-2:3, -2:3])
    k = np.exp(-(r / sigma)**2)
    want = np.stack([correlate(c.astype(float), k / k.sum(), mode='mirror') for c in np.moveaxis(x, 2, 0)], 2)
    assert np.abs(blur(x, sigma) - want).max() <= .51


def test_degraded_photos(view):
    photo = torch.from_numpy(read_image(view[0].image)).permute(2, 0, 1)
    grey, = Degrade((1., 1.), grey=1., blurred=0., flip=0., brightness=0., contrast=0.).encodes((photo,))
    want = (torch.tensor([.3, .59, .11])[:, None, None] * photo).sum(0)
    assert (grey[0] == grey[1]).all() and (grey[0] == grey[2]).all() and (grey[0] - want).abs().max() <= .51
    same, = Degrade((1., 1.), grey=0., blurred=0., flip=0., brightness=0., contrast=0.).encodes((photo,))
    assert (same == photo).all()


@pytest.mark.parametrize('train', [train_frozen, lambda *a, **k: train_segmenter(*a, learner=frozen_learner, **k)])
def test_only_the_classifier_learns(view, options, embedding, train):
    learn, net = train(view, scribble, 1, **options), load_spml(embedding)[0]
    for part, own in zip(learn.model.net.encoder, (net.encoder, net.head)):
        for k, v in own.state_dict().items(): assert torch.equal(part.state_dict()[k], v), k
    assert all(p.grad is None or not p.requires_grad for p in learn.model.net.encoder.parameters())
    fresh = frozen_learner(view, scribble, **options).model.net.classifier.state_dict()
    assert any(not torch.equal(v, fresh[k]) for k, v in learn.model.net.classifier.state_dict().items())


@pytest.mark.parametrize('changes', [{}, dict(head='rates', output_stride=8, rates=(2, 4)), dict(output_stride=32)])
def test_the_embedding_is_the_trained_one(view, tmp_path, changes):
    "The frozen part gives the vectors that were learned, whatever the head and the stride."
    learn = spml_learner(view, scribble, one_region, size=64, bs=4, dim=8, **changes)
    save_spml(learn, tmp_path)
    frozen, net = frozen_learner(view, scribble, embedding=tmp_path, size=64, bs=4).model.eval().net, learn.model.eval()
    x = torch.randn(2, 3, 64, 48)
    frozen.classifier = torch.nn.Identity()
    with torch.no_grad(): torch.testing.assert_close(frozen(x), torch.nn.functional.normalize(net(x)[0], dim=1), rtol=1e-4, atol=1e-5)


def test_rates_of_the_published_training(view, options):
    learn = train_frozen(view, scribble, 1, .003, **options)
    assert len(learn.opt.hypers) == 2 and sum(len(g) for g in learn.opt.param_lists) == len(list(learn.model.net.classifier.parameters()))
    ratio = learn.opt.hypers[1]['lr'] / learn.opt.hypers[0]['lr']
    assert ratio == pytest.approx(2) and [h['wd'] for h in learn.opt.hypers] == [5e-4, 0]


def test_same_seed_same_network_and_resumed(view, options, tmp_path):
    a, b = (train_frozen(view, scribble, 2, **options).model.state_dict() for _ in range(2))
    for k in a: assert torch.equal(a[k], b[k]), k

    class Stop(Exception): pass
    class AfterOne(Callback):
        order = 99
        def after_epoch(self): raise Stop('now')
    with pytest.raises(Stop): train_frozen(view, scribble, 2, path=tmp_path/'c.pth', cbs=[AfterOne()], **options)
    c = train_frozen(view, scribble, 2, path=tmp_path/'c.pth', **options).model.state_dict()
    for k in a: assert torch.equal(a[k], c[k]), k


def test_saved_and_named(view, options, embedding, tmp_path):
    "The saved model predicts as the embedding with that classifier does."
    learn = train_segmenter(view, scribble, 1, learner=frozen_learner, **options)
    model = load_segmenter(segmenter(learn).save(tmp_path))
    image = read_image(view[0].image)
    e = named(load_embedder(embedding), model)
    p = e([image])[2]
    want = model.probabilities_of([image])[0]
    got = torch.nn.functional.interpolate(p, want.shape[1:], mode='bilinear')[0].numpy()
    assert np.abs(got - want).max() < .2 and (got.argmax(0) == want.argmax(0)).mean() > .9    # softmax before and after enlarging


def test_an_embedding_that_is_none(view, tmp_path):
    with pytest.raises(InputError, match='not a readable SPML network'): frozen_learner(view, scribble, tmp_path)


@pytest.mark.parametrize('train', [train_frozen, lambda *a, **k: train_segmenter(*a, learner=frozen_learner, **k)])
def test_no_label_anywhere(view, options, train):
    with pytest.raises(InputError, match='no labelled pixel in any image'): train(view, lambda o: np.full_like(scribble(o), UNLABELLED), 1, **options)


def test_a_rate_too_high(view, options):
    "Weights that are no numbers, as too high a rate leaves them: the photos of the batch are named, and nothing is trained any further."
    class Spoil(Callback):
        def before_batch(self):
            self.seen = self.iter
            if self.iter == 1: next(self.model.net.classifier.parameters()).data.fill_(torch.nan)
    spoil = Spoil()
    with pytest.raises(InputError, match='a loss that is no number in batch 1 of epoch 0. Look at these images and their labels; else take a lower rate') as e: train_frozen(view, scribble, 2, cbs=[spoil], **options)
    names = e.value.path.split(', ')
    assert spoil.seen == 1 and len(names) == 4 and set(names) <= set(view.ids)
