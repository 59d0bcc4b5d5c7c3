"Regions without labels: the original's arrays, the majority vote against its plain form, stores and hostile files."
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.segmentation import find_boundaries

from wsss_nb.data.items import InputError, read_image
from wsss_nb.data.sample import sample
from wsss_nb.data.store import LabelStore
from wsss_nb.data.voc import voc
from wsss_nb.refine.regions import (RegionNet, RegionStore, majority, network_regions, original_paint, original_palette, original_perimeters, perimeters,
                                    superpixels, write_regions)

GOLDEN = Path(__file__).parent/'golden'
tidy = settings(deadline=None, max_examples=60)


@pytest.fixture(scope='module')
def uss(): return dict(np.load(GOLDEN/'silop_uss.npz'))


# The original's arrays

def test_superpixels_of_the_original(uss):
    rgb = uss['image_bgr'][..., ::-1]
    assert np.array_equal(superpixels(rgb, bgr=True) + 1, uss['slic1000'])
    assert np.array_equal(superpixels(rgb, bgr=True, n_segments=100) + 1, uss['slic100'])
    assert np.array_equal(superpixels(rgb, 'quick', bgr=True), uss['quickshift'])
    assert not np.array_equal(superpixels(rgb, 'quick'), uss['quickshift'])     # the channels matter


def test_first_response_of_the_original(uss):
    x = torch.from_numpy(uss['image_bgr']).permute(2, 0, 1)[None].float() / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(43)
        out = RegionNet()(x)[0].detach().numpy()
    assert np.abs(out[:, ::8, ::8] - uss['response_iter0_every8']).max() < 1e-3
    assert (out.argmax(0) == uss['argmax_iter0']).mean() > .999


def test_majority_and_painting_of_the_original(uss):
    assert np.array_equal(majority(uss['quickshift'], uss['argmax_iter0']), uss['refined_quick'])
    assert np.array_equal(majority(uss['slic100'], uss['argmax_iter0']), uss['refined_slic100'])
    assert np.array_equal(original_palette(), uss['color_avg'])
    assert np.array_equal(original_paint(uss['refined_quick']), uss['painted_quick'])


def test_one_step_learns_the_majority(uss):
    "The regions after one step are the refined labels, numbered anew."
    rgb, refined = uss['image_bgr'][..., ::-1], uss['refined_quick']
    got = network_regions(rgb, uss['quickshift'], steps=1, bgr=True)
    assert np.array_equal(got, np.unique(refined, return_inverse=True)[1].reshape(refined.shape))


@pytest.mark.parametrize('name', ['2007_000002', '2007_000003'])
@pytest.mark.parametrize('method', ['slic', 'quick'])
def test_perimeters_of_the_original(name, method):
    z = np.load(GOLDEN/f'silop_perimeterfit_{name}.npz')
    assert np.array_equal(original_perimeters(z[f'uss_{method}_bgr_cv2']), z[f'canny_{method}'])


def test_two_colours_alike():
    "The border between the regions that get colours 1 and 29 is lost in the painting and not here."
    labels = np.full((20, 64), 1)
    labels[:, 32:] = 29
    labels[-2:] = np.arange(64) // 2            # all 32 labels occur
    assert perimeters(labels)[:12, 31].all()
    assert not original_perimeters(original_paint(labels))[:12].any()


# Properties

pairs = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))

@tidy
@given(pairs)
def test_majority_is_the_vote_of_each_patch(shape):
    h, w, patches, labels, seed = shape
    rng = np.random.default_rng(seed)
    s, t = rng.integers(0, patches, (h, w)), rng.integers(0, labels, (h, w)).astype(np.uint8)
    got = majority(s, t)
    assert got.dtype == t.dtype
    for k in np.unique(s):
        values, counts = np.unique(t[s == k], return_counts=True)
        assert (got[s == k] == values[counts.argmax()]).all()      # argmax: the smallest of equals
    assert np.array_equal(majority(s, got), got)                   # nothing left to vote on
    order = rng.permutation(h * w)                                 # the order of the pixels does not matter
    assert np.array_equal(majority(s.ravel()[order], t.ravel()[order]), got.ravel()[order])
    assert np.array_equal(majority(rng.permutation(patches)[s], t), got)       # nor do the names of the patches


@tidy
@given(pairs)
def test_perimeters_against_skimage(shape):
    h, w, n, _, seed = shape
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n, (h, w))
    both = perimeters(labels) | perimeters(labels[::-1, ::-1])[::-1, ::-1]
    assert np.array_equal(both, find_boundaries(labels, mode='thick'))
    assert np.array_equal(perimeters(labels), perimeters(rng.permutation(n)[labels]))      # names do not matter
    assert perimeters(labels).any() == (len(np.unique(labels)) > 1)


def test_perimeters_lie_left_of_and_above_the_border():
    assert perimeters([[0, 0, 1], [0, 0, 1], [2, 2, 2]]).astype(int).tolist() == [[0, 1, 0], [1, 1, 1], [0, 0, 0]]


def test_the_network_leaves_no_trace_and_repeats_itself():
    "The same regions for any number of threads; generator and threads are put back."
    image = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    s, before, threads = superpixels(image, n_segments=30), torch.random.get_rng_state(), torch.get_num_threads()
    first = network_regions(image, s, steps=6, min_labels=0)
    assert torch.equal(torch.random.get_rng_state(), before) and torch.get_num_threads() == threads
    torch.set_num_threads(2)
    try:
        assert np.array_equal(network_regions(image, s, steps=6, min_labels=0), first)
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(threads)
    assert not np.array_equal(network_regions(image, s, steps=6, min_labels=0, seed=1), first)


def test_the_network_learns_its_majority():
    "Against the plainest form: arg max, vote, cross-entropy, momentum .9, rate .05."
    image = np.kron(np.random.default_rng(0).integers(0, 256, (5, 6, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    s, x = superpixels(image, n_segments=30), torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(43)
        net = RegionNet()
    weights = list(net.parameters())
    speed = [torch.zeros_like(p) for p in weights]
    for _ in range(8):
        out = net(x)
        labels = majority(s, out[0].argmax(0).numpy())
        loss = -out.log_softmax(1)[0].gather(0, torch.from_numpy(labels)[None]).mean()
        for p, v, g in zip(weights, speed, torch.autograd.grad(loss, weights)): p.data -= .05 * v.mul_(.9).add_(g)
    got = network_regions(image, s, steps=8, min_labels=0)
    assert (got == np.unique(labels, return_inverse=True)[1].reshape(labels.shape)).mean() > .98


def test_training_stops_at_few_labels():
    image = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    s = superpixels(image, n_segments=30)
    assert np.array_equal(network_regions(image, s, steps=5, min_labels=99), network_regions(image, s, steps=1))


# Hostile input

@pytest.mark.parametrize('image, problem', [(np.zeros((4, 4, 3)), 'uint8'), ([[1]], 'uint8'), (np.zeros((4, 4), np.uint8), 'H×W×3'), (np.zeros((1, 1, 3), np.uint8), 'two pixels'), (np.zeros((0, 4, 3), np.uint8), 'two pixels')])
def test_what_is_no_photograph(image, problem):
    with pytest.raises((TypeError, ValueError), match=problem): superpixels(image)
    with pytest.raises((TypeError, ValueError), match=problem): network_regions(image, np.zeros((1, 1), int))


def test_sizes_that_do_not_fit():
    image = np.zeros((4, 6, 3), np.uint8)
    with pytest.raises(ValueError, match='differ in size'): network_regions(image, np.zeros((6, 4), int))
    with pytest.raises(ValueError, match='differ in size'): majority(np.zeros((6, 4), int), np.zeros((4, 6), int))
    with pytest.raises(ValueError, match='at least 1'): network_regions(image, np.zeros((4, 6), int), steps=0)
    with pytest.raises(ValueError, match='H×W'): perimeters(np.zeros(3))


@pytest.mark.parametrize('shape', [(1, 2), (2, 1), (1, 40), (3, 3)])
@pytest.mark.parametrize('method', ['slic', 'quick'])
def test_tiny_photographs(shape, method):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    s = superpixels(image, method)
    assert s.shape == shape and network_regions(image, s, steps=2).shape == shape


def test_a_store_of_many_regions(tmp_path):
    store = RegionStore(tmp_path)
    for n, kind in ((200, np.uint8), (300, np.uint16), (70_000, np.uint32)):
        labels = np.arange(n).reshape(10, -1)
        store.save(f'n{n}', labels)
        back = store.load(f'n{n}')
        assert np.array_equal(back, labels) and back.dtype == kind
    for bad in (np.ones((2, 2)), np.array([[-1]]), np.arange(3)):
        with pytest.raises(ValueError, match='whole numbers'): store.save('x', bad)
    (tmp_path/'torn.npz').write_bytes((tmp_path/'n300.npz').read_bytes()[:60])
    np.savez(tmp_path/'pickled.npz', labels=np.array([[{}]], object))
    np.savez(tmp_path/'float.npz', labels=np.ones((2, 2)))
    for name in ('torn', 'pickled', 'float', 'missing'):
        with pytest.raises(InputError, match=name): store.load(name)


class Trap:
    "Leaves a file behind when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path/'evil.npz', labels=np.array([[Trap(tmp_path/'sprung')]], object))
    with pytest.raises(InputError, match='evil'): RegionStore(tmp_path).load('evil')
    assert not (tmp_path/'sprung').exists()


def digest(store): return {i: hashlib.sha256(store.load(i).tobytes()).hexdigest() for i in store.ids()}


def test_stored_regions_come_back(tmp_path):
    "What a store gives back is what was found, number by number."
    view = voc(sample(profile='smoke')/'voc'/'VOC2012').view('tags', 'train')
    one = view.keep(lambda o: o.id == view.ids[0])
    image = read_image(one[0].image)
    for store, steps in ((LabelStore(tmp_path/'labels'), 2), (RegionStore(tmp_path/'patches'), 0)):
        assert write_regions(one, store, steps=steps, workers=1, n_segments=40) == []
        patches = superpixels(image, n_segments=40)
        assert np.array_equal(store.load(one[0].id), network_regions(image, patches, steps=2) if steps else patches)


def test_a_broken_photograph_is_named_and_the_rest_is_done(tmp_path):
    import shutil
    folder = shutil.copytree(sample(profile='smoke')/'voc'/'VOC2012', tmp_path/'VOC2012')
    view = voc(folder).view('tags', 'train')
    broken, tiny = view[1], view[2]
    broken.image.write_bytes(broken.image.read_bytes()[:100])
    from PIL import Image
    Image.new('RGB', (1, 1)).save(tiny.image)
    store, other = LabelStore(tmp_path/'regions'), LabelStore(tmp_path/'again')
    bad = write_regions(view, store, steps=2, workers=1, n_segments=40)
    assert [i for i, _ in bad] == sorted([broken.id, tiny.id]) and all(i in text for i, text in bad)
    assert len(store) == len(view) - 2
    times = {i: store.path(i).stat().st_mtime_ns for i in store.ids()}
    Image.new('RGB', (8, 6), 'red').save(broken.image)
    assert [i for i, _ in write_regions(view, store, steps=2, workers=1, n_segments=40)] == [tiny.id]
    assert store.load(broken.id).shape == (6, 8) and all(store.path(i).stat().st_mtime_ns == t for i, t in times.items())
    write_regions(view, other, steps=2, workers=2, n_segments=40)      # in processes: the same regions
    assert digest(other) == digest(store)


def test_stores_and_methods_that_do_not_fit(tmp_path):
    view = voc(sample(profile='smoke')/'voc'/'VOC2012').view('tags', 'train').keep(lambda o: True)
    with pytest.raises(ValueError, match='slic, quick'): write_regions(view, LabelStore(tmp_path), 'watershed')
    with pytest.raises(ValueError, match='give a RegionStore'): write_regions(view, LabelStore(tmp_path), steps=0, workers=1)
    assert not len(LabelStore(tmp_path))
