"""SC-CAM against the original's arrays; sub-categories of odd classes; rounds that are killed, resumed, damaged."""
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn
from torch.nn import functional as F

from wsss_nb.data.items import InputError
from wsss_nb.data.pets import pets
from wsss_nb.data.sample import sample
from wsss_nb.data.store import MapStore
from wsss_nb.data.voc import voc
from wsss_nb.evaluate.metrics import Confusion
from wsss_nb.localize import subcategory
from wsss_nb.localize.backbones import create_backbone
from wsss_nb.localize.cam import CamClassifier, cam, cam_learner, normalise_maps, pooled_features, write_cams
from wsss_nb.localize.puzzle import train_puzzle
from wsss_nb.localize.subcategory import (SubcategoryClassifier, SubcategoryLoss, SubLabels, cluster_class, cluster_classes,
                                          find_subcategories, label_rows, load_labels, load_subcategories, merge_submaps,
                                          normalise_submaps, present_classes, save_labels, save_subcategories, subcategory_learner,
                                          submap_entropy, submap_sums, train_subcategories, write_submaps)
from wsss_nb.localize.training import fit

GOLDEN = Path(__file__).parent/'golden'


def golden(name):
    with np.load(GOLDEN/f'sccam_{name}.npz', allow_pickle=False) as z: return {k: z[k] for k in z}


@pytest.fixture(scope='module')
def view(): return voc(sample(profile='smoke')/'voc/VOC2012').view('tags', 'train')


@pytest.fixture
def few(view): return view.keep(lambda o: o.id in view.ids[:4])


def some_labels(view, k=2, seed=0):
    "Sub-categories by chance."
    present = present_classes(view)
    clusters = np.random.default_rng(seed).integers(0, k, present.shape)
    return SubLabels(view.ids, np.where(present, clusters, -1), k)


def quiet(learn, epochs=1, lr=1e-3):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr)
    return learn


# The original's bookkeeping

def test_rows_of_the_original():
    "Its lists of pairs, walked class by class, give the rows that a single assignment gives (`create_pseudo_label.py`)."
    g = golden('labels')
    present = g['label20'] > 0
    clusters = np.full(present.shape, -1)
    for c in g['kmeans_classes']: clusters[present[:, c], c] = g[f'kmeans_labels_{c}']
    order = present.argmax(1).argsort(kind='stable')      # an image first turns up in its first class
    assert g['names'][order].tolist() == g['out_names'].tolist()
    assert np.array_equal(label_rows(clusters, 10)[order], g['out_label200'])
    assert np.array_equal(g['label20'][order], g['out_label20'])          # trap T4: a reordering, nothing more
    assert present.sum() == len(g['merged_names'])


def test_heaps_of_the_original():
    "Ours are at least as tight as the given ones: ten starts each (trap T1)."
    g = golden('labels')
    ours = cluster_classes(g['features'], g['label20'] > 0)
    def spread(f, labels): return sum(((f[labels == j] - f[labels == j].mean(0))**2).sum() for j in np.unique(labels))
    for c in g['kmeans_classes']:
        f = g['features'][g['label20'][:, c] > 0]
        mine = ours[g['label20'][:, c] > 0, c]
        assert set(mine) == set(range(10)) and spread(f, mine) <= spread(f, g[f'kmeans_labels_{c}']) * 1.02
    assert ((ours >= 0) == (g['label20'] > 0)).all()


def test_loss_of_the_original():
    g = {k: torch.tensor(v) for k, v in golden('loss').items()}
    z, y = torch.cat([g['x20'], g['x200']], 1), torch.cat([g['y20'], g['y200']], 1)
    loss = SubcategoryLoss(20)
    parent, sub = loss.parts(z, y)
    assert np.allclose([parent, sub, loss(z, y)], [g['loss20'], g['loss200'], g['loss']], atol=1e-5)


def test_maps_of_the_original():
    g = golden('cam')
    chosen = np.flatnonzero(g['label'])
    total = torch.tensor(g['cam200_msf_cls2_14']).sum(0).unflatten(0, (2, 10))     # both classes, ten maps each
    subs = normalise_submaps(total)
    assert np.allclose(subs.flatten(0, 1), g['norm200'], atol=1e-6)
    assert np.allclose(merge_submaps(subs), g['merged200'], atol=1e-6)
    assert np.allclose(submap_entropy(total), g['entropy'], atol=1e-5)
    parent = normalise_maps(torch.tensor(g['cam20_msf']).sum(0)[chosen]).numpy()
    assert np.allclose(parent, g['norm20'], atol=1e-6)
    label = np.concatenate([[0], chosen + 1])[np.concatenate([np.full((1, *parent.shape[1:]), .15), parent]).argmax(0)]
    assert np.array_equal(label, g['segmap_th015'])
    truth = g['gt']
    s = Confusion(21).add(label.astype(np.uint8), truth).scores()
    in_truth = [c for c in range(21) if (truth == c).any()]         # its mean leaves out classes that are not in the truth
    assert np.isclose(s['iou'][in_truth].mean(), g['scores_mIoU']) and np.isclose(s['pixel_accuracy'], g['scores_pixacc'])


# Heaps

@given(st.integers(0, 12), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_image_has_a_heap(n, k, seed):
    f = np.random.default_rng(seed).normal(size=(n, 2)).round().astype(np.float32)      # some photos twice
    with warnings.catch_warnings():
        warnings.simplefilter('error', ConvergenceWarning)
        labels = cluster_class(f, k, seed, n_init=1)
    assert len(labels) == n and set(labels) == set(range(min(k, len({tuple(r) for r in f}))))
    for a in range(n):
        for b in range(n):
            if (f[a] == f[b]).all(): assert labels[a] == labels[b]


@given(st.integers(0, 10), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_one_place_for_each_class_present(n, classes, k, seed):
    clusters = np.random.default_rng(seed).integers(-1, k, (n, classes))
    rows = label_rows(clusters, k).reshape(n, classes, k)
    assert np.array_equal(rows.sum(2), clusters >= 0)
    assert all(rows[i, c, clusters[i, c]] == 1 for i, c in zip(*np.nonzero(clusters >= 0)))


def test_a_class_without_images_and_one_with_few(view):
    "More sub-categories than images, classes that nobody has: the rest of their places stays empty."
    labels = find_subcategories(CamClassifier(create_backbone(pretrained=False), 20), view, k=7, size=64)
    present = present_classes(view)
    assert (present.sum(0) == 0).any() and present.sum(0).max() < 7 and present.sum(1).max() > 1
    assert np.array_equal(labels.rows.reshape(len(view), 20, 7).sum(2), present)
    for c in np.flatnonzero(present.any(0)): assert set(labels.clusters[present[:, c], c]) == set(range(present[:, c].sum()))


def test_heaps_are_of_the_unmirrored_photo(view):
    "The features are those of `pooled_features`, single scale, no flip; twice the same."
    net = CamClassifier(create_backbone(pretrained=False), 20)
    labels = find_subcategories(net, view, 3, size=64)
    f = pooled_features(net.eval().backbone, view, 64)[:, 0].numpy()
    assert np.array_equal(labels.clusters, cluster_classes(f, present_classes(view), 3))
    assert np.array_equal(labels.clusters, find_subcategories(net.train(), view, 3, size=64, bs=3).clusters)


def test_several_threads_change_nothing():
    "k-means of many images runs in one thread, however many there may be."
    f, seen, real = np.random.default_rng(0).normal(size=(1500, 16)).astype(np.float32), [], subcategory.KMeans
    class Watched(real):
        def fit(self, *args):
            seen.extend(i['num_threads'] for i in threadpool_info())
            return super().fit(*args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(subcategory, 'KMeans', Watched)
        with threadpool_limits(2): a = cluster_class(f, 8, n_init=2)
        with threadpool_limits(1): b = cluster_class(f, 8, n_init=2)
    assert np.array_equal(a, b) and set(seen) == {1}


# The network

def test_the_classes_maps_are_those_of_a_plain_classifier(view, tmp_path):
    "`maps`, `cam` and `write_cams` know nothing of the second head."
    torch.manual_seed(0)
    net = SubcategoryClassifier(create_backbone(pretrained=False), 20, 3).eval()
    plain = CamClassifier(net.backbone, 20).eval(); plain.head = net.head
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(net.maps(x), plain.maps(x))) and torch.equal(net(x), plain(x))
        assert all(torch.equal(a, b) for a, b in zip(cam(net, x, (1., .5)), cam(plain, x, (1., .5))))
    stores = [MapStore(tmp_path/n) for n in 'ab']
    for n, s in zip((net, plain), stores): assert write_cams(n, view, s, size=64, scales=(1.,)) == []
    assert all(np.array_equal(stores[0].load(i).values, stores[1].load(i).values) for i in view.ids)


def test_submaps_are_maps_of_the_second_head():
    torch.manual_seed(0)
    net = SubcategoryClassifier(create_backbone(pretrained=False), 4, 3).eval()
    nn.init.normal_(net.subhead.bias)
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        m, z = net.submaps(x)
        f = net.backbone.forward_features(x)
        assert torch.allclose(m, torch.einsum('nfhw,cf->nchw', f, net.subhead.weight), atol=1e-4)
        assert torch.allclose(z, net.subhead(f.mean((2, 3))), atol=1e-4)
        both = net.train()(x)
    assert both.shape == (2, 16)


def test_order_of_relu_flip_upsampling_and_mask():
    "Trap T12: the original enlarges first, flips back and leaves out classes later; the sum is the same."
    torch.manual_seed(0)
    net = SubcategoryClassifier(create_backbone(pretrained=False), 4, 3).eval()
    x, scales, keep = torch.randn(1, 3, 64, 128), (1., .5, 2.), [1, 3]
    total = submap_sums(net, x, scales)
    expected = 0
    with torch.inference_mode():
        for s in scales:
            for flip in (False, True):
                v = F.interpolate(x, size=[int(64 * s), int(128 * s)], mode='bilinear', align_corners=False)
                m = net.submaps(v.flip(3) if flip else v)[0].relu()
                m = F.interpolate(m, size=total.shape[-2:], mode='bilinear', align_corners=False)
                expected = expected + (m.flip(3) if flip else m)
    assert torch.allclose(total[:, keep], expected.unflatten(1, (4, 3))[:, keep], atol=1e-4)


@pytest.mark.parametrize('k', [1, 4])
def test_merged_maps_of_a_view(view, tmp_path, k):
    net, store = SubcategoryClassifier(create_backbone(pretrained=False), 20, k), MapStore(tmp_path)
    assert write_submaps(net, view, store, size=64, scales=(1.,), bs=3) == []
    x = torch.stack([torch.zeros(3, 64, 64)])
    assert submap_entropy(submap_sums(net, x)).shape == submap_sums(net, x)[:, :, 0].shape
    for o in view:
        m = store.load(o.id)
        assert tuple(m.keys) == o.tags and 0 <= m.values.min() and m.values.max() <= 1


def test_a_broken_photo_is_listed_and_the_rest_is_done(few, tmp_path):
    (tmp_path/'bad.jpg').write_bytes(b'\xff\xd8\xff no')
    items = [replace(few[0], id='bad', image=tmp_path/'bad.jpg'), few[1]]
    mixed = few.keep(lambda o: True); mixed._items = items
    store = MapStore(tmp_path/'maps')
    bad = write_submaps(SubcategoryClassifier(create_backbone(pretrained=False), 20, 2), mixed, store, size=64, scales=(1.,))
    assert [i for i, _ in bad] == ['bad'] and store.ids() == [few[1].id]


# The learner

def test_a_batch_holds_both_rows(view):
    labels = some_labels(view, 3)
    learn = subcategory_learner(view, labels, size=64, bs=8, pretrained=False, augment=False)
    dl = learn.dls.test_dl(list(view), with_labels=True)
    _, y = dl.one_batch()
    assert np.array_equal(y.numpy(), np.concatenate([present_classes(view), labels.rows], 1))
    assert [learn.dls.vocab[j] for j in (0, 14, 20, 22)] == ['aeroplane', 'person', 'aeroplane #0', 'aeroplane #2']


def test_both_heads_learn(view):
    learn = subcategory_learner(view, some_labels(view), size=64, bs=4, pretrained=False)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    after = quiet(learn).model.state_dict()
    for k in ('head.weight', 'subhead.weight', 'head.bias', 'subhead.bias', 'backbone.conv_stem.weight'): assert not torch.equal(before[k], after[k])
    assert len(learn.opt.param_lists) == 2 and sum(map(len, learn.opt.param_lists)) == len(list(learn.model.parameters()))


def test_single_label_views():
    "Pets: one-hot rows, and a background class where the view has photos of none."
    view = pets(sample(profile='smoke')/'pets', classes='breeds').view('tags', 'trainval')
    present = present_classes(view)
    assert view.single_label and (present.sum(1) == 1).all() and [np.flatnonzero(r)[0] + 1 for r in present] == [o.tags[0] for o in view]
    none = view.keep(lambda o: True)
    none._items = [replace(view[0], tags=()), *list(view)[1:]]
    assert present_classes(none).shape[1] == len(view.classes) + 1 and present_classes(none)[0, -1]
    labels = find_subcategories(CamClassifier(create_backbone(pretrained=False), 3), none, 2, size=64)
    learn = quiet(subcategory_learner(none, labels, size=64, bs=4, pretrained=False))
    assert learn.model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, len(view.classes) + 1)


def test_labels_of_others_are_refused(view):
    labels = some_labels(view)
    with pytest.raises(ValueError, match='have no sub-categories'): subcategory_learner(view, SubLabels(labels.ids[1:], labels.clusters[1:], 2), size=64, pretrained=False)
    with pytest.raises(ValueError, match='other tags'): subcategory_learner(view, SubLabels(labels.ids, labels.clusters[::-1], 2), size=64, pretrained=False)
    with pytest.raises(InputError, match='no known tags'): present_classes(untagged(view))
    twins = view.keep(lambda o: True); twins.classes = ('bird', 'bird #0', *view.classes[2:])
    with pytest.raises(ValueError, match='share a name'): subcategory_learner(twins, labels, size=64, pretrained=False)
    with pytest.raises(ValueError, match='k is 0'): cluster_class(np.ones((2, 2)), 0)


def untagged(view):
    v = view.keep(lambda o: True); v._items = [replace(view[0], tags=None), *list(view)[1:]]
    return v


def test_shuffled_labels_find_their_images(view):
    "Paired by id, never by position."
    labels = some_labels(view)
    turned = SubLabels(labels.ids[::-1], labels.clusters[::-1], 2)
    ys = [subcategory_learner(view, l, size=64, pretrained=False, augment=False).dls.test_dl(list(view), with_labels=True).one_batch()[1] for l in (labels, turned)]
    assert torch.equal(*map(torch.Tensor, ys))


# Files

def test_labels_are_kept(view, tmp_path):
    labels = some_labels(view)
    save_labels(labels, tmp_path/'labels.npz')
    again = load_labels(tmp_path/'labels.npz')
    assert again.ids == view.ids and np.array_equal(again.clusters, labels.clusters) and again.k == 2
    assert [p.name for p in tmp_path.iterdir()] == ['labels.npz']


@pytest.mark.parametrize('spoil', ['cut', 'pickle', 'range', 'length', 'missing'])
def test_hostile_labels_are_refused(view, tmp_path, spoil):
    labels, path = some_labels(view), tmp_path/'labels.npz'
    save_labels(labels, path)
    if spoil == 'cut': path.write_bytes(path.read_bytes()[:300])
    if spoil == 'pickle': np.savez(path, ids=np.array([object()]), clusters=labels.clusters, k=2)
    if spoil == 'range': np.savez(path, ids=labels.ids, clusters=labels.clusters + 3, k=2)
    if spoil == 'length': np.savez(path, ids=labels.ids[1:], clusters=labels.clusters, k=2)
    if spoil == 'missing': path.unlink()
    with pytest.raises(InputError, match='labels.npz: not a readable list of sub-categories'): load_labels(path)


@pytest.mark.parametrize('spoil', ['', 'json', 'weights', 'other', 'missing'])
def test_saved_networks(view, tmp_path, spoil):
    learn = subcategory_learner(view, some_labels(view), size=64, pretrained=False)
    save_subcategories(learn, tmp_path, dict(backbone='tf_efficientnet_lite0', output_stride=16, n_outputs=20))
    file = tmp_path/'subcategories.safetensors'
    if spoil == 'json': (tmp_path/'subcategories.json').write_text('{"backbone": 3}')
    if spoil == 'weights': file.write_bytes(b'\x80\x04K\x01.')
    if spoil == 'other': save_file({k: v for k, v in load_file(file).items() if 'subhead' not in k}, file)
    if spoil == 'missing': file.unlink()
    if spoil:
        with pytest.raises(InputError, match='not a readable network of sub-categories'): load_subcategories(tmp_path)
        return
    x, net = torch.randn(1, 3, 64, 64), load_subcategories(tmp_path)
    with torch.inference_mode(): assert torch.equal(net.submaps(x)[0], learn.model.eval().submaps(x)[0]) and not net.training


# Rounds

TINY = dict(rounds=2, k=2, epochs=3, lr=1e-2, size=64, bs=4, seed=3)


@pytest.fixture(scope='module')
def undisturbed(view, tmp_path_factory):
    folder = tmp_path_factory.mktemp('rounds')
    return folder, train_subcategories(view, folder, **TINY)


def test_rounds_by_the_originals_optimiser(few, tmp_path):
    "Every round by SGD with four groups of parameters, both heads at ten times the rate; round 0 is a plain classifier."
    seen = []
    def train(*args, **kwargs): seen.append(train_puzzle(*args, **kwargs)); return seen[-1]
    nets = train_subcategories(few, tmp_path, rounds=1, k=2, epochs=1, lr=1e-3, size=64, bs=4, train=train)
    assert [type(n).__name__ for n in nets] == ['CamClassifier', 'SubcategoryClassifier'] and not any(hasattr(l, 'puzzle') for l in seen)
    for learn, heads in zip(seen, (1, 2)):
        assert [h['mom'] for h in learn.opt.hypers] == [1e-4] * 4 and [h['wd'] for h in learn.opt.hypers] == [1e-4, 0, 1e-4, 0]
        assert [len(g) for g in learn.opt.param_lists][2:] == [heads, heads]


def contents(folder):
    "Bytes of all files."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file() and p.name[0] != '.'}


def test_rounds(undisturbed, view):
    "What is written, what comes back, and that each round begins with ImageNet's weights."
    folder, nets = undisturbed
    assert [type(n) for n in nets] == [CamClassifier, SubcategoryClassifier, SubcategoryClassifier] and not any(n.training for n in nets)
    assert set(contents(folder)) == {'settings.json', 'round0/classifier.json', 'round0/classifier.safetensors',
        *(f'round{r}/{f}' for r in (1, 2) for f in ('labels.npz', 'subcategories.json', 'subcategories.safetensors'))}
    for r in (1, 2):
        made = find_subcategories(nets[r - 1], view, 2, 3, 64, 4)
        assert np.array_equal(load_labels(folder/f'round{r}/labels.npz').clusters, made.clusters)
        learn = subcategory_learner(view, made, size=64, bs=4, seed=3)     # a round by hand, from ImageNet's weights
        with learn.no_bar(), learn.no_logging(): fit(learn, 3, slice(1e-3, 1e-2), seed=3)
        assert all(torch.equal(v, nets[r].state_dict()[k]) for k, v in learn.model.state_dict().items())


@pytest.mark.skipif(os.name != 'posix', reason='needs SIGKILL')
def test_killed_in_any_round_and_resumed_is_bitwise_the_same(undisturbed, view, tmp_path):
    "SIGKILL at the moment when a file gets its name: the end of round 0, the labels of round 1, the second epoch of round 2."
    folder = tmp_path/'rounds'
    code = textwrap.dedent(f"""
        import os, signal, sys
        file, left = sys.argv[1], int(sys.argv[2])
        def watch(event, args):
            global left
            if event == 'os.rename' and str(args[1]).endswith(file):
                left -= 1
                if not left: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        from wsss_nb.data.sample import sample
        from wsss_nb.data.voc import voc
        from wsss_nb.localize.subcategory import train_subcategories
        view = voc(sample(profile='smoke')/'voc/VOC2012').view('tags', 'train')
        train_subcategories(view, {str(folder)!r}, **{TINY!r})""")
    environment = {**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads())}
    for file, nth in (('round0/classifier.json', 1), ('round1/labels.npz', 1), ('round2/checkpoint.pth', 2)):
        child = subprocess.run([sys.executable, '-c', code, file, str(nth)], capture_output=True, text=True, env=environment, timeout=300)
        assert child.returncode == -signal.SIGKILL, child.stderr
        assert (folder/file).exists() == (nth > 1)
    assert (folder/'round1/subcategories.json').exists() and not (folder/'round2/subcategories.json').exists()
    train_subcategories(view, folder, **TINY)
    ours, theirs = contents(folder), contents(undisturbed[0])
    assert set(ours) == set(theirs) and [f for f in ours if ours[f] != theirs[f]] == []


def test_what_is_finished_is_not_done_again(undisturbed, view):
    folder, nets = undisturbed
    times = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
    again = train_subcategories(view, folder, **TINY)
    assert times == {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
    assert all(torch.equal(v, b.state_dict()[k]) for a, b in zip(nets, again) for k, v in a.state_dict().items())
    assert len(train_subcategories(view, folder, **TINY | dict(rounds=1))) == 2


@pytest.mark.parametrize('other', [dict(k=3), dict(lr=.02), dict(seed=4), dict(weight=1.), dict(size=96), dict(epochs=2)])
def test_other_settings_are_refused(undisturbed, view, other):
    (name, now), = other.items()
    with pytest.raises(InputError, match=f'made with other settings: {name} .*, now {now}. Give another folder'):
        train_subcategories(view, undisturbed[0], **TINY | other)


def test_another_view_another_start_and_a_damaged_folder_are_refused(undisturbed, view, few, tmp_path):
    folder, nets = undisturbed
    with pytest.raises(InputError, match='other settings: images'): train_subcategories(few, folder, **TINY)
    with pytest.raises(InputError, match='other settings: start None, now'): train_subcategories(view, folder, **TINY, start=nets[0])
    for text in ('{"k": 2', '[1]', '{}'):
        (tmp_path/'settings.json').write_text(text)
        with pytest.raises(InputError, match='settings'): train_subcategories(view, tmp_path, **TINY)


def test_a_given_start_is_sorted_first(few, tmp_path):
    "Its features make the labels of round 1; it is neither trained nor written."
    net = cam_learner(few, size=64).model
    before = {k: v.clone() for k, v in net.state_dict().items()}
    one = TINY | dict(rounds=1, epochs=1)
    nets = train_subcategories(few, tmp_path, **one, start=net)
    assert nets[0] is net and not (tmp_path/'round0').exists() and all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert np.array_equal(load_labels(tmp_path/'round1/labels.npz').clusters, find_subcategories(net, few, 2, 3, 64, 4).clusters)
    with torch.no_grad(): net.head.bias += 1
    with pytest.raises(InputError, match='other settings: start'): train_subcategories(few, tmp_path, **one, start=net)


def test_training_opens_no_mask(few, tmp_path):
    assert all(o.mask is None for o in few)
    assert len(train_subcategories(few, tmp_path, **TINY | dict(rounds=1, epochs=1))) == 2
