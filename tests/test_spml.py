"SPML's loss, optimiser and schedule against the original's numbers; training, resuming, processes and hostile labels."
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastai.callback.core import Callback
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from wsss_nb.data.items import UNLABELLED, VOID, Dataset, InputError, Item
from wsss_nb.localize.training import fit
from wsss_nb.segment.clusters import Segments, location_features, retrieve, segment_pixels
from wsss_nb.segment.contrast import annotation_loss
from wsss_nb.segment.embedding import EmbeddingNet
from wsss_nb.segment.spml import (PAPER, SPML, STUDY, Prototypes, SPMLLoss, SPMLNet, WarmPoly, batch_prototypes, caffe_sgd, gather_rows, load_spml, poly_rate,
                                  decay_groups, save_spml, spml_learner, train_spml)

GOLDEN = Path(__file__).parent/'golden'


def golden(name):
    with np.load(GOLDEN/f'{name}.npz', allow_pickle=False) as z: return {k: torch.from_numpy(np.array(z[k])) for k in z}


# The original's numbers

def test_schedule():
    g = golden('spml_schedule')
    got = [poly_rate(3e-3, int(t), 30_000) for t in g['iters']]
    np.testing.assert_allclose(got, g['lr'], rtol=1e-12)


def test_optimiser():
    "Six steps with a rate that changes; a group with ten times the rate."
    g = golden('spml_schedule')
    p = nn.Parameter(g['sgd_p0'].clone())
    opt = caffe_sgd([p], 1., wd=5e-4)
    for i, (grad, want) in enumerate(zip(g['sgd_grads'], g['sgd_params'])):
        opt.set_hypers(lr=10 * poly_rate(3e-3, i, 6, 2))
        p.grad = grad.clone()
        opt.step()
        torch.testing.assert_close(p.data, want, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope='module')
def g():
    "The arrays of the whole loss; the release's 21 and above are 254 here."
    g = golden('spml_voc_loss')
    for k in ('semantic_hi', 'mem_sem0', 'mem_sem1'): g[k] = g[k].masked_fill((g[k] >= 21) & (g[k] != VOID), UNLABELLED)
    return g


def head_of(g):
    "The softmax head with the recorded weights, in eval mode."
    net = SPMLNet(21, 'resnet18', 16, pretrained=False)
    names = {'0.weight': '0.0.weight', '4.weight': '2.weight', '4.bias': '2.bias', **{f'1.{k}': f'0.1.{k}' for k in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')}}
    net.classifier.load_state_dict({v: g[f'clf_semantic_classifier.{k}'] for k, v in names.items()})
    return net.eval()


@pytest.mark.parametrize('memory', ['nomem', 'mem'])
def test_voc_loss(g, memory):
    "Each term, weighted, and the gradient of their sum; κ = 16 as released has lost digits."
    e = g['embedding'].clone().requires_grad_()
    maps = torch.stack([g['semantic_hi'], F.interpolate(g['instance'][:, None].float(), (96, 128)).long()[:, 0]], 1)
    loss = SPMLLoss(21, SPML(), empty='zero')
    if memory == 'mem':
        def bank(i): n = len(g[f'mem_proto{i}']); return Prototypes(g[f'mem_proto{i}'], torch.zeros(n, 18), g[f'mem_sem{i}'], torch.zeros(n).long(), g[f'mem_batch{i}'], g[f'mem_tag{i}'][:, 1:21] > 0)
        loss.memory = [bank(0), bank(1)]
    local = location_features(24, 32).expand(2, -1, -1, -1)
    total = loss((e, head_of(g).classify(e), local), maps, g['semantic_tag'][:, 1:21])
    total.backward()
    p = {k: float(v) for k, v in loss.parts.items()}
    np.testing.assert_allclose(.3 * (p['ce'] + p['ann']), g[f'{memory}_sem_ann_incl_ce'], rtol=1e-5)
    np.testing.assert_allclose(.3 * p['occ'], g[f'{memory}_sem_occ'], rtol=1e-5)
    np.testing.assert_allclose(.1 * p['img'], g[f'{memory}_img_sim'], rtol=1e-4)
    want = g[f'{memory}_grad_embedding']
    torch.testing.assert_close(e.grad, want, rtol=0, atol=5e-4 * float(want.abs().max()))
    seen = Prototypes.joined([loss.last[0], *loss.memory])
    accuracy = (seen.label[retrieve(seen.unit, seen.unit, 5)[1]] == seen.label[:, None]).float().mean()
    np.testing.assert_allclose(accuracy, g[f'{memory}_top5_acc'], rtol=1e-6)     # trap S10: each counts as its own neighbour; only shown here


def test_gathered_prototypes():
    g = golden('spml_prototypes')
    own, n = g['g_cluster'], len(g['g_proto'])
    s = Segments((2, 24, 32), torch.arange(len(own)), own, g['g_proto_batch'], own[:n], g['g_proto_sem'], g['g_proto_inst'])
    p, images, before, first = batch_prototypes(s, g['emb'], g['emb_loc'], torch.tensor([[True, False], [False, True]]))
    torch.testing.assert_close(p.unit, g['g_proto'], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p.joint, g['g_proto_loc'], rtol=1e-5, atol=1e-6)
    assert p.label.equal(g['g_proto_sem']) and p.image.equal(g['g_proto_batch']) and p.tags[:, 1].equal(p.image == 1) and (images, before, first) == (2, 0, 0)


# Presets and network

def test_presets():
    for kind, p in PAPER.items():
        s = STUDY[kind]
        assert (p.backbone, p.size, p.bs, p.lr, p.wd, p.warmup) == ('resnet101s', 512, 16, 3e-3, 5e-4, 100)
        same = dict(backbone=p.backbone, size=p.size, bs=p.bs, iterations=p.iterations, lr=p.lr, dropout=p.dropout, bn_momentum=p.bn_momentum, scale=p.scale, rates=p.rates, shrink=p.shrink,
                    head=p.head, output_stride=p.output_stride, crop=p.crop)
        assert (p.crop, p.scale, p.output_stride) == ('shape', (.5, 1.5), 8)
        assert replace(s, **same) == p
    with pytest.raises(AttributeError): PAPER['tags'].ce = 0


@pytest.mark.parametrize('kind', ['scribbles', 'densepose'])
def test_network(kind, tmp_path):
    "Shapes, what learns, what stands still in training, and the two files."
    p = PAPER[kind]
    net = SPMLNet(15, 'resnet18', p.dim, p.head, colour=p.colour, bn_momentum=p.bn_momentum, pretrained=False)
    x, before = torch.randn(2, 3, 64, 48), {k: v.clone() for k, v in net.state_dict().items()}
    e, logits, local = net(x)
    assert e.shape == (2, p.dim, 16, 12) and logits.shape == (2, 15, 16, 12) and local.shape == (2, 16, 12, 5 if p.colour else 2)
    (e.square().sum() + logits.square().sum()).backward()
    torch.optim.SGD([q for g, _, _ in decay_groups(net) for q in g], 1e-3).step()
    moved = {k for k, v in net.state_dict().items() if not v.equal(before[k])}
    assert not [k for k in moved if k.split('.')[2] in ('conv1', 'bn1', 'layer1')]      # S12
    assert any('layer2' in k for k in moved) and any(k.startswith('head') for k in moved)
    assert [(m, d) for _, m, d in decay_groups(net)] == [(1, 1.), (2, 0.), (10, 1.), (20, 0.)]
    assert net.encoder.model.layer2[0].bn1.momentum == 3e-4


def test_softmax_head_does_not_move_the_embedding():
    e = torch.randn(1, 8, 4, 4, requires_grad=True)
    net = SPMLNet(3, 'resnet18', 8, pretrained=False)
    net.classify(e).sum().backward()
    assert e.grad is None


# Loss

def example(seed=0, n=2, size=48, classes=4, dim=8, share=.3):
    r = torch.Generator().manual_seed(seed)
    def blocks(high): return F.interpolate(torch.randint(0, high, (n, 1, size // 12, size // 12), generator=r).float(), (size, size)).long()[:, 0]
    label = blocks(classes)
    label[torch.rand(label.shape, generator=r) > share] = UNLABELLED
    e, logits = torch.randn(n, dim, size // 4, size // 4, generator=r), torch.randn(n, classes, size // 4, size // 4, generator=r)
    return [e.requires_grad_(), logits.requires_grad_(), location_features(size // 4, size // 4).expand(n, -1, -1, -1)], torch.stack([label, blocks(9)], 1), (torch.rand(n, classes - 1, generator=r) < .6).float()


ALL = SPML(ce=.4, ann=.3, occ=.3, img=.1, aff=.5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10 ** 6), st.sets(st.sampled_from(['ce', 'ann', 'occ', 'img', 'aff'])), st.booleans())
def test_switches(seed, off, memory):
    "S7: any combination gives its weighted sum, finite, with a finite gradient."
    loss = SPMLLoss(4, replace(ALL, **dict.fromkeys(off, 0.)))
    if memory: loss(*example(seed + 1)); loss.remember()
    pred, maps, tags = example(seed)
    total = loss(pred, maps, tags)
    total.backward()
    assert set(loss.parts) == {'ce', 'ann', 'occ', 'img', 'aff'} - off
    torch.testing.assert_close(total.detach(), torch.as_tensor(sum((getattr(ALL, k) * v for k, v in loss.parts.items()), torch.tensor(0.))))
    assert total >= 0 and all(t.grad is None or t.grad.isfinite().all() for t in pred)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10 ** 6), st.sampled_from([None, 0, 3, UNLABELLED, VOID]), st.sampled_from(['as they are', 'one void', 'one unlabelled']), st.booleans(), st.booleans())
def test_poor_labels(seed, label, other, one_region, tagged):
    "No label, no tag, one region, void images: a finite loss and gradient, whatever the combination."
    pred, maps, tags = example(seed)
    if label is not None: maps[:, 0] = label
    if other != 'as they are': maps[0, 0] = VOID if other == 'one void' else UNLABELLED
    if one_region: maps[:, 1] = 0
    loss = SPMLLoss(4, ALL)
    total = loss(pred, maps, tags * tagged)
    total.backward()
    loss.remember()
    again = loss(*example(seed + 1))
    assert total.isfinite() and again.isfinite() and all(t.grad.isfinite().all() for t in pred[:2])
    if label == VOID: assert total == 0 and not pred[0].grad.any()
    if label in (UNLABELLED, VOID): assert loss.parts['ce'] >= 0


def test_one_segment():
    "One cluster, one label, one region, one image."
    pred, maps, tags = example(n=1)
    maps[:] = 1
    total = SPMLLoss(4, replace(ALL, grid=1, ce=0.))(pred, maps, tags)
    total.backward()
    assert total == 0 and not pred[0].grad.any()


def test_memory():
    "Two batches without gradients, image numbers that never meet the present ones; none for DensePose."
    loss = SPMLLoss(4, ALL)
    for seed in range(4): loss(*example(seed)); loss.remember()
    assert [p.image.unique().tolist() for p in loss.memory] == [[4, 5], [2, 3]]
    assert not any(p.unit.requires_grad for p in loss.memory)
    loss = SPMLLoss(4, PAPER['densepose'])
    loss(*example()); loss.remember()
    assert loss.memory == []


def _process(rank, world, folder, parts):
    os.environ.update(MASTER_ADDR='127.0.0.1', GLOO_SOCKET_IFNAME='lo')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    x = torch.arange(6. * (rank + 2)).view(-1, 3).requires_grad_()      # 4 rows and 6
    rows, before = gather_rows(x)
    ((rank + 1) * rows.square()).sum().backward()
    e, maps, tags = parts[rank]
    e = e.clone().requires_grad_()
    loss = SPMLLoss(4, replace(ALL, ce=0.))
    total = loss((e, torch.zeros(len(e), 4, 12, 12), location_features(12, 12).expand(len(e), -1, -1, -1)), maps, tags)
    total.backward(); loss.remember()
    torch.save({'rows': rows.detach(), 'before': before, 'grad': x.grad, 'e': e.grad, 'images': loss.memory[0].image, **loss.parts}, f'{folder}/{rank}.pth')
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    "S8: rows of unequal number, with gradients of both; a loss over the prototypes of both, images numbered by rank."
    (e, _, local), maps, tags = example(n=3)
    e, parts = e.detach(), [(slice(0, 1)), (slice(1, 3))]
    mp.spawn(_process, (2, str(tmp_path), [(e[s].clone(), maps[s].clone(), tags[s].clone()) for s in parts]), nprocs=2)
    got = [torch.load(tmp_path/f'{r}.pth', weights_only=True) for r in range(2)]
    assert all(len(o['rows']) == 10 for o in got) and [o['before'] for o in got] == [0, 4]
    for r, o in enumerate(got): torch.testing.assert_close(o['grad'], 3 * 2 * torch.arange(6. * (r + 2)).view(-1, 3))
    assert [o['images'].unique().tolist() for o in got] == [[3, 4, 5], [3, 4, 5]]
    one = SPMLLoss(4, replace(ALL, ce=0.))
    x = e.clone().requires_grad_()
    label, region = F.interpolate(maps.float(), (12, 12)).long().unbind(1)
    s, unit, joint = segment_pixels(x, label, region, 6, local=local)
    p, *_ = batch_prototypes(s, unit, joint, tags > 0)
    for r, where in enumerate(parts):
        mine = ((s.image[s.id] >= where.start) & (s.image[s.id] < where.stop))
        want = annotation_loss(unit[mine], s.label[s.id][mine], s.id[mine], p.unit, p.label, 4, 6.)
        torch.testing.assert_close(got[r]['ann'], want.detach(), rtol=1e-5, atol=1e-6)
    x.grad = None
    total = 0
    for where in parts:     # both processes' losses of one batch
        mine = ((s.image[s.id] >= where.start) & (s.image[s.id] < where.stop))
        fake = Segments(s.shape, s.pixel[mine], s.id[mine], s.image, s.cluster, s.label, s.region)
        rel = _relations_of(one, fake, s, unit, joint, mine, tags > 0)
        total = total + sum(getattr(ALL, k) * v for k, v in rel.items())
    total.backward()
    torch.testing.assert_close(torch.cat([o['e'] for o in got]), x.grad, rtol=1e-4, atol=1e-6)


def _relations_of(loss, part, whole, unit, joint, mine, tags):
    "Losses of some pixels against the prototypes of all."
    from wsss_nb.segment import spml
    old = spml.batch_prototypes
    spml.batch_prototypes = lambda *args: old(whole, unit, joint, tags)
    try: return loss.relations(part, unit[mine], joint[mine], tags)
    finally: spml.batch_prototypes = old


# Training

@pytest.fixture(scope='module')
def view(tmp_path_factory):
    "Eight small photographs of two kinds; a bright square is class 1, a dark one class 2."
    folder, rng, items = tmp_path_factory.mktemp('photos'), np.random.default_rng(0), []
    for i in range(8):
        a = rng.integers(90, 130, (40, 48, 3), np.uint8)
        a[8:28, 10:30] = 230 if i % 2 else 20
        Image.fromarray(a).save(folder/f'p{i}.png')
        items.append(Item(f'p{i}', folder/f'p{i}.png', tags=(1 + (i % 2 == 0),)))
    return Dataset('squares', ['bright', 'dark'], items, {'train': [o.id for o in items]}).view('scribbles', 'train')


def read_label(o):
    m = np.full((40, 48), UNLABELLED, np.uint8)
    m[16:19, 14:26], m[34:36, 5:40] = o.tags[0], 0
    return m


def read_region(o):
    m = np.zeros((40, 48), np.int32)
    m[8:28, 10:30] = 700
    return m


SMALL = dict(backbone='resnet18', size=32, bs=4, dim=8, grid=3, pretrained=False, lr=3e-3)


def trained(view, epochs=2, label=read_label, region=read_region, **kwargs):
    learn = spml_learner(view, label, region, **{**SMALL, **kwargs})
    with learn.no_bar(), learn.no_logging(): fit(learn, epochs, 1e-3)
    return learn


def quiet(view, **kwargs):
    "`train_spml` without output."
    class Quiet(Callback):
        def after_create(self): self.learn.remove_cbs([cb for cb in self.learn.cbs if cb.name in ('progress', 'recorder_print')]); self.learn.logger = lambda *a: None
    return train_spml(view, read_label, read_region, cbs=[Quiet()], **{**SMALL, **kwargs})


def state(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}


def test_batches(view):
    "Photo and both maps go through the same crop; tags and numbers come along."
    x, maps, tags, number = spml_learner(view, read_label, lambda o: (read_label(o) == o.tags[0]) * 300, **{**SMALL, 'shrink': 'first'}).dls.train.one_batch()
    assert maps.shape == (4, 2, 32, 32) and maps.dtype == torch.int64
    assert set(maps[:, 0].unique().tolist()) <= {0, 1, 2, UNLABELLED} and set(maps[:, 1].unique().tolist()) == {0, 300}
    for m, t, n in zip(maps, tags, number):
        assert (m[1] == 300).equal((m[0] == 1) | (m[0] == 2))
        assert t.tolist() == [float(int(n) % 2), float(int(n) % 2 == 0)]


def test_crops_at_a_photos_own_shape(view):
    "The paper's crops are windows of the scaled photo; beyond it is void, and the photo is not squashed."
    whole = dict(shrink='first', crop='shape', scale=(.5, .5))
    x, maps, *_ = spml_learner(view, read_label, read_region, **{**SMALL, **whole}).dls.train.one_batch()
    assert x.shape == (4, 3, 32, 32) and maps.shape == (4, 2, 32, 32)
    assert ((maps[:, 0] == VOID).sum((1, 2)) == 32 * 32 - 20 * 24).all()     # photos of 40×48 pixels, halved
    assert ((maps[:, 1] == 700).sum((1, 2)) == 10 * 10).all()
    squashed = spml_learner(view, read_label, read_region, **{**SMALL, 'scale': (1., 1.)}).dls.train.one_batch()[1]
    assert not (squashed[:, 0] == VOID).any()


@pytest.mark.parametrize('head, stride', [('rates', 8), ('pyramid', 8), ('stages', 8), ('stages', 16), ('stages', 32)])
def test_heads(head, stride):
    "A quarter of the image, whatever the head and its backbone's stride; gradients reach the stages that learn."
    net = EmbeddingNet(3, 'resnet18', 8, head, rates=(1, 2), output_stride=stride, pretrained=False)
    e, _ = net(torch.randn(2, 3, 72, 40))
    assert e.shape == (2, 8, 18, 10)
    e.square().sum().backward()
    learn = [p.grad is not None for n, p in net.named_parameters() if p.requires_grad and not n.startswith('classifier')]
    assert all(learn) and len(learn) > 20
    if head == 'stages':        # an early stage has a way of its own
        with torch.no_grad():
            for p in net.head.convs[-1].parameters(): p.zero_()
            for conv in net.head.convs[1:-1]: conv.weight.zero_(); conv.bias.zero_()
        x = torch.randn(1, 3, 64, 64); y = x.clone(); y[..., 40:] = 0
        a, b = (net.eval()(v)[0] for v in (x, y))
        assert a[..., :6].allclose(b[..., :6]) and not a[..., 10:].allclose(b[..., 10:])


def test_same_seed_same_bits_and_resume(view, tmp_path):
    "Twice the same; killed in the second of three passes and started again: the same."
    one, two, other = (state(quiet(view, epochs=3, seed=s)) for s in (1, 1, 2))
    assert all(v.equal(two[k]) for k, v in one.items()) and not all(v.equal(other[k]) for k, v in one.items())

    class Kill(Callback):
        def after_batch(self):
            if self.epoch == 1 and self.training: raise KeyboardInterrupt
    path = tmp_path/'state.pth'
    learn = spml_learner(view, read_label, read_region, seed=1, cbs=[Kill()], **SMALL)
    groups = decay_groups(learn.model)
    rates = [3e-3 * m for _, m, _ in groups]
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging():
        fit(learn, 3, rates[-1], seed=1, wd=[5e-4 * d for _, _, d in groups], path=path, schedule=WarmPoly(rates, 3 * len(learn.dls.train)))
    assert path.is_file()
    again = state(quiet(view, epochs=3, seed=1, path=path))
    assert all(v.equal(again[k]) for k, v in one.items())


def test_it_learns_and_is_saved(view, tmp_path):
    learn = quiet(view, epochs=12, iterations=24)
    losses = [float(v) for v in learn.recorder.losses]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    save_spml(learn, tmp_path)
    net, settings_ = load_spml(tmp_path)
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode(): assert all(a.equal(b) for a, b in zip(net(x), learn.model.eval()(x)))
    assert settings_['classes'] == ['background', 'bright', 'dark']
    (tmp_path/'spml.json').write_text('{"net": {}}')
    with pytest.raises(InputError, match='SPML network'): load_spml(tmp_path)


def test_validation_leaves_the_memory_alone(view):
    learn = trained(view, 1, valid=.25)
    assert learn.loss_func.memory == [] and len(learn.recorder.values[0]) == 2


# Hostile labels

@pytest.mark.parametrize('value,text', [(3, 'numbers .3.'), (200, 'numbers .200.'), (253, 'numbers .253.')])
def test_unknown_numbers(view, value, text):
    with pytest.raises(InputError, match=text): trained(view, 1, label=lambda o: np.full((40, 48), value, np.uint8) if o.id == 'p3' else read_label(o))
    with pytest.raises(InputError, match='p3.png'): trained(view, 1, label=lambda o: np.full((40, 48), value, np.uint8) if o.id == 'p3' else read_label(o))


@pytest.mark.parametrize('which', ['label', 'region'])
def test_wrong_sizes(view, which):
    with pytest.raises(InputError, match=f'its {which} map is 20×40, the image 48×40'):
        trained(view, 1, **{which: lambda o: (read_label if which == 'label' else read_region)(o)[:, :20]})


def test_region_numbers(view):
    with pytest.raises(InputError, match='regions have numbers'): trained(view, 1, region=lambda o: read_region(o) - 1)


@pytest.mark.parametrize('value', [UNLABELLED, VOID])
def test_nothing_labelled(view, value):
    "In one image: trained. In all: said after the first pass."
    only = lambda o: np.full((40, 48), value, np.uint8) if o.id == 'p3' else read_label(o)
    assert np.isfinite([float(v) for v in trained(view, 1, label=only).recorder.losses]).all()
    with pytest.raises(InputError, match='no labelled pixel in any image'): trained(view, 1, label=lambda o: np.full((40, 48), value, np.uint8))


def test_unknown_tags_come_from_the_map(view):
    bare = view.keep(lambda o: True)
    bare._items = [replace(o, tags=None) for o in view]
    label = {o.id: read_label(o) for o in view}
    _, _, tags, number = spml_learner(bare, lambda o: label[o.id], read_region, **SMALL).dls.train.one_batch()
    for t, n in zip(tags, number): assert t.tolist() == [float(int(n) % 2), float(int(n) % 2 == 0)]


@pytest.mark.parametrize('what', ['image', 'batch norm', 'loss'])
def test_no_number(view, what):
    "An embedding or a loss that is no number stops the training and names batch and image; all images of the batch where batch norm has spread it, or the loss alone is wrong."
    class Spoil(Callback):
        order = -5
        def before_batch(self):
            self.ids = [f'p{int(n)}' for n in self.yb[2]]
            if what == 'image': self.model.eval()      # batch norm would spread it over the batch
            if what != 'loss': self.learn.xb = (torch.where((self.yb[2] == 5).view(-1, 1, 1, 1), torch.nan, self.xb[0]),)
    learn = spml_learner(view, read_label, read_region, cbs=[spoil := Spoil()], **SMALL)
    if what == 'loss': learn.loss_func.preset = replace(learn.loss_func.preset, ce=float('inf'))
    with pytest.raises(InputError) as e, learn.no_bar(), learn.no_logging(): fit(learn, 1, 1e-3)
    part = 'a loss' if what == 'loss' else 'an embedding'
    assert e.value.problem == f'{part} that is no number in batch {learn.iter} of epoch 0'
    assert e.value.path == ('p5' if what == 'image' else ', '.join(spoil.ids)) and len(spoil.ids) == 4 and (what == 'loss' or 'p5' in spoil.ids)


def test_mistakes_are_named(view):
    with pytest.raises(ValueError, match='none of tags, boxes, scribbles, points, densepose'): spml_learner(view, read_label, read_region, 'clicks')
    with pytest.raises(ValueError, match='none of rates, pyramid'): SPMLNet(3, 'resnet18', head='aspp', pretrained=False)
