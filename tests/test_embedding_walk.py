"Random walk in embedding space: SPML's own outputs, properties over random embeddings, hostile input."
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from wsss_nb.data.store import Maps
from wsss_nb.refine.crf import crf_present, crf_probabilities, with_background
from wsss_nb.refine.embedding_walk import (
    SPML_CRF, cam_labels, embedding_affinity, embedding_transition, embedding_walk, peak_normalised, walk_dense, walked_labels)

GOLDEN = Path(__file__).parent/'golden'
tidy = settings(deadline=None, max_examples=25)


def golden(name):
    with np.load(GOLDEN/f'spml_{name}.npz', allow_pickle=False) as z: return {k: z[k] for k in z.files}


def enlarged(values, h, w): return np.stack([cv2.resize(m, (w, h), interpolation=cv2.INTER_LINEAR) for m in values], 2)


# The original's own outputs

def test_walk_on_cams_of_spml():
    z = golden('random_walk')
    views = [torch.from_numpy(z['embedding'][0])]
    full = np.zeros_like(z['cam_full'])
    full[[0, *(z['cam_classes'] + 1)]] = with_background(z['cam_maps'], alpha=6)
    assert np.allclose(full, z['cam_full'], atol=1e-6)
    assert np.allclose(embedding_affinity(views), z['aff'], rtol=1e-5, atol=3e-6)
    six = np.linalg.matrix_power(embedding_transition(views).T.astype(float), 64)
    assert np.allclose(six, z['trans'], atol=1e-5)
    walked = enlarged(embedding_walk(full, views, (9, 11)), 72, 88)
    assert np.abs(walked - z['cam_rw']).max() < 1e-5
    assert np.array_equal(walked.argmax(2), z['pred'])


def test_labels_of_cams_without_crf_are_those_of_spml():
    z = golden('random_walk')
    guide = np.zeros((72, 88, 3), np.uint8)
    labels = cam_labels(guide, Maps(z['cam_classes'] + 1, z['cam_maps']), [torch.from_numpy(z['embedding'][0])], settings=None)
    assert np.array_equal(labels, z['pred'])


def test_walk_on_probabilities_of_spml():
    z = golden('softmax_random_walk')
    p = peak_normalised(z['prob'][0], z['tags'])
    assert np.allclose(p, z['normalised'], atol=1e-6)
    a = torch.from_numpy(z['aff'])**20
    t = (a / a.sum(0)).T.contiguous().numpy()
    walked = enlarged(walk_dense(p, t), 72, 88)
    assert np.abs(walked - z['cam_rw']).max() < 1e-5
    assert np.array_equal(walked.argmax(2), z['pred'])


def test_peaks_of_votes_of_spml():
    z = golden('nn_prob_normalise')
    assert np.allclose(peak_normalised(z['prob'], z['tags'], .15, 'keep'), z['out'], rtol=1e-5, atol=1e-7)
    ours = peak_normalised(z['prob'], z['tags'], .15)
    assert not ours[~z['tags']].any() and np.array_equal(ours[z['tags']], peak_normalised(z['prob'], z['tags'], .15, 'keep')[z['tags']])


def test_crf_of_spml():
    z = golden('dense_crf')
    assert np.abs(crf_probabilities(z['image'], z['prob'], SPML_CRF) - z['Q']).max() < 1e-4
    assert np.abs(crf_present(z['image'], z['prob'], SPML_CRF) - z['Q']).max() < 1e-4


# Properties

def views(seed, d, h, w, n=2):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(d, h, w, generator=g) for _ in range(n)]


@tidy
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.integers(2, 8), st.integers(0, 40), st.integers(1, 3), st.floats(.5, 30))
def test_walk_is_the_power_of_the_matrix(seed, h, w, d, steps, k, power):
    v, m = views(seed, d, h, w), np.random.default_rng(seed).random((k, h, w), dtype=np.float32)
    a = np.mean([np.exp(5 * ((u := F.normalize(x.double().flatten(1), dim=0).numpy()).T @ u - 1)) for x in v], 0)**power
    t = np.linalg.matrix_power(a / a.sum(0), steps)
    assert np.abs(embedding_walk(m, v, steps=steps, power=power) - (m.reshape(k, -1) @ t).reshape(m.shape)).max() < 1e-4


@tidy
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
def test_walked_values_stay_between_those_given(seed, h, w):
    m = np.random.default_rng(seed).random((2, h, w), dtype=np.float32)
    out = embedding_walk(m, views(seed, 3, h, w))
    assert out.min() >= m.min() - 1e-5 and out.max() <= m.max() + 1e-5


def test_equal_pixels_share_and_strange_ones_do_not():
    e = torch.zeros(2, 4, 6)
    e[0, :, :3] = e[1, :, 3:] = 1
    m = np.zeros((1, 4, 6), np.float32)
    m[0, 0, 0] = 1
    out = embedding_walk(m, [e])[0]
    assert np.allclose(out[:, :3], 1 / 12, atol=1e-5) and out[:, 3:].max() < 1e-6


def test_a_mirror_image_counts_as_much_as_the_image():
    a, b = views(0, 4, 5, 5)
    assert torch.allclose(embedding_affinity([a, b]), (embedding_affinity([a]) + embedding_affinity([b])) / 2, atol=1e-6)


def test_absent_classes_are_never_labelled():
    rng = np.random.default_rng(0)
    p, guide = rng.dirichlet(np.ones(6), (4, 5)).transpose(2, 0, 1), rng.integers(0, 256, (32, 40, 3), np.uint8)
    p[2] += .5
    for settings_ in (None, SPML_CRF):
        labels = walked_labels(guide, peak_normalised(p, [0, 1, 0, 0, 1, 0]), views(0, 4, 8, 8), settings=settings_)
        assert set(np.unique(labels)) <= {0, 1, 4}


# Input that cannot be used

def test_embeddings_of_zero_and_maps_of_zero():
    m = np.random.default_rng(0).random((2, 3, 4), dtype=np.float32)
    assert np.allclose(embedding_walk(m, [torch.zeros(5, 3, 4)]), m, atol=1e-6)     # each pixel keeps what it has
    assert not embedding_walk(0 * m, views(0, 5, 3, 4)).any()
    assert not peak_normalised(0 * m).any()


def test_images_smaller_than_a_cell():
    guide = np.zeros((5, 6, 3), np.uint8)
    assert walked_labels(guide, np.ones((2, 3, 3), np.float32) * [[[.2]], [[.8]]], views(0, 4, 2, 2)).tolist() == [[1] * 6] * 5


@pytest.mark.parametrize('call, text', [
    (lambda m, v: embedding_walk(m * np.nan, v), 'NaN'),
    (lambda m, v: embedding_walk(m, [v[0] / 0]), 'NaN'),
    (lambda m, v: embedding_walk(m[0], v), 'K×H×W'),
    (lambda m, v: embedding_affinity([]), 'one size'),
    (lambda m, v: embedding_affinity([v[0], v[1][:, 1:]]), 'one size'),
    (lambda m, v: embedding_walk(m, v, power=0), 'above 0'),
    (lambda m, v: embedding_walk(m, v, steps=-1), 'at least 0'),
    (lambda m, v: peak_normalised(m, [True]), 'present'),
    (lambda m, v: peak_normalised(m, absent='drop'), 'zero'),
    (lambda m, v: walked_labels(np.zeros((3, 4, 3)), m, v), 'uint8')])
def test_complaints(call, text):
    with pytest.raises((ValueError, TypeError), match=text): call(np.ones((2, 3, 4), np.float32), views(0, 5, 3, 4))
