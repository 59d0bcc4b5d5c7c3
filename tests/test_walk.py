"Random walk: IRN's, Puzzle-CAM's and psa's own outputs, properties over random edge maps, hostile input, whole stores."
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsss_nb.data.items import Dataset, Item
from wsss_nb.data.store import Maps, MapStore
from wsss_nb.refine.crf import with_background
from wsss_nb.refine.walk import (
    EDGE, affinity_matrix, cell_means, detections, directions, find_centroids, from_interior, instance_maps, instance_masks, interior,
    la_ha_labels, path_affinities, path_ends, paths, psa_walk, random_walk, scaled_maps, transition, walk, walk_maps, write_walks)

GOLDEN = Path(__file__).parent/'golden'
tidy = settings(deadline=None, max_examples=25)


def golden(name): return np.load(GOLDEN/f'affinity_{name}.npz', allow_pickle=False)


# The originals' own outputs

@pytest.mark.parametrize('r', [3, 5, 10])
def test_paths_of_irn(r):
    z = golden('path_index')
    assert np.array_equal(path_ends(r), z[f'r{r}_search_dst'])
    assert [g.shape[1] for g in paths(r)] == z[f'r{r}_path_lengths'].tolist()
    assert [len(g) for g in paths(r)] == z[f'r{r}_n_paths'].tolist()
    kept = [k for k in range(len(paths(r))) if f'r{r}_paths_{k}' in z]
    assert len(kept) == (0 if r == 10 else len(paths(r)))
    for k in kept: assert np.array_equal(paths(r)[k], z[f'r{r}_paths_{k}'])
    h, w = z[f'r{r}_size']
    source = np.arange(h * w).reshape(h, w)[interior((h, w), r)].ravel()
    assert np.array_equal(source, z[f'r{r}_src'])
    assert np.array_equal(source + (path_ends(r) @ [w, 1])[:, None], z[f'r{r}_dst'])


def test_affinities_of_irn():
    z, y = golden('random_walk'), golden('labels_losses')
    a = path_affinities(z['a_edge'][0])
    assert np.allclose(a, z['a_sparse_aff'][0].reshape(34, 12, 15)[:, :-1, 1:-1], atol=1e-6)     # the rest is padding
    assert np.allclose(affinity_matrix(a).toarray(), z['a_affinity_dense'], atol=1e-6)
    assert np.allclose(transition(a).T.toarray(), z['a_T1'], atol=2e-6)
    for edge, aff in zip(y['edge'][:, 0], y['aff']):
        assert np.allclose(path_affinities(edge)[:, *interior(edge.shape)].reshape(34, -1), aff, atol=1e-6)


@pytest.mark.parametrize('name', 'ab')
def test_walk_of_irn(name):
    z = golden('random_walk')
    edge, x = z[f'{name}_edge'][0], z[f'{name}_x']
    assert np.abs(random_walk(x, edge) - z[f'{name}_rw'][:, 0]).max() < 3e-4
    assert np.abs(random_walk(x, edge, beta=8, exp_times=3) - z[f'{name}_rw_b8t3'][:, 0]).max() < 1e-5
    h, w = z[f'{name}_rw_up'].shape[1:]
    large = np.stack([cv2.resize(v, None, fx=4, fy=4, interpolation=cv2.INTER_LINEAR)[:h, :w] for v in random_walk(x, edge)])
    assert np.abs(scaled_maps(large, 'image') - z[f'{name}_rw_up']).max() < 3e-4


def test_matrix_after_256_steps():
    z = golden('random_walk')
    n = z['a_T256'].shape[0]
    t = walk(np.eye(n).reshape(n, *z['a_edge'].shape[1:]), transition(path_affinities(z['a_edge'][0])))
    assert np.abs(t.reshape(n, n) - z['a_T256']).max() < 3e-4


def test_walk_of_psa():
    z = golden('psa')
    a, steps = from_interior(z['aff'][0], (12, 14)), directions(5)
    assert np.allclose(affinity_matrix(a, ends=steps).toarray(), z['aff_dense'], atol=1e-6)
    m = transition(a, 8, ends=steps)
    assert np.allclose(m.T.toarray(), z['T1_beta8'], atol=1e-6)
    assert np.abs(walk(np.eye(168).reshape(168, 12, 14), m).reshape(168, 168) - z['T256_beta8']).max() < 3e-4
    source = np.arange(256).reshape(16, 16)[interior((16, 16))].ravel()
    assert np.array_equal(source, z['ind_from_16'])
    assert np.array_equal((source + (steps @ [16, 1])[:, None]).ravel(), z['ind_to_16'])
    values = np.random.default_rng(0).random((2, 96, 108)).astype(np.float32)
    x = cell_means(with_background(values, alpha=16))
    assert x.shape == (3, 12, 14) and np.allclose(x[:, -1, -1], with_background(values, alpha=16)[:, 88:, 104:].sum((1, 2)) / 64)
    expected = x.reshape(3, -1) @ z['T256_beta8']
    assert np.abs(psa_walk(values, a).reshape(3, -1) - expected).max() < 3e-4


def test_labels_of_psa():
    z = golden('psa_la_ha')
    scores = z['scores_la_ha'].transpose(2, 0, 1)
    assert np.array_equal(la_ha_labels(scores[:3], scores[3:]), z['label'])


def test_instances_of_irn():
    z = golden('irn_instance')
    assert np.array_equal(find_centroids(z['displacement']), z['centroids'])
    assert np.array_equal(instance_masks(z['centroids'], z['displacement']), z['instance_masks'])


# Properties

@st.composite
def grids(draw, least=1, most=11):
    "An edge map of any size, some of it shut, some of it open."
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    e = rng.random((draw(st.integers(least, most)), draw(st.integers(least, most))))
    return np.where(rng.random(e.shape) < draw(st.sampled_from([0, .3, 1])), rng.integers(0, 2, e.shape), e)


@tidy
@given(grids(), st.sampled_from([2, 3, 5, 7]), st.floats(.5, 12))
def test_columns_of_t_sum_to_one(edge, radius, beta):
    m = transition(path_affinities(edge, radius), beta, radius)
    assert np.allclose(m.sum(1), 1, atol=1e-12) and m.shape == (edge.size, edge.size)
    a = affinity_matrix(path_affinities(edge, radius), radius)
    assert abs(a - a.T).max() == 0 and (a.diagonal() == 1).all()


@tidy
@given(grids(), st.integers(0, 9), st.integers(0, 8))
def test_a_walk_is_an_average(edge, seed, times):
    x = np.random.default_rng(seed).random((2, *edge.shape))
    y = random_walk(x, edge, exp_times=times)
    x = x * (1 - edge)
    assert y.shape == x.shape
    assert (y <= x.max((1, 2), keepdims=True) + 1e-6).all() and (y >= x.min((1, 2), keepdims=True) - 1e-6).all()


@tidy
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_level_stays_level_without_edges(h, w, level):
    assert np.allclose(random_walk(np.full((1, h, w), level), np.zeros((h, w))), level, atol=1e-6)


@tidy
@given(grids(least=3), st.data())
def test_nothing_crosses_a_closed_edge(edge, data):
    c = data.draw(st.integers(1, edge.shape[1] - 2))
    edge[:, c] = 1
    x = np.zeros((1, *edge.shape)); x[..., :c] = 1
    y = random_walk(x, edge)
    assert not y[..., c:].any()
    assert np.allclose(random_walk(x[..., :c], edge[:, :c]), y[..., :c], atol=1e-6)


@tidy
@given(grids(least=4), st.integers(0, 9))
def test_nothing_slips_through_a_diagonal_chain(edge, seed):
    "Edge pixels that touch only at their corners are closed too: the paths are fat."
    h, w = edge.shape
    y, x = np.indices((h, w))
    edge[y == x] = 1
    v = np.zeros((1, h, w)); v[0, y > x] = np.random.default_rng(seed).random((y > x).sum()) + .1
    assert not random_walk(v, edge)[0, y < x].any()


@tidy
@given(grids())
def test_mirrored_image_mirrored_walk(edge):
    x = np.random.default_rng(0).random((1, *edge.shape))
    a, b = random_walk(x, edge), random_walk(x[..., ::-1], edge[:, ::-1])[..., ::-1]
    assert np.allclose(a, b, atol=1e-6)


def test_the_same_every_time():
    rng = np.random.default_rng(0)
    x, e = rng.random((2, 9, 14)), rng.random((9, 14))
    assert np.array_equal(random_walk(x, e), random_walk(x.copy(), e.copy()))


def test_every_pixel_has_partners():
    "Of a 12×14 grid without edges: psa's pixels have none to 60, padded ones 21 to 68."
    a = path_affinities(np.zeros((12, 14)))
    alone = from_interior(a[:, *interior((12, 14))].reshape(34, -1), (12, 14))
    psa, ours = ((np.diff(affinity_matrix(v).indptr) - 1).reshape(12, 14) for v in (alone, a))
    assert not psa[0, :4].any() and (psa.max(), ours.min(), ours.max()) == (60, 21, 68)


def test_squaring_fills_the_matrix():
    "Half as many steps, but more than twice as many entries; the result is the same."
    m = transition(path_affinities(np.zeros((24, 32))))
    assert (m @ m).nnz > 2 * m.nnz
    x = np.random.default_rng(0).random((2, 24, 32))
    assert np.allclose(walk(x, m, 2), walk(x, m @ m, 1), atol=1e-6)


def test_keys_go_with_their_maps():
    "Any class numbers in any order, 0 among them: each map is walked as if it were alone."
    rng = np.random.default_rng(0)
    v, e = rng.random((3, 7, 9)), rng.random((7, 9))
    out = walk_maps(Maps([9, 0, 4], v), e, by='class')
    assert out.keys.tolist() == [9, 0, 4]
    for k, m in zip(out.keys, v): assert np.allclose(walk_maps(Maps([k], m[None]), e, by='class').values[0], out.values[out.keys == k][0], atol=1e-6)


# Maps, empty and hostile

def test_maps_of_any_size_and_none():
    e = np.random.default_rng(0).random((7, 5))
    assert walk_maps(Maps([], np.zeros((0, 3, 3))), e).values.shape == (0, 7, 5)
    out = walk_maps(Maps([2, 9], np.ones((2, 3, 11))), e)
    assert out.keys.tolist() == [2, 9] and out.values.shape == (2, 7, 5) and out.values.max() == 1
    assert not walk_maps(Maps([1], np.zeros((1, 3, 3))), e).values.any()
    assert walk_maps(Maps([1], np.ones((1, 1, 1))), np.zeros((1, 1))).values.tolist() == [[[1.]]]
    assert not walk_maps(Maps([1], np.ones((1, 4, 4))), np.ones((4, 4))).values.any()      # edge everywhere


def test_by_image_and_by_class():
    v = np.array([[[.5, .1]], [[.2, .0]]])
    assert scaled_maps(v, 'image').max((1, 2)).tolist() == pytest.approx([1, .4])
    assert scaled_maps(v, 'class').max((1, 2)).tolist() == [1, 1]
    assert scaled_maps(v, None).max() == .5


@pytest.mark.parametrize('edge', [np.full((3, 3), np.nan), np.full((3, 3), 1.1), np.full((3, 3), -.1), np.zeros((0, 3)), np.zeros((1, 3, 3))])
def test_broken_edges_are_refused(edge):
    with pytest.raises(ValueError, match='edge'): random_walk(np.ones((1, 3, 3)), edge)


def test_broken_maps_and_options_are_refused():
    e = np.zeros((3, 3))
    with pytest.raises(ValueError, match='NaN'): random_walk(np.full((1, 3, 3), np.nan), e)
    with pytest.raises(ValueError, match='differ in size'): random_walk(np.ones((1, 3, 4)), e)
    with pytest.raises(ValueError, match='beta'): random_walk(np.ones((1, 3, 3)), e, beta=0)
    with pytest.raises(TypeError): random_walk(np.ones((1, 3, 3)), e, beta='10')          # IRN's command line gives a string
    with pytest.raises(ValueError, match='radius'): random_walk(np.ones((1, 3, 3)), e, radius=1)
    with pytest.raises(ValueError, match='channels'): transition(np.ones((12, 3, 3)))
    with pytest.raises(ValueError, match='interior'): from_interior(np.ones((34, 5)), (12, 14))
    with pytest.raises(ValueError, match='interior|inside'): from_interior(np.ones((34, 5)), (4, 8))
    with pytest.raises(ValueError, match='agree in shape'): la_ha_labels(np.ones((2, 3, 3)), np.ones((3, 3, 3)))


def test_instances_and_detections():
    masks = np.zeros((2, 6, 8), bool); masks[0, :, :4] = masks[1, :, 4:] = True
    values = np.zeros((2, 6, 8)); values[0] = .9; values[1, :2, :2] = .95
    parts = instance_maps(Maps([3, 4], values), masks)
    assert parts.keys.tolist() == [3, 3, 4]
    found = detections(parts, least=.1)
    assert sorted((k, round(s, 2), int(m.sum())) for k, s, m in found) == [(3, .9, 20), (3, .9, 24), (4, 0., 4)]
    assert detections(Maps([], np.zeros((0, 4, 4)))) == [] and len(instance_maps(Maps([], np.zeros((0, 6, 8))), masks).keys) == 0


# Stores

@pytest.fixture
def filled(tmp_path):
    "A view of four items without image files, with maps and edge maps."
    items = [Item(f'i{n}', tmp_path/f'i{n}.jpg', (1,)) for n in range(4)]
    view = Dataset('four', ['a'], items, {'train': [o.id for o in items]}).view('tags', 'train')
    stores = [MapStore(tmp_path/n) for n in ('maps', 'edges', 'walked')]
    rng = np.random.default_rng(0)
    for o in items:
        stores[0].save(o.id, Maps([1], rng.random((1, 4, 5))))
        stores[1].save(o.id, Maps([EDGE], rng.random((1, 8, 9))))
    return view, stores


@pytest.mark.parametrize('workers', [1, 2])
def test_stores(filled, workers):
    view, (maps, edges, out) = filled
    assert write_walks(view, maps, edges, out, workers=workers, exp_times=5) == []
    for o in view:
        expected = walk_maps(maps.load(o.id), edges.load(o.id).values[0], exp_times=5)
        assert np.allclose(out.load(o.id).values, expected.values, atol=1e-3)
    times = [out.path(o.id).stat().st_mtime_ns for o in view]
    out.path('i2').unlink()
    assert write_walks(view, maps, edges, out, workers=workers, exp_times=5) == []
    assert [out.path(o.id).stat().st_mtime_ns == t for o, t in zip(view, times)] == [True, True, False, True]


def test_broken_files_are_named(filled, tmp_path):
    view, (maps, edges, out) = filled
    maps.path('i0').write_bytes(b'PK\x03\x04')
    with open(edges.path('i1'), 'wb') as f: pickle.dump({'edge': 1}, f)
    edges.save('i2', Maps([7], np.zeros((1, 4, 4))))
    edges.save('i3', Maps([EDGE], np.full((1, 4, 4), 2.)))
    failed = dict(write_walks(view, maps, edges, out, workers=1))
    assert sorted(failed) == ['i0', 'i1', 'i2', 'i3'] and len(out) == 0
    assert 'i0.npz' in failed['i0'] and 'not a readable map file' in failed['i1']
    assert 'not an edge map' in failed['i2'] and '[0, 1]' in failed['i3']
    edges.path('i1').unlink()
    assert 'no maps of this image' in dict(write_walks(view, maps, edges, out, workers=1))['i1']
    with pytest.raises(ValueError, match='radius'): write_walks(view, maps, edges, out, radius=0)
    with pytest.raises(TypeError): write_walks(view, maps, edges, out, gamma=1)
