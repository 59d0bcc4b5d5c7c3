"Clusters, segments, prototypes and retrieval: SPML's own outputs, properties over random embeddings, hostile input."
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from wsss_nb.data.items import VOID
from wsss_nb.segment.clusters import (
    Segments, _kernel, colour_features, cut_segments, grid_clusters, location_features, majority_label, nearest_prototypes, neighbour_label,
    neighbour_shares, prototypes, retrieve, segment_means, segment_pixels, spherical_kmeans, unit_pixels, with_local)

GOLDEN = Path(__file__).parent/'golden'
tidy = settings(deadline=None, max_examples=25)


def golden(name):
    with np.load(GOLDEN/f'spml_{name}.npz', allow_pickle=False) as z: return {k: torch.from_numpy(z[k]) for k in z.files}


def same_partition(a, b):
    "Both number the same groups, in whatever order."
    pairs = len(set(zip(a.tolist(), b.tolist())))
    return pairs == len(a.unique()) == len(b.unique())


# The original's own outputs

def test_place_and_grid_of_spml():
    z = golden('kmeans')
    assert torch.equal(location_features(24, 32), z['location'])
    assert torch.equal(grid_clusters(24, 32, 6, 6), z['init_6x6'])
    assert torch.equal(grid_clusters(25, 33, 4, 5), z['init_4x5_25x33'])


def test_rounds_of_spml():
    z = golden('kmeans')
    v = with_local(unit_pixels(z['emb'][:1]), location_features(24, 32))
    assert torch.allclose(v[0], z['emb_with_loc_img0'], atol=1e-6)
    start = grid_clusters(24, 32, 6, 6).flatten()
    p = prototypes(v[0], start)
    assert torch.allclose(p, z['proto_iter0'], atol=1e-5)
    assert torch.equal(nearest_prototypes(v[0], p), z['nearest0'])
    for t in (0, 1, 2, 10):
        for empty in ('zero', 'keep'):      # no cluster runs empty here
            assert (spherical_kmeans(v[0], start, t, empty=empty) == z[f'km_iter{t}']).float().mean() >= .999


def test_segments_of_spml():
    z = golden('kmeans')
    label = torch.where(z['labels'] == z['ignore_index'], VOID, z['semantic'])
    s, e, v = segment_pixels(z['emb'], label, z['instance'], 6, empty='zero')
    assert torch.allclose(e, z['seg_emb'], atol=1e-6) and torch.allclose(v, z['seg_emb_loc'], atol=1e-6)
    assert torch.equal(s.image[s.id], z['seg_batch'])
    assert torch.equal((s.label * 2048 + s.region)[s.id], z['seg_labels'])
    assert torch.equal(s.id, z['seg_cluster'])


def test_segments_without_labels_of_spml():
    z = golden('kmeans')
    s, _, _ = segment_pixels(z['emb'], rows=4, cols=5, empty='zero')
    assert torch.equal(s.id, z['nolab_cluster']) and torch.equal(s.image[s.id], z['nolab_batch'])


def test_prototypes_of_spml():
    z = golden('prototypes')
    assert torch.allclose(prototypes(z['emb'], z['cluster']), z['prototypes'], rtol=1e-5, atol=1e-6)
    assert torch.allclose(prototypes(z['emb_loc'], z['g_cluster']), z['g_proto_loc'], rtol=1e-5, atol=1e-6)
    assert torch.allclose(prototypes(z['emb'], z['g_cluster']), z['g_proto'], rtol=1e-5, atol=1e-6)
    assert torch.allclose(segment_means(z['emb'], z['cluster']), z['segment_mean'], rtol=1e-5, atol=1e-6)
    majority = majority_label(z['semantic'], z['cluster'])
    assert torch.equal(majority, z['majority_label'])
    assert torch.equal((majority[z['cluster']] == z['semantic']).nonzero(), z['majority_pixel_idx'])
    for name, given_ in (('sem', 'semantic'), ('inst', 'instance'), ('batch', 'batch')):
        assert torch.equal(majority_label(z[given_], z['g_cluster']), z[f'g_proto_{name}'])
    cut = cut_segments(z['cluster'].view(1, 1, -1), z['semantic'].view(1, 1, -1))
    assert torch.equal(cut.id, z['prep_unique']) and torch.equal(cut.label, z['prep_proto_labels'])


def test_retrieval_of_spml():
    z = golden('retrieval')
    place = retrieve(z['query'], z['memory'])[1]
    assert torch.equal(z['memory_label'][place], z['top20'])
    assert (z['memory_label'][place] == 0).float().mean() == z['acc'], 'the queries were recorded as class 0'
    assert torch.equal(neighbour_label(place, z['memory_label'], 6), z['majority'])
    _, segments = z['pix_cluster'].unique(return_inverse=True)
    place = retrieve(prototypes(z['pix_emb'], segments), z['memory'])[1]
    assert torch.equal(z['memory_label'][place][segments], z['pix_top20'])
    assert torch.equal(neighbour_label(place, z['memory_label'], 6)[segments], z['pix_pred'])


def test_local_features_of_spml():
    z = golden('local_features')
    h, w = z['loc_only'].shape[1:3]
    assert torch.equal(location_features(h, w), z['loc_only'][0])
    assert torch.allclose(_kernel(5, True, None).expand(3, 1, 5, 5), z['kernel'])
    colour = colour_features(z['image'], (h, w), original=True)
    assert torch.allclose(torch.cat([location_features(h, w)[None], colour], 3), z['out'], atol=1e-5)
    ours = colour_features(z['image'], (h, w))
    assert not torch.allclose(ours, colour, atol=.05)


# Properties

def embedding(seed, *shape): return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def plain_kmeans(x, z, iterations, k):
    for _ in range(iterations):
        sums = torch.zeros(k, x.shape[1], dtype=x.dtype).index_add_(0, z, x)
        z = (x @ F.normalize(sums, dim=1).T).argmax(1)
    return z


@tidy
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(4, 12), st.integers(4, 12), st.integers(2, 9), st.integers(1, 4), st.integers(1, 64))
def test_kmeans_is_the_plain_form_image_by_image(seed, n, h, w, d, g, block):
    x = embedding(seed, n, h * w, d).abs()          # no negative cosine: a zero centre wins nowhere
    x = F.normalize(x, dim=-1)
    start = grid_clusters(h, w, g, g).flatten().expand(n, -1)
    got = spherical_kmeans(x, start, 6, block=block, empty='zero')
    for a, b, c in zip(x, start, got):
        assert (plain_kmeans(a.double(), b, 6, g * g) == c).float().mean() > .95     # two equal cosines may part ways


@tidy
@given(st.integers(0, 10**6))
def test_void_pixels_change_nothing(seed):
    x, g = embedding(seed, 60, 5), torch.Generator().manual_seed(seed)
    start, there = torch.randint(0, 4, (60,), generator=g), torch.rand(60, generator=g) < .7
    some = spherical_kmeans(x, start.where(there, torch.tensor(-1)), 5, n=4)
    assert torch.equal(some[there], spherical_kmeans(x[there], start[there], 5, n=4))
    assert (some[~there] == -1).all()


def test_a_cluster_that_never_had_a_pixel_is_never_chosen():
    x = F.normalize(torch.tensor([[1., 0.], [-1., 0.1], [-1., -.1]]), dim=1)
    start = torch.tensor([0, 0, 0])
    assert spherical_kmeans(x, start, 1, n=3).tolist() == [0, 0, 0]
    assert 1 in spherical_kmeans(x, start, 1, n=3, empty='zero').tolist()


def test_an_emptied_cluster_keeps_its_centre():
    # The second cluster has its centre at 45 degrees and loses both pixels in the first round. In the second the fourth
    # cluster's centre has moved from 52 to 56.5 degrees, and the pixel at 50 is nearer to the centre that nobody is left at.
    angles = np.radians([-1, 0, 90, 90.5, 50, 54, 60, 62, 120, 122])
    x = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], 1), dtype=torch.float)
    z = torch.tensor([0, 1, 1, 2, 3, 3, 4, 4, 4, 4])
    assert spherical_kmeans(x, z, 1).tolist() == [0, 0, 2, 2, 3, 3, 3, 3, 4, 4]
    assert spherical_kmeans(x, z, 2).tolist() == [0, 0, 2, 2, 1, 3, 3, 3, 4, 4]
    assert spherical_kmeans(x, z, 2, empty='zero').tolist() == [0, 0, 2, 2, 3, 3, 3, 3, 4, 4]


@tidy
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_segments_are_the_joint_partition(seed, n):
    g = torch.Generator().manual_seed(seed)
    z, label, region = (torch.randint(0, k, (n, 6, 7), generator=g) for k in (3, 4, 2))
    label[torch.rand(label.shape, generator=g) < .3] = VOID
    s = cut_segments(z, label, region)
    inside = label.flatten() != VOID
    image = torch.arange(n).view(-1, 1, 1).expand_as(z)
    rows = torch.stack([t.flatten()[inside] for t in (image, z, label, region)], 1)
    found, id = rows.unique(dim=0, return_inverse=True)
    assert torch.equal(torch.stack([s.image, s.cluster, s.label, s.region], 1), found)
    assert torch.equal(s.id, id)
    assert torch.equal(s.paint(s.label), label)
    assert torch.equal(s.pixels(label), label.flatten()[inside])


@tidy
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 3000), st.integers(1, 25))
def test_retrieval_is_that_of_scikit_learn(seed, q, m, k):
    query, memory = embedding(seed, q, 8).double(), embedding(seed + 1, m, 8).double()
    cosine, place = retrieve(query, memory, k, elements=q * 1024)
    wanted = NearestNeighbors(n_neighbors=min(k, m), algorithm='brute', metric='cosine').fit(memory.numpy()).kneighbors(query.numpy())
    assert np.array_equal(place.numpy(), wanted[1])
    assert np.allclose(1 - cosine.numpy(), wanted[0], atol=1e-9)


def test_cells_find_what_a_sort_finds():
    query, memory = embedding(0, 7, 6).double(), embedding(1, 40_001, 6).double()
    for elements in (7 * 1024, 7 * 10_000, 10**9):
        assert torch.equal(retrieve(query, memory, 20, elements=elements)[1], (query @ memory.T).argsort(1, descending=True)[:, :20])


def test_own_and_groups():
    m = embedding(3, 3000, 6)
    group = torch.arange(3000) % 2
    own = torch.arange(3000)[::100]
    assert torch.equal(retrieve(m[own], m, 1)[1][:, 0], own)
    place = retrieve(m[own], m, 9, own=own, groups=(group[own], group), elements=30 * 1024)[1]
    assert not (place == own[:, None]).any()
    assert (group[place] == group[own][:, None]).all()
    cos = (m[own] @ m.T).masked_fill(group[own][:, None] != group, -9).scatter(1, own[:, None], -9)
    assert torch.equal(place, cos.topk(9, 1).indices)


def test_gradients_reach_every_pixel():
    x = embedding(0, 12, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: prototypes(x, torch.arange(12) % 5), x)


# Input that cannot be used

def test_one_segment_and_none():
    e = torch.randn(1, 4, 3, 3)
    s, unit, _ = segment_pixels(e, rows=1)
    assert isinstance(s, Segments) and len(s) == 1
    place = retrieve(prototypes(unit, s.id), embedding(0, 3, 4), 20)[1]
    assert place.shape == (1, 3) and neighbour_label(place, torch.tensor([2, 2, 1]), 3).tolist() == [2]
    s, unit, joint = segment_pixels(e, torch.full((1, 3, 3), VOID))
    assert len(s) == 0 and unit.shape == (0, 4) and joint.shape == (0, 6)
    assert (s.paint(s.label) == VOID).all()
    assert retrieve(unit, embedding(0, 3, 4))[1].shape == (0, 3)


def test_a_void_image_beside_a_good_one():
    e, label = torch.randn(2, 4, 6, 6), torch.zeros(2, 6, 6, dtype=torch.long)
    label[0] = VOID
    s, unit, _ = segment_pixels(e, label, rows=2)
    assert s.image.unique().tolist() == [1] and prototypes(unit, s.id).isfinite().all()
    alone = segment_pixels(e[1:], label[1:], rows=2)[0]
    assert torch.equal(s.id, alone.id)


@pytest.mark.parametrize('call, text', [
    (lambda x: spherical_kmeans(x, torch.zeros(4, dtype=torch.long)), 'do not fit'),
    (lambda x: spherical_kmeans(x, torch.zeros(5, dtype=torch.long), empty='drop'), 'keep'),
    (lambda x: cut_segments(torch.zeros(1, 2, 2, dtype=torch.long), torch.full((1, 2, 2), -1)), 'start at 0'),
    (lambda x: cut_segments(torch.zeros(1, 2, 2, dtype=torch.long), region=torch.zeros(2, 2)), 'differ in size'),
    (lambda x: retrieve(x, x[:0]), 'no prototype'),
    (lambda x: retrieve(x, x, 0), 'at least 1'),
    (lambda x: retrieve(x, x[:, :2]), 'do not fit'),
    (lambda x: neighbour_shares(torch.zeros(1, 1, dtype=torch.long), torch.tensor([254]), 21), 'unlabelled'),
    (lambda x: grid_clusters(0, 4, 2, 2), 'at least 1')])
def test_complaints(call, text):
    with pytest.raises(ValueError, match=text): call(embedding(0, 5, 3))
