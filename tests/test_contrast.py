"Pixel-to-segment losses against the original's numbers, a value in double precision, and torch's finite differences."
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from wsss_nb.segment import contrast
from wsss_nb.segment.contrast import affinity_loss, annotation_loss, cooccurrence_loss, nearest_labels, original_nll, region_loss, segment_contrast, share

GOLDEN = Path(__file__).parent/'golden'


def golden(name):
    with np.load(GOLDEN/f'{name}.npz', allow_pickle=False) as z: return {k: torch.from_numpy(np.array(z[k])) for k in z}


@pytest.fixture(scope='module')
def g():
    "The arrays of the losses, with the labels' relations and the prototypes of other images appended."
    g = golden('spml_contrastive_losses')
    classes = int(g['proto_sem'].max()) + 1
    g['related'] = g['proto_sem'] == torch.arange(classes)[:, None]
    g['all'], g['all_images'] = torch.cat([g['proto'], g['extra_proto']]), torch.cat([g['proto_batch'], g['extra_proto_batch']])
    return g


def leaves(*tensors): return [t.clone().requires_grad_() for t in tensors]


# The original's numbers

@pytest.mark.parametrize('kappa', [6, 8, 12, 16])
def test_exact(g, kappa):
    "The value in double precision, at every κ."
    got = segment_contrast(g['emb'], g['sem'], g['cluster'], g['proto'], g['related'], kappa, reduce=False)
    torch.testing.assert_close(got.double(), golden('spml_contrastive_exact')[f'exact_nll_{kappa}'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kappa,rtol', [(6, 1e-5), (8, 1e-4), (12, 5e-3)])
def test_released_values_and_gradients(g, kappa, rtol):
    "The release loses digits by its subtraction, the more the larger κ; the gradients are those of the mean."
    got = segment_contrast(g['emb'], g['sem'], g['cluster'], g['proto'], g['related'], kappa, reduce=False)
    torch.testing.assert_close(got, g[f'nll_segsort+_{kappa}'][:, 0], rtol=rtol, atol=rtol)
    e, p = leaves(g['emb'], g['proto'])
    segment_contrast(e, g['sem'], g['cluster'], p, g['related'], kappa).backward()
    for got, name in ((e.grad, 'gemb'), (p.grad, 'gproto')):
        want = g[f'{name}_segsort+_{kappa}']
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.abs().max()))


@pytest.mark.parametrize('name', ['segsort+', 'segsort'])
@pytest.mark.parametrize('kappa', [6, 8, 12, 16])
def test_original_form(g, name, kappa):
    e, p = leaves(g['emb'], g['proto'])
    got = original_nll(e, g['cluster'], p, g['related'][g['sem']], kappa, others=name == 'segsort+')
    got.mean().backward()
    for a, b in ((got, f'nll_{name}_{kappa}'), (e.grad, f'gemb_{name}_{kappa}'), (p.grad, f'gproto_{name}_{kappa}')):
        torch.testing.assert_close(a, g[b].reshape(a.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kappa', [8, 12])
def test_released_sets(g, kappa):
    tags = g['tags'].bool()
    args = g['cluster'], g['all'], tags, tags[g['all_images']], kappa
    torch.testing.assert_close(cooccurrence_loss(g['emb'], g['batch'], *args, reduce=False), g[f'set_nll_tags_{kappa}'][:, 0], rtol=1e-4, atol=1e-4)
    e, = leaves(g['emb'])
    cooccurrence_loss(e, g['batch'], *args).backward()
    torch.testing.assert_close(e.grad, g[f'set_gemb_tags_{kappa}'], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('kappa', [8, 12])
def test_images_without_tags(g, kappa):
    "S5: the release counts the own segment twice; here these pixels take no part."
    tags = g['notag'].bool()
    bare = ~tags.any(1)[g['batch']]
    assert 0 < bare.sum() < len(bare)
    e, = leaves(g['emb'])
    got = original_nll(e, g['cluster'], g['all'], share(tags, tags[g['all_images']])[g['batch']], kappa)
    got.mean().backward()
    torch.testing.assert_close(got, g[f'set_nll_notag_{kappa}'][:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(e.grad, g[f'set_gemb_notag_{kappa}'], rtol=1e-5, atol=1e-7)
    s = (kappa * g['emb'][bare] @ g['all'].T).exp()
    mine = s.gather(1, g['cluster'][bare, None])[:, 0]
    torch.testing.assert_close(got.detach()[bare], ((s.sum(1) + mine) / mine).log(), rtol=1e-4, atol=1e-5)
    e, = leaves(g['emb'])
    args = g['cluster'], g['all'], tags, tags[g['all_images']], kappa
    cooccurrence_loss(e, g['batch'], *args).backward()
    ours = cooccurrence_loss(g['emb'], g['batch'], *args, reduce=False)
    assert not e.grad[bare].any() and e.grad[~bare].any(1).all() and not ours[bare].any()
    torch.testing.assert_close(ours[~bare], g[f'set_nll_notag_{kappa}'][:, 0][~bare], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['top1_th0.95', 'top3_th0.5', 'top1_th-1.0'])
def test_nearest_labels(name):
    g = golden('spml_feature_affinity_tags')
    top, threshold = name[3:].split('_th')
    got = nearest_labels(g['proto'], g['proto_sem'], g['proto_batch'], 15, int(top), float(threshold))
    assert got.equal(g[f'tags_{name}'].bool())


def test_feature_affinity_is_computed():
    "S1: in the release it is never run; it has a value, and a gradient for pixels and prototypes."
    g = golden('spml_feature_affinity_tags')
    assert g['dp_occ_is_none']
    own = torch.arange(91).repeat(3)
    e = F.normalize(g['proto'][own] + .1 * torch.randn(len(own), 18, generator=torch.Generator().manual_seed(0)), dim=1)
    sets = nearest_labels(g['proto'], g['proto_sem'], g['proto_batch'], 15)
    e, p = leaves(e, g['proto'])
    affinity_loss(e, own, p, sets).backward()
    assert e.grad.any() and p.grad.any() and e.grad.isfinite().all()
    full = sets | ~sets.any(1, keepdim=True)
    want = original_nll(e.double(), own, p.double(), share(full[own], full), 12.).mean()
    torch.testing.assert_close(affinity_loss(e, own, p, sets).double(), want, rtol=1e-5, atol=1e-6)


def test_images_far_apart_do_not_lend_labels():
    "As released, with a threshold of −1 and positive cosines only, another image's label comes through."
    p = F.normalize(torch.tensor([[1., .1], [1., .2]]), dim=1)
    got = nearest_labels(p, torch.tensor([1, 9]), torch.tensor([0, 1]), 3, threshold=-1.)
    assert got.tolist() == [[False, True, False], [False, False, False]]


# Properties

def drawn(seed, pixels=24, segments=7, dims=3, classes=4, dtype=torch.float64):
    "Unit vectors, each segment with at least one pixel; group −1 for some."
    r = torch.Generator().manual_seed(seed)
    own = torch.cat([torch.arange(segments), torch.randint(0, segments, (pixels - segments,), generator=r)])
    e, p = (F.normalize(torch.randn(n, dims, generator=r, dtype=torch.float64), dim=1).to(dtype) for n in (pixels, segments))
    label = torch.randint(0, classes, (segments,), generator=r)
    group = torch.where(torch.rand(pixels, generator=r) < .2, -1, label[own])
    return e, group, own, p, label[None] == torch.arange(classes)[:, None]


def by_hand(e, group, own, p, related, kappa):
    "Pixel by pixel; None where it takes no part."
    out = []
    for i in range(len(e)):
        if group[i] < 0: out.append(None); continue
        s, same = (kappa * (p @ e[i])).exp(), related[group[i]]
        others = same & (torch.arange(len(p)) != own[i])
        n = s[others].sum() if others.any() else s[own[i]]
        out.append(-(n / (n + s[~same].sum())).log())
    return out


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10 ** 6), st.sampled_from([1., 6., 16.]), st.sampled_from([8, 64, 10 ** 6]))
def test_definition(seed, kappa, block):
    "Whatever the blocks, the definition; pixels of no group get a loss of 0 and no gradient."
    e, group, own, p, related = drawn(seed)
    want = by_hand(e, group, own, p, related, kappa)
    old, contrast.BLOCK = contrast.BLOCK, block
    try:
        nll = segment_contrast(e, group, own, p, related, kappa, reduce=False)
        a, b = leaves(e, p)
        loss = segment_contrast(a, group, own, b, related, kappa)
        loss.backward()
    finally: contrast.BLOCK = old
    torch.testing.assert_close(nll, torch.stack([e.new_zeros(()) if w is None else w for w in want]))
    parts = [w for w in want if w is not None]
    torch.testing.assert_close(loss.detach(), torch.stack(parts).mean() if parts else e.new_zeros(()))
    assert not a.grad[group < 0].any()
    c, d = leaves(e, p)
    parts = [w for w in by_hand(c, group, own, d, related, kappa) if w is not None]
    if parts:
        torch.stack(parts).mean().backward()
        torch.testing.assert_close(a.grad, torch.zeros_like(e) if c.grad is None else c.grad)
        torch.testing.assert_close(b.grad, torch.zeros_like(p) if d.grad is None else d.grad)


@pytest.mark.parametrize('kappa', [6., 16.])
def test_gradcheck(kappa):
    e, group, own, p, related = drawn(3)
    torch.autograd.gradcheck(lambda a, b: segment_contrast(a, group, own, b, related, kappa), leaves(e, p))
    torch.autograd.gradcheck(lambda a, b: 3 * segment_contrast(a, group, own, b, related, kappa), leaves(e, p))
    images = torch.arange(7) % 2
    torch.autograd.gradcheck(lambda a, b: region_loss(a, group + 1, images[own], own, b, related.int().argmax(0) + 1, images, kappa), leaves(e, p))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10 ** 6))
def test_order_and_numbers_do_not_matter(seed):
    "Pixels, prototypes and classes in another order: the same loss, never below 0."
    e, group, own, p, related = drawn(seed)
    r = torch.Generator().manual_seed(seed + 1)
    i, j, c = (torch.randperm(n, generator=r) for n in (len(e), len(p), len(related)))
    want = segment_contrast(e, group, own, p, related, 8.)
    moved = torch.where(group < 0, -1, c.argsort()[group])[i]
    assert want >= 0
    torch.testing.assert_close(segment_contrast(e[i], moved, j.argsort()[own[i]], p[j], related[c][:, j], 8.), want)


def test_low_precision_comes_in():
    "Half precision is widened, and nothing overflows at κ = 16 (S4)."
    e, group, own, p, related = drawn(0, dtype=torch.float16)
    for autocast in (False, True):
        a = e.clone().requires_grad_()
        with torch.autocast('cpu', enabled=autocast): loss = segment_contrast(a, group, own, p, related, 16.)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and a.grad.isfinite().all()
        torch.testing.assert_close(loss, segment_contrast(e.double(), group, own, p.double(), related, 16.).float(), rtol=1e-4, atol=1e-5)


def test_same_bits():
    e, group, own, p, related = drawn(5, pixels=300, dtype=torch.float32)
    runs = []
    for _ in range(2):
        a, b = leaves(e, p)
        loss = segment_contrast(a, group, own, b, related, 6.)
        loss.backward()
        runs.append((loss.detach(), a.grad, b.grad))
    assert all(x.equal(y) for x, y in zip(*runs))


# Little or nothing there

def test_nothing_to_compare():
    "No labelled pixel, no pixel at all, one segment only, no tags, all tags alike: 0, and a gradient of 0."
    e, group, own, p, related = drawn(1, dtype=torch.float32)
    void, zero = torch.full_like(own, 255), torch.zeros_like(own)
    labels = related.int().argmax(0)
    cases = [lambda a, b: annotation_loss(a, void, own, b, labels, 4),
             lambda a, b: annotation_loss(a[:0], void[:0], own[:0], b, labels, 4),
             lambda a, b: annotation_loss(a, zero, zero, b[:1], labels[:1] * 0, 4),
             lambda a, b: cooccurrence_loss(a, zero, own, b, torch.zeros(1, 3).bool(), torch.zeros(7, 3).bool()),
             lambda a, b: cooccurrence_loss(a, zero, own, b, torch.ones(1, 3).bool(), torch.ones(7, 3).bool()),
             lambda a, b: region_loss(a[:0], zero[:0], zero[:0], own[:0], b, labels, labels * 0),
             lambda a, b: region_loss(a, zero, zero, zero, b[:1], labels[:1] * 0, labels[:1] * 0),
             lambda a, b: affinity_loss(a, own, b, torch.zeros(7, 4).bool())]
    for case in cases:
        a, b = leaves(e, p)
        loss = case(a, b)
        loss.backward()
        assert loss == 0 and not a.grad.any() and (b.grad is None or not b.grad.any())


def test_mistakes_are_named():
    e, group, own, p, related = drawn(2)
    def fails(text, *args):
        with pytest.raises(ValueError, match=text): segment_contrast(*args)
    fails('dimensions', e[:, :2], group, own, p, related, 6.)
    fails('as many groups', e, group[1:], own, p, related, 6.)
    fails('rows of 7 relations', e, group, own, p, related[:, 1:], 6.)
    fails('own segments 0 to 6', e, group, own + 1, p, related, 6.)
    fails('groups are −1 to 3', e, group + 4, own, p, related, 6.)
    with pytest.raises(ValueError, match='another image'): region_loss(e, group, own * 0 + 1, own, p, own[:7], own[:7] * 0)
    for kappa in (0., -1., 60.): fails('κ is above 0', e, group, own, p, related, kappa)
