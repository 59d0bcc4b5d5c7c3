"Losses of two label maps against BANA's own numbers, cosine heads, training and hostile labels."
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.nn import functional as F
from wsss_nb.data.items import UNLABELLED, VOID, Dataset, InputError, Item
from wsss_nb.localize.bap import rate_groups
from wsss_nb.localize.ccam import PolySchedule
from wsss_nb.localize.training import fit
from wsss_nb.refine.crf import PRESETS, crf_probabilities
from wsss_nb.segment.learner import train_segmenter
from wsss_nb.segment.nets import CosineHead, cosine_net, create_net
from wsss_nb.segment.noise_aware import (LOSSES, STAGE3, AgreementLoss, BootstrapLoss, EntropyLoss, NoiseAwareLoss, confidence, label_sets, masked_mean,
                                         train_noise_aware, two_label_learner)
from wsss_nb.segment.predict import load_segmenter, segmenter

GOLDEN = Path(__file__).parent/'golden'
SMALL = dict(arch='unet-cosine', size=32, bs=4, decoder_channels=(16, 16, 8, 8), pretrained=False)


def golden(name):
    with np.load(GOLDEN/f'{name}.npz', allow_pickle=False) as z: return {k: torch.from_numpy(np.array(z[k])) for k in z}


# The authors' loss

@pytest.fixture(scope='module')
def author(): return golden('bana_nal_author')


@pytest.mark.parametrize('detach', [False, True])
def test_author(author, detach):
    g = author
    f, head = g['features'].clone().requires_grad_(), CosineHead(12, 21)
    head.weight.data = g['cls_weight'].clone()
    logits = F.interpolate(head(f), (45, 45), mode='bilinear', align_corners=True)
    target = torch.stack([g['mask_crf'], g['mask_ret']], 1).long()
    crf, agreed, disputed = label_sets(target)
    assert agreed.equal(g['mask_fin'] != VOID)
    torch.testing.assert_close(confidence(logits, crf.masked_fill(crf == VOID, 0))[disputed], g['sigma'], rtol=1e-5, atol=1e-7)
    loss = NoiseAwareLoss(detach=detach)
    torch.testing.assert_close(AgreementLoss()(logits, target), g['loss_ce'], rtol=1e-5, atol=0)
    torch.testing.assert_close((loss(logits, target) - AgreementLoss()(logits, target)) / .1, g['loss_wce'], rtol=1e-5, atol=0)
    got = loss(logits, target)
    torch.testing.assert_close(got, g['loss'], rtol=1e-5, atol=0)
    got.backward()
    ending = '_sigma_detached' if detach else ''
    torch.testing.assert_close(f.grad, g['grad_features' + ending], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(head.weight.grad, g['grad_weight' + ending], rtol=1e-5, atol=5e-6)


def test_author_gradient_through_the_confidence(author):
    "The two recorded gradients differ by far more than the tolerance above."
    a, b = author['grad_features'], author['grad_features_sigma_detached']
    assert (a - b).norm() / a.norm() > .02


# The reproduction's losses

@pytest.fixture(scope='module')
def released():
    "Its inputs; cosines as it makes them: norms with 1e-6 added, at 41×41, interpolated without aligned corners."
    g = golden('bana_losses_reproduction')
    torch.manual_seed(13)       # the logits take 2 MB and follow from torch's generator; a sample of them is kept
    torch.randn(1, 8, 41, 41); torch.randn(5, 8, 1, 1); g['logits'] = torch.randn(1, 5, 321, 321)
    torch.testing.assert_close(g['logits'][..., ::8, ::8], g['logits_every_8th'])
    g['features'] = g['feature_map'].clone().requires_grad_()
    unit = g['features'] / (g['features'].norm(dim=1, keepdim=True) + 1e-6)
    g['scores'] = F.interpolate(F.conv2d(unit, F.normalize(g['cls_weight'])), (321, 321), mode='bilinear')
    g['z'], g['target'] = g['logits'].float().requires_grad_(), torch.stack([g['ycrf'], g['yret']], 1).long()
    return g


def test_released_nal(released):
    g = released
    loss = NoiseAwareLoss(original=True)(g['z'], g['target'], g['scores'])
    base = AgreementLoss()(g['z'], g['target'])
    torch.testing.assert_close(base, g['nal_ce'], rtol=1e-5, atol=0)
    torch.testing.assert_close((loss - base) / .1, g['nal_wce'], rtol=2e-5, atol=0)
    torch.testing.assert_close(loss, g['nal'], rtol=1e-5, atol=0)
    dz, df = torch.autograd.grad(loss, (g['z'], g['features']), retain_graph=True)
    torch.testing.assert_close(dz[..., ::8, ::8], g['nal_grad_logit'], rtol=1e-4, atol=1e-10)
    torch.testing.assert_close(df, g['nal_grad_feat'], rtol=1e-3, atol=1e-6)


def test_released_entropy_and_bootstrapping(released):
    g = released
    z, y = g['z'], g['target']
    er = EntropyLoss(original=True)(z, y)
    torch.testing.assert_close(er, g['er'], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(er, z)[0][..., ::8, ::8], g['er_grad_logit'], rtol=1e-4, atol=1e-10)
    base = AgreementLoss()(z, y)
    torch.testing.assert_close(base, g['baseline_patched'], rtol=1e-5, atol=0)
    for beta in (1., .5, 0.):
        bs = BootstrapLoss(beta, original=True)(z, y)
        torch.testing.assert_close(bs, g[f'bs_beta{beta}'], rtol=1e-5, atol=0)
        torch.testing.assert_close((bs - base) / .1, g[f'bs_term_beta{beta}'], rtol=2e-5, atol=0)


def test_the_intended_sets(released):
    "Reference values of the disputed pixels only."
    g = released
    base = AgreementLoss()(g['z'], g['target'])
    for loss, key in ((NoiseAwareLoss(), 'ref_wce_unreliable_only'), (EntropyLoss(), 'ref_er_unreliable_only'), (BootstrapLoss(0.), 'ref_er_unreliable_only')):
        torch.testing.assert_close((loss(g['z'], g['target'], g['scores']) - base) / .1, g[key], rtol=2e-5, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0, 1), st.floats(0, 1), st.sampled_from(list(LOSSES)))
def test_never_nan(seed, c, void, wrong, name):
    "Whatever the sets: finite, void without influence, 254 like 255, other classes' labels without influence on agreed pixels."
    g = torch.Generator().manual_seed(seed)
    z, crf = torch.randn(2, c, 5, 7, generator=g) * 8, torch.randint(0, c, (2, 5, 7), generator=g)
    ret = torch.where(torch.rand(crf.shape, generator=g) < wrong, torch.randint(0, c, crf.shape, generator=g), crf)
    for m in (crf, ret): m[torch.rand(m.shape, generator=g) < void] = VOID
    y, loss = torch.stack([crf, ret], 1), LOSSES[name]()
    z.requires_grad_()
    value = loss(z, y)
    grad, = torch.autograd.grad(value, z)
    assert value.isfinite() and grad.isfinite().all()
    assert loss(z, torch.where(y == VOID, UNLABELLED, y)) == value
    silent = {'ce_crf': crf == VOID, 'ce_ret': ret == VOID, 'baseline': (crf == VOID) | (crf != ret)}.get(name, (crf == VOID) | (ret == VOID))
    assert not grad.movedim(1, -1)[silent].any()


@pytest.mark.parametrize('name', LOSSES)
def test_half_precision_does_not_overflow(name):
    y = torch.randint(0, 2, (4, 2, 300, 300))
    assert LOSSES[name]()((torch.randn(4, 2, 300, 300) * 20).half(), y).isfinite()


def test_masked_mean_of_nothing(): assert masked_mean(torch.tensor([3.]), torch.tensor([0.])) == 0


# Schedules

def test_poly_and_beta():
    g = golden('bana_lr')
    rates = PolySchedule([1e-3, 2e-3]).scheds['lr']
    for i, want in zip((0, 1, 100, 10000, 23804), g['author_poly_lr'].tolist()): np.testing.assert_allclose(rates(i / 23805), [want, 2 * want], rtol=1e-6)
    got = g['re_bs_beta_first2000'].numpy()      # trap T4: the factors compound
    np.testing.assert_allclose(got, np.cumprod((1 - np.arange(1, 2001) / 23805) ** .9), rtol=1e-6)


def test_crf_of_the_test():
    g = {k: v.numpy() for k, v in golden('bana_dense_crf').items()}
    for name, key in (('vgg', 'Q_vgg'), ('resnet', 'Q_res')):
        np.testing.assert_allclose(crf_probabilities(g['image'], g['prob'], STAGE3[name].crf), g[key], atol=1e-4)
    assert STAGE3['resnet'].crf == PRESETS['deeplab']


# Networks

def test_shapes_of_the_authors_networks():
    "Every tensor of LargeFOV, and of the head of the ResNet, has the authors' shape."
    want = json.loads((GOLDEN/'bana_arch_shapes.json').read_text())
    net = create_net('deeplab_largefov-cosine', n_classes=21, pretrained=False).net
    assert [list(v.shape) for v in net.state_dict().values()] == list(want['vgg_largefov'].values())
    net = create_net('deeplab_v2-cosine', 'resnet101', n_classes=21, pretrained=False).net
    theirs = want['aspp_res101']
    heads = [v for k, v in theirs.items() if not k.startswith('backbone.')]
    assert [list(v.shape) for v in net.head.state_dict().values()] == heads
    def trunk(shapes): return sorted(map(list, shapes))
    assert trunk(v.shape for v in net.encoder.state_dict().values()) == trunk(v for k, v in theirs.items() if k.startswith('backbone.'))


@pytest.mark.parametrize('arch', ['unet', 'deeplabv3plus', 'deeplab_v2', 'original_unet', 'fpn', 'segformer'])
def test_logits_are_bounded_and_lengths_do_not_count(arch):
    torch.manual_seed(0)
    net = create_net(f'{arch}-cosine', n_classes=4, pretrained=False, tau=7.).eval()
    head = [m for m in net.modules() if isinstance(m, CosineHead)]
    x = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        y = net(x)
        head[0].weight.mul_(5.)
        torch.testing.assert_close(net(x), y, atol=1e-4, rtol=1e-4)
    assert len(head) == 1 and y.shape == (1, 4, 40, 56) and y.abs().max() <= 7.001 and y.std() > 0
    assert net.config['arch'] == f'{arch}-cosine' and net.config['tau'] == 7.


def test_no_cosine_for_a_sum():
    with pytest.raises(ValueError, match='hidden=256'): cosine_net(create_net('deeplab_v2', pretrained=False))
    with pytest.raises(InputError, match='Take one of'): create_net('nothing-cosine')


# Training

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Ten photos of a bright disc; of each a map and a larger one."
    root, rng, maps = tmp_path_factory.mktemp('discs'), np.random.default_rng(0), ({}, {})
    for i in range(10):
        h, w = rng.integers(40, 70, 2)
        y, x = np.mgrid[:h, :w]
        r = np.hypot(y - rng.uniform(.3, .7) * h, x - rng.uniform(.3, .7) * w)
        Image.fromarray((np.where((r < 12)[..., None], (220, 180, 60), (30, 60, 90)) + rng.integers(0, 30, (h, w, 3))).astype(np.uint8)).save(root/f'{i}.png')
        for m, radius in zip(maps, (12, 16)): m[str(i)] = (r < radius).astype(np.uint8)
    items = [Item(str(i), root/f'{i}.png', tags=(1,)) for i in range(10)]
    view = Dataset('discs', ('disc',), items, {'train': [o.id for o in items]}).view('tags', 'train')
    return view, *[lambda o, m=m: m[o.id] for m in maps]


def weights(learn): return torch.cat([p.float().flatten() for p in learn.model.state_dict().values()])


def test_both_maps_go_the_same_way(data):
    "The smaller disc stays inside the larger one, and nothing is between 0 and 1."
    view, crf, ret = data
    torch.manual_seed(0)
    x, y = two_label_learner(view, crf, ret, **SMALL).dls.one_batch()
    assert y.shape == (4, 2, 32, 32) and y.dtype == torch.int64 and set(y.unique().tolist()) == {0, 1}
    assert (y[:, 1] >= y[:, 0]).all() and (y[:, 1] > y[:, 0]).any()
    bright = x[:, 0] > x[:, 2]
    assert (bright == (y[:, 0] == 1)).float().mean() > .95, 'the labels lie on their photo'


@pytest.mark.parametrize('name', LOSSES)
def test_each_loss_trains(data, name):
    "Every loss lowers itself, is reproducible, and gives a network that can be saved."
    view, crf, ret = data
    def train(): return fit(two_label_learner(view, crf, ret, name, **SMALL), 3, 2e-2)
    learn = train()
    assert weights(learn).equal(weights(train()))
    losses = [float(o) for o in learn.recorder.losses]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])


def test_ce_crf_is_the_ordinary_training(data):
    "One map of two is the training on that map alone, bit for bit."
    view, crf, ret = data
    o = {k: v for k, v in SMALL.items() if k != 'arch'}
    for name, read in (('ce_crf', crf), ('ce_ret', ret)):
        a = fit(two_label_learner(view, crf, ret, name, arch='unet', **o), 1, slice(1e-3, 5e-3), wd=.01)
        assert weights(a).equal(weights(train_segmenter(view, read, epochs=1, arch='unet', **o)))


def test_saved_and_opened(data, tmp_path):
    view, crf, ret = data
    model = segmenter(fit(two_label_learner(view, crf, ret, tau=11., **SMALL), 1, 1e-2))
    image = np.array(Image.open(view[0].image))
    assert np.allclose(load_segmenter(model.save(tmp_path/'m')).probabilities(image), model.probabilities(image), atol=1e-6)      # another memory layout adds in another order
    assert json.loads((tmp_path/'m'/'model.json').read_text())['net']['tau'] == 11.
    mask = STAGE3['vgg'].mask(image, model.probabilities(image))
    assert mask.shape == image.shape[:2] and mask.dtype == np.uint8


class Killed(Callback):
    order = 95
    def before_batch(self):
        if self.epoch == 1 and self.iter == 1: raise KeyboardInterrupt


def test_bana_schedule_resumes(data, tmp_path):
    "SGD with falling rates and β; a killed training ends with the same weights."
    view, crf, ret = data
    train = partial(train_noise_aware, view, crf, ret, 'bs', epochs=3, backbone='tf_efficientnet_lite0', **SMALL)
    learn = train()
    assert weights(learn).isfinite().all() and 0 < learn.loss_func.beta < .5
    rates = {m for _, m in rate_groups(learn.model, 'net.encoder.')}
    assert rates == {1, 2, 10, 20} and learn.opt.hypers[-1]['lr'] > 5 * learn.opt.hypers[0]['lr'] and learn.opt.hypers[0]['lr'] < 1e-3
    with suppress(KeyboardInterrupt): train(path=tmp_path/'c.pth', cbs=[Killed()])
    assert (tmp_path/'c.pth').is_file() and weights(train(path=tmp_path/'c.pth')).equal(weights(learn))


def test_largefov_trains(data):
    view, crf, ret = data
    learn = train_noise_aware(view, crf, ret, epochs=1, size=24, bs=2, pretrained=False)
    assert weights(learn).isfinite().all() and learn.model.config['arch'] == 'deeplab_largefov-cosine'


@pytest.mark.parametrize('change, message', [
    (lambda m: m[1:], 'two label maps'), (lambda m: np.full_like(m, 9), r'numbers \[9\]')])
def test_bad_labels_are_named(data, change, message):
    view, crf, ret = data
    with pytest.raises(InputError, match=message) as e: two_label_learner(view, crf, lambda o: change(ret(o)), **SMALL).dls.one_batch()
    assert '.png' in e.value.path


def test_wrong_requests(data):
    view, crf, ret = data
    with pytest.raises(InputError, match='Take unet-cosine'): two_label_learner(view, crf, ret, **{**SMALL, 'arch': 'unet'})
    with pytest.raises(ValueError, match='none of nal'): two_label_learner(view, crf, ret, 'nla', **SMALL)
    with pytest.raises(ValueError, match='two label maps'): NoiseAwareLoss()(torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))
