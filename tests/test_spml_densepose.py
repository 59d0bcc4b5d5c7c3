"The losses of DensePose against the release, and the relation that it never computes."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from wsss_nb.data.items import UNLABELLED, VOID
from wsss_nb.segment.clusters import Segments, location_features
from wsss_nb.segment.contrast import original_nll, share
from wsss_nb.segment.spml import PAPER, SPMLLoss, SPMLNet

GOLDEN = Path(__file__).parent/'golden'
CLASSES = 15
DENSEPOSE = replace(PAPER['densepose'], dim=16, grid=6)


def golden(name):
    with np.load(GOLDEN/f'{name}.npz', allow_pickle=False) as z: return {k: torch.from_numpy(np.array(z[k])) for k in z}


def unlabelled(labels): return labels.masked_fill((labels >= CLASSES) & (labels != VOID), UNLABELLED)


@pytest.fixture(scope='module')
def g(): return golden('spml_feature_affinity_tags')


@pytest.fixture(scope='module')
def segments():
    "The recorded segments of two images: pixels, their embeddings, those with location."
    p = golden('spml_prototypes')
    own, n = p['g_cluster'], len(p['g_proto'])
    s = Segments((2, 24, 32), torch.arange(len(own)), own, p['g_proto_batch'], own[:n], unlabelled(p['g_proto_sem']), p['g_proto_inst'])
    return s, p['emb'], p['emb_loc']


def test_the_prototypes_are_those_of_the_release(g, segments):
    s, unit, joint = segments
    loss = SPMLLoss(CLASSES, DENSEPOSE)
    loss.relations(s, unit, joint, torch.zeros(2, CLASSES - 1).bool())
    last = loss.last[0]
    torch.testing.assert_close(last.joint, g['proto'], rtol=1e-5, atol=1e-6)
    assert last.image.equal(g['proto_batch']) and last.label.clamp(max=CLASSES).equal(g['proto_sem'])


def test_low_level_similarity(g, segments):
    "Weight .1, κ 16, embeddings without location; the release has lost digits by its subtraction."
    got = SPMLLoss(CLASSES, DENSEPOSE).relations(*segments, torch.zeros(2, CLASSES - 1).bool())
    np.testing.assert_allclose(DENSEPOSE.img * float(got['img']), g['dp_img_sim'], rtol=2e-4)
    with_location = SPMLLoss(CLASSES, replace(DENSEPOSE, img_location=True)).relations(*segments, torch.zeros(2, CLASSES - 1).bool())
    assert abs(DENSEPOSE.img * float(with_location['img']) / float(g['dp_img_sim']) - 1) > .1


def head(recorded):
    "The release's softmax head for 15 classes: drawn with seed 3, as its recorded head for 21 classes was."
    net = SPMLNet(CLASSES, 'resnet18', 16, pretrained=False)
    torch.manual_seed(3)
    first, last = net.classifier[0][0], net.classifier[2]
    first.reset_parameters(); last.reset_parameters()
    assert first.weight.equal(recorded['clf_semantic_classifier.0.weight'])
    return net.eval()


def batch(kind):
    "Embedding with gradient, logits, local features; both maps; one of the recorded batches."
    g = golden('spml_voc_loss')
    e = g['embedding'].clone().requires_grad_()
    maps = torch.stack([unlabelled(g['semantic_hi']), F.interpolate(g['instance'][:, None].float(), (96, 128)).long()[:, 0]], 1)
    logits = head(g).classify(e) if kind == 'head' else torch.zeros(2, CLASSES, 24, 32)
    return (e, logits, location_features(24, 32).expand(2, -1, -1, -1)), maps, torch.zeros(2, CLASSES - 1)


def test_the_whole_loss_as_recorded(g):
    "Cross-entropy and annotation under one weight of 1, similarity .1; no co-occurrence."
    loss = SPMLLoss(CLASSES, replace(DENSEPOSE, aff=0.), empty='zero')
    total = loss(*batch('head'))
    p = {k: float(v) for k, v in loss.parts.items()}
    assert set(p) == {'ce', 'ann', 'img'} and g['dp_occ_is_none']
    np.testing.assert_allclose(p['ce'] + p['ann'], g['dp_sem_ann_incl_ce'], rtol=1e-5)
    np.testing.assert_allclose(.1 * p['img'], g['dp_img_sim'], rtol=2e-4)
    np.testing.assert_allclose(float(total), g['dp_sem_ann_incl_ce'] + g['dp_img_sim'], rtol=2e-5)


def test_feature_affinity_has_its_own_switch():
    "S1: its term stands beside the others whatever they are, changes the gradient of the embedding, and nothing else of them."
    runs = {}
    for aff in (0., .5):
        loss, (pred, maps, tags) = SPMLLoss(CLASSES, replace(DENSEPOSE, aff=aff, ce=0.), empty='zero'), batch('none')
        total = loss(pred, maps, tags)
        total.backward()
        runs[aff] = total.detach(), pred[0].grad, loss.parts
    assert set(runs[.5][2]) - set(runs[0.][2]) == {'aff'}
    torch.testing.assert_close(runs[.5][0] - runs[0.][0], .5 * runs[.5][2]['aff'])
    assert runs[.5][2]['aff'] > 0 and not torch.allclose(runs[0.][1], runs[.5][1])
    alone = SPMLLoss(CLASSES, replace(DENSEPOSE, ce=0., ann=0., img=0.), empty='zero')
    assert alone(*batch('none')).isclose(runs[.5][0] - runs[0.][0]) and set(alone.parts) == {'aff'}


def test_feature_affinity_is_the_set_loss_of_the_recorded_labels(g, segments):
    "Near and labelled: the recorded sets; the term is the set loss over them, on embeddings without location."
    s, unit, joint = segments
    got = SPMLLoss(CLASSES, DENSEPOSE).relations(s, unit, joint, torch.zeros(2, CLASSES - 1).bool())['aff']
    sets = g['tags_top1_th0.95'].bool()
    full = sets | ~sets.any(1, keepdim=True)
    p = golden('spml_prototypes')['g_proto']
    want = original_nll(unit.double(), s.id, p.double(), share(full[s.id], full), 12.).mean()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
