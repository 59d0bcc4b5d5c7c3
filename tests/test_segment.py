"Segmentation: losses against torch and smp, reproducible training, prediction, saved models and hostile input."
import json
from contextlib import suppress
import numpy as np, pytest, torch
import segmentation_models_pytorch as smp
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from wsss_nb.data.items import UNLABELLED, VOID, Dataset, InputError, Item, read_mask, write_mask
from wsss_nb.data.store import LabelStore
from wsss_nb.localize.training import fit
from wsss_nb.segment.learner import segment_learner, train_segmenter
from wsss_nb.segment.losses import SegmentLoss, cross_entropy
from wsss_nb.segment.nets import create_net
from wsss_nb.segment.predict import Segmenter, load_segmenter, segmenter
from PIL import Image

SMALL = dict(size=32, bs=4, decoder_channels=(16, 16, 8, 8), pretrained=False)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    "Ten photos of a bright disc, different sizes, with masks."
    root, rng = tmp_path_factory.mktemp('discs'), np.random.default_rng(0)
    items = []
    for i in range(10):
        h, w = rng.integers(40, 70, 2)
        y, x = np.mgrid[:h, :w]
        disc = np.hypot(y - rng.uniform(.3, .7) * h, x - rng.uniform(.3, .7) * w) < 12
        photo = (np.where(disc[..., None], (220, 180, 60), (30, 60, 90)) + rng.integers(0, 30, (h, w, 3))).astype(np.uint8)
        Image.fromarray(photo).save(root/f'{i}.png'); write_mask(root/'masks'/f'{i}.png', disc.astype(np.uint8))
        items.append(Item(str(i), root/f'{i}.png', tags=(1,), mask=root/'masks'/f'{i}.png'))
    return Dataset('discs', ('disc',), items, {'train': [str(i) for i in range(8)], 'test': ['8', '9']})


def weights(learn): return torch.cat([p.float().flatten() for p in learn.model.state_dict().values()])


# Losses

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.floats(0, 1), st.booleans(), st.sampled_from([0, .1]))
def test_cross_entropy_is_torchs(seed, c, void, weighted, smoothing):
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(2, c, 5, 7, generator=g), torch.randint(0, c, (2, 5, 7), generator=g)
    y[torch.rand(y.shape, generator=g) < void] = VOID
    y[torch.rand(y.shape, generator=g) < void / 4] = UNLABELLED
    w = torch.rand(c, generator=g) + .1 if weighted else None
    z.requires_grad_()
    got = cross_entropy(z, y, w, smoothing)
    grad, = torch.autograd.grad(got, z)
    assert got.isfinite() and grad.isfinite().all()
    if (y >= UNLABELLED).all(): assert got == 0 and not grad.any()
    else:
        want = F.cross_entropy(z, torch.where(y == UNLABELLED, VOID, y), w, ignore_index=VOID, label_smoothing=smoothing)
        torch.testing.assert_close(got, want); torch.testing.assert_close(grad, torch.autograd.grad(want, z)[0])


@pytest.mark.parametrize('loss', [cross_entropy, SegmentLoss(dice=1.), SegmentLoss(weight=[1, 2, 3])])
@pytest.mark.parametrize('id', [VOID, UNLABELLED])
def test_nothing_labelled(loss, id):
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    loss(z, torch.full((2, 4, 5), id)).backward()
    assert loss(z, torch.full((2, 4, 5), id)) == 0 and not z.grad.any()


def test_dice_is_the_librarys():
    torch.manual_seed(0)
    z, y = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8)); y[:, :2] = VOID
    want = smp.losses.DiceLoss('multiclass', ignore_index=VOID, smooth=.5)(z, y)
    torch.testing.assert_close(SegmentLoss(dice=2.)(z, y), cross_entropy(z, y) + 2 * want)


def test_half_precision_does_not_overflow():
    z = torch.randn(4, 2, 300, 300).half()
    assert cross_entropy(z, torch.randint(0, 2, (4, 300, 300))).isfinite()


# Training

def test_same_seed_same_weights(dataset):
    v = dataset.view('masks', 'train')
    a, b, c = (weights(train_segmenter(v, v.read_mask, epochs=1, seed=s, **SMALL)) for s in (3, 3, 4))
    assert a.equal(b) and not a.equal(c)


class Killed(Callback):
    order = 95   # after the checkpoint
    def before_batch(self):
        if self.epoch == 1 and self.iter == 1: raise KeyboardInterrupt


@pytest.mark.parametrize('arch', ['unet', 'deeplabv3plus'])
def test_resumed_is_uninterrupted(dataset, tmp_path, arch):
    v = dataset.view('masks', 'train')
    o = {**SMALL, 'arch': arch, **({} if arch == 'unet' else dict(decoder_channels=16))}
    whole = weights(train_segmenter(v, v.read_mask, epochs=2, **o))
    learn = segment_learner(v, v.read_mask, **o); learn.add_cb(Killed())
    with suppress(KeyboardInterrupt): fit(learn, 2, slice(1e-3, 5e-3), path=tmp_path/'c.pth')
    assert (tmp_path/'c.pth').is_file() and not weights(learn).equal(whole)
    again = train_segmenter(v, v.read_mask, epochs=2, path=tmp_path/'c.pth', **o)
    assert weights(again).equal(whole)


def test_tags_view_reads_no_mask(dataset, tmp_path):
    "Training on pseudo masks works when the true masks are gone; asking the view for one does not."
    v, store = dataset.view('tags', 'train'), LabelStore(tmp_path/'pseudo')
    for o in v: store.save(o.id, read_mask(dataset[o.id].mask))
    with pytest.raises(PermissionError): segment_learner(v, v.read_mask, **SMALL).dls.one_batch()
    gone = Dataset('discs', ('disc',), [Item(o.id, o.image, o.tags, mask=tmp_path/'deleted.png') for o in dataset.items], dataset.splits)
    v = gone.view('tags', 'train')
    assert weights(train_segmenter(v, lambda o: store.load(o.id), epochs=1, **SMALL)).isfinite().all()


def test_it_learns(dataset):
    v, t = dataset.view('masks', 'train'), dataset.view('masks', 'test')
    model = segmenter(train_segmenter(v, v.read_mask, epochs=20, lr=1e-2, encoder_lr=1., size=32, bs=4, decoder_channels=(16, 16, 8, 8)))
    for o in t:
        p, m = model.predict(np.array(Image.open(o.image))) == 1, t.read_mask(o) == 1
        assert (p & m).sum() / (p | m).sum() > .6


def test_groups_and_freeze(dataset):
    v = dataset.view('masks', 'train')
    learn = train_segmenter(v, v.read_mask, epochs=1, freeze=True, lr=1e-2, **SMALL)
    start = segment_learner(v, v.read_mask, **SMALL).model.state_dict()
    for k, p in learn.model.state_dict().items():
        if '.encoder.' in k: assert p.equal(start[k]), k
    assert not learn.model.state_dict()['net.segmentation_head.weight'].equal(start['net.segmentation_head.weight'])


# A training that has gone wrong

class Spoil(Callback):
    "A photo that turns to NaN in the second batch, or all weights; notes what was in it."
    def __init__(self, what, when): self.what, self.when = what, when
    def before_batch(self):
        if (self.iter, self.training) != self.when: return
        if self.what == 'photo': self.learn.xb = (torch.cat([self.xb[0][:1], torch.full_like(self.xb[0][1:2], torch.nan), self.xb[0][2:]]),)
        else: next(self.model.parameters()).data.fill_(torch.nan)


class Shown(Callback):
    "The label map of each photo of a batch, as the loader gave it."
    def before_batch(self): self.seen = [int(m.max()) for m in self.yb[0]]


class Still(Callback):
    order = 5
    def before_train(self): self.model.eval()     # batch norm would spread it over the batch


def numbered(item): return np.full(Image.open(item.image).size[::-1], int(item.id), np.uint8)


@pytest.mark.parametrize('what, when, still', [('photo', (1, True), True), ('photo', (1, True), False), ('weights', (1, True), False), ('weights', (0, False), False)])
def test_a_loss_that_is_no_number(dataset, what, when, still):
    "Named are batch and photo; with batch norm, or broken weights, all photos of the batch."
    data = Dataset('discs', tuple('abcdefghi'), dataset.items, dataset.splits)
    shown = Shown()
    learn = segment_learner(data.view('tags', 'train'), numbered, valid=data.view('tags', 'test'), augment=False, cbs=[Spoil(what, when), shown, *([Still()] if still else [])], **SMALL)
    with pytest.raises(InputError) as e, learn.no_bar(), learn.no_logging(): fit(learn, 2, 1e-3)
    names = [str(n) for n in shown.seen]
    assert e.value.path == (names[1] if still else ', '.join(names))
    assert e.value.problem == f'a loss that is no number in {"batch 1" if when[1] else "held-out batch 0"} of epoch 0' and 'lower rate' in e.value.remedy


def test_a_loss_of_no_images():
    "A table has no images to name; the batch is."
    x = torch.ones(8, 1)
    dls = DataLoaders(DataLoader(list(zip(x, x / 0)), bs=4), DataLoader([], bs=4))
    learn = Learner(dls, torch.nn.Linear(1, 1), loss_func=torch.nn.MSELoss())
    with pytest.raises(InputError, match='training: a loss that is no number in batch 0 of epoch 0'), learn.no_bar(), learn.no_logging(): fit(learn, 1, 1e-3)


@pytest.mark.parametrize('value', [UNLABELLED, VOID])
def test_no_label_anywhere(dataset, value, tmp_path):
    "Refused before the first step; one labelled pixel in one photo is enough."
    view = dataset.view('tags', 'train')
    def none(item): return np.full(Image.open(item.image).size[::-1], value, np.uint8)
    def one(item):
        m = none(item)
        if item.id == '5': m[10:14, 10:14] = 1
        return m
    steps = []
    class Count(Callback):
        def before_batch(self): steps.append(1)
    with pytest.raises(InputError, match='no labelled pixel in any image') as e: train_segmenter(view, none, epochs=1, cbs=[Count()], path=tmp_path/'c.pth', **SMALL)
    assert not steps and not (tmp_path/'c.pth').exists() and '254 is unlabelled' in e.value.remedy
    assert weights(train_segmenter(view, one, epochs=1, cbs=Count(), **SMALL)).isfinite().all() and len(steps) == 2


# Prediction and saved models

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return Segmenter(create_net(n_classes=3, pretrained=False, decoder_channels=(16, 16, 8, 8)), ('background', 'cat', 'dog'), size=64)


@pytest.mark.parametrize('shape', [(1, 1), (7, 300), (64, 64), (75, 50)])
def test_probabilities(model, shape):
    im = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    p = model.probabilities(im, scales=(.5, 1, 1.3))
    assert p.shape == (3, *shape) and p.dtype == np.float32
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(model.probabilities(np.ascontiguousarray(im[:, ::-1]))[..., ::-1], model.probabilities(im), atol=1e-4)


def test_probabilities_by_hand(model):
    "One scale without mirror is resize, normalise, network, softmax, resize."
    im = np.random.default_rng(1).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    x = np.asarray(Image.fromarray(im).resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad(): y = model.net(torch.tensor(x, dtype=torch.float32)).softmax(1)
    want = F.interpolate(y, (40, 90), mode='bilinear')[0].numpy()
    np.testing.assert_allclose(model.probabilities(im, flip=False), want, atol=1e-5)
    assert (model.predict(im, flip=False) == want.argmax(0)).mean() > .999


def test_round_trip(model, tmp_path):
    again = load_segmenter(model.save(tmp_path/'m'))
    assert sorted(p.name for p in (tmp_path/'m').iterdir()) == ['model.json', 'model.safetensors']
    assert all(a.equal(b) for a, b in zip(again.net.state_dict().values(), model.net.state_dict().values()))
    assert (again.classes, again.size, again.mean, again.std, again.net.config) == (model.classes, model.size, model.mean, model.std, model.net.config)


EDITS = {
    'no size': (lambda c: c.pop('size'), "model.json: 'size' is missing"), 'text for size': (lambda c: c.update(size='64'), "model.json: 'size'"),
    'true for size': (lambda c: c.update(size=True), "model.json: 'size'"), 'size 0': (lambda c: c.update(size=0), "model.json: 'size' cannot be 0"),
    'another format': (lambda c: c.update(format=99), 'format 99'), 'unknown arch': (lambda c: c['net'].update(arch='u'), 'model.json: describes no network'),
    'unknown option': (lambda c: c['net'].update(colour='red'), 'model.json: describes no network'),
    'another class': (lambda c: c['classes'].append('cow'), "model.json: 'net' cannot be"),
    'other widths': (lambda c: c['net'].update(decoder_channels=[16, 16, 8, 16]), 'model.safetensors: '),
    'other backbone': (lambda c: c['net'].update(backbone='tf_efficientnet_lite2'), 'model.safetensors: '),
    'classes are numbers': (lambda c: c.update(classes=[0, 1, 2]), "model.json: 'classes' cannot be"), 'std 0': (lambda c: c.update(std=[0, 1, 1]), "model.json: 'std'"),
    'mean of text': (lambda c: c.update(mean=['a', 'b', 'c']), "model.json: "), 'no backbone': (lambda c: c['net'].update(backbone='none'), 'model.json: describes no network'),
    'pretrained smuggled in': (lambda c: c['net'].update(pretrained=True), 'model.json: describes no network'),
}


@pytest.mark.parametrize('edit', EDITS)
def test_edited_json(model, tmp_path, edit):
    change, message = EDITS[edit]
    f = model.save(tmp_path/'m')/'model.json'
    c = json.loads(f.read_text()); change(c); f.write_text(json.dumps(c))
    with pytest.raises(InputError) as e: load_segmenter(f.parent)
    assert message in str(e.value) and e.value.remedy


@pytest.mark.parametrize('text', ['', '[]', 'null', '{', '\x00\xff'])
def test_not_json(model, tmp_path, text):
    f = model.save(tmp_path/'m')/'model.json'; f.write_text(text)
    with pytest.raises(InputError, match='model.json'): load_segmenter(f.parent)


def test_broken_weights(model, tmp_path):
    from safetensors.torch import load_file, save_file
    f = model.save(tmp_path/'m')/'model.safetensors'
    whole, tensors = f.read_bytes(), {k: v.clone() for k, v in load_file(f).items()}   # load_file maps the file, which is overwritten below
    some = min(tensors)
    def refused(match):
        with pytest.raises(InputError, match=f'model.safetensors: .*{match}'): load_segmenter(f.parent)
    f.write_bytes(whole[:len(whole) // 2]); refused('not a readable')
    save_file({k: v for k, v in tensors.items() if k != some}, f); refused('lacks tensor')
    save_file({**tensors, 'extra': torch.zeros(1)}, f); refused('unknown tensor extra')
    save_file({**tensors, some: torch.zeros(1, 2, 3)}, f); refused('has shape')
    k = next(k for k, v in tensors.items() if v.is_floating_point())
    save_file({**tensors, k: torch.full_like(tensors[k], torch.nan)}, f); refused('not finite')
    torch.save(tensors, f); refused('not a readable')
    f.unlink(); refused('no such file')


def test_predict_view_finishes_the_good(model, dataset, tmp_path):
    bad = tmp_path/'bad.jpg'; bad.write_bytes(b'not an image')
    items = [*dataset.view('tags', 'test'), Item('bad', bad), Item('gone', tmp_path/'gone.jpg')]
    store = LabelStore(tmp_path/'masks')
    assert [i for i, _ in model.predict_view(items, store, bs=2)] == ['bad', 'gone']
    assert store.ids() == ['8', '9']
    for o in items[:2]:
        assert store.load(o.id).shape == Image.open(o.image).size[::-1]
        assert Image.open(store.path(o.id)).mode == 'P'
    before = {i: store.path(i).stat().st_mtime_ns for i in store.ids()}
    store.path('8').unlink(); model.predict_view(items, store)
    assert store.path('9').stat().st_mtime_ns == before['9'] and '8' in store


def test_predict_paths_refuses_two_of_one_stem(model, tmp_path):
    for s in ('a.png', 'a.bmp'): Image.new('RGB', (9, 9)).save(tmp_path/s)
    with pytest.raises(InputError, match='same stem'): model.predict_paths(tmp_path, tmp_path/'masks')
    with pytest.raises(InputError, match='same stem'): model.predict_paths([tmp_path/'a.png', tmp_path/'a.bmp'], tmp_path/'masks')
    with pytest.raises(InputError, match='no such folder'): model.predict_paths(tmp_path/'nothing', tmp_path/'masks')


def test_change(model, dataset, tmp_path):
    "A function of image and probabilities may decide instead of the largest probability."
    store = LabelStore(tmp_path)
    model.predict_view(dataset.view('tags', 'test'), store, change=lambda im, p: np.where(im[..., 0] > 128, 2, 0).astype(np.uint8))
    o = dataset['8']
    assert (store.load('8') == np.where(np.array(Image.open(o.image))[..., 0] > 128, 2, 0)).all()


def test_only_classes_that_can_occur(model, dataset, tmp_path):
    "The absent class never wins; where it would have won, the best of the others does."
    free, bound = LabelStore(tmp_path/'free'), LabelStore(tmp_path/'bound')
    view = dataset.view('tags', 'test')
    model.predict_view(view, free); model.predict_view(view, bound, only=lambda o: {1})
    for o in view:
        p = model.probabilities(np.array(Image.open(o.image).convert('RGB')))
        assert (bound.load(o.id) == np.delete(p, range(2, len(p)), 0).argmax(0)).all()
        same = free.load(o.id) <= 1
        assert (bound.load(o.id)[same] == free.load(o.id)[same]).all()
