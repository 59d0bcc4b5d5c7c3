"Pseudo masks from an embedding: against scikit-learn and SciPy, and with files that cannot be trusted."
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from wsss_nb.data.items import UNLABELLED, VOID, InputError, Item, read_image
from wsss_nb.data.store import LabelStore, Maps, MapStore
from wsss_nb.segment import spread
from wsss_nb.segment.clusters import prototypes, segment_pixels

SIZE, N = 32, 4


def write(path, image): Image.fromarray(image).save(path)


class Colours(nn.Module):
    "An embedding that everybody can follow: the colour of a place, grey in a direction of its own, four times as coarse."
    def embed(self, x):
        c = nn.functional.avg_pool2d(x, 4)
        return torch.cat([torch.ones_like(c[:, :1]), 4 * c], 1)
    def classify(self, e): return torch.cat([-e[:, 1:].abs().sum(1, keepdim=True), e[:, 1:]], 1)


class View(list):
    segment_of, classes, segment_classes = list(range(N)), ('red', 'green', 'blue'), ('red', 'green', 'blue')


@pytest.fixture
def photos(tmp_path):
    "Grey photos with a red, green or blue square; the fourth has two of them."
    made, rng = View(), np.random.default_rng(0)
    for k, squares in enumerate([[0], [1], [2], [0, 2]]):
        x = rng.integers(120, 136, (SIZE, SIZE, 3))
        for c, at in zip(squares, (4, 20)): x[at:at + 9, at:at + 9] = np.eye(3)[c] * 230 + 12
        write(tmp_path/f'{k}.png', x.astype(np.uint8))
        made.append(Item(f'{k}', tmp_path/f'{k}.png', tuple(c + 1 for c in squares)))
    return made


@pytest.fixture
def embedder(): return spread.Embedder(Colours(), ('background', *View.classes), SIZE)


def weak(item):
    "A point on each square, one on the background, a void corner."
    image, m = read_image(item.image), np.full((SIZE, SIZE), UNLABELLED, np.uint8)
    for t, at in zip(item.tags, (8, 24)): m[at:at + 2, at:at + 2] = t
    m[0:2, 16:18], m[-4:, :4] = 0, VOID
    assert m.shape == image.shape[:2]
    return m


def truth(item):
    m = np.zeros((SIZE, SIZE), np.uint8)
    for t, at in zip(item.tags, (4, 20)): m[at:at + 9, at:at + 9] = t
    return m


def right(store, view, least):
    for o in view:
        m = store.load(o.id)
        assert set(np.unique(m)) - {VOID} <= {0, *o.tags} and np.mean((m == truth(o))[m != VOID]) > least, o.id


# The three ways, and the maps

def test_softmax_that_walks(embedder, photos, tmp_path):
    store = LabelStore(tmp_path/'out')
    assert spread.write_walked_softmax(embedder, photos, store, workers=1, settings=None, cell=4) == []
    right(store, photos, .85)


def test_maps_that_walk(embedder, photos, tmp_path):
    maps, store = MapStore(tmp_path/'maps'), LabelStore(tmp_path/'out')
    for o in photos: maps.save(o.id, Maps(np.array(o.tags), np.stack([(truth(o) == t) * .9 for t in o.tags]).astype(np.float32)))
    assert spread.write_walked_cams(embedder, photos, maps, store, 1, settings=None, cell=4) == []
    right(store, photos, .85)


@pytest.mark.parametrize('settings', [None, spread.SPML_CRF])
def test_neighbours(embedder, photos, tmp_path, settings):
    memory, store = spread.segment_memory(embedder, photos, truth, grid=8), LabelStore(tmp_path/'out')
    assert spread.write_neighbour_labels(embedder, photos, memory, store, workers=1, settings=settings, k=3, grid=8) == []
    right(store, photos, .85)


def test_nearest_labelled_segment(embedder, photos, tmp_path):
    store = LabelStore(tmp_path/'out')
    assert spread.write_nearest_labels(embedder, photos, weak, store, 1, settings=None, grid=8, cell=4) == []
    right(store, photos, .85)
    for o in photos: assert ((store.load(o.id) == VOID) == (weak(o) == VOID)).all()


# Outside references

def test_votes_are_those_of_scikit_learn(embedder, photos):
    memory = spread.segment_memory(embedder, photos, truth, (1.,), 8)
    images = [read_image(o.image) for o in photos]
    scores = spread.neighbour_scores(embedder, images, memory, (1.,), 5, 8)
    knn = KNeighborsClassifier(5, algorithm='brute', metric='cosine').fit(memory.unit.double(), memory.label)
    total = 0
    for e in embedder(images)[:2]:
        s, unit, _ = segment_pixels(e, None, None, 8)
        found = np.zeros((len(s), N)); found[:, knn.classes_] = knn.predict_proba(prototypes(unit, s.id, len(s)).double())
        total = total + s.paint(torch.from_numpy(found)).movedim(3, 1)
    assert (scores - total / 2).abs().flatten(1).mean(1).max() < .02      # cosines that are equal to rounding may be taken in another order
    assert torch.allclose(scores.sum(1), torch.ones(len(photos), SIZE // 4, SIZE // 4), atol=1e-5)


def test_nearest_segment_is_that_of_scipy():
    torch.manual_seed(3)
    e, label = torch.randn(2, 5, 6, 7), torch.full((2, 6, 7), UNLABELLED)
    for n in range(2):
        for k, (y, x) in enumerate([(0, 0), (2, 5), (5, 1)]): label[n, y, x] = (k + n) % 3
    got = spread.nearest_scores(e, label, 3, 7)       # each pixel is a cluster
    for n in range(2):
        u = e[n].flatten(1).T.double()
        known = (label[n].flatten() < 3).nonzero()[:, 0]
        want = label[n].flatten()[known][cdist(u, u[known], 'cosine').argmin(1)]
        assert (got[n].argmax(0).flatten() == want).all()


def test_the_memory_holds_what_it_is_given(embedder, photos):
    "Not the truth: a label map of nothing but the first class gives a memory of nothing else."
    memory = spread.segment_memory(embedder, photos, lambda o: np.ones((SIZE, SIZE), np.uint8))
    assert set(memory.label.tolist()) == {1}
    some = spread.segment_memory(embedder, photos, weak)
    assert 0 < len(some) < len(memory) and int(some.label.max()) <= 3       # segments without any label are no part of it


# Classes that cannot be there (S16), tags that are unknown (S6)

def test_absent_classes(embedder, photos, tmp_path):
    "The votes of the release may name a class that the photo does not have; ours may not."
    memory = spread.segment_memory(embedder, photos, truth, (1.,), 8)
    wrong = View([Item('0', photos[0].image, (3,))])     # a red square, called blue
    ours, theirs = (LabelStore(tmp_path/k) for k in ('zero', 'keep'))
    for absent, store in (('zero', ours), ('keep', theirs)): spread.write_neighbour_labels(embedder, wrong, memory, store, workers=1, settings=None, absent=absent, k=1, grid=8)
    assert 1 not in ours.load('0') and 1 in theirs.load('0')


def test_a_photo_without_tags_takes_those_of_its_labels(embedder, photos, tmp_path):
    untagged, store = View([Item(o.id, o.image) for o in photos]), LabelStore(tmp_path/'out')
    problems = spread.write_walked_softmax(embedder, untagged, store, workers=1)
    assert len(problems) == len(photos) and all('its tags are unknown' in p for _, p in problems)
    assert spread.write_walked_softmax(embedder, photos, store, weak, 1, settings=None, cell=4) == []
    right(store, photos, .85)


# Bad input, resuming

def test_bad_photos_and_labels_are_named(embedder, photos, tmp_path):
    (tmp_path/'cut.png').write_bytes((tmp_path/'0.png').read_bytes()[:60])
    view, store = View([*photos, Item('cut', tmp_path/'cut.png', (1,))]), LabelStore(tmp_path/'out')
    (id, problem), = spread.write_walked_softmax(embedder, view, store, workers=1, settings=None)
    assert id == 'cut' and 'cut.png' in problem and len(list(store.ids())) == len(photos)
    def nothing(item): return np.full((SIZE, SIZE), UNLABELLED, np.uint8)
    with pytest.raises(InputError, match='no labelled pixel'): spread.segment_memory(embedder, photos, nothing)
    problems = spread.write_nearest_labels(embedder, photos, nothing, LabelStore(tmp_path/'none'), 1)
    assert [i for i, _ in problems] == [o.id for o in photos] and all('no labelled pixel' in p for _, p in problems)


def spoilt(way, good):
    "Label maps of which that of photo 2 has a number that is none, or another size."
    def read(item):
        m = good(item).astype(int)
        if item.id == '2' and way == 'size': return m[:, :20]
        if item.id == '2': m[0, 0] = way
        return m
    return read


WAYS = [(N, 'has the numbers [4]; 0 to 3 are classes'), (200, 'has the numbers [200]'), (256, 'has the numbers [256]'), (-1, 'has the numbers [-1]'), ('size', 'its label map is 20×32, the image 32×32')]


@pytest.mark.parametrize('way, says', WAYS)
def test_label_maps_that_cannot_be(embedder, photos, tmp_path, way, says):
    "The memory refuses them by the name of the photo; a view goes on without that photo."
    with pytest.raises(InputError) as e: spread.segment_memory(embedder, photos, spoilt(way, truth))
    assert e.value.path.endswith('2.png') and says in str(e.value) and e.value.remedy
    memory, untagged = spread.segment_memory(embedder, photos, truth, (1.,), 8), View([Item(o.id, o.image) for o in photos])
    tags, read = {o.id: o for o in photos}, spoilt(way, weak)
    def of_untagged(item): return read(tags[item.id])
    writers = {'softmax': lambda s: spread.write_walked_softmax(embedder, untagged, s, of_untagged, 1, settings=None, cell=4),
               'neighbours': lambda s: spread.write_neighbour_labels(embedder, untagged, memory, s, of_untagged, 1, settings=None, k=3, grid=8),
               'nearest': lambda s: spread.write_nearest_labels(embedder, photos, read, s, 1, settings=None, grid=8, cell=4)}
    for name, write in writers.items():
        (id, problem), = write(store := LabelStore(tmp_path/name))
        assert id == '2' and '2.png: its label map' in problem and says in problem, name
        assert sorted(store.ids()) == ['0', '1', '3'], name


def test_vectors_that_are_no_numbers(embedder, photos, tmp_path, monkeypatch):
    "Of one photo in the batch; the others get their label maps."
    memory, ask = spread.segment_memory(embedder, photos, truth, (1.,), 8), embedder.net.embed
    maps = MapStore(tmp_path/'maps')
    for o in photos: maps.save(o.id, Maps(np.array(o.tags), np.stack([(truth(o) == t) * .9 for t in o.tags]).astype(np.float32)))
    def broken(x):
        e = ask(x)
        e[1, :, 2, 3] = torch.nan
        return e
    monkeypatch.setattr(embedder.net, 'embed', broken)
    writers = {'cams': lambda s: spread.write_walked_cams(embedder, photos, maps, s, 1, settings=None, cell=4),
               'softmax': lambda s: spread.write_walked_softmax(embedder, photos, s, workers=1, settings=None, cell=4),
               'neighbours': lambda s: spread.write_neighbour_labels(embedder, photos, memory, s, workers=1, settings=None, k=3, grid=8),
               'nearest': lambda s: spread.write_nearest_labels(embedder, photos, weak, s, 1, settings=None, grid=8, cell=4)}
    for name, write in writers.items():
        (id, problem), = write(store := LabelStore(tmp_path/name))
        assert id == '1' and "1.png: the network's numbers for it are not finite. Train again with a lower rate." in problem, name
        assert sorted(store.ids()) == ['0', '2', '3'], name
    with pytest.raises(InputError, match="1.png: the network's numbers for it are not finite"): spread.segment_memory(embedder, photos, truth)


def test_an_embedder_gives_what_its_network_gives(photos):
    "Whatever the layout in memory, with and without mirror images, as vectors alone or with probabilities."
    from wsss_nb.segment.embedding import EmbeddingNet
    net = EmbeddingNet(4, 'resnet18', 8, 'stages', rates=(1, 2), pretrained=False).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): want = [net(v) for v in (x, x.flip(3))]
    embedder = spread.Embedder(net, ('background', *View.classes), 64)
    embedder.batch = lambda images, scale: x.contiguous(memory_format=torch.channels_last)
    e, m, p = embedder([0, 0])
    torch.testing.assert_close(e, want[0][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(m, want[1][0].flip(3), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(p, (want[0][1].softmax(1) + want[1][1].flip(3).softmax(1)) / 2, rtol=1e-3, atol=1e-4)
    assert [torch.equal(a, b) for a, b in zip(embedder.embeddings([0, 0]), (e, m))] == [True, True]
    alone, = embedder.embeddings([0, 0], mirror=False)
    assert torch.equal(alone, e)


def test_one_segment_only(embedder, tmp_path):
    "A photo of one colour has no neighbour but itself; nothing divides by zero (S10)."
    write(tmp_path/'flat.png', np.full((SIZE, SIZE, 3), 200, np.uint8))
    view = View([Item('flat', tmp_path/'flat.png', (1,))])
    memory = spread.segment_memory(embedder, view, lambda o: np.ones((SIZE, SIZE), np.uint8), (1.,), 1)
    assert len(memory) == 1
    assert spread.write_neighbour_labels(embedder, view, memory, store := LabelStore(tmp_path/'out'), workers=1, scales=(1.,), grid=1) == []
    assert (store.load('flat') == 1).all()


def test_interrupted_and_resumed(embedder, photos, tmp_path, monkeypatch):
    "What was finished stays, byte by byte, and the rest follows."
    whole, part = LabelStore(tmp_path/'whole'), LabelStore(tmp_path/'part')
    spread.write_walked_softmax(embedder, photos, whole, workers=1)
    seen, ask = [], embedder.net.embed
    def fails(x):
        seen.append(1)
        if len(seen) > 2: raise KeyboardInterrupt
        return ask(x)
    monkeypatch.setattr(embedder.net, 'embed', fails)
    embed = spread.partial(spread._everything, embedder=embedder, scales=(1.,))
    make = spread.partial(spread._softmax_finish, segment_of=photos.segment_of, read_label=None, options={})
    with pytest.raises(KeyboardInterrupt): spread.spread_view(photos, part, embed, make, 2, 1)
    assert sorted(part.ids()) == ['0', '1']
    before = part.path('0').stat().st_mtime_ns
    monkeypatch.undo()
    assert spread.write_walked_softmax(embedder, photos, part, workers=1) == []
    assert part.path('0').stat().st_mtime_ns == before
    for o in photos: assert part.path(o.id).read_bytes() == whole.path(o.id).read_bytes()


def test_several_processes_give_the_same(embedder, photos, tmp_path):
    stores = [LabelStore(tmp_path/f'{n}') for n in (1, 2)]
    for n, store in zip((1, 2), stores): spread.write_walked_softmax(embedder, photos, store, workers=n)
    for o in photos: assert stores[0].path(o.id).read_bytes() == stores[1].path(o.id).read_bytes()
